"""The ladder's rungs compute the published statistics, and its report is whole."""

import json
import sys

import pytest
import reference
import torch

EARLY = {"early_proven", "early_conformal", "early_screen"}
STAGES = {"published", "minimal", "cached", "prefix", "engine"} | EARLY


def test_torch_rungs_are_the_method(checkpoint):
    """All four, with the prompt-independent part split off torch's own graph, against the plain reference."""
    from torch_stages import Torch

    prompt = "zebra on skis"
    (expected,) = reference.statistics(checkpoint, [prompt], 1)
    for name, stage in Torch(checkpoint, "fp32").stages().items():
        norm, alignment = stage(prompt)
        assert norm == pytest.approx(expected["norm"], rel=1e-4), name
        assert alignment == pytest.approx(expected["uncond_delta/channel"], abs=1e-4), name


@torch.no_grad()
def test_prefix_is_split_off(checkpoint):
    """What is left of torch's graph does not know the noise or the timestep, and is shorter."""
    from torch_stages import Torch, split

    model = Torch(checkpoint, "fp32")
    rest = split(model.unet, model.sample, 981, model.encode(""))
    assert [node.name for node in rest.graph.nodes if node.op == "placeholder"] == ["states"]
    states = model.encode("a star")
    expected = model.unet(model.sample, 981, states, return_dict=False)[0]
    torch.testing.assert_close(rest(states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_report(tmp_path, monkeypatch, capsys):
    import ladder

    monkeypatch.setattr(ladder, "ROUNDS", {"emoji": 1})
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--precision", "fp32", "--json", str(tmp_path / "ladder.json")])
    ladder.main()
    rungs = json.loads((tmp_path / "ladder.json").read_text())
    keys = {"model", "backend", "precision", "stage", "seconds_per_verdict", "skipped_share"}
    assert all(rung.keys() == keys for rung in rungs)
    assert {rung["stage"] for rung in rungs} == STAGES
    assert {rung["backend"] for rung in rungs} == {"torch", "cpu", "openvino"}
    assert all(rung["seconds_per_verdict"] > 0 and 0 <= rung["skipped_share"] <= 1 for rung in rungs)
    assert all(rung["skipped_share"] <= 0.5 for rung in rungs if rung["stage"] != "early_screen")
    assert "early_screen" in capsys.readouterr().out
