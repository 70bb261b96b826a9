"""Many callers of one detector: their prompts go through the UNet together. No HTTP here."""
