"""Watching a generation from within: every step's own predictions, at no further pass."""
