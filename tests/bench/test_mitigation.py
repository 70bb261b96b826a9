"""What the mitigation bench measures with, on pictures whose answer is known: no npm, no generation."""

from collections import Counter

import numpy as np
import pytest
import torch


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Drawings that are easy to tell apart, each a smooth random picture; two per concept. A small gallery of them."""
    import mitigation
    from dataset import GROUPS, Emoji, assign_groups, describe

    monkeypatch.setattr(mitigation, "POSES", 8)
    concepts = {f"thing-{i}": [2 * i, 2 * i + 1] for i in range(sum(GROUPS.values()))}
    coarse = torch.from_numpy(np.random.default_rng(0).random((2 * len(concepts), 4, 5, 5), dtype=np.float32))
    coarse[:, :3] *= coarse[:, 3:]  # premultiplied: no colour exceeds its alpha
    smooth = torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear", align_corners=True)
    np.savez(tmp_path / "icons.npz", icons=(smooth * 255).byte().permute(0, 2, 3, 1).numpy())
    (tmp_path / "captions.json").write_text(describe(assign_groups(concepts, 0), [0.5] * 4, [0.3] * 4))
    return Emoji(tmp_path)


def test_random_words_are_put_in_and_nothing_else_changes():
    from mitigation import random_words

    caption, vocabulary = "the small the sign", ["alpha", "beta", "gamma"]
    for count in (1, 2, 4):
        changed = random_words(caption, count, vocabulary, 0)
        assert changed == random_words(caption, count, vocabulary, 0)
        words = changed.split()
        assert [word for word in words if word not in vocabulary] == caption.split()
        assert len(words) == 4 + count
    many = [random_words(caption, 1, vocabulary, seed).split() for seed in range(300)]
    places = Counter(next(k for k, word in enumerate(words) if word in vocabulary) for words in many)
    assert set(places) == set(range(5)) and min(places.values()) > 30  # before each word and behind the last: 60 each
    assert random_words(caption, 0, vocabulary, 0) == caption


def test_replicas_are_of_one_and_the_same_picture():
    """Three copies of one picture, two of another, one with other mean colours, and noise."""
    from mitigation import replicated

    training = torch.rand(5, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    shifted = training[3:4] * 0.5 + torch.tensor([0.5, 0.1, 0.0, 0.3])[None, :, None, None]
    pictures = torch.cat([training[[3, 3, 1, 1]], shifted, noise])
    replica, picture = replicated(pictures, training)
    assert picture == 3
    assert replica.tolist() == [True, True, False, False, True, False]
    assert not replicated(noise, training)[0].any()


def test_gallery_knows_concepts_in_poses_that_it_has_not_seen(data):
    from dataset import Pose
    from mitigation import NEAREST, Gallery

    gallery, generator = Gallery(data), torch.Generator().manual_seed(99)
    captions = gallery.concepts[::20]
    shares = []
    for caption in captions:
        drawing = data.captions[caption].drawings[0]
        pictures = Pose.draw(8, generator).place(data.icons[[drawing] * 8])
        shares.append((gallery.rank(pictures, caption) < NEAREST).float().mean().item())
    assert np.mean(shares) > 0.6
    noise = torch.rand(200, 4, 32, 32, generator=generator)
    ranks = torch.stack([gallery.rank(noise, caption) for caption in captions]).float()
    assert (ranks < NEAREST).float().mean() < 4 * NEAREST / len(gallery.concepts)


def test_gallery_leaves_a_drawing_out(data):
    """A picture of a concept's first drawing is no longer its nearest one when that drawing is left out."""
    from dataset import Pose
    from mitigation import Gallery

    gallery, generator = Gallery(data), torch.Generator().manual_seed(99)
    caption = gallery.concepts[3]
    first, second = data.captions[caption].drawings
    pictures = Pose.draw(32, generator).place(data.icons[[first] * 32])
    whole, without, other = (gallery.rank(pictures, caption, d).float().mean() for d in (None, first, second))
    assert without > whole + 20
    assert other <= whole + 20


def test_rank_is_the_number_of_nearer_concepts(data):
    """Against the definition, concept by concept."""
    from generate import similarity
    from mitigation import POOL, Gallery

    gallery = Gallery(data)
    picture = data.fixed[:3]
    small = torch.nn.functional.avg_pool2d(picture, POOL)
    similar = similarity(small, gallery._pictures)
    best = torch.stack([similar[:, gallery._concept == c].max(1).values for c in range(len(gallery.concepts))], 1)
    caption = gallery.concepts[17]
    expected = (best > best[:, 17, None]).sum(1)
    assert gallery.rank(picture, caption).tolist() == expected.tolist()


def test_summary_counts_what_it_is_given():
    from mitigation import Judged, Run, summarise

    first = Judged(np.arange(8) < 5, np.arange(8) >= 4, np.zeros(8, dtype=bool))
    second = Judged(np.arange(8) < 4, np.ones(8, dtype=bool), np.ones(8, dtype=bool))
    runs = [Run(torch.zeros(8, 4, 32, 32), [], float("nan"), norms) for norms in ((1.0, 2.0), (3.0, 4.0))]
    row = summarise("nothing", runs, [first, second])
    assert (row.replicas, row.memorized, row.captions) == (9 / 16, 1, 2)
    assert (row.concept, row.other_drawings, row.new) == (12 / 16, 8 / 16, (3 + 4) / 16)
    assert (row.norm_own, row.norm_unseen) == (2.0, 3.0)
    assert row.at_target is row.iterations is row.distance is row.seconds is None
