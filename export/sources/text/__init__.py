"""Each family's text encoders as one torch module: from a prompt's ids to all that a denoiser takes of the prompt."""
