"""SentencePiece's maps of characters: what leads outside of itself never gets to the library, which would panic."""

import base64
import json
import struct

import numpy as np
import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import edit_json
from tokenizers.normalizers import Precompiled
from transformers import AutoTokenizer

from memedge.engine.charsmap import LONGEST, check_charsmap
from memedge.engine.errors import IntegrityError
from memedge.engine.tokenizer import PromptTokenizer
from memedge.export.sources.tokenizers import padding_tokenizers

GOOD = vocabularies.charsmap(vocabularies.CHARACTERS)
TRIE = 4 + int.from_bytes(GOOD[:4], "little")  # where the texts begin
TEXT = "".join(map(chr, [*range(1, 0x3200), *range(0xF900, 0x10000)]))


def check(content: bytes) -> None:
    check_charsmap(base64.b64encode(content).decode())


def test_a_map_does_what_it_says():
    """The bench's trie is built as it is documented, so the library finds the way through it."""
    check(GOOD)
    for key, value in vocabularies.CHARACTERS.items():
        assert Precompiled(GOOD).normalize_str(f"a{key}b") == f"a{value}b"


def unit(place: int, value: int) -> bytes:
    return GOOD[: 4 + 4 * place] + struct.pack("<I", value) + GOOD[8 + 4 * place :]


LEAF = next(p for p in range(TRIE // 4 - 1) if GOOD[7 + 4 * p] >> 7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is cut off"),
        (GOOD[:-1], "is cut off"),
        (GOOD[:100], "is cut off"),
        (struct.pack("<I", 2**32 - 1) + GOOD[4:], "is cut off"),
        (struct.pack("<I", TRIE - 8) + GOOD[4:], "is cut off"),
        (GOOD + b"\xff\0", "is no text"),
        (GOOD + b"a" * LONGEST + b"a\0", f"makes more than {LONGEST} bytes of one"),
        (unit(0, 1 << 30), "leads outside"),
        (unit(LEAF, 1 << 31 | len(GOOD)), "leads outside of its texts"),
        (unit(LEAF, 1 << 31 | GOOD.index("é".encode()) - TRIE + 1), "leads outside of its texts"),
    ],
)
def test_refused(content, words):
    with pytest.raises(ValueError, match=f"its map of characters {words}$"):
        check(content)
    with pytest.raises(ValueError, match="is no base64"):
        check_charsmap("?")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_what_passes_never_panics(changes):
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    try:
        check(bytes(content))
    except ValueError:
        return
    assert len(Precompiled(bytes(content)).normalize_str(TEXT)) <= LONGEST * len(TEXT)


def test_in_a_tokenizer(tmp_path):
    """T5's, in the layout of the public file; its map is looked at as the rest of the file is."""
    vocabularies.t5(tmp_path / "public")
    path = tmp_path / "tokenizer.json"
    source = AutoTokenizer.from_pretrained(tmp_path / "public")
    padding_tokenizers([source], [9])[0][0].save(str(path))
    ids = PromptTokenizer([path], [9])(["a\u3000star\uff01"])[0][0]
    known = [name for name, _ in json.loads(path.read_text())["model"]["vocab"]]
    places = [known.index(name) for name in ("▁a", "▁star", "!", "</s>")]
    np.testing.assert_array_equal(ids, [*places, 0, 0, 0, 0, 0])
    broken = base64.b64encode(unit(0, 1 << 30)).decode()
    edit_json(path, normalizer={"type": "Precompiled", "precompiled_charsmap": broken})
    with pytest.raises(IntegrityError, match="its map of characters leads outside"):
        PromptTokenizer([path], [9])
