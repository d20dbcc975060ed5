"""Heun's method as a scheduler for wan-dit."""
