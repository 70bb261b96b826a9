"""The filter's norms and masks against passes by hand, on random models; what it leaves alone; what it refuses."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from models import TOKENS, make_scheduler
from pipelines import make
from torch.nn.parallel import DistributedDataParallel

from memedge import InputError
from memedge.engine.errors import NotFiniteError
from memedge.training import MemorizationFilter

WIDTH = 24
TIMESTEPS = [981, 500, 41, 0]


@pytest.fixture
def unet(checkpoint):
    return UNet2DConditionModel.from_pretrained(checkpoint / "unet").train()


@pytest.fixture(scope="module")
def batch():
    """Four samples at four timesteps; the caption of the last one is the empty one."""
    generator = torch.manual_seed(0)
    empty = torch.randn(1, TOKENS, WIDTH, generator=generator)
    states = torch.cat([torch.randn(3, TOKENS, WIDTH, generator=generator), empty])
    noisy = torch.randn(4, 4, 8, 8, generator=generator)
    return SimpleNamespace(noisy=noisy, timesteps=torch.tensor(TIMESTEPS), states=states, empty=empty)


def predict(unet, batch, states, **more):
    """Each sample by itself, as float64 of NumPy."""
    rows = zip(batch.noisy, batch.timesteps, states, strict=True)
    with torch.no_grad():
        found = [unet(x[None], t, s[None], **{k: v[:1] for k, v in more.items()}).sample for x, t, s in rows]
    return torch.cat(found).double().numpy()


def norms(delta):
    return np.sqrt(np.square(delta).sum((1, 2, 3)))


def by_hand(unet, batch):
    return norms(predict(unet, batch, batch.states) - predict(unet, batch, batch.empty.expand(4, -1, -1)))


def counted(unet):
    """Return a list that grows with each call."""
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def test_the_norm_is_that_of_two_passes(unet, batch):
    expected = by_hand(unet, batch)
    calls = counted(unet)
    found = MemorizationFilter(unet, 2.0).norm(*vars(batch).values())
    assert calls == [False, False]
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.min() < 1e-5 < 0.1 < np.sort(expected)[1]  # the empty caption's, and the others


def test_a_prediction_that_is_there_saves_a_pass(unet, batch):
    prediction = unet(batch.noisy, batch.timesteps, batch.states).sample
    calls = counted(unet)
    found = MemorizationFilter(unet, 2.0).norm(*vars(batch).values(), prediction=prediction)
    assert calls == [False]
    np.testing.assert_allclose(found, by_hand(unet, batch), rtol=1e-4, atol=1e-5)


def test_v_is_measured_in_epsilon(unet, batch):
    """ε of each half by the scheduler's own conversion; the prediction type is the one set last, as in the script."""
    scheduler = DDPMScheduler.from_config(make_scheduler("epsilon").config)
    memorization = MemorizationFilter(unet, 2.0, scheduler)
    np.testing.assert_allclose(memorization.norm(*vars(batch).values()), by_hand(unet, batch), rtol=1e-4, atol=1e-5)
    scheduler.register_to_config(prediction_type="v_prediction")
    alpha = scheduler.alphas_cumprod[batch.timesteps].double().numpy()[:, None, None, None]
    halves = [predict(unet, batch, states) for states in (batch.states, batch.empty.expand(4, -1, -1))]
    epsilon = [np.sqrt(alpha) * v + np.sqrt(1 - alpha) * batch.noisy.numpy() for v in halves]
    found = memorization.norm(*vars(batch).values())
    np.testing.assert_allclose(found, norms(epsilon[0] - epsilon[1]), rtol=1e-4, atol=1e-5)


def test_samples_under_the_target_are_kept(unet, batch):
    norm = MemorizationFilter(unet, 1.0).norm(*vars(batch).values())
    middle = norm.sort().values[2].item()
    keep = MemorizationFilter(unet, middle).mask(*vars(batch).values())
    assert keep.dtype == torch.bool
    assert keep.tolist() == (norm < middle).tolist()
    assert keep.sum() == 2  # the one whose norm is the target itself is left out


def test_a_target_may_belong_to_a_timestep(unet, batch):
    norm = MemorizationFilter(unet, 1.0).norm(*vars(batch).values())
    targets = np.full(1000, 1e-6)
    targets[TIMESTEPS[0]], targets[TIMESTEPS[2]] = norm[0] * 1.01, norm[2] * 0.99
    targets[TIMESTEPS[3]] = 1
    assert MemorizationFilter(unet, targets).mask(*vars(batch).values()).tolist() == [True, False, False, True]


