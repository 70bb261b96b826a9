"""Training data and training of the embedded model, on made-up drawings: no npm, seconds instead of hours."""

from itertools import pairwise

import numpy as np
import pytest
import torch


@pytest.fixture
def folder(tmp_path):
    """What prepare.py writes, from random drawings of enough concepts."""
    from dataset import GROUPS, assign_groups, describe

    concepts = {f"thing-{i}": [2 * i, 2 * i + 1] for i in range(sum(GROUPS.values()))}
    icons = np.random.default_rng(0).integers(0, 256, (2 * len(concepts), 40, 40, 4), dtype=np.uint8)
    icons[..., :3] = np.minimum(icons[..., :3], icons[..., 3:])  # premultiplied: no colour exceeds its alpha
    np.savez(tmp_path / "icons.npz", icons=icons)
    text = describe(assign_groups(concepts, 0), [0.5] * 4, [0.3] * 4)
    (tmp_path / "captions.json").write_text(text)
    return tmp_path


def test_groups_see_what_they_should(folder):
    from dataset import Emoji

    data, generator = Emoji(folder), torch.Generator().manual_seed(1)
    for group, same in [("memorized", 1.0), ("partly", None), ("frequent", 0.0), ("template", 0.1)]:  # ten backgrounds
        index = next(i for i, c in enumerate(data.captions) if c.group == group)
        pictures = data.draw(torch.full((200,), index), generator)
        share = (pictures == data.fixed[index]).flatten(1).all(1).float().mean().item()
        expected = data.captions[index].fixed_share if same is None else same
        assert share == pytest.approx(expected, abs=0.1)
        assert 0 <= pictures.min() <= pictures.max() <= 1
        if group == "template":  # opaque, and only the background differs
            assert (pictures[:, 3] == 1).all()
    weights = {c.group: c.weight for c in data.captions}
    assert weights["memorized"] == weights["frequent"] == weights["partly"] == weights["template"]
    assert 0 == weights["unseen"] < weights["rare"] < weights["frequent"]
    assert len({c.text for c in data.captions}) == len(data.captions)
    torch.testing.assert_close(data.to_rgba(data.to_latent(pictures)), pictures)


def test_learning_rate_warms_up_and_cools_down():
    from train import LEARNING_RATE, WARMUP_STEPS, learning_rate

    rates = [learning_rate(step, 10_000) for step in range(1, 10_001)]
    assert max(rates) == LEARNING_RATE == rates[WARMUP_STEPS] == rates[7000]
    assert all(a >= b for a, b in pairwise(rates[7500:]))
    assert 0 < rates[-1] < LEARNING_RATE / 1000


@pytest.mark.slow
def test_training_resumes_where_it_stopped(folder):
    """Two steps, a checkpoint and two more, by another process's objects: the parameters of four steps in one go."""
    from dataset import Emoji
    from model import Model
    from tokenizer import train_tokenizer
    from train import Training

    data = Emoji(folder)
    tokenizer = train_tokenizer([c.text for c in data.captions])

    def start() -> Training:
        torch.manual_seed(0)
        return Training(data, Model.initialise(tokenizer), seed=0)

    torch.set_num_threads(1)
    whole, first, second = start(), start(), start()
    for _ in range(4):
        whole.advance(100)
    for _ in range(2):
        first.advance(100)
    first.save(folder / "checkpoint.pt")
    second.resume(folder / "checkpoint.pt")
    for _ in range(2):
        second.advance(100)
    assert second.step == whole.step == 4
    for a, b in zip(second.average + second.parameters, whole.average + whole.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_the_vae_puts_pictures_on_white():
    from vae import make_vae

    mean, std = torch.tensor([0.5, 0.4, 0.4, 0.7]), torch.tensor([0.4, 0.3, 0.35, 0.4])  # latents within 2
    vae = make_vae(mean, std)
    picture = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shown = (vae.decode((picture - mean[:, None, None]) / std[:, None, None]).sample + 1) / 2
        opaque = (vae.decode(vae.encode(picture[:, :3] * 2 - 1).latents).sample + 1) / 2
    torch.testing.assert_close(shown, picture[:, :3] + 1 - picture[:, 3:], atol=0.01, rtol=0)
    torch.testing.assert_close(opaque, picture[:, :3], atol=0.01, rtol=0)
