"""The detector: prompts in, scores and verdicts out."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError
from memedge.engine.manifest import Alignment, Calibration, Manifest, Operands
from memedge.engine.passes import Engine
from memedge.engine.reduction import check_options
from memedge.results import Scores, Verdict

EMBEDDED_ENGINE = Path(__file__).parent / "data" / "engine"
BATCH = 16  # prompts tokenized and encoded together; what the UNet gets at once is bounded in engine/passes.py
DEFAULT_ALIGNMENT: Alignment = "channel"
DEFAULT_OPERANDS: Operands = "uncond_delta"


@dataclass(frozen=True)
class EngineInfo:
    """What a detector runs: the engine's path and manifest, and what executes it."""

    path: Path
    manifest: Manifest
    provider: str
    precision: str
    threads: int

    @property
    def calibration(self) -> Calibration | None:
        """The calibration for what runs, or None: then there are no verdicts."""
        return self.manifest.calibrations.get(self.key)

    @property
    def key(self) -> str:
        """What calibrations are keyed by."""
        return f"{self.provider}-{self.precision}"

    @property
    def fingerprint(self) -> str:
        """A hash of all that scores depend on: the engine's files, its calibration, provider and precision."""
        return hashlib.sha256(msgspec.json.encode(self.manifest) + self.key.encode()).hexdigest()


