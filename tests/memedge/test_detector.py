"""The detector on real engines: results, verdicts, options, threads, and what it refuses."""

import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from command_line import memedge
from engines import PROVENANCE, edit_manifest, list_file

from memedge import Detector, EngineError, InputError, Mitigator
from memedge.detector import PROMPTS_PER_BATCH
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.errors import IntegrityError, NotFiniteError, ProviderError

PROMPTS = ["a star", "zebra on skis", "house", "cat " * 50]


@pytest.fixture(scope="module")
def plain(engine):
    """A detector on an engine without calibration."""
    return Detector.load(engine)


def test_scores_are_the_calibrated_sum(detector):
    scores, c = detector.score(PROMPTS), detector.info.calibration
    np.testing.assert_allclose(scores.score, c.gamma_norm * scores.norm + c.gamma_alignment * scores.alignment)
    np.testing.assert_array_equal(scores.memorized, scores.score >= c.threshold)
    assert scores.threshold == c.threshold
    assert scores.truncated.tolist() == [False, False, False, True]
    assert len(scores) == 4


def test_verdicts_are_the_scores(detector):
    scores, verdicts = detector.score(PROMPTS), detector.detect(PROMPTS)
    assert [v.prompt for v in verdicts] == PROMPTS
    for row, v in enumerate(verdicts):
        assert (v.score, v.norm, v.alignment) == (scores.score[row], scores.norm[row], scores.alignment[row])
        assert (v.memorized, v.truncated, v.threshold) == (
            scores.memorized[row],
            scores.truncated[row],
            scores.threshold,
        )
        assert v.passes == 2 * detector.info.manifest.draws
        assert v.reason.startswith("score ")


def test_without_calibration(plain):
    scores = plain.score(PROMPTS)
    assert scores.score is None
    assert scores.memorized is None
    assert scores.threshold is None
    assert (scores.norm > 0).all()
    verdict = plain.detect(["a star"])[0]
    assert verdict.memorized is None
    assert "no calibration for cpu-fp32" in verdict.reason and "memedge calibrate" in verdict.reason


def test_published_weights(copy):
    """A preset gives scores that order prompts, marked as not fitted here, and no verdicts."""
    preset = {"family": "Stable Diffusion 1.x", "gamma_norm": 1.0, "gamma_alignment": 2.0}
    edit_manifest(copy, lambda manifest: manifest.update(preset=preset))
    detector = Detector.load(copy)
    scores = detector.score(PROMPTS)
    np.testing.assert_allclose(scores.score, scores.norm + 2 * scores.alignment)
    assert scores.memorized is None and scores.threshold is None
    assert detector.score(PROMPTS, alignment="flat").score is None
    assert detector.score(PROMPTS, operands="cond_delta").score is None
    verdicts = detector.detect(PROMPTS)
    assert [v.score for v in verdicts] == scores.score.tolist()
    for v in verdicts:
        assert v.memorized is None and v.threshold is None and v.passes == 2
        assert "published, not fitted here" in v.reason and "memedge calibrate" in v.reason


def test_calibration_replaces_published_weights(tmp_path):
    engine = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")
    preset = {"family": "Stable Diffusion 1.x", "gamma_norm": 1.0, "gamma_alignment": 2.0}
    edit_manifest(engine, lambda manifest: manifest.update(preset=preset))
    with_preset, without = (Detector.load(path, "cpu").score(PROMPTS) for path in (engine, EMBEDDED_ENGINE))
    np.testing.assert_array_equal(with_preset.score, without.score)
    assert Detector.load(engine, "cpu").score(PROMPTS, alignment="flat").score is None


def test_calibration_holds_for_its_own_statistics_only(detector):
    assert detector.score(PROMPTS, alignment="flat").score is None
    assert detector.score(PROMPTS, operands="uncond_delta").memorized is None
    assert detector.score(PROMPTS, alignment="channel", operands="cond_uncond").score is not None


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_empty_prompt(detector, prompt):
    scores = detector.score([prompt, "a star"])
    assert (scores.norm[0], scores.alignment[0], scores.memorized[0]) == (0, 0, False)
    assert scores.norm[1] > 0
    assert "empty" in detector.detect([prompt])[0].reason


