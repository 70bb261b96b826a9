"""How each family's pipelines call their denoiser, a file each; all that the guard knows of a family."""