class Detector:
    """Scores prompts with one engine.

    A detector holds no mutable state: any number of threads may call any of its methods at once.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        directory, backend = engine.directory, engine.backend
        self._info = EngineInfo(
            directory.path, directory.manifest, backend.provider, backend.precision, backend.threads
        )

    @staticmethod
    def load(
        path: str | PathLike[str] | None = None,
        provider: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
    ) -> "Detector":
        """Open an engine directory, verify it and load its graphs.

        Args:
            path: the folder `memedge export` wrote; default: the embedded engine, a small model trained on emoji.
            provider: "cpu" (ONNX Runtime), or "auto": the first installed one, in the order of engine/backend.py.
            precision: the engine's own if None; anything else must be what the engine was exported in.
            threads: threads per call; default: as many cores as this process may use.

        Raises:
            EngineError: the directory is no engine, was damaged, or cannot run here as asked.
            InputError: threads is not positive.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}: give at least 1, or leave it out to use all cores.")
        return Detector(Engine.open(Path(path or EMBEDDED_ENGINE), provider, precision, threads))

    @property
    def info(self) -> EngineInfo:
        """What runs: engine, provider, precision, threads, calibration."""
        return self._info

    def warmup(self) -> None:
        """Run one prompt, so that the first real call finds memory allocated and kernels chosen."""
        self._score_batch(["warm up"], DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)

    def score(
        self, prompts: Iterable[str], *, alignment: Alignment | None = None, operands: Operands | None = None
    ) -> Scores:
        """Compute every statistic of every prompt (METHODS.md §1).

        Args:
            prompts: any iterable; it is read in batches, and memory stays bounded but for the results.
            alignment: "channel" or "flat" cosine; default: what the engine was calibrated for, else "channel".
            operands: "uncond_delta", "cond_uncond" or "cond_delta"; default likewise, else "uncond_delta". With
                another alignment or other operands than the calibration's, score and memorized are None.

        Raises:
            InputError: no prompts, one string instead of a list, something that is not text, an unknown option.
            NotFiniteError: the model produced NaN or infinity.
        """
        kind, pair = self._options(alignment, operands)
        rest = _checked(prompts)
        parts = []
        while batch := list(islice(rest, BATCH)):
            parts.append(self._score_batch(batch, kind, pair))
        if not parts:
            raise InputError("There are no prompts to score: give at least one.")
        norm, aligned, truncated = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self._judge(norm, aligned, truncated, kind, pair)

    def score_embeddings(
        self, states: npt.ArrayLike, *, alignment: Alignment | None = None, operands: Operands | None = None
    ) -> Scores:
        """Like `score`, for prompt embeddings [B, L, D] (float, converted to float32) of this engine's text encoder.

        Raises:
            InputError: no numbers, another shape than [B, L, D], or no rows.
            NotFiniteError: the embeddings or the model's output hold NaN or infinity.
        """
        kind, pair = self._options(alignment, operands)
        try:
            array = np.asarray(states, dtype=np.float32)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a torch tensor that requires gradients
            raise InputError(f"The prompt embeddings are no array of numbers ({error}): give a NumPy array.") from None
        manifest = self._info.manifest
        if array.ndim != 3 or len(array) == 0 or array.shape[1:] != (manifest.tokens, manifest.state_width):
            raise InputError(
                f"The prompt embeddings have shape {list(array.shape)}: this engine takes "
                f"[B, {manifest.tokens}, {manifest.state_width}] with B ≥ 1."
            )
        parts = [self._engine.statistics(array[i : i + BATCH], kind, pair) for i in range(0, len(array), BATCH)]
        norm, aligned = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self._judge(norm, aligned, np.zeros(len(array), dtype=bool), kind, pair)

    def detect(self, prompts: Iterable[str], early: Literal["proven", "off"] = "proven") -> list[Verdict]:
        """Return one verdict per prompt, with its statistics and the reason.

        Args:
            prompts: any iterable of prompts.
            early: "proven" promises the verdicts of `score`, with whatever passes cannot change them left out; "off"
                computes everything. This version leaves nothing out in either case: `passes` is 2 · draws.

        Raises:
            InputError, NotFiniteError: as `score` does.
        """
        if early not in ("proven", "off"):
            raise InputError(f"There is no early={early!r} in this version: use 'proven' or 'off'.")
        texts = list(_checked(prompts))
        scores = self.score(texts)
        return [self._verdict(text, scores, row) for row, text in enumerate(texts)]

    def _options(self, alignment: Alignment | None, operands: Operands | None) -> tuple[Alignment, Operands]:
        calibration = self._info.calibration
        kind = alignment or (calibration.alignment if calibration else DEFAULT_ALIGNMENT)
        pair = operands or (calibration.operands if calibration else DEFAULT_OPERANDS)
        check_options(kind, pair)
        return kind, pair

    def _score_batch(
        self, batch: list[str], alignment: Alignment, operands: Operands
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        ids, truncated = self._engine.tokenize(batch)
        return *self._engine.statistics(self._engine.encode(ids), alignment, operands), truncated

    def _judge(
        self,
        norm: npt.NDArray[np.float64],
        alignment: npt.NDArray[np.float64],
        truncated: npt.NDArray[np.bool_],
        kind: Alignment,
        pair: Operands,
    ) -> Scores:
        """Apply the calibration, if there is one for exactly these statistics."""
        calibration = self._info.calibration
        if calibration is None or (calibration.alignment, calibration.operands) != (kind, pair):
            return Scores(norm, alignment, None, None, truncated, None)
        score = calibration.gamma_norm * norm + calibration.gamma_alignment * alignment
        # The empty prompt (norm exactly 0) is never memorized, whatever the threshold.
        memorized = (score >= calibration.threshold) & (norm > 0)
        return Scores(norm, alignment, score, memorized, truncated, calibration.threshold)

    def _verdict(self, prompt: str, scores: Scores, row: int) -> Verdict:
        memorized = None if scores.memorized is None else bool(scores.memorized[row])
        score = None if scores.score is None else float(scores.score[row])
        if score is None:
            reason = f"no calibration for {self._info.key}, so no verdict: only norm and alignment"
        elif scores.norm[row] == 0:
            reason = "the empty prompt has no guidance"
        else:
            reason = f"score {score:.4g} {'≥' if memorized else '<'} threshold {scores.threshold:.4g}"
        return Verdict(
            prompt=prompt,
            memorized=memorized,
            score=score,
            norm=float(scores.norm[row]),
            alignment=float(scores.alignment[row]),
            threshold=scores.threshold,
            truncated=bool(scores.truncated[row]),
            passes=self._engine.passes,
            reason=reason,
        )


def _checked(prompts: Iterable[str]) -> Iterator[str]:
    """Yield the prompts, each checked to be text."""
    if isinstance(prompts, str | bytes):
        raise InputError("prompts is one string: give a list of prompts, as in score([prompt]).")
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts is {type(prompts).__name__}: give a list or another iterable of strings.")
    for position, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise InputError(f"Prompt {position} is {type(prompt).__name__}, not text: give strings only.")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"Prompt {position} is not valid UTF-8 text: correct or remove it.") from None
        yield prompt
