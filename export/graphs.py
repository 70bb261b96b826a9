"""torch modules → ONNX graphs, with the dynamo exporter (FACTS.md says why), in float32."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from memedge.export.attention import CAUSAL, FusedAttention
from memedge.export.checkpoint import Checkpoint

OPSET = 20


class TextEncoderGraph(nn.Module):
    """ids int64 [B, L] → states float32 [B, L, D], by `causal_attention`."""

    def __init__(self, text_encoder: Any):
        super().__init__()
        text_encoder.set_attn_implementation(CAUSAL)
        self.text_encoder = text_encoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.text_encoder(input_ids=ids, return_dict=False)[0]
        return states


class UNetGraph(nn.Module):
    """sample [R, C, H, W], timestep int64 [R], states [B, L, D], prompt int64 [R] → prediction [R, C, H, W].

    Row r is for the states of prompt[r]. Made of `FusedAttention`, it can be exported, but not called.
    """

    def __init__(self, unet: Any):
        super().__init__()
        unet.set_attn_processor(FusedAttention())
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.unet(
            sample, timestep, states, cross_attention_kwargs={"prompt": prompt}, return_dict=False
        )[0]
        return prediction


def text_encoder_model(checkpoint: Checkpoint) -> ir.Model:
    """Return the graph of TextEncoderGraph."""
    example = {"ids": torch.zeros(2, checkpoint.tokens, dtype=torch.int64)}
    return _trace(TextEncoderGraph(checkpoint.text_encoder), example, {"ids": "prompts"}, "states")


def unet_model(checkpoint: Checkpoint) -> ir.Model:
    """Return the graph of UNetGraph. Afterwards the checkpoint's UNet cannot be called any more."""
    example = {
        "sample": torch.zeros(3, *checkpoint.latent_shape),
        "timestep": torch.tensor([*checkpoint.timesteps, 0]),
        "states": torch.zeros(2, checkpoint.tokens, checkpoint.state_width),
        "prompt": torch.tensor([0, 1, 1]),
    }
    axes = {"sample": "rows", "timestep": "rows", "states": "prompts", "prompt": "rows"}
    return _trace(UNetGraph(checkpoint.unet), example, axes, "prediction")


def save(model: ir.Model, path: Path, external_data: bool = False) -> None:
    """Write a graph; UNets keep their weights in a second file, `path` + ".data" (protobuf ends at 2 GB)."""
    ir.save(model, path, external_data=f"{path.name}.data" if external_data else None)


def overwrite(model: ir.Model, path: Path) -> None:
    """Write a graph that was read from `path` over that file, and over its second one if it has one."""
    folder = path.parent / "overwrite"  # weights are still read from the old files while the new ones are written
    folder.mkdir()
    save(model, folder / path.name, external_data=path.with_name(f"{path.name}.data").exists())
    for file in folder.iterdir():
        file.replace(path.parent / file.name)
    folder.rmdir()


def _trace(graph: nn.Module, example: dict[str, torch.Tensor], axes: dict[str, str], output: str) -> ir.Model:
    """Trace with the named first dimensions dynamic."""
    dimensions = {name: torch.export.Dim(name) for name in set(axes.values())}
    program = torch.onnx.export(
        graph.eval(),
        kwargs=example,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(example),
        output_names=[output],
        dynamic_shapes={name: {0: dimensions[axes[name]]} for name in example},
        verbose=False,
    )
    assert program is not None  # it is None only when the exporter writes the file itself
    model: ir.Model = program.model.clone()  # the exporter's own values compare by building graphs: no keys for sets
    _strip(model)
    return model


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes for debugging: stack traces name this machine's paths and outweigh the graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
