"""Pruning of the embedded model, against plain definitions: what is zeroed, what is given back, what is compared."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TINY = Path(__file__).parents[2] / "bench" / "tiny"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(TINY))
    from model import Model

    sys.path.remove(str(TINY))
    return Model.load(TINY / "emoji")


def test_similarity_is_that_of_its_windows():
    from nemo import ssim

    a, b = torch.rand(2, 3, 2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for first, second in zip(a.numpy(), b.numpy(), strict=True):
        windows = []
        for x, y in ((r, c) for r in range(5) for c in range(5)):
            for one, other in zip(first[:, x : x + 5, y : y + 5], second[:, x : x + 5, y : y + 5], strict=True):
                (va, cov), (_, vb) = np.cov(one.ravel(), other.ravel(), ddof=0)
                light = (2 * one.mean() * other.mean() + 1e-4) / (one.mean() ** 2 + other.mean() ** 2 + 1e-4)
                windows.append(light * (2 * cov + 9e-4) / (va + vb + 9e-4))
        expected.append(np.mean(windows))
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))


def test_blocked_neurons_give_nothing_and_come_back(model):
    from nemo import activations, blocked, encode, layers

    of, states = layers(model, ("down", "mid")), encode(model, ["a swan"])
    assert [name.split("_")[0] for name in of] == ["down"] * 3 + ["mid"]
    before, name = activations(states, of), list(of)[1]
    with blocked(of, {name: {3, 5}}):
        within = activations(states, of)
    after = activations(states, of)
    assert (within[name] == 0).nonzero().tolist() == [[0, 3], [0, 5]]
    for other in of:
        assert torch.equal(after[other], before[other])
        assert other == name or torch.equal(within[other], before[other])


def test_shared_neurons_are_counted_over_prompts():
    from nemo import shared

    found = [{"a": {1, 2}, "b": {1}}, {"a": {2, 3}}, {}, {"a": {2}, "b": set()}]
    assert shared(found, 1) == {"a": {1, 2, 3}, "b": {1}}
    assert shared(found, 2) == {"a": {2}, "b": set()}


def test_wanda_zeroes_the_rows_top_that_memorized_prompts_use_more(model, monkeypatch):
    import wanda
    from nemo import encode

    monkeypatch.setattr(wanda, "STEPS", 1)
    memorized, clean = encode(model, ["a swan", "squid"]), encode(model, ["blossom", "a boy"])
    high, low = (wanda.norms(model, states) for states in (memorized, clean))
    kept = {name: layer.weight.data.clone() for name, layer in wanda.layers(model).items()}
    zeroed, total = wanda.zero(model, memorized, clean, 0.1)
    gone = 0
    for name, layer in wanda.layers(model).items():
        score, other = kept[name].abs() * high[name], kept[name].abs() * low[name]
        for row in range(len(score)):
            top = score[row].argsort(descending=True)[: round(0.1 * score.shape[1])]
            expected = kept[name][row].clone()
            expected[[j for j in top.tolist() if score[row, j] > other[row, j]]] = 0
            assert torch.equal(layer.weight.data[row], expected)
        gone += int((layer.weight.data != kept[name]).sum())
        layer.weight.data = kept[name]
    assert zeroed == gone > 0 and total == sum(weight.numel() for weight in kept.values())
