"""The table of evasions: every one is tried on both guards, and the prompt as it is does not pass the detector."""

import pytest


@pytest.mark.slow
def test_table(monkeypatch, capsys):
    import evasion

    for name, value in (("CAPTIONS", 1), ("SEEDS", 2), ("STEPS", 3)):
        monkeypatch.setattr(evasion, name, value)
    evasion.main()
    rows = [line.strip("|").rsplit(" | ", 4) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [5] * 12
    assert [cell.strip() for cell in rows[1][:3]] == ["the prompt as it is", "0", "0"]
    assert all(
        int(passes) <= 1 and int(again) <= int(passes) for _, *counts in rows[1:] for passes, again in [counts[:2]]
    )
