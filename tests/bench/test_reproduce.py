"""bench/reproduce.py end to end on small models, its figures on cases made by hand, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import edit_manifest
from sklearn.metrics import roc_auc_score, roc_curve

from memedge import Detector
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.manifest import read_manifest
from memedge.export.sources import presets

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def lists(tmp_path_factory) -> tuple[Path, Path]:
    """Six memorized and nine clean held-out captions."""
    rows = [row for row in captions() if row.split == "held-out"]
    folder = tmp_path_factory.mktemp("prompts")
    paths = folder / "memorized.txt", folder / "clean.csv"
    for path, label, count in zip(paths, (True, False), (6, 9), strict=True):
        prompts = [row.prompt for row in rows if row.memorized == label][:count]
        head = "prompt\n" if path.suffix == ".csv" else ""
        path.write_text(head + "".join(f"{prompt}\n" for prompt in prompts))
    return paths


def command(model, lists, output, *options) -> list[str]:
    files = ["--memorized", lists[0], "--clean", lists[1], "-o", output]
    return [str(part) for part in ("reproduce.py", "--model", model, *files, "--provider", "cpu", *options)]


@pytest.fixture
def run(lists, tmp_path, monkeypatch):
    """Run the script in this process; returns the report."""

    def call(model, *options, lists=lists, output=tmp_path / "out"):
        import reproduce

        monkeypatch.setattr(sys, "argv", command(model, lists, output, *options))
        reproduce.main()
        return json.loads(output.with_name(f"{output.name}.json").read_text())

    return call


@pytest.fixture
def refused(run, capsys):
    def call(words, *arguments, code=1, **options):
        with pytest.raises(SystemExit) as ended:
            run(*arguments, **options)
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (code, "")
        assert said.err.startswith("reproduce: ") and said.err.count("\n") == 1
        assert words in said.err

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_embedded_engine(run, tmp_path, capsys):
    """Its figures are those of Detector.score on the same prompts, by scikit-learn; nothing is published of it.

    Its calibration is for another cosine than the published one, so its weights are not shown.
    """
    report = run(EMBEDDED_ENGINE, "--draws", "1")
    prompts, labels = ([p[key] for p in report["prompts"]] for key in ("prompt", "memorized"))
    assert labels == [True] * 6 + [False] * 9
    scores = Detector.load(provider="cpu").score(prompts, alignment="channel", operands="uncond_delta")
    columns = [[p[key] for p in report["prompts"]] for key in ("norm", "alignment")]
    np.testing.assert_allclose(np.array(columns)[..., 0], [scores.norm, scores.alignment], rtol=1e-4, atol=1e-5)
    expected = {
        "norm": scores.norm,
        "alignment": scores.alignment,
        "1 · norm + 1 · alignment (γ not fitted)": scores.norm + scores.alignment,
    }
    assert [line["statistic"]["name"] for line in report["lines"]] == list(expected)
    for line, values in zip(report["lines"], expected.values(), strict=True):
        found = line["figures"]["auc"]
        assert found["value"] == pytest.approx(roc_auc_score(labels, values))
        assert found["low"] <= found["value"] <= found["high"]
        assert line["published"] is found["published"] is found["inside"] is None
        rows = 1 if "norm" not in line["statistic"]["name"] or line["statistic"]["name"] == "norm" else 2
        assert line["seconds_per_10"] == pytest.approx(10 * rows * report["seconds_per_row"])
    assert (report["memorized_prompts"], report["clean_prompts"], report["family"]) == (6, 9, None)
    assert (report["provider"], report["precision"], report["seed"]) == ("cpu", "fp32", 42)
    assert report["peak_memory_bytes"] > 10e6 and report["not_measured"] == []
    said = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == said.rstrip("\n") + "\n"
    assert said.count("none published") == 3 * 3
    assert names(tmp_path) == ["out.json", "out.md"]


@pytest.mark.slow
def test_checkpoint_with_fewer_draws(run, checkpoint, engine, tmp_path):
    """Exported with the most draws; every n gives what an engine with n draws gives."""
    kept = tmp_path / "engine"
    report = run(checkpoint, "--draws", "4", "1", "--engine-out", kept, "--limit", "4")
    prompts = [p["prompt"] for p in report["prompts"]]
    assert len(prompts) == 8 and read_manifest(kept).draws == 4
    assert [(line["draws"], line["statistic"]["kind"]) for line in report["lines"]] == [
        (n, kind) for n in (1, 4) for kind in ("norm", "alignment", "score")
    ]
    norm, alignment = (np.array([p[key] for p in report["prompts"]]) for key in ("norm", "alignment"))
    assert norm.shape == alignment.shape == (8, 4)
    for n, path in ((1, engine), (4, kept)):
        scores = Detector.load(path, provider="cpu").score(prompts)
        np.testing.assert_allclose(norm[:, :n].mean(axis=1), scores.norm, rtol=1e-4)
        np.testing.assert_allclose(alignment[:, :n].mean(axis=1), scores.alignment, atol=1e-5)
        (line,) = (x for x in report["lines"] if (x["draws"], x["statistic"]["kind"]) == (n, "score"))
        auc = roc_auc_score([p["memorized"] for p in report["prompts"]], scores.norm + scores.alignment)
        assert line["figures"]["auc"]["value"] == pytest.approx(auc)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 96, 96), (4, 32, 32), (4, 8, 8)])
def test_first_draws_are_those_of_fewer(shape):
    """What export draws with n is the beginning of what it draws with more."""

    def draw(n):
        return torch.randn((n, *shape), generator=torch.Generator().manual_seed(42))

    for n in (1, 3, 4):
        assert torch.equal(draw(16)[:n], draw(n))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import reproduce
from memedge.engine import engine
engine.VALUES_PER_CALL = 1 << 14
real, calls = reproduce._measure, 0
def measure(*arguments):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
reproduce._measure = measure
reproduce.main()
"""


