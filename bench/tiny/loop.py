"""What training the VAE and training the UNet share: schedule, average, checkpoints, progress. Seeded and resumable."""

import argparse
import signal
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

WARMUP_STEPS = 200
COOLDOWN_SHARE = 0.25
CHECKPOINT_SECONDS = 200
REPORT_STEPS = 100
MAX_NORM = 2.0  # of the gradient


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a rate that rises, is constant, and falls linearly to zero over the last quarter of the steps.

    So a run that turns out slow may be resumed with a smaller target.
    """
    cooldown = max(1, int(steps * COOLDOWN_SHARE))
    return peak * min(1.0, step / WARMUP_STEPS, (steps - step + 1) / cooldown)


class Training(ABC):
    """Everything that a run needs to go on exactly where it stopped.

    Random numbers come from one generator on the CPU, so that neither the device nor the workers change what is drawn.
    Each worker is a thread that computes the gradient of its part of the batch. They meet once in a step. Torch's own
    threads meet in each of its thousand operations, and come to nearly a halt where another process wants a core.
    `computed` are what the loss is computed with, copies of `parameters` in fewer bits, or the same.
    """

    def __init__(
        self,
        parameters: list[torch.Tensor],
        computed: list[torch.nn.Parameter],
        seed: int,
        batch: int,
        peak: float,
        average: float,
        workers: int,
    ):
        self.parameters, self.computed, self.batch, self.peak, self.decay = parameters, computed, batch, peak, average
        self.average = [p.detach().clone() for p in parameters]
        self.optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=1e-3, betas=(0.9, 0.99), foreach=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = parameters[0].device
        self.step = 0
        self.workers = workers
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    @abstractmethod
    def draw(self) -> tuple[torch.Tensor, ...]:
        """Return what one batch is made of, random numbers included: tensors whose first dimension is the batch."""

    @abstractmethod
    def loss(self, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a part's mean loss, and each sample's error for the report. Several threads call it at once."""

    def observe(self, errors: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> None:  # noqa: B027 - may stay empty
        """Learn from a batch's errors [B], after all parts are done."""

    def extra(self) -> dict[str, torch.Tensor]:
        """Return further state, tensors that `resume` fills again in place."""
        return {}

    def advance(self, steps: int) -> float:
        """Take one step of `steps`; return the mean error."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps, self.peak)
        batch = self.draw()
        parts = zip(*(values.chunk(self.workers) for values in batch), strict=True)
        gradients, errors = zip(*self.pool.map(self._gradient, parts), strict=True)
        for parameter, of_parts in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(of_parts).float().mean(0)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.copy_parameters()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        together = torch.cat(errors)
        self.observe(together, batch)
        return together.mean().item()

    def _gradient(self, part: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        loss, errors = self.loss(*part)
        return torch.autograd.grad(loss, self.computed), errors.detach()

    def save(self, path: Path) -> None:
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "extra": self.extra(),
            "step": self.step,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)  # a kill while writing leaves the previous checkpoint

    def resume(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
        self.set_parameters(state["parameters"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        for name, value in self.extra().items():
            value.copy_(state["extra"][name])
        self.step = state["step"]

    def set_parameters(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
        self.copy_parameters()

    def copy_parameters(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.computed, self.parameters)


def arguments(description: str, samples: int) -> argparse.Namespace:
    """Read what a training script is told: data, out, samples, seed, workers, device; make the folder to write in."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="threads, each with a part of the batch; 1 on a GPU")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (untested)")
    found = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(found.seed)
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def run(training: Training, samples: int, checkpoint: Path) -> bool:
    """Train up to `samples` from the checkpoint, if there is one; return whether all were taken.

    SIGTERM ends it after a checkpoint; a kill loses what was done since the last one, under four minutes.
    """
    if checkpoint.exists():
        training.resume(checkpoint)
    steps = samples // training.batch
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    saved = reported = time.monotonic()
    total, count = 0.0, 0
    while training.step < steps and not stopped.is_set():
        total += training.advance(steps)
        count += 1
        now = time.monotonic()
        if training.step % REPORT_STEPS == 0:
            speed = count * training.batch / (now - reported)
            left = (steps - training.step) * training.batch / speed / 60
            seen = training.step * training.batch
            print(f"{seen} samples, {total / count:.4f}, {speed:.0f}/s, {left:.0f} minutes left", flush=True)
            total, count, reported = 0.0, 0, now
        if now - saved > CHECKPOINT_SECONDS:
            training.save(checkpoint)
            saved = now
    training.save(checkpoint)
    return not stopped.is_set()
