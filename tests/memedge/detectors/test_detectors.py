"""The rival detectors, each against docs/methods.md written out in torch, and what each costs."""

import subprocess
import sys
from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch_denoiser import EMOJI, TorchDenoiser

from memedge import InputError
from memedge.detector import Detector
from memedge.detectors import EXACT, NAMES, ddim, draws, make, p_laplace
from memedge.detectors.anisotropy import OtherDraws
from memedge.detectors.norm_steps import NormOverSteps
from memedge.detectors.p_laplace import PLaplace
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.denoiser import Denoiser, norms
from memedge.engine.engine import Engine
from memedge.engine.errors import ProviderError
from memedge.engine.manifest import Schedule
from memedge.metrics import auc

PROMPTS = ["money with wings sticker", "", "a red bicycle"]
PAIRS = {"": ("uncond", "delta"), "-cond-uncond": ("cond", "uncond"), "-cond-delta": ("cond", "delta")}
ALIGNMENTS = [f"alignment{pair}{flat}" for pair in PAIRS for flat in ("", "-flat")]


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)


@pytest.fixture(scope="module")
def truth(embedded) -> TorchDenoiser:
    """The embedded model as diffusers runs it."""
    return TorchDenoiser(embedded)


def encode(engine: Engine, prompts: list[str]):
    return engine.encode(engine.tokenize(prompts)[0])


