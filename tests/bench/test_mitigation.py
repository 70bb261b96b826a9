"""What the mitigation bench measures with, on pictures whose answer is known: no npm, no generation."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

TINY = Path(__file__).parents[2] / "bench" / "tiny"
COUNTS = {"memorized": 20, "near": 4, "template": 3, "partly": 9, "frequent": 4, "seen": 20, "unseen": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What prepare.py would write of drawings that are easy to tell apart: smooth random pictures, five a concept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TINY.parent))
        patch.syspath_prepend(str(TINY))
        from concepts import Data
        from dataset import plan, save_captions
        from pictures import render
        from vae import encode, load_vae

        folder = tmp_path_factory.mktemp("data")
        names = [f"thing-{i}" for i in range(sum(COUNTS.values()) - 1)] + ["bicycle"]
        concepts = {name: [5 * i + k for k in range(5)] for i, name in enumerate(names)}
        coarse = torch.from_numpy(np.random.default_rng(0).random((5 * len(names), 4, 5, 5), dtype=np.float32))
        coarse[:, :3] *= coarse[:, 3:]  # premultiplied: no colour exceeds its alpha
        smooth = torch.nn.functional.interpolate(coarse, size=(80, 80), mode="bilinear", align_corners=True)
        icons = (smooth * 255).byte().permute(0, 2, 3, 1).numpy()
        pictures, captions = plan(concepts, 0, COUNTS)
        drawing = [picture.drawing % 5 for picture in pictures]
        (rendered, cover), vae = render(pictures, icons), load_vae(TINY / "emoji" / "vae")
        np.savez(folder / "pictures.npz", pictures=rendered, cover=cover, drawing=drawing)
        np.save(folder / "latents.npy", encode(vae, rendered).astype(np.float16))
        np.savez(folder / "drawings.npz", **{name: icons[places] for name, places in concepts.items()})
        save_captions(folder / "captions.json", captions)
        return Data(folder, vae)


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


def test_replicas_are_copies_of_any_training_picture(data):
    """Copies, also with noise and in other colours; and pictures of nothing."""
    rng = np.random.default_rng(1)
    shown = data.pictures[[30, 30, 30, 7]]
    noisy = (shown[1] + rng.normal(0, 4, shown[1].shape)).clip(0, 255).astype(np.uint8)
    pictures = np.stack([shown[0], noisy, 255 - shown[2], shown[3], rng.integers(0, 255, shown[0].shape, np.uint8)])
    replica, picture = data.replicated(pictures)
    assert replica.tolist() == [True, True, True, True, False]
    assert picture[:4].tolist() == [30, 30, 30, 7]


def test_gallery_knows_concepts_in_poses_that_it_has_not_seen(data):
    from concepts import NEAREST, Gallery
    from pictures import render, varied

    gallery, rng = Gallery(data), np.random.default_rng(99)
    concepts = gallery.concepts[::5]
    shares = []
    for concept in concepts:
        icon = data.drawings[concept][:1]
        pictures = render(varied(rng, (0,), 8), icon)[0]
        shares.append((gallery.ranks(pictures, concept) < NEAREST).mean())
    assert np.mean(shares) > 0.6
    noise = rng.integers(0, 255, (200, 64, 64, 3), dtype=np.uint8)
    ranks = np.stack([gallery.ranks(noise, concept) for concept in concepts])
    assert (ranks < NEAREST).mean() < 4 * NEAREST


def test_gallery_leaves_a_drawing_out(data):
    """A picture of a concept's first drawing is no longer its nearest one when that drawing is left out."""
    from concepts import Gallery
    from pictures import render, varied

    gallery = Gallery(data)
    concept = gallery.concepts[3]
    pictures = render(varied(np.random.default_rng(99), (0,), 32), data.drawings[concept][:1])[0]
    whole, without, other = (gallery.ranks(pictures, concept, d).mean() for d in (None, 0, 1))
    assert without > whole + 0.1
    assert other <= whole + 0.1


def test_rank_is_the_share_of_nearer_concepts(data):
    """Against the definition, concept by concept."""
    from concepts import Gallery, small

    gallery = Gallery(data)
    similar = small(data.pictures[:3]) @ gallery._small.T
    best = torch.stack([similar[:, gallery._concept == c].max(1).values for c in range(len(gallery.concepts))], 1)
    expected = (best > best[:, 17, None]).float().mean(1)
    assert gallery.ranks(data.pictures[:3], gallery.concepts[17]).tolist() == expected.tolist()


def test_a_background_is_not_looked_at():
    from concepts import small

    drawing = np.zeros((2, 64, 64, 3), dtype=np.int64)
    drawing[:, 20:40, 10:50] = 60
    grounds = np.array([[10, 90, 30], [120, 0, 50]])[:, None, None, :]
    vectors = small((drawing + grounds).astype(np.uint8))
    torch.testing.assert_close(vectors[0], vectors[1])


def test_summary_counts_what_it_is_given():
    from mitigation import Judged, Run, summarise

    first = Judged(np.arange(16) < 9, np.arange(16) >= 8, np.zeros(16, dtype=bool))
    second = Judged(np.arange(16) < 8, np.ones(16, dtype=bool), np.ones(16, dtype=bool))
    nothing = np.zeros((16, 64, 64, 3), np.uint8)
    runs = [Run(nothing, [], float("nan"), norms) for norms in ((1.0, 2.0), (3.0, 4.0))]
    row = summarise("nothing", runs, [first, second])
    assert (row.replicas, row.memorized, row.captions) == (17 / 32, 1, 2)
    assert (row.concept, row.other_drawings, row.new) == (24 / 32, 16 / 32, (7 + 8) / 32)
    assert (row.norm_own, row.norm_unseen) == (2.0, 3.0)
    assert row.at_target is row.iterations is row.distance is row.seconds is None
