"""The detector as METHODS.md §1 writes it, in plain torch and diffusers; shares no code with the product."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


def load(folder: Path):
    """Return (unet, text encoder, tokenizer, 50-step DDIM scheduler) of a diffusers-format directory, in fp32."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(50)
    return unet, text_encoder, tokenizer, scheduler


def embed(text_encoder, tokenizer, prompt: str) -> torch.Tensor:
    ids = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return text_encoder(ids).last_hidden_state


@torch.no_grad()
def statistics(folder: Path, prompts: list[str], draws: int, seed: int = 42) -> list[dict[str, float]]:
    """Return per prompt: norm, and the alignment for every "<operands>/<channel|flat>"."""
    unet, text_encoder, tokenizer, scheduler = load(folder)
    shape = (draws, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    t_norm, t_cos = scheduler.timesteps[0], scheduler.timesteps[-3]
    empty = embed(text_encoder, tokenizer, "")

    def guidance(prompt: str, t: torch.Tensor):
        """The published batch of 2n: unconditional and conditional predictions on the same noise."""
        states = torch.cat([empty.repeat(draws, 1, 1), embed(text_encoder, tokenizer, prompt).repeat(draws, 1, 1)])
        e0, ec = unet(torch.cat([x, x]), t, states).sample.double().chunk(2)
        return e0, ec, ec - e0

    results = []
    for prompt in prompts:
        _, _, delta = guidance(prompt, t_norm)
        norm = delta.flatten(1).norm(dim=1).mean()
        if scheduler.config.prediction_type == "v_prediction":
            alpha = scheduler.alphas_cumprod[t_norm].double()
            norm = norm * alpha.sqrt() / (1 - alpha)
        e0, ec, delta = guidance(prompt, t_cos)
        result = {"norm": norm.item()}
        for name, (a, b) in {
            "uncond_delta": (e0, delta),
            "cond_uncond": (ec, e0),
            "cond_delta": (ec, delta),
        }.items():
            result[f"{name}/channel"] = F.cosine_similarity(a, b, dim=1, eps=1e-8).mean((1, 2)).mean().item()
            result[f"{name}/flat"] = F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-8).mean().item()
        results.append(result)
    return results
