"""Einsum of one operand that only changes the order of its axes, as Transpose: runtimes and our rules know that."""

import onnx_ir as ir

from memedge.export.graphs.edit import add, replace


def rewrite(model: ir.Model) -> None:
    """Replace each such Einsum of a graph, in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Einsum" or len(node.inputs) != 1:
            continue
        source, _, target = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
        if len(set(source)) != len(source) or sorted(source) != sorted(target):
            continue
        output = node.outputs[0]
        perm = [source.index(axis) for axis in target]
        turned = add(graph, "Transpose", list(node.inputs), f"{output.name}.turned", output, before=node, perm=perm)
        replace(output, turned)
        graph.remove(node, safe=True)
