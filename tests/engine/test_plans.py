"""Plan files: what is found, and the sentence for all that can be wrong. Their manifest is the attacker's too."""

import json
import os
from dataclasses import replace

import pytest

from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import plans
from memedge.engine.directory import SCREENS, EngineDirectory
from memedge.engine.errors import EngineError, IntegrityError, ProviderError
from memedge.engine.manifest import MOST_TAPS, read_manifest

VERSION = "1.7.1.116"
GPU = "NVIDIA RTX 4000 Ada"


@pytest.fixture
def directory(tmp_path, monkeypatch) -> EngineDirectory:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "an engine"
    folder.mkdir()
    return EngineDirectory(folder, read_manifest(EMBEDDED_ENGINE))


def fill(directory, target="sm89", version=VERSION, backend="tensorrt-rtx", gpu=None, components=("text", "unet")):
    """Record plans with contents of their own; return where."""
    place = plans.writable_folder(directory)
    built = []
    for component in components:
        content = memoryview(f"{component} {backend} {target} {version}".encode())
        fields = {"component": component, "backend": backend, "target": target, "version": version, "gpu": gpu}
        built.append((plans.describe(content, most=4, seconds=1.5, peak_memory=1 << 30, **fields), content))
    plans.record(place, directory, built)
    return place


def fails(directory, error: type[EngineError], words: str, backend="tensorrt-rtx", **given):
    with pytest.raises(error) as caught:
        plans.find(directory, backend, "sm89", VERSION, **given)
    message = str(caught.value)
    assert words in message
    assert f"run `memedge build '{directory.path}' --provider {backend} --gpu SM89`" in message
    assert message.endswith(".") and "\n" not in message


def edit(place, change):
    path = place / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_found(directory):
    fill(directory)
    found = plans.find(directory, "tensorrt-rtx", "sm89", VERSION)
    for component, file in (("unet", found.unet), ("text", found.text)):
        assert file.path == directory.path / "plans" / f"{component}-tensorrt-rtx-sm89-{VERSION}.plan"
        assert file.path.read_text() == f"{component} tensorrt-rtx sm89 {VERSION}"
        assert (file.plan.component, file.plan.most, file.plan.size) == (component, 4, len(file.path.read_bytes()))


def test_each_target_its_own(directory):
    fill(directory, "sm75")
    fill(directory, "sm89")
    fill(directory, "sm89", "11.4.0.106", "tensorrt", GPU)
    assert plans.find(directory, "tensorrt-rtx", "sm75", VERSION).unet.plan.target == "sm75"
    assert plans.find(directory, "tensorrt", "sm89", "11.4.0.106", GPU).unet.plan.gpu == GPU
    assert len(list((directory.path / "plans").iterdir())) == 7


def test_built_again(directory):
    """A plan of the same name takes the place of the old one, in the folder and in the manifest."""
    place = fill(directory)
    content = memoryview(b"better")
    old = plans.find(directory, "tensorrt-rtx", "sm89", VERSION).unet.plan
    fields = {"component": "unet", "backend": old.backend, "target": old.target, "version": VERSION, "gpu": None}
    plan = plans.describe(content, most=8, seconds=2.0, peak_memory=1, **fields)
    plans.record(place, directory, [(plan, content)])
    found = plans.find(directory, "tensorrt-rtx", "sm89", VERSION).unet
    assert (found.plan, found.path.read_bytes()) == (plan, b"better")
    assert len(json.loads((place / "manifest.json").read_text())["plans"]) == 2


def test_read_only_engine(directory, tmp_path):
    """In the user's cache then. Root may write anywhere, so what cannot be written to is a folder inside a file."""
    (tmp_path / "file").touch()
    directory = replace(directory, path=tmp_path / "file" / "an engine")
    place = fill(directory)
    assert place == tmp_path / "cache" / "memedge" / directory.identity[:32] / "plans"
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION).unet.path.parent == place


