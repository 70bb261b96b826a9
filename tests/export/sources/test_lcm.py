"""Latent consistency models: a UNet that is told the guidance scale, as its pipeline tells it, and never without."""

import json
import shutil
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from guarded import actions, calibrate, make_pipe
from models import raise_guidance
from pipelines import make as make_checkpoint

from memedge import Detector, export_engine
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.autograd.gradients import TorchGradients
from memedge.autograd.unet import load_unet
from memedge.detectors import make
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError, InputError
from memedge.engine.gradients import OnnxGradients
from memedge.export.sources.call import Call
from memedge.export.sources.denoisers.guidance_embedding import guidance_embedding
from memedge.export.sources.denoisers.unet import UNet
from memedge.export.sources.open import load_parts
from memedge.export.sources.presets import OF_STABLE_DIFFUSION
from memedge.integrations.diffusers import guard

PROMPTS = ["a star", "zebra on skis"]


@pytest.fixture(scope="module")
def consistency(tmp_path_factory):
    """A small model in LCM_Dreamshaper_v7's layout."""
    folder = make_checkpoint(tmp_path_factory.mktemp("lcm") / "checkpoint", "sd1")
    config = json.loads((folder / "unet/config.json").read_text()) | {"time_cond_proj_dim": 256}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config)
    raise_guidance(unet)
    unet.save_pretrained(folder / "unet")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    LCMScheduler(**betas, steps_offset=1, clip_sample=False).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def engine(consistency, tmp_path_factory):
    """An engine of the pipeline as it is called where nobody says; as if its teacher had a published γ."""
    folder = tmp_path_factory.mktemp("lcm") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memedge.export.from_checkpoint.preset_of", lambda *_: OF_STABLE_DIFFUSION[1].preset)
        export_engine(consistency, folder)
    return folder


def predictions(pipe, sample, prompt, timesteps, scale):
    """What the UNet predicts at each step of a call of the pipeline's own, float64, and x_t at each."""
    seen = []

    def see(_unet, args, _kwargs, output):
        seen.append((args[0].double(), output[0].double()))

    hook = pipe.unet.register_forward_hook(see, with_kwargs=True)
    options = {} if scale is None else {"guidance_scale": scale}
    try:
        pipe(
            prompt, timesteps=timesteps, latents=sample, original_inference_steps=1000, output_type="latent", **options
        )
    finally:
        hook.remove()
    return seen


def expected(pipe, engine, prompt, scale=None):
    """Norm and alignment by their definitions, of what LatentConsistencyModelPipeline itself makes of the noise."""
    manifest, baseline = engine.directory.manifest, engine.directory.baseline
    sample = torch.tensor(np.array(baseline.sample))
    found = []
    for timestep in manifest.timesteps:
        pair = [predictions(pipe, sample, text, [timestep], scale)[0][1] for text in (prompt, "")]
        found.append(pair)
    (cond, uncond), (late, late_uncond) = found
    alignment = torch.cosine_similarity(late_uncond, late - late_uncond, dim=1).mean()
    return float((cond - uncond).norm()), float(alignment)


def test_parity_with_the_pipeline(consistency, engine):
    """At its own guidance scale, 8.5, without saying so."""
    detector = Detector.load(engine, provider="cpu")
    pipe = make_pipe(LatentConsistencyModelPipeline, consistency)
    pipe.scheduler = LCMScheduler.from_pretrained(consistency / "scheduler")
    manifest = detector.info.manifest
    assert manifest.guidance == 8.5
    assert "It is told a guidance scale, of 8.5: its statistics are of that one." in manifest.notes
    scores = detector.score(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        norm, alignment = expected(pipe, detector.engine, prompt)
        assert scores.norm[row] == pytest.approx(norm, rel=1e-4)
        assert scores.alignment[row] == pytest.approx(alignment, abs=1e-4)
    other, _ = expected(pipe, detector.engine, PROMPTS[0], scale=2.0)
    assert abs(other / scores.norm[0] - 1) > 1e-3  # the scale does matter


@pytest.mark.parametrize(("scale", "width"), [(8.5, 256), (1.0, 512), (7.5, 33), (0.0, 32), (3.7, 256)])
def test_the_embedding_is_diffusers_own(scale, width):
    own = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), width)
    assert torch.equal(guidance_embedding(torch.tensor([scale], dtype=torch.float64), width), own)


