"""Z-Image's engines predict what diffusers' own pipeline predicts within its call; what they don't do is refused."""

import shutil

import numpy as np
import pytest
import torch
import z_image
from diffusers import ZImagePipeline
from flow_reference import LOW, predictions, statistics
from loading import edit_json

import memedge
from memedge import Detector
from memedge.engine.errors import ExportError, InputError

SIZE = (256, 128)
TOKENS = 40
# Of 1 token, of so many that the caption is filled up to 64, cut at 40, with the padding's token and without letters.
PROMPTS = [
    "a cat",
    "a red star and a photo of the left background of the objects and a color and a size and a cat and a star",
    "a cat and a red star on the left, " * 9,
    "<|endoftext|>a <|endoftext|>",
    " é\n",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return z_image.build(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def detector(model):
    memedge.export_engine(model, model.parent / "engine", size=SIZE, max_sequence_length=TOKENS)
    return Detector.load(model.parent / "engine", provider="cpu")


@pytest.fixture(scope="module")
def pipe(model):
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encoded(pipe):
    return pipe.encode_prompt(list(PROMPTS), max_sequence_length=TOKENS)


def states(detector, prompts):
    ids, _ = detector.engine.tokenize(prompts)
    return detector.engine.backend.memory.download(detector.engine.encode(ids).tensor)


def test_embeddings(detector, pipe):
    expected, empty = encoded(pipe)
    found = states(detector, [*PROMPTS, ""])
    for own, theirs in zip(found, [*expected, empty[0]], strict=True):
        assert own[:, -1].tolist() == [1] * len(theirs) + [0] * (TOKENS - len(theirs))
        assert np.abs(own[: len(theirs), :-1] - theirs.numpy()).max() < 1e-5
        assert not own[len(theirs) :].any()
    lengths = found[..., -1].sum(axis=1)
    assert lengths.min() < 32 < lengths[1] < TOKENS == lengths[2]


def test_scores(detector, pipe):
    """Norm and alignment are those of the pipeline's own predictions; its embeddings give the same."""
    noise = torch.from_numpy(detector.engine.directory.baseline.sample)
    scores = detector.score(PROMPTS)
    assert scores.truncated.tolist() == [False, False, True, False, False]

    def predict(prompt, sigma):
        def call(sigmas):
            pipe(
                prompt,
                *SIZE,
                sigmas=sigmas,
                num_inference_steps=1,
                latents=noise.clone(),
                output_type="latent",
                max_sequence_length=TOKENS,
            )

        (found,) = predictions(pipe, call, sigma)
        return [-one[:, 0] for one in found]

    for place, prompt in enumerate(PROMPTS):
        norm, alignment = statistics(noise[0], predict(prompt, 1.0), predict(prompt, LOW))
        assert scores.norm[place] == pytest.approx(norm, rel=1e-4)
        assert scores.alignment[place] == pytest.approx(alignment, abs=1e-4)
    given = detector.score_embeddings(encoded(pipe)[0])
    np.testing.assert_allclose(given.norm, scores.norm, rtol=1e-4)
    np.testing.assert_allclose(given.alignment, scores.alignment, atol=1e-4)
    with pytest.raises(InputError, match=r"have 41 tokens: this engine takes at most 40.*\.$"):
        detector.score_embeddings([np.zeros((41, z_image.WIDTH))])


def test_manifest(detector):
    manifest = detector.engine.directory.manifest
    assert manifest.flow.shift == 6
    assert len(manifest.flow.sigmas) == 50
    assert manifest.masked
    assert manifest.token_lengths == (TOKENS + 5,)
    assert manifest.flops.prefix > 0.05 * manifest.flops.unet  # the layers of the picture alone
    assert [tap.shape for tap in manifest.taps] == [(128, 96)]
    assert detector.engine.first_word == 3  # behind <|im_start|>user and the line's end


def test_explain(detector):
    """Of each word, the score falls where it is masked, and the template stays around what is left."""
    words = detector.explain("a cat and a star").words
    assert [word.text for word in words] == ["a", "cat", "and", "a", "star"]
    ids, _ = detector.engine.tokenize(["a cat"])
    kept = detector.engine.tokenizer.only(ids[0], [3, 4])
    assert kept.tolist() == ids[0].tolist()


def refused(folder, words, size=None, tokens=None):
    with pytest.raises(ExportError, match=words) as caught:
        memedge.export_engine(folder, folder.parent / "none", size=size, max_sequence_length=tokens)
    assert str(caught.value).endswith(".")


def test_refused(model, tmp_path):
    refused(model, "not a multiple of 32 tokens", (128, 112))
    refused(model, "has no room for a prompt", (128, 128), 3)
    copy = shutil.copytree(model, tmp_path / "model")
    edit_json(copy / "transformer" / "config.json", siglip_feat_dim=1152)
    refused(copy, "siglip_feat_dim 1152, so it takes pictures")
    index = copy / "model_index.json"
    for kind in ("ZImageOmniPipeline", "ZImageControlNetPipeline", "ZImageInpaintPipeline"):
        edit_json(index, _class_name=kind)
        refused(copy, f"is a {kind}")