def test_goes_on_after_a_kill(run, lists, tmp_path, monkeypatch):
    """The killed run leaves one batch of two, which is not measured again; the results are those of a whole run."""
    monkeypatch.setattr("memedge.engine.engine.VALUES_PER_CALL", 1 << 14)  # two batches
    whole = run(EMBEDDED_ENGINE, "--draws", "1", output=tmp_path / "whole")
    line = command(EMBEDDED_ENGINE, lists, tmp_path / "out", "--draws", "1")[1:]
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, BENCH, *line], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    journal = tmp_path / "out.partial.jsonl"
    (first,) = (json.loads(line)["prompts"] for line in journal.read_text().splitlines()[2:])
    with journal.open("ab") as file:
        file.write(b'{"prompts": ["cut o')

    import reproduce

    measured, real = [first], reproduce._measure
    monkeypatch.setattr(reproduce, "_measure", lambda engine, some: measured.append(some) or real(engine, some))
    resumed = run(EMBEDDED_ENGINE, "--draws", "1")
    assert [prompt for some in measured for prompt in some] == [p["prompt"] for p in whole["prompts"]]
    for report in (whole, resumed):
        del report["seconds_per_row"], report["peak_memory_bytes"]
        for line in report["lines"]:
            del line["seconds_per_10"]
    assert resumed == whole
    assert names(tmp_path) == ["out.json", "out.md", "whole.json", "whole.md"]


def test_temporary_engine_outlives_an_interruption(run, checkpoint, engine, tmp_path, monkeypatch, capsys):
    """Exported once, found again, and gone when all is done."""
    import reproduce

    exports = []

    def export(command):
        exports.append(command[command.index("-o") - 1 :])
        shutil.copytree(engine, command[command.index("-o") + 1])
        return subprocess.CompletedProcess(command, 0)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.subprocess, "run", export)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(reproduce, "_measure", interrupt)
        run(checkpoint, "--draws", "1")
    assert ended.value.code == 130
    assert "goes on from here" in capsys.readouterr().err
    temporary = tmp_path / "out.partial-engine"
    assert names(tmp_path) == [temporary.name, "out.partial.jsonl"]
    run(checkpoint, "--draws", "1")
    assert exports == [[str(checkpoint), "-o", temporary, "--draws", "1", "--precision", "fp32"]]
    assert names(tmp_path) == ["out.json", "out.md"]


