"""Which words carry a score: against scores of ids masked by hand, on any text, in print, and every mistake."""

import json
import warnings

import numpy as np
import pytest
from command_line import fails, memedge
from engines import edit_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memedge import Detector, InputError
from memedge.commands.explain import print_explanation
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.manifest import Preset
from memedge.engine.tokenizer import PromptTokenizer
from memedge.explain import Masks
from memedge.heat import BLUE, RED, WHITE, colour, draw

BOS, EOS, LENGTH = 3240, 3241, 24  # of the embedded engine, which pads with EOS


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer([EMBEDDED_ENGINE / "tokenizer.json"], [LENGTH])


@pytest.fixture(scope="module")
def explanation(detector):
    return detector.explain("the left luggage sign")


def score(detector, ids):
    """The calibrated score of ids, by the formula."""
    engine, calibration = detector.engine, detector.info.calibration
    norm, aligned = engine.statistics(engine.encode(np.array([ids])), calibration.alignment, calibration.operands)
    return calibration.gamma_norm * norm[0] + calibration.gamma_alignment * aligned[0]


def test_significance_is_the_fall_of_the_score(detector, explanation):
    """Four words of a token each, masked by hand."""
    assert [word.text for word in explanation.words] == explanation.prompt.split()
    own = detector.engine.tokenize([explanation.prompt])[0][0]
    assert own.tolist() == [BOS, *own[1:5], *[EOS] * 19]
    for i, word in enumerate(explanation.words, start=1):
        masked = own.copy()
        masked[i] = EOS
        assert word.significance == pytest.approx(score(detector, own) - score(detector, masked), abs=1e-4)
        assert [token.significance for token in word.tokens] == [word.significance]
    assert (explanation.kind, explanation.method, explanation.passes) == ("calibrated", "mask", 5 * 2)
    assert explanation.threshold == detector.info.calibration.threshold
    assert explanation.score == pytest.approx(detector.score([explanation.prompt]).score[0], abs=1e-4)


def test_the_memorized_concept_carries_the_score(explanation):
    """What the docstring's table measures, on one of its captions."""
    significance = {word.text: word.significance for word in explanation.words}
    assert max(significance, key=significance.get) == "luggage"
    assert all(significance["luggage"] > 3 * significance[word] for word in ("the", "sign"))


def test_tokens_of_a_word(detector):
    """A word's tokens alone, and all at once: padding in their places, and the others stay in theirs."""
    prompt = "caf\u00e9 star"
    explanation = detector.explain(prompt)
    own = detector.engine.tokenize([prompt])[0][0]
    word = explanation.words[0]
    texts = [token.text for token in word.tokens]
    assert "".join(texts) == "caf\u00e9"
    assert texts[-1] == "\u00e9"  # one character, two tokens: masked together
    count = int(np.flatnonzero(own == EOS)[0]) - 2
    assert count == len(texts) + 1
    last, whole = own.copy(), own.copy()
    last[count - 1 : count + 1] = EOS
    whole[1 : count + 1] = EOS
    base = score(detector, own)
    assert word.tokens[-1].significance == pytest.approx(base - score(detector, last), abs=1e-4)
    assert word.significance == pytest.approx(base - score(detector, whole), abs=1e-4)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt(detector, prompt):
    explanation = detector.explain(prompt)
    assert (explanation.prompt, explanation.score, explanation.words) == (prompt, 0, ())


@pytest.mark.parametrize("prompt", ["star", "  Star \n", "don't", "\U0001f469\u200d\U0001f467", "\u0130"])
def test_the_only_word_carries_it_all(detector, prompt):
    (word,) = (explanation := detector.explain(prompt)).words
    assert word.text == prompt.strip()
    assert word.significance == explanation.score != 0


def test_last_word_is_left_out(detector):
    """The mask of the last word is the prompt without it."""
    explanation = detector.explain("cute star, icon")
    without = detector.score(["cute star,"]).score[0]
    assert explanation.words[-1].significance == pytest.approx(explanation.score - without, abs=1e-4)


def test_words_are_the_users_own(tokenizer):
    """Case, accents, apostrophes, numbers, punctuation, symbols."""
    for prompt, words in {
        "a CAT,dog": ["a", "CAT", ",", "dog"],
        "don't I\u2019ll 'quoted'": ["don't", "I\u2019ll", "'", "quoted", "'"],
        "in 2023 (long_hair:1.2)": ["in", "2023", "(", "long_hair", ":", "1", ".", "2", ")"],
        "e\u0301tude \u2764\ufe0f": ["e\u0301tude", "\u2764\ufe0f"],
        "\u0939\u093f\u0928\u094d\u0926\u0940": ["\u0939\u093f\u0928\u094d\u0926\u0940"],
        "x<|endoftext|>y": ["x", "<|endoftext|>", "y"],
        "a\x1cb": ["a", "\x1c", "b"],
    }.items():
        masks = Masks(tokenizer, prompt)
        assert [word.text for word in masks.words(np.zeros(len(masks.ids)))] == words


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from(["<|endoftext|>", "!", "'s", "cat ", " ", "star " * 30])), max_size=20
    )
)
def test_words_cover_any_text(tokenizer, parts):
    prompt = "".join(parts)
    masks = Masks(tokenizer, prompt)
    scores = np.arange(len(masks.ids), dtype=float)
    words, end = masks.words(scores), 0
    ids = tokenizer([prompt])[0][0]
    assert masks.ids[0].tolist() == ids.tolist()
    assert len(np.unique(masks.ids, axis=0)) == len(masks.ids)
    for word in words:
        assert prompt[end : word.start].strip() == ""
        assert word.text == prompt[word.start : word.end] != ""
        end, place = word.end, word.start
        for token in word.tokens:
            assert place <= token.start < token.end <= word.end
            assert token.text == prompt[token.start : token.end]
            place = token.end
            # A word is read where one of its tokens is.
            assert token.significance is None or word.significance is not None
    assert prompt[end:].strip() == ""
    found = tokenizer.tokens(prompt)
    spans = [(token.start, token.end) for word in words for token in word.tokens]
    assert all(sum(s <= t.start and t.end <= e for s, e in spans) == 1 for t in found)
    read = [token.place for token in found if token.place is not None]
    assert read == list(range(1, len(read) + 1))
    assert tokenizer.only(ids, read).tolist() == ids.tolist()
    assert tokenizer.only(ids, []).tolist() == tokenizer([""])[0][0].tolist()


