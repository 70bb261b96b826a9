"""Engines agree with the plain torch reference: draws, prediction types, alignments, operands, precisions."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
from models import make_checkpoint
from scipy.stats import spearmanr

import memedge.demo
from memedge import Detector
from memedge.engine.openvino import precisions as openvino_precisions
from memedge.engine.precision import ENGINE_MIN_SPEARMAN
from memedge.export.export import export

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "bench" / "tiny" / "emoji"
PROMPTS = ["a star", "zebra on skis!", "Ünïcödé 猫", "a very long prompt " * 20]


@pytest.mark.parametrize(
    ("prediction_type", "draws", "precision"),
    [("v_prediction", 4, "fp32"), ("epsilon", 4, "fp16")],
)
def test_random_unet(tmp_path, prediction_type, draws, precision):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", prediction_type)
    manifest = export(checkpoint, tmp_path / "engine", draws=draws, seed=7, precision=precision)
    assert (manifest.prediction_type, manifest.draws, manifest.precision) == (prediction_type, draws, precision)
    expected = reference.statistics(checkpoint, PROMPTS, draws, seed=7)
    assert min(e["norm"] for e in expected) > 0.01  # or the comparison would be of rounding
    reference.agree(Detector.load(tmp_path / "engine"), expected, PROMPTS, precision)


@pytest.mark.parametrize(
    ("provider", "precision"),
    [
        ("cpu", "fp32"),
        pytest.param("openvino", "fp32", marks=pytest.mark.slow),
        pytest.param("openvino", "bf16", marks=pytest.mark.slow),
    ],
)
def test_embedded_engine(provider, precision):
    if provider == "openvino" and precision not in openvino_precisions("fp32"):
        pytest.skip("this CPU does not compute in bf16")
    detector = Detector.load(provider=provider, precision=precision)
    prompts = [p for p in memedge.demo.prompts() if p]
    expected = reference.statistics(EMBEDDED, prompts, 1)
    reference.agree(detector, expected, prompts, precision)
    norm = spearmanr([e["norm"] for e in expected], detector.score(prompts).norm).statistic
    assert norm >= ENGINE_MIN_SPEARMAN.get(precision, 1 - 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("prediction_type", "draws"), [("epsilon", 4), ("v_prediction", 1)])
def test_embedded_model(tmp_path, prediction_type, draws):
    """Exported anew; as v-prediction too, which it was not trained for, but which its outputs can be read as."""
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', f'"{prediction_type}"'))
    prompts = [p for p in memedge.demo.prompts() if p]
    export(model, tmp_path / "engine", draws=draws)
    reference.agree(Detector.load(tmp_path / "engine"), reference.statistics(model, prompts, draws), prompts)


def test_tokens_are_those_of_the_model(detector):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    prompts = ["", "  A  Star\n", "café ☕ — 100%", "the " * 40, "x" * 500, "🦄" * 30, *memedge.demo.prompts()]
    length = tokenizer.model_max_length
    ids, truncated = detector.engine.tokenize(prompts)
    expected = tokenizer(prompts, padding="max_length", truncation=True, max_length=length).input_ids
    np.testing.assert_array_equal(ids, expected)
    assert truncated.tolist() == [len(tokenizer(p).input_ids) > length for p in prompts]