def test_published_figures_stand_beside(run, tmp_path):
    """As if the embedded model were Stable Diffusion 1.4: weights (1, 2), and docs/methods.md's figures for n = 1."""
    engine = shutil.copytree(EMBEDDED_ENGINE, tmp_path.parent / f"{tmp_path.name}-engine")
    preset = {"family": "Stable Diffusion 1.x", "gamma_norm": 1, "gamma_alignment": 2}
    edit_manifest(engine, lambda manifest: manifest.update(preset=preset))
    of_this_pair = {"operands": "uncond_delta", "gamma_alignment": -6.0}
    edit_manifest(engine, lambda manifest: manifest["calibrations"]["cpu-fp32"].update(of_this_pair))
    report = run(engine, "--draws", "1")
    lines = {line["statistic"]["name"]: line for line in report["lines"]}
    assert list(lines)[:3] == ["norm", "alignment", "1 · norm + 2 · alignment (γ published)"]
    prompts = report["prompts"]
    values = [prompt["norm"][0] - 6 * prompt["alignment"][0] for prompt in prompts]
    auc = roc_auc_score([prompt["memorized"] for prompt in prompts], values)
    calibrated = lines["1 · norm − 6 · alignment (γ calibrated)"]["figures"]["auc"]["value"]
    assert calibrated == pytest.approx(auc)
    found = [
        (line["figures"]["auc"]["published"], line["figures"]["tpr_1_strict"]["published"]) for line in lines.values()
    ]
    assert found == [(0.976, 0.896), (0.923, 0.424), (0.994, 0.935), (None, None)]
    *measured, calibrated = (line["figures"] for line in lines.values())
    for f in (figures[name] for figures in measured for name in ("auc", "tpr_1_strict", "tpr_1_nearest")):
        assert f["inside"] == (round(f["low"], 3) <= f["published"] <= round(f["high"], 3))
    others = [figures[name] for figures in measured for name in ("tpr_3_strict", "tpr_3_nearest")]
    assert all(f["published"] is f["inside"] is None for f in [*others, *calibrated.values()])
    assert [p["method"].split()[0] for p in report["not_measured"]] == ["Ren", "Jeon"]
    text = (tmp_path / "out.md").read_text()
    assert "| Jeon et al. (Hessian-vector) | 0.987 | 0.908 | 5.40 |" in text
    assert "of Stable Diffusion 1.4 (family: Stable Diffusion 1.x)" in text


@pytest.mark.parametrize(("published", "inside"), [(0.894, False), (0.895, True), (0.977, True), (0.978, False)])
def test_inside_is_what_three_digits_show(published, inside):
    from comparison import Figure

    assert Figure.of(0.9, 0.8954, 0.9766, published).inside is inside


def test_every_preset_has_its_figures():
    from published import FAMILIES

    assert FAMILIES.keys() == {published.preset.family for published in presets.OF_STABLE_DIFFUSION}