def test_cache_behind_the_engine(directory, tmp_path):
    """Plans in the cache serve where those in the engine's folder are for another GPU."""
    (tmp_path / "file").touch()
    fill(replace(directory, path=tmp_path / "file" / "x"))
    fill(directory, "sm120")
    found = plans.find(directory, "tensorrt-rtx", "sm89", VERSION)
    assert found.unet.path.is_relative_to(tmp_path / "cache")


def test_nowhere_to_write(directory, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"Plans cannot be written to .* and .*: make a folder writable"):
        plans.writable_folder(replace(directory, path=tmp_path / "file" / "x"))


def test_none(directory):
    fails(directory, ProviderError, "has no plans for provider 'tensorrt-rtx'")


def test_other_backend(directory):
    fill(directory)
    fails(directory, ProviderError, "holds no plans for provider 'tensorrt'", backend="tensorrt")


def test_other_target(directory):
    fill(directory, "sm120")
    fill(directory, "sm75")
    fails(directory, ProviderError, "are for SM120, SM75, and this GPU is SM89")


def test_other_version(directory):
    fill(directory, version="1.6.0.1")
    fails(directory, ProviderError, f"are of TensorRT 1.6.0.1, and version {VERSION} is installed")


def test_other_gpu(directory):
    fill(directory, backend="tensorrt", gpu=GPU)
    fails(directory, ProviderError, f"is for the GPU {GPU}, and this one is NVIDIA L4", "tensorrt", gpu="NVIDIA L4")


def test_other_engine(directory):
    fill(directory)
    other = replace(directory, manifest=read_manifest(EMBEDDED_ENGINE))
    other.manifest.files["tokenizer.json"] = other.manifest.files["unet.onnx"]
    fails(other, ProviderError, "are of another engine")


@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_other_engines_plans_make_way(directory, target):
    """Recording for another engine in the same folder leaves nothing of the first."""
    place = fill(directory)
    plans.record_cache(place, directory, f"timing-tensorrt-sm89-{VERSION}.cache", memoryview(b"measured"))
    other = replace(directory, manifest=read_manifest(EMBEDDED_ENGINE))
    other.manifest.files["tokenizer.json"] = other.manifest.files["unet.onnx"]
    fill(other, target)
    names = [f"{component}-tensorrt-rtx-{target}-{VERSION}.plan" for component in ("text", "unet")]
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", *names]
    assert plans.find(other, "tensorrt-rtx", target, VERSION)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "timing-tensorrt-sm89-../x.cache", "manifest.json"])
def test_forged_timing(directory, name):
    """Names that would be removed with another engine's plans."""
    (directory.path / "secret").write_text("secret")
    edit(fill(directory), lambda m: m["caches"].update({name: {"size": 6, "sha256": "0" * 64}}))
    fails(directory, IntegrityError, "is no manifest of plans")


def test_half(directory):
    fill(directory, components=["text"])
    fails(directory, IntegrityError, "lists no plan of the unet")


def test_screens(directory):
    """Of each tap, in order; what was built before there were any, or is not whole, has none."""
    taps = len(directory.manifest.taps)
    assert taps > 1
    fill(directory)
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION).screens == ()
    fill(directory, components=plans.SCREENS[1:taps])
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION).screens == ()
    fill(directory, components=plans.SCREENS[:1])
    found = plans.find(directory, "tensorrt-rtx", "sm89", VERSION)
    assert [file.plan.component for file in found.screens] == list(plans.SCREENS[:taps])
    assert found.rebuild == f"run `memedge build '{directory.path}' --provider tensorrt-rtx --gpu SM89`"
    found.screens[1].path.write_bytes(b"else")
    fails(directory, IntegrityError, "screen_2-tensorrt-rtx-sm89-1.7.1.116.plan is not the plan that was built")


