"""Prompts that were admitted together, from their first pass to their last verdict."""

import numpy as np
import numpy.typing as npt

from memedge.decision.early import Outcome, Passes
from memedge.decision.reasons import log, make_verdicts
from memedge.decision.rounding import settle_outcome
from memedge.decision.rule import Rule
from memedge.decision.screen import Screening, screen
from memedge.engine.arrays import Bools, Floats, Indices
from memedge.engine.engine import INDEX, Engine, States
from memedge.engine.errors import MemedgeError, NotFiniteError
from memedge.engine.precision import BATCH_NOISE
from memedge.results import Verdict
from memedge.serving.jobs import Job

_NOT_FINITE = (
    "The model's predictions for this prompt hold NaN, infinity or values too large to square: run it in a higher "
    "precision."
)
Finished = list[tuple[Job, Verdict | MemedgeError]]


class Cohort:
    """Knows which rows of the UNet its prompts need next, and what follows from them.

    Attributes:
        screened: the jobs that the screen finished at once; the others are the B prompts.
        states: the prompts' embeddings, float32 [B, K, D].
        prompt, row: the rows that are needed next, [R] each: whose they are, and which.
    """

    def __init__(self, engine: Engine, rule: Rule, key: str, jobs: list[Job], ids: Indices, truncated: Bools):
        """Encode the jobs' prompts, whose `early` is one.

        Args:
            engine: the engine.
            rule: the rule by which verdicts are given.
            key: what runs, for the verdicts' words.
            jobs: B jobs.
            ids: their prompts', [B, T · L].
            truncated: [B], which of these were cut.
        """
        self._engine, self._key, self._jobs = engine, key, jobs
        early = jobs[0].early
        self._rule = rule if early in ("conformal", "screen") else rule.without_conformal()
        self._said_by = rule
        self._ids, self._truncated = ids, truncated
        encoded = engine.encode(ids)
        self.screened: Finished = []
        self._screening: Screening | None = None
        if early == "screen":
            encoded = self._screen(encoded)
        self.states: npt.NDArray[np.float32] = engine.backend.memory.download(encoded.tensor)
        self._known: Bools = ~encoded.empty
        self._whole = early == "off" or rule.threshold is None
        self._passes: Passes | None = None
        self._bad, self._finished = np.zeros((2, len(self._jobs)), dtype=np.bool_)
        self._prompts: Indices = np.arange(len(self._jobs))
        self._ask(range(engine.passes if self._whole else engine.draws))

    def _screen(self, encoded: States) -> States:
        """Finish the jobs that the screen passes; return the states of the others."""
        engine, jobs = self._engine, self._jobs
        screening = screen(engine, self._rule, encoded, lambda one: engine.encode(self._ids[one, None]))
        passed, rest = np.flatnonzero(screening.passed), np.flatnonzero(~screening.passed)
        self.screened = self._verdicts([jobs[row] for row in passed], self._truncated[passed], screening.outcome())
        self._jobs = [jobs[row] for row in rest]
        self._ids, self._truncated = self._ids[rest], self._truncated[rest]
        self._screening = screening.of(rest)
        return engine.select(encoded, rest) if len(rest) else encoded

    def take(self, found: Floats) -> Finished:
        """Take the statistics of the rows, float64 [3, R]; return the jobs that are finished by them."""
        shape = len(self._prompts), -1
        scale = self._engine.directory.manifest.norm_factor * self._known[self._prompts, None]
        norm = found[0].reshape(shape) * scale
        cosine = found[INDEX[self._rule.alignment]].reshape(shape) * self._known[self._prompts, None]
        bad = np.isnan(found[0]).reshape(shape).any(axis=1)
        self._bad[self._prompts[bad]] = True
        if self._whole:
            draws = self._engine.draws
            outcome = Outcome.whole(
                self._said_by, norm[:, :draws].mean(1), cosine[:, draws:].mean(1), self._engine.passes
            )
            return self._finish(self._prompts, outcome)
        if self._passes is None:
            noise = BATCH_NOISE[self._engine.backend.precision]
            self._passes = Passes(self._rule, np.nan_to_num(norm.mean(1)), self._engine.draws, noise)
            done = np.setdiff1d(self._prompts, self._passes.open)
        else:
            done = self._passes.add(np.nan_to_num(cosine[:, 0]))
        if len(self._passes.open):
            self._prompts = self._passes.open
            self._ask(range(self._engine.draws + self._passes.draw, self._engine.draws + self._passes.draw + 1))
        else:
            self.prompt = self.row = self._prompts[:0]
        return self._finish(done, self._passes.outcome(done)) if len(done) else []

    def give_up(self) -> list[Job]:
        """Need nothing more; return the jobs that were not finished."""
        self.prompt = self.row = self._prompts[:0]
        return [job for job, finished in zip(self._jobs, self._finished, strict=True) if not finished]

    def _ask(self, rows: range) -> None:
        place, row = np.divmod(np.arange(len(self._prompts) * len(rows)), len(rows))
        self.prompt, self.row = self._prompts[place], row + rows.start

    def _finish(self, prompts: Indices, outcome: Outcome) -> Finished:
        """Return the verdicts on some prompts; one that hangs on rounding is evaluated alone before."""
        if self._whole:
            self.prompt = self.row = self._prompts[:0]
        engine, bad = self._engine, self._bad[prompts]
        self._finished[prompts] = True
        outcome.alignment[bad] = np.nan  # there is nothing to settle of what is not finite
        if self._screening is not None:
            outcome = self._screening.before(outcome, prompts)
        settle_outcome(engine, self._said_by, lambda one: engine.encode(self._ids[prompts[one], None]), outcome)
        return self._verdicts([self._jobs[prompt] for prompt in prompts], self._truncated[prompts], outcome, bad)

    def _verdicts(self, jobs: list[Job], truncated: Bools, outcome: Outcome, bad: Bools | None = None) -> Finished:
        verdicts = make_verdicts([job.prompt for job in jobs], truncated, outcome, self._said_by, self._key)
        bad = np.zeros(len(jobs), dtype=np.bool_) if bad is None else bad
        log((verdict for verdict, is_bad in zip(verdicts, bad, strict=True) if not is_bad), self._key)
        return [
            (job, NotFiniteError(_NOT_FINITE) if is_bad else verdict)
            for job, verdict, is_bad in zip(jobs, verdicts, bad, strict=True)
        ]
