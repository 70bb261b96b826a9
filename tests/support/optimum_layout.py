"""Tiny Stable Diffusion pipelines, and directories as Optimum exports them, by its exporter and names, without it."""

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from models import TOKENS, make_scheduler, make_tokenizer, raise_guidance, text_config
from torch import nn
from traces import identity
from transformers import CLIPTextModel, CLIPTextModelWithProjection

_kept: dict[str, bytes] = {}  # graphs exported in this run
KINDS = ("sd1", "sd2", "sdxl")
GRAPH = "model.onnx"
UNETS = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
    },
    "sd2": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24 + 40,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
}


def make_pipeline(kind: str, **unet: Any) -> Any:
    """A randomly initialised diffusers pipeline; `unet` changes its UNet's configuration."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    common = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    model = UNet2DConditionModel(**{**common, "block_out_channels": (16, 32), **UNETS[kind], **unet})
    raise_guidance(model)
    scheduler = make_scheduler("v_prediction" if kind == "sd2" else "epsilon")
    first = {"vae": vae, "unet": model, "scheduler": scheduler, "text_encoder": CLIPTextModel(text_config(24)).eval()}
    if kind != "sdxl":
        tokenizer = make_tokenizer("!</w>" if kind == "sd2" else "<|endoftext|>")
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**first, tokenizer=tokenizer, **nothing)
    return StableDiffusionXLPipeline(
        **first,
        text_encoder_2=CLIPTextModelWithProjection(text_config(40, projection_dim=20, hidden_act="gelu")).eval(),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer("!</w>"),
        add_watermarker=False,
    )


def export_layout(pipeline: Any, folder: Path) -> Path:
    """Write what `optimum-cli export onnx` would, but for the VAE."""
    second = getattr(pipeline, "text_encoder_2", None)
    axes: dict[str, dict[int, str]] = {
        "sample": {0: "batch_size", 2: "height", 3: "width"},
        "timestep": {},
        "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
    }
    config = pipeline.unet.config
    example = [torch.randn(2, 4, 8, 8), torch.tensor(981.0), torch.randn(2, TOKENS, config.cross_attention_dim)]
    if second is not None:
        axes |= {"text_embeds": {0: "batch_size"}, "time_ids": {0: "batch_size"}}
        example += [torch.randn(2, second.config.projection_dim), torch.rand(2, 6)]
    _export(_UNet(pipeline.unet), example, folder / "unet", axes, ["out_sample"])
    pipeline.unet.save_config(folder / "unet")
    text_encoders = {"text_encoder": pipeline.text_encoder, **({"text_encoder_2": second} if second else {})}
    for name, text_encoder in text_encoders.items():
        hidden = [f"hidden_states.{i}" for i in range(text_encoder.config.num_hidden_layers + 1)] if second else []
        own = (
            ["text_embeds", "last_hidden_state"] if name == "text_encoder_2" else ["last_hidden_state", "pooler_output"]
        )
        ids = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
        example = [torch.randint(0, 512, (2, TOKENS))]
        _export(_TextEncoder(text_encoder, own, bool(second)), example, folder / name, ids, [*own, *hidden])
        text_encoder.config.save_pretrained(folder / name)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    if second is not None:
        pipeline.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)
    return folder


class _UNet(nn.Module):
    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, states, text_embeds=None, time_ids=None):
        more = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, states, added_cond_kwargs=more, return_dict=False)[0]


class _TextEncoder(nn.Module):
    def __init__(self, text_encoder: Any, outputs: list[str], hidden: bool):
        super().__init__()
        self.text_encoder, self.outputs, self.hidden = text_encoder, outputs, hidden

    def forward(self, ids):
        found = self.text_encoder(input_ids=ids, output_hidden_states=self.hidden)
        return (*(found[name] for name in self.outputs), *(found.hidden_states or () if self.hidden else ()))


def _export(module: nn.Module, example: list[torch.Tensor], folder: Path, axes: Any, outputs: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    key = identity(module, [value.shape for value in example], axes, outputs)
    if key in _kept:  # exporting is most of the time of many tests
        (folder / GRAPH).write_bytes(_kept[key])
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is an old one, and that tracing is tracing
        torch.onnx.export(
            module.eval(),
            tuple(example),
            folder / GRAPH,
            dynamo=False,
            opset_version=18,
            input_names=list(axes),
            output_names=outputs,
            dynamic_axes={**axes, **{name: {0: "batch_size"} for name in outputs}},
        )
    _kept[key] = (folder / GRAPH).read_bytes()
