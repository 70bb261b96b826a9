"""int8 engines: near the float32 one, the same however prompts are batched, and honest about their drift."""

import collections
import re

import numpy as np
import onnx
import pytest
from scipy.stats import spearmanr

from memedge import Detector
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError, InputError, ProviderError
from memedge.engine.manifest import Drift, read_manifest
from memedge.export.export import export
from memedge.export.precision.drift import drift
from memedge.export.precision.int8_samples import ACTIVATIONS, DEFAULT_DRIFT, read_samples

PROMPTS = ["a star", "zebra on skis!", "Ünïcödé 猫", "a long prompt " * 20, "x", "sunset, oil on canvas", "9", "AB c"]
LABELS = ["true", "False", "TRUE", "false", "false", "true", "false", "true"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "labelled.csv"
    lines = (f'"{prompt}",{label}\n' for prompt, label in zip(PROMPTS, LABELS, strict=True))
    path.write_text("prompt,memorized\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantised(checkpoint, prompts, tmp_path_factory):
    """The random checkpoint in int8, and the manifest that its export returned."""
    folder = tmp_path_factory.mktemp("int8") / "engine"
    return folder, export(checkpoint, folder, precision="int8", prompts=prompts)


def test_near_float32(engine, quantised):
    """Nothing is promised; the bounds are for this checkpoint, whose random attention exaggerates every error."""
    true, own = Detector.load(engine, "cpu").score(PROMPTS), Detector.load(quantised[0]).score(PROMPTS)
    np.testing.assert_allclose(own.norm, true.norm, rtol=0.1)
    np.testing.assert_allclose(own.alignment, true.alignment, rtol=0, atol=0.15)
    assert spearmanr(own.norm, true.norm).statistic > 0.9


def test_batches_do_not_matter(quantised):
    detector = Detector.load(quantised[0])
    together = detector.score(PROMPTS)
    alone = [detector.score([prompt]) for prompt in PROMPTS]
    np.testing.assert_array_equal(together.norm, [s.norm[0] for s in alone])
    np.testing.assert_array_equal(together.alignment, [s.alignment[0] for s in alone])


def test_empty_prompt(quantised):
    scores = Detector.load(quantised[0]).score(["", "a star"])
    assert (scores.norm[0], scores.alignment[0]) == (0, 0)


def test_what_is_quantised(engine, quantised):
    """Weights at a quarter of their size, the last convolution in float32."""
    before, after = (onnx.load(folder / "unet.onnx") for folder in (engine, quantised[0]))
    counts = collections.Counter(node.op_type for node in after.graph.node)
    assert counts["QLinearConv"] > 0
    assert counts["DynamicQuantizeMatMul"] > 0
    assert counts["Gemm"] == 0
    assert [i.name for i in before.graph.input] == [i.name for i in after.graph.input]
    kernel = {i.name: list(i.dims)[2:] for i in after.graph.initializer}
    *others, last = [node for node in after.graph.node if node.op_type == "Conv"]
    assert all(kernel[node.input[1]] == [1, 1] for node in others)
    assert kernel[last.input[1]] == [3, 3]
    own_noise_alone = {"prefix.onnx", "gradient.onnx", "noise_gradient.onnx"}
    assert {p.name for p in quantised[0].iterdir()} == {p.name for p in engine.iterdir()} - own_noise_alone


def test_manifest(quantised):
    folder, manifest = quantised
    assert read_manifest(folder) == manifest
    found = manifest.drift
    assert (manifest.precision, found.prompts) == ("int8", len(PROMPTS) - len(PROMPTS) // 2)
    assert 0 < found.score_absolute < 0.5
    assert found.spearman > 0.5
    assert found.auc_change is not None


def test_only_the_engine_s_own_noise(quantised):
    folder, manifest = quantised
    assert not any(name.startswith("prefix") for name in manifest.files)
    with pytest.raises(ProviderError, match="is an int8 engine, which computes on its own noise only"):
        Denoiser(Engine.open(folder, "cpu", None, None))


def test_other_precisions_have_no_drift(engine):
    assert read_manifest(engine).drift is None


def test_openvino_refuses(quantised):
    with pytest.raises(ProviderError, match="openvino"):
        Detector.load(quantised[0], provider="openvino")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.csv", None, "does not exist"),
        ("prompts.doc", "a\n", "unknown file type"),
        ("few.txt", "a\nb\nb\nc\n", "holds 3 different prompts: give at least 8"),
        ("labels.csv", "prompt,memorized\n" + "".join(f"{i},yes\n" for i in range(9)), "holds 'yes'"),
    ],
)
def test_bad_prompts(checkpoint, tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        export(checkpoint, tmp_path / "engine", precision="int8", prompts=path)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_prompts_are_for_int8(checkpoint, prompts, tmp_path):
    with pytest.raises(ExportError, match="Only int8 is calibrated on prompts, not fp32"):
        export(checkpoint, tmp_path / "engine", prompts=prompts)
    assert not list(tmp_path.iterdir())


def test_default_samples():
    samples = read_samples(None)
    assert (len(samples.activations), len(samples.drift)) == (ACTIVATIONS, DEFAULT_DRIFT)
    assert not set(samples.activations) & set(samples.drift)
    assert samples.memorized is None


def test_labels_follow_their_prompts(prompts):
    """Compared are the prompts that were not calibrated on, with their own labels."""
    samples = read_samples(prompts)
    assert sorted(samples.activations + samples.drift) == sorted(PROMPTS)
    of = dict(zip(PROMPTS, (label.lower() == "true" for label in LABELS), strict=True))
    assert samples.memorized.tolist() == [of[prompt] for prompt in samples.drift]


def test_drift():
    true, own = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 3.5, 3])
    labels = np.array([False, False, False, True])
    assert drift(own, true, labels) == Drift(1.5, pytest.approx(0.8), pytest.approx(-1 / 3), 4)
    assert drift(own, true, None).auc_change is None
    assert drift(own, true, np.ones(4, bool)).auc_change is None


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_gpus_do_not_run_int8(quantised, provider):
    folder, _ = quantised
    with pytest.raises(ProviderError, match="export one in fp16 or fp32"):
        Detector.load(folder, provider)
