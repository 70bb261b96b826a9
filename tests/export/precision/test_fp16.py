"""fp16 engines: what computes in fp16 and what stays float32, and that nothing overflows where a GPU would."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from models import make_checkpoint
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

from memedge import Detector
from memedge.engine.errors import ExportError
from memedge.engine.manifest import Parity, read_manifest
from memedge.engine.precision import ENGINE
from memedge.export.export import export
from memedge.export.graphs import files, prefix_split
from memedge.export.parity import worse
from memedge.export.precision import fp16, ranges, simulate_fp16
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.trace import trace as trace_module

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
FLOATS = (HALF, SINGLE)


@pytest.fixture(scope="module")
def engine16(checkpoint, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("half") / "engine"
    export(checkpoint, output, precision="fp16")
    return output


def changed(folder: Path, edit) -> Path:
    """A checkpoint whose UNet was edited."""
    make_checkpoint(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        edit(unet)
    unet.save_pretrained(folder / "unet")
    return folder


def within_table(parity: Parity) -> bool:
    tolerance = ENGINE["fp16"]
    return parity.norm_relative <= tolerance.norm and parity.alignment_absolute <= tolerance.alignment


def computes_in(graph: ir.Graph, op_type: str) -> list[ir.DataType]:
    return [node.outputs[0].dtype for node in graph if node.op_type == op_type]


def check_casts(graph: ir.Graph) -> None:
    """Every operator has its float operands in one type; no value is cast twice, and none back and forth."""
    casts = [node for node in graph if node.op_type == "Cast"]
    assert max(Counter((node.inputs[0], node.outputs[0].dtype) for node in casts).values()) == 1
    for node in graph:
        types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in FLOATS}
        if node.op_type == "Cast":
            assert len(types) == 2
            assert node.inputs[0].producer() is None or node.inputs[0].producer().op_type != "Cast"
            assert not node.inputs[0].is_initializer()
        else:
            assert len(types) <= 1, node


def test_unet_types(engine16):
    graph = ir.load(engine16 / "unet.onnx").graph
    check_casts(graph)
    inputs = {value.name: value.dtype for value in graph.inputs}
    assert inputs.pop("states") == SINGLE and {inputs.pop("prompt"), inputs.pop("row")} == {ir.DataType.INT64}
    assert set(inputs.values()) == {HALF} and [value.dtype for value in graph.outputs] == [SINGLE]
    assert {
        array.dtype for name, array in load_file(engine16 / "baseline.safetensors").items() if "cached" in name
    } == {np.dtype(np.float16)}
    for op_type in ("InstanceNormalization", "LayerNormalization"):
        assert set(computes_in(graph, op_type)) == {SINGLE}
    for op_type in ("Gemm", "MatMul", "MultiHeadAttention", "Gather", "Transpose", "DepthToSpace", "Gelu"):
        assert set(computes_in(graph, op_type)) == {HALF}, op_type
    convolutions = computes_in(graph, "Conv")
    assert convolutions[-1] == SINGLE and set(convolutions[:-1]) == {HALF}
    for norm in (node for node in graph if node.op_type == "InstanceNormalization"):
        around = [norm.inputs[0].producer(), *norm.outputs[0].consumers()]
        assert [(node.op_type, node.outputs[0].dtype) for node in around] == [("Reshape", SINGLE)] * 2
        multiplied = around[1].outputs[0].consumers()
        assert [node.op_type for node in multiplied] == ["Mul"]
        assert computes_in(multiplied, "Mul") == computes_in(multiplied[0].outputs[0].consumers(), "Add") == [SINGLE]


def test_text_encoder_types(engine16):
    graph = ir.load(engine16 / "text_encoder.onnx").graph
    check_casts(graph)
    assert (graph.inputs[0].dtype, graph.outputs[0].dtype) == (ir.DataType.INT64, SINGLE)
    assert set(computes_in(graph, "MatMul")) == set(computes_in(graph, "Gather")) == {HALF}
    assert set(computes_in(graph, "LayerNormalization")) == set(computes_in(graph, "Softmax")) == {SINGLE}
    for softmax in (node for node in graph if node.op_type == "Softmax"):  # the mask exceeds fp16
        assert softmax.inputs[0].producer().op_type == "Add"


def test_half_the_size(engine, engine16):
    for name in ("unet.onnx.data", "baseline.safetensors"):
        assert (engine16 / name).stat().st_size < 0.6 * (engine / name).stat().st_size


def test_parity_is_that_of_the_precision(engine, engine16):
    single, double = read_manifest(engine16).parity, read_manifest(engine).parity
    assert within_table(single)
    assert single.norm_relative > 10 * double.norm_relative
    assert single.epsilon_relative > 10 * double.epsilon_relative
    assert Detector.load(engine16).info.key == "cpu-fp16"


def test_worse():
    found = worse(Parity(1.0, 4.0, float("nan"), 7.0), Parity(2.0, 3.0, 5.0, float("nan")))
    assert (found.epsilon_relative, found.norm_relative) == (2.0, 4.0)
    assert np.isnan([found.alignment_absolute, found.score_absolute]).all()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(6, 16, 3, padding=1), nn.Linear(16, 6)

    def forward(self, x):
        y = self.conv(x)
        y = y * torch.sigmoid(y)
        return self.linear(y.flatten(2).transpose(1, 2)) + x.flatten(2).transpose(1, 2)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def trace(module: nn.Module, path: Path, **example: torch.Tensor) -> Path:
    """The module's graph in fp16 wherever it can be, at `path`."""
    with quiet():
        model = trace_module(module, example, dict.fromkeys(example, "rows"), "result")
    files.save(model, path)
    model = ir.load(path)
    fp16.narrow(model, set())
    files.save(model, path)
    return path


