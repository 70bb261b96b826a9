"""γ, the threshold and the conformal interval of one engine, fitted to prompts whose answer is known."""
