"""`memedge calibrate`: prompts whose answer is known in, verdicts out; nothing written where something is wrong."""

import hashlib
import json
import os
import shutil
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from engines import PROVENANCE, edit_manifest

from memedge import Detector, InputError, MemedgeError, cli
from memedge.calibration.calibrate import calibrate
from memedge.decision.rule import NO_SCREEN_PLANS
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.engine import Engine
from memedge.engine.errors import ManifestError
from memedge.engine.manifest import Calibration, read_manifest
from memedge.engine.ort import OrtBackend
from memedge.prompts.labelled import Prompts, select

MEMORIZED = [f"memorized number {i}" for i in range(24)]
CLEAN = [f"clean number {i}" for i in range(100)]
OTHER = {"gamma_norm": 1.0, "gamma_alignment": 2.0, "threshold": 3.0, "alignment": "flat", "operands": "cond_delta"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the embedded engine, calibrated for something else only."""
    copy = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    edit_manifest(copy, lambda m: m.update(calibrations={"cuda-fp32": OTHER | PROVENANCE}))
    return copy


@pytest.fixture
def lists(tmp_path) -> tuple[Path, Path]:
    paths = tmp_path / "memorized.txt", tmp_path / "clean.csv"
    paths[0].write_text("".join(f"{p}\n" for p in MEMORIZED))
    paths[1].write_text("prompt\n" + "".join(f'"{p}"\n' for p in CLEAN))
    return paths


@pytest.fixture
def scored(monkeypatch) -> SimpleNamespace:
    """Statistics of these prompts made up by what they say, in `table`; `done` is what has been scored.

    Norm, the alignment of Δ and ε_0, which says nothing, and that of ε_c and ε_0, lower for memorized prompts.
    """
    done: list[str] = []
    generator = np.random.default_rng(0)
    tokenize = Engine.open(EMBEDDED_ENGINE, "cpu", None, None).tokenize
    texts = {ids.tobytes(): text for text in MEMORIZED + CLEAN for ids in tokenize([text])[0]}

    def made_up(prompt):
        high = prompt in MEMORIZED
        return (
            generator.normal(3 if high else 1, 0.7),
            generator.normal(0, 0.1),
            np.clip(generator.normal(-0.6 * high, 0.25), -1, 1),
        )

    table = {prompt: made_up(prompt) for prompt in texts.values()}

    def look_up(states, place):
        return np.array([table[texts[row.tobytes()]][place] for row in states.ids])

    def norm(_engine, states):
        done.extend(texts[row.tobytes()] for row in states.ids)
        return look_up(states, 0)

    def alignments(_engine, states, _prompts, _draw, alignment, operands):
        assert alignment == "channel"
        return look_up(states, 1 + ("uncond_delta", "cond_uncond").index(operands))

    def encode(_engine, ids):
        return SimpleNamespace(ids=ids, all=np.arange(len(ids)))

    def statistics(engine, states, *which):
        return norm(engine, states), alignments(engine, states, states.all, 0, *which)

    def changes(engine, states, tap):
        score = look_up(states, 0) - look_up(states, 2)
        channels = engine.directory.manifest.taps[tap - 1].channels
        return np.exp(score[:, None] + 0.5 * np.sin(1e4 * score[:, None] * np.arange(1, channels + 1)))  # as by chance

    for function in (encode, norm, alignments, statistics, changes):
        monkeypatch.setattr(Engine, function.__name__, function)
    return SimpleNamespace(done=done, table=table)


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["memedge", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return (end.value.code or 0, *capsys.readouterr())


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_engine_learns_to_judge(folder, lists, monkeypatch, capsys):
    """With real statistics: few prompts, which the embedded model tells apart, and nothing else is touched."""
    prompts = {True: [], False: []}
    for caption in captions():
        if caption.split == "calibration" and caption.group in ("memorized", "seen"):
            prompts[caption.memorized].append(caption.prompt)
    lists[0].write_text("".join(f"{p}\n" for p in prompts[True][:20]))
    lists[1].write_text("prompt\n" + "".join(f'"{p}"\n' for p in prompts[False][:30]))
    before, old = state(folder), Detector.load(folder, "cpu")
    assert old.detect(["a star"])[0].memorized is None
    given = ("--memorized", lists[0], "--clean", lists[1], "--provider", "cpu", "--target-fpr", 0.05)
    code, out, err = command(monkeypatch, capsys, "calibrate", folder, *given, "--json")
    assert code == 0, err
    done = json.loads(out)
    assert (done["key"], done["engine"], done["warnings"]) == ("cpu-fp32", str(folder), [])

    new = Detector.load(folder, "cpu")
    assert new.info.fingerprint != old.info.fingerprint
    assert {k: v for k, v in state(folder).items() if k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    calibration = new.info.calibration
    assert calibration == msgspec.convert(done["calibration"], Calibration)
    assert set(new.info.manifest.calibrations) == {"cpu-fp32", "cuda-fp32"}
    scores = new.score(prompts[False][:30])
    np.testing.assert_allclose(scores.score, scores.norm + calibration.gamma_alignment * scores.alignment)
    assert scores.memorized.sum() <= 0.05 * 30
    assert new.score(prompts[True][:20]).memorized.mean() > 0.5
    assert Detector.load(folder).info.key == "cpu-fp32"

    code, out, _ = command(monkeypatch, capsys, "info", folder)
    assert code == 0
    said = " ".join(out.split())
    for words in ("20 memorized prompts (memorized.txt", "30 clean prompts (clean.csv", "AUC", "rate of 0.05"):
        assert words in said


def test_provenance(folder, lists, scored):
    done = calibrate(folder, *lists, provider="cpu")
    found = read_manifest(folder).calibrations["cpu-fp32"]
    assert done.calibration == found
    for kept, path, count in zip((found.memorized, found.clean), lists, (24, 100), strict=True):
        assert kept.name == path.name
        assert kept.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert kept.prompts == count
    assert abs(datetime.fromisoformat(found.date) - datetime.now(UTC)) < timedelta(minutes=5)
    assert found.fitted_by.startswith("memedge ")
    assert found.target_fpr == 0.01
    assert 0.9 < found.cross_validation.auc.value <= 1
    assert (found.alignment, found.operands) == ("channel", "cond_uncond") and found.gain.pays  # what tells most
    assert (found.conformal.prompts, found.conformal.delta) == (124, pytest.approx(1 / 125))
    assert sorted(scored.done) == sorted(MEMORIZED + CLEAN)
    # From Python, prompts themselves: the same fit, and the .txt file's hash.
    again = calibrate(folder, MEMORIZED, iter(CLEAN), provider="cpu").calibration
    assert again.memorized.sha256 == found.memorized.sha256
    assert (again.gamma_alignment, again.threshold) == (found.gamma_alignment, found.threshold)
    assert found.clean_score == pytest.approx(np.median(Detector.load(folder, "cpu").score(CLEAN).score), rel=1e-4)


@pytest.mark.usefixtures("scored")
def test_a_screen_is_fitted_where_it_can_be(folder, lists, monkeypatch, capsys):
    done = calibrate(folder, *lists, 0.05, provider="cpu", screen_alpha=0.2)
    found = done.calibration.screen
    assert done.calibration.no_screen == ""
    assert 10 <= found.memorized <= 24
    assert found.alpha == np.floor(0.2 * (found.memorized + 1) + 1e-9) / (found.memorized + 1)
    assert read_manifest(folder).calibrations["cpu-fp32"].screen == found
    rule = Detector.load(folder, "cpu").info.rule
    assert rule.screen == found and Detector.load(folder, "cpu").at(threshold=1.0).info.rule.screen is not None
    code, out, _ = command(monkeypatch, capsys, "info", folder)
    assert code == 0
    assert f"screen at tap {found.tap}, passes {found.decided.value:.3f}" in " ".join(out.split())


@pytest.mark.usefixtures("scored")
def test_why_there_is_no_screen(folder, lists, monkeypatch, capsys):
    given = ("--memorized", lists[0], "--clean", lists[1], "--provider", "cpu")
    code, out, _ = command(monkeypatch, capsys, "calibrate", folder, *given, "--screen-alpha", 0.001)
    assert code == 0
    assert "screen none: With" in " ".join(out.split())
    with pytest.raises(InputError, match=r"stores no screen for cpu-fp32 \(With .* less than .*: allow that much, or"):
        Detector.load(folder, "cpu").detect(["a star"], "screen")
    edit_manifest(folder, lambda m: m.update(taps=[], calibrations={}))
    done = calibrate(folder, *lists, provider="cpu")
    assert done.calibration.screen is None
    assert done.calibration.no_screen.startswith("The engine has no taps that a screen could read here: export the")


def test_prompts_count_once(folder):
    """By their tokens: case and spaces are none. What is in both lists, and the empty prompt, are left out."""
    engine = Engine.open(folder, "cpu", None, None)
    memorized = Prompts.given([*MEMORIZED, MEMORIZED[3].upper(), "", "word " * 99, "a star"])
    clean = Prompts.given(["A  STAR ", *CLEAN, CLEAN[0], CLEAN[0]], "clean")
    sample = select(engine, memorized, clean)
    np.testing.assert_array_equal(sample.ids, engine.tokenize([*MEMORIZED, "word " * 99, *CLEAN])[0])
    assert (sample.memorized.sum(), (~sample.memorized).sum()) == (25, 100)
    assert np.flatnonzero(sample.truncated).tolist() == [24]
    assert sample.warnings == (
        "Repetitions in a list: 1; each prompt counts once.",
        "a list holds the empty prompt, which is never memorized: it was left out.",
        "Repetitions in clean: 2; each prompt counts once.",
        "Prompts in both lists: 1, such as 'a star'; they were left out of both.",
        "Prompts longer than the 24 tokens that the text encoder reads: 1; what is beyond is not in their scores.",
    )


@pytest.mark.usefixtures("scored")
def test_few_prompts_are_warned_of(folder):
    def warned(memorized: int, clean: int, target: float) -> list[str]:
        return list(calibrate(folder, MEMORIZED[:memorized], CLEAN[:clean], target, provider="cpu").warnings)

    assert warned(20, 100, 0.01) == []
    few, fewer = warned(19, 50, 0.01)
    assert few.startswith("With 50 clean prompts a false-positive rate of 0.01 cannot be told from one of up to 0.071")
    assert few.endswith("give at least 100.")
    assert fewer.startswith("With 19 memorized prompts the share of them that is found is known only to be between")


def test_a_threshold_that_nothing_reaches_is_warned_of(folder, scored):
    """Three clean prompts score far above the memorized ones, and none of fifty may reach the threshold."""
    for prompt in CLEAN[:3]:
        scored.table[prompt] = (9.0, 0.0, -1.0)
    warnings = calibrate(folder, MEMORIZED, CLEAN[:50], 0.019, provider="cpu").warnings
    assert any(w.startswith("In cross-validation no memorized prompt reached the threshold") for w in warnings)


@pytest.mark.usefixtures("scored")
def test_chance_is_warned_of(folder):
    """Clean prompts on either side; by chance the norm is larger on the first, or it would be refused."""
    done = calibrate(folder, CLEAN[:40:2], CLEAN[1:40:2], 0.05, provider="cpu")
    assert any(w.startswith("Do not rely on these verdicts: an AUC of") for w in done.warnings)


def test_a_run_that_was_cut_off_goes_on(folder, lists, scored):
    whole = calibrate(folder, *lists, provider="cpu").calibration
    scored.done.clear()

    def interrupt(done: int, _total: int) -> None:
        if done == 64:
            raise KeyboardInterrupt

    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        calibrate(folder, *lists, provider="cpu", progress=interrupt)
    assert len(scored.done) == 64
    assert (folder / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match=r"calibration-cpu-fp32\.partial holds the results of an unfinished job: go"):
        calibrate(folder, *lists, provider="cpu")
    steps = []
    resumed = calibrate(folder, *lists, provider="cpu", resume=True, progress=lambda *step: steps.append(step))
    assert sorted(scored.done) == sorted(MEMORIZED + CLEAN)
    assert steps == [(done, 124) for done in (64, 124)]
    assert msgspec.structs.replace(resumed.calibration, date=whole.date) == whole
    assert not list(folder.glob("*.partial"))


def test_swapped_lists(folder, lists, scored, monkeypatch, capsys):
    """Refused, with nothing written; the right way round nothing is scored twice."""
    before = (folder / "manifest.json").read_bytes()
    wrong = ("calibrate", folder, "--memorized", lists[1], "--clean", lists[0], "--provider", "cpu")
    code, out, err = command(monkeypatch, capsys, *wrong)
    assert (code, out) == (1, "")
    assert err.startswith("memedge: Among these prompts a larger norm does not speak for memorized")
    assert (folder / "manifest.json").read_bytes() == before
    count = len(scored.done)
    calibrate(folder, *lists, provider="cpu", resume=True)
    assert len(scored.done) == count


@pytest.mark.usefixtures("scored")
def test_what_happens_to_the_engine_meanwhile(folder, lists):
    """Other calibrations that appear are kept; another engine in its place is not calibrated with these scores."""
    rule = OTHER | PROVENANCE
    calibrate(
        folder,
        *lists,
        provider="cpu",
        progress=lambda *_: edit_manifest(folder, lambda m: m["calibrations"].update({"openvino-bf16": rule})),
    )
    assert set(read_manifest(folder).calibrations) == {"cpu-fp32", "cuda-fp32", "openvino-bf16"}
    with pytest.raises(ManifestError, match="was changed while its prompts were scored: calibrate it again"):
        calibrate(folder, *lists, provider="cpu", progress=lambda *_: edit_manifest(folder, lambda m: m.update(seed=7)))
    with pytest.raises(InputError, match="a job with another engine, provider or precision"):
        calibrate(folder, *lists, provider="cpu", resume=True)


def test_mistakes(folder, lists, tmp_path, monkeypatch, capsys):
    before = state(folder)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "four.txt").write_text("a\nb\nb\nc\nd\n")
    ok, memorized, clean = ("--provider", "cpu"), ("--memorized", lists[0]), ("--clean", lists[1])
    for code, words, arguments in [
        (1, "empty.txt holds no prompts", (folder, *memorized, "--clean", tmp_path / "empty.txt")),
        (1, "absent.txt does not exist", (folder, *memorized, "--clean", tmp_path / "absent.txt")),
        (
            1,
            "four.txt leaves 4 clean prompts, and at least 5 different ones are needed",
            (folder, *memorized, "--clean", tmp_path / "four.txt", *ok),
        ),
        (
            1,
            "leaves 0 memorized prompts (prompts in both lists do not count: 24), and at least 5",
            (folder, *memorized, "--clean", lists[0], *ok),
        ),
        (1, "A false-positive rate of 1 is none to aim at", (folder, *memorized, *clean, "--target-fpr", 1)),
        (1, "A false-positive rate of nan is none to aim at", (folder, *memorized, *clean, "--target-fpr", "nan")),
        (1, "A share of 1 is none that a screen can pass", (folder, *memorized, *clean, "--screen-alpha", 1)),
        (1, "holds no manifest.json, so it is not an engine", (tmp_path, *memorized, *clean)),
        (1, "Two engine directories were given", (folder, *memorized, *clean, "--engine", folder)),
        (1, "no provider 'abacus'", (folder, *memorized, *clean, "--provider", "abacus")),
        (2, "name the engine directory that is to be calibrated", (*memorized, *clean)),
        (2, "--clean: it is needed", (folder, *memorized)),
        (2, "--all-providers: --provider names one", (folder, *memorized, *clean, "--all-providers", *ok)),
        (2, "--undo: it stands alone", (folder, *memorized, "--undo")),
        (1, "is calibrated for cuda-fp32, which does not say whose", (folder, "--undo", *ok)),
    ]:
        found, out, err = command(monkeypatch, capsys, "calibrate", *arguments)
        assert (found, out) == (code, "")
        assert words in err
        if code == 1:
            assert err.startswith("memedge: ") and len(err.strip().splitlines()) == 1
        assert state(folder) == before
    with pytest.raises(InputError, match="Prompt 2 is int, not text"):
        calibrate(folder, ["a", 2], CLEAN)


def test_a_folder_that_is_read_only(folder, lists, monkeypatch):
    """Found out before anything is loaded or scored. Root may write anywhere, so the answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, _mode: path != folder)
    monkeypatch.setattr(Engine, "open", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="engine cannot be written to, and its manifest is where a calibration goes"):
        calibrate(folder, *lists, provider="cpu")


