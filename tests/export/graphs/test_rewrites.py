"""Graph rewrites give what torch gives for the graph as it was."""

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memedge.export.graphs import files, fold_upsampling, fuse_linear, split_concats
from memedge.export.graphs.prefix_split import _downstream, _settle_shapes
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.trace import trace as trace_module


def run(model: ir.Model, path, *inputs: torch.Tensor) -> torch.Tensor:
    files.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def trace(module: nn.Module, **example: torch.Tensor) -> ir.Model:
    with quiet():
        return trace_module(module, example, dict.fromkeys(example, "rows"), "result")


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


class Enlarged(nn.Module):
    def __init__(self, **convolution):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, **{"kernel_size": 3, "padding": 1, **convolution})

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (1, 1), (3, 7)])
def test_fold_upsampling(tmp_path, height, width):
    torch.manual_seed(0)
    module, x = Enlarged().eval(), torch.randn(2, 3, height, width)
    model = trace(module, x=x)
    fold_upsampling.fold(model)
    assert (count(model, "Resize"), count(model, "Conv")) == (0, 4)
    torch.testing.assert_close(run(model, tmp_path / "m.onnx", x), module(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [{"padding": 0}, {"kernel_size": 5, "padding": 2}, {"stride": 2}, {"dilation": 2}])
def test_other_convolutions_stay(tmp_path, other):
    module, x = Enlarged(**other).eval(), torch.randn(2, 3, 6, 6)
    model = trace(module, x=x)
    fold_upsampling.fold(model)
    assert (count(model, "Resize"), count(model, "Conv")) == (1, 1)
    torch.testing.assert_close(run(model, tmp_path / "m.onnx", x), module(x).detach(), rtol=1e-5, atol=1e-6)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.plain = nn.Linear(6, 16), nn.Linear(8, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        hidden, gate = self.wide(x).chunk(2, dim=-1)
        return self.narrow(hidden * F.gelu(gate)) + self.plain(x)


def test_fuse_linear_layers(tmp_path):
    torch.manual_seed(0)
    module, x = Gated().eval(), torch.randn(3, 5, 6)
    model = trace(module, x=x)
    fuse_linear.fuse(model)
    assert (count(model, "Split"), count(model, "Gemm"), count(model, "MatMul")) == (0, 3, 1)
    torch.testing.assert_close(run(model, tmp_path / "m.onnx", x), module(x).detach(), rtol=1e-5, atol=1e-6)


class Skip(nn.Module):
    """As in an up block: what depends on the prompt beside what does not, normalised, activated, convolved."""

    def __init__(self, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, 12)
        self.conv, self.shortcut = nn.Conv2d(12, 7, 3, padding=1), nn.Conv2d(12, 7, 1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, moving, fixed):
        x = torch.cat([moving, fixed], dim=1)
        return self.conv(F.silu(self.norm(x))) + self.shortcut(x)


@pytest.mark.parametrize(
    ("groups", "moving", "apart"),
    [(4, 6, True), (6, 4, True), (3, 4, True), (3, 6, False), (2, 4, False)],  # apart: no group spans both halves
)
def test_separate_halves(tmp_path, groups, moving, apart):
    torch.manual_seed(0)
    module = Skip(groups).eval()
    inputs = torch.randn(2, moving, 4, 4), torch.randn(2, 12 - moving, 4, 4)
    model = trace(module, moving=inputs[0], fixed=inputs[1])
    _settle_shapes(model.graph)
    split_concats.separate(model.graph, _downstream(model.graph, [model.graph.inputs[0]]))
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert count(model, "Conv") == (4 if apart else 3)  # the shortcut can always be taken apart
    assert count(model, "Concat") == (0 if apart else 1)
    torch.testing.assert_close(run(model, tmp_path / "m.onnx", *inputs), module(*inputs).detach(), rtol=1e-5, atol=1e-5)
