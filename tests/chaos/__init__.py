"""Kills whatever can die under a run of known input, and compares its tables with those of a run in peace."""
