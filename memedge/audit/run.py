"""`memedge audit`: which of its training pictures does a checkpoint still print, by prompt or by any embedding."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path

import msgspec
import torch
from accelerate import PartialState
from safetensors.torch import save

import memedge
from memedge.audit.figures import DEFAULTS, Audit, AuditSettings, summarise
from memedge.audit.job import AuditJob, Told, check_settings, memory
from memedge.audit.journal import AuditJournal
from memedge.audit.page import page
from memedge.audit.pairs import load_picture
from memedge.audit.sheet import sheet
from memedge.engine import atomic
from memedge.engine.places import check_new_folder
from memedge.scoring.journal import beside, refuse_unfinished

PAGE, DATA, SHEET, EMBEDDINGS = "report.html", "report.json", "sheet.png", "embeddings.safetensors"
Progress = Callable[[int, int], None]


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
    job = AuditJob(checkpoint, Path(images), None if captions is None else Path(captions), settings, sscd, state, told)
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
                    picture, _ = load_picture(pair, job.model.side)
                    with memory(settings):
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


def _check(settings: AuditSettings, output: Path, resume: bool) -> None:
    """Refuse what cannot end well, before anything is computed."""
    check_settings(settings)
    check_new_folder(output, "name another folder for the report")
    refuse_unfinished(_journal(output, 0), resume)


def _journal(output: Path, process: int) -> Path:
    first = beside(output)
    return first.with_name(f"{first.name}-{process}") if process else first


def _write(found: Audit, strips: Sequence[bytes], embeddings: dict[str, torch.Tensor], output: Path) -> None:
    with atomic.folder(output) as folder:
        (folder / PAGE).write_text(page(found, strips), encoding="utf-8")
        (folder / DATA).write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        sheet(found, strips).save(folder / SHEET, optimize=True)
        (folder / EMBEDDINGS).write_bytes(save(embeddings))
