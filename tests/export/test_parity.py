"""Engines agree with the plain torch reference: draws, prediction types, alignments, operands, precisions."""

from pathlib import Path

import memedge.demo
import numpy as np
import pytest
import reference
from memedge import Detector
from memedge.engine.precision import ENGINE
from memedge.export.export import export
from models import make_checkpoint

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "bench" / "tiny" / "emoji"
MODES = [(o, a) for o in ("uncond_delta", "cond_uncond", "cond_delta") for a in ("channel", "flat")]
PROMPTS = ["a star", "zebra on skis!", "Ünïcödé 猫", "a very long prompt " * 20]


def agree(detector: Detector, expected: list[dict[str, float]], prompts: list[str], precision: str = "fp32") -> None:
    tolerance = ENGINE[precision]
    for operands, alignment in MODES:
        scores = detector.score(prompts, operands=operands, alignment=alignment)
        np.testing.assert_allclose(scores.norm, [e["norm"] for e in expected], rtol=tolerance.norm)
        own = [e[f"{operands}/{alignment}"] for e in expected]
        np.testing.assert_allclose(scores.alignment, own, rtol=0, atol=tolerance.alignment)


@pytest.mark.parametrize(
    ("prediction_type", "draws", "precision"),
    [("epsilon", 1, "fp32"), ("v_prediction", 4, "fp32"), ("epsilon", 4, "fp16")],
)
def test_random_unet(tmp_path, prediction_type, draws, precision):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", prediction_type, seed=draws)
    manifest = export(checkpoint, tmp_path / "engine", draws=draws, seed=7, precision=precision)
    assert (manifest.prediction_type, manifest.draws, manifest.precision) == (prediction_type, draws, precision)
    expected = reference.statistics(checkpoint, PROMPTS, draws, seed=7)
    assert min(e["norm"] for e in expected) > 0.01  # or the comparison would be of rounding
    agree(Detector.load(tmp_path / "engine"), expected, PROMPTS, precision)


def test_embedded_engine(detector):
    prompts = [p for p in memedge.demo.prompts() if p]
    agree(detector, reference.statistics(EMBEDDED, prompts, 1), prompts)


@pytest.mark.slow
def test_embedded_model_with_four_draws(tmp_path):
    prompts = [p for p in memedge.demo.prompts() if p]
    export(EMBEDDED, tmp_path / "engine", draws=4)
    agree(Detector.load(tmp_path / "engine"), reference.statistics(EMBEDDED, prompts, 4), prompts)


def test_tokens_are_those_of_the_model(detector):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    prompts = ["", "  A  Star\n", "café ☕ — 100%", "the " * 40, "x" * 500, "🦄" * 30, *memedge.demo.prompts()]
    length = tokenizer.model_max_length
    ids, truncated = detector._engine.tokenize(prompts)
    expected = tokenizer(prompts, padding="max_length", truncation=True, max_length=length).input_ids
    np.testing.assert_array_equal(ids, expected)
    assert truncated.tolist() == [len(tokenizer(p).input_ids) > length for p in prompts]