def test_metrics_by_hand():
    from memedge.metrics import auc, interval, tpr

    high, low, same = np.array([3.0, 4.0]), np.array([1.0, 2.0, 2.0]), np.ones(3)
    for statistic in (auc, lambda p, n, axis=-1: tpr(p, n, 1, axis=axis)):
        assert (statistic(high, low), statistic(low, high)) == (1, 0)
        assert [float(end) for end in interval(statistic, high, low)] == [1, 1]
    assert auc(same, same) == 0.5
    assert tpr(same, same, 1) == tpr(same, same, 1, "nearest") == 0
    # 1 % of 160 negatives are 1.6: at most one may pass, but two are nearer.
    positive, negative = np.array([159.5, 158.5, 0.0]), np.arange(1.0, 161)
    assert tpr(positive, negative, 1) == pytest.approx(1 / 3)
    assert tpr(positive, negative, 1, "nearest") == pytest.approx(2 / 3)
    positive, negative = np.array([149.5, 148.5, 0.0]), np.arange(1.0, 151)
    assert tpr(positive, negative, 1, "nearest") == pytest.approx(1 / 3)  # of 1.5: one, not two


@pytest.mark.parametrize("percent", [1, 3])
def test_metrics_are_scikit_learns(percent):
    """Of many samples with ties at once, each by roc_curve's points."""
    from memedge.metrics import auc, tpr

    generator = np.random.default_rng(percent)
    positive, negative = generator.normal(1, 1, (50, 30)).round(1), generator.normal(0, 1, (50, 130)).round(1)
    labels = np.r_[np.ones(30), np.zeros(130)]
    found = [
        f(positive, negative)
        for f in (auc, lambda p, n: tpr(p, n, percent), lambda p, n: tpr(p, n, percent, "nearest"))
    ]
    for row, values in enumerate(np.concatenate([positive, negative], axis=1)):
        x, y, _ = roc_curve(labels, values, drop_intermediate=False)
        away = np.abs(100 * np.round(x * 130) - percent * 130)
        nearest = x == x[away == away.min()].min()
        expected = roc_auc_score(labels, values), y[x <= percent / 100].max(), y[nearest].max()
        np.testing.assert_allclose([column[row] for column in found], expected)


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def test_bad_lists(refused, engine, tmp_path):
    a, b = write(tmp_path / "a.txt", "x", "y", "z"), write(tmp_path / "b.txt", "z", "y", "w")
    one, none = write(tmp_path / "one.txt", "x"), write(tmp_path / "none.txt")
    before = names(tmp_path)
    refused("does not exist", engine, lists=(tmp_path / "absent.txt", b))
    refused("holds no prompts", engine, lists=(a, none))
    refused("have prompts in common (2), such as 'y'", engine, lists=(a, b))
    refused("gives 1 prompt", engine, lists=(a, one))
    refused("--limit 1", engine, "--limit", "1")
    assert names(tmp_path) == before


def test_bad_draws_and_places(refused, engine, tmp_path):
    refused("--draws 0", engine, "--draws", "1", "0")
    refused("n = 1 at most, not 16", engine)
    refused("The folder of", engine, "--draws", "1", output=tmp_path / "absent" / "out")
    assert names(tmp_path) == []


@pytest.mark.slow
def test_export_says_what_is_wrong_itself(run, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "absent", "--draws", "1")
    assert ended.value.code == 1
    assert [line.split()[0] for line in capfd.readouterr().err.splitlines()] == ["memedge:"]
    assert names(tmp_path) == []


def test_engines_are_not_overwritten(refused, checkpoint, tmp_path):
    (tmp_path / "there").mkdir()
    refused("is there already", checkpoint, "--draws", "1", "--engine-out", tmp_path / "there")
    assert names(tmp_path) == ["there"]


def test_journals_of_other_runs(refused, engine, tmp_path):
    journal = tmp_path / "out.partial.jsonl"
    for words, content in (
        ("another model", b'{"model": "other"}\n'),
        ("another engine", f'{{"model": "{engine}"}}\n{{"engine": "other"}}\n'.encode()),
        ("damaged", b"{}\n"),
        ("damaged", b"not JSON\n"),
        ("damaged", b""),
        ("damaged", f'{{"model": "{engine}"}}\n{{"engine": "e"}}\n{{"prompts": 1}}\n'.encode()),
    ):
        journal.write_bytes(content)
        refused(words, engine, "--draws", "1")
        assert journal.read_bytes() == content
