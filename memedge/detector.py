"""The detector: prompts in, scores and verdicts out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from memedge.decision import Floats, decide, score_bounds
from memedge.early import Outcome, evaluate
from memedge.embeddings import pack
from memedge.engine.errors import InputError
from memedge.engine.gradients import Gradients, OnnxGradients
from memedge.engine.manifest import Alignment, Calibration, Manifest, Operands, Preset
from memedge.engine.passes import Engine, States
from memedge.engine.precision import BATCH as BATCH_NOISE
from memedge.engine.reduction import check_options
from memedge.engine.tuning import best_rows_per_call
from memedge.explain import Explanation, Kind, Masks, Method, by_gradient
from memedge.results import Scores, Verdict
from memedge.verdicts import make_verdicts

EMBEDDED_ENGINE = Path(__file__).parent / "data" / "engine"
BATCH = 16  # prompts tokenized and encoded together, or as many as the UNet takes rows at once
Early = Literal["proven", "conformal", "off"]
Encode = Callable[[Any], States]  # of those prompts of a batch that an index selects
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
        self._batch = max(BATCH, engine.rows_per_call)
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
        *,
        batch_size: int | Literal["auto"] | None = None,
    ) -> "Detector":
        """Open an engine directory, verify it and load its graphs.

        Args:
            path: the folder `memedge export` wrote; default: the embedded engine, a small model trained on emoji.
            provider: "tensorrt" or "tensorrt-rtx" (plans of `memedge build`), "cuda" (ONNX Runtime), "openvino", "cpu"
                (ONNX Runtime), or "auto": the first of these, in this order, that can run here and that the engine is
                calibrated for; "cpu" if it is not calibrated at all. `info` says which it is.
            precision: of the UNet. OpenVINO runs fp32 engines in "bf16" (its default, on CPUs that compute in it) or
                "fp32"; all others run what was exported.
            threads: threads per call; default: as many cores as this process may use.
            batch_size: rows (prompt × timestep × draw) per UNet call; default: as many as hold 2^16 latent values;
                "auto" measures it, which takes some 15 calls. Results do not depend on it but by rounding.

        Raises:
            EngineError: the directory is no engine, was damaged, or cannot run here as asked.
            InputError: threads or batch_size is not positive.
        """
        if not (batch_size in (None, "auto") or (isinstance(batch_size, int) and batch_size >= 1)):
            raise InputError(f"batch_size is {batch_size!r}: give at least 1, 'auto', or leave it out.")
        engine = Engine.open(Path(path or EMBEDDED_ENGINE), provider, precision, threads)
        if engine.directory.manifest.precision == "int8" and batch_size not in (None, "auto", 1):
            raise InputError(f"An int8 engine computes one row at a time, not {batch_size}: leave batch_size out.")
        most = engine.backend.most_rows
        if most is not None and isinstance(batch_size, int) and batch_size > most:
            raise InputError(
                f"The plans take at most {most} rows per call, not {batch_size}: leave batch_size out, or run "
                f"`memedge build` with --max-batch {batch_size}."
            )
        if batch_size is not None:
            engine.rows_per_call = best_rows_per_call(engine) if batch_size == "auto" else batch_size
        return Detector(engine)

    @cached_property
    def _gradients(self) -> Gradients:
        return OnnxGradients(self._engine)

    @property
    def info(self) -> EngineInfo:
        """What runs: engine, provider, precision, threads, calibration."""
        return self._info

    def warmup(self) -> None:
        """Run one prompt, so that the first real call finds memory allocated and kernels chosen."""
        self.score(["warm up"])

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
        parts = []
        for batch in _batches(prompts, self._batch):
            ids, truncated = self._engine.tokenize(batch)
            parts.append((*self._statistics(_encode(self._engine, ids), kind, pair), truncated))
        if not parts:
            raise InputError("There are no prompts to score: give at least one.")
        norm, aligned, truncated = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self._judge(norm, aligned, truncated, kind, pair)

    def score_embeddings(
        self,
        states: npt.ArrayLike,
        pooled: npt.ArrayLike | None = None,
        *,
        alignment: Alignment | None = None,
        operands: Operands | None = None,
    ) -> Scores:
        """Like `score`, for prompt embeddings of this engine's text encoder (floats, converted to float32).

        Args:
            states: [B, L, D], as diffusers' `prompt_embeds`.
            pooled: [B, P], as diffusers' `pooled_prompt_embeds`: for SDXL, and for no other model.
            alignment, operands: as in `score`.

        Raises:
            InputError: no numbers, other shapes, or no rows; pooled embeddings missing or not wanted.
            NotFiniteError: the embeddings or the model's output hold NaN or infinity.
        """
        kind, pair = self._options(alignment, operands)
        array = pack(self._info.manifest, states, pooled)
        batches = (array[i : i + self._batch] for i in range(0, len(array), self._batch))
        parts = [self._statistics(_embed(self._engine, batch), kind, pair) for batch in batches]
        norm, aligned = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self._judge(norm, aligned, np.zeros(len(array), dtype=bool), kind, pair)

    def detect(self, prompts: Iterable[str], early: Early = "proven") -> list[Verdict]:
        """Return one verdict per prompt, with what it took and the reason.

        Args:
            prompts: any iterable of prompts.
            early: which passes may be left out. "proven": those that cannot change the verdict, whatever the alignment;
                verdicts are those of `score`. "conformal": also those that change it for at most a share ε of prompts
                like the calibration's; ε is in the calibration and in the reason. "off": none.

        Raises:
            InputError: an unknown `early`, or "conformal" with a calibration that stores no interval; and as `score`.
            NotFiniteError: the model produced NaN or infinity.
        """
        if early not in get_args(Early):
            raise InputError(f"There is no early={early!r}: use 'proven', 'conformal' or 'off'.")
        calibration = self._info.calibration
        if early == "conformal" and (calibration is None or calibration.conformal is None):
            raise InputError(
                f"{self._info.path} stores no conformal interval for {self._info.key}: calibrate it with at least 99 "
                "prompts, or use early='proven'."
            )
        verdicts: list[Verdict] = []
        for batch in _batches(prompts, self._batch):
            ids, truncated = self._engine.tokenize(batch)
            outcome = self._outcome(_encode(self._engine, ids), early)
            verdicts += make_verdicts(batch, truncated, outcome, self._info.manifest, self._info.key)
        if not verdicts:
            raise InputError("There are no prompts to score: give at least one.")
        return verdicts

    def explain(
        self, prompt: str, method: Method = "mask", *, progress: Callable[[int, int], None] | None = None
    ) -> Explanation:
        """Say which words of a prompt carry its score.

        Args:
            prompt: one prompt.
            method: "mask": how much the score falls when a word is masked, or a token alone (explain.Masks). A prompt
                of k words takes k + 1 times what `score` takes, and some more for words of several tokens. "gradient":
                how steeply the norm changes with a word's embeddings (explain.by_gradient). It takes a forward and a
                backward pass per draw, and says less: see Masks.
            progress: called with (scored, total) maskings.

        Raises:
            InputError: something that is not text, or an unknown method.
            ProviderError: "gradient" on an engine or a provider that has no gradients.
            NotFiniteError: the model produced NaN or infinity.
        """
        if method not in get_args(Method):
            raise InputError(f"There is no method={method!r}: use 'mask' or 'gradient'.")
        (prompt,) = checked_prompts([prompt])
        if method == "gradient":
            return self._explain_by_gradient(prompt)
        masks = Masks(self._engine.tokenizer, prompt)
        calibration, preset = self._info.calibration, self._info.manifest.preset
        kind: Kind = "calibrated" if calibration else "published" if preset else "norm"
        weights = calibration or preset
        parts = []
        for start in range(0, len(masks.ids), self._batch):
            states = self._engine.encode(masks.ids[start : start + self._batch])
            if weights:
                norm, aligned = self._engine.statistics(states, *self._options(None, None))
                parts.append(score_bounds(weights, norm, aligned, aligned)[0])
            else:
                parts.append(self._engine.norm(states))
            if progress:
                progress(start + len(states.empty), len(masks.ids))
        scores = np.concatenate(parts)
        return Explanation(
            prompt=prompt,
            score=float(scores[0]),
            kind=kind,
            threshold=calibration.threshold if calibration else None,
            words=masks.words(scores),
            method=method,
            passes=len(masks.ids) * (self._engine.passes if weights else self._engine.draws),
        )

    def _explain_by_gradient(self, prompt: str) -> Explanation:
        states = self._engine.encode(self._engine.tokenize([prompt])[0])
        array = self._engine.backend.memory.download(states.tensor)
        found = self._gradients.statistics(array, norm_weight=1.0, alignment_weight=0.0)
        return Explanation(
            prompt=prompt,
            score=0.0 if states.empty[0] else float(found.norm[0]),
            kind="norm",
            threshold=None,
            words=by_gradient(self._engine.tokenizer, prompt, found.states[0, : self._info.manifest.tokens]),
            method="gradient",
            passes=self._engine.draws,
        )

    def _options(self, alignment: Alignment | None, operands: Operands | None) -> tuple[Alignment, Operands]:
        calibration = self._info.calibration
        kind = alignment or (calibration.alignment if calibration else DEFAULT_ALIGNMENT)
        pair = operands or (calibration.operands if calibration else DEFAULT_OPERANDS)
        check_options(kind, pair)
        return kind, pair

    def _calibration_for(self, kind: Alignment, pair: Operands) -> Calibration | None:
        """Return the calibration if it is for exactly these statistics."""
        calibration = self._info.calibration
        return calibration if calibration and (calibration.alignment, calibration.operands) == (kind, pair) else None

    def _preset_for(self, kind: Alignment, pair: Operands) -> Preset | None:
        """Return the published γ, if there are any, for exactly these statistics; a calibration replaces them."""
        published = self._info.calibration is None and (kind, pair) == (DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)
        return self._info.manifest.preset if published else None

    def _statistics(self, encode: Encode, kind: Alignment, pair: Operands) -> tuple[Floats, Floats]:
        """Return norm and alignment of a batch; where the verdict hangs on rounding, those of the prompt alone."""
        norm, aligned = self._engine.statistics(encode(slice(None)), kind, pair)
        self._settle(encode, norm, aligned, kind, pair)
        return norm, aligned

    def _settle(
        self, encode: Encode, norm: Floats, aligned: Floats, kind: Alignment, pair: Operands
    ) -> npt.NDArray[np.intp]:
        """Evaluate alone, in place, each prompt whose score is too near the threshold; return which.

        Alone, a prompt always meets the same shapes, so that it gets the same verdict however it was batched.
        """
        calibration = self._calibration_for(kind, pair)
        if calibration is None:
            return np.empty(0, dtype=np.intp)
        undecided = decide(calibration, norm, aligned, aligned, BATCH_NOISE[self._info.precision])[1]
        near = np.flatnonzero(undecided & (norm > 0))  # the empty prompt's verdict is not its score's
        for row in near:
            one = slice(row, row + 1)
            norm[one], aligned[one] = self._engine.statistics(encode(one), kind, pair)
        return near

    def _outcome(self, encode: Encode, early: Early) -> Outcome:
        """Evaluate a batch for `detect`."""
        engine, calibration = self._engine, self._info.calibration
        if calibration is None:
            norm, aligned = self._statistics(encode, DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)
            outcome = Outcome.whole(norm, aligned, engine.passes)
            if preset := self._info.manifest.preset:
                outcome.lowest[:], outcome.highest[:] = score_bounds(preset, norm, aligned, aligned)
            return outcome
        kind, pair = calibration.alignment, calibration.operands
        states = encode(slice(None))
        if early == "off":
            norm, aligned = engine.statistics(states, kind, pair)
            outcome = Outcome.whole(norm, aligned, engine.passes)
        else:
            outcome = evaluate(engine, calibration, states, calibration.conformal if early == "conformal" else None)
        whole = np.flatnonzero(~np.isnan(outcome.alignment))
        norm, aligned = outcome.norm[whole], outcome.alignment[whole]
        settled = self._settle(lambda rows: encode(whole[rows]), norm, aligned, kind, pair)
        outcome.norm[whole], outcome.alignment[whole] = norm, aligned
        outcome.passes[whole[settled]] += engine.passes
        low, high = score_bounds(calibration, norm, aligned, aligned)
        outcome.lowest[whole], outcome.highest[whole] = low, high
        return outcome

    def _judge(
        self,
        norm: npt.NDArray[np.float64],
        alignment: npt.NDArray[np.float64],
        truncated: npt.NDArray[np.bool_],
        kind: Alignment,
        pair: Operands,
    ) -> Scores:
        """Apply the calibration, if there is one for exactly these statistics."""
        calibration = self._calibration_for(kind, pair)
        if calibration is None:
            preset = self._preset_for(kind, pair)
            score = None if preset is None else score_bounds(preset, norm, alignment, alignment)[0]
            return Scores(norm, alignment, score, None, truncated, None)
        score, _ = score_bounds(calibration, norm, alignment, alignment)
        # The empty prompt (norm exactly 0) is never memorized, whatever the threshold.
        memorized = (score >= calibration.threshold) & (norm > 0)
        return Scores(norm, alignment, score, memorized, truncated, calibration.threshold)


def _encode(engine: Engine, ids: npt.NDArray[np.int64]) -> Encode:
    return lambda rows: engine.encode(ids[rows])


def _embed(engine: Engine, batch: npt.NDArray[np.float32]) -> Encode:
    return lambda rows: engine.embed(batch[rows])


def _batches(prompts: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = checked_prompts(prompts)
    while batch := list(islice(rest, size)):
        yield batch


def checked_prompts(prompts: Iterable[str]) -> Iterator[str]:
    """Yield the prompts, each checked to be text; raises InputError."""
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
