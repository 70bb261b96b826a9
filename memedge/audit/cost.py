"""What an audit costs at most: rows of the UNet, counted, and their time, measured on a few."""

import time
from os import PathLike
from pathlib import Path

import torch
from accelerate import PartialState

from memedge.audit.figures import DEFAULTS, AuditSettings, Cost
from memedge.audit.job import AuditJob, Told, check_settings, memory
from memedge.autograd.diffusion_model import DiffusionModel


def estimate(
    checkpoint: str,
    images: str | PathLike[str],
    *,
    captions: str | PathLike[str] | None = None,
    settings: AuditSettings = DEFAULTS,
    sscd: str | Path | None = None,
    told: Told = lambda _: None,
) -> Cost:
    """Return what an audit would cost at most; arguments and errors are those of `audit`."""
    check_settings(settings)
    state = PartialState()
    job = AuditJob(checkpoint, Path(images), None if captions is None else Path(captions), settings, sscd, state, told)
    passes = [job.of_picture.passes(pair) for pair in job.pairs]
    forward, backward = (sum(rows) for rows in zip(*passes, strict=True))
    with memory(settings):
        of_forward, of_backward = row_seconds(job.model, settings.rows)
    seconds = (forward * of_forward + backward * of_backward) / state.num_processes
    return Cost(len(job.pairs), forward, backward, seconds, str(state.device))


def row_seconds(model: DiffusionModel, rows: int) -> tuple[float, float]:
    """Return the seconds that a row of the UNet takes, without gradients and with those of the embeddings: medians."""
    latents, timesteps = torch.randn(rows, *model.shape, device=model.device), torch.arange(rows, device=model.device)
    states = model.empty.repeat(rows, 1, 1)

    def forward() -> None:
        with torch.no_grad():
            model.loss(latents, latents, timesteps, states)

    def backward() -> None:
        loss = model.loss(latents, latents, timesteps, states.clone().requires_grad_())
        torch.autograd.backward(loss.sum())

    found = []
    for work in (forward, backward):
        times = []
        for _ in range(4):
            began = time.perf_counter()
            work()
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(time.perf_counter() - began)
        found.append(sorted(times[1:])[1] / rows)  # the first is warming up
    return found[0], found[1]
