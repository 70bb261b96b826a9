"""`memedge audit`: which of its training pictures does a checkpoint still print, by prompt or by any embedding."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path

import msgspec
import torch
from accelerate import PartialState
from safetensors.torch import save_file

import memedge
from memedge.audit.figures import DEFAULTS, Audit, AuditedImage, AuditSettings, Cost, summarise
from memedge.audit.journal import AuditJournal
from memedge.audit.page import page
from memedge.audit.pairs import load_pictures, read_pairs
from memedge.audit.picture import PictureAudit
from memedge.audit.sheet import sheet
from memedge.audit.similarity import Outlines, similarity_of
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.engine import atomic
from memedge.engine.errors import InputError
from memedge.engine.places import check_new_folder
from memedge.wording import counted

PAGE, DATA, SHEET, EMBEDDINGS = "report.html", "report.json", "sheet.png", "embeddings.safetensors"
Progress = Callable[[int, int], None]
Told = Callable[[str], None]


def audit(
    checkpoint: str,
    images: str | PathLike[str],
    output: str | PathLike[str],
    *,
    captions: str | PathLike[str] | None = None,
    settings: AuditSettings = DEFAULTS,
    sscd: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
    told: Told = lambda _: None,
) -> Audit | None:
    """Search, for each training picture, for an embedding that makes the model print it; write a folder.

    A model whose *prompts* no longer replicate may hold the pictures all the same. Source: DoRI, Kowalczuk et al., ICML
    2026 (docs/methods.md §8).

    The folder gets report.html (one page, nothing else needed), report.json (everything), sheet.png (what was printed)
    and embeddings.safetensors (the best embedding of each picture, float32 [L, D], by its name). What is found is kept
    beside it in a journal, `DIR.partial`, until then. Under `accelerate launch` the pictures are shared out among the
    processes; the main one writes the folder, and returns.

    Args:
        checkpoint: Stable Diffusion 1.x or 2.x: a folder in diffusers' format, or a hub's id.
        images: the folder of training pictures.
        output: the folder to make; what is there must be an empty one.
        captions: a file with columns image, caption and, where it is known, memorized; default: all pictures of the
            folder, searched for from random embeddings alone.
        settings: how.
        sscd: SSCD's TorchScript file; default: outlines, a stand-in.
        resume: go on from the journal of a run that was cut off, if there is one.
        command: how this was asked for: shown in the report.
        progress: called with the pictures that are done, and those there are.
        told: is told what takes long.

    Returns:
        The audit; None in processes other than the main one.

    Raises:
        InputError: settings, pictures, captions or a place that cannot be used; a journal of another job.
        ExportError: the checkpoint cannot be read, or is of another family.
        NotFiniteError: the model computes NaN or infinity.

    Examples:
        >>> from memedge.audit import audit
        >>> found = audit("checkpoint", "pictures", "report", captions="captions.csv")
        >>> for group in found.groups:
        ...     print(group.name, group.by_prompt.value, group.by_audit.value)
        memorized 0.0 1.0
        not memorized 0.0 0.0
    """
    folder = Path(output)
    _check(settings, folder, resume)
    state = PartialState(timeout=timedelta(days=7))  # a process that is done waits for the others
    job = _Job(checkpoint, Path(images), None if captions is None else Path(captions), settings, sscd, state, told)
    header = job.header()
    mine = job.pairs[state.process_index :: state.num_processes]
    with ExitStack() as stack:
        journal = AuditJournal(_journal(folder, state.process_index), header, resume)
        stack.callback(journal.close)
        try:
            for place, pair in enumerate(mine):
                if progress:
                    progress(place, len(mine))
                if pair.name not in journal:
                    (picture,), _ = load_pictures([pair], job.model.side)
                    with _memory(settings):
                        journal.put(job.of_picture(pair, picture), picture)
        except BaseException:
            if not len(journal):
                journal.delete()
            raise
    if progress:
        progress(len(mine), len(mine))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    with ExitStack() as stack:
        journals = [AuditJournal(_journal(folder, process), header, True) for process in range(state.num_processes)]
        for journal in journals:
            stack.callback(journal.close)
        found = [journals[place % len(journals)].get(pair.name) for place, pair in enumerate(job.pairs)]
        results = [image for image, _, _ in found]
        whole = Audit(
            checkpoint=job.model.id,
            checkpoint_sha256=job.model.sha256,
            similarity=job.similarity.name,
            copy=job.similarity.copy,
            settings=settings,
            device=str(state.device),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            version=memedge.__version__,
            cautions=job.cautions(results),
            groups=summarise(results, settings),
            images=results,
        )
        embeddings = {pair.name: embedding for pair, (_, _, embedding) in zip(job.pairs, found, strict=True)}
        _write(whole, [strip for _, strip, _ in found], embeddings, folder)
        for journal in journals:
            journal.delete()
    return whole


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
    _check_settings(settings)
    state = PartialState()
    job = _Job(checkpoint, Path(images), None if captions is None else Path(captions), settings, sscd, state, told)
    passes = [job.of_picture.passes(pair) for pair in job.pairs]
    forward, backward = (sum(rows) for rows in zip(*passes, strict=True))
    with _memory(settings):
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


class _Job:
    """What an audit works on, read and checked."""

    def __init__(
        self,
        checkpoint: str,
        images: Path,
        captions: Path | None,
        settings: AuditSettings,
        sscd: str | Path | None,
        state: PartialState,
        told: Told,
    ):
        self.pairs = read_pairs(images, captions)
        device = state.device
        self.similarity = similarity_of(sscd, device)
        self.model = DiffusionModel(checkpoint, device, told)
        self.of_picture = PictureAudit(self.model, self.similarity, settings)
        self._settings, self._processes = settings, state.num_processes
        # All of them now: a damaged one is to be found before hours of work.
        self._digest, self._changed = hashlib.sha256(), 0
        for pair in self.pairs:
            pictures, changed = load_pictures([pair], self.model.side)
            self._changed += changed
            self._digest.update(f"{pair.name}\n{pair.caption}\n{pair.memorized}\n".encode())
            self._digest.update(pictures.tobytes())
        self._unlisted = len(read_pairs(images)) - len(self.pairs) if captions else 0

    def header(self) -> dict[str, str]:
        """Return what the journal knows this job by."""
        return {
            "checkpoint": self.model.sha256,
            "pairs": self._digest.hexdigest(),
            "settings": msgspec.json.encode(asdict(self._settings)).decode(),
            "similarity": self.similarity.name,
            "processes": str(self._processes),
        }

    def cautions(self, results: Sequence[AuditedImage]) -> list[str]:
        """Return what makes the figures mean less than they seem to, in sentences."""
        found = []
        if isinstance(self.similarity, Outlines):
            found.append(
                "Copies were told by outlines, a stand-in that was tested on small drawings alone: for photographs "
                "give SSCD's weights with --sscd."
            )
        if not any(one.memorized is False for one in results):
            found.append(
                "No picture is known not to be memorized: enough steps print any picture, so give some as controls "
                "(memorized: false), and see how few steps print those."
            )
        if self._changed:
            found.append(
                f"{counted(self._changed, 'picture')} had another size than {self.model.side} × {self.model.side} "
                "pixels: scaled and cut about the centre."
            )
        if self._unlisted > 0:
            found.append(f"{counted(self._unlisted, 'picture')} of the folder stand in no row of the captions' file.")
        return found


def _check(settings: AuditSettings, output: Path, resume: bool) -> None:
    """Refuse what cannot end well, before anything is computed."""
    _check_settings(settings)
    check_new_folder(output, "name another folder for the report")
    if (journal := _journal(output, 0)).exists() and not resume:
        raise InputError(
            f"{journal} holds the results of an unfinished job: go on from it with --resume, or delete it."
        )


def _check_settings(settings: AuditSettings) -> None:
    for name in ("steps", "generations", "inference_steps", "rows"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} is {getattr(settings, name)}: give a whole number from 1 on.")


def _journal(output: Path, process: int) -> Path:
    place = output.resolve()
    return place.with_name(f"{place.name}.partial{f'-{process}' if process else ''}")


@contextmanager
def _memory(settings: AuditSettings) -> Iterator[None]:
    """Turn a GPU's full memory into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"The GPU's memory is too small for {settings.rows} rows at once: give a smaller --batch-size."
        ) from None


def _write(found: Audit, strips: Sequence[bytes], embeddings: dict[str, torch.Tensor], output: Path) -> None:
    with atomic.folder(output) as folder:
        (folder / PAGE).write_text(page(found, strips), encoding="utf-8")
        (folder / DATA).write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        sheet(found, strips).save(folder / SHEET, optimize=True)
        save_file(embeddings, folder / EMBEDDINGS)
