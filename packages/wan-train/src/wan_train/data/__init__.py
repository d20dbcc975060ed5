"""Data sets: moving shapes rendered on the fly, with captions."""
