"""Cosine transforms of blocks as a codec for wan-vae: an example of a third-party package."""

__version__ = "0.1.0"
