"""Tokenizers from strangers: CLIP's and T5's shapes are read, all else is one sentence and no abort."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.errors import IntegrityError
from memedge.engine.tokenizer import PromptTokenizer

TOKENS = 24
TEXT = (EMBEDDED_ENGINE / "tokenizer.json").read_text()


def refused(path, words="."):
    with pytest.raises(IntegrityError, match=words) as caught:
        PromptTokenizer([path], [TOKENS])
    message = str(caught.value)
    assert message.isprintable() and message.endswith(".") and len(message) < 500


def put(place: str, value):
    """A change: the value goes to a place such as "padding/strategy"."""
    *parents, last = place.split("/")

    def change(found):
        for parent in parents:
            found = found[int(parent) if isinstance(found, list) else parent]
        found[last] = value

    return change


def replace(pattern: dict, content: str = " ") -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(ids: int) -> dict:
    """A post-processor with so many ids before a prompt."""
    token = {"id": "before", "ids": [1] * ids, "tokens": ["a"] * ids}
    places = [{"SpecialToken": {"id": "before", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": places, "pair": places, "special_tokens": {"before": token}}


@pytest.mark.parametrize(
    "change",
    [
        *(put("padding/strategy", {"Fixed": length}) for length in (10**12, 2**63, 2**40, 23, 0, -1)),
        *(put("padding/strategy", other) for other in ("BatchLongest", {"Fixed": "24"}, None)),
        put("padding/pad_to_multiple_of", 2**40),
        put("padding/direction", "Left"),
        put("padding/pad_id", 2**32),
        put("padding", None),
        put("truncation", None),
        put("truncation/stride", 23),
        put("truncation/max_length", 2**40),
        put("truncation/strategy", "OnlyFirst"),
        put("truncation/direction", "Left"),
        put("normalizer", replace({"Regex": "^(a|a|aa)+c$"})),
        put("normalizer", replace({"Regex": r"\\s+"}, "a" * 2000)),
        put("normalizer", replace({"String": "a"}, "a" * 2000)),
        put("normalizer", {"type": "Prepend", "prepend": "a"}),
        put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        put("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 9}),
        put("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}),
        put("pre_tokenizer/pretokenizers/0/pattern", {"Regex": "(a+)+$"}),
        put("pre_tokenizer/pretokenizers/0/behavior", "MergedWithPrevious"),
        put("pre_tokenizer", {"type": "UnicodeScripts"}),
        put("post_processor", None),
        put("post_processor", template(257)),
        put("post_processor", template(0)),
        put("post_processor", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
        put("model/type", "WordPiece"),
        put("model/dropout", 0.5),
        put("model/continuing_subword_prefix", "##"),
        put("model/vocab", {}),
        put("model/vocab", {"": 1}),
        put("model/vocab", {"a": 2**40}),
        put("model/merges", [["a", "not there"]]),
        put("added_tokens", [{"id": 1, "content": ""}]),
        put("version", "2.0"),
        put("stranger", 1),
        put("model/stranger", 1),
    ],
)
def test_other_shapes(tmp_path, change):
    found = json.loads(TEXT)
    change(found)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(found))
    refused(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'"\\ud800"', b"null", b"\xef\xbb\xbf{}"])
def test_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    refused(path, "is not a tokenizer")


def test_what_stands_twice_is_read_once(tmp_path):
    """The library reads what was looked at, whichever of two fields of one name it would take."""
    path = tmp_path / "tokenizer.json"
    first = json.dumps(json.loads(TEXT)["padding"] | {"strategy": {"Fixed": 2**40}})
    path.write_text(TEXT.replace('"padding"', f'"padding":{first},"padding"', 1))
    expected = PromptTokenizer([EMBEDDED_ENGINE / "tokenizer.json"], [TOKENS])(["a star"])[0]
    assert PromptTokenizer([path], [TOKENS])(["a star"])[0].tolist() == expected.tolist()


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("memedge.engine.tokenizer_file.SIZE_LIMIT", 1000)
    path = tmp_path / "tokenizer.json"
    path.write_text(TEXT)
    refused(path, "more than 64 MiB")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_change_ends_in_a_sentence(tmp_path_factory, data):
    content = bytearray(TEXT.encode())
    head = data.draw(st.booleans())  # what is not the vocabulary
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2500 if head else len(content) - 1))
        end = data.draw(st.integers(place, place + 9))
        content[place:end] = data.draw(st.one_of(st.binary(max_size=9), st.sampled_from([b"9" * 30, b"null", b"[]"])))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(content)
    try:
        PromptTokenizer([path], [TOKENS])(["a star", ""])
    except IntegrityError as error:
        assert str(error).isprintable() and len(str(error)) < 500
