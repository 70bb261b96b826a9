"""Optimum's graphs, made fit for the engine: what they compute stays as it is, their inputs become the engine's.

Row r of a batch is for the prompt that `prompt` names. Of the UNet's inputs that stem from a prompt or from the
image's size, one tensor of states is left. Sizes that the exporter left open become those of the model.

Nodes are added at the end, wherever they belong, and sorted later. Until `settle` gives their outputs types and shapes,
they have those of their first inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import version_converter

from memedge.engine.errors import ExportError
from memedge.export.graphs.edit import add, constant, move
from memedge.export.sources.settle_shapes import settle, tidy
from memedge.export.sources.trace import OPSET
from memedge.export.sources.weights import check_not_pointer, reading

GRAPH = "model.onnx"
SAMPLE, TIMESTEP, STATES, POOLED, TIME_IDS = "sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"
OLDEST_OPSET = 18  # Optimum's own choice; before it, operators were spelt otherwise
IR_VERSION = 10
ORDINALS = ("first", "second", "third")  # of text encoders
SMALL = 4096  # bytes of weights that are read at once: onnx_ir takes such back from a file when it writes
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


@dataclass(frozen=True)
class Packing:
    """How one tensor of states holds all that a UNet takes of a prompt.

    Attributes:
        tokens: L.
        width: D, of one token's state.
        pooled: the width of the pooled state, which is row L, padded by zeros; 0 where the UNet takes none.
        time_ids: [1, 6], what the UNet is told about the image if it takes a pooled state.
        zeros: the ids [T · L] of the prompt whose states are all zero; None: of none.
    """

    tokens: int
    width: int
    pooled: int
    time_ids: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.int64] | None


def open_graph(folder: Path, part: str) -> ir.Model:
    """Return a part's graph as it was exported; its weights stay in their file.

    Raises:
        ExportError: it cannot be read, its weights lie elsewhere, or it is of a kind that memedge does not export.
    """
    path = folder / part / GRAPH
    if not path.is_file():
        raise ExportError(
            f"{folder} holds no {part}/{GRAPH}, so it is not all of what Optimum exports: export it again."
        )
    check_not_pointer(path)
    with reading(path):
        model = ir.load(path)
    opset = model.opset_imports.get("")
    if opset is None or not OLDEST_OPSET <= opset <= OPSET:
        raise ExportError(f"{path} has opset {opset}: export it with --opset {OLDEST_OPSET}.")
    for node in model.graph:
        if node.domain or any(word in node.op_type for word in ("QLinear", "Quantize", "quantize", "Integer")):
            raise ExportError(
                f"{path} is quantised or optimised for one runtime (it holds {node.op_type}): export it without, and "
                "let memedge export --precision do so."
            )
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise ExportError(f"{path} holds control flow ({node.op_type}), which memedge does not export.")
    for value in model.graph.initializers.values():
        _check_weight(value, path)
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes <= SMALL:
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return model


def text_encoder(models: Sequence[tuple[ir.Model, Sequence[str]]], packing: Packing) -> ir.Model:
    """Return ids int64 [prompts, T · L] → states float32 [prompts, K, D] of T text encoders; consumes them.

    Args:
        models: as `open_graph` gives them, each with the names of the outputs that the UNet takes: the states, and the
            pooled state if it takes that.
        packing: of what they are to make.
    """
    for model, _ in models:
        _prepare(model)
    model, graph = models[0][0], models[0][0].graph
    ids = _input("ids", INT64, "prompts", len(models) * packing.tokens)
    found = [[_output(one.graph, name) for name in outputs] for one, outputs in models]
    for number, (one, _) in enumerate(models):
        given, own = one.graph.inputs[0], ids
        if number:
            move(one.graph, graph, ORDINALS[number])
        if len(models) > 1:
            part = (number * packing.tokens, (number + 1) * packing.tokens)
            own = _slice(graph, ids, f"ids.{ORDINALS[number]}", {1: part})
        _feed(graph, given, own)
    pooled = [value for values in found for value in values[1:]]
    states = _packed(graph, ids, [values[0] for values in found], pooled, packing)
    graph.inputs[:] = [ids]
    graph.outputs[:] = [states]
    states.name = "states"
    _finish(model, "The text encoder")
    return model


def unet(model: ir.Model, latent_shape: tuple[int, int, int], packing: Packing) -> ir.Model:
    """Return sample [rows, C, H, W], timestep [rows], states [prompts, K, D], prompt [rows] → prediction; consumes it.

    Keys and values are made of the prompts' states before they are taken for each row. The first timestep is that of
    all rows.
    """
    _prepare(model)
    graph = model.graph
    given = {str(value.name): value for value in graph.inputs}
    given[TIMESTEP].name = "timestep.given"
    depth = packing.tokens + bool(packing.pooled)
    inputs = [
        _input(f"{SAMPLE}.in", FLOAT, "rows", *latent_shape),
        _input(TIMESTEP, INT64, "rows"),
        _input("states", FLOAT, "prompts", depth, packing.width),
        _input("prompt", INT64, "rows"),
    ]
    sample, timestep, states, prompt = inputs
    _feed(graph, given[SAMPLE], sample)
    first = constant(graph, "timestep.first", np.zeros([1] * len(given[TIMESTEP].shape or ()), np.int64))
    _feed(graph, given[TIMESTEP], add(graph, "Gather", [timestep, first], "timestep.one"))
    text = states
    if packing.pooled:
        text = _slice(graph, states, "states.text", {1: (0, packing.tokens)})
        last = _slice(graph, states, "states.last", {1: (packing.tokens, depth), 2: (0, packing.pooled)})
        vector = add(graph, "Squeeze", [last, constant(graph, "states.axis", np.array([1]))], "states.pooled")
        _feed(graph, given[POOLED], add(graph, "Gather", [vector, prompt], "states.pooled.rows"))
        _feed(graph, given[TIME_IDS], _time_ids(graph, sample, packing))
    _project_once(graph, given[STATES], text, prompt)
    _feed(graph, given[STATES], add(graph, "Gather", [text, prompt], "states.rows"))
    graph.inputs[:] = inputs
    given[SAMPLE].name, sample.name = "sample.given", SAMPLE
    graph.outputs[0].name = "prediction"
    _finish(model, "The UNet")
    return model


def _check_weight(value: ir.Value, path: Path) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        kind = tensor.dtype.name.lower()
        raise ExportError(f"{path} holds {kind}: export it in fp32, and let memedge export --precision convert it.")
    if isinstance(tensor, ir.ExternalTensor):
        folder, location = path.parent.resolve(), Path(tensor.location)
        target = (folder / location).resolve()
        if location.is_absolute() or ".." in location.parts or not target.is_relative_to(folder):
            raise ExportError(f"{path} has weights outside its folder ({location}): copy them into it, not links.")
        if not target.is_file():
            raise ExportError(f"{path} has its weights in {location}, which is missing: check that it is complete.")
        check_not_pointer(target)


def _prepare(model: ir.Model) -> None:
    tidy(model)
    version_converter.convert_version(model, OPSET)
    model.ir_version = IR_VERSION


def _finish(model: ir.Model, name: str) -> None:
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    settle(model, name)


def _input(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def _feed(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all that reads an input read another value, cast to the input's type."""
    assert old.dtype is not None
    same = new if new.dtype == old.dtype else add(graph, "Cast", [new], f"{new.name}.given", to=old.dtype)
    old.replace_all_uses_with(same)


