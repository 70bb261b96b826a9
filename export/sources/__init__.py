"""Where checkpoints come from, and their graphs as they are."""