def cosine(name: str, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """The alignment called `name` of predictions [R, C, H, W]."""
    tensors = {"cond": cond, "uncond": uncond, "delta": cond - uncond}
    flat = name.endswith("-flat")
    first, second = (tensors[k] for k in PAIRS[name.removeprefix("alignment").removesuffix("-flat")])
    if flat:
        return F.cosine_similarity(first.flatten(1), second.flatten(1), dim=1, eps=1e-8)
    return F.cosine_similarity(first, second, dim=1, eps=1e-8).mean((1, 2))


def test_own_draws_are_the_products(embedded):
    """On the engine's own noise, the values are those of Detector.score, turned so that higher means memorized."""
    detector = Detector(embedded)
    scores = detector.score(PROMPTS)
    np.testing.assert_allclose(make("norm", embedded, 1)(PROMPTS)[:, 0], scores.norm, rtol=1e-6)
    np.testing.assert_allclose(make("anisotropy", embedded, 1)(PROMPTS)[:, 0], scores.score, rtol=1e-6)
    for name in ALIGNMENTS:
        pair = name.removeprefix("alignment").removesuffix("-flat").strip("-").replace("-", "_") or "uncond_delta"
        kind = "flat" if name.endswith("flat") else "channel"
        own = detector.score(PROMPTS, alignment=kind, operands=pair).alignment
        # Of the calibration's own pair γ_alignment has the sign; for the others it is what holds where Δ is orthogonal.
        calibration = detector.info.calibration
        sign = -1 if pair == "cond_uncond" else 1
        if pair == calibration.operands:
            sign = np.sign(calibration.gamma_alignment)
        np.testing.assert_allclose(make(name, embedded, 1)(PROMPTS)[:, 0], sign * own, atol=1e-6)


def test_other_draws(embedded, truth):
    """A second draw, and a seed of one's own: norm and alignments against torch; the first draw stays the engine's."""
    for seed in (None, 5):
        noise = truth.noise(2, seed)
        x, prompts = np.tile(noise, (len(PROMPTS), 1, 1, 1)), np.repeat(np.arange(len(PROMPTS)), 2)
        states = encode(embedded, PROMPTS)
        late = [torch.from_numpy(e) for e in truth.guidance(states, prompts, x, 41)]
        cond, uncond = truth.guidance(states, prompts, x, 981)
        norm = np.linalg.norm((cond - uncond).reshape(len(x), -1), axis=1).reshape(-1, 2)
        np.testing.assert_allclose(make("norm", embedded, 2, seed=seed)(PROMPTS), norm, rtol=1e-4, atol=1e-9)
        cosines = {name: cosine(name, *late).reshape(-1, 2).numpy() for name in ALIGNMENTS}
        gamma = embedded.directory.manifest.calibrations["cpu-fp32"]
        assert (gamma.operands, np.sign(gamma.gamma_alignment)) == ("cond_uncond", -1)
        for name, sign in (("alignment", 1), ("alignment-flat", 1), ("alignment-cond-uncond", -1)):
            expected = sign * cosines[name] * [[1], [0], [1]]  # 0 for the empty prompt
            np.testing.assert_allclose(make(name, embedded, 2, seed=seed)(PROMPTS), expected, atol=1e-4)
        score = gamma.gamma_norm * norm + gamma.gamma_alignment * cosines["alignment-cond-uncond"] * [[1], [0], [1]]
        np.testing.assert_allclose(make("anisotropy", embedded, 2, seed=seed)(PROMPTS), score, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(make("norm", embedded, 2)(PROMPTS)[:, :1], make("norm", embedded, 1)(PROMPTS), rtol=1e-5)


def test_velocity(embedded):
    """A model that predicts v: norm and cosine are of v, as the product takes them."""
    scheduler = DDIMScheduler.from_pretrained(EMOJI / "scheduler", prediction_type="v_prediction")
    denoiser = TorchDenoiser(embedded, scheduler=scheduler)
    denoiser.manifest.norm_factor = sqrt(0.0057755) / (1 - 0.0057755)
    denoiser.manifest.epsilon_factor = sqrt(0.0057755)
    noise = denoiser.noise(2)
    source, states = OtherDraws(denoiser, noise), encode(embedded, PROMPTS[:1])
    denoiser.velocity = False  # from here on it gives what the UNet gives, v
    prompts = np.zeros(2, dtype=np.int64)
    cond, uncond = denoiser.guidance(states, prompts, noise, 981)
    norm = denoiser.manifest.norm_factor * np.linalg.norm((cond - uncond).reshape(2, -1), axis=1)
    late = [torch.from_numpy(v).double() for v in denoiser.guidance(states, prompts, noise, 41)]
    denoiser.velocity = True
    np.testing.assert_allclose(source.norms(states)[0], norm, rtol=1e-4)
    np.testing.assert_allclose(
        source.alignments(states, "channel", "uncond_delta")[0], cosine("alignment", *late), atol=1e-4
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_diffusers(prediction_type):
    scheduler = DDIMScheduler.from_pretrained(EMOJI / "scheduler", prediction_type=prediction_type)
    scheduler.set_timesteps(50)
    steps = [int(t) for t in scheduler.timesteps]
    alphas = tuple(float(scheduler.alphas_cumprod[t]) for t in steps)
    planned = ddim.plan(Schedule(tuple(steps), alphas, float(scheduler.final_alpha_cumprod)))
    assert [step.timestep for step in planned] == steps
    generator = torch.Generator().manual_seed(0)
    for now in (planned[0], planned[25], planned[-1]):
        x, output = torch.randn(2, 2, 4, 8, 8, generator=generator)
        expected = scheduler.step(output, now.timestep, x).prev_sample
        eps = output
        if prediction_type == "v_prediction":
            eps = now.alpha**0.5 * output + (1 - now.alpha) ** 0.5 * x
        own = ddim.step(x.numpy(), eps.numpy(), now.alpha, now.next_alpha)
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, expected.numpy(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_plan():
    schedule = Schedule((900, 700, 500, 300, 100), (0.0, 0.2, 0.4, 0.6, 0.8), 0.99)
    every = ddim.plan(schedule)
    assert [step.timestep for step in every] == [700, 500, 300, 100]  # nothing can be told from pure noise
    assert [step.next_alpha for step in every] == [0.4, 0.6, 0.8, 0.99]
    two = ddim.plan(schedule, 2)
    assert [(s.timestep, s.alpha, s.next_alpha) for s in two] == [(700, 0.2, 0.8), (100, 0.8, 0.99)]
    assert ddim.plan(schedule, 9) == every


def test_norm_over_steps(embedded, truth):
    """Against diffusers' own loop in float64; the first step is the product's norm."""
    states, prompts = encode(embedded, PROMPTS), np.arange(len(PROMPTS))
    x = torch.from_numpy(truth.noise(1)).repeat(len(PROMPTS), 1, 1, 1).double()
    expected = []
    for t in truth.scheduler.timesteps[:3]:
        cond, uncond = (torch.from_numpy(e) for e in truth.guidance(states, prompts, x.numpy(), int(t)))
        expected.append((cond - uncond).flatten(1).norm(dim=1))
        x = truth.scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
    denoiser = Denoiser(embedded)
    own = NormOverSteps(denoiser, 1, None, count=3)(PROMPTS)
    np.testing.assert_allclose(own[:, 0], torch.stack(expected).mean(0), rtol=1e-4, atol=1e-9)
    first = NormOverSteps(denoiser, 1, None, count=1)(PROMPTS)
    np.testing.assert_allclose(first[:, 0], Detector(embedded).score(PROMPTS).norm, rtol=1e-5)


def test_sharpness(embedded):
    """The exact value against a central difference in float64, and the forward difference against the exact value."""
    prompt, truth = PROMPTS[:1], TorchDenoiser(embedded)
    truth.unet.double()
    states, first = encode(embedded, prompt), np.zeros(1, dtype=np.int64)

    def score_difference(x: np.ndarray) -> np.ndarray:
        cond, uncond = truth.guidance(states, first, x, 981)
        return (uncond - cond) / sqrt(1 - truth.manifest.alphas_cumprod[0])

    x = truth.noise(1).astype(np.float64)
    s = score_difference(x)
    expected = np.linalg.norm(score_difference(x + 1e-3 * s) - score_difference(x - 1e-3 * s)) / 2e-3
    exact = make(EXACT, embedded, 1, checkpoint=str(EMOJI))([*prompt, ""])
    np.testing.assert_allclose(exact, [[expected], [0]], rtol=1e-4)
    np.testing.assert_allclose(make("sharpness", embedded, 1)([*prompt, ""]), exact, rtol=5e-3)


@pytest.mark.parametrize("with_prompt", [True, False])
def test_p_laplace(embedded, truth, monkeypatch, with_prompt):
    """Against the flux of ‖s‖^(p−2) s, p = 1, around what diffusers' loop generates."""
    monkeypatch.setattr(p_laplace, "DIRECTIONS", 3)
    monkeypatch.setattr(p_laplace, "STEPS", 4)
    states, prompts = encode(embedded, PROMPTS), np.arange(len(PROMPTS))
    own = PLaplace(Denoiser(embedded), 1, None, with_prompt=with_prompt)
    x = torch.from_numpy(truth.noise(1)).repeat(len(PROMPTS), 1, 1, 1).double()
    for now in ddim.plan(truth.manifest.schedule, 4):
        cond, uncond = (torch.from_numpy(e) for e in truth.guidance(states, prompts, x.numpy(), now.timestep))
        eps = uncond + 7.5 * (cond - uncond)
        clean = (x - sqrt(1 - now.alpha) * eps) / sqrt(now.alpha)
        x = sqrt(now.next_alpha) * clean + sqrt(1 - now.next_alpha) * eps
    place = truth.manifest.schedule.timesteps.index(own.timestep)
    sigma, flux, d = sqrt(1 - truth.manifest.schedule.alphas_cumprod[place]), 0.0, 4 * 16 * 16
    for unit in p_laplace.directions(3, (4, 16, 16)).astype(np.float64):
        y = x.numpy() + p_laplace.RADIUS * sqrt(d) * unit
        score = -(truth.predict(states, prompts, y, own.timestep) if with_prompt else truth.uncond(y, own.timestep))
        score = (score / sigma).reshape(len(y), -1)
        flux += np.linalg.norm(score, axis=1) ** (1 - 2) * (score @ unit.ravel())
    np.testing.assert_allclose(own(PROMPTS)[:, 0], -flux / 3, atol=1e-4)


def test_inward_flux():
    """Around the peak of a Gaussian s points inwards everywhere, around its least place outwards, and 0 is neither."""
    units = p_laplace.directions(16, (4, 8, 8))
    np.testing.assert_allclose(norms(units), 1, rtol=1e-6)
    centre = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(p_laplace.inward_flux(lambda y: 2 * (y - centre), centre, 0.1, units), 1, atol=1e-5)
    np.testing.assert_allclose(p_laplace.inward_flux(lambda y: centre - y, centre, 0.1, units), -1, atol=1e-5)
    assert not p_laplace.inward_flux(np.zeros_like, centre, 0.1, units).any()


def test_blocks(embedded, monkeypatch):
    """However few rows a block has, the values are the same."""
    whole = make("sharpness", embedded, 2, seed=1)(PROMPTS)
    monkeypatch.setattr(draws, "BLOCK_VALUES", 1)
    np.testing.assert_allclose(make("sharpness", embedded, 2, seed=1)(PROMPTS), whole, rtol=1e-2)
    assert make("sharpness", embedded, 2)([]).shape == (0, 2)


@pytest.fixture(scope="module")
def small(engine) -> Engine:
    """A random engine, so small that all detectors are quick on it; without a calibration."""
    return Engine.open(engine, "cpu", None, 1)


OF_STUDENTS = "norm-guidance"  # which nothing here is: tests/export/sources/test_lcm.py, test_flux.py


@pytest.mark.parametrize("name", sorted({*NAMES} - {OF_STUDENTS}))
def test_every_detector(small, checkpoint, monkeypatch, name):
    """It has the right shape, is finite for any prompt, names its formula and takes as many passes as it says."""
    assert name in NAMES
    rows = []
    for method, place in (("statistics", 1), ("predict_at", 1)):
        original = getattr(small.backend, method)

        def counted(*arguments, original=original, place=place, **more):
            rows.append(len(arguments[place]))
            return original(*arguments, **more)

        monkeypatch.setattr(small.backend, method, counted)
    for count, seed in ((1, None), (2, 3)):
        statistic = make(name, small, count, seed=seed, checkpoint=str(checkpoint))
        assert statistic.name == name
        assert "20" in statistic.formula
        assert "\n" not in statistic.formula
        rows.clear()
        values = statistic(["a cat", "", "x" * 100])
        assert values.shape == (3, count)
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
        assert len({*values[:, 0]}) > 1
        if name != EXACT:
            assert sum(rows) == statistic.passes * 3 * count
        np.testing.assert_allclose(statistic(["a cat"]), values[:1], rtol=1e-3)  # whatever it is batched with


def test_exact_passes(small, checkpoint):
    statistic = make(EXACT, small, 2, checkpoint=str(checkpoint))
    rows = []
    statistic._unet.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    statistic(["a cat", "a dog"])
    assert rows == [2, 2] * 4  # both predictions without a derivative, then with one, which counts twice
    assert statistic.passes == 2 + 2 * 2


def test_uncalibrated_weights(small):
    """γ = (1, 1), and the alignment as it is."""
    norm, alignment = small.per_draw(encode(small, ["a cat"]), "channel", "uncond_delta")
    np.testing.assert_allclose(make("alignment", small, 1)(["a cat"]), alignment, atol=1e-6)
    np.testing.assert_allclose(make("anisotropy", small, 1)(["a cat"]), norm + alignment, rtol=1e-6)


def test_refusals(small, checkpoint, monkeypatch):
    with pytest.raises(InputError, match="There is no detector 'wen': use one of anisotropy, norm, norm-10"):
        make("wen", small, 1)
    with pytest.raises(InputError, match="draws is 0"):
        make("norm", small, 0)
    with pytest.raises(InputError, match="Prompt 2 is int, not text"):
        make("norm", small, 1)(["a", 2])
    with pytest.raises(InputError, match="prompts is one string"):
        make("norm", small, 1)("a cat")
    with pytest.raises(InputError, match="give --checkpoint, what the engine was exported from"):
        make(EXACT, small, 1)
    with pytest.raises(InputError, match=r"was made of random, and .*emoji has other weights"):
        make(EXACT, small, 1, checkpoint=str(EMOJI))
    monkeypatch.setitem(sys.modules, "memedge.detectors.sharpness_exact", None)
    with pytest.raises(InputError, match=r"needs .*, which is not installed: .*memedge\[export\]"):
        make(EXACT, small, 1, checkpoint=str(checkpoint))


def test_openvino_runs_what_needs_no_other_noise():
    engine = Engine.open(EMBEDDED_ENGINE, "openvino", "fp32", None)
    assert make("anisotropy", engine, 1)(["a star"]).shape == (1, 1)
    with pytest.raises(ProviderError, match="'cpu' or 'cuda'"):
        make("sharpness", engine, 1)


def test_forward_detectors_need_no_torch(tmp_path):
    code = (
        "from memedge.detectors import make; from memedge.detector import Detector;"
        "engine = Detector.load(provider='cpu').engine;"
        "print([make(name, engine, 1)(['a star']).shape for name in ('anisotropy', 'norm-10', 'sharpness')]);"
        "import sys; print({'torch', 'diffusers', 'onnx', 'scipy', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[(1, 1), (1, 1), (1, 1)]", "set()"]


def labelled(memorized: int, others: int) -> tuple[list[str], np.ndarray]:
    """Return memorized captions, and frequent ones that are not, of the calibration split, and which are which."""
    rows = [row for row in captions() if row.split == "calibration"]
    positive = [row.prompt for row in rows if (row.group, row.memorized) == ("memorized", True)]
    negative = [row.prompt for row in rows if (row.group, row.memorized) == ("frequent", False)]
    texts = positive[:memorized] + negative[:others]
    return texts, np.arange(len(texts)) < memorized


SLOW = ("norm-50", "p-laplace")


@pytest.mark.parametrize(
    "name",
    # docs/detectors.md: of the image alone the p-Laplacian tells nothing here.
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in NAMES
        if name not in (EXACT, OF_STUDENTS, "p-laplace-image")
    ],
)
def test_higher_means_memorized(embedded, name):
    texts, memorized = labelled(6, 8)
    values = make(name, embedded, 1)(texts).mean(axis=1)
    least = 0.6 if name in ("alignment", "alignment-flat") else 0.8  # docs/detectors.md: it tells little of this model
    assert auc(values[memorized], values[~memorized]) > least
