"""Prompts: in Python, in files, and in lists whose answer is known."""
