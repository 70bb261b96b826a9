"""Qwen-Image's engines predict what diffusers' own pipeline predicts within its call; what they don't do is refused."""

import shutil

import numpy as np
import pytest
import qwen_image
import torch
from diffusers import QwenImagePipeline
from flow_reference import LOW, predictions, statistics
from loading import edit_json

import memedge
from memedge import Detector
from memedge.engine.errors import ExportError, InputError

SIZE = (256, 128)
TOKENS = 40
# The third is cut at 40; the template's end, too, in the second.
PROMPTS = [
    "a cat",
    "a red star and a photo of the left background of the objects and a color and a size and a cat and "
    "a star, a cat, a red cat, text and a cat",
    "a cat and a red star on the left, " * 9,
    "<|endoftext|>a",
    " é\n",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return qwen_image.build(tmp_path_factory.mktemp("qwen-image") / "model")


@pytest.fixture(scope="module")
def detector(model):
    memedge.export_engine(model, model.parent / "engine", size=SIZE, max_sequence_length=TOKENS)
    return Detector.load(model.parent / "engine", provider="cpu")


@pytest.fixture(scope="module")
def pipe(model):
    pipe = QwenImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def embeddings(pipe, prompts):
    return pipe.encode_prompt(list(prompts), max_sequence_length=TOKENS)


def test_embeddings(detector, pipe):
    expected, mask = (one.numpy() for one in embeddings(pipe, [*PROMPTS, ""]))
    ids, _ = detector.engine.tokenize([*PROMPTS, ""])
    found = detector.engine.backend.memory.download(detector.engine.encode(ids).tensor)
    assert found[..., -1].tolist() == mask.tolist()
    assert np.abs(found[..., :-1] - expected).max() < 1e-5


def packed(latents):
    return QwenImagePipeline._pack_latents(latents, len(latents), *latents.shape[1:])


def unpacked(tokens):
    return QwenImagePipeline._unpack_latents(tokens, *SIZE, 8)[0, :, 0]


def test_scores(detector, pipe):
    """Norm and alignment are those of the pipeline's own predictions; its embeddings give the same."""
    noise = torch.from_numpy(detector.engine.directory.baseline.sample)
    scores = detector.score(PROMPTS)
    assert scores.truncated.tolist() == [False, False, True, False, False]

    def predict(prompt, sigma):
        def call(sigmas):
            pipe(
                prompt,
                "",
                height=SIZE[0],
                width=SIZE[1],
                sigmas=sigmas,
                num_inference_steps=1,
                latents=packed(noise),
                output_type="latent",
                max_sequence_length=TOKENS,
            )

        return [unpacked(found) for found in predictions(pipe, call, sigma)]

    for place, prompt in enumerate(PROMPTS):
        norm, alignment = statistics(noise[0], predict(prompt, 1.0), predict(prompt, LOW))
        assert scores.norm[place] == pytest.approx(norm, rel=1e-4)
        assert scores.alignment[place] == pytest.approx(alignment, abs=1e-4)
    states, mask = embeddings(pipe, PROMPTS[:2])
    given = detector.score_embeddings(states, mask=mask)
    np.testing.assert_allclose(given.norm, scores.norm[:2], rtol=1e-4)
    np.testing.assert_allclose(given.alignment, scores.alignment[:2], atol=1e-4)
    alone, mask = embeddings(pipe, PROMPTS[:1])
    assert mask is None  # nothing is padded
    assert detector.score_embeddings(alone).norm[0] == pytest.approx(scores.norm[0], rel=1e-4)


def test_embeddings_refused(detector):
    def refuses(words, *arguments, **more):
        with pytest.raises(InputError, match=words) as caught:
            detector.score_embeddings(*arguments, **more)
        assert str(caught.value).endswith(".")

    width = qwen_image.WIDTH
    states = np.zeros((2, 5, width), np.float32)
    refuses("with ones and then zeros", states, mask=[[1, 1, 0, 1, 0], [1] * 5])
    refuses("with ones and then zeros", states, mask=[[1] * 4] * 2)
    refuses("without a token", states, mask=[[0] * 5, [1] * 5])
    refuses("have 41 tokens", np.zeros((1, 41, width)))
    refuses(rf"have shape \[1, 5, 3\]: this engine takes \[B, L, {width}\]", np.zeros((1, 5, 3)))
    refuses("There are no prompt embeddings", [])
    refuses("no pooled", states, states[:, 0])
    with pytest.raises(InputError, match="reads all tokens"):
        Detector.load(provider="cpu").score_embeddings(np.zeros((1, 24, 96)), mask=np.ones((1, 24)))


def test_manifest(detector):
    manifest = detector.engine.directory.manifest
    assert manifest.flow.terminal == 0.02
    assert manifest.flow.mu < 0.5  # the picture is smaller than those that shift by it
    assert len(manifest.flow.sigmas) == 50
    assert manifest.token_lengths == (34 + TOKENS + 5,)
    assert [tap.shape for tap in manifest.taps] == [(128, 48)]
    assert detector.engine.first_word == 0  # the template's states are left out


def test_explain(detector):
    assert [word.text for word in detector.explain("a cat and a star").words] == ["a", "cat", "and", "a", "star"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("zero_cond_t", True, "takes pictures"),
        ("use_additional_t_cond", True, "takes pictures"),
        ("use_layer3d_rope", True, "makes layers"),
        ("guidance_embeds", True, "told a guidance scale"),
    ],
)
def test_traits(model, tmp_path, field, value, words):
    copy = shutil.copytree(model, tmp_path / "model")
    edit_json(copy / "transformer" / "config.json", **{field: value})
    with pytest.raises(ExportError, match=words):
        memedge.export_engine(copy, tmp_path / "none")


KINDS = ["EditPipeline", "EditPlusPipeline", "InpaintPipeline", "ControlNetPipeline", "LayeredPipeline"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_pipelines(model, tmp_path, kind):
    copy = shutil.copytree(model, tmp_path / "model")
    edit_json(copy / "model_index.json", _class_name=f"QwenImage{kind}")
    with pytest.raises(ExportError, match=f"is a QwenImage{kind}, as its model_index.json says"):
        memedge.export_engine(copy, tmp_path / "none")
