"""The lines of docs/training.md in a loop made as diffusers' script: accelerate, accumulation, mixed precision."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler, UNet2DConditionModel
from models import make_scheduler
from transformers import CLIPTextModel, CLIPTokenizer

PAGE = Path(__file__).parents[3] / "docs/training.md"
CAPTIONS = ["a", "bb", "c", "zebra", "a red house", "q!", "left luggage", "x y z"]
INFINITE = float("inf")


@pytest.fixture(scope="module")
def lines() -> tuple[str, str]:
    """The added ones, of the script's preparation and of its loop."""
    (block,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    added = [line[1:] for line in block.splitlines() if line.startswith("+")]
    assert len(added) == 5
    inside = [line.startswith(" " * 16) for line in added]
    assert inside == [False, False, False, True, True]
    before, within = ("\n".join(map(textwrap.dedent, part)) for part in (added[:3], added[3:]))
    return before, within


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch) -> Iterator[None]:
    """A folder for targets.npy, and no accelerator before or after: all of a process share one state."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """Two optimizer steps of two batches of two, as in the script; what differs is in `run`."""

    def __init__(self, checkpoint: Path, precision: str, prediction_type: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").requires_grad_(False)
        self.text_encoder = text_encoder.to(dtype=dtype)
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").train()
        ids, generator = self.tokenize({"text": CAPTIONS}), torch.manual_seed(0)
        latents, noise = (torch.randn(8, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
        samples = list(zip(ids, latents, noise, torch.randint(1000, (8,), generator=generator), strict=True))
        self.unet, self.optimizer, self.loader = self.accelerator.prepare(
            unet, torch.optim.AdamW(unet.parameters(), lr=1e-5), torch.utils.data.DataLoader(samples, batch_size=2)
        )
        self.scheduler = DDPMScheduler.from_config(make_scheduler(prediction_type).config)

    def tokenize(self, examples: dict[str, list[str]]) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(examples["text"], max_length=self.tokenizer.model_max_length, **options).input_ids

    def batches(self):
        """Yield noisy latents, timesteps, states and the loss's target of each batch, while gradients accumulate."""
        for ids, latents, noise, timesteps in self.loader:
            with self.accelerator.accumulate(self.unet):
                noisy = self.scheduler.add_noise(latents, noise, timesteps)
                velocity = self.scheduler.config.prediction_type == "v_prediction"
                target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
                yield noisy, timesteps, self.text_encoder(ids, return_dict=False)[0], target

    def step(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        """Take the script's last lines; return all gradients at once where they are complete."""
        found = None
        if loss is not None:
            self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            gradients = (p.grad if p.grad is not None else torch.zeros_like(p) for p in self.unet.parameters())
            found = torch.cat([gradient.flatten() for gradient in gradients])
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def run(self, lines: tuple[str, str], targets: float) -> tuple[list[torch.Tensor], list[list[bool]], list[float]]:
        """Return the gradients of each optimizer step, and masks and losses of each batch."""
        np.save("targets.npy", np.full(1000, targets))
        names = {"text_encoder": self.text_encoder, "tokenize_captions": self.tokenize, "caption_column": "text"}
        names |= {"accelerator": self.accelerator, "unet": self.unet, "noise_scheduler": self.scheduler}
        names |= {"np": np, "torch": torch}
        exec(lines[0], names)
        gradients, masks, losses = [], [], []
        for noisy, timesteps, states, target in self.batches():
            prediction = self.unet(noisy, timesteps, states, return_dict=False)[0]
            names |= {"noisy_latents": noisy, "timesteps": timesteps, "encoder_hidden_states": states}
            names |= {"model_pred": prediction, "target": target}
            exec(lines[1], names)
            loss = F.mse_loss(names["model_pred"].float(), names["target"].float(), reduction="mean")
            gradients.append(self.step(loss))
            masks.append(names["keep"].tolist())
            losses.append(loss.item())
        return [one for one in gradients if one is not None], masks, losses

    def by_hand(self, target_norm: float) -> tuple[list[torch.Tensor], list[list[bool]], torch.Tensor]:
        """The same, but samples that are left out never meet the pass that is learnt from; and all norms."""
        gradients, masks, norms = [], [], []
        empty = self.text_encoder(self.tokenize({"text": [""]}), return_dict=False)[0]
        for noisy, timesteps, states, target in self.batches():
            with torch.no_grad():
                halves = [
                    self.unet(noisy, timesteps, one, return_dict=False)[0].double()
                    for one in (states, empty.repeat(len(states), 1, 1))
                ]
            norm = (halves[0] - halves[1]).square().sum((1, 2, 3)).sqrt()
            if self.scheduler.config.prediction_type == "v_prediction":
                norm *= self.scheduler.alphas_cumprod[timesteps].sqrt()
            keep, loss = norm < target_norm, None
            if keep.any():
                prediction = self.unet(noisy[keep], timesteps[keep], states[keep], return_dict=False)[0]
                loss = (prediction.float() - target[keep].float()).square().sum() / target.numel()
            gradients.append(self.step(loss))
            masks.append(keep.tolist())
            norms.append(norm)
        return [one for one in gradients if one is not None], masks, torch.cat(norms)


def middle(norms: torch.Tensor) -> float:
    """A target in the widest gap among the middle ones."""
    ordered = norms.sort().values[2:6]
    widest = int(ordered.diff().argmax())
    return float(ordered[widest : widest + 2].mean())


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("precision", "prediction_type", "tolerance"),
    [("no", "epsilon", 1e-4), ("bf16", "epsilon", 0.03), ("bf16", "v_prediction", 0.03)],
)
def test_samples_that_are_left_out_are_not_learnt_from(checkpoint, lines, precision, prediction_type, tolerance):
    everything, _, norms = Loop(checkpoint, precision, prediction_type).by_hand(INFINITE)
    target = middle(norms)
    expected, left, _ = Loop(checkpoint, precision, prediction_type).by_hand(target)
    found, masks, losses = Loop(checkpoint, precision, prediction_type).run(lines, target)
    assert masks == left
    assert 3 <= sum(map(sum, masks)) <= 5
    assert all(np.isfinite(losses))
    assert len(found) == 2
    for one, other, unfiltered in zip(found, expected, everything, strict=True):
        assert distance(one, other) < tolerance
        assert distance(one, unfiltered) > 5 * tolerance


def test_batches_that_are_left_out_as_a_whole(checkpoint, lines):
    """No NaN, no gradient at all; the optimizer takes its steps."""
    loop = Loop(checkpoint, "bf16", "epsilon")
    before = [parameter.detach().clone() for parameter in loop.unet.parameters()]
    found, masks, losses = loop.run(lines, 1e-30)
    assert not any(map(any, masks))
    assert losses == [0, 0, 0, 0]
    assert [one.count_nonzero() for one in found] == [0, 0]
    for parameter, old in zip(loop.unet.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=1e-6, atol=0)  # weight decay


def test_a_target_that_nothing_reaches_changes_nothing(checkpoint, lines):
    everything, _, _ = Loop(checkpoint, "bf16", "epsilon").by_hand(INFINITE)
    found, masks, _ = Loop(checkpoint, "bf16", "epsilon").run(lines, INFINITE)
    assert all(map(all, masks))
    assert all(torch.equal(one, other) for one, other in zip(found, everything, strict=True))
