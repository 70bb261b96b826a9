"""Embeddings and noise that are changed: what comes out is measured anew, by the detector and by torch."""

import shutil

import architectures
import gradient_sources
import numpy as np
import pytest
import torch
from engines import edit_manifest
from torch_denoiser import EMOJI

from memedge import Detector, InputError, Mitigator
from memedge.autograd.unet import load_unet
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.denoiser import Denoiser
from memedge.engine.embeddings import unpack
from memedge.engine.engine import Engine
from memedge.engine.errors import NotFiniteError, ProviderError
from memedge.engine.gradients import Gradient
from memedge.explain import Words
from memedge.export.export import export
from memedge.mitigation.adamw import AdamW
from memedge.mitigation.sail import Sail

MEMORIZED, CLEAN = "the left luggage sign", "a red bicycle"


class Fake:
    """Derivatives of a test's choice, counted."""

    def __init__(self, derivative):
        self.derivative, self.calls = derivative, 0

    def statistics(self, states, *_weights):
        self.calls += 1
        return Gradient(np.zeros(1), np.zeros(1), self.derivative(states).astype(np.float32))

    def noise(self, states, latents, cotangent):  # noqa: ARG002
        raise AssertionError


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)


@pytest.fixture(scope="module")
def detector(embedded) -> Detector:
    return Detector(embedded)


