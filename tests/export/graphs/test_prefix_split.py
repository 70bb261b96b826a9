"""The prefix split: nothing that depends on the prompt is cached, and what is cached is all that fits."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from memedge.engine.directory import EngineDirectory
from memedge.engine.manifest import read_manifest
from memedge.export.graphs import cost, files, prefix_split
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.open import load_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def full(checkpoint, tmp_path_factory) -> Path:
    """The random checkpoint's UNet as one graph."""
    with quiet():
        model = load_checkpoint(str(checkpoint)).unet_graph()
    path = tmp_path_factory.mktemp("full") / "unet.onnx"
    files.save(model, path)
    return path


def session(model: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    files.save(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def inputs(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((rows, 4, 8, 8), np.float32),
        "timestep": np.arange(rows) * 40 + 1,
        "states": rng.standard_normal((2, 16, 24), np.float32),
        "prompt": np.arange(rows) % 2,
    }


@pytest.mark.parametrize("limit", [1 << 30, 20_000, 2_000, 0])
def test_same_predictions_within_any_memory(full, tmp_path, monkeypatch, limit):
    """The split graph predicts what the whole one does; the smaller the memory, the less is cached."""
    monkeypatch.setattr(prefix_split, "MEMORY_FLOOR", limit)
    monkeypatch.setattr(prefix_split, "MEMORY_SHARE", 0)
    parts = prefix_split.split(ir.load(full), rows=4)
    whole = onnxruntime.InferenceSession(full, providers=["CPUExecutionProvider"])
    feeds = inputs(4)
    expected = whole.run(None, feeds)[0]
    prefix, rest = session(parts.prefix, tmp_path / "prefix.onnx"), session(parts.unet, tmp_path / "unet.onnx")
    given = {"sample": feeds["sample"], "timestep": feeds["timestep"]}
    used = {i.name for i in prefix.get_inputs()}
    cached = dict(
        zip(parts.cached, prefix.run(parts.cached, {k: v for k, v in given.items() if k in used}), strict=True)
    )
    assert sum(array.nbytes for array in cached.values()) <= max(limit, 4 * 4 * (4 * 64 + 64))
    order = np.array([2, 0, 3, 3])  # any rows, in any order
    found = rest.run(None, {"states": feeds["states"], "prompt": feeds["prompt"][order], "row": order, **cached})[0]
    np.testing.assert_allclose(found, expected[order], rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_counted(engine, checkpoint):
    """The manifest's count of the whole UNet is torch's own; the cached part is computed nowhere else."""
    flops = read_manifest(engine).flops
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
    feeds = inputs(1)
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        unet(torch.from_numpy(feeds["sample"]), 981, torch.from_numpy(feeds["states"][:1]))
    assert flops.unet == counter.get_total_flops()
    assert flops.prefix > 0 and flops.remaining < flops.unet - flops.prefix  # folded upsampling saves more
    graph = ir.load(engine / "unet.onnx").graph
    assert sum(map(cost.flops, (node for node in graph if node.op_type == "Conv"))) < flops.remaining


def test_embedded_engine_keeps_little():
    """On the embedded model a tenth of the work is the same for all prompts."""
    directory = EngineDirectory.open(ROOT / "memedge" / "data" / "engine")
    flops, cached = directory.manifest.flops, directory.baseline.cached
    assert flops.prefix / flops.unet > 0.1
    assert sum(array.nbytes for array in cached.values()) < 2 << 20
