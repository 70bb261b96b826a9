"""Every architecture: exported, and in agreement with diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import architectures
import diffusers
import numpy as np
import pytest
import reference
import torch
from models import make_checkpoint

from memedge import Detector, InputError
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError
from memedge.export.export import export
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.architectures import ARCHITECTURES, architecture_of
from memedge.export.sources.checkpoint import latent_shape
from memedge.export.sources.open import load_checkpoint

PROMPTS = ["a star", "zebra on skis!", "a very long prompt " * 20]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> tuple[Path, Path]:
    """A small SDXL checkpoint and its engine."""
    folder = tmp_path_factory.mktemp("sdxl")
    checkpoint = architectures.build("sdxl", folder / "checkpoint")
    export(checkpoint, folder / "engine", draws=2)
    return checkpoint, folder / "engine"


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(pytest.param(n, "fp32", marks=SLOW) for n in ("sd2", "sd2-768", "realistic-vision")),
        *(pytest.param(n, "fp16", marks=SLOW) for n in ("sd1", "sd2-768", "sdxl")),
    ],
)
def test_engine_agrees_with_the_pipeline(tmp_path, name, precision):
    checkpoint = architectures.build(name, tmp_path / name)
    manifest = export(checkpoint, tmp_path / "engine", precision=precision)
    architecture = architectures.ARCHITECTURES[name]
    assert manifest.prediction_type == architecture.scheduler.get("prediction_type", "epsilon")
    assert manifest.timesteps == (981, 41)
    expected = reference.statistics(checkpoint, PROMPTS, 1)
    assert min(e["norm"] for e in expected) > 0.01  # or the comparison would be of rounding
    reference.agree(Detector.load(tmp_path / "engine"), expected, PROMPTS, precision)
    agrees_anywhere(checkpoint, tmp_path / "engine", precision)


def agrees_anywhere(checkpoint: Path, folder: Path, precision: str = "fp32") -> None:
    """The engine's UNet on other latents, at a timestep that is not one of its own, against diffusers'."""
    engine = Engine.open(folder, "cpu", None, None)
    denoiser = Denoiser(engine)
    latents = np.random.default_rng(0).standard_normal((3, *engine.directory.manifest.latent_shape), dtype=np.float32)
    expected = reference.guidance(checkpoint, PROMPTS, latents, 501)
    found = denoiser.guidance(engine.encode(engine.tokenize(PROMPTS)[0]), np.arange(3), latents, 501)
    tolerance = {"fp32": 2e-5, "fp16": 5e-3}[precision] * np.abs(expected[0]).max()
    for own, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, true, rtol=0, atol=tolerance)
    assert np.abs(expected[0] - expected[1]).max() > 10 * tolerance  # or it would be a comparison of ε_0 alone


@SLOW
def test_sdxl(sdxl):
    """Two text encoders, pooled states, time ids, and ε_0 of zeros."""
    checkpoint, engine = sdxl
    expected = reference.statistics(checkpoint, PROMPTS, 2)
    assert min(e["norm"] for e in expected) > 0.01
    detector = Detector.load(engine, "cpu")
    reference.agree(detector, expected, PROMPTS)
    assert detector.info.manifest.pooled_width == 40
    assert detector.score([""]).norm[0] == 0
    agrees_anywhere(checkpoint, engine)


@SLOW
def test_sdxl_in_openvino(sdxl):
    checkpoint, engine = sdxl
    detector = Detector.load(engine, "openvino", "fp32")
    reference.agree(detector, reference.statistics(checkpoint, PROMPTS, 2), PROMPTS)


@SLOW
def test_sdxl_embeddings(sdxl):
    """A pipeline's own embeddings score as the prompts do."""
    checkpoint, engine = sdxl
    detector, pipeline = Detector.load(engine), reference.load(checkpoint)
    with torch.no_grad():
        cond, uncond, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    by_prompts, by_states = detector.score(PROMPTS), detector.score_embeddings(cond, pooled)
    np.testing.assert_allclose(by_states.norm, by_prompts.norm, rtol=1e-4)
    np.testing.assert_allclose(by_states.alignment, by_prompts.alignment, atol=1e-4)
    assert (detector.score_embeddings(uncond, no_pooled).norm == 0).all()
    for arguments, words in {
        (cond,): "needs pooled prompt embeddings too: give pooled, \\[B, 40\\]",
        (cond, pooled[:, :39]): "takes \\[B, 40\\]",
        (cond, pooled[:2]): "3 prompt embeddings and 2 pooled ones",
        (pooled, pooled): "takes \\[B, 77, 80\\]",
    }.items():
        with pytest.raises(InputError, match=words):
            detector.score_embeddings(*arguments)


