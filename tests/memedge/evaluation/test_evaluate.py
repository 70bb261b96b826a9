"""`memedge evaluate`: its figures against their definitions, what it refuses, and runs that were cut off."""

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import fails, memedge, memedge_process
from engines import edit_manifest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from memedge.commands.evaluate import print_evaluation
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.errors import InputError, NotFiniteError
from memedge.engine.manifest import read_manifest
from memedge.evaluation import evaluate as module
from memedge.evaluation.figures import Measured, Rule, find

RULE = Rule(source="calibrated", threshold=0.5)
ALIGNMENT = "alignment-cond-uncond"  # of the embedded engine's calibration


def held_out(memorized: bool, count: int) -> list[str]:
    rows = [row for row in captions() if row.split == "held-out"]
    return [row.prompt for row in rows if row.memorized == memorized][:count]


def write(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    return write(folder / "memorized.txt", held_out(True, 8)), write(folder / "clean.txt", held_out(False, 24))


@pytest.fixture
def run(lists):
    """Evaluate the embedded engine on a few captions."""
    return partial(module.evaluate, EMBEDDED_ENGINE, *lists, provider="cpu")


@pytest.fixture(scope="module")
def report(lists, tmp_path_factory):
    """An evaluation with one and three draws, and its folder."""
    output = tmp_path_factory.mktemp("evaluated") / "report"
    steps = []
    found = module.evaluate(
        EMBEDDED_ENGINE, *lists, output, draws=[3, 1], provider="cpu", progress=lambda *step: steps.append(step)
    )
    assert steps[0] == (0, 2 * 3 * 32)
    assert steps[-1] == (2 * 3 * 32, 2 * 3 * 32)
    return found, output


def labels(evaluation) -> np.ndarray:
    return np.array([one.memorized for one in evaluation.prompts])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_scores_are_the_products(report, detector):
    """With the engine's own draw, the anisotropy is the score that `Detector` gives, and its parts are, too."""
    evaluation, _ = report
    scores = detector.score([one.prompt for one in evaluation.prompts])
    for name, values in (("anisotropy", scores.score), ("norm", scores.norm), (ALIGNMENT, scores.alignment)):
        np.testing.assert_allclose([one.score(name, 1) for one in evaluation.prompts], values, rtol=1e-3, atol=1e-4)
    verdicts = evaluation.findings.verdicts
    assert verdicts.threshold == scores.threshold
    assert (verdicts.found, verdicts.false_alarms) == (scores.memorized[:8].sum(), scores.memorized[8:].sum())


def test_the_anisotropy_is_the_detectors_own(report):
    """It is made of its terms, which are measured once; the detector of that name gives the same."""
    from memedge.detectors import make
    from memedge.engine.engine import Engine

    evaluation, _ = report
    prompts = [one.prompt for one in evaluation.prompts][:4]
    engine = Engine.open(EMBEDDED_ENGINE, "cpu", None, None)
    found = [one.scores["anisotropy"] for one in evaluation.prompts[:4]]
    np.testing.assert_allclose(found, make("anisotropy", engine, 3)(prompts), rtol=1e-3, atol=1e-4)


def test_the_screen_is_counted(lists, tmp_path, detector, capsys):
    """By its verdicts one by one. Only on the engine's own noise, on which it was calibrated."""
    evaluation = module.evaluate(EMBEDDED_ENGINE, *lists, tmp_path / "own", provider="cpu")
    found, screen = evaluation.screen, detector.info.calibration.screen
    prompts = {path: path.read_text().splitlines() for path in lists}
    passed = {path: [one.norm is None for one in detector.detect(prompts[path], "screen")] for path in lists}
    assert (found.decided_prompts, found.clean) == (sum(passed[lists[1]]), 24)
    called = detector.score(prompts[lists[0]]).memorized
    assert (found.missed_prompts, found.found) == (int((called & passed[lists[0]]).sum()), int(called.sum()))
    assert found.alpha == screen.alpha
    assert found.passes == pytest.approx(detector.info.manifest.tap_share(screen.tap))
    assert found.decided.low < found.decided.value < found.decided.high or found.decided.value in (0, 1)
    print_evaluation(evaluation, tmp_path, False)
    said = f"With early='screen' {found.decided_prompts} of 24 clean prompts"
    assert said in " ".join(capsys.readouterr().err.split())
    assert said.partition(" clean")[0] in (tmp_path / "own" / "report.html").read_text()
    assert module.evaluate(EMBEDDED_ENGINE, *lists, tmp_path / "other", provider="cpu", seed=1).screen is None


def test_figures_are_of_means_over_the_first_draws(report):
    evaluation, _ = report
    assert [(line.detector, line.draws) for line in evaluation.findings.lines] == [
        (name, n) for n in (1, 3) for name in ("anisotropy", "norm", ALIGNMENT)
    ]
    for line in evaluation.findings.lines:
        sign = evaluation.sign(line.detector)
        score = [sign * np.mean(one.scores[line.detector][: line.draws]) for one in evaluation.prompts]
        assert line.auc.value == pytest.approx(roc_auc_score(labels(evaluation), score))
        assert line.auc.low <= line.auc.value <= line.auc.high
        assert line.tpr_1.low <= line.tpr_1.value <= line.tpr_1.high
        assert line.passes == line.draws * (2 if line.detector == "anisotropy" else 1)
        assert line.seconds > 0
    assert evaluation.findings.draws == 1  # the engine's own


def test_folder(report, lists):
    evaluation, output = report
    assert names(output.parent) == ["report"]
    assert names(output) == ["prompts.csv", "report.html", "report.json"]
    assert output.stat().st_mode & 0o777 == 0o755
    data = json.loads((output / "report.json").read_text())
    assert (
        data["run"]["checkpoint_sha256"]
        == json.loads((EMBEDDED_ENGINE / "manifest.json").read_text())["source"]["sha256"]
    )
    assert [len(one["scores"]["norm"]) for one in data["prompts"]] == [3] * 32
    assert (data["memorized"]["name"], data["clean"]["evaluated"]) == (lists[0].name, 24)
    with (output / "prompts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"prompt", "label", "truncated", "anisotropy", "norm", ALIGNMENT}
    for row, one in zip(rows, evaluation.prompts, strict=True):
        assert (row["prompt"], row["label"] == "memorized") == (one.prompt, one.memorized)
        assert float(row["anisotropy"]) == one.score("anisotropy", 1)
        # Whatever the sign of its γ, the cosine is shown as measured.
        assert float(row[ALIGNMENT]) == one.score(ALIGNMENT, 1)
    gamma = read_manifest(EMBEDDED_ENGINE).calibrations["cpu-fp32"].gamma_alignment
    assert evaluation.lower == ((ALIGNMENT,) if gamma < 0 else ())
    assert "<html" in (output / "report.html").read_text()[:100]


def test_cautions_of_few_clean_prompts(report):
    evaluation, _ = report
    assert any("FPR of at most 1 % means no false positive at all" in one for one in evaluation.cautions)
    assert any("at most 3 %" in one for one in evaluation.cautions)


@pytest.fixture
def measured():
    """Two noisy detectors over five draws, and the first once more."""
    generator = np.random.default_rng(2)
    label = np.arange(150) < 30
    values = [label[:, None] + generator.normal(size=(150, 1)) + generator.normal(0, 0.7, (150, 5)) for _ in range(2)]
    values.append(values[0])
    made = [Measured(n, "", 1.0, v, 0.1) for n, v in zip(("anisotropy", "norm", "again"), values, strict=True)]
    return made, label


def test_intervals_are_those_of_joint_resamples(measured):
    """A second, plain bootstrap of prompts: of a figure, and of the difference of two detectors' figures."""
    made, label = measured
    found = find(made, label, [2], 2, RULE)
    generator = np.random.default_rng(99)
    wins = [np.greater.outer(one.score(2)[label], one.score(2)[~label]) for one in made[:2]]
    resamples = [np.ix_(generator.choice(30, 30), generator.choice(120, 120)) for _ in range(2000)]
    first, second = ([pairs[some].mean() for some in resamples] for pairs in wins)
    for figure, values in ((found.lines[0].auc, first), (found.differences[0].auc, np.subtract(second, first))):
        np.testing.assert_allclose((figure.low, figure.high), np.quantile(values, [0.025, 0.975]), atol=0.015)


def test_the_same_detector_does_not_differ(measured):
    found = find(*measured, [1, 5], 5, RULE).differences[-1]
    assert (found.detector, found.against, found.draws, found.p) == ("again", "anisotropy", 5, None)
    for figure in (found.auc, found.tpr_1):
        assert (figure.value, figure.low, figure.high) == (0, 0, 0)


def test_rocs_meet_the_figures(measured):
    """At 1 % and 3 % a curve and its band have the strict TPR and its interval; at the end everything is found."""
    found = find(*measured, [1], 1, RULE)
    for curve, line in zip(found.rocs, found.lines, strict=True):
        for fpr, figure in ((1 / 120, line.tpr_1), (3 / 120, line.tpr_3)):
            at = curve.fpr.index(fpr)
            assert (curve.tpr[at], curve.low[at], curve.high[at]) == (figure.value, figure.low, figure.high)
        assert curve.fpr == sorted(set(curve.fpr))
        assert (curve.fpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 1, 1)


def test_stability_is_its_definition(measured):
    made, label = measured
    found = find(made, label, [1], 1, RULE).stability[0]
    values = made[0].values
    pairs = [spearmanr(values[:, i], values[:, j]).statistic for i in range(5) for j in range(i)]
    assert found.spearman == pytest.approx(np.mean(pairs))
    within = np.sqrt(np.mean([np.std(row, ddof=1) ** 2 for row in values]))
    assert found.spread == pytest.approx(within / np.std([row.mean() for row in values], ddof=1))
    flips = [(value >= 0.5) != (row.mean() >= 0.5) for row in values for value in row]
    assert found.flips == pytest.approx(np.mean(flips))
    assert find(made, label, [1], 1, RULE).stability[1].flips is None


def test_a_run_that_was_cut_off_goes_on(run, tmp_path, monkeypatch):
    """Interrupted in the middle: the journal alone is there; --resume computes the rest, and figures are equal."""
    whole = run(tmp_path / "whole")
    calls, make = [], module.make

    class Counted:
        def __init__(self, inner, most):
            self.inner, self.most = inner, most
            self.name, self.formula, self.passes = inner.name, inner.formula, inner.passes
            self.sign = getattr(inner, "sign", 1)

        def __call__(self, prompts):
            if len(calls) == self.most:
                raise KeyboardInterrupt
            calls.append((self.name, tuple(prompts)))
            return self.inner(prompts)

    output = tmp_path / "report"
    monkeypatch.setattr(module, "make", lambda *a, **k: Counted(make(*a, **k), 1))
    with pytest.raises(KeyboardInterrupt):
        run(output)
    assert names(tmp_path) == ["report.partial", "whole"]
    with pytest.raises(InputError, match="go on from it with --resume"):
        run(output)
    with pytest.raises(InputError, match="another seed: run that job again with --resume"):
        run(output, seed=5, resume=True)
    assert len(calls) == 1
    monkeypatch.setattr(module, "make", lambda *a, **k: Counted(make(*a, **k), None))
    resumed = run(output, resume=True)
    assert names(tmp_path) == ["report", "whole"]
    assert len(calls) == len(set(calls)) == 2  # terms; all 32 prompts are one call
    assert resumed.prompts == whole.prompts
    assert resumed.findings.rocs == whole.findings.rocs
    assert resumed.findings.differences == whole.findings.differences


def test_nothing_is_left_of_a_run_that_fails_at_once(run, tmp_path, monkeypatch):
    def broken(_):
        raise NotFiniteError("the model is broken")

    class Broken:
        name, formula, passes = "norm", "", 1.0
        __call__ = staticmethod(broken)

    monkeypatch.setattr(module, "make", lambda *_, **__: Broken())
    with pytest.raises(NotFiniteError):
        run(tmp_path / "report")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_leaves_the_journal(run, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    page = module.page
    monkeypatch.setattr(module, "page", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "report", detectors=["norm"])
    assert names(tmp_path) == ["report.partial"]
    monkeypatch.setattr(module, "page", page)
    run(tmp_path / "report", detectors=["norm"], resume=True)
    assert names(tmp_path) == ["report"]


def test_prompts_in_both_lists_are_left_out(tmp_path):
    memorized = write(tmp_path / "m.txt", [*held_out(True, 6), "a star", "a star"])
    clean = write(tmp_path / "c.txt", [*held_out(False, 9), "a star"])
    found = module.evaluate(EMBEDDED_ENGINE, memorized, clean, tmp_path / "report", detectors=["norm"], provider="cpu")
    assert (found.memorized.prompts, found.memorized.evaluated, found.clean.evaluated) == (8, 6, 9)
    assert "a star" not in [one.prompt for one in found.prompts]
    assert any("Prompts in both lists: 1," in one for one in found.cautions)


def test_evaluating_on_what_was_calibrated_on_is_said(lists, tmp_path):
    engine = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")
    digest = module.Prompts.read(lists[1]).sha256

    def change(manifest):
        manifest["calibrations"]["cpu-fp32"]["clean"]["sha256"] = digest

    evaluate = partial(module.evaluate, engine, *lists, provider="cpu")
    assert not any("calibrated on" in one for one in evaluate(tmp_path / "one").cautions)
    edit_manifest(engine, change)
    cautions = evaluate(tmp_path / "two").cautions
    assert any("calibrated on clean.txt" in one and "report on another" in one for one in cautions)


def test_without_a_calibration(lists, tmp_path):
    """No verdicts, γ = (1, 1), and both are said."""
    engine = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")
    edit_manifest(engine, lambda manifest: manifest["calibrations"].clear())
    found = module.evaluate(engine, *lists, tmp_path / "report", provider="cpu")
    assert found.findings.verdicts is None
    assert found.rule.source == "not fitted"
    assert any("not calibrated for cpu-fp32" in one for one in found.cautions)
    for one in found.prompts:
        assert one.scores["anisotropy"][0] == pytest.approx(one.scores["norm"][0] + one.scores["alignment"][0])


def test_command_line(lists, tmp_path):
    options = ["--memorized", lists[0], "--clean", lists[1], "--provider", "cpu", "--detector", "norm"]
    done = memedge("evaluate", EMBEDDED_ENGINE, *options, "-o", tmp_path / "report", "--json")
    assert done.returncode == 0, done.stderr
    printed, written = json.loads(done.stdout), json.loads((tmp_path / "report" / "report.json").read_text())
    assert written.pop("prompts")
    assert printed == written
    assert str(tmp_path / "report" / "report.html") in done.stderr
    assert "Warning: With 24 clean prompts" in done.stderr
    assert printed["run"]["command"].startswith(f"memedge evaluate {EMBEDDED_ENGINE} --memorized")


def test_labels_of_an_audit(lists, tmp_path):
    """Captions are memorized whose pictures were printed; an audit of other weights is refused, and so are both."""
    memorized, clean = (path.read_text().splitlines() for path in lists)
    audit = {
        "checkpoint": "emoji",
        "checkpoint_sha256": read_manifest(EMBEDDED_ENGINE).source.sha256,
        "similarity": "outlines",
        "settings": {"steps": 20},
        "images": [{"caption": text, "by_audit": text in memorized, "image": text} for text in (*memorized, *clean)],
    }
    (tmp_path / "audit").mkdir()
    report = tmp_path / "audit" / "report.json"
    report.write_text(json.dumps(audit))
    options = ["--audit", tmp_path / "audit", "--provider", "cpu", "--detector", "norm", "--json"]
    done = memedge("evaluate", *options, "-o", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "Labels are of an audit: printed within 20 steps, by outlines" in done.stderr
    memedge("evaluate", "--memorized", lists[0], "--clean", lists[1], *options[2:], "-o", tmp_path / "expected")
    told, expected = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("report", "expected"))
    assert told["prompts"] == expected["prompts"]
    assert told["findings"]["lines"][0]["auc"] == expected["findings"]["lines"][0]["auc"]
    for change, words in (
        ({"checkpoint_sha256": "0"}, "is an audit of other weights"),
        ({"images": audit["images"][:8]}, "8 captions whose pictures are printed and 0 others"),
        ({"images": 1}, "is no audit's report"),
    ):
        report.write_text(json.dumps(audit | change))
        fails(memedge("evaluate", *options, "-o", tmp_path / "other"), words)
    fails(memedge("evaluate", "--audit", tmp_path, "-o", tmp_path / "other"), "name a folder that `memedge audit` made")
    fails(memedge("evaluate", *options, "--clean", lists[1], "-o", tmp_path / "other"), "and not both")
    fails(memedge("evaluate", "-o", tmp_path / "other"), "Labels are needed")
    assert names(tmp_path) == ["audit", "expected", "report"]


def test_table(report, capsys):
    evaluation, output = report
    print_evaluation(evaluation, output, json=False)
    printed = capsys.readouterr()
    for line in evaluation.findings.lines:
        assert f"{line.auc.value:.3f}" in printed.out
        assert f"[{line.tpr_1.low:.3f}, {line.tpr_1.high:.3f}]" in printed.out
    assert all(f"Warning: {one}" in printed.err for one in evaluation.cautions)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("There is no detector 'magic': use", {"--detector": "magic"}),
        ("--draws 0 is no list of whole numbers", {"--draws": "0"}),
        ("The folder of", {"-o": "absent/report"}),
        ("is there already: remove it", {"-o": "full"}),
        ("holds the results of an unfinished job", {"-o": "started"}),
        ("leaves 2 memorized prompts, and at least 5", {"--memorized": "few.txt"}),
        ("does not exist", {"--clean": "absent.txt"}),
        ("is not a directory", {"--engine": "absent"}),
        ("give --checkpoint", {"--detector": "sharpness-exact"}),
    ],
)
def test_refusals(lists, tmp_path, words, options):
    """One sentence, exit code 1, and nothing is there that was not before."""
    write(tmp_path / "few.txt", ["one", "two"])
    write(tmp_path / "started.partial", [])
    (tmp_path / "full" / "inside").mkdir(parents=True)
    before = names(tmp_path)
    given = {"--memorized": lists[0], "--clean": lists[1], "-o": "report", "--provider": "cpu"} | options
    fails(memedge("evaluate", *(word for pair in given.items() for word in pair), cwd=tmp_path), words)
    assert names(tmp_path) == before


@pytest.mark.parametrize("missing", ["plotly", "scipy"])
def test_what_is_missing_is_named(lists, tmp_path, missing):
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text(f"raise ModuleNotFoundError('no {missing}', name={missing!r})")
    options = ["--memorized", lists[0], "--clean", lists[1], "-o", tmp_path / "report"]
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = memedge_process("evaluate", *options, PYTHONPATH=path)
    fails(done, f"Evaluating needs {missing!r}, which is not installed: run `python -m pip install 'memedge[eval]'`.")
    assert names(tmp_path) == [missing]
