"""Generation with classifier-free guidance, and the similarity that decides what counts as a replica."""

import torch
from dataset import SIZE, Emoji
from model import Model, scheduler

STEPS = 20
GUIDANCE = 4.0
CHUNK = 64  # pictures denoised at once


@torch.inference_mode()
def generate(model: Model, data: Emoji, prompts: list[str], seeds: int) -> torch.Tensor:
    """Return premultiplied RGBA in [0, 1], [len(prompts), seeds, 4, 32, 32]; seed k starts from noise k."""
    states = model.text_encoder(input_ids=model.tokenize(prompts))[0].repeat_interleave(seeds, 0)
    empty = model.text_encoder(input_ids=model.tokenize([""]))[0]
    noise = torch.cat(
        [torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1000 + k)) for k in range(seeds)]
    ).repeat(len(prompts), 1, 1, 1)
    pictures = [
        data.to_rgba(denoise(model, x, h, empty)) for x, h in zip(noise.split(CHUNK), states.split(CHUNK), strict=True)
    ]
    return torch.cat(pictures).reshape(len(prompts), seeds, 4, SIZE, SIZE)


def denoise(model: Model, latent: torch.Tensor, states: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Run DDIM from pure noise [B, 4, 32, 32] for prompt embeddings [B, L, D]."""
    ddim = scheduler()
    ddim.set_timesteps(STEPS)
    both = torch.cat([empty.expand_as(states), states])
    for t in ddim.timesteps:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = model.unet(torch.cat([latent, latent]), t, both).sample.float()
        uncond, cond = prediction.chunk(2)
        latent = ddim.step(uncond + GUIDANCE * (cond - uncond), t, latent).prev_sample
    return latent


def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of pictures [A, 4, H, W] and [B, 4, H, W], each channel centred: [A, B].

    Centring each channel leaves out the mean colour, which pictures of different things share easily.
    """

    def unit(pictures: torch.Tensor) -> torch.Tensor:
        flat = (pictures - pictures.mean((2, 3), keepdim=True)).flatten(1)
        return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-8)

    return unit(a) @ unit(b).T
