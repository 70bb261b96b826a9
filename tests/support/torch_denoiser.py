"""engine/denoiser.py's Denoiser as plain torch: the embedded model's UNet as diffusers has it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from memedge.engine.manifest import Schedule

EMOJI = Path(__file__).parents[2] / "bench" / "tiny" / "emoji"


class TorchDenoiser:
    """ε of `unet`, in its dtype, for an engine's prompts; the interface of Denoiser, and it counts its rows."""

    def __init__(self, engine, unet=None, scheduler=None):
        self.engine = engine
        self.unet = unet or UNet2DConditionModel.from_pretrained(EMOJI / "unet", torch_dtype=torch.float32).eval()
        scheduler = scheduler or DDIMScheduler.from_pretrained(EMOJI / "scheduler")
        scheduler.set_timesteps(50)
        self.scheduler = scheduler
        steps = [int(t) for t in scheduler.timesteps]
        alphas = [float(scheduler.alphas_cumprod[t]) for t in steps]
        self.alpha = dict(zip(steps, alphas, strict=True))
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        first = next(i for i, alpha in enumerate(alphas) if alpha > 0 or not self.velocity)
        self.manifest = SimpleNamespace(
            schedule=Schedule(tuple(steps), tuple(alphas), float(scheduler.final_alpha_cumprod)),
            latent_shape=engine.directory.manifest.latent_shape,
            timesteps=(steps[first], steps[-3]),
            alphas_cumprod=(alphas[first], alphas[-3]),
            prediction_type=scheduler.config.prediction_type,
            seed=engine.directory.manifest.seed,
            precision="fp32",
        )
        self.empty = engine.encode(engine.tokenize([""])[0])
        self.passes = 0

    def noise(self, draws, seed=None):
        own = self.engine.directory.baseline.sample[: draws if seed is None else 0]
        generator = np.random.default_rng(self.manifest.seed if seed is None else seed)
        shape = (draws - len(own), *self.manifest.latent_shape)
        return np.concatenate([own, generator.standard_normal(shape, dtype=np.float32)])

    @torch.no_grad()
    def predict(self, states, prompts, latents, timestep):
        self.passes += len(latents)
        hidden = self.engine.backend.memory.download(states.tensor)[prompts]
        dtype = self.unet.dtype
        parts = []
        for x, h in zip(torch.from_numpy(latents).split(16), torch.from_numpy(hidden).split(16), strict=True):
            output = self.unet(x.to(dtype), timestep, h.to(dtype)).sample
            if self.velocity:
                alpha = self.alpha[timestep]
                output = alpha**0.5 * output + (1 - alpha) ** 0.5 * x.to(dtype)
            parts.append(output)
        return torch.cat(parts).numpy()

    def uncond(self, latents, timestep):
        return self.predict(self.empty, np.zeros(len(latents), dtype=np.int64), latents, timestep)

    def guidance(self, states, prompts, latents, timestep):
        return self.predict(states, prompts, latents, timestep), self.uncond(latents, timestep)
