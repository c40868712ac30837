"""One file per subcommand of `stormline`."""
