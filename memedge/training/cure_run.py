"""`memedge cure`: a checkpoint forgets pictures, so that no embedding brings them back; audited before and after."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from os import PathLike
from pathlib import Path

import msgspec
import torch
from accelerate import Accelerator, PartialState

from memedge.audit import Audit, AuditSettings, Similarity, audit
from memedge.audit.cost import row_seconds
from memedge.audit.job import memory
from memedge.audit.pairs import Pair, load_picture, read_pairs
from memedge.audit.picture import PictureAudit
from memedge.audit.run import DATA
from memedge.audit.search import DRAWS, seed_of
from memedge.audit.similarity import similarity_of
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.training.cure_figures import DEFAULTS, Cure, CureCost, CureSettings
from memedge.training.cure_job import CureJob
from memedge.training.forgetting import ROWS, TOGETHER, UPDATES, Forgetting, Memorized, Ordinary
from memedge.training.surrogates import TRIED, Surrogates

HELD_OUT = 10  # every tenth ordinary pair is not trained on
LOSS_DRAWS = 8  # of noise and timestep, of each held-out pair

Told = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def cure(
    checkpoint: str,
    memorized: str | PathLike[str],
    ordinary: str | PathLike[str],
    output: str | PathLike[str],
    *,
    settings: CureSettings = DEFAULTS,
    sscd: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress = lambda _what, _done, _total: None,
    told: Told = lambda _: None,
) -> Cure | None:
    """Fine-tune a checkpoint until no embedding prints some pictures any more; audit it before and after.

    Source: Kowalczuk et al., ICML 2026 (docs/methods.md §8). The new checkpoint is the old one with another UNet; its
    folder `cure` holds both audits and cure.json. What is done so far is kept in `NEW.partial` until then.

    Args:
        checkpoint: Stable Diffusion 1.x or 2.x: a folder in diffusers' format, or a hub's id.
        memorized: a file with columns image and caption, as `audit` takes it; the images lie beside it. What it marks
            as not memorized is audited too, as controls, and not forgotten.
        ordinary: the same of pairs that the model is to go on knowing, from its training data.
        output: the folder to make.
        settings: how.
        sscd: SSCD's TorchScript file; default: outlines, a stand-in.
        resume: go on with a run that was cut off, if there is one.
        command: how this was asked for: shown in the reports.
        progress: called with what is going on, how much is done, and how much there is.
        told: is told what takes long.

    Returns:
        What was done; None in processes other than the main one.

    Raises:
        InputError: settings, pictures, captions or a place that cannot be used; a run of another job.
        ExportError: the checkpoint cannot be read, or is of another family.
        NotFiniteError: the model computes NaN or infinity, or training diverges.

    Examples:
        >>> from memedge.training import cure
        >>> cured = cure("checkpoint", "memorized/captions.csv", "ordinary/captions.csv", "cured")
        >>> cured.before[0].by_audit.value, cured.after[0].by_audit.value
        (1.0, 0.0)
    """
    job = CureJob(Path(memorized), Path(ordinary), Path(output), settings, resume)
    PartialState(timeout=timedelta(days=7))  # a process that is done waits for the others
    accelerator = Accelerator()
    similarity = similarity_of(sscd, accelerator.device)
    # Loaded again where it is trained: on a GPU there may be no room for two, and each audit has its own.
    job.begin(DiffusionModel(checkpoint, accelerator.device, told), similarity, accelerator)

    def audited(what: str, of: str, name: str) -> Audit | None:
        done = job.work / name
        if done.exists():
            return msgspec.json.decode((done / DATA).read_bytes(), type=Audit)
        return audit(
            of,
            job.memorized_file.parent,
            done,
            captions=job.memorized_file,
            settings=settings.audit,
            sscd=sscd,
            resume=True,
            command=command,
            progress=lambda done, total: progress(what, done, total),
        )

    before = audited("auditing before", checkpoint, "before")
    trained = _train(job, checkpoint, similarity, settings, accelerator, progress)
    after = audited("auditing after", str(job.checkpoint), "after")
    if not accelerator.is_main_process or before is None or after is None:
        return None
    done = Cure(
        checkpoint=before.checkpoint,
        checkpoint_sha256=before.checkpoint_sha256,
        settings=settings,
        memorized=len(job.memorized),
        ordinary=len(job.ordinary),
        of_captions=trained.of_captions,
        before=before.groups,
        after=after.groups,
        loss_before=trained.loss_before,
        loss_after=trained.loss_after,
        seconds=trained.seconds,
        device=str(accelerator.device),
    )
    job.end(done)
    return done


@dataclass(frozen=True)
class _Trained:
    of_captions: int
    loss_before: float
    loss_after: float
    seconds: float


def estimate(
    checkpoint: str,
    memorized: str | PathLike[str],
    ordinary: str | PathLike[str],
    *,
    settings: CureSettings = DEFAULTS,
    told: Told = lambda _: None,
) -> CureCost:
    """Return what a cure would cost at most; arguments and errors are those of `cure`."""
    pairs, kept = read_pairs(Path(memorized).parent, Path(memorized)), read_pairs(Path(ordinary).parent, Path(ordinary))
    state, of_audit = PartialState(), settings.audit
    model = DiffusionModel(checkpoint, state.device, told)
    auditing = PictureAudit(model, similarity_of(None, state.device), of_audit)
    forward, backward = (2 * sum(rows) for rows in zip(*map(auditing.passes, pairs), strict=True))
    forgotten = sum(pair.memorized is not False for pair in pairs)
    surrogates = forgotten * TRIED * of_audit.inference_steps * 2
    rounds = settings.epochs * -(-forgotten // TOGETHER)
    searches, updates = rounds * TOGETHER * of_audit.steps * DRAWS, rounds * UPDATES * TOGETHER * ROWS * 2
    losses = 2 * LOSS_DRAWS * -(-len(kept) // HELD_OUT)
    of_forward, of_search = row_seconds(model, of_audit.rows)
    model.unet.requires_grad_(True)
    of_update = row_seconds(model, of_audit.rows)[1]
    seconds = (forward + surrogates + losses) * of_forward + (backward + searches) * of_search + updates * of_update
    return CureCost(
        (forward, backward), surrogates, searches, updates, seconds / state.num_processes, str(state.device)
    )


def _train(
    job: CureJob,
    checkpoint: str,
    similarity: Similarity,
    settings: CureSettings,
    accelerator: Accelerator,
    progress: Progress,
) -> _Trained:
    """Write job.checkpoint; if it is there, return what was kept of its training."""
    kept = job.work / "trained.json"
    if not job.checkpoint.exists():
        of_audit, model = settings.audit, DiffusionModel(checkpoint, accelerator.device)
        surrogates = Surrogates(
            model, similarity, of_audit.guidance, of_audit.inference_steps, of_audit.rows, of_audit.seed
        )
        memorized, of_captions = [], 0
        for place, pair in enumerate(job.memorized):
            progress("making surrogates", place, len(job.memorized))
            picture, _ = load_picture(pair, model.side)
            assert pair.caption is not None
            latents, of_caption = surrogates(pair.name, picture, model.encode([pair.caption])[0])
            memorized.append(Memorized(pair.name, pair.caption, model.latents(picture[None])[0], latents))
            of_captions += of_caption
        trained_on = [pair for place, pair in enumerate(job.ordinary) if place % HELD_OUT]
        held_out = _ordinary(model, job.ordinary[::HELD_OUT], progress)
        training = Forgetting(
            model,
            memorized,
            _ordinary(model, trained_on, progress),
            epochs=settings.epochs,
            rate=settings.rate,
            steps=of_audit.steps,
            rows=of_audit.rows,
            seed=of_audit.seed,
            accelerator=accelerator,
        )
        loss_before = _loss(model, held_out, of_audit)
        with memory(of_audit):
            training.run(job.work / "training.pt", lambda done, total: progress("training", done, total))
        trained = _Trained(of_captions, loss_before, _loss(model, held_out, of_audit), training.seconds)
        if accelerator.is_main_process:
            kept.write_bytes(msgspec.json.encode(trained))
            partial = job.checkpoint.with_name("saving")
            shutil.rmtree(partial, ignore_errors=True)
            model.save(partial)
            partial.replace(job.checkpoint)
        accelerator.wait_for_everyone()
    return msgspec.json.decode(kept.read_bytes(), type=_Trained)


def _ordinary(model: DiffusionModel, pairs: list[Pair], progress: Progress) -> Ordinary:
    found = []
    for place, pair in enumerate(pairs):
        progress("encoding ordinary pictures", place, len(pairs))
        found.append(model.latents(load_picture(pair, model.side)[0][None]).cpu())
    return Ordinary(torch.cat(found), [pair.caption or "" for pair in pairs])


def _loss(model: DiffusionModel, pairs: Ordinary, settings: AuditSettings) -> float:
    """Return the mean squared error on pairs, with the same noise each time."""
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "held-out pairs"))
    latents = pairs.latents.repeat(LOSS_DRAWS, 1, 1, 1)
    states = model.encode(pairs.captions).repeat(LOSS_DRAWS, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(model.timesteps, (len(latents),), generator=generator)
    losses = []
    with torch.no_grad():
        for part in torch.split(torch.arange(len(latents)), settings.rows):
            some, of_noise, at = (tensor[part].to(model.device) for tensor in (latents, noise, timesteps))
            losses.append(model.loss(some, of_noise, at, states[part.to(model.device)]))
    return float(torch.cat(losses).mean())
