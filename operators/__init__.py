"""One file per step of a lane, each a callable class that Ray Data runs."""
