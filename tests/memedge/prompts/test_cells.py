"""Prompts in CSV cells: what a spreadsheet would run, and the way back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memedge.prompts.cells import EARLY_COLUMNS, SCORE_COLUMNS, guarded, unguarded
from memedge.scoring.score_files import ScoreRow


def test_the_columns_are_those_of_score_files() -> None:
    assert ScoreRow._fields == (*SCORE_COLUMNS, *EARLY_COLUMNS)


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", " =", "\u3000@", "'=", "''\t"])
def test_what_would_run_gets_an_apostrophe(sign: str) -> None:
    assert guarded(f"{sign}cmd|' /C calc'!A0") == f"'{sign}cmd|' /C calc'!A0"


@pytest.mark.parametrize("prompt", ["", "a cat", "'quoted'", "a = b", "1+1", "(a:1.2)", "'", "''a"])
def test_other_prompts_stay(prompt: str) -> None:
    assert guarded(prompt) == prompt


@given(st.text() | st.text("'=+-@ \t\r\n=a"))
def test_the_way_back(prompt: str) -> None:
    cell = guarded(prompt)
    assert unguarded(cell) == prompt
    assert not cell.strip().startswith(("=", "+", "-", "@"))
