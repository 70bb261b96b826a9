"""The steps' reduction against its definition in float64, on both paths; what does not fit is refused."""

import numpy as np
import pytest
import torch

from memedge import InputError
from memedge.engine import reduction
from memedge.engine.errors import NotFiniteError
from memedge.engine.guidance_step import StepReduction

SHAPE = (3, 4, 5, 7)


@pytest.fixture(params=["native", "numpy"])
def path(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(reduction, "core", None)
    elif reduction.core is None:
        pytest.skip("the native core was not built")


def steps(dtype, count=3, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype) for _ in range(3)] for _ in range(count)]


def norms(values):
    return np.sqrt((values**2).sum((1, 2, 3)))


def expected(given, scale, shift):
    """Norm, change and move of each step, and its map, by the definition."""
    found, before = [], None
    for tensors in given:
        x, cond, uncond = (tensor.double().numpy() for tensor in tensors)
        eps, delta = scale * cond + shift * x, scale * (cond - uncond)
        nothing = np.zeros(len(x))
        change, move = (nothing, nothing) if before is None else (norms(eps - before[1]), norms(x - before[0]))
        found.append((norms(delta), change, move, (delta**2).sum(1)))
        before = x, eps
    return found


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.6, 0.8)])
def test_steps_are_as_defined(dtype, scale, shift):
    given, taken = steps(dtype), StepReduction()
    for tensors, (norm, change, move, map) in zip(given, expected(given, scale, shift), strict=True):
        found = taken.step(*tensors, scale, shift)
        for own, value in ((found.norm, norm), (found.change, change), (found.move, move), (taken.map(), map)):
            np.testing.assert_allclose(own, value, rtol=2e-6)


@pytest.mark.usefixtures("path")
def test_a_row_of_many_pixels_loses_no_digits():
    given, taken = steps(torch.float32, 2, (1, 2, 300, 301)), StepReduction()
    for tensors, (norm, change, move, _) in zip(given, expected(given, 1.0, 0.0), strict=True):
        found = taken.step(*tensors)
        np.testing.assert_allclose([found.norm, found.change, found.move], [norm, change, move], rtol=1e-6)


@pytest.mark.usefixtures("path")
def test_the_callers_tensors_may_change_after_a_step():
    given, taken = steps(torch.float32, 2), StepReduction()
    first = [tensor.clone() for tensor in given[0]]
    taken.step(*first)
    for tensor in first:
        tensor.zero_()
    np.testing.assert_allclose(taken.step(*given[1]).change, expected(given, 1.0, 0.0)[1][1], rtol=1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_gives_no_statistics(which, value):
    taken = StepReduction()
    taken.step(*steps(torch.float32)[0])
    tensors = steps(torch.float32)[1]
    tensors[which][1, 2, 3, 4] = value
    with pytest.raises(NotFiniteError, match="1 of 3 images"):
        taken.step(*tensors)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t[0], t[1], t[2][:2]], "same of all three"),
        (lambda t: [tensor[0] for tensor in t], "B, C, H, W"),
        (lambda t: [t[0].half(), *t[1:]], "x is float16 and eps_cond is float32"),
        (lambda t: ["x", *t[1:]], "x is a str"),
        (lambda t: [tensor[:0] for tensor in t], "no values|same of all three"),
        (lambda t: [tensor[:2] for tensor in t], "at the first step"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    tensors, taken = steps(torch.float32)[0], StepReduction()
    taken.step(*tensors)
    with pytest.raises(InputError, match=message):
        taken.step(*change(tensors))


def test_without_a_step_there_is_no_map():
    with pytest.raises(InputError, match="no step"):
        StepReduction().map()
