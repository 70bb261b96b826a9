"""Embeddings of prompts that have as many tokens as they have: padded, masked, and refused in a sentence."""

import msgspec
import numpy as np
import pytest

from memedge import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import EngineDirectory
from memedge.engine.embeddings import pack, unpack
from memedge.engine.errors import InputError

L, D = 7, 4


@pytest.fixture(scope="module")
def manifest():
    own = EngineDirectory.open(EMBEDDED_ENGINE).manifest
    return msgspec.structs.replace(own, masked=True, tokens=L, state_width=D + 1, pooled_width=0)


def test_lengths(manifest):
    """A mask, a list, and what is unpacked give the same array: zeros behind, ones in the last column before."""
    states = np.random.default_rng(0).standard_normal((2, 5, D), dtype=np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    packed = pack(manifest, states, None, mask)
    assert packed.shape == (2, L, D + 1)
    assert packed[..., -1].tolist() == [[1] * 3 + [0] * 4, [1] * 5 + [0] * 2]
    assert not packed[0, 3:].any()
    for other in (mask.astype(bool), mask.astype(np.float32), mask.tolist()):
        np.testing.assert_array_equal(pack(manifest, states, None, other), packed)
    rows = [states[0, :3], states[1]]
    np.testing.assert_array_equal(pack(manifest, rows, None), packed)
    for place, row in enumerate(rows):
        alone, pooled = unpack(manifest, packed[place])
        np.testing.assert_array_equal(alone, row)
        assert pooled is None
    np.testing.assert_array_equal(pack(manifest, states[1:], None), packed[1:])


@pytest.mark.parametrize(
    ("states", "mask", "words"),
    [
        (np.zeros((2, 5, D)), [[1, 1, 0, 1, 0], [1] * 5], "with ones and then zeros"),
        (np.zeros((2, 5, D)), [[1, 2, 0, 0, 0], [1] * 5], "with ones and then zeros"),
        (np.zeros((2, 5, D)), [[1] * 4] * 2, "with ones and then zeros"),
        (np.zeros((2, 5, D)), "all", "with ones and then zeros"),
        (np.zeros((2, 5, D)), [[0] * 5, [1] * 5], "without a token"),
        (np.zeros((1, L + 1, D)), None, "have 8 tokens: this engine takes at most 7"),
        ([np.zeros((L + 1, D))], None, "have 8 tokens: this engine takes at most 7"),
        (np.zeros((1, 5, 3)), None, r"have shape \[1, 5, 3\]: this engine takes \[B, L, 4\]"),
        (np.zeros((1, 0, D)), None, "have shape"),
        ([np.zeros((5, 3))], None, "have shape"),
        ([], None, "There are no prompt embeddings"),
    ],
)
def test_refused(manifest, states, mask, words):
    with pytest.raises(InputError, match=words) as caught:
        pack(manifest, states, None, mask)
    assert str(caught.value).endswith(".")


def test_what_is_not_wanted(manifest):
    with pytest.raises(InputError, match="has no pooled prompt embeddings"):
        pack(manifest, np.zeros((1, 5, D)), np.zeros((1, 3)))
    with pytest.raises(InputError, match="reads all tokens of its prompts: leave the mask out"):
        Detector.load(provider="cpu").score_embeddings(np.zeros((1, 24, 96)), mask=np.ones((1, 24)))