def test_sdxl_takes_the_empty_captions_pooled_states(tmp_path):
    folder = make(tmp_path, "sdxl")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    generator = torch.manual_seed(0)
    noisy, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, TOKENS, 56, generator=generator)
    pooled, ids = torch.randn(2, 32, generator=generator), torch.full((2, 6), 64.0)
    timesteps, empty = torch.tensor([981, 41]), torch.zeros(1, TOKENS, 56)
    own = {"text_embeds": pooled, "time_ids": ids}
    none = {"text_embeds": torch.zeros(2, 32), "time_ids": ids}
    with torch.no_grad():
        cond = unet(noisy, timesteps, states, added_cond_kwargs=own).sample
        uncond = unet(noisy, timesteps, empty.expand(2, -1, -1), added_cond_kwargs=none).sample
    memorization = MemorizationFilter(unet, 2.0)
    found = memorization.norm(noisy, timesteps, states, empty, prediction=cond, added_cond_kwargs=none)
    np.testing.assert_allclose(found, norms((cond - uncond).double().numpy()), rtol=1e-5)
    for missing in ({}, {"prediction": cond}, {"added_cond_kwargs": none}):
        with pytest.raises(InputError, match="SDXL's UNet takes more than states: give its output as prediction"):
            memorization.mask(noisy, timesteps, states, empty, **missing)


def gradients(unet, batch, memorization=None, before=False):
    """Those of a step's loss; the filter is asked before the pass that is learnt from, or after."""
    unet.zero_grad()
    if memorization and before:
        memorization.mask(*vars(batch).values())
    prediction = unet(batch.noisy, batch.timesteps, batch.states, return_dict=False)[0]
    if memorization and not before:
        memorization.mask(*vars(batch).values(), prediction=prediction)
    prediction.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_asking_changes_nothing(unet, batch, before, autocast):
    """No gradient, no random number, no mode; also where asking and learning share one autocast."""
    memorization = MemorizationFilter(unet, 2.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(unet, batch)
        state = torch.get_rng_state()
        found = gradients(unet, batch, memorization, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert unet.training
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_distributed_data_parallel(unet, batch, tmp_path):
    """Its wrapper has none of the UNet's attributes, and counts passes until gradients are exchanged."""
    expected = gradients(unet, batch)
    keep = MemorizationFilter(unet, 0.5).mask(*vars(batch).values())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(unet)
        memorization = MemorizationFilter(wrapped, 0.5)
        assert torch.equal(memorization.mask(*vars(batch).values()), keep)
        for before in (False, True):
            for name, gradient in gradients(wrapped, batch, memorization, before).items():
                torch.testing.assert_close(gradient, expected[name.removeprefix("module.")])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noisy": torch.zeros(4, 8, 8)}, r"noisy is latents \[B, C, H, W\], not \[4, 8, 8\]"),
        ({"timesteps": torch.tensor(41)}, r"timesteps are 4 integers, one for each sample, not torch.int64 \[\]"),
        ({"timesteps": torch.zeros(4)}, r"not torch.float32 \[4\]"),
        ({"timesteps": torch.tensor([0, 1, 2, 1000])}, "a target for timesteps 0 to 999, and samples have 0 to 1000"),
        ({"states": torch.zeros(3, TOKENS, WIDTH)}, r"states are \[4, L, D\], one for each sample"),
        (
            {"empty": torch.zeros(1, 2, WIDTH)},
            r"empty is .* \[1, 16, 24\], not \[1, 2, 24\]: encode it as",
        ),
        ({"prediction": torch.zeros(1, 4, 8, 8)}, r"output for noisy, \[4, 4, 8, 8\], not \[1, 4, 8, 8\]"),
    ],
)
def test_tensors_that_do_not_fit(unet, batch, changed, message):
    with pytest.raises(InputError, match=message):
        MemorizationFilter(unet, torch.ones(1000)).mask(**{**vars(batch), **changed})


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), "two", None, [], [[1.0]], [1.0, 0.0]])
def test_what_is_no_target(unet, target):
    with pytest.raises(InputError, match="target is a norm above 0, or one for each timestep"):
        MemorizationFilter(unet, target)


def test_what_is_no_model_and_no_scheduler(unet, batch):
    with pytest.raises(InputError, match=r"takes a UNet, a .*Module, not str"):
        MemorizationFilter("unet", 2.0)
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        MemorizationFilter(unet, 2.0, FlowMatchEulerDiscreteScheduler())
    memorization = MemorizationFilter(unet, 2.0, make_scheduler("sample"))
    with pytest.raises(InputError, match="models that predict ε or v, not 'sample'"):
        memorization.mask(*vars(batch).values())


def test_what_is_not_finite_is_an_error(unet, batch):
    """NaN is under no target: its sample would be left out in silence."""
    prediction = torch.zeros(4, 4, 8, 8)
    prediction[1, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="training has diverged, or overflows"):
        MemorizationFilter(unet, 2.0).mask(*vars(batch).values(), prediction=prediction)


def test_without_torch_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    code = "try: import memedge.training\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = "memedge.training needs 'torch', which is not installed: run `python -m pip install 'memedge[train]'`.\n"
    assert done.stdout == said
