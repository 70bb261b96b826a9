"""γ, threshold, conformal interval and screen of one engine, fitted to prompts whose answer is known."""