def _slice(graph: ir.Graph, value: ir.Value, name: str, ranges: Mapping[int, tuple[int, int]]) -> ir.Value:
    """Add the part of a value that lies between start and end of each axis named."""
    starts, ends = zip(*ranges.values(), strict=True)
    parts = (("starts", starts), ("ends", ends), ("axes", tuple(ranges)))
    operands = [constant(graph, f"{name}.{part}", np.array(numbers)) for part, numbers in parts]
    return add(graph, "Slice", [value, *operands], name)


def _time_ids(graph: ir.Graph, sample: ir.Value, packing: Packing) -> ir.Value:
    """Add the image's size for every row: of the sample, so that what follows from it alone can be cached."""
    rows = add(graph, "Shape", [sample], "time_ids.rows", start=0, end=1)
    own = packing.time_ids
    count = constant(graph, "time_ids.count", np.array([own.shape[1]]))
    shape = add(graph, "Concat", [rows, count], "time_ids.shape", axis=0)
    return add(graph, "Expand", [constant(graph, "time_ids.one", own), shape], "time_ids.all")


def _project_once(graph: ir.Graph, given: ir.Value, text: ir.Value, prompt: ir.Value) -> None:
    """Let products of the states with weights be made for each prompt, and taken for each row."""
    for node in given.consumers():
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            result = node.outputs[0]
            product = add(graph, "MatMul", [text, weight], f"{result.name}.prompts")
            result.replace_all_uses_with(add(graph, "Gather", [product, prompt], f"{result.name}.rows"))


def _beside(graph: ir.Graph, values: Sequence[ir.Value], name: str) -> ir.Value:
    """Add values side by side on their last axis."""
    return values[0] if len(values) == 1 else add(graph, "Concat", values, name, axis=-1)


def _packed(
    graph: ir.Graph, ids: ir.Value, states: Sequence[ir.Value], pooled: Sequence[ir.Value], packing: Packing
) -> ir.Value:
    """Add the states of all text encoders side by side, below them the pooled state; zero for the empty prompt."""
    axis = constant(graph, "states.axis", np.array([1]))
    found = _beside(graph, states, "states.both")
    if pooled:
        pads = constant(graph, "states.pads", np.array([0, 0, 0, packing.width - packing.pooled]))
        padded = add(graph, "Pad", [_beside(graph, pooled, "states.pooled"), pads], "states.padded")
        last = add(graph, "Unsqueeze", [padded, axis], "states.last")
        found = add(graph, "Concat", [found, last], "states.all", axis=1)
    if packing.zeros is not None:
        equal = add(graph, "Equal", [ids, constant(graph, "empty.ids", packing.zeros[None])], "empty.equal")
        other = add(graph, "Cast", [add(graph, "Not", [equal], "empty.not")], "empty.other", to=FLOAT)
        factor = add(graph, "ReduceMax", [other, axis], "empty.any")
        found = add(graph, "Mul", [found, add(graph, "Unsqueeze", [factor, axis], "empty.factor")], "states.kept")
    return found