def test_the_scale_is_the_callers(consistency, engine):
    """Or the pipeline's class's default; and torch's gradients are of the engine's own scale."""
    options = {"revision": None, "loras": (), "allow_pickle": False, "config": None, "progress": print}
    assert load_parts(str(consistency), **options).guidance == 8.5
    (consistency / "model_index.json").rename(consistency / "index.json")
    try:
        parts = load_parts(str(consistency), **options)
    finally:
        (consistency / "index.json").rename(consistency / "model_index.json")
    assert parts.guidance == 7.5  # StableDiffusionPipeline's
    parts = load_parts(str(consistency), **options, call=Call(guidance=4.0))
    assert parts.guidance == 4.0
    directory = Detector.load(engine, provider="cpu").engine.directory
    directory = replace(directory, manifest=msgspec.structs.replace(directory.manifest, guidance=3.0))
    assert load_unet(directory, str(consistency)).guidance.item() == 3.0
    with pytest.raises(ExportError, match="takes a guidance scale: say which with --guidance"):
        UNet(replace(parts, guidance=None), 16, 0)


def test_the_norm_over_the_scale(consistency, engine, tmp_path):
    """What the pipeline's own UNet predicts at the engine's scale, and at 1; for models alone that are told one."""
    opened = Engine.open(engine, "cpu", None, None)
    pipe = make_pipe(LatentConsistencyModelPipeline, consistency)
    pipe.scheduler = LCMScheduler.from_pretrained(consistency / "scheduler")
    for seed, sample in ((None, opened.directory.baseline.sample), (3, Denoiser(opened).noise(1, 3))):
        found = make("norm-guidance", opened, 1, seed=seed)(PROMPTS)
        for value, prompt in zip(found[:, 0], PROMPTS, strict=True):
            guided, plain = (
                predictions(pipe, torch.tensor(np.array(sample)), prompt, [opened.directory.manifest.timesteps[0]], g)
                for g in (8.5, 1.0)
            )
            assert value == pytest.approx(float((guided[0][1] - plain[0][1]).norm()) / 7.5, rel=1e-3)
    with pytest.raises(InputError, match=r"'norm-guidance' compares two .* is told none: use 'norm'"):
        make("norm-guidance", Engine.open(EMBEDDED_ENGINE, "cpu", None, None), 1)
    export_engine(consistency, tmp_path / "one", guidance=1.0)
    with pytest.raises(InputError, match="one is of that one: export with another --guidance"):
        make("norm-guidance", Engine.open(tmp_path / "one", "cpu", None, None), 1)


def test_gradients_are_of_the_scale(consistency, engine):
    """Of the noise, whose graph has the prefix in it."""
    opened = Engine.open(engine, "cpu", None, None)
    states = opened.backend.memory.download(opened.encode(opened.tokenize(PROMPTS[:1])[0]).tensor)[0]
    rng = np.random.default_rng(0)
    latents, cotangent = rng.standard_normal((2, 2, *opened.directory.manifest.latent_shape), dtype=np.float32)
    own = OnnxGradients(opened).noise(states, latents, cotangent)
    expected = TorchGradients(opened, str(consistency)).noise(states, latents, cotangent)
    np.testing.assert_allclose(own, expected, atol=1e-4 * np.abs(expected).max())


def test_options_that_do_not_fit(consistency, checkpoint, tmp_path):
    for options, words in [
        ({"guidance": -1.0}, r"--guidance is -1.0: give the pipeline's guidance_scale"),
        ({"guidance": float("nan")}, r"--guidance is nan: give the pipeline's guidance_scale"),
        ({"size": (512, 512)}, "A size is for transformers"),
        ({"max_sequence_length": 77}, "leave --max-sequence-length out"),
    ]:
        with pytest.raises(ExportError, match=words):
            export_engine(consistency, tmp_path / "engine", **options)
    with pytest.raises(ExportError, match="is not told a guidance scale: leave --guidance out"):
        export_engine(checkpoint, tmp_path / "engine", guidance=7.5)
    with pytest.raises(ExportError, match="takes the guidance scale as an input: its pictures can't be audited"):
        DiffusionModel(str(consistency))


def test_no_preset(engine):
    """γ of the model it was distilled from is not carried over, and a note says why."""
    manifest = Detector.load(engine, provider="cpu").info.manifest
    assert manifest.preset is None
    assert manifest.notes[-1] == (
        "No published γ: that of Stable Diffusion 1.x is not for models distilled from it, as its guidance embedding "
        "says."
    )


def test_guarded(consistency, engine, tmp_path):
    """At the engine's own scale alone; the UNet is told it where both are compared."""
    detector, clean, memorized = calibrate(shutil.copytree(engine, tmp_path / "engine"))
    guarded = guard(make_pipe(StableDiffusionPipeline, consistency), detector)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    result = guarded([clean[0], memorized[0]], guidance_scale=8.5, **options)
    assert actions(result) == ["passed", "blocked"]
    with pytest.raises(InputError, match=r"guidance_scale is 7\.5, and the engine's model is told 8\.5: call the pipe"):
        guarded(clean[0], **options)
