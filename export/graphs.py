"""torch modules → ONNX files, with the dynamo exporter (FACTS.md says why), in the precision asked for."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from memedge.export.checkpoint import Checkpoint

OPSET = 20


class TextEncoderGraph(nn.Module):
    """ids int64 [B, L] → states float32 [B, L, D], whatever the precision inside."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.text_encoder(input_ids=ids, return_dict=False)[0]
        return states.float()


class UNetGraph(nn.Module):
    """sample [R, C, H, W], timestep int64 [R], states [R, L, D] → prediction [R, C, H, W]; float32 outside."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        dtype = next(self.unet.parameters()).dtype
        prediction: torch.Tensor = self.unet(sample.to(dtype), timestep, states.to(dtype), return_dict=False)[0]
        return prediction.float()


def export_text_encoder(checkpoint: Checkpoint, path: Path) -> None:
    example = {"ids": torch.zeros(2, checkpoint.tokens, dtype=torch.int64)}
    _export(TextEncoderGraph(checkpoint.text_encoder), example, "states", path, external_data=False)


def export_unet(checkpoint: Checkpoint, path: Path) -> None:
    example = {
        "sample": torch.zeros(2, *checkpoint.latent_shape),
        "timestep": torch.tensor(checkpoint.timesteps),
        "states": torch.zeros(2, checkpoint.tokens, checkpoint.state_width),
    }
    _export(UNetGraph(checkpoint.unet), example, "prediction", path, external_data=True)


def _export(graph: nn.Module, example: dict[str, torch.Tensor], output: str, path: Path, external_data: bool) -> None:
    """Export with a dynamic first dimension; UNets keep their weights in a second file (protobuf ends at 2 GB)."""
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        graph.eval(),
        kwargs=example,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(example),
        output_names=[output],
        dynamic_shapes={name: {0: batch} for name in example},
        verbose=False,
    )
    assert program is not None  # it is None only when the exporter writes the file itself
    _strip(program.model)
    program.save(path, external_data=external_data)


def _strip(model: Any) -> None:
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