def test_kernels_of_a_tap_are_kept(directory):
    place = fill(directory)
    name = f"runtime-screen_4-tensorrt-rtx-sm89-{VERSION}.cache"
    plans.record_cache(place, directory, name, memoryview(b"compiled"))
    assert plans.read_cache(place, directory, name) == b"compiled"
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION)


def test_there_is_a_component_for_every_tap():
    assert len(plans.SCREENS) == MOST_TAPS
    assert {f"{component}.onnx" for component in plans.SCREENS} == set(SCREENS)


@pytest.mark.parametrize("component", ["unet", "text"])
@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"\0" + b[1:], lambda _: b"", lambda b: b * (1 << 10)],
    ids=["truncated", "longer", "changed", "empty", "oversize"],
)
def test_damaged(directory, component, change):
    path = fill(directory) / f"{component}-tensorrt-rtx-sm89-{VERSION}.plan"
    path.write_bytes(change(path.read_bytes()))
    fails(directory, IntegrityError, f"{path.name} is not the plan that was built")


def test_missing(directory):
    (fill(directory) / f"unet-tensorrt-rtx-sm89-{VERSION}.plan").unlink()
    fails(directory, IntegrityError, "is missing or a link")


def test_link(directory, tmp_path):
    """What it leads to may change after it was verified, by whoever owns that place."""
    path = fill(directory) / f"unet-tensorrt-rtx-sm89-{VERSION}.plan"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    fails(directory, IntegrityError, "is missing or a link")


def test_linked_folder(directory, tmp_path):
    place = fill(directory)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    fails(directory, IntegrityError, "is no manifest of plans")
    with pytest.raises(IntegrityError, match="is a link"):
        plans.writable_folder(directory)


def test_fifo_does_not_block(directory):
    path = fill(directory) / f"unet-tensorrt-rtx-sm89-{VERSION}.plan"
    path.unlink()
    os.mkfifo(path)
    fails(directory, IntegrityError, "is missing or a link")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", "../../sm89"),
        ("target", "sm89\n"),
        ("target", "/sm89"),
        ("version", "1/../../../secret"),
        ("version", "1.7\x00"),
        ("version", "1." + "7" * 40),
        ("component", "../unet"),
        ("backend", "tensorrt/../../x"),
        ("gpu", "x" * 300),
        ("size", 1 << 40),
        ("size", -1),
        ("size", "5"),
        ("sha256", "A" * 64),
        ("sha256", "a" * 63),
        ("most", 0),
        ("most", 1 << 40),
        ("seconds", -1),
        ("peak_memory", 1.5),
        ("path", "../secret"),
        ("name", "../secret"),
    ],
)
def test_forged_entry(directory, field, value):
    edit(fill(directory), lambda m: m["plans"][0].update({field: value}))
    fails(directory, IntegrityError, "is no manifest of plans")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", b" " * (1 << 21), b'{"schema": 2}'],
    ids=range(9),
)
def test_no_manifest(directory, content):
    place = fill(directory)
    (place / "manifest.json").write_bytes(content)
    fails(directory, IntegrityError, "is no manifest of plans")
    fill(directory)  # building again mends it
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION)


def test_full_disk(directory, monkeypatch):
    """Nothing of a plan that could not be written is left, and what was there can still be found."""
    place = fill(directory)
    before = sorted(place.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            fill(directory, "sm120")
    assert sorted(place.iterdir()) == before
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION)


def test_timing_cache(directory):
    place = fill(directory)
    name = f"timing-tensorrt-sm89-{VERSION}.cache"
    assert plans.read_cache(place, directory, name) == b""
    plans.record_cache(place, directory, name, memoryview(b"measured"))
    assert plans.read_cache(place, directory, name) == b"measured"
    assert plans.find(directory, "tensorrt-rtx", "sm89", VERSION)  # the plans are still listed
    (place / name).write_bytes(b"Measured")
    assert plans.read_cache(place, directory, name) == b""
