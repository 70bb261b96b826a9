"""The embedded engine's model as ComfyUI's MODEL and CONDITIONING, on the real ComfyUI or on a stand-in for it."""

import os
import sys
from pathlib import Path
from typing import Any

import comfy_stand_in
import torch
from diffusers import UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

REAL = os.environ.get("MEMEDGE_COMFYUI")
EMOJI = Path(__file__).parents[2] / "bench/tiny/emoji"
LOADER = Path(__file__).with_name("comfyui_loader.py")

if REAL:
    sys.path.insert(0, REAL)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
else:
    comfy_stand_in.install()


class EmojiUNet(torch.nn.Module):
    """The UNet, called as ComfyUI calls its own: those have 32 groups in each norm, where this one has 8."""

    dtype = torch.float32

    def __init__(self, device: Any = None, operations: Any = None, **_config: Any):  # noqa: ARG002
        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(EMOJI / "unet")
        self.calls = 0

    def forward(self, x: Any, timesteps: Any, context: Any = None, **_options: Any) -> Any:
        self.calls += len(x)
        return self.unet(x, timesteps, context).sample


def model(kind: str = "EPS") -> Any:
    """Return a MODEL that predicts ε, or whose predictions are taken for those of another type of model."""
    from comfy.model_base import BaseModel, ModelType
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import BASE

    base = BaseModel(BASE({}), ModelType[kind], torch.device("cpu"), unet_model=EmojiUNet)
    return ModelPatcher(base.eval(), torch.device("cpu"), torch.device("cpu"))


def states(prompt: str) -> Any:
    """Return a prompt's embeddings, torch [1, L, D]."""
    tokenizer = AutoTokenizer.from_pretrained(EMOJI / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(EMOJI / "text_encoder")
    ids = tokenizer(prompt, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids).last_hidden_state


def conditioning(prompt: str) -> Any:
    """Return a prompt's CONDITIONING."""
    return [[states(prompt), {}]]
