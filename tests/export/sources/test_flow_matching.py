"""The algebra of flow matching (docs/methods.md §9), which is derived, not published: each formula by a property.

The truth is a mixture of Gaussians. Of it the density at every noise level, its score and the mean of x₀ and of the
noise given x are known in closed form, in float64.
"""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.export.sources.architectures import Denoiser as Row
from memedge.export.sources.denoisers.flow import FlowTransformer
from memedge.export.sources.flow_schedule import TIMESTEPS, read_flow
from memedge.export.sources.parts import Parts
from memedge.guidance import guidance_stats

WIDTH = 5
SD1 = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
seeds = st.integers(0, 2**32 - 1)
levels = st.floats(0.02, 0.98)


class Mixture:
    """x₀ of three Gaussians with their own means and one standard deviation; x = σ · noise + (1 − σ) · x₀."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.means = torch.from_numpy(rng.standard_normal((3, WIDTH)))
        self.shares = torch.from_numpy(rng.dirichlet(np.ones(3)))
        self.deviation = float(rng.uniform(0.1, 0.8))

    def log_density(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        variance = sigma**2 + ((1 - sigma) * self.deviation) ** 2
        distances = (x - (1 - sigma) * self.means).square().sum(-1)
        return torch.logsumexp(self.shares.log() - distances / (2 * variance), 0)

    def expected(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E[x₀ | x] and E[noise | x], by each Gaussian's share and regression."""
        variance = sigma**2 + ((1 - sigma) * self.deviation) ** 2
        distances = (x - (1 - sigma) * self.means).square().sum(-1)
        shares = torch.softmax(self.shares.log() - distances / (2 * variance), 0)
        rest = x - (1 - sigma) * self.means
        pictures = self.means + (1 - sigma) * self.deviation**2 / variance * rest
        return shares @ pictures, shares @ (sigma / variance * rest)

    def velocity(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        picture, noise = self.expected(x, sigma)
        return noise - picture


def point(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(WIDTH))


@settings(deadline=None, max_examples=50)
@given(seeds, levels)
def test_what_a_velocity_says(seed, sigma):
    """ε = x + (1 − σ) v, x̂₀ = x − σ v, score = −ε / σ."""
    mixture, x = Mixture(seed), point(seed).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, sigma), x)
    picture, noise = mixture.expected(x.detach(), sigma)
    v = mixture.velocity(x.detach(), sigma)
    torch.testing.assert_close(x.detach() + (1 - sigma) * v, noise)
    torch.testing.assert_close(x.detach() - sigma * v, picture)
    torch.testing.assert_close(-noise / sigma, score)


@settings(deadline=None, max_examples=50)
@given(seeds, levels)
def test_differences(seed, sigma):
    """Δx̂₀ = −σ Δv, Δε = (1 − σ) Δv, Δscore = −((1 − σ) / σ) Δv."""
    cond, uncond, x = Mixture(seed), Mixture(seed ^ 1), point(seed)
    (picture, noise), (picture_0, noise_0) = cond.expected(x, sigma), uncond.expected(x, sigma)
    delta = cond.velocity(x, sigma) - uncond.velocity(x, sigma)
    torch.testing.assert_close(picture - picture_0, -sigma * delta)
    torch.testing.assert_close(noise - noise_0, (1 - sigma) * delta)
    scores = [torch.func.grad(m.log_density)(x, sigma) for m in (cond, uncond)]
    torch.testing.assert_close(scores[0] - scores[1], -((1 - sigma) / sigma) * delta)


@settings(deadline=None, max_examples=50)
@given(seeds, seeds)
def test_at_pure_noise(seed, other):
    """At σ = 1 the Δ of ε and of the score are 0, and Δv is the same on any noise: one draw does, of an exact model."""
    cond, uncond = Mixture(seed), Mixture(seed ^ 1)
    deltas = []
    for x in (point(seed), point(other)):
        (_, noise), (_, noise_0) = cond.expected(x, 1.0), uncond.expected(x, 1.0)
        torch.testing.assert_close(noise, noise_0)
        deltas.append(cond.velocity(x, 1.0) - uncond.velocity(x, 1.0))
    torch.testing.assert_close(*deltas)


