"""Distil guidance into the embedded model, and compare what tells of memorization in the student. Resumable.

    python bench/tiny/distil.py DATA_DIR OUT_DIR

The student is the embedded model whose UNet is also told a guidance scale g, as that of a latent consistency model is.
It learns what its teacher gives with guidance, ε_0 + g (ε_c − ε_0), for g from 1 to 8 (Meng et al., CVPR 2023, stage
one), on the embedded model's own training data. OUT_DIR/pipeline is the student, OUT_DIR/engine an engine of it that is
told 4. The table has held-out captions, labelled by what the teacher generates with guidance 4. Then: how often the
student copies, where its teacher does and where it does not.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from copies import fields, nearest, printed
from dataset import Caption, load_captions
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from flow_table import with_interval
from generate import GUIDANCE, STEPS, noise
from label import COPY
from loop import Training, arguments, run
from model import Model, scheduler
from targets import encode_captions, load, thinned
from train import AVERAGE, CAPTION_DROPOUT, Exposures
from vae import decode

from memedge import export_engine
from memedge.detectors import make
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.engine import Engine
from memedge.export.sources.denoisers.guidance_embedding import guidance_embedding
from memedge.metrics import auc, tpr

BATCH = 32
LEARNING_RATE = 3e-4
WIDTH = 256  # of the scale's embedding, LCM's
HIGHEST = 8.0
SEEDS = range(4)
SHOWN = 60  # captions that are generated, of each kind
UNSEEN = 400  # captions that are scored, of concepts that were left out


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the same UNet, which is told a scale and does not yet go by it."""
    student = UNet2DConditionModel.from_config({**teacher.config, "time_cond_proj_dim": WIDTH})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert (missing, unexpected) == (["time_embedding.cond_proj.weight"], [])
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    student.set_attn_processor(AttnProcessor())
    return student


