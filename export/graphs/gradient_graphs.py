"""The engine's gradient graphs: what mitigation and explanation descend, without torch.

Both are made of the graphs that the engine runs, by differentiating those (differentiate.py): no checkpoint is needed,
and the UNet's weights stay in the file that they are in. Attention is in standard operators, whose rules are known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import GRADIENT, NOISE_GRADIENT, PREFIX, UNET
from memedge.export.graphs.differentiate import differentiate
from memedge.export.graphs.edit import HALF, move
from memedge.export.graphs.expand_attention import expand
from memedge.export.graphs.prefix_split import ROWS
from memedge.export.graphs.terms import Axes, NotDifferentiableError, Terms, shape_of

# In fp16, gradients are scaled up before they pass the UNet and down again behind it: most would be less than fp16's
# smallest number.
FP16_SCALE = 4096.0
LATENTS = "latents"  # the dynamic dimension of the latents that rows share


def write(folder: Path) -> str | None:
    """Write both graphs beside the engine's own in a folder; return why there are none, if a node has no rule."""
    try:
        models = {GRADIENT: _of_states(ir.load(folder / UNET)), NOISE_GRADIENT: _of_noise(folder)}
    except NotDifferentiableError as error:
        return str(error)
    for name, model in models.items():
        RemoveUnusedNodesPass()(model)
        ir.save(model, folder / name)
    return None


def _of_states(model: ir.Model) -> ir.Model:
    """Return the graph of the statistics of rows, and of the gradient of their weighted sum in the states.

    Inputs beside the UNet's: uncond, ε_0 [2n, C, H, W] of all cached rows; norm_weight and cosine_weight [R]; shift
    [1], 0 or 1: the cosine is that of ε_0 and Δ + shift · ε_0, so of Δ or of ε_c; selection [B, R], the one-hot matrix
    of the prompt. Outputs: norm and cosine [R] as in docs/methods.md §1, gradient [B, K, D].
    """
    expand(model)
    graph = model.graph
    states, prompt, row = (_input(graph, name) for name in ("states", "prompt", "row"))
    prediction = graph.outputs[0]
    rows, *latent = shape = shape_of(prediction)
    uncond = _add_input(graph, "uncond", ["cached", *latent])
    weights = [_add_input(graph, f"{name}_weight", [rows]) for name in ("norm", "cosine")]
    shift = _add_input(graph, "shift", [1])
    selection = _add_input(graph, "selection", ["prompts", rows])
    loss = Terms(graph, "loss")
    zero = loss.node("Gather", [uncond, row], shape, axis=0)
    delta = loss.node("Sub", [prediction, zero])
    norm = _length(loss, delta, (1, 2, 3), 1e-30)
    other = loss.node("Add", [delta, loss.node("Mul", [zero, loss.reshaped(shift, [1, 1, 1, 1])])])
    lengths = [_length(loss, value, (1,), 1e-8) for value in (zero, other)]
    area = loss.node("Mul", lengths)
    cosine = loss.node("Div", [loss.reduced("ReduceSum", loss.node("Mul", [zero, other]), (1,)), area])
    # d norm / dΔ = Δ / ‖Δ‖; of one pixel's cosine with u = Δ or ε_c: ε_0 / (‖ε_0‖ ‖u‖) − cosine · u / ‖u‖².
    slope = loss.node("Div", [delta, norm])
    along = loss.node("Mul", [other, loss.node("Div", [cosine, loss.node("Mul", [lengths[1], lengths[1]])])])
    turn = loss.node("Sub", [loss.node("Div", [zero, area]), along])
    per_norm, per_cosine = (loss.reshaped(weight, [rows, 1, 1, 1]) for weight in weights)
    pixels = loss.scalar(1 / (int(latent[1]) * int(latent[2])), delta)
    terms = [slope, per_norm], [turn, loss.node("Mul", [per_cosine, pixels])]
    total = loss.node("Add", [loss.node("Mul", term) for term in terms])
    gradient = _through(graph, prediction, total, states, {prompt: selection})
    graph.outputs.clear()
    _add_output(graph, "norm", loss.reshaped(norm, [rows]))
    _add_output(graph, "cosine", loss.reshaped(loss.reduced("ReduceMean", cosine, (2, 3)), [rows]))
    _add_output(graph, "gradient", gradient)
    return model


def _of_noise(folder: Path) -> ir.Model:
    """Return the graph of a product with the Jacobian of ε in the latents, summed over the rows that share them.

    Inputs: sample [K, C, H, W], timestep [K], guidance [K] if the prefix has it; states, prompt and row as the UNet's,
    row [R] choosing among the K; cotangent [R, C, H, W]; selection [K, R], the one-hot matrix of row. Output: gradient
    [K, C, H, W].
    """
    model, prefix = ir.load(folder / UNET), ir.load(folder / PREFIX)
    graph = model.graph
    _join(graph, prefix.graph)
    expand(model)
    sample, row, prediction = _input(graph, "sample"), _input(graph, "row"), graph.outputs[0]
    shape = shape_of(prediction)
    cotangent = _add_input(graph, "cotangent", shape)
    selection = _add_input(graph, "selection", [LATENTS, shape[0]])
    gradient = _through(graph, prediction, cotangent, sample, {row: selection})
    graph.outputs.clear()
    _add_output(graph, "gradient", gradient)
    return model


def _join(graph: ir.Graph, prefix: ir.Graph) -> None:
    """Put the prefix, for K latents, before the UNet's graph, whose cached inputs are its outputs."""
    cached = {value.name: value for value in prefix.outputs}
    inputs = list(prefix.inputs)
    for value in (*inputs, *prefix.initializers.values(), *(value for node in prefix for value in node.outputs)):
        # Its rows are latents, of which each may have several rows of the UNet.
        if value.shape is not None:
            value.shape = ir.Shape([LATENTS if str(size) == ROWS else size for size in value.shape])
    prefix.inputs.clear()
    move(prefix, graph, "prefix", before=graph[0])
    for stored in [value for value in graph.inputs if value.name in cached]:
        stored.replace_all_uses_with(cached[stored.name])
        graph.inputs.remove(stored)
    graph.inputs.extend(inputs)


def _through(
    graph: ir.Graph, prediction: ir.Value, gradient: ir.Value, source: ir.Value, selections: dict[ir.Value, ir.Value]
) -> ir.Value:
    """Return the gradient of the source, given that of the prediction; in fp16 graphs scaled up on its way."""
    if not any(value.dtype == HALF for node in graph for value in node.outputs):
        return differentiate(graph, prediction, gradient, source, selections)
    scale = Terms(graph, "scale")
    up = scale.node("Mul", [gradient, scale.scalar(FP16_SCALE, gradient)])
    found = differentiate(graph, prediction, up, source, selections)
    return scale.node("Mul", [found, scale.scalar(1 / FP16_SCALE, found)])


def _length(loss: Terms, value: ir.Value, axes: Axes, least: float) -> ir.Value:
    """Return the L2 norm over some axes, which stay with size 1, clamped from below."""
    squares = loss.reduced("ReduceSum", loss.node("Mul", [value, value]), axes)
    return loss.node("Max", [loss.node("Sqrt", [squares]), loss.scalar(least, value)])


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _add_input(graph: ir.Graph, name: str, shape: Sequence[Any]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _add_output(graph: ir.Graph, name: str, value: ir.Value) -> None:
    value.name = name
    graph.outputs.append(value)