def simulated(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    feeds = {name: x.numpy() for name, x in inputs.items()}
    return torch.from_numpy(simulate_fp16.open_session(path).run(None, feeds)[0])


def test_simulation_rounds_as_torch(tmp_path):
    """Each operator in float64 on fp16 numbers, rounded to fp16: at most a last bit differs, where sums are halfway."""
    torch.manual_seed(0)
    module, x = Block().eval().requires_grad_(False), torch.randn(2, 6, 5, 5)
    found = simulated(trace(module, tmp_path / "m.onnx", x=x), x=x)
    module.conv.weight.data, module.conv.bias.data = rounded(module.conv.weight.data), rounded(module.conv.bias.data)
    narrow = rounded(x)
    y = rounded(F.conv2d(narrow.double(), module.conv.weight.double(), module.conv.bias.double(), padding=1))
    y = rounded(y * rounded(torch.sigmoid(y))).flatten(2).transpose(1, 2)
    y = rounded(y.double() @ rounded(module.linear.weight.data).double().T)
    y = rounded(rounded(y + rounded(module.linear.bias.data)) + narrow.flatten(2).transpose(1, 2))
    assert (found == rounded(found)).all()
    assert (found == y).float().mean() > 0.99
    torch.testing.assert_close(found, y, rtol=2**-10, atol=2**-11)
    assert (module(x) - found).abs().max() > 1e-4  # neither is what float32 gives


class Attention(nn.Module):
    def forward(self, q, k, v):
        return torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention", (q, k, v), {"num_heads": 2}, dtype=q.dtype, shape=q.shape, version=1
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and result of two heads, rounded wherever fp16 is stored."""
    q, k, v = (rounded(x).unflatten(2, (2, -1)).transpose(1, 2).double() for x in (q, k, v))
    logits = rounded(rounded(q * torch.tensor(q.shape[-1] ** -0.5).half()).double() @ k.transpose(2, 3))
    shares = rounded(torch.softmax(logits.double(), -1))
    return logits, rounded(shares.double() @ v).transpose(1, 2).flatten(2)


def test_simulated_attention(tmp_path):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 12), torch.randn(3, 7, 12), torch.randn(3, 7, 12)
    path = trace(Attention(), tmp_path / "m.onnx", q=q, k=k, v=v)
    _, expected = attention(q, k, v)
    torch.testing.assert_close(simulated(path, q=q, k=k, v=v), expected, rtol=2**-9, atol=2**-11)
    large = simulated(path, q=300 * q, k=300 * k, v=v)  # logits beyond 65504, operands far below
    assert attention(300 * q, 300 * k, v)[0].isinf().any() and large.isnan().any()


class Enlarged(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 5)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def test_enlarged(tmp_path):
    """Resize takes its scales as float32 whatever it enlarges."""
    torch.manual_seed(0)
    module, x = Enlarged().eval(), torch.randn(2, 3, 4, 4)
    path = trace(module, tmp_path / "m.onnx", x=x)
    (resize,) = (node for node in ir.load(path).graph if node.op_type == "Resize")
    assert (resize.inputs[0].dtype, resize.inputs[2].dtype, resize.outputs[0].dtype) == (HALF, SINGLE, HALF)
    expected = module(x).detach()
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    for found in (torch.from_numpy(plain), simulated(path, x=x)):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


class Square(nn.Module):
    def forward(self, x):
        return x * x / x


def test_overflow_is_seen(tmp_path):
    """300² is infinite in fp16. ONNX Runtime's CPU provider hides it: the reason to simulate."""
    x = torch.tensor([[300.0, 2.0]])
    path = trace(Square(), tmp_path / "m.onnx", x=x)
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert plain.run(None, {"x": x.numpy()})[0].tolist() == [[300, 2]]
    assert simulated(path, x=x).tolist() == [[float("inf"), 2]]
    assert list(tmp_path.iterdir()) == [path]


def test_ranges_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    inputs = [[torch.randn(2, n, 12) * size for n in (5, 7, 7)] for size in (1, 3, 2)]
    path = tmp_path / "m.onnx"
    with quiet():
        q, k, v = inputs[0]
        axes = dict.fromkeys("qkv", "rows")
        files.save(trace_module(Attention(), {"q": q, "k": k, "v": v}, axes, "result"), path)
    calls = [dict(zip("qkv", (x.numpy() for x in call), strict=True)) for call in inputs]
    found = ranges.observe(path, calls)
    for index, name in enumerate("qkv"):
        assert found.values[name] == max(float(call[index].abs().max()) for call in inputs)
    logits, bounds = [], []
    for q, k, _ in inputs:
        q, k = (x.unflatten(2, (2, 6)).transpose(1, 2).double() for x in (q, k))
        logits.append((q @ k.transpose(2, 3)).abs().max() / 6**0.5)
        bounds.append((q.norm(dim=3).amax((0, 2)) * k.norm(dim=3).amax((0, 2))).max() / 6**0.5)
    assert found.logits["result"] == pytest.approx(float(max(bounds)), rel=1e-5)
    assert found.logits["result"] >= max(logits)
    assert list(tmp_path.iterdir()) == [path]


def naive(engine: Path, folder: Path) -> np.ndarray:
    """What a GPU would predict if all of a float32 engine's UNet were fp16, for random states."""
    shutil.copytree(engine, folder)
    model = ir.load(engine / "unet.onnx")
    fp16.narrow(model, {node for node in model.graph if node.op_type not in fp16.NARROW})
    files.save(model, folder / "unet.onnx", external_data=True)
    return simulate_fp16.open_session(folder / "unet.onnx").run(None, inputs(engine, np.float16))[0]


def inputs(engine: Path, dtype: type) -> ranges.Feeds:
    """A float32 engine's cached inputs as the dtype, and random states, for both timesteps."""
    tensors = load_file(engine / "baseline.safetensors")
    cached = {name: array.astype(dtype) for name, array in tensors.items() if name.startswith("cached")}
    states = np.random.default_rng(0).standard_normal((1, 16, 24), np.float32)
    return {"states": states, "prompt": np.zeros(2, np.int64), "row": np.arange(2), **cached}


def torch_half(checkpoint: Path) -> torch.Tensor:
    """What torch predicts with a UNet's modules in half precision, and attention not fused."""
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval().half()
    unet.set_attn_processor(AttnProcessor())
    generator = torch.Generator().manual_seed(0)
    sample, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 16, 24, generator=generator)
    with torch.no_grad():
        return unet(sample.half(), 981, states.half()).sample


