"""Graphs as files: written whole, with their weights inside or in a second file."""

from pathlib import Path

import onnx_ir as ir

LARGE = 64 << 20  # bytes of weights; more are better mapped into memory than parsed, and protobuf ends at 2 GiB


def weight_bytes(model: ir.Model) -> int:
    """Return how many bytes a graph's weights have."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save(model: ir.Model, path: Path, external_data: bool = False) -> None:
    """Write a graph; its weights go to a second file, `path` + ".data", if asked for."""
    if not external_data:
        ir.external_data.load_to_model(model)  # a graph that was read may have its weights in a file elsewhere
    ir.save(model, path, external_data=f"{path.name}.data" if external_data else None)


def overwrite(model: ir.Model, path: Path) -> None:
    """Write a graph that was read from `path` over that file, and over its second one if it has one."""
    folder = path.parent / "overwrite"  # weights are still read from the old files while the new ones are written
    folder.mkdir()
    save(model, folder / path.name, external_data=path.with_name(f"{path.name}.data").exists())
    for file in folder.iterdir():
        file.replace(path.parent / file.name)
    folder.rmdir()
