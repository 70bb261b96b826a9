"""A whole checkpoint in torch, to be differentiated, trained and generated with: UNet, text encoder, VAE, schedule."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors import safe_open

from memedge.engine.errors import ExportError, NotFiniteError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources import folder, hub, weights
from memedge.export.sources.architectures import ARCHITECTURES
from memedge.export.sources.schedule import read_noise

Pictures = npt.NDArray[np.uint8]  # [N, S, S, 3]
STEPS = 50  # of DDIM
COPIED = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "vae")
DECODED = 4  # pictures at once: the VAE takes more memory than the UNet


class DiffusionModel:
    """Stable Diffusion 1.x or 2.x in float32, without gradients of its weights.

    Attributes:
        id: the checkpoint's name.
        sha256: over its files, as an engine's manifest has it.
        folder: where it lies.
        device: where it runs.
        unet: diffusers' UNet2DConditionModel.
        shape: of latents, (C, H, W).
        side: of pictures, in pixels.
        empty: embeddings of the empty prompt, [1, L, D].
        prediction_type: what the UNet predicts: "epsilon" or "v_prediction".
    """

    def __init__(
        self, checkpoint: str, device: torch.device | str = "cpu", progress: Callable[[str], None] = lambda _: None
    ):
        """Load a checkpoint.

        Args:
            checkpoint: a folder in diffusers' format, or a hub's id, org/name.
            device: of torch.
            progress: is told what takes long.

        Raises:
            ExportError: it is none, cannot be read, is of another family, or lacks its VAE.
        """
        with quiet():
            self.folder = _folder(checkpoint, progress)
            parts = folder.load(self.folder, self.folder.resolve().name, False, progress)
            if parts.architecture.name != ARCHITECTURES[0].name:
                raise ExportError(
                    f"{checkpoint} is {parts.architecture.name}: its pictures can't be audited, nor can it be cured; "
                    f"give a checkpoint of {ARCHITECTURES[0].name}."
                )
            if parts.guidance is not None:
                raise ExportError(
                    f"The UNet of {checkpoint} takes the guidance scale as an input: its pictures can't be audited, "
                    "nor can it be cured; give the model that it was distilled from."
                )
            self._vae = _vae(self.folder).to(device)
        self.id, self.sha256, self.device = parts.id, parts.sha256, torch.device(device)
        self.unet: Any = parts.denoiser.to(device)
        self._stored = _stored_dtype(self.folder)
        self._text_encoder: Any = parts.text_encoders[0].to(device)
        (self._tokenizer,) = parts.tokenizers
        self.prediction_type = read_noise(parts.scheduler).prediction_type
        self._ddim: Any = DDIMScheduler.from_config(parts.scheduler)
        self._ddim.set_timesteps(STEPS)  # so that a schedule that has none is refused now
        self._alphas = self._ddim.alphas_cumprod.to(device)
        side = int(self.unet.config.sample_size)
        self.shape = int(self.unet.config.in_channels), side, side
        self.side = side * 2 ** (len(self._vae.config.block_out_channels) - 1)
        if self._vae.config.latent_channels != self.shape[0]:
            raise ExportError(
                f"The VAE of {checkpoint} makes latents of {self._vae.config.latent_channels} channels, and its UNet "
                f"takes {self.shape[0]}: inpainting and editing models can't be audited."
            )
        self.empty = self.encode([""])

    @property
    def timesteps(self) -> int:
        """How many timesteps the model was trained with."""
        return len(self._alphas)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of captions, float32 [B, L, D]; what is longer than the encoder reads is cut."""
        ids = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self._tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        states: torch.Tensor = self._text_encoder(input_ids=ids.to(self.device), return_dict=False)[0]
        return states

    @torch.no_grad()
    def latents(self, pictures: Pictures) -> torch.Tensor:
        """Return the latents of pictures [N, S, S, 3], float32 [N, C, H, W]: the means that the VAE encodes."""
        values = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents: torch.Tensor = self._vae.encode(values).latent_dist.mode() * self._vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> Pictures:
        """Return what latents [N, C, H, W] look like, uint8 [N, S, S, 3]."""
        if not torch.isfinite(latents).all():
            raise NotFiniteError("The model generates NaN or infinity: the checkpoint is damaged.")
        parts = [
            self._vae.decode(part / self._vae.config.scaling_factor).sample for part in torch.split(latents, DECODED)
        ]
        values = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        found: Pictures = values.permute(0, 2, 3, 1).cpu().numpy()
        return found

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """Return the squared error of the model's prediction, the mean of each sample's elements: float32 [B].

        Args:
            latents: of pictures, [B, C, H, W].
            noise: as many, N(0, I).
            timesteps: int64 [B].
            states: embeddings [B, L, D].
        """
        alphas = self._alphas[timesteps][:, None, None, None]
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        target = noise if self.prediction_type == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        prediction = self.unet(noisy, timesteps, states, return_dict=False)[0]
        loss: torch.Tensor = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        return loss

    @torch.no_grad()
    def generate(
        self,
        states: torch.Tensor,
        noise: torch.Tensor,
        guidance: float,
        steps: int,
        rows: int = 16,
        early: float | None = None,
        until: int = 0,
    ) -> torch.Tensor:
        """Return latents made by DDIM with classifier-free guidance, float32 [B, C, H, W].

        Args:
            states: embeddings [B, L, D].
            noise: what they are made from, [B, C, H, W].
            guidance: the scale; 1 is none.
            steps: of DDIM.
            rows: of the UNet, at most, at once.
            early: the scale at timesteps above `until`; None: the same.
            until: a timestep.
        """
        size = max(1, rows // 2)
        self._ddim.set_timesteps(steps)
        scales = [early if early is not None and t > until else guidance for t in self._ddim.timesteps]
        parts = zip(torch.split(states, size), torch.split(noise.to(self.device), size), strict=True)
        return torch.cat([self._generate(some, latents, scales) for some, latents in parts])

    def _generate(self, states: torch.Tensor, latents: torch.Tensor, scales: list[float]) -> torch.Tensor:
        both = torch.cat([self.empty.expand(len(states), -1, -1), states])
        for timestep, guidance in zip(self._ddim.timesteps, scales, strict=True):
            uncond, cond = self.unet(torch.cat([latents] * 2), timestep, both, return_dict=False)[0].chunk(2)
            latents = self._ddim.step(uncond + guidance * (cond - uncond), timestep, latents).prev_sample
        return latents

    def save(self, place: Path) -> None:
        """Write the checkpoint with the UNet as it is now, in the number format that its weights were in.

        Raises:
            OSError: it cannot be written.
        """
        shutil.copytree(self.folder, place, ignore=self._left_out)
        with quiet():
            self.unet.to(self._stored).save_pretrained(place / "unet")
        self.unet.float()

    def _left_out(self, parent: str, names: list[str]) -> list[str]:
        """Return what is not copied: the UNet, and what no pipeline of this family reads."""
        if Path(parent) == self.folder:
            return [name for name in names if name not in COPIED]
        return []


def _folder(checkpoint: str, progress: Callable[[str], None]) -> Path:
    """Return the folder of a checkpoint; that of a hub's is downloaded, with its VAE."""
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if path.is_file():
        raise ExportError(
            f"{checkpoint} is a file, and a folder in diffusers' format is needed: make one with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if not hub.ID.fullmatch(checkpoint):
        raise ExportError(f"There is no {checkpoint}: give a folder in diffusers' format, or a hub's id (org/name).")
    return hub.download(
        checkpoint,
        None,
        lambda names, kind: [*weights.needed(names, checkpoint, False, kind), *_of_vae(names)],
        progress,
    )


def _of_vae(names: Iterable[str]) -> list[str]:
    """Return the files of a VAE: its configuration, and its weights in full precision or else in half."""
    found = [name for name in names if name.startswith("vae/diffusion_pytorch_model") and name.endswith(".safetensors")]
    return ["vae/config.json", *([name for name in found if ".fp16." not in name] or found)]


def _vae(place: Path) -> Any:
    if not (place / "vae" / "config.json").is_file():
        raise ExportError(
            f"{place} holds no vae/config.json, so its pictures can't be made: give the whole checkpoint."
        )
    variant = None if (place / "vae" / "diffusion_pytorch_model.safetensors").is_file() else "fp16"
    with weights.reading(place / "vae"):
        vae = AutoencoderKL.from_pretrained(
            place / "vae", torch_dtype=torch.float32, variant=variant, use_safetensors=True, local_files_only=True
        )
    return vae.eval().requires_grad_(False)


def _stored_dtype(place: Path) -> torch.dtype:
    """Return the number format of a checkpoint's UNet."""
    file = next(iter(sorted((place / "unet").glob("*.safetensors"))))
    with safe_open(file, "pt") as opened:
        dtype: torch.dtype = opened.get_tensor(next(iter(opened.keys()))).dtype
    return dtype
