"""Training data and recipes."""
