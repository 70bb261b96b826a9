"""Every source of derivatives, each made of an engine and the checkpoint that it was exported from."""

from pathlib import Path

from memedge.autograd.gradients import TorchGradients
from memedge.engine.engine import Engine
from memedge.engine.gradients import Gradients, OnnxGradients

SOURCES = {
    "onnx": lambda engine, _checkpoint: OnnxGradients(engine),
    "torch": lambda engine, checkpoint: TorchGradients(engine, str(checkpoint)),
}


def make(source: str, engine: Engine, checkpoint: Path) -> Gradients:
    return SOURCES[source](engine, checkpoint)
