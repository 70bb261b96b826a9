"""The monitor in real pipelines: it sees what the sampler sees, changes nothing, and is calibrated by generations."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from guarded import make_pipe
from PIL import Image

from memedge import Detector, InputError, Monitor
from memedge.integrations import tensors
from memedge.integrations.denoiser_calls import DenoiserCall, DenoiserCalls
from memedge.integrations.diffusers import guard
from memedge.integrations.monitoring import MONITOR, feed, make_monitor
from memedge.monitor.calibration import GenerationSettings

STEPS, SCALE = 3, 4.0
MEMORIZED = ["the left luggage sign", "the burrito sign", "eraser", "rooster", "trolleybus sticker"]
CLEAN = [f"cute {word}" for word in ("ship", "cat", "sun", "bread", "leaf", "car", "key")]
PROMPTS = ["the left luggage sign", "a briefcase"]
# diffusers 0.42.1 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipe(StableDiffusionPipeline)


def generate(pipe: Any) -> Any:
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    return pipe(PROMPTS, generator=generator, **options).images


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler]
)
def test_it_sees_what_the_sampler_sees_and_changes_nothing(pipe, scheduler):
    more = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}  # as in Stable Diffusion's configurations
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **more)
    rows: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda _unet, args, output: rows.append((args[0], output[0])))
    bare = generate(pipe)
    hook.remove()
    monitor, timesteps = make_monitor(pipe), []

    def watch(call: DenoiserCall) -> None:
        timesteps.append(call.timestep)
        feed(monitor, call)

    with DenoiserCalls(pipe, len(PROMPTS), 1, MONITOR, [watch]):
        assert torch.equal(generate(pipe), bare)
    norms, conds, latents = [], [], []
    for sample, predicted in rows:
        uncond, cond = predicted.double().chunk(2)
        norms.append((cond - uncond).flatten(1).norm(dim=1))
        conds.append(cond)
        latents.append(sample.double()[2:])
    assert monitor.steps == len(rows) == len(timesteps)
    np.testing.assert_allclose(monitor.norms, torch.stack(norms).numpy(), rtol=1e-5)
    changes = torch.stack(conds).diff(dim=0).square().flatten(2).sum(2)
    np.testing.assert_allclose(monitor.changes, changes.numpy(), rtol=1e-4, atol=1e-9)
    moves = torch.stack(latents).diff(dim=0).flatten(2).norm(dim=2)
    np.testing.assert_allclose(monitor.moves, moves.numpy(), rtol=1e-4, atol=1e-9)


def test_a_calibration_is_of_the_pipelines_own_generations(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    made: list[tuple[int, int]] = []
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "target_fpr": 0.125, "batch": 5}
    found = Monitor.calibrate(pipe, MEMORIZED, CLEAN, **options, progress=lambda *counts: made.append(counts))
    assert made == [(5, 12), (10, 12), (12, 12)]
    assert found.settings == GenerationSettings("StableDiffusionPipeline", "DDIMScheduler", STEPS, SCALE)
    assert found.timesteps == (667.0, 334.0, 1.0)
    assert found == Monitor.calibrate(pipe, MEMORIZED, CLEAN, **options)

    monitor = make_monitor(pipe, found)
    with DenoiserCalls(pipe, len(PROMPTS), 1, MONITOR, [lambda call: feed(monitor, call)]):
        generate(pipe)
    assert monitor.decided
    assert [verdict.memorized for verdict in monitor.verdicts()] == monitor.memorized.tolist()


def test_from_a_picture_it_is_calibrated_with_that_picture():
    pipe, detector = make_pipe(StableDiffusionImg2ImgPipeline), Detector.load(provider="cpu", threads=1)
    start = {"image": Image.new("RGB", (16, 16), "navy"), "strength": 0.5}
    options = {"num_inference_steps": 4, "guidance_scale": SCALE}
    found = Monitor.calibrate(pipe, MEMORIZED, CLEAN, **options, **start, target_fpr=0.125)
    assert found.timesteps == (251.0, 1.0)
    guarded = guard(pipe, detector, "flag", monitor=found)
    (verdict,) = guarded("a briefcase", **start, **options, output_type="latent").verdicts
    assert len(verdict.images) == 1
    with pytest.raises(InputError, match="Step 1 is at timestep 501, and at 251 in the monitor's calibration"):
        guarded("a briefcase", **start | {"strength": 0.75}, **options)


@pytest.mark.parametrize(
    ("device", "is_cuda", "nvidia", "core", "copied"),
    [
        ("cpu", False, True, False, False),
        ("cuda", True, True, True, False),
        ("cuda", True, True, False, True),  # a wheel that was built without nvcc
        ("cuda", True, False, True, True),  # ROCm, as torch names it
        ("mps", False, True, True, True),
    ],
)
def test_tensors_are_copied_from_where_the_reduction_cannot_read(monkeypatch, device, is_cuda, nvidia, core, copied):
    monkeypatch.setattr(torch.version, "cuda", "13.0" if nvidia else None)
    monkeypatch.setattr(tensors, "core_status", lambda: SimpleNamespace(cuda=core))
    host = SimpleNamespace(contiguous=lambda: "host")
    tensor = SimpleNamespace(
        device=SimpleNamespace(type=device), is_cuda=is_cuda, cpu=lambda: host, contiguous=lambda: "there"
    )
    assert tensors.readable(tensor) == ("host" if copied else "there")


def test_the_guard_and_the_monitor_need_no_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import memedge, memedge.integrations.diffusers\n"
        "memedge.Monitor()\n"
        "try: memedge.Monitor.calibrate(None, [], [])\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert "Monitor.calibrate needs 'sklearn.model_selection', which is not installed" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1.0}, "no guidance"),
        ({"target_fpr": 2}, "rate between 0 and 1"),
        ({"clean": ["a", 3]}, "not text"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        Monitor.calibrate(pipe, **{"memorized": ["x"], "clean": ["y"], "num_inference_steps": 1} | options)