@SLOW
def test_sdxl_explained(sdxl):
    """A word is masked in both tokenizers' ids, by hand here: "!!" is two ids in both, and the second's padding."""
    detector = Detector.load(sdxl[1], "cpu")
    engine, prompt = detector.engine, "a star!! on"
    ids, empty = (engine.tokenize([text])[0].reshape(2, 77) for text in (prompt, ""))
    assert (ids[:, 6] == empty[:, 1]).all()  # BOS, five tokens, EOS
    assert empty[0, 2] != empty[1, 2]
    norm = engine.norm(engine.encode(ids.reshape(1, -1)))[0]
    ids[:, 2] = empty[:, 2]
    without = engine.norm(engine.encode(ids.reshape(1, -1)))[0]
    explanation = detector.explain(prompt)
    assert [word.text for word in explanation.words] == ["a", "star", "!!", "on"]
    assert (explanation.kind, explanation.score) == ("norm", pytest.approx(norm, rel=1e-4))
    assert abs(norm - without) > 1e-3 * norm
    assert explanation.words[1].significance == pytest.approx(norm - without, abs=2e-4 * norm)
    (only,) = (explanation := detector.explain("star")).words
    assert only.significance == explanation.score


def test_no_pooled_embeddings_for_other_models(engine):
    detector = Detector.load(engine)
    shape = detector.info.manifest.states_shape
    with pytest.raises(InputError, match="has no pooled prompt embeddings: leave them out"):
        detector.score_embeddings(np.zeros((1, *shape)), np.zeros((1, 8)))


@SLOW
def test_zero_terminal_snr(tmp_path):
    """Where ᾱ is 0 the norm of v-prediction vanishes: the next timestep is taken, and it is said."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "v_prediction")
    edit(checkpoint / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    manifest = export(checkpoint, tmp_path / "engine")
    assert manifest.timesteps == (979, 59)
    (note,) = manifest.notes
    assert "ᾱ is 0 at timestep 999" in note and "979" in note
    detector = Detector.load(tmp_path / "engine")
    assert detector.info.manifest.notes == (note,)
    reference.agree(detector, reference.statistics(checkpoint, PROMPTS, 1, first=1), PROMPTS)
    assert reference.statistics(checkpoint, PROMPTS[:1], 1)[0]["norm"] == 0  # at the timestep that was not taken


def test_table():
    """Each family is told from all others by its folders, its single files and its UNet's inputs."""
    for row in ARCHITECTURES:
        kind = row.pipeline if row.denoiser.flow else None  # transformers go by it
        assert architecture_of([f"{part}/config.json" for part in row.modules], kind) == row
        with quiet():
            assert getattr(diffusers, row.pipeline).__name__ == row.pipeline
    assert architecture_of([]) is ARCHITECTURES[0]
    markers = [layout.marker for row in ARCHITECTURES for layout in row.single_files]
    inputs = [frozenset(row.optimum_inputs) for row in ARCHITECTURES if not row.denoiser.flow]
    assert len(set(markers)) == len(markers) and len(set(inputs)) == len(inputs)


def test_text_encoder_missing(tmp_path):
    """SDXL's UNet with one text encoder."""
    checkpoint = architectures.build("sdxl", tmp_path / "checkpoint")
    shutil.rmtree(checkpoint / "text_encoder_2")
    words = "is of SDXL, and the text encoders beside it are those of Stable Diffusion 1.x, 2.x: a part is missing"
    with quiet(), pytest.raises(ExportError, match=words):
        load_checkpoint(str(checkpoint))
    (checkpoint / "model_index.json").unlink()
    words = "'text_time', and its text encoders are those of Stable Diffusion 1.x, 2.x: a part is missing"
    with quiet(), pytest.raises(ExportError, match=words):
        load_checkpoint(str(checkpoint))


def test_latent_shape():
    config = {"in_channels": 4, "out_channels": 4, "sample_size": 8}
    assert latent_shape(config) == (4, 8, 8)
    assert latent_shape({**config, "sample_size": [8, 16]}) == (4, 8, 16)


def edit(path: Path, **change) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