@pytest.fixture(scope="module", params=["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def gradients(request, embedded):
    return gradient_sources.make(request.param, embedded, EMOJI)


@pytest.fixture(scope="module")
def mitigator(embedded, gradients) -> Mitigator:
    return Mitigator(embedded, gradients)


@pytest.fixture(scope="module")
def own(embedded) -> np.ndarray:
    """The embeddings of MEMORIZED, [L, D]."""
    return embeddings(embedded, MEMORIZED)


@pytest.fixture
def copied(tmp_path):
    """The embedded engine, to be changed."""
    return shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")


def embeddings(engine, prompt):
    return engine.backend.memory.download(engine.encode(engine.tokenize([prompt])[0]).tensor)[0]


def distance(states, own):
    return np.linalg.norm((states - own)[1:].astype(float)) / np.linalg.norm(own[1:].astype(float))


def uncalibrate(folder, preset=None):
    edit_manifest(folder, lambda m: m.update(calibrations={}, preset=preset))
    return Engine.open(folder, "cpu", None, 1)


@pytest.mark.parametrize("decay", [0.01, 0])
def test_adamw_is_torchs(decay):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((5, 7), dtype=np.float32)
    parameter = torch.nn.Parameter(torch.tensor(values))
    theirs = torch.optim.AdamW([parameter], lr=0.05, weight_decay=decay)
    plain = torch.nn.Parameter(torch.tensor(values))
    adam = torch.optim.Adam([plain], lr=0.05)
    ours = AdamW(0.05, decay)
    for scale in 10.0 ** generator.uniform(-6, 3, 20):
        gradient = (scale * generator.standard_normal(values.shape)).astype(np.float32)
        gradient[0] = 0  # as in padding
        for optimizer, tensor in ((theirs, parameter), (adam, plain)):
            tensor.grad = torch.tensor(gradient)
            optimizer.step()
        values = ours.step(values, gradient)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, parameter.detach().numpy(), rtol=0, atol=2e-6)
        if not decay:
            np.testing.assert_allclose(values, plain.detach().numpy(), rtol=0, atol=2e-6)


def test_as_low_as_clean_prompts(mitigator, detector, own):
    """The detector itself no longer calls it memorized, and everything that is said of it is so."""
    found = mitigator.embedding(MEMORIZED)
    before, after = detector.score([MEMORIZED]), detector.score_embeddings(found.states[None])
    assert before.memorized[0] and not after.memorized[0]
    assert (found.before, found.after) == (before.score[0], after.score[0])
    calibration = detector.info.calibration
    assert (found.target, found.threshold) == (calibration.clean_score, calibration.threshold)
    assert found.after == found.score <= found.target < found.threshold
    assert (found.succeeded, found.memorized, found.truncated, found.loss) == (True, False, False, "score")
    assert found.states.dtype == np.float32 and found.states.shape == own.shape and found.pooled is None
    assert (found.states[0] == own[0]).all()  # BOS
    assert (found.states[1:] != own[1:]).any(axis=1).all()
    assert 1 <= found.iterations <= 40
    assert found.distance == pytest.approx(distance(found.states, own), rel=1e-6)
    assert (found.passes, found.backward_passes) == (2 + 4 * found.iterations, 2 * found.iterations)
    assert f"in {found.iterations} steps" in found.reason and f"≤ target {calibration.clean_score:.4g}" in found.reason
    assert torch.from_dlpack(found.states[None]).shape == (1, 24, 96)


def test_steps_are_adamws(mitigator, gradients, own):
    """Two steps by torch's AdamW, on the gradient of the score with a penalty, BOS left alone."""
    found = mitigator.embedding(MEMORIZED, target=-100.0, steps=2, distance_weight=3.0)
    rest, bos = torch.nn.Parameter(torch.tensor(own[1:])), torch.tensor(own[:1])
    optimizer = torch.optim.AdamW([rest], lr=0.05)
    calibration = mitigator.engine.directory.manifest.calibrations["cpu-fp32"]
    start = rest.detach().clone()
    for _ in range(2):
        states = torch.cat([bos, rest.detach()])[None].numpy()
        gamma = calibration.gamma_norm, calibration.gamma_alignment
        given = gradients.statistics(states, *gamma, calibration.operands).states[0, 1:]
        optimizer.zero_grad()
        (3.0 * (rest - start).square().sum() / start.square().sum()).backward()
        rest.grad += torch.from_numpy(given)
        optimizer.step()
    np.testing.assert_allclose(found.states[1:], rest.detach().numpy(), rtol=0, atol=1e-3)
    assert found.iterations == 2


def test_norm(mitigator, detector):
    target = 0.7 * detector.score([MEMORIZED]).norm[0]
    found = mitigator.embedding(MEMORIZED, target=target, loss="norm", steps=20)
    scores = detector.score_embeddings(found.states[None])
    assert found.before == pytest.approx(detector.score([MEMORIZED]).norm[0], rel=1e-5)
    assert found.after == pytest.approx(scores.norm[0], rel=1e-5)
    assert found.after <= target < found.before
    assert found.succeeded and found.score == pytest.approx(scores.score[0], rel=1e-5)
    assert found.passes == 1 + 2 * found.iterations + 2
    assert found.backward_passes == found.iterations


def test_a_score_of_the_norm_alone_takes_its_passes(copied, gradients):
    edit_manifest(copied, lambda m: m["calibrations"]["cpu-fp32"].update(gamma_alignment=0.0, threshold=1.5))
    engine = Engine.open(copied, "cpu", None, 1)
    mitigator = Mitigator(engine, Fake(lambda states: gradients.statistics(states, 1.0, 0.0).states))
    by_score = mitigator.embedding(MEMORIZED, target=1.4, steps=10)
    assert by_score.score == by_score.after == pytest.approx(engine.norm(engine.embed(by_score.states[None]))[0])
    assert (by_score.passes, by_score.backward_passes) == (1 + 2 * by_score.iterations, by_score.iterations)
    by_norm = mitigator.embedding(MEMORIZED, target=1.4, loss="norm", steps=10)
    np.testing.assert_array_equal(by_norm.states, by_score.states)
    assert (by_norm.score, by_norm.memorized, by_norm.passes) == (by_score.score, by_score.memorized, by_score.passes)


def test_a_loss_at_the_target_is_no_verdict(mitigator, detector):
    """A target that leaves the prompt memorized succeeds, and it is said what that is worth."""
    halfway = (detector.score([MEMORIZED]).score[0] + detector.info.rule.threshold) / 2
    found = mitigator.embedding(MEMORIZED, target=halfway, learning_rate=0.01)
    assert found.succeeded and found.memorized
    assert "still that of a memorized prompt" in found.reason


def test_below_already(embedded, detector):
    """Nothing is done to it, and no derivative taken."""
    fake = Fake(np.zeros_like)
    found = Mitigator(embedded, fake).embedding(CLEAN, target=2.0)
    assert (fake.calls, found.iterations, found.distance, found.passes, found.backward_passes) == (0, 0, 0, 2, 0)
    assert found.succeeded and not found.memorized
    assert found.before == found.after == detector.score([CLEAN]).score[0]
    assert (found.states == embeddings(embedded, CLEAN)).all()
    assert "without a change" in found.reason


def test_empty_prompt(embedded):
    fake = Fake(np.zeros_like)
    found = Mitigator(embedded, fake).embedding("")
    assert (found.succeeded, found.memorized, found.after, found.iterations) == (True, False, 0, 0)
    assert "no guidance" in found.reason
    assert Mitigator(embedded, fake).embedding("", target=-1.0).succeeded
    assert fake.calls == 0


def test_failure_is_said(mitigator, detector):
    found = mitigator.embedding(MEMORIZED, steps=1)
    assert (found.succeeded, found.memorized, found.iterations) == (False, True, 1)
    assert found.after == detector.score_embeddings(found.states[None]).score[0] > found.threshold
    assert found.after < found.before
    assert f"does not come down to target {found.target:.4g}" in found.reason and "allow more steps" in found.reason


def test_best_is_returned(mitigator, gradients, embedded, own):
    """Uphill the prompt's own embeddings stay the best; with a rate far too large what comes back is no worse."""

    def uphill(states):
        return -gradients.statistics(states, 1.0, 0.0).states

    found = Mitigator(embedded, Fake(uphill)).embedding(MEMORIZED, loss="norm", target=0.1, steps=3)
    assert (found.iterations, found.distance, found.after) == (0, 0, found.before)
    assert not found.succeeded and (found.states == own).all()
    assert found.backward_passes == 3
    wild = mitigator.embedding(MEMORIZED, target=-100.0, steps=5, learning_rate=2.0)
    assert not wild.succeeded and wild.after <= wild.before


def test_distance_penalty(mitigator):
    free, held = (
        mitigator.embedding(MEMORIZED, target=-100.0, steps=10, distance_weight=weight) for weight in (0.0, 100.0)
    )
    assert held.distance < free.distance / 2
    assert free.after < held.after < held.before


def test_truncated(mitigator):
    found = mitigator.embedding("star " * 100, steps=1)
    assert found.truncated


def test_no_calibration(engine, checkpoint):
    opened = Engine.open(engine, "cpu", None, 1)
    mitigator = Mitigator(opened, gradient_sources.make("torch", opened, checkpoint))
    norm = float(Detector(opened).score(["a star"]).norm[0])
    found = mitigator.embedding("a star", target=0.8 * norm, loss="norm", learning_rate=0.01)
    assert found.succeeded
    assert (found.score, found.memorized, found.threshold) == (None, None, None)
    assert (found.passes, found.backward_passes) == (1 + 2 * found.iterations, found.iterations)
    with pytest.raises(InputError, match="is not calibrated for cpu-fp32, so there is no score to lower"):
        mitigator.embedding("a star")


@pytest.mark.slow
def test_sdxl(tmp_path):
    """The pooled state is moved, too; with two draws the norm is the mean over both."""
    checkpoint = architectures.build("sdxl", tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "engine", draws=2)
    engine = Engine.open(tmp_path / "engine", "cpu", None, 1)
    detector, prompt = Detector(engine), "a star"
    norm = float(detector.score([prompt]).norm[0])
    mitigator = Mitigator(engine, gradient_sources.make("onnx", engine, checkpoint))
    found = mitigator.embedding(prompt, target=0.9 * norm, loss="norm", learning_rate=0.01)
    own, pooled = unpack(engine.directory.manifest, embeddings(engine, prompt))
    assert found.before == pytest.approx(norm, rel=1e-5)
    assert found.succeeded and found.after <= 0.9 * norm
    after = detector.score_embeddings(found.states[None], found.pooled[None]).norm[0]
    assert found.after == pytest.approx(after, rel=1e-5)
    assert (found.states[0] == own[0]).all() and (found.pooled != pooled).any()
    assert (found.passes, found.backward_passes) == (2 + 4 * found.iterations, 2 * found.iterations)
    words = [word.text for word in detector_with(engine, mitigator).explain("a star!!", "gradient").words]
    assert words == ["a", "star", "!!"]
    noise = mitigator.noise(prompt, draws=2, steps=2)
    assert noise.after < noise.before


def detector_with(engine, mitigator) -> Detector:
    detector = Detector(engine)
    detector.gradients = mitigator.gradients
    return detector


def test_published_weights(copied, gradients):
    """With γ and no calibration there is a score to lower, to a target that is given."""
    engine = uncalibrate(copied, {"family": "a family", "gamma_norm": 1.0, "gamma_alignment": 2.0})
    mitigator = Mitigator(engine, gradients)
    with pytest.raises(InputError, match="to come down to: run `memedge calibrate`, or give a target"):
        mitigator.embedding(MEMORIZED)
    before = Detector(engine).score([MEMORIZED]).score[0]
    found = mitigator.embedding(MEMORIZED, target=before - 0.5)
    assert found.before == before
    assert found.succeeded and found.memorized is None and found.score == found.after <= before - 0.5


def test_another_alignment(copied, gradients):
    """What is calibrated for another cosine has a verdict, but no derivative."""
    edit_manifest(copied, lambda m: m["calibrations"]["cpu-fp32"].update(alignment="flat"))
    engine = Engine.open(copied, "cpu", None, 1)
    mitigator = Mitigator(engine, gradients)
    with pytest.raises(
        InputError, match="calibrated for another alignment than 'channel' of uncond_delta or cond_uncond"
    ):
        mitigator.embedding(MEMORIZED)
    found = mitigator.embedding(MEMORIZED, target=2.0, loss="norm", steps=20)
    assert found.score == pytest.approx(Detector(engine).score_embeddings(found.states[None]).score[0], rel=1e-5)


def test_sail_against_autograd(embedded, gradients):
    """Loss and whole derivative, against autograd in float64 through the loss as docs/methods.md writes it."""
    denoiser, states = Denoiser(embedded), embedded.encode(embedded.tokenize([MEMORIZED])[0])
    sail = Sail(denoiser, gradients, states, 0.05)
    noise = denoiser.noise(3)
    point = sail.at(noise)
    unet = load_unet(embedded.directory, str(EMOJI)).double()
    both = np.stack([embeddings(embedded, text) for text in (MEMORIZED, "")]).astype(np.float64)

    def delta(x):
        cond, uncond = unet(x.expand(2, *x.shape), torch.full((2,), 981), torch.from_numpy(both))
        return cond - uncond

    for row, found in enumerate(sail.gradient(point)):
        x = torch.tensor(noise[row], dtype=torch.float64, requires_grad=True)
        guidance = delta(x)
        loss = delta(x + guidance / guidance.norm()).norm() + 0.05 * x.norm()
        loss.backward()
        assert point.norm[row] == pytest.approx(guidance.norm().item(), rel=1e-4)
        assert point.loss[row] == pytest.approx(loss.item(), rel=1e-4)
        np.testing.assert_allclose(found, x.grad.numpy(), rtol=0, atol=1e-3 * x.grad.abs().max().item())


def test_noise(mitigator, embedded):
    found = mitigator.noise(MEMORIZED, draws=3, steps=4)
    denoiser = Denoiser(embedded)
    sail = Sail(denoiser, None, embedded.encode(embedded.tokenize([MEMORIZED])[0]), 0.05)
    start, end = sail.at(denoiser.noise(3)), sail.at(found.noise[None])
    assert found.noise.shape == (4, 16, 16) and found.noise.dtype == np.float32
    assert found.before == pytest.approx(start.loss[found.draw], rel=1e-4)
    assert found.norm_before == pytest.approx(start.norm[found.draw], rel=1e-4)
    assert found.after == pytest.approx(end.loss[0], rel=1e-4)
    assert found.norm_after == pytest.approx(end.norm[0], rel=1e-4)
    assert found.after < start.loss.min() and found.norm_after < found.norm_before
    moved = np.linalg.norm(found.noise - denoiser.noise(3)[found.draw]) / np.linalg.norm(denoiser.noise(3)[found.draw])
    assert found.distance == pytest.approx(moved, rel=1e-4)
    assert 0.01 < found.distance < 0.2  # at most 0.05 per value and step
    assert (found.succeeded, found.target) == (None, None)
    assert (found.passes, found.backward_passes) == (3 * (4 * 5 + 4 * 4), 3 * 4 * 4)
    assert torch.from_dlpack(found.noise[None]).shape == (1, 4, 16, 16)


def test_noise_with_a_target(mitigator):
    free = mitigator.noise(MEMORIZED, draws=2, steps=1, seed=5)
    found = mitigator.noise(MEMORIZED, target=free.after, draws=2, steps=5, seed=5)
    assert (found.succeeded, found.iterations, found.after) == (True, 1, free.after)
    assert (found.noise == free.noise).all()
    assert "≤ target" in found.reason
    at_once = mitigator.noise(MEMORIZED, target=free.before + 10, draws=2, seed=5)
    assert (at_once.succeeded, at_once.iterations, at_once.distance, at_once.backward_passes) == (True, 0, 0, 0)
    never = mitigator.noise(MEMORIZED, target=0.0, draws=2, steps=1, seed=5)
    assert (never.succeeded, never.after) == (False, free.after)
    assert "above target 0: allow more steps or draws" in never.reason
    assert (mitigator.noise(MEMORIZED, draws=2, steps=1, seed=6).noise != free.noise).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": None}, "not text"),
        ({"loss": "magic"}, "no loss='magic': use 'score' or 'norm'"),
        ({"loss": "norm"}, "no target of its own: give one"),
        ({"target": float("nan")}, "target is nan: give a finite number"),
        ({"steps": 0}, "steps is 0: give a whole number"),
        ({"steps": 1.5}, r"steps is 1\.5: give a whole number"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0: give a positive"),
        ({"distance_weight": -1.0}, r"distance_weight is -1\.0: give"),
        ({"distance_weight": float("inf")}, "distance_weight is inf: give"),
    ],
)
def test_mistakes(embedded, arguments, words):
    with pytest.raises(InputError, match=words):
        Mitigator(embedded, Fake(np.zeros_like)).embedding(**{"prompt": MEMORIZED, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": 3}, "not text"),
        ({"prompt": ""}, "The empty prompt has no guidance"),
        ({"draws": 0}, "draws is 0: give at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"alpha": -0.1}, r"alpha is -0\.1"),
        ({"target": float("inf")}, "target is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_mistakes_with_noise(embedded, arguments, words):
    with pytest.raises(InputError, match=words):
        Mitigator(embedded, Fake(np.zeros_like)).noise(**{"prompt": MEMORIZED, **arguments})


def test_steps_into_nowhere(embedded):
    """Steps that leave the numbers that the model can compute with end in an error, not in a result."""
    for rate in (1e30, 1e300):
        with pytest.raises(NotFiniteError, match="use a smaller learning rate"):
            Mitigator(embedded, Fake(np.ones_like)).embedding(MEMORIZED, target=-1e9, learning_rate=rate)


def test_opening(checkpoint):
    mitigator = Mitigator.load(threads=1, checkpoint=str(EMOJI))
    assert mitigator.engine.backend.provider == "cpu"
    assert mitigator.embedding(MEMORIZED).succeeded
    with pytest.raises(InputError, match="was made of emoji"):
        Mitigator.load(checkpoint=str(checkpoint))
    with pytest.raises(ProviderError, match="'openvino' computes no gradients: use provider 'cpu' or 'cuda'"):
        Mitigator.load(provider="openvino")


def test_for_a_detector(embedded, gradients):
    """Engine and derivatives are the detector's own."""
    detector = Detector(embedded)
    detector.gradients = gradients
    mitigator = Mitigator.for_detector(detector)
    assert (mitigator.engine, mitigator.gradients) == (embedded, gradients)


def test_explained_by_gradient(embedded, gradients, detector):
    """A word's significance is the L2 norm of its tokens' rows; what is not read has none."""
    detector.gradients = gradients
    prompt = "picture of a caf\u00e9, " + "star " * 40
    states = embeddings(embedded, prompt)
    rows = np.linalg.norm(gradients.statistics(states[None], 1.0, 0.0).states[0], axis=1)
    explanation = detector.explain(prompt, "gradient")
    tokens = [t for t in embedded.tokenizer.tokens(prompt) if t.start >= 13 and t.end <= 17]
    assert len(tokens) > 1
    words = explanation.words
    assert [word.text for word in words[:6]] == ["picture", "of", "a", "caf\u00e9", ",", "star"]
    for i, word in enumerate(words[:3]):
        assert word.significance == pytest.approx(rows[1 + i], rel=1e-3)
        assert [token.significance for token in word.tokens] == [word.significance]
    expected = np.linalg.norm(rows[[token.place for token in tokens]])
    assert words[3].significance == pytest.approx(expected, rel=1e-3)
    assert words[-1].significance is None
    assert (explanation.kind, explanation.method, explanation.passes) == ("norm", "gradient", 1)
    assert explanation.threshold is None
    assert explanation.score == pytest.approx(detector.score([prompt]).norm[0], rel=1e-4)
    empty = detector.explain("", "gradient")
    assert (empty.words, empty.score) == ((), 0)
    assert Words([], "").rate(lambda _: None) == ()
