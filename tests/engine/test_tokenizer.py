"""Prompts become the token ids that Stable Diffusion's pipelines give them, with CLIP's real vocabulary.

An engine's tokenizer.json is made of a tokenizer folder as SD 1.4's and SD 2's repositories have it, as `export` does.
It is compared with transformers' CLIPTokenizer, called as the pipelines call it, and, as both are the same library
inside, with the definition in plain Python (clip_vocabulary.py).

Beyond these tests, by hand, on the 1219 public prompts: CLIPTokenizer of transformers 4.57, written in Python, gives
the same ids for all. With ftfy installed it first replaces curly quotes and HTML's &amp; and the like, which changes
one of them. Elsewhere it may differ in control and zero-width characters, U+FFFD, and Chinese characters in a row.
"""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from clip_vocabulary import BOS, EOS, TOKENS, Definition, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CLIPTokenizer

from memedge.engine.tokenizer import PromptTokenizer
from memedge.export.sources.tokenizers import padding_tokenizers
from memedge.prompts.files import read_prompts

PUBLIC = {"sd1_mem.txt": 500, "sd1_nmem.txt": 500, "sd2_mem.txt": 219}
PADDING = {"SD 1.4": EOS, "SD 2": "!"}
PROMPTS = [
    *("", " ", "\n\t ", "!", "!!! wow!!a!", "a" * 5000, "n " * 74, "n " * 75, "n " * 76, "7" * 75, "7" * 76),
    *(
        "don't I'LL 'S ''s",
        "e\u0301 \u00e9",
        "\u0130STANBUL \u039f\u03a3 \u01c5",
        "\u4eac\u5267",
        "\U0001f469\u200d\U0001f467",
    ),
    *("zero\u200bwidth \u200b", "a\xa0b\x85c\u2028d", "\x00a\x1cb", "\ufffd", "a&amp;b <b>", "\u201cquoted\u201d"),
    *(f"a {EOS} b", f"a{BOS}b", EOS, f"{EOS}!{EOS}"),
]


@pytest.fixture(scope="module", params=PADDING)
def tokenizers(request, tmp_path_factory):
    """The engine's tokenizer, transformers', and the definition."""
    definition = Definition(PADDING[request.param])
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder / "tokenizer", definition)
    (exported,), (tokens,) = padding_tokenizers([AutoTokenizer.from_pretrained(folder / "tokenizer")])
    exported.save(str(folder / "tokenizer.json"))
    assert tokens == TOKENS
    ours = PromptTokenizer([folder / "tokenizer.json"], [TOKENS])
    return ours, CLIPTokenizer.from_pretrained(folder / "tokenizer"), definition


@pytest.fixture(params=PUBLIC)
def public(request) -> list[str]:
    """One of the lists beside the repository, or in the folder that MEMEDGE_PROMPTS names."""
    named = os.environ.get("MEMEDGE_PROMPTS")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared" / "prompts"
    if not named and not folder.is_dir():
        pytest.skip("no public prompts beside the repository: name their folder with MEMEDGE_PROMPTS")
    prompts = list(read_prompts(folder / request.param))
    assert len(prompts) == PUBLIC[request.param]
    return prompts


def of_transformers(tokenizer, prompts):
    """Ids as the pipelines ask for them, and which prompts have more than 77 when they are not cut."""
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS).input_ids
    return np.array(ids), [len(tokenizer.tokenize(prompt)) > TOKENS - 2 for prompt in prompts]


def same(tokenizers, prompts):
    ours, theirs, definition = tokenizers
    ids, cut = ours(prompts)
    assert (ids.dtype, ids.shape) == (np.int64, (len(prompts), TOKENS))
    for expected, expected_cut in (
        of_transformers(theirs, prompts),
        [np.array(column) for column in zip(*map(definition, prompts), strict=True)],
    ):
        different = [p for p, a, b in zip(prompts, ids, expected, strict=True) if (a != b).any()]
        assert not different
        assert cut.tolist() == list(expected_cut)
    return cut


def test_vocabulary_is_clips():
    """Ids and lengths that are published, so that this file's construction of the vocabulary is not its own judge."""
    definition = Definition(EOS)
    assert [definition.ids[token] for token in ("!", BOS, EOS)] == [0, 49406, 49407]
    assert definition("hello world!")[0][:5] == [49406, 3306, 1002, 256, 49407]


