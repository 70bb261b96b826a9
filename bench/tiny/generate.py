"""Generation with classifier-free guidance."""

import numpy as np
import torch
from model import Model, scheduler
from vae import LATENT_CHANNELS, LATENT_SIZE, decode

STEPS = 20
GUIDANCE = 4.0
CHUNK = 64  # pictures denoised at once


@torch.inference_mode()
def generate(model: Model, prompts: list[str], seeds: int) -> np.ndarray:
    """Return uint8 pictures [len(prompts), seeds, 64, 64, 3]; seed k starts from noise k."""
    states = model.text_encoder(input_ids=model.tokenize(prompts))[0].repeat_interleave(seeds, 0)
    empty = model.text_encoder(input_ids=model.tokenize([""]))[0]
    shape = (1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(1000 + k)) for k in range(seeds)])
    noise = noise.repeat(len(prompts), 1, 1, 1)
    pictures = [
        decode(model.vae, denoise(model, x, h, empty))
        for x, h in zip(noise.split(CHUNK), states.split(CHUNK), strict=True)
    ]
    return np.concatenate(pictures).reshape(len(prompts), seeds, *pictures[0].shape[1:])


def denoise(model: Model, latent: torch.Tensor, states: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Run DDIM from pure noise [B, 4, 16, 16] for prompt embeddings [B, L, D]."""
    ddim = scheduler()
    ddim.set_timesteps(STEPS)
    both = torch.cat([empty.expand_as(states), states])
    for t in ddim.timesteps:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = model.unet(torch.cat([latent, latent]), t, both).sample.float()
        uncond, cond = prediction.chunk(2)
        latent = ddim.step(uncond + GUIDANCE * (cond - uncond), t, latent).prev_sample
    return latent
