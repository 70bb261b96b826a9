"""How good detectors are on prompts whose answer is known: figures with intervals, and a report."""