def test_without_scikit_learn(folder, lists, monkeypatch):
    monkeypatch.delitem(sys.modules, "memedge.calibration.fitting", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(
        MemedgeError, match=r"Calibrating needs 'sklearn.*run `python -m pip install 'memedge\[eval\]'`"
    ):
        calibrate(folder, *lists)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_fpr": 1.0}, "a false-positive rate outside"),
        ({"strength": float("inf")}, "broken JSON"),
        ({"threshold": float("nan")}, "broken JSON"),
        ({"threshold": 1e300}, "threshold"),
        ({"fitted_by": "\x1b[31mred"}, "fitted_by"),
        ({"author": "x"}, "unknown field `author`"),
        ({"memorized": 20}, "memorized"),
        *(
            ({"cross_validation": PROVENANCE["cross_validation"] | {"auc": auc}}, "a share of prompts outside")
            for auc in (
                {"value": 1.2, "lowest": 0.1, "highest": 0.2},
                {"value": 0.5, "lowest": 0.6, "highest": 0.2},
            )
        ),
    ],
)
def test_calibrations_that_nobody_writes(folder, change, words):
    edit_manifest(folder, lambda m: m["calibrations"]["cuda-fp32"].update(change))
    with pytest.raises(ManifestError, match=words):
        read_manifest(folder)


@pytest.mark.usefixtures("scored")
def test_plans_without_the_screens_graphs(folder, lists, monkeypatch):
    """As those of an older version. What was scored by them is not gone on with, for changes at taps are missing."""

    def interrupt(done: int, _total: int) -> None:
        if done == 64:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OrtBackend, "screens", False)
        done = calibrate(folder, *lists, provider="cpu")
        assert done.calibration.no_screen == NO_SCREEN_PLANS
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, *lists, provider="cpu", progress=interrupt)
    with pytest.raises(InputError, match="is from a job with another engine, provider"):
        calibrate(folder, *lists, provider="cpu", resume=True)