def test_empty_prompt_is_never_memorized(copy):
    """Not even where every score passes the threshold."""
    calibration = {
        "gamma_norm": 1.0,
        "gamma_alignment": 2.0,
        "threshold": -100.0,
        "alignment": "channel",
        "operands": "uncond_delta",
        **PROVENANCE,
    }
    edit_manifest(copy, lambda m: m["calibrations"].update({"cpu-fp32": calibration}))
    assert Detector.load(copy).score(["", "a"]).memorized.tolist() == [False, True]


def test_batches_change_nothing(plain):
    """Any iterable, of any length, in order; scores within rounding of one prompt at a time."""
    prompts = [f"prompt {i}" for i in range(2 * PROMPTS_PER_BATCH + 3)]
    together = plain.score(p for p in prompts)
    alone = [plain.score([p]) for p in prompts]
    np.testing.assert_allclose(together.norm, [s.norm[0] for s in alone], rtol=1e-4)
    np.testing.assert_allclose(together.alignment, [s.alignment[0] for s in alone], atol=1e-4)


def test_memory_does_not_grow_with_prompts(plain):
    """Prompts are taken one batch at a time: none is asked for before those of the batch before are scored."""
    taken, seen, size = [], [], plain._batch
    original = plain.engine.statistics

    def prompts():
        for i in range(3 * size):
            taken.append(i)
            yield str(i)

    def statistics(states, *options):
        seen.append((len(taken), len(states.empty)))
        return original(states, *options)

    plain.engine.statistics = statistics
    try:
        plain.score(prompts())
    finally:
        del plain.engine.statistics
    assert size >= PROMPTS_PER_BATCH
    assert seen == [(size, size), (2 * size, size), (3 * size, size)]


def test_embeddings(plain):
    backend = plain.engine.backend
    states = backend.memory.download(backend.encode(plain.engine.tokenize(["a star", ""])[0]))
    by_states, by_prompts = plain.score_embeddings(states), plain.score(["a star", ""])
    np.testing.assert_array_equal(by_states.norm, by_prompts.norm)
    np.testing.assert_array_equal(by_states.alignment, by_prompts.alignment)
    assert by_states.norm[1] == 0
    assert not by_states.truncated.any()


def test_wrong_embeddings(plain):
    tokens, width = plain.info.manifest.tokens, plain.info.manifest.state_width
    for shape in [(tokens, width), (1, tokens, width + 1), (1, 77, 768), (0, tokens, width)]:
        with pytest.raises(InputError, match="this engine takes"):
            plain.score_embeddings(np.zeros(shape))
    shape = (1, tokens, width)
    with pytest.raises(InputError, match="have a mask"):
        plain.score_embeddings(np.ma.zeros(shape))
    others = (np.zeros(shape, complex), np.zeros(shape, "m8[s]"), np.full(shape, "1"), torch.ones(shape) > 0)
    for states in ("a star", [[1, 2], [3]], torch.zeros(shape, requires_grad=True), *others):
        with pytest.raises(InputError, match="no array of numbers"):
            plain.score_embeddings(states)
    for value in (np.nan, np.inf):
        states = np.zeros((2, tokens, width))
        states[1, 3, 5] = value
        with pytest.raises(NotFiniteError):
            plain.score_embeddings(states)


def test_threads_agree(plain):
    """One detector, many threads: the results of one thread."""
    expected = plain.score(PROMPTS)
    with ThreadPoolExecutor(8) as pool:
        for scores in pool.map(lambda _: plain.score(PROMPTS), range(24)):
            np.testing.assert_allclose(scores.norm, expected.norm, rtol=1e-6)
            np.testing.assert_allclose(scores.alignment, expected.alignment, atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        (iter(()), "no prompts"),
        ("a star", "one string"),
        (b"a star", "one string"),
        (7, "is int"),
        (None, "is NoneType"),
        (["a", 7], "Prompt 2 is int"),
        ([None], "Prompt 1 is NoneType"),
        (["a"] * PROMPTS_PER_BATCH + ["\ud800"], f"Prompt {PROMPTS_PER_BATCH + 1} is not valid UTF-8"),
    ],
)
def test_wrong_prompts(plain, prompts, words):
    for method in (plain.score, plain.detect):
        with pytest.raises(InputError, match=words):
            method(iter(()) if words == "no prompts" else prompts)


