"""The flow-matching model: its data and training; the one that is kept memorizes as docs/transformers.md says."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow  # tracing and the embedded model's data


@pytest.fixture
def pipeline(tmp_path):
    from flow_model import FlowModel

    FlowModel.trained().save(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_fifth_of_the_concepts():
    from dataset import Caption
    from flow_train import fifth

    captions = [
        Caption(f"{template} {group} {number}", group, f"{group} {number}", "held-out", ((0, 1),))
        for group in ("memorized", "seen")
        for number in range(12)
        for template in ("a", "the")
    ]
    kept = fifth(captions)
    assert [caption.concept for caption in kept[::2]] == [f"{g} {n}" for g in ("memorized", "seen") for n in (1, 6, 11)]
    assert len(kept) == 12


def test_noise_levels():
    """Logit-normal and shifted: half of them below the shift of one half, and none outside (0, 1)."""
    from flow_train import noise_levels

    sigma = noise_levels(20_000, torch.Generator().manual_seed(0))
    assert float((sigma < 2 / 3).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert 0 < float(sigma.min()) < float(sigma.max()) < 1


def test_attention_is_diffusers_own():
    from flow_model import FlowModel
    from flow_train import EagerJointAttention

    torch.manual_seed(0)
    transformer = FlowModel.initialise().transformer.eval()
    states, pooled = torch.randn(2, 32, 192), torch.randn(2, 192)
    call = {"encoder_hidden_states": states, "pooled_projections": pooled, "timestep": torch.tensor([100.0, 900.0])}
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        expected = transformer(hidden_states=latents, **call).sample
        for block in transformer.transformer_blocks:
            block.attn.processor = EagerJointAttention()
        torch.testing.assert_close(transformer(hidden_states=latents, **call).sample, expected, rtol=1e-4, atol=1e-5)


def test_states_are_the_pipelines(pipeline):
    from diffusers import StableDiffusion3Pipeline
    from flow_model import TOKENS, FlowModel

    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline, text_encoder_3=None, tokenizer_3=None)
    prompts = ["the pink heart sign", ""]
    with torch.no_grad():
        expected = loaded.encode_prompt(*[prompts] * 3, max_sequence_length=TOKENS, do_classifier_free_guidance=False)
    states, pooled = FlowModel.load(pipeline).encode(prompts)
    torch.testing.assert_close(states, expected[0])
    torch.testing.assert_close(pooled, expected[2])


def test_memorized_captions_have_larger_norms(pipeline, tmp_path):
    """Of captions that print one picture, each is further from the empty prompt than those that show forty."""
    from flow_model import TOKENS

    from memedge import Detector, export_engine

    export_engine(pipeline, tmp_path / "engine", max_sequence_length=TOKENS)
    memorized = ["the pink heart sign", "a bison", "cute raccoon"]
    frequent = ["mouse face sticker", "videocassette", "picture of a smiling face with open mouth and smiling eyes"]
    norm = Detector.load(tmp_path / "engine", "cpu").score(memorized + frequent).norm
    assert np.min(norm[:3]) > np.max(norm[3:])
