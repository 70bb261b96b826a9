"""Attention in standard operators gives what ONNX Runtime's fused one gives, and what the definition gives."""

import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from engines import list_file
from onnx import TensorProto, helper, numpy_helper

from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import UNET, EngineDirectory
from memedge.engine.errors import IntegrityError
from memedge.export.graphs.expand_attention import expand, read_expanded


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")


def session(model):
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_embedded_unet(folder):
    """The whole UNet, on all rows of three prompts: equal to 1e-6, with the weights where they were."""
    directory = EngineDirectory.open(folder)
    content = read_expanded(directory, UNET)
    assert len(content) < folder.joinpath("unet.onnx.data").stat().st_size / 50
    nodes = onnx.load_from_string(content).graph.node
    assert not any(node.domain for node in nodes)
    before = onnx.load(folder / UNET, load_external_data=False).graph.node
    fused = sum(node.op_type == "MultiHeadAttention" for node in before)
    assert sum(node.op_type == "Softmax" for node in nodes) == fused == 19
    assert not any(node.op_type == "Shape" for node in nodes)
    (folder / "expanded.onnx").write_bytes(content)
    rng = np.random.default_rng(0)
    manifest = directory.manifest
    feeds = {
        "states": rng.standard_normal((3, *manifest.states_shape), dtype=np.float32),
        "prompt": np.array([0, 0, 1, 1, 2, 2]),
        "row": np.array([0, 1, 0, 1, 0, 1]),
        **directory.baseline.cached,
    }
    expected, given = (session(folder / name).run(None, feeds)[0] for name in (UNET, "expanded.onnx"))
    assert np.linalg.norm(given - expected) <= 1e-6 * np.linalg.norm(expected)


def attention(path, dtype, heads, widths, mask=None, **attributes):
    """Write a graph of one attention node; widths of q, k, v; shape of its mask of keys, if it has one."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    lengths = {"q": "S", "k": "T", "v": "T"}
    inputs = [
        helper.make_tensor_value_info(name, kind, ["rows", lengths[name], width])
        for name, width in zip("qkv", widths, strict=True)
    ]
    names = ["q", "k", "v"]
    if mask is not None:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT32, mask))
        names += ["", "mask"]
    output = helper.make_tensor_value_info("y", kind, ["rows", "S", widths[2]])
    node = helper.make_node(
        "MultiHeadAttention", names, ["y"], domain="com.microsoft", name="node", num_heads=heads, **attributes
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "graph", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def definition(q, k, v, heads, mask=None):
    """softmax(q kᵀ / √d) v of each head, in float64, over the keys whose mask is 1."""
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    if mask is not None:
        shares = shares * mask[:, None, None]
    result = shares / shares.sum(axis=-1, keepdims=True) @ v
    return result.transpose(0, 2, 1, 3).reshape(result.shape[0], result.shape[2], -1)


@pytest.mark.parametrize(
    ("dtype", "factor", "tolerance"),
    # float16: logits reach 40 · 60 · 60 before they are scaled, more than it holds.
    [(np.float32, 1, 1e-6), (np.float16, 1, 2e-3), (np.float16, 60, 0.2)],
)
@pytest.mark.parametrize(("heads", "widths"), [(8, (320, 320, 320)), (1, (40, 40, 40)), (3, (120, 120, 24))])
def test_definition(tmp_path, dtype, factor, tolerance, heads, widths):
    rng = np.random.default_rng(1)
    q, k, v = (
        rng.standard_normal((2, length, width)).astype(dtype) for length, width in zip((9, 5, 5), widths, strict=True)
    )
    if factor > 1:
        q, k = np.full_like(q, factor), np.full_like(k, factor)
        k[:, 0] *= dtype(1.001)
    model = ir.load(attention(tmp_path / "m.onnx", dtype, heads, widths))
    expand(model)
    ir.save(model, tmp_path / "e.onnx")
    given = session(tmp_path / "e.onnx").run(None, {"q": q, "k": k, "v": v})[0]
    assert given.dtype == dtype
    assert np.abs(given - definition(q, k, v, heads)).max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 2e-3)])
def test_masked_keys(tmp_path, dtype, tolerance):
    """ONNX Runtime's own node and the standard operators pass over the same keys."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3, length, 24)).astype(dtype) for length in (9, 5, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], np.int32)
    path = attention(tmp_path / "m.onnx", dtype, 3, (24, 24, 24), mask=["rows", "T"])
    model = ir.load(path)
    expand(model)
    ir.save(model, tmp_path / "e.onnx")
    feeds = {"q": q, "k": k, "v": v, "mask": mask}
    given = session(tmp_path / "e.onnx").run(None, feeds)[0]
    assert given.dtype == dtype
    expected = definition(q, k, v, 3, mask)
    assert np.abs(given - expected).max() <= tolerance
    if dtype == np.float32:
        assert np.abs(session(path).run(None, feeds)[0] - expected).max() <= tolerance


def test_mask_of_another_kind(folder):
    attention(folder / UNET, np.float32, 2, (8, 8, 8), mask=["rows"])
    refused(folder, "has a mask that is not one of keys")


@pytest.mark.parametrize("attributes", [{"scale": 0.5}, {"unidirectional": 1}, {"mask_filter_value": -1.0}])
def test_other_attention(folder, attributes):
    attention(folder / UNET, np.float32, 2, (8, 8, 8), **attributes)
    refused(folder, "holds attention that is not memedge's")


def test_attention_of_unknown_width(folder):
    attention(folder / UNET, np.float32, 2, ("D", "D", "D"))
    refused(folder, "the width of q is not known")


def refused(folder, words):
    list_file(folder, UNET)
    with pytest.raises(IntegrityError, match=words):
        read_expanded(EngineDirectory.open(folder), UNET)


@pytest.mark.parametrize("content", [b"\xff" * 9, b"not ONNX", b"\x80\x04N."])
def test_no_graph(folder, content):
    (folder / UNET).write_bytes(content)
    refused(folder, r"is not an ONNX file|holds a file with field")


def outside(array) -> TensorProto:
    tensor = numpy_helper.from_array(array, "secret")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    return tensor


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("initializer", "reads '../secret', which the manifest does not list"),
        ("constant", "where none should"),
        ("branch", "holds a graph within a node"),
        ("function", "file with field 25"),
    ],
)
def test_weights_outside(folder, place, words):
    """TensorRT would open any file that a graph names, wherever in it."""
    model = onnx.load(folder / UNET, load_external_data=False)
    tensor = outside(np.zeros(4, np.float32))
    constant = helper.make_node("Constant", [], ["secret"], value=tensor)
    result = helper.make_tensor_value_info("secret", TensorProto.FLOAT, [4])
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "constant":
        model.graph.node.insert(0, constant)
    elif place == "branch":
        branch = helper.make_graph([constant], "branch", [], [result])
        condition = numpy_helper.from_array(np.array(True), "condition")
        model.graph.initializer.append(condition)
        model.graph.node.insert(0, helper.make_node("If", ["condition"], ["x"], then_branch=branch, else_branch=branch))
    else:
        model.functions.append(helper.make_function("own", "f", [], ["secret"], [constant], model.opset_import))
    onnx.save(model, folder / UNET)
    refused(folder, words)
