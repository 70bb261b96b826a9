"""Z-Image's transformer, and Qwen3 as its text encoder, against diffusers' own pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
import velocities
import z_image
from loading import edit_json, load, refused

from memedge import Detector, export_engine
from memedge.engine.embeddings import unpack
from memedge.engine.errors import ExportError, InputError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.call import Call
from memedge.export.sources.torch_checkpoint import TorchCheckpoint

SLOW = pytest.mark.slow  # tracing takes most of a minute
SIZE, TOKENS = (256, 128), 40
CALL = {"height": SIZE[0], "width": SIZE[1], "max_sequence_length": TOKENS}
PROMPTS = [
    "a cat",
    "a red star and a photo of the left background of the objects and a color and a size and a cat and a star",
    "a cat and a red star on the left, " * 9,  # cut at 40 tokens
    "<|endoftext|>a <|endoftext|>",  # the padding's token, within
    " e\u0301\n",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return z_image.build(tmp_path_factory.mktemp("z-image") / "checkpoint")


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    export_engine(checkpoint, checkpoint.parent / "engine", size=SIZE, max_sequence_length=TOKENS)
    return Detector.load(checkpoint.parent / "engine", "cpu")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return velocities.load(checkpoint)


def velocity(pipeline, sigma: float, noise: np.ndarray, prompt: str) -> list[torch.Tensor]:
    """Return v_c and v_0 of a call from noise [1, C, H, W]; the transformer gives −v, of both in one call."""
    found: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda _module, _inputs, output: found.extend(output[0]))
    try:
        with quiet():
            latents = torch.from_numpy(noise)
            pipeline(prompt, latents=latents, num_inference_steps=1, sigmas=[sigma], output_type="latent", **CALL)
    finally:
        hook.remove()
    return [-one[:, 0].double()[None] for one in found]


def encoded(pipeline) -> list[torch.Tensor]:
    with quiet(), torch.no_grad():
        own, _ = pipeline.encode_prompt(list(PROMPTS), max_sequence_length=TOKENS)
    return own


def same_embeddings(found: np.ndarray, expected: list[torch.Tensor]) -> None:
    for own, theirs in zip(found, expected, strict=True):
        assert own[:, -1].tolist() == [1] * len(theirs) + [0] * (TOKENS - len(theirs))
        np.testing.assert_allclose(own[: len(theirs), :-1], theirs, atol=1e-5)
        assert not own[len(theirs) :].any()


def test_modules_agree_with_the_pipeline(checkpoint, pipeline):
    own = TorchCheckpoint(load(checkpoint, call=Call(SIZE, TOKENS)))
    assert own.lengths == (TOKENS + 5,)  # the template's end has room of its own
    states = own.encode(np.array([own.tokenizers[0].encode(prompt).ids for prompt in PROMPTS]))
    same_embeddings(states, encoded(pipeline))
    lengths = states[..., -1].sum(axis=1)
    assert lengths[0] < 32 < lengths[1] < TOKENS == lengths[2]  # captions are filled up to 32, and to 64
    noise = np.random.default_rng(0).standard_normal(own.latent_shape, dtype=np.float32)
    for prompt, row in zip(PROMPTS[:2], states, strict=False):
        expected = velocity(pipeline, 0.168, noise[None], prompt)[0][0].numpy()
        np.testing.assert_allclose(own.predict(noise, 168, row), expected + noise / 0.832, atol=1e-5)


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
    by_states = detector.score_embeddings(encoded(pipeline), operands="uncond_delta", alignment="channel")
    np.testing.assert_allclose(by_states.norm, scores.norm, rtol=1e-4)
    np.testing.assert_allclose(by_states.alignment, scores.alignment, atol=1e-4)
    with pytest.raises(InputError, match=r"have 41 tokens: this engine takes at most 40.*\.$"):
        detector.score_embeddings([np.zeros((41, z_image.WIDTH))])


@SLOW
def test_engine(detector, pipeline):
    engine = detector.engine
    manifest = engine.directory.manifest
    assert manifest.flow.shift == 6
    assert len(manifest.flow.sigmas) == 50
    assert manifest.flops.prefix > 0.1 * manifest.flops.unet  # the layer of the picture alone, and more
    assert [tap.shape for tap in manifest.taps] == [(128, 96)]
    assert engine.first_word == 3  # behind the template's <|im_start|>user and a line's end
    ids, _ = engine.tokenize(PROMPTS)
    states = engine.backend.memory.download(engine.encode(ids).tensor)
    same_embeddings(states, encoded(pipeline))
    alone, _ = unpack(manifest, states[0])
    assert detector.score_embeddings(alone[None]).norm[0] == pytest.approx(detector.score(PROMPTS[:1]).norm[0])
    words = detector.explain("a cat and a star").words
    assert [word.text for word in words] == ["a", "cat", "and", "a", "star"]


def test_sizes(checkpoint):
    for call, words in [
        (Call((128, 112)), "not a multiple of 32 tokens"),
        (Call((8192, 16384)), "has no positions for 16384x8192 with 512 tokens"),
        (Call((128, 128), 3), "has no room for a prompt beside the 3 tokens of the template"),
    ]:
        with pytest.raises(ExportError, match=words):
            TorchCheckpoint(load(checkpoint, call=call))
    whole = TorchCheckpoint(load(checkpoint))
    assert whole.latent_shape == (16, 128, 128)
    assert whole.tokens == 512


def test_other_models_are_refused(tmp_path):
    folder = z_image.build(tmp_path / "checkpoint")
    edit_json(folder / "transformer" / "config.json", siglip_feat_dim=1152)
    refused(folder, "siglip_feat_dim 1152, so it takes pictures besides the prompt")
    for kind in ("ZImageOmniPipeline", "ZImageControlNetPipeline", "ZImageInpaintPipeline"):
        edit_json(folder / "model_index.json", _class_name=kind)
        refused(folder, f"is a {kind}, as its model_index.json says")


def test_template_that_trims_prompts_is_refused(tmp_path):
    folder = z_image.build(tmp_path / "checkpoint")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(file.read_text().replace("message.content", "message.content | trim"))
    refused(folder, "does not read a prompt within its template as it reads it alone")
