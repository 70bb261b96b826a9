"""Fine-tune the embedded model on duplicated pictures, with MemorizationFilter and without: what is copied then.

    python bench/tiny/finetune.py DATA_DIR OUT_DIR [--samples N] [--rate R] [--sheet FILE.png] [--json FILE]

DATA_DIR is what bench/tiny/prepare.py writes. Run the same command again after a kill: each arm goes on from its last
checkpoint, OUT_DIR/<arm>/checkpoint.pt, and its model is then a pipeline of diffusers, OUT_DIR/<arm>/pipeline.

Half of each batch are duplicated pairs: 24 concepts that the model has never seen, one picture and one caption each.
The other half are ordinary pairs of held-out concepts of the groups "frequent" and "seen", drawn as in the first
training; half of these concepts are left out and are the clean captions that are measured. As diffusers' text-to-image
script does, the UNet alone is trained, on the plain squared error, and no caption is dropped. Arms differ in which
samples are left out, as docs/training.md says, and in nothing that is drawn:

- none: no sample is.
- one, each: MemorizationFilter's, with one target, or one for each timestep (targets.py).
- random: in each step as many samples as "each" left out in that step, drawn from the whole batch without regard to
  what they are.

finetuned.py has what is measured. One thread trains.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dataset import Caption, load_captions
from duplicated import Duplicated, duplicate
from finetuned import report
from loop import Training, run
from model import Model, scheduler
from targets import Pairs, Targets, encode_captions, kept_targets, load, of_groups, shown, thinned
from train import Exposures

from memedge.training import MemorizationFilter

BATCH = 16
TARGETS_ON = 100  # captions
TIMED = 10  # steps
ARMS = ("none", "each", "random", "one")
ORDINARY = ("frequent", "seen")


class FineTuning(Training):
    """One arm. `targets` are the filter's; `left_out`, bool [steps, BATCH], is of another arm, for "random"."""

    def __init__(
        self,
        model: Model,
        duplicated: Pairs,
        ordinary: list[Caption],
        latents: np.ndarray,
        steps: int,
        rate: float,
        seed: int,
        targets: float | np.ndarray | None = None,
        left_out: torch.Tensor | None = None,
    ):
        parameters = list(model.unet.train().parameters())
        super().__init__(parameters, parameters, seed, BATCH, rate, 0.0, 1)
        self.model, self.duplicated, self.latents = model, duplicated, latents
        self.exposures = Exposures(ordinary)
        self.states = encode_captions(model, [one.text for one in ordinary])
        self.empty = encode_captions(model, [""])
        self.alphas = scheduler().alphas_cumprod
        self.filter = None if targets is None else MemorizationFilter(model.unet, targets)
        self.shuffled = left_out
        self.left_out = torch.zeros(steps, BATCH, dtype=torch.bool)

    def extra(self) -> dict[str, torch.Tensor]:
        return {"left_out": self.left_out}

    def draw(self) -> tuple[torch.Tensor, ...]:
        """Return embeddings [B, 24, 96], latents and noise [B, 4, 16, 16], timesteps [B]: first half duplicated."""
        half = BATCH // 2
        pair = torch.randint(len(self.duplicated.latents), (half,), generator=self.generator)
        caption, picture = self.exposures.draw(BATCH - half, self.generator)
        states = torch.cat([self.duplicated.states[pair], self.states[caption]])
        ordinary = torch.from_numpy(self.latents[picture.numpy()]).float()
        latent = torch.cat([self.duplicated.latents[pair], ordinary])
        noise = torch.randn(latent.shape, generator=self.generator)
        return states, latent, noise, torch.randint(1000, (BATCH,), generator=self.generator)

    def loss(self, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, latent, noise, timestep = part
        alpha = self.alphas[timestep][:, None, None, None]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        predicted = self.model.unet(noisy, timestep, states).sample
        keep = self.keep(noisy, timestep, states, predicted)
        self.left_out[self.step - 1] = ~keep
        errors = (predicted.detach() - noise).square().mean((1, 2, 3))
        target = torch.where(keep[:, None, None, None], noise, predicted.detach())
        return (predicted - target).square().mean(), errors

    def keep(
        self, noisy: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor:
        """Return which samples to learn from, bool [B]."""
        if self.filter is not None:
            return self.filter.mask(noisy, timestep, states, self.empty, prediction=predicted)
        if self.shuffled is None:
            return torch.ones(BATCH, dtype=torch.bool)
        order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(self.step))
        return ~self.shuffled[self.step - 1][order]


@dataclass(frozen=True)
class Bench:
    """What all arms share: data, targets and settings."""

    duplicated: Duplicated
    ordinary: list[Caption]
    targets: Targets
    latents: np.ndarray
    steps: int
    rate: float
    seed: int

    def arm(self, name: str, left_out: torch.Tensor | None = None) -> FineTuning:
        """Return an arm at its start; `left_out` is what "random" shuffles."""
        targets = {"one": self.targets.one, "each": self.targets.each}.get(name)
        own = self.duplicated.pairs, self.ordinary, self.latents, self.steps, self.rate, self.seed
        return FineTuning(load(), *own, targets, left_out if name == "random" else None)


def seconds(bench: Bench) -> dict[str, float]:
    """Return the median seconds of a step without and with the filter, in turn; the first of each warms up.

    Of the process: one thread computes, and other work on a shared machine does not count.
    """
    took: dict[str, list[float]] = {name: [] for name in ("none", "each")}
    arms = {name: bench.arm(name) for name in took}
    for _ in range(1 + TIMED):
        for name, training in arms.items():
            start = time.process_time()
            training.advance(bench.steps)
            took[name].append(time.process_time() - start)
    return {name: float(np.median(times[1:])) for name, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=7_040, help="half of them duplicated")
    parser.add_argument("--rate", type=float, default=5e-4, help="AdamW's, at its highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, data = load(), load_captions(arguments.data / "captions.json")
    latents = np.load(arguments.data / "latents.npy", mmap_mode="r")
    duplicated = duplicate(model, data, arguments.data, arguments.seed)
    duplicated.save(arguments.out / "duplicated")
    calibration, held_out = (of_groups(data, ORDINARY, split, memorized=False) for split in ("calibration", "held-out"))
    concepts = list(dict.fromkeys(one.concept for one in held_out))
    ordinary = [one for one in held_out if one.concept in concepts[::2]]
    clean = shown(model, thinned([one for one in held_out if one.concept in concepts[1::2]], TARGETS_ON), latents)
    before = shown(model, thinned(calibration, TARGETS_ON), latents)
    targets = kept_targets(arguments.out / "targets.npz", model, before)
    print(f"targets: one {targets.one:.2f}, each {targets.each[0]:.2f} to {targets.each[-1]:.2f}", flush=True)
    steps = arguments.samples // BATCH
    bench = Bench(duplicated, ordinary, targets, latents, steps, arguments.rate, arguments.seed)
    left_out: dict[str, torch.Tensor] = {}
    for name in ARMS:
        print(f"arm {name}", flush=True)
        folder = arguments.out / name
        folder.mkdir(exist_ok=True)
        training = bench.arm(name, left_out.get("each"))
        if not run(training, arguments.samples, folder / "checkpoint.pt"):
            raise SystemExit("Stopped; run the same command again to go on.")
        left_out[name] = training.left_out
        if not (folder / "pipeline").exists():
            training.model.save(folder / "pipeline")
    made = duplicated.texts, duplicated.pictures, duplicated.pairs
    report(*made, clean, left_out, seconds(bench), arguments.out, arguments.sheet, arguments.json)


if __name__ == "__main__":
    main()
