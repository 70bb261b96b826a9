"""From a torch module to a graph, with torch's dynamo exporter, in float32."""

import onnx_ir as ir
import torch
from torch import nn

OPSET = 20


def trace(graph: nn.Module, example: dict[str, torch.Tensor], axes: dict[str, str], output: str) -> ir.Model:
    """Return the graph of a module called with `example`; the first dimension of each input is dynamic and named."""
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
    # onnxscript's rules keep the last graph they saw till the process ends, and graphs all inputs that they ever had,
    # as weights once were: so the weights are let go of, one by one.
    own = program.model.graph
    for value in (*own.initializers.values(), *getattr(own.inputs, "_ref_counter", ())):
        value.const_value = None
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
