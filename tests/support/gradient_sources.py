"""Every source of derivatives, each made of an engine and the checkpoint that it was exported from."""

from pathlib import Path

from memedge.engine.gradients import Gradients, OnnxGradients
from memedge.engine.passes import Engine
from memedge.export.torch_gradients import TorchGradients

SOURCES = {
    "onnx": lambda engine, _checkpoint: OnnxGradients(engine),
    "torch": lambda engine, checkpoint: TorchGradients(engine, str(checkpoint)),
}


def make(source: str, engine: Engine, checkpoint: Path) -> Gradients:
    return SOURCES[source](engine, checkpoint)
