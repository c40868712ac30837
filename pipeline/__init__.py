"""What runs: command line, settings, sources, the lane, sinks, checkpoints and the Serve application."""