def large_logits(unet) -> None:
    """As in SD 2's attention, whose logits exceed fp16 (diffusers' `upcast_attention`), queries and keys do not."""
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q.weight *= 700
    attention.to_k.weight *= 700
    attention.to_v.weight *= 1e-3  # softmax is all but argmax there: what it picks must not matter


def large_residual(unet) -> None:
    unet.mid_block.resnets[1].conv2.weight *= 1e6


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "op_type"), [(large_logits, "MultiHeadAttention"), (large_residual, "Conv")])
def test_overflow_is_averted(tmp_path, edit, op_type):
    """What would overflow on a GPU stays float32, and only that; results stay within the table."""
    checkpoint = changed(tmp_path / "checkpoint", edit)
    export(checkpoint, tmp_path / "fp32")
    assert not torch_half(checkpoint).isfinite().all()
    assert not np.isfinite(naive(tmp_path / "fp32", tmp_path / "naive")).all()
    manifest = export(checkpoint, tmp_path / "fp16", precision="fp16")
    assert within_table(manifest.parity)
    graph = ir.load(tmp_path / "fp16" / "unet.onnx").graph
    check_casts(graph)
    usual = 1 if op_type == "Conv" else 0  # the last convolution
    types = Counter(computes_in(graph, op_type))
    assert types[SINGLE] > usual and types[HALF] > 5
    narrow = {value.name for node in graph for value in node.outputs if value.dtype == HALF}
    found = ranges.observe(tmp_path / "fp32" / "unet.onnx", [inputs(tmp_path / "fp32", np.float32)])
    assert max(largest for name, largest in found.values.items() if name in narrow) < 65504 / 4
    assert max(bound for name, bound in found.logits.items() if name in narrow) < 65504 / 4
    assert max(*found.values.values(), *found.logits.values()) > 65504