def test_what_is_not_read(detector):
    explanation = detector.explain("star " * 60)
    assert len(explanation.words) == 60
    assert [word.significance is None for word in explanation.words] == [False] * 22 + [True] * 38
    assert all(word.tokens[0].significance == word.significance for word in explanation.words)


def test_kinds_of_score(engine, copy):
    prompt = "ab c"
    plain = Detector.load(engine)
    explanation = plain.explain(prompt)
    assert (explanation.kind, explanation.threshold) == ("norm", None)
    assert explanation.score == pytest.approx(plain.score([prompt]).norm[0], rel=1e-4)
    preset = {"family": "a test", "gamma_norm": 2.0, "gamma_alignment": -3.0}
    assert set(preset) == set(Preset.__struct_fields__)
    edit_manifest(copy, lambda m: m.update(preset=preset))
    published = Detector.load(copy)
    explanation = published.explain(prompt)
    assert (explanation.kind, explanation.threshold) == ("published", None)
    assert explanation.score == pytest.approx(published.score([prompt]).score[0], rel=1e-4)


def test_batches_change_nothing(engine):
    prompt, steps = "abc def ghi jkl", []
    whole, single = Detector.load(engine, "cpu"), Detector.load(engine, "cpu")
    single._batch = 2
    found = single.explain(prompt, progress=lambda *step: steps.append(step))
    assert [w.significance for w in found.words] == pytest.approx(
        [w.significance for w in whole.explain(prompt).words], abs=1e-4 * found.score
    )
    total = found.passes // single._engine.draws
    assert steps == [(min(i, total), total) for i in range(2, total + 2, 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a star"],), "Prompt 1 is list, not text"),
        ((None,), "not text"),
        (("\ud800",), "UTF-8"),
        (("a star", "magic"), "no method='magic': use 'mask' or 'gradient'"),
    ],
)
def test_mistakes(detector, arguments, words):
    with pytest.raises(InputError, match=words):
        detector.explain(*arguments)


def test_colours():
    assert colour(0, 1) == WHITE
    assert (colour(2, 2), colour(-2, 2)) == (RED, BLUE)
    assert all(c < 255 for c in colour(1, 2))


def test_printed(detector, explanation, capsys):
    print_explanation(explanation, detector.info)
    out, err = capsys.readouterr()
    assert out.startswith(f"{explanation.prompt}\n")
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(w.text, f"{w.significance:+.4f}") for w in explanation.words]
    assert max(rows, key=lambda row: len(row[-1].strip("+-.0123456789")))[0] == "luggage"
    assert "threshold" in err
    odd = detector.explain("[bold]x[/] " + "star " * 30)
    print_explanation(odd, detector.info)
    out = capsys.readouterr().out
    assert out.startswith("[bold]x[/] star")
    assert "not read" in out
    print_explanation(detector.explain(""), detector.info)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(detector, tmp_path, suffix):
    path = tmp_path / f"heat.{suffix}"
    assert draw(detector.explain("costs $x$ \\frac, " + "star " * 3000), path)
    if suffix == "svg":
        assert path.read_text().startswith("<?xml")
    else:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not draw(detector.explain("\u4eac\u5267"), path)
        assert draw(detector.explain(""), path)
    assert list(tmp_path.iterdir()) == [path]


def test_command(detector, tmp_path):
    path = tmp_path / "heat.png"
    done = memedge("explain", "A star, cat", "--provider", "cpu", "--json", "-o", path)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), detector.explain("A star, cat")
    assert [word["text"] for word in found["words"]] == ["A", "star", ",", "cat"]
    assert [word["significance"] for word in found["words"]] == pytest.approx(
        [word.significance for word in expected.words], abs=1e-4
    )
    assert (found["kind"], found["method"], found["passes"]) == ("calibrated", "mask", expected.passes)
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_usage(tmp_path):
    for arguments, words, code in [
        (("a", "-o", tmp_path / "heat.jpg"), ".svg", 1),
        (("a", "-o", tmp_path / "absent" / "heat.png"), "--output", 1),
        (("a", "--engine", tmp_path), "holds no manifest.json", 1),
        ((b"\xff".decode(errors="surrogateescape"), "--provider", "cpu"), "UTF-8", 1),
        ((), "PROMPT", 2),
        (("a", "b"), "unexpected", 2),
    ]:
        fails(memedge("explain", *arguments), words, code)
    assert list(tmp_path.iterdir()) == []
