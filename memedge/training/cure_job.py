"""What a cure works on, read and checked, and the folders it works in."""

import shutil
from pathlib import Path

import msgspec
from accelerate import Accelerator

from memedge.audit import Similarity
from memedge.audit.pairs import read_all, read_pairs
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.engine import atomic
from memedge.engine.errors import InputError, shown
from memedge.engine.places import check_new_folder
from memedge.training.cure_figures import Cure, CureSettings

REPORTS = "cure"  # the folder in the new checkpoint that holds what was measured
FEWEST = 20  # ordinary pairs


class CureJob:
    """The pairs, and where the work is done.

    Attributes:
        memorized_file: which pictures are audited.
        memorized: pairs to forget.
        ordinary: pairs to go on knowing.
        work: the folder of what is done so far, beside the output.
        checkpoint: in it, the cured checkpoint.
    """

    def __init__(self, memorized: Path, ordinary: Path, output: Path, settings: CureSettings, resume: bool):
        """Read the files, and check the places.

        Raises:
            InputError: one of them cannot be used, or there is an unfinished job and not `resume`.
        """
        if settings.epochs < 1 or not settings.rate > 0:
            raise InputError("A cure takes at least one epoch, and a rate above 0.")
        self.output, self.memorized_file = output, memorized
        place = output.resolve()
        self.work = place.with_name(f"{place.name}.partial")
        self.checkpoint = self.work / place.name  # its name becomes the audit's
        check_new_folder(output, "name another folder for the cured checkpoint")
        if self.work.exists() and not resume:
            raise InputError(f"{self.work} holds an unfinished job: go on with it with --resume, or delete it.")
        self.memorized = [pair for pair in read_pairs(memorized.parent, memorized) if pair.memorized is not False]
        self.ordinary = read_pairs(ordinary.parent, ordinary)
        for file, pairs in ((memorized, self.memorized), (ordinary, self.ordinary)):
            if missing := [pair.name for pair in pairs if pair.caption is None]:
                raise InputError(f"{file} has no caption for {shown(missing[0])!r}: give every picture its caption.")
        if not self.memorized:
            raise InputError(
                f"{memorized} marks all its pictures as not memorized: give those that are to be forgotten."
            )
        if len(self.ordinary) < FEWEST:
            raise InputError(
                f"{ordinary} has {len(self.ordinary)} pairs: give at least {FEWEST} that the model is to go on knowing."
            )
        self._settings = settings

    def begin(self, model: DiffusionModel, similarity: Similarity, accelerator: Accelerator) -> None:
        """Read every picture once, and make the folder of the work, or see that it is this job's.

        Raises:
            InputError: a picture cannot be read; it is another job's.
        """
        digest, _ = read_all((*self.memorized, *self.ordinary), model.side)
        header = {
            "checkpoint": model.sha256,
            "pairs": digest,
            "settings": msgspec.json.encode(self._settings).decode(),
            "similarity": similarity.name,
        }
        known = self.work / "job.json"
        if accelerator.is_main_process and not known.exists():
            self.work.mkdir(exist_ok=True)
            atomic.write(known, msgspec.json.encode(header))
        accelerator.wait_for_everyone()
        if msgspec.json.decode(known.read_bytes()) != header:
            raise InputError(
                f"{self.work} is of another checkpoint, or of other pictures, captions or options: run that job again "
                "with --resume, or delete the folder."
            )

    def end(self, done: Cure) -> None:
        """Put the reports into the new checkpoint, and the checkpoint at its place."""
        reports = self.checkpoint / REPORTS
        reports.mkdir(exist_ok=True)  # of a run that was cut off right here
        (reports / "cure.json").write_bytes(msgspec.json.format(msgspec.json.encode(done)) + b"\n")
        for name in ("before", "after"):
            shutil.copytree(self.work / name, reports / name, dirs_exist_ok=True)
        self.checkpoint.replace(self.output.resolve())
        shutil.rmtree(self.work)
