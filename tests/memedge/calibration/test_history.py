"""What `calibrate` chooses under "auto", what it leaves uncalibrated, and the calibrations that it replaces."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from command_line import fails, memedge
from engines import PROVENANCE, edit_manifest

from memedge import calibrate
from memedge.calibration import fitting
from memedge.calibration.calibrate import calibrate_all
from memedge.calibration.fitting import Fit
from memedge.calibration.history import FILE, earlier, restore
from memedge.commands import info
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import opening
from memedge.engine.directory import EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, ManifestError, ProviderError
from memedge.engine.manifest import Gain, read_manifest

LISTS = [f"memorized number {i}" for i in range(24)], [f"clean number {i}" for i in range(100)]


@pytest.fixture
def folder(tmp_path) -> Path:
    place = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    edit_manifest(place, lambda m: m.update(calibrations={}))
    return place


@pytest.fixture(autouse=True)
def quick(monkeypatch, detector):
    """No model runs and nothing is fitted: one opened engine stands for any provider on any folder."""
    own = read_manifest(EMBEDDED_ENGINE).calibrations["cpu-fp32"]

    def open_engine(folder: Path, provider: str, precision: str | None, _threads: int | None) -> Engine:
        engine = copy.copy(detector.engine)
        engine.directory = EngineDirectory(folder, read_manifest(folder))
        engine.backend = SimpleNamespace(key=f"{provider}-{precision or 'fp32'}", screens=False)
        return engine

    monkeypatch.setattr(Engine, "open", open_engine)
    monkeypatch.setattr(Engine, "encode", lambda _engine, ids: SimpleNamespace(ids=ids, all=None))
    monkeypatch.setattr(Engine, "norm", lambda _engine, states: states.ids.sum(1) / 1e5)
    monkeypatch.setattr(Engine, "alignments", lambda _engine, states, *_: np.zeros(len(states.ids)))
    fitted = Fit(-2.0, 3.0, 1.0, 0.5, own.cross_validation, Gain(0.1, 0.01))
    monkeypatch.setattr(fitting, "fit_best", lambda *_: (0, fitted))


@pytest.fixture
def here(monkeypatch) -> list[tuple[str, str]]:
    """What can run the engine, in the order of "auto"."""
    found = [("openvino", "fp32"), ("cpu", "fp32")]
    monkeypatch.setattr("memedge.calibration.calibrate.runnable", lambda _directory: list(found))
    return found


@pytest.mark.usefixtures("here")
def test_auto_calibrates_what_auto_will_run(folder):
    done = calibrate(folder, *LISTS, threads=1)
    assert (done.key, done.uncalibrated) == ("openvino-fp32", ("cpu-fp32",))
    assert opening.automatic(EngineDirectory.open(folder), None, False)[0] == "openvino"
    assert calibrate(folder, *LISTS, precision="fp32", threads=1).key == "openvino-fp32"


def test_what_can_run_is_in_the_order_of_auto():
    """Without a calibration too, and "auto" is the first of them that has one."""
    directory = EngineDirectory.open(EMBEDDED_ENGINE)
    found = opening.runnable(directory)
    assert found[-1] == ("cpu", "fp32")
    manifest = msgspec.structs.replace(directory.manifest, calibrations={})
    assert opening.runnable(dataclasses.replace(directory, manifest=manifest)) == found
    int8 = msgspec.structs.replace(directory.manifest, precision="int8")
    assert opening.runnable(dataclasses.replace(directory, manifest=int8)) == [("cpu", "int8")]


@pytest.mark.usefixtures("here")
def test_all_providers(folder, tmp_path):
    for path, prompts in zip((tmp_path / "m.txt", tmp_path / "c.txt"), LISTS, strict=True):
        path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    lists = ("--memorized", tmp_path / "m.txt", "--clean", tmp_path / "c.txt", "--threads", 1)
    alone = memedge("calibrate", folder, *lists)
    assert "verdicts: cpu-fp32; --all-providers calibrates" in alone.stderr
    done = memedge("calibrate", folder, *lists, "--all-providers", "--json")
    assert [one["key"] for one in json.loads(done.stdout)] == ["openvino-fp32", "cpu-fp32"]
    assert set(read_manifest(folder).calibrations) == {"openvino-fp32", "cpu-fp32"}
    assert "--all-providers" not in done.stderr


@pytest.mark.usefixtures("here")
def test_all_providers_go_on_where_they_were_cut_off(folder):
    def interrupt(done: int, _total: int) -> None:
        if "openvino-fp32" in read_manifest(folder).calibrations and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_all(folder, *LISTS, threads=1, progress=interrupt)
    assert [one.key for one in calibrate_all(folder, *LISTS, threads=1, resume=True)] == ["cpu-fp32"]
    with pytest.raises(ProviderError, match=r"No provider can run .* here in fp16: see `memedge doctor`"):
        calibrate_all(folder, *LISTS, precision="fp16")


def test_history(folder):
    """Step by step back, to any by its date, and nothing is lost on the way."""
    made = []
    for rate in (0.01, 0.05, 0.1):
        made.append(calibrate(folder, *LISTS, rate, provider="cpu", threads=1).calibration)
    dated = [msgspec.structs.replace(one, date=f"2026-11-0{day}T00:00:00+00:00") for day, one in enumerate(made, 1)]
    (folder / FILE).write_bytes(msgspec.json.encode({"cpu-fp32": dated}))
    edit_manifest(folder, lambda m: m["calibrations"].update({"cpu-fp32": msgspec.to_builtins(dated[2])}))

    def now() -> float:
        return read_manifest(folder).calibrations["cpu-fp32"].target_fpr

    assert earlier(folder, read_manifest(folder), "cpu-fp32") == dated[:2]
    assert restore(folder) == ("cpu-fp32", dated[1])
    assert memedge("calibrate", folder, "--undo").stderr.endswith("2026-11-01T00:00:00+00:00 for cpu-fp32 again.\n")
    assert now() == 0.01
    fails(memedge("calibrate", folder, "--undo"), "keeps no calibration for cpu-fp32 before the one in force")
    done = memedge("calibrate", folder, "--restore", dated[2].date, "--provider", "cpu", "--json")
    assert json.loads(done.stdout)["target_fpr"] == now() == 0.1
    fails(memedge("calibrate", folder, "--restore", "1999"), f"of '1999': it has {dated[0].date}, ")
    shown = info._history(SimpleNamespace(path=folder, manifest=read_manifest(folder), key="cpu-fp32"))
    assert [words[:10] for _, words in shown] == ["2026-11-02", "2026-11-01"]


def test_the_first_calibration_makes_no_history(folder):
    first = calibrate(folder, *LISTS, provider="cpu", threads=1).calibration
    assert not (folder / FILE).exists()
    second = calibrate(folder, *LISTS, 0.05, provider="cpu", threads=1).calibration
    assert msgspec.json.decode((folder / FILE).read_bytes(), type=dict[str, list[type(first)]]) == {
        "cpu-fp32": [first, second]
    }
    assert restore(folder)[1] == first


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no history of calibrations: remove it"),
        (b"\xff\xfe", "is no history of calibrations"),
        (b"[" * 100_000, "is no history of calibrations"),
        (b'{"cpu-fp32": [1]}', "is no history of calibrations"),
        ({"threshold": 1.0, "target_fpr": 7.0}, "a false-positive rate outside"),
    ],
)
def test_a_history_that_nobody_wrote(folder, content, words):
    one = {"gamma_norm": 1.0, "gamma_alignment": 2.0, "threshold": 3.0, "alignment": "flat", "operands": "cond_delta"}
    edit_manifest(folder, lambda m: m["calibrations"].update({"cpu-fp32": one | PROVENANCE}))
    before = (folder / "manifest.json").read_bytes()
    if isinstance(content, dict):
        content = json.dumps({"cpu-fp32": [one | PROVENANCE | content]}).encode()
    (folder / FILE).write_bytes(content)
    with pytest.raises(ManifestError, match=words):
        restore(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_folder_that_is_read_only(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, _mode: path != folder)
    with pytest.raises(InputError, match="cannot be written to, and its manifest is where"):
        restore(folder)
