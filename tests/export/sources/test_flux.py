"""Flux.1's transformer, dev and schnell, and its text encoders, against diffusers' own pipeline."""

from pathlib import Path

import flux
import numpy as np
import pytest
import torch
import velocities
from diffusers import FluxPipeline
from loading import edit_json, load, refused
from safetensors.torch import save_file

from memedge import Detector, export_engine
from memedge.detectors import make
from memedge.engine.embeddings import unpack
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.call import Call
from memedge.export.sources.torch_checkpoint import TorchCheckpoint

PROMPTS = ["a star on a ski", "zebra \ufb01lm!\te\u0301", "a very long prompt " * 30]
SLOW = pytest.mark.slow  # tracing takes most of a minute
SIZE, TOKENS = (64, 96), 20
CALL = {"height": SIZE[0], "width": SIZE[1], "max_sequence_length": TOKENS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return flux.build(tmp_path_factory.mktemp("flux") / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint) -> Path:
    export_engine(checkpoint, checkpoint.parent / "engine", size=SIZE, max_sequence_length=TOKENS)
    return checkpoint.parent / "engine"


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return velocities.load(checkpoint)


def velocity(pipeline, sigma: float, noise: np.ndarray, **call) -> list[torch.Tensor]:
    """Return what the transformer gave in a call from noise [1, C, H, W], unpacked."""
    _, channels, height, width = noise.shape
    latents = FluxPipeline._pack_latents(torch.from_numpy(noise), 1, channels, height, width)
    found = velocities.predictions(pipeline, sigma, latents, **CALL, **call)
    return [FluxPipeline._unpack_latents(one, *SIZE, vae_scale_factor=8) for one in found]


@SLOW
def test_engine_agrees_with_the_pipeline(engine, pipeline):
    """ε_0 is that of the empty prompt at the same guidance, by a call of its own."""
    detector = Detector.load(engine, "cpu")
    noise = Engine.open(engine, "cpu", None, None).directory.baseline.sample
    scores = detector.score(PROMPTS, operands="uncond_delta", alignment="channel")
    uncond = [velocity(pipeline, sigma, noise, prompt="")[0] for sigma in velocities.SIGMAS]
    for prompt, norm, alignment in zip(PROMPTS, scores.norm, scores.alignment, strict=True):
        cond = [velocity(pipeline, sigma, noise, prompt=prompt)[0] for sigma in velocities.SIGMAS]
        expected = velocities.statistics(noise, list(zip(cond, uncond, strict=True)))
        assert expected[0] > 0.1  # or it would be a comparison of rounding
        np.testing.assert_allclose(norm, expected[0], rtol=1e-4)
        np.testing.assert_allclose(alignment, expected[1], atol=1e-4)
    # The same two, where a caller asks for true guidance with an empty negative prompt.
    both = velocity(pipeline, 1.0, noise, prompt=PROMPTS[0], negative_prompt="", true_cfg_scale=2.0)
    np.testing.assert_allclose((both[0] - both[1]).norm(), scores.norm[0], rtol=1e-4)
    manifest = detector.info.manifest
    assert manifest.guidance == 3.5  # the pipeline's own
    assert manifest.flow.mu == pytest.approx(0.5 + (1.15 - 0.5) * (24 - 256) / (4096 - 256))


@SLOW
def test_the_norm_over_the_scale(engine, pipeline):
    """What the pipeline's own transformer gives where it is told the engine's scale, and 1."""
    opened = Engine.open(engine, "cpu", None, None)
    found = make("norm-guidance", opened, 1)(PROMPTS)
    noise = opened.directory.baseline.sample
    for value, prompt in zip(found[:, 0], PROMPTS, strict=True):
        guided, plain = (velocity(pipeline, 1.0, noise, prompt=prompt, guidance_scale=g)[0] for g in (3.5, 1.0))
        np.testing.assert_allclose(value, (guided - plain).norm() / 2.5, rtol=1e-3)


@SLOW
def test_embeddings_are_the_pipelines(engine, pipeline):
    opened = Engine.open(engine, "cpu", None, None)
    ids, cut = opened.tokenize(PROMPTS)
    assert cut.tolist() == [False, False, True]
    states, pooled = unpack(opened.directory.manifest, opened.backend.memory.download(opened.encode(ids).tensor))
    with quiet(), torch.no_grad():
        own, own_pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=TOKENS)
    np.testing.assert_allclose(states, own, atol=2e-5)
    np.testing.assert_allclose(pooled, own_pooled, atol=2e-5)
    detector = Detector.load(engine, "cpu")
    by_states, by_prompts = detector.score_embeddings(own, own_pooled), detector.score(PROMPTS)
    np.testing.assert_allclose(by_states.norm, by_prompts.norm, rtol=1e-4)
    np.testing.assert_allclose(by_states.alignment, by_prompts.alignment, atol=1e-4)


