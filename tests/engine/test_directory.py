"""Opening engine directories: what is verified, and the sentence for everything that can be wrong."""

import msgspec
import numpy as np
import pytest
from engines import edit_manifest, list_file
from safetensors.numpy import load_file, save_file

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import EngineError, IntegrityError, ManifestError
from memedge.engine.manifest import read_manifest, velocity_norm_factor, write_manifest


def fails(folder, error: type[EngineError], words: str):
    with pytest.raises(error) as caught:
        EngineDirectory.open(folder)
    message = str(caught.value)
    assert words in message
    assert message.endswith(".") and message.isprintable() and len(message.replace(str(folder), "")) < 500


def test_opens(copy):
    directory = EngineDirectory.open(copy)
    assert directory.manifest == read_manifest(copy)
    baseline = directory.baseline
    assert baseline.sample.shape == (1, 4, 8, 8)
    assert baseline.uncond.shape == (2, 1, 4, 8, 8)


def test_noise_is_what_the_manifest_says(copy):
    import torch

    sample = EngineDirectory.open(copy).baseline.sample
    expected = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(42)).numpy()
    np.testing.assert_array_equal(sample, expected)


def test_velocity_norm_factor():
    assert velocity_norm_factor(0.0057755) == pytest.approx(0.0057755**0.5 / (1 - 0.0057755))


def test_no_directory(tmp_path):
    fails(tmp_path / "absent", ManifestError, "is not a directory")


def test_no_engine(tmp_path):
    fails(tmp_path, ManifestError, "holds no manifest.json")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"schema"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"schema": "\\ud800"}',
    ],
)
def test_no_manifest(copy, text):
    (copy / "manifest.json").write_bytes(text)
    fails(copy, ManifestError, "is not a memedge manifest")


def test_huge_manifest(copy):
    (copy / "manifest.json").write_bytes(b" " * (1 << 21))
    fails(copy, ManifestError, "larger than 1 MiB")


@pytest.mark.parametrize(
    ("schema", "advice"),
    [
        *((5, "upgrade memedge"), (3, "export"), ("1", "export"), (None, "export"), ("\x1b" * 99, "export")),
        *((True, "export"), (4.0, "export"), ([[]], "of type list"), (10**30, "upgrade memedge")),
    ],
)
def test_other_schema(copy, schema, advice):
    edit_manifest(copy, lambda m: m.update(schema=schema))
    fails(copy, ManifestError, advice)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("timesteps"),
        lambda m: m.update(extra=1),
        lambda m: m.update(timesteps=[981]),
        lambda m: m.update(prediction_type="sample"),
        lambda m: m.update(draws="1"),
        lambda m: m.update(draws=1.5),
        lambda m: m["files"].update({"unet.onnx": {"size": -1}}),
        lambda m: m["files"].update({"unet.onnx": {"size": 1, "sha256": "\x1b" * 64}}),
        lambda m: m["source"].update(id="\x1b]0;title\x07red"),
        lambda m: m["source"].update(id="x" * 5000),
        lambda m: m["flops"].update(unet=10**400),
        lambda m: m["flops"].update(unet=-1),
        lambda m: m["parity"].update(norm_relative=10**400),
        lambda m: m.update(seed=2**64),
        lambda m: m.update(timesteps=[981, -1]),
        lambda m: m["cached"].update({"../x": [1]}),
        lambda m: m.update({"\x1b" * 900: 1}),
        lambda m: m["cached"].update({"x": [1] * 9}),
    ],
)
def test_invalid_field(copy, change):
    edit_manifest(copy, change)
    fails(copy, ManifestError, "is not valid")


@pytest.mark.parametrize("draws", [0, -1, 1 << 40])
def test_impossible_size(copy, draws):
    edit_manifest(copy, lambda m: m.update(draws=draws))
    fails(copy, ManifestError, "outside 1")


@pytest.mark.parametrize("alpha", [1.0, -0.1])
def test_impossible_alpha(copy, alpha):
    edit_manifest(copy, lambda m: m.update(alphas_cumprod=[0.5, alpha]))
    fails(copy, ManifestError, "outside [0, 1)")


@pytest.mark.parametrize("name", ["x" * 65, ".hidden", "a/b", "a b", "\x1b[31m", "é", "-rf"])
def test_file_names(copy, name):
    edit_manifest(copy, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    fails(copy, IntegrityError, "which is outside it or no engine's file")


def test_a_manifest_that_could_not_be_read_again_is_not_written(copy):
    before = (copy / "manifest.json").read_bytes()
    manifest = read_manifest(copy)
    with pytest.raises(ManifestError, match="is not valid"):
        write_manifest(copy, msgspec.structs.replace(manifest, notes=("\x1b",)))
    assert (copy / "manifest.json").read_bytes() == before


def test_a_file_that_cannot_be_read(copy, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("memedge.engine.directory.sha256", denied)
    fails(copy, IntegrityError, "cannot be read (Permission denied): check its permissions")
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    fails(copy, ManifestError, "cannot be read (Permission denied): check its permissions")


@pytest.mark.parametrize("name", ["unet.onnx", "unet.onnx.data", "text_encoder.onnx", "tokenizer.json"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    fails(copy, IntegrityError, "is missing")


def test_unlisted_file(copy):
    edit_manifest(copy, lambda m: m["files"].pop("unet.onnx"))
    fails(copy, IntegrityError, "does not list unet.onnx")


@pytest.mark.parametrize("name", ["unet.onnx", "unet.onnx.data", "baseline.safetensors"])
def test_truncated_file(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    fails(copy, IntegrityError, "bytes instead of")


@pytest.mark.parametrize("name", ["unet.onnx.data", "tokenizer.json"])
def test_changed_byte(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    fails(copy, IntegrityError, "is not the file that was exported")


def replace_baseline(folder, tensors):
    path = folder / "baseline.safetensors"
    save_file(tensors, path)
    list_file(folder, path.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"sample": t["sample"]}, "no float32 tensor 'uncond'"),
        (lambda t: {**t, "uncond": t["uncond"][:1]}, "no float32 tensor 'uncond'"),
        (lambda t: {**t, "sample": t["sample"].astype(np.float64)}, "no float32 tensor 'sample'"),
        (lambda t: {**t, "sample": t["sample"] * np.inf}, "NaN or infinity in 'sample'"),
    ],
)
def test_wrong_baseline(copy, change, words):
    replace_baseline(copy, change(load_file(copy / "baseline.safetensors")))
    with pytest.raises(IntegrityError, match=words):
        EngineDirectory.open(copy).baseline  # noqa: B018  # it is read when asked for