def test_wrong_options(plain, engine):
    with pytest.raises(InputError, match="no alignment 'pixel'"):
        plain.score(["a"], alignment="pixel")
    with pytest.raises(InputError, match="no operands 'delta'"):
        plain.score(["a"], operands="delta")
    untouched = iter(["a"])
    with pytest.raises(InputError, match="no alignment"):
        plain.score(untouched, alignment="pixel")
    assert next(untouched) == "a"  # refused before anything was computed
    with pytest.raises(InputError, match="no early='late'"):
        plain.detect(["a"], early="late")
    with pytest.raises(InputError, match="threads is 0"):
        Detector.load(engine, threads=0)
    with pytest.raises(ProviderError, match="no provider 'abacus'"):
        Detector.load(engine, provider="abacus")
    with pytest.raises(ProviderError, match="is an fp32 engine"):
        Detector.load(engine, precision="fp16")
    with pytest.raises(EngineError, match="is not a directory"):
        Detector.load("nowhere")


def test_info(plain, engine):
    info = plain.info
    assert (info.path, info.provider, info.precision, info.key) == (engine, "cpu", "fp32", "cpu-fp32")
    assert info.threads >= 1
    assert Detector.load(engine, threads=1).info.threads == 1


def test_not_finite_model(copy):
    """NaN weights in an engine whose hashes fit: an error, never a score."""
    weights = copy / "unet.onnx.data"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, dtype=np.float32).tobytes())
    list_file(copy, weights.name)
    with pytest.raises(NotFiniteError):
        Detector.load(copy).score(["a star"])


def test_warmup(plain):
    plain.warmup()


def test_damaged_engine(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError):
        Detector.load(copy)


def test_warmup_runs_calls_of_the_sizes_that_are_asked_for(detector, monkeypatch):
    seen = []
    monkeypatch.setattr(Detector, "score", lambda _self, prompts: seen.append(("score", len(set(prompts)))))
    monkeypatch.setattr(
        Detector, "detect", lambda _self, prompts, early="detect": seen.append((early, len(set(prompts))))
    )
    detector.warmup()
    detector.warmup(batch=3)
    detector.warmup(batch=(1, 16))
    assert [size for name, size in seen if name == "score"] == [1, 3, 1, 16]
    assert [size for name, size in seen if name == "detect"] == [1, 3, 1, 16]
    assert [size for name, size in seen if name == "screen"] == [1, 3, 1, 16]
    for wrong in (0, (), (4, 0), True, ("4",)):
        with pytest.raises(InputError, match="give the number of prompts of a call"):
            detector.warmup(batch=wrong)


def test_reprs(detector):
    assert repr(detector).startswith(f"<Detector on {detector.info.path}: cpu-fp32, ")
    threshold = f"threshold {detector.info.rule.threshold:.4g}"
    assert repr(detector).endswith(f"{threshold}>")
    assert repr(detector.at(threshold=3)).endswith("threshold 3, as given>")
    assert repr(detector.score(["the left luggage sign", ""])) == f"<Scores of 2 prompts: 1 memorized, {threshold}>"
    mitigator = Mitigator(detector.engine, detector.gradients)
    assert repr(mitigator) == f"<Mitigator on {detector.info.path}: cpu-fp32>"


def test_logging(detector, caplog):
    """Verdicts at INFO, without the prompt; nothing by default."""
    logger = logging.getLogger("memedge")
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    detector.detect(["the left luggage sign"])
    assert not caplog.records
    with caplog.at_level(logging.INFO, logger="memedge"):
        detector.detect(["the left luggage sign", "a green star on a hill"])
    assert [record.name for record in caplog.records] == ["memedge", "memedge"]
    assert re.match(r"memorized: score -\d+\.\d+ ≥ threshold -\d+\.\d+ \(cpu-fp32, passes: 2", caplog.messages[0])
    assert caplog.messages[1].startswith("ok: ")
    assert not any("luggage" in text or "star" in text for text in caplog.messages)


def test_gradients_under_auto():
    """A provider that computes them is taken, whatever else is calibrated; one that is named stays."""
    assert Detector.load(gradients=True).info.provider == "cpu"
    with pytest.raises(ProviderError, match="'openvino' computes no gradients"):
        Detector.load(provider="openvino", gradients=True)
    assert "on cpu-fp32" in memedge("explain", "a star", "--method", "gradient").stderr
