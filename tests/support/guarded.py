"""Diffusers pipelines for the guard: from a checkpoint's own parts, with a VAE as small as one can be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

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
