"""Diffusers pipelines for the guard, from a checkpoint's own parts, with a VAE as small as one can be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from engines import PROVENANCE, edit_manifest
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from memedge import Detector
from memedge.integrations.diffusers import GuardedOutput

SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    PNDMScheduler,
]
GIVEN = {"gamma_norm": 1.0, "gamma_alignment": 0.0, "alignment": "channel", "operands": "uncond_delta", **PROVENANCE}
EMOJI = Path(__file__).parents[2] / "bench" / "tiny" / "emoji"


def make_pipe(kind: type[DiffusionPipeline], folder: Path = EMOJI, **more: Any) -> Any:
    """Return a pipeline of a class, fp32; `more` are its other parts. A latent is as large as its picture."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
    )
    parts = {
        "vae": vae,
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    if (folder / "text_encoder_2").is_dir():
        second = folder / "text_encoder_2"
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(second, dtype=torch.float32)
        parts["tokenizer_2"] = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = kind(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_controlnet(pipe: Any) -> Any:
    """Return a pipeline of the same parts, and a random ControlNet that reads pictures as large as the latents."""
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16,)).eval()
    for parameter in control.parameters():  # the network's last layers are zero before training
        torch.nn.init.normal_(parameter, std=0.05)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


class UnetCall(NamedTuple):
    """What a UNet was called with, and its output in float64."""

    timestep: float
    states: torch.Tensor
    output: torch.Tensor


@contextmanager
def recorded(unet: torch.nn.Module) -> Iterator[list[UnetCall]]:
    """Yield a list that each call of the UNet is added to, but for the guard's own look: at two timesteps."""
    calls: list[UnetCall] = []

    def add(_unet, args, kwargs, output):
        if torch.as_tensor(args[1]).ndim == 0:
            calls.append(UnetCall(float(args[1]), kwargs["encoder_hidden_states"].clone(), output[0].double()))

    hook = unet.register_forward_hook(add, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


class Model(NamedTuple):
    """A pipeline, a detector on its engine, and prompts that are and are not memorized to that detector."""

    pipe: Any
    detector: Detector
    clean: list[str]
    memorized: list[str]


def calibrate(engine: Path) -> tuple[Detector, list[str], list[str]]:
    """Calibrate a random model's engine to the norm, so that the upper two of four prompts are memorized."""
    prompts = ["a star", "zebra on skis", "two cats", "moon"]
    norms = Detector.load(engine).score(prompts).norm
    order = np.argsort(norms)
    threshold = float(norms[order[1:3]].mean())
    given = GIVEN | {"threshold": threshold, "clean_score": 0.99 * threshold}
    edit_manifest(engine, lambda m: m.update(calibrations={"cpu-fp32": given}))
    return Detector.load(engine), [prompts[i] for i in order[:2]], [prompts[i] for i in order[2:]]


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a, b) -> bool:
    """Whether two images, arrays or tensors are equal bit by bit."""
    return type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))


def actions(result: GuardedOutput) -> list[str]:
    return [verdict.action for verdict in result.verdicts]


def mean_norms(output: torch.Tensor, prompts: int) -> list[float]:
    """‖Δ‖ by its definition, from the two halves of a UNet's output: the mean over each prompt's images."""
    uncond, cond = output.chunk(2)
    return (cond - uncond).flatten(1).norm(dim=1).reshape(prompts, -1).mean(1).tolist()
