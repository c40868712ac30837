"""The network, on torch and transformers alone."""