def test_ordinary_checkpoint_does_not_overflow(checkpoint, engine, tmp_path):
    """Or the tests above would prove nothing."""
    assert torch_half(checkpoint).isfinite().all()
    assert np.isfinite(naive(engine, tmp_path / "naive")).all()


def test_weights_beyond_fp16(engine, tmp_path):
    shutil.copy(engine / "unet.onnx", tmp_path)
    shutil.copy(engine / "unet.onnx.data", tmp_path)
    graph = ir.load(tmp_path / "unet.onnx").graph
    none = ranges.Ranges({}, {})
    before = fp16.wide(graph, none)
    gemm = next(node for node in graph if node.op_type == "Gemm")
    gemm.inputs[1].const_value = ir.tensor(gemm.inputs[1].const_value.numpy() * np.float32(1e7))
    assert fp16.wide(graph, none) - before == {gemm}


@pytest.mark.slow
def test_refuses_what_cannot_be_stored(tmp_path):
    """Cached inputs are fp16 in every fp16 engine: what does not fit is not exported, and nothing is left."""

    def edit(unet):
        unet.conv_in.weight *= 1e6

    checkpoint = changed(tmp_path / "checkpoint", edit)
    words = r"reaches \d\.\d+e\+06, more than fp16's largest number, 65504: nothing was written; export in fp32"
    with pytest.raises(ExportError, match=words) as caught:
        export(checkpoint, tmp_path / "engine", precision="fp16")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.slow
def test_time_embedding_stays_float32(checkpoint, tmp_path, monkeypatch):
    """Where nothing may be cached but noise and timestep, the embedding is in the graph: sin(981 · f), f ≤ 1."""
    monkeypatch.setattr(prefix_split, "MEMORY_FLOOR", 0)
    monkeypatch.setattr(prefix_split, "MEMORY_SHARE", 0)
    manifest = export(checkpoint, tmp_path / "engine", precision="fp16")
    assert within_table(manifest.parity)
    graph = ir.load(tmp_path / "engine" / "unet.onnx").graph
    check_casts(graph)
    assert computes_in(graph, "Sin") == computes_in(graph, "Cos") == [SINGLE]
    assert Counter(computes_in(graph, "Gemm"))[SINGLE] > 4  # the embedding's own layers, and one in each block
