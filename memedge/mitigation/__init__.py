"""Prompt embeddings, or starting noise, moved until a prompt no longer brings a training image back."""
