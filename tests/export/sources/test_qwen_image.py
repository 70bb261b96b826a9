"""Qwen-Image's transformer, and Qwen2.5-VL as its text encoder, against diffusers' own pipeline."""

from pathlib import Path

import numpy as np
import pytest
import qwen_image
import torch
import velocities
from diffusers import QwenImagePipeline
from loading import edit_json, load, refused

from memedge import Detector, export_engine
from memedge.engine.errors import ExportError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.call import Call
from memedge.export.sources.torch_checkpoint import TorchCheckpoint

SLOW = pytest.mark.slow  # tracing takes most of a minute
SIZE, TOKENS = (256, 128), 40
CALL = {"height": SIZE[0], "width": SIZE[1], "max_sequence_length": TOKENS}
PROMPTS = [
    "a cat",
    "a red star and a photo of the left background of the objects and a color and a size and a cat and "
    "a star, a cat, a red cat, text",  # there is no room for all of the template's end
    "a cat and a red star on the left, " * 9,  # cut at 40 tokens
    "<|endoftext|>a",  # the padding's token, within
    " e\u0301\n",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return qwen_image.build(tmp_path_factory.mktemp("qwen-image") / "checkpoint")


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    export_engine(checkpoint, checkpoint.parent / "engine", size=SIZE, max_sequence_length=TOKENS)
    return Detector.load(checkpoint.parent / "engine", "cpu")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return velocities.load(checkpoint)


def velocity(pipeline, sigma: float, noise: np.ndarray, prompt: str) -> list[torch.Tensor]:
    """Return v_c and v_0 of a call from noise [1, C, H, W], unpacked, before what guidance makes of them."""
    latents = QwenImagePipeline._pack_latents(torch.from_numpy(noise), *noise.shape)
    found = velocities.predictions(pipeline, sigma, latents, prompt=prompt, negative_prompt="", **CALL)
    return [QwenImagePipeline._unpack_latents(one, *SIZE, 8)[:, :, 0] for one in found]


def encoded(pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    with quiet(), torch.no_grad():
        return pipeline.encode_prompt(list(prompts), max_sequence_length=TOKENS)


def test_modules_agree_with_the_pipeline(checkpoint, pipeline):
    own = TorchCheckpoint(load(checkpoint, call=Call(SIZE, TOKENS)))
    assert own.lengths == (34 + TOKENS + 5,)
    states = own.encode(np.array([own.tokenizers[0].encode(prompt).ids for prompt in PROMPTS]))
    expected, mask = encoded(pipeline, PROMPTS)
    np.testing.assert_array_equal(states[..., -1], mask)
    np.testing.assert_allclose(states[..., :-1], expected, atol=1e-5)
    noise = np.random.default_rng(0).standard_normal(own.latent_shape, dtype=np.float32)
    for prompt, row in zip(PROMPTS[:2], states, strict=False):
        found = velocity(pipeline, 0.168, noise[None], prompt)[0][0].numpy()
        np.testing.assert_allclose(own.predict(noise, 168, row), found + noise / 0.832, atol=1e-5)


@SLOW
def test_engine_agrees_with_the_pipeline(detector, pipeline):
    noise = detector.engine.directory.baseline.sample
    scores = detector.score(PROMPTS, operands="uncond_delta", alignment="channel")
    assert scores.truncated.tolist() == [False, False, True, False, False]
    for prompt, norm, alignment in zip(PROMPTS, scores.norm, scores.alignment, strict=True):
        found = [tuple(velocity(pipeline, sigma, noise, prompt)) for sigma in velocities.SIGMAS]
        expected = velocities.statistics(noise, found)
        assert expected[0] > 0.1  # or it would be a comparison of rounding
        np.testing.assert_allclose(norm, expected[0], rtol=1e-4)
        np.testing.assert_allclose(alignment, expected[1], atol=1e-4)
    states, mask = encoded(pipeline, PROMPTS)
    by_states = detector.score_embeddings(states, mask=mask, operands="uncond_delta", alignment="channel")
    np.testing.assert_allclose(by_states.norm, scores.norm, rtol=1e-4)
    np.testing.assert_allclose(by_states.alignment, scores.alignment, atol=1e-4)
    states, mask = encoded(pipeline, PROMPTS[:1])
    assert mask is None  # nothing is padded
    np.testing.assert_allclose(detector.score_embeddings(states).norm, scores.norm[:1], rtol=1e-4)


@SLOW
def test_engine(detector, pipeline):
    engine = detector.engine
    manifest = engine.directory.manifest
    assert manifest.flow.terminal == 0.02
    assert len(manifest.flow.sigmas) == 50
    assert [tap.shape for tap in manifest.taps] == [(128, 48)]
    assert engine.first_word == 0  # the template's states are left out
    ids, _ = engine.tokenize(PROMPTS)
    found = engine.backend.memory.download(engine.encode(ids).tensor)
    expected, mask = encoded(pipeline, PROMPTS)
    np.testing.assert_array_equal(found[..., -1], mask)
    np.testing.assert_allclose(found[..., :-1], expected, atol=1e-5)
    words = detector.explain("a cat and a star").words
    assert [word.text for word in words] == ["a", "cat", "and", "a", "star"]


def test_sizes(checkpoint):
    for call, words in [
        (Call((8 * 17, 128)), "has no tokens for 128x136: give a --size in steps of 16 pixels"),
        (Call((8 * 14340, 128)), "has no positions for 128x114720 with 512 tokens"),
    ]:
        with pytest.raises(ExportError, match=words):
            TorchCheckpoint(load(checkpoint, call=call))
    whole = TorchCheckpoint(load(checkpoint))
    assert whole.latent_shape == (16, 128, 128)
    assert whole.tokens == 512


@pytest.mark.parametrize(
    ("field", "meaning"),
    [
        ("zero_cond_t", "it takes pictures besides the prompt"),
        ("use_additional_t_cond", "it takes pictures besides the prompt"),
        ("use_layer3d_rope", "it makes layers of pictures"),
        ("guidance_embeds", "it is told a guidance scale"),
    ],
)
def test_other_transformers_are_refused(tmp_path, field, meaning):
    folder = qwen_image.build(tmp_path / "checkpoint")
    edit_json(folder / "transformer" / "config.json", **{field: True})
    refused(folder, f"has {field} true, so {meaning}")


def test_more_channels_are_refused(tmp_path):
    folder = qwen_image.build(tmp_path / "checkpoint")
    edit_json(folder / "transformer" / "config.json", in_channels=128)
    refused(folder, "takes 128 channels and gives 64: inpainting")


def test_other_pipelines_are_refused(tmp_path):
    folder = qwen_image.build(tmp_path / "checkpoint")
    for kind in ("Edit", "EditPlus", "EditInpaint", "Inpaint", "ControlNet", "ControlNetInpaint", "Layered"):
        edit_json(folder / "model_index.json", _class_name=f"QwenImage{kind}Pipeline")
        refused(folder, f"is a QwenImage{kind}Pipeline, as its model_index.json says")