def test_public_prompts(tokenizers, public):
    cut = same(tokenizers, public)
    assert 0 <= cut.sum() < 10


def test_odd_prompts(tokenizers):
    cut = same(tokenizers, PROMPTS)
    cut = dict(zip(PROMPTS, cut.tolist(), strict=True))
    assert not cut["n " * 75] and cut["n " * 76]
    assert not cut["7" * 75] and cut["7" * 76]


def test_exclamation_marks(tokenizers):
    """Words in SD 1.4; in SD 2 each one is a special token, because its padding is."""
    ours, _, definition = tokenizers
    so, marks = definition.ids["so</w>"], definition.ids["!!</w>"]
    expected = {EOS: [49406, so, marks] + [49407] * 74, "!": [49406, so, 0, 0, 49407] + [0] * 72}
    assert ours(["so!!"])[0].tolist() == [expected[definition.pad]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([BOS, EOS, EOS.upper(), "!", "'s", "a", " "])), max_size=30))
def test_any_text_as_transformers(tokenizers, parts):
    ours, theirs, _ = tokenizers
    prompt = "".join(parts)
    ids, cut = ours([prompt])
    expected, expected_cut = of_transformers(theirs, [prompt])
    assert ids.tolist() == expected.tolist()
    assert cut.tolist() == expected_cut


# Characters of a Unicode version that no library here is older than: what they know of newer ones differs.
KNOWN = st.characters(exclude_categories=["Cs"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(KNOWN), st.sampled_from([f"{BOS} ", f"{EOS} ", "!", "'s", "a", " "])), max_size=30))
def test_any_text_as_defined(tokenizers, parts):
    same(tokenizers, ["".join(parts)])


@pytest.mark.parametrize(("template", "before"), [("BOS $A EOS", [4]), ("$A EOS", [])])
def test_first_word(tmp_path, template, before):
    """It stands behind BOS, or first where tokenizers add none, as T5's; what is masked begins there."""
    pieces = [("pad", 0.0), ("EOS", 0.0), ("▁a", -1.0), ("▁b", -1.0), ("BOS", 0.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Metaspace()])
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("EOS", 1), ("BOS", 4)])
    length = 4 + len(before)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="pad")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = PromptTokenizer([tmp_path / "tokenizer.json"], [length])
    first, ids = ours.around[0][0], ours(["a b"])[0][0]
    assert first == len(before)
    assert ids.tolist() == [*before, 2, 3, 1, 0]
    assert [token.place for token in ours.tokens("a b")] == [first, first + 1]
    assert ours.only(ids, [first + 1]).tolist() == [*before, 0, 3, 1, 0]
    assert ours.only(ids, []).tolist() == [*before, 1, 0, 0, 0]


def test_template(tmp_path):
    """Ids before and behind every prompt; what is masked leaves the template whole."""
    tokenizer = Tokenizer(Unigram([("pad", 0.0), ("?", 0.0), ("a", -1.0), ("b", -1.0), ("c", -1.0)], unk_id=1))
    parts = [
        {"id": "before", "ids": [3, 4, 3], "tokens": ["b", "c", "b"]},
        {"id": "behind", "ids": [4, 4], "tokens": ["c"] * 2},
    ]
    tokenizer.post_processor = TemplateProcessing(single=["before", "$A", "behind"], special_tokens=parts)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="pad")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = PromptTokenizer([tmp_path / "tokenizer.json"], [8])
    ids, cut = ours(["ab", "abba", ""])
    assert ids.tolist() == [[3, 4, 3, 2, 3, 4, 4, 0], [3, 4, 3, 2, 3, 3, 4, 4], [3, 4, 3, 4, 4, 0, 0, 0]]
    assert cut.tolist() == [False, True, False]
    assert ours.around == [(3, 2)]
    assert [token.place for token in ours.tokens("ab")] == [3, 4]
    assert ours.only(ids[0], [4]).tolist() == [3, 4, 3, 0, 3, 4, 4, 0]
    assert ours.only(ids[0], [3]).tolist() == [3, 4, 3, 2, 4, 4, 0, 0]