def predicts(folder: Path, call: Call, **more: float) -> TorchCheckpoint:
    """Our torch module gives what the pipeline does, at both σ; return it."""
    own, pipeline = TorchCheckpoint(load(folder, call=call)), velocities.load(folder)
    noise = np.random.default_rng(0).standard_normal(own.latent_shape, dtype=np.float32)
    ids = np.concatenate([tokenizer.encode(PROMPTS[0]).ids for tokenizer in own.tokenizers])[None]
    states = own.encode(ids)[0]
    for timestep in (1000, 168):
        expected = velocity(pipeline, timestep / 1000, noise[None], prompt=PROMPTS[0], **more)[0][0]
        share = 0 if timestep == 1000 else 1000 / (1000 - timestep)
        np.testing.assert_allclose(own.predict(noise, timestep, states), expected.numpy() + share * noise, atol=1e-5)
    return own


def test_another_guidance(checkpoint):
    assert predicts(checkpoint, Call(SIZE, TOKENS, guidance=2.0), guidance_scale=2.0).guidance == 2.0


def test_schnell(tmp_path):
    """It is told no guidance, and its noise levels aren't shifted."""
    folder = flux.build(tmp_path / "checkpoint", name="schnell")
    assert predicts(folder, Call(SIZE, TOKENS)).guidance is None
    whole = TorchCheckpoint(load(folder))
    assert whole.latent_shape == (16, 128, 128)
    assert whole.lengths == (77, 512)
    refused(folder, "This Flux.1 is not told a guidance scale: leave --guidance out", call=Call(guidance=3.5))


def test_lora_for_pictures(checkpoint, tmp_path):
    """A control LoRA takes a picture's channels too; diffusers would widen the transformer for it."""
    state = {"transformer.x_embedder.lora_A.weight": torch.ones(3, 128)}
    save_file(state | {"transformer.x_embedder.lora_B.weight": torch.ones(64, 3)}, file := tmp_path / "a.safetensors")
    refused(checkpoint, "whose transformer.x_embedder takes 128 channels, and that of checkpoint", loras=[str(file)])


def test_sizes(checkpoint):
    with pytest.raises(ExportError, match="has no tokens for 96x72: give a --size in steps of 16 pixels"):
        TorchCheckpoint(load(checkpoint, call=Call((72, 96))))


def test_other_models_are_refused(tmp_path):
    folder = flux.build(tmp_path / "checkpoint", name="schnell")
    config = folder / "transformer" / "config.json"
    edit_json(config, in_channels=384, out_channels=64)
    refused(folder, "takes 384 channels and gives 64: inpainting and image-to-image models need a picture")
    edit_json(config, in_channels=64, out_channels=None, pooled_projection_dim=40)
    refused(folder, "cannot be loaded")
    edit_json(config, pooled_projection_dim=32, patch_size=2)
    refused(folder, "has patch_size 2, so its pipeline packs latents in another way")
    for kind in (
        *("FluxFillPipeline", "FluxControlPipeline", "FluxControlNetPipeline", "FluxKontextPipeline"),
        *("FluxPriorReduxPipeline", "Flux2Pipeline"),
    ):
        edit_json(folder / "model_index.json", _class_name=kind)
        refused(folder, f"is a {kind}, as its model_index.json says: memedge exports Stable Diffusion 1.x, 2.x, SDXL,")
