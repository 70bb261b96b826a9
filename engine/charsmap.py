"""SentencePiece's precompiled map of characters, as T5's tokenizers have it, looked at before the library follows it.

It is the number of a trie's bytes, the trie, and the texts to put in, each with a zero behind it. The trie is a double
array (J. Aoe, IEEE TSE 15(9), 1989): node p has a base, p ^ offset, and its child by byte c is base ^ c, if that has
the label c. Where a key ends, the unit at the base says where its text begins. The library follows places without
looking where they lead, and panics outside.
"""

import base64
import binascii
from typing import Final

import numpy as np

LONGEST: Final = 64  # bytes that a character may become; NFKC's longest has 33
BLOCK: Final = 256  # children of a base are in its block


def check_charsmap(encoded: str) -> None:
    """Refuse a map, in base64, that leads outside of itself, or that makes much of a character.

    Raises:
        ValueError: as said.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("its map of characters is no base64") from None
    size = int.from_bytes(content[:4], "little")
    trie, texts = content[4 : 4 + size], content[4 + size :]
    if not size or size % (4 * BLOCK) or len(trie) != size or not texts.endswith(b"\0"):
        raise ValueError("its map of characters is cut off")
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise ValueError("its map of characters is no text") from None
    if max(map(len, texts.split(b"\0"))) > LONGEST:
        raise ValueError(f"its map of characters makes more than {LONGEST} bytes of one")
    units = np.frombuffer(trie, "<u4").astype(np.int64)
    node = units >> 31 == 0
    base = np.arange(len(units)) ^ (units >> 10 << (units >> 6 & 8))
    if (base[node] >= len(units)).any():
        raise ValueError("its map of characters leads outside")
    starts = units[base[node & (units >> 8 & 1 == 1)]] & ~(1 << 31)
    letters = np.frombuffer(texts, np.uint8)
    if (starts >= len(letters)).any() or (letters[starts] & 0xC0 == 0x80).any():  # within a character
        raise ValueError("its map of characters leads outside of its texts")
