"""The norm over the guidance scale: of a perfect student it is its teacher's norm. Real ones: test_lcm, test_flux."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memedge.detectors.norm_guidance import NormOverGuidance
from memedge.engine.errors import InputError

SHAPE = (2, 3, 4, 5)  # of two draws


class Student:
    """Gives the guided predictions of a teacher whose own are random, for two prompts; the interface of Denoiser."""

    def __init__(self, told: float | None, *, norm_factor: float = 1.0, epsilon_factor: float = 1.0):
        rng = np.random.default_rng(0)
        self.uncond = rng.standard_normal(SHAPE)
        self.cond = rng.standard_normal((2, *SHAPE))
        self.manifest = SimpleNamespace(
            guidance=told,
            timesteps=(1000, 168),
            latent_shape=SHAPE[1:],
            norm_factor=norm_factor,
            epsilon_factor=epsilon_factor,
        )
        states = SimpleNamespace(all=np.arange(2), empty=np.zeros(2, bool))
        self.engine = SimpleNamespace(
            directory=SimpleNamespace(path="engine", manifest=self.manifest),
            tokenize=lambda texts: (texts, None),
            encode=lambda _: states,
        )

    def noise(self, draws: int, seed: int | None) -> np.ndarray:
        assert (draws, seed) == (2, 5)
        return np.array([np.full(SHAPE[1:], draw) for draw in range(2)])

    def predict(self, states, prompts, latents, timestep, guidance):  # noqa: ARG002
        assert timestep == 1000
        draw = latents[:, 0, 0, 0].astype(int)
        uncond = self.uncond[draw]
        return uncond + guidance * (self.cond[prompts, draw] - uncond)

    def norms(self) -> np.ndarray:
        return np.sqrt(((self.cond - self.uncond) ** 2).sum((2, 3, 4)))


@given(st.floats(0, 20).filter(lambda scale: abs(scale - 1) > 0.01))
def test_a_perfect_students_is_its_teachers(scale):
    student = Student(scale)
    detector = NormOverGuidance(student, 2, 5)
    np.testing.assert_allclose(detector(["a", "b"]), student.norms(), rtol=1e-9)
    assert detector.passes == 2


def test_it_is_in_the_norms_units():
    student = Student(3.0, norm_factor=6.0, epsilon_factor=2.0)
    assert NormOverGuidance(student, 2, 5)(["a", "b"]) == pytest.approx(3 * student.norms())


@pytest.mark.parametrize(("told", "words"), [(None, "engine is told none: use 'norm'"), (1.0, "another --guidance")])
def test_models_of_which_there_is_nothing_to_see(told, words):
    with pytest.raises(InputError, match=words):
        NormOverGuidance(Student(told), 2, 5)