class Distillation(Training):
    """`latents` are float16 [N, 4, 16, 16], by the pictures' ids; they may be memory-mapped."""

    def __init__(self, data: list[Caption], latents: np.ndarray, teacher: Model, seed: int, workers: int):
        self.teacher, self.student = teacher, student_of(teacher.unet)
        parameters = list(self.student.parameters())
        super().__init__(parameters, parameters, seed, BATCH, LEARNING_RATE, AVERAGE, workers)
        self.latents, self.exposures = latents, Exposures(data)
        self.states = encode_captions(teacher, [*(caption.text for caption in data), ""])
        self.alphas = scheduler().alphas_cumprod

    def draw(self) -> tuple[torch.Tensor, ...]:
        """Return captions' places [B], latents and noise [B, 4, 16, 16], timesteps and scales [B]."""
        caption, picture = self.exposures.draw(self.batch, self.generator)
        caption[torch.rand(self.batch, generator=self.generator) < CAPTION_DROPOUT] = len(self.states) - 1
        latent = torch.from_numpy(self.latents[picture.numpy()]).float()
        noise = torch.randn(latent.shape, generator=self.generator)
        scale = 1 + (HIGHEST - 1) * torch.rand(self.batch, generator=self.generator, dtype=torch.float64)
        return caption, latent, noise, torch.randint(1000, (self.batch,), generator=self.generator), scale

    def loss(self, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        caption, latent, noise, timestep, scale = part
        alpha = self.alphas[timestep][:, None, None, None]
        noisy, states = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise, self.states[caption]
        with torch.no_grad():
            empty = self.states[-1:].expand_as(states)
            pair = self.teacher.unet(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([states, empty])).sample
            cond, uncond = pair.chunk(2)
            guided = uncond + scale.float()[:, None, None, None] * (cond - uncond)
        told = guidance_embedding(scale, WIDTH)
        errors = (self.student(noisy, timestep, states, timestep_cond=told).sample - guided).square().mean((1, 2, 3))
        return errors.mean(), errors

    def pipeline(self, folder: Path) -> None:
        """Write the averaged student as a pipeline of diffusers."""
        averaged = load()
        averaged.unet = student_of(averaged.unet)
        with torch.no_grad():
            for parameter, value in zip(averaged.unet.parameters(), self.average, strict=True):
                parameter.copy_(value)
        averaged.save(folder)


@dataclass(frozen=True)
class Chosen:
    """Held-out captions by what the teacher generates; `clean` are of groups that it was trained on."""

    memorized: list[str]
    clean: list[str]
    frequent: list[str]  # those of the clean ones that were shown as often as memorized ones
    unseen: list[str]  # clean ones of concepts that were left out


def chosen() -> Chosen:
    rows = [row for row in captions() if row.split == "held-out"]
    trained, unseen = ([row for row in rows if (row.group == "unseen") is left_out] for left_out in (False, True))
    return Chosen(
        [row.prompt for row in trained if row.memorized],
        [row.prompt for row in trained if row.clean],
        [row.prompt for row in trained if row.clean and row.group == "frequent"],
        thinned([row.prompt for row in unseen if row.clean], UNSEEN),
    )


def table(engine: Engine, of: Chosen) -> None:
    """Print AUCs and TPRs, with 95 % intervals over captions."""
    print(", ".join(f"{len(prompts)} {kind}" for kind, prompts in vars(of).items()))
    print("| model | detector | mean, memorized | AUC | TPR@1%FPR | AUC, frequent | AUC, unseen |\n|" + 7 * "---|")
    teacher = Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)
    for model, of_model, name in (
        ("student", engine, "norm-guidance"),
        ("student", engine, "norm"),
        ("teacher", teacher, "norm"),
    ):
        for draws in (1, 4):
            statistic = make(name, of_model, draws)
            found = {kind: statistic(prompts).mean(axis=1) for kind, prompts in vars(of).items()}
            cells = [model, f"{name} × {draws}", f"{found['memorized'].mean():.2f}"]
            strict = partial(tpr, percent=1)
            for measure, kind in ((auc, "clean"), (strict, "clean"), (auc, "frequent"), (auc, "unseen")):
                cells.append(with_interval(measure, found["memorized"], found[kind]))
            print("| " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def generated(student: Model, prompts: list[str]) -> torch.Tensor:
    """Return latents [N · seeds, 4, 16, 16] as the student makes them, one pass a step."""
    states = encode_captions(student, prompts).repeat_interleave(len(SEEDS), 0)
    latent, ddim = noise(SEEDS).repeat(len(prompts), 1, 1, 1), scheduler()
    told = guidance_embedding(torch.full((len(latent),), GUIDANCE, dtype=torch.float64), WIDTH)
    ddim.set_timesteps(STEPS)
    for timestep in ddim.timesteps:
        predicted = student.unet(latent, timestep, states, timestep_cond=told).sample
        latent = ddim.step(predicted, timestep, latent).prev_sample
    return latent


def copied(student: Model, data: list[Caption], latents: np.ndarray, of: Chosen) -> None:
    """Print the share of copies among what the student makes of some captions of each kind."""
    ids = sorted({picture for caption in data for picture, _ in caption.pictures})
    training = printed(student.vae, latents[ids])
    for kind, prompts in (("memorized", of.memorized), ("clean", of.clean)):
        some = thinned(prompts, SHOWN)
        similarity, _ = nearest(fields(decode(student.vae, generated(student, some))), training)
        rate = (similarity >= COPY).float().reshape(len(some), -1).mean(1)
        most = int((rate > 0.5).sum())
        print(f"{kind}: {float(rate.mean()):.2f} of the student's are copies; most of {most} of {len(some)} captions'")


def main() -> None:
    told = arguments(__doc__, 76_000)
    data, latents = load_captions(told.data / "captions.json"), np.load(told.data / "latents.npy", mmap_mode="r")
    training = Distillation(data, latents, load(), told.seed, told.workers)
    if not run(training, told.samples, told.out / "checkpoint.pt"):
        raise SystemExit("Stopped; run the same command again to go on.")
    pipeline, engine, of = told.out / "pipeline", told.out / "engine", chosen()
    training.pipeline(pipeline)
    shutil.rmtree(engine, ignore_errors=True)  # of fewer samples
    export_engine(pipeline, engine, draws=4, guidance=GUIDANCE)
    table(Engine.open(engine, "cpu", None, 1), of)
    copied(load(pipeline), data, latents, of)


if __name__ == "__main__":
    main()
