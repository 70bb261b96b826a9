"""Tokenizers in the public layouts, with small vocabularies of their own: none can be downloaded here."""

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

EMOJI = Path(__file__).parents[1] / "tiny" / "emoji"
END = "<|endoftext|>"
EXTRA_IDS = 100  # of T5's: masks of its training
MORE_ROWS = 28  # of T5's embeddings than its tokenizer has tokens
# What T5's tokenizer makes of some characters before all else: SentencePiece's nmt_nfkc has many more.
CHARACTERS = {
    "\ufb01": "fi",
    "\u212b": "\u00c5",
    "e\u0301": "\u00e9",
    "\u2460": "1",
    "\uff01": "!",
    "\u3000": " ",
    "\t": " ",
    "\n": " ",
}
WORDS = ["a", "on", "of", "photo", "star", "zebra", "ski", "s", "ing", "very", "long", "prompt"]


def clip(folder: Path, padding: str = END, length: int = 77) -> None:
    """Write a tokenizer of CLIP's kind: the embedded model's vocabulary."""
    AutoTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=length, pad_token=padding).save_pretrained(
        folder
    )


def t5(folder: Path, length: int = 512) -> int:
    """Write a tokenizer of T5's kind, in the layout of the public tokenizer.json; return how many tokens it has."""
    letters = [*map(chr, range(33, 127)), *"\u00e9\u00c5"]
    pieces = [("▁", -2.0), *((f"▁{word}", -4.0) for word in WORDS), *((letter, -7.0) for letter in letters)]
    pieces += [(word, -5.0) for word in WORDS if len(word) > 1]
    special = ["<pad>", "</s>", "<unk>"]
    extra = [f"<extra_id_{number}>" for number in reversed(range(EXTRA_IDS))]
    vocabulary = [*((name, 0.0) for name in special), *pieces, *((name, 0.0) for name in extra)]
    places = {name: place for place, (name, _) in enumerate(vocabulary)}
    added = [
        {
            "id": places[name],
            "content": name,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": True,
        }
        for name in (*special, *extra)
    ]
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    end: dict[str, Any] = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    space = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(CHARACTERS)).decode()},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {**space, "prepend_scheme": "first"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequences[0], end],
            "pair": [sequences[0], end, sequences[1], end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [places["</s>"]], "tokens": ["</s>"]}},
        },
        "decoder": {**space, "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": places["<unk>"], "vocab": vocabulary, "byte_fallback": False},
    }
    config = {
        "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added},
        "additional_special_tokens": extra[::-1],
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": EXTRA_IDS,
        "legacy": True,
        "model_max_length": length,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def charsmap(replacements: Mapping[str, str]) -> bytes:
    """Return SentencePiece's precompiled map of characters: a double-array trie over UTF-8, and what to put there.

    A node in place p has the label of the byte that leads to it, and an offset: p ^ offset is its base, and its child
    by byte c is in place base ^ c. Where a key ends, the unit at the base is the place of its text, with the top bit.
    """
    trie: dict[int, Any] = {}
    text = b""
    for key, value in sorted(replacements.items()):
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(text)  # no key has the byte 0
        text += value.encode() + b"\0"
    units, bases = {0: 0}, set[int]()

    def put(place: int, label: int, node: dict[int, Any]) -> None:
        base = next(b for b in range(1 << 20) if b not in bases and not any(b ^ c in units for c in (0, *node)))
        bases.add(base)
        units[place] = label | (0 in node) << 8 | (place ^ base) << 10
        for byte, child in node.items():
            units[base ^ byte] = child | 1 << 31 if byte == 0 else 0  # taken
        for byte, child in node.items():
            if byte:
                put(base ^ byte, byte, child)

    put(0, 0, trie)
    size = (max(units) // 256 + 1) * 256
    return struct.pack(f"<{size + 1}I", 4 * size, *(units.get(place, 0) for place in range(size))) + text
