"""Fixed vectors of words as a text encoder: an example of a plugin for wan-text."""

__version__ = "0.1.0"
