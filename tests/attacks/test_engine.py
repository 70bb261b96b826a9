"""Attempts to make an engine directory read, allocate or run what it should not. Its manifest is the attacker's too."""

import os
import shutil

import onnx
import pytest
from engines import edit_manifest, list_file

from memedge import Detector, EngineError
from memedge.engine.errors import IntegrityError, ManifestError


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", "..", "a\\..\\secret", "x\0y"])
def test_file_outside(copy, name):
    (copy.parent / "secret").write_text("secret")
    list_file(copy, name, copy.parent / "secret")
    with pytest.raises(IntegrityError, match="outside"):
        Detector.load(copy)


def test_link_to_outside(copy):
    data = copy / "unet.onnx.data"
    outside = copy.parent / "elsewhere"
    data.rename(outside)
    data.symlink_to(outside)
    with pytest.raises(IntegrityError, match="is a link"):
        Detector.load(copy)


def test_fifo_does_not_block(copy):
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(IntegrityError, match="missing"):
        Detector.load(copy)


@pytest.mark.parametrize("name", ["unet.onnx", "gradient.onnx"])
def test_weights_outside(copy, name):
    """An ONNX file may name its weights by a path of its own; no runtime is shown one that the manifest has not."""
    shutil.copy(copy / "unet.onnx.data", copy.parent / "weights")
    model = onnx.load(copy / name, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    onnx.save(model, copy / name)
    list_file(copy, name)
    with pytest.raises(IntegrityError, match=r"reads '\.\./weights', which the manifest does not list"):
        Detector.load(copy).explain("a star", "gradient")


def test_another_graph(copy):
    shutil.copy(copy / "text_encoder.onnx", copy / "gradient.onnx")
    list_file(copy, "gradient.onnx")
    with pytest.raises(IntegrityError, match=r"gradient\.onnx is not the graph that it should be"):
        Detector.load(copy).explain("a star", "gradient")


@pytest.mark.parametrize("name", ["unet.onnx", "text_encoder.onnx", "tokenizer.json", "baseline.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"{}", b"\xff" * 8 + b"{}", b"\x80\x04N."])
def test_other_content(copy, name, content):
    (copy / name).write_bytes(content)
    list_file(copy, name)
    with pytest.raises(EngineError):
        Detector.load(copy)


def test_model_of_other_shape(copy):
    """Sizes in the manifest that are not the graphs': refused at load, or at the latest with the first prompt."""
    edit_manifest(copy, lambda m: m.update(state_width=4096))
    with pytest.raises(EngineError):
        Detector.load(copy)


@pytest.mark.parametrize("width", [-1, 25, 1 << 40])
def test_pooled_states_wider_than_states(copy, width):
    edit_manifest(copy, lambda m: m.update(pooled_width=width))
    with pytest.raises(ManifestError, match="pooled"):
        Detector.load(copy)


def test_pooled_states_that_are_not_there(copy):
    edit_manifest(copy, lambda m: m.update(pooled_width=8))
    with pytest.raises(EngineError):
        Detector.load(copy)


def test_a_tokenizer_too_many(copy):
    """The graph takes the ids of one."""
    shutil.copy(copy / "tokenizer.json", copy / "tokenizer_2.json")
    list_file(copy, "tokenizer_2.json")
    with pytest.raises(EngineError):
        Detector.load(copy)


def test_preset_that_is_not_finite(copy):
    preset = {"family": "x", "gamma_norm": 1.0, "gamma_alignment": float("nan")}
    edit_manifest(copy, lambda m: m.update(preset=preset))
    with pytest.raises(ManifestError):
        Detector.load(copy)


def test_many_draws(copy):
    """A claim of 65536 draws allocates nothing: the baseline's shape is checked before."""
    edit_manifest(copy, lambda m: m.update(draws=65536))
    with pytest.raises(IntegrityError, match="no float32 tensor"):
        Detector.load(copy)


def test_deep_manifest(copy):
    (copy / "manifest.json").write_text('{"schema": 1, "a": ' + "[" * 50_000 + "]" * 50_000 + "}")
    with pytest.raises(ManifestError):
        Detector.load(copy)
