"""The detector as docs/methods.md §1 writes it, in plain torch and diffusers; shares no code with the product."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from memedge.engine.precision import ENGINE

MODES = [(o, a) for o in ("uncond_delta", "cond_uncond", "cond_delta") for a in ("channel", "flat")]


def load(folder: Path):
    """Return the pipeline of a diffusers-format directory in fp32, with a 50-step DDIM scheduler and without a VAE."""
    parts = {
        "vae": None,
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval(),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    if (folder / "text_encoder_2").is_dir():
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **none)
    pipeline.scheduler.set_timesteps(50)
    return pipeline


def embed(pipeline, prompt: str):
    """Return what the pipeline's UNet takes beside latents and timestep, for no prompt and for the prompt."""
    if not hasattr(pipeline, "text_encoder_2"):
        cond, uncond = pipeline.encode_prompt(prompt, "cpu", 1, True)
        return {"encoder_hidden_states": uncond}, {"encoder_hidden_states": cond}
    cond, uncond, pooled, no_pooled = pipeline.encode_prompt(prompt, device="cpu")
    size = (8 * pipeline.unet.config.sample_size,) * 2
    width = pipeline.text_encoder_2.config.projection_dim
    times = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, width)
    return [
        {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": row, "time_ids": times}}
        for states, row in ((uncond, no_pooled), (cond, pooled))
    ]


@torch.no_grad()
def guidance(folder: Path, prompts: list[str], latents: np.ndarray, timestep: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ε_c and ε_0 of each prompt on its own latents [R, C, H, W], by diffusers' UNet and scheduler."""
    pipeline = load(folder)
    alpha = pipeline.scheduler.alphas_cumprod[timestep]
    found = []
    for prompt, x in zip(prompts, torch.from_numpy(latents), strict=True):
        outputs = [pipeline.unet(x[None], timestep, **inputs).sample[0] for inputs in reversed(embed(pipeline, prompt))]
        if pipeline.scheduler.config.prediction_type == "v_prediction":
            outputs = [alpha.sqrt() * v + (1 - alpha).sqrt() * x for v in outputs]
        found.append(torch.stack(outputs).numpy())
    cond, uncond = np.stack(found, axis=1)
    return cond, uncond


@torch.no_grad()
def statistics(folder: Path, prompts: list[str], draws: int, seed: int = 42, first: int = 0) -> list[dict[str, float]]:
    """Return per prompt: norm, and the alignment for every "<operands>/<channel|flat>".

    `first` is the place of t_norm among the timesteps.
    """
    pipeline = load(folder)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    shape = (draws, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    t_norm, t_cos = scheduler.timesteps[first], scheduler.timesteps[-3]

    def guidance(prompt: str, t: torch.Tensor):
        """Unconditional and conditional predictions on the same noise."""
        e0, ec = (
            torch.cat([unet(noise[None], t, **inputs).sample.double() for noise in x])
            for inputs in embed(pipeline, prompt)
        )
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


def agree(detector, expected: list[dict[str, float]], prompts: list[str], precision: str = "fp32") -> None:
    """Fail unless a detector's statistics are the expected ones within the precision table."""
    tolerance = ENGINE[precision]
    for operands, alignment in MODES:
        scores = detector.score(prompts, operands=operands, alignment=alignment)
        np.testing.assert_allclose(scores.norm, [e["norm"] for e in expected], rtol=tolerance.norm)
        own = [e[f"{operands}/{alignment}"] for e in expected]
        np.testing.assert_allclose(scores.alignment, own, rtol=0, atol=tolerance.alignment)
