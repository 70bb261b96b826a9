"""CLIP's vocabulary and tokenization from their definitions; shares no code with `tokenizers` or transformers.

The merges are those of the open_clip_torch wheel, which is installed with --no-deps: nothing of it is imported, and the
torchvision that it asks for is built for CUDA, so that beside torch for processors transformers cannot be imported.
"""

import gzip
import json
import re
import unicodedata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SIZE = 49408
MERGES = SIZE - 2 * 256 - 2  # the other tokens: each byte, each byte that ends a word, BOS, EOS
TOKENS = 77
WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B))
)
ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_symbols() -> list[str]:
    """Return the character that stands for each byte: itself if it can be seen, else one from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]


def read_merges() -> list[tuple[str, str]]:
    """Return the pairs to merge, the first ones first; skip the test if open_clip_torch is not installed."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("no CLIP vocabulary: run `python -m pip install --no-deps open_clip_torch`")
    content = gzip.decompress(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes())
    lines = content.decode().split("\n")[1 : MERGES + 1]  # after the version; what follows are CLIP's unused merges
    return [(first, second) for first, second in (line.split() for line in lines)]


class Definition:
    """CLIP's tokenization in plain Python: slow, and short enough to be checked by reading.

    Text is cleaned as transformers without ftfy cleans it: NFC, white space as one space, each character in lower case.
    """

    def __init__(self, pad: str):
        self.pad = pad
        self.special = {BOS, EOS, pad}  # SD 2's padding, too, is one wherever it stands in a prompt
        self.merges = read_merges()
        letters = sorted(byte_symbols())
        words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, self.merges), BOS, EOS]
        self.ids = {word: number for number, word in enumerate(words)}
        assert len(words) == len(self.ids) == SIZE
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._symbols = byte_symbols()

    def __call__(self, prompt: str) -> tuple[list[int], bool]:
        """Return 77 ids, and whether the prompt was cut."""
        parts = re.split("|".join(f"({re.escape(token)})" for token in self.special), prompt)
        found = [number for part in parts if part for number in self._encode(part)]
        cut = len(found) > TOKENS - 2
        ids = [self.ids[BOS], *found[: TOKENS - 2], self.ids[EOS]]
        return ids + [self.ids[self.pad]] * (TOKENS - len(ids)), cut

    def _encode(self, part: str) -> list[int]:
        if part in self.special:
            return [self.ids[part]]
        text = "".join(" " if c in WHITE_SPACE else c for c in unicodedata.normalize("NFC", part))
        text = "".join(c.lower() for c in text)
        return [self.ids[token] for word in _words(text) for token in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        """Join the pair that comes first in the list of merges, wherever it is, until there is none."""
        tokens = [self._symbols[byte] for byte in word.encode()]
        tokens[-1] += "</w>"
        while known := [pair for pair in pairwise(tokens) if pair in self._rank]:
            best = min(known, key=self._rank.__getitem__)
            merged: list[str] = []
            for token in tokens:
                if merged and (merged[-1], token) == best:
                    merged[-1] += token
                else:
                    merged.append(token)
            tokens = merged
        return tokens


def _words(text: str) -> list[str]:
    """Return endings such as 's, letters in a row, single digits, and other characters in a row."""
    words: list[str] = []
    start = 0
    while start < len(text):
        end = start + 1
        ending = next((e for e in ENDINGS if text.startswith(e, start)), "")
        kind = _kind(text[start])
        if ending:
            end = start + len(ending)
        elif kind != "number":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            words.append(text[start:end])
        start = end
    return words


def _kind(character: str) -> str:
    if character in WHITE_SPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def write_tokenizer(folder: Path, definition: Definition) -> None:
    """Write the tokenizer folder as Stable Diffusion's repositories have it, from before tokenizer.json."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(definition.ids))
    merges = (f"{first} {second}\n" for first, second in definition.merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(merges))
    bos, eos = (
        {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for token in (BOS, EOS)
    )
    tokens = {"bos_token": bos, "eos_token": eos, "unk_token": eos}
    config = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()} | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": TOKENS,
        "pad_token": EOS,  # where the next file says otherwise, it is right
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens | {"pad_token": definition.pad}))