@settings(deadline=None, max_examples=30)
@given(seeds, levels, levels)
def test_the_sampler_steps_by_v(seed, first, second):
    high, low = max(first, second), min(first, second) - 0.01  # of equal ones the scheduler takes the second
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[high, low])
    mixture, x = Mixture(seed), point(seed)
    v = mixture.velocity(x, high)
    stepped = scheduler.step(v.float(), scheduler.timesteps[0], x.float()).prev_sample
    torch.testing.assert_close(stepped, (x + (low - high) * v).float(), rtol=1e-4, atol=1e-5)


def test_the_same_signal_to_noise():
    """The second timestep is as noisy as t = 41 of Stable Diffusion; Δε at t = 981 is .076 of Δx̂₀."""
    sigma = TIMESTEPS[1] / 1000
    alpha = float(SD1.alphas_cumprod[41])
    assert sigma / (1 - sigma) == pytest.approx(((1 - alpha) / alpha) ** 0.5, rel=2e-3)
    noisiest = float(SD1.alphas_cumprod[981])
    assert (noisiest / (1 - noisiest)) ** 0.5 == pytest.approx(0.0762, rel=2e-3)


class Given(FlowTransformer):
    """Velocities that are linear in the states, so that they are known."""

    def velocity(self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, guidance: None) -> torch.Tensor:
        assert guidance is None
        text, pooled = self.split(states)
        return torch.sin(sample + sigma[:, None, None, None]) * (text.sum((1, 2)) + pooled.sum(1))[:, None, None, None]


def test_statistics_of_what_it_gives():
    """Norm and alignment of the graph's output are those of v: ‖Δv‖ at σ = 1, cos(x + (1 − σ) v_0, Δv) below."""
    torch.manual_seed(0)
    parts = Parts("", "", None, None, [], [], {}, False, ())
    model = Given(parts, tokens=3, pooled_width=2)
    x, states = torch.randn(1, 4, 6, 6), torch.rand(2, 4, 5)
    rows, prompt = x.expand(2, -1, -1, -1), torch.tensor([0, 1])
    for timestep in TIMESTEPS:
        sigma = timestep / 1000
        given = model(rows, torch.full((2,), timestep), states, prompt)
        v = model.velocity(rows.double(), torch.full((2,), sigma, dtype=torch.float64), states.double(), None)
        delta = (v[0] - v[1]).numpy()
        stats = guidance_stats(given[:1].numpy(), given[1:].numpy())
        assert stats.norm[0] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        if sigma < 1:
            epsilon = (x[0].double() + (1 - sigma) * v[1]).numpy()
            lengths = np.linalg.norm(epsilon, axis=0) * np.linalg.norm(delta, axis=0)
            expected = ((epsilon * delta).sum(0) / lengths).mean()
            assert stats.alignment[0] == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.5, 12),
    st.booleans(),
    st.sampled_from(["exponential", "linear"]),
    st.sampled_from([None, 0.02, 0.1]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from([16, 32, 64, 128]),
)
def test_shifts(shift, dynamic, kind, terminal, even, steps, side):
    """Shift, mu and terminal of the manifest give the sampler's σ by the definitions alone."""
    config = {"shift": shift, "use_dynamic_shifting": dynamic, "time_shift_type": kind, "shift_terminal": terminal}
    if steps == 1 and terminal is not None:  # one step, σ = 1, cannot be stretched
        return
    noise = read_flow(config, Row(flow=True, even=even, steps=steps), (16, side, side))
    flow = noise.flow
    sigma = np.linspace(1, 1 / steps, steps)
    if not even:  # the sampler's own first and last
        least = 1 / 1000 if dynamic else shift / 1000 / (1 + (shift - 1) / 1000)
        sigma = np.linspace(1, least, steps)
    if dynamic:
        assert flow.shift is None
        assert flow.mu == pytest.approx(0.5 + (1.15 - 0.5) * (side**2 // 4 - 256) / (4096 - 256))
        moved = np.exp(flow.mu) if kind == "exponential" else flow.mu
        sigma = moved / (moved + 1 / sigma - 1)
    else:
        assert flow.mu is None
        assert flow.shift == shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    if terminal:
        sigma = 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[-1])
    np.testing.assert_allclose(flow.sigmas, sigma, rtol=1e-4, atol=1e-6)
    assert flow.terminal == terminal
    # ᾱ of the same signal-to-noise ratio
    for alpha, level in zip(noise.schedule.alphas_cumprod, flow.sigmas, strict=True):
        assert alpha / (1 - alpha) == pytest.approx(((1 - level) / level) ** 2, rel=1e-6, abs=1e-12)
