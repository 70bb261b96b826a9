"""fp16 engines keep in float32 what the measured error needs, and no more."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel
from models import make_checkpoint

from memedge import Detector
from memedge.engine.errors import ExportError
from memedge.engine.manifest import read_manifest
from memedge.engine.precision import ENGINE, Tolerance
from memedge.export.export import export

GRAPHS = ("text_encoder.onnx", "unet.onnx", "unet.onnx.data")


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory) -> Path:
    """An fp16 engine that needs nothing more."""
    output = tmp_path_factory.mktemp("plain") / "engine"
    assert export(checkpoint, output, precision="fp16").notes == ()
    return output


def size(engine: Path) -> int:
    return sum((engine / name).stat().st_size for name in GRAPHS)


def in_float32(engine: Path) -> int:
    nodes = ir.load(engine / "unet.onnx").graph
    return sum(
        node.op_type in ("Conv", "Gemm", "MatMul") and node.outputs[0].dtype == ir.DataType.FLOAT for node in nodes
    )


def test_as_much_as_is_needed(checkpoint, engine, plain, tmp_path, monkeypatch):
    """Under a tolerance of half of what plain fp16 reaches, some stays float32; the note says what that costs.

    That is enough where a GPU's rounding is simulated. ONNX Runtime's own, which differs between processors, may miss.
    """
    parity = read_manifest(plain).parity
    monkeypatch.setitem(ENGINE, "fp16", Tolerance(0.5 * parity.norm_relative, 0.5 * parity.alignment_absolute))
    manifest = export(checkpoint, tmp_path / "engine", precision="fp16", accept_parity=True)
    assert manifest.parity.norm_relative < parity.norm_relative
    assert size(plain) < size(tmp_path / "engine") < size(engine)
    assert in_float32(plain) < in_float32(tmp_path / "engine") < in_float32(engine)
    note = manifest.notes[0]
    cost = f"which takes {(size(tmp_path / 'engine') - size(plain)) / 1e6:.1f} MB"
    assert cost in note and "parts of the graphs stay in fp32" in note
    assert sorted(manifest.files) == sorted(read_manifest(plain).files)
    assert Detector.load(tmp_path / "engine", "cpu").score(["a cat"]).norm[0] > 0


def test_where_nothing_helps(checkpoint, plain, tmp_path, monkeypatch):
    """The cached inputs are rounded in any fp16 engine: it is refused, or accepted as small as it was."""
    monkeypatch.setitem(ENGINE, "fp16", Tolerance(1e-9, 1e-9))
    with pytest.raises(ExportError, match="export in fp32, or accept that with --accept-parity"):
        export(checkpoint, tmp_path / "engine", precision="fp16")
    assert not list(tmp_path.iterdir())
    manifest = export(checkpoint, tmp_path / "engine", precision="fp16", accept_parity=True)
    assert [note.partition(",")[0] for note in manifest.notes] == ["It is less exact than fp16 promises"]
    assert manifest.parity == read_manifest(plain).parity and manifest.files == read_manifest(plain).files


@pytest.mark.slow
def test_quiet_prompts(tmp_path):
    """A model whose prompts hardly matter: Δ is as small as the rounding of ε, which fp16 alone would not show."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                module.to_out[0].weight.mul_(0.03)
    unet.save_pretrained(checkpoint / "unet")
    manifest = export(checkpoint, tmp_path / "engine", precision="fp16")
    assert "parts of the graphs stay in fp32" in manifest.notes[0]
    assert manifest.parity.alignment_absolute <= ENGINE["fp16"].alignment
