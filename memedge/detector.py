"""The detector: prompts in, scores and verdicts out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from memedge.decision.early import Early, Outcome, check_early, decide_early
from memedge.decision.operating_point import operating_at
from memedge.decision.reasons import log, make_verdicts, threshold_in_words
from memedge.decision.rounding import Alone, settle, settle_outcome
from memedge.decision.rule import NO_SCREEN_PLANS, Rule
from memedge.decision.screen import decide_screened
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.arrays import Bools, Floats, Indices
from memedge.engine.embeddings import pack
from memedge.engine.engine import Engine, States
from memedge.engine.errors import InputError, IntegrityError
from memedge.engine.gradients import Gradients, OnnxGradients
from memedge.engine.manifest import Alignment, Calibration, Manifest, Operands, key_of
from memedge.engine.tuning import best_rows_per_call
from memedge.explain import Explanation, ExplanationMethod, Masks, by_gradient
from memedge.prompts.text import checked_prompts
from memedge.results import Scores, Verdicts
from memedge.wording import counted

PROMPTS_PER_BATCH = 16  # tokenized and encoded together, or as many as the UNet takes rows at once


@dataclass(frozen=True)
class EngineInfo:
    """The engine that a detector runs, its path and manifest, and what executes it.

    `rule` makes a score of norm and alignment here, and a verdict of the score; it says where its threshold comes from.
    """

    path: Path
    manifest: Manifest
    provider: str
    precision: str
    threads: int
    rule: Rule

    @property
    def calibration(self) -> Calibration | None:
        """The calibration for what runs, or None: then there are no verdicts."""
        return self.manifest.calibrations.get(self.key)

    @property
    def key(self) -> str:
        """The key of the engine's calibrations: "<provider>-<precision>"."""
        return key_of(self.provider, self.precision)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that verdicts depend on: the engine's files, its calibration, what runs, the threshold.

        A threshold counts only where it is not the calibrated one.
        """
        point = "" if self.rule.operating_point in ("", "calibrated") else f" {self.rule.threshold!r}"
        return hashlib.sha256(msgspec.json.encode(self.manifest) + f"{self.key}{point}".encode()).hexdigest()


@dataclass(frozen=True)
class _Batch:
    """The prompt embeddings of some prompts, and a function that encodes one of them again, alone."""

    states: States
    alone: Alone


class Detector:
    """Scores prompts with one engine.

    A detector holds no mutable state: any number of threads may call any of its methods at once. It can be pickled:
    what travels is the path and the options, and the engine is opened again where they arrive, by the same provider.
    """

    def __init__(self, engine: Engine, rule: Rule | None = None):
        """Take an opened engine, and a rule if it is not the engine's own; `load` opens one."""
        self._engine = engine
        self._opened: tuple[str | None, int | None, int | None] | None = None  # path, threads, rows per call
        self._batch = max(PROMPTS_PER_BATCH, engine.rows_per_call)
        directory, backend = engine.directory, engine.backend
        rule = rule or Rule.of(directory.manifest, backend.key)
        self._rule = rule if backend.screens or rule.screen is None else rule.without_screen(NO_SCREEN_PLANS)
        self._info = EngineInfo(
            directory.path, directory.manifest, backend.provider, backend.precision, backend.threads, self._rule
        )

    def __repr__(self) -> str:
        rule = self._rule
        verdicts = "no verdicts" if rule.threshold is None else f"{threshold_in_words(rule)}"
        return f"<Detector on {self._info.path}: {self._info.key}, {counted(self._info.threads, 'thread')}, {verdicts}>"

    @staticmethod
    def load(
        path: str | PathLike[str] | None = None,
        provider: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        *,
        batch_size: int | Literal["auto"] | None = None,
        threshold: float | None = None,
        target_fpr: float | None = None,
        gradients: bool = False,
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
            threshold: another operating point than the calibrated one: see `at`.
            target_fpr: likewise.
            gradients: let "auto" take a provider that computes gradients, as `explain(method="gradient")` needs.

        Raises:
            EngineError: the directory is no engine, was damaged, or cannot run here as asked.
            InputError: threads or batch_size is not positive; and as `at`.

        Examples:
            >>> from memedge import Detector
            >>> detector = Detector.load(provider="cpu")
            >>> detector.info.key, detector.info.rule.formula
            ('cpu-fp32', '1 · norm − 25.63 · alignment')
        """
        if not (batch_size in (None, "auto") or (isinstance(batch_size, int) and batch_size >= 1)):
            raise InputError(f"batch_size is {batch_size!r}: give at least 1, 'auto', or leave it out.")
        engine = Engine.open(Path(path or EMBEDDED_ENGINE), provider, precision, threads, gradients=gradients)
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
        detector = Detector(engine)
        rows = None if batch_size is None else engine.rows_per_call
        detector._opened = None if path is None else str(Path(path).resolve()), threads, rows
        return detector.at(threshold, target_fpr)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._opened is None:
            raise InputError("Only a detector of Detector.load can be pickled: load it in each process.")
        info = self._info
        rule = replace(self._rule, screen=None)  # the engine has it
        return _open_again, (*self._opened, info.provider, info.precision, rule, info.fingerprint)

    def at(self, threshold: float | None = None, target_fpr: float | None = None) -> "Detector":
        """Return a detector on the same opened engine at another operating point. Nothing is written to the engine.

        Verdicts and `info.rule` say which it is. The weights stay those of the calibration.

        Args:
            threshold: from which score on a prompt is memorized.
            target_fpr: at most this share of the clean prompts that the engine was calibrated on reaches the threshold,
                which lies in the middle of the gap between their scores. With neither, this very detector.

        Raises:
            InputError: both, a threshold that is not finite, a rate outside (0, 1); a rate under 1 / (n + 1) with n
                clean prompts; an engine that is not calibrated; one whose calibration keeps no clean scores, as older
                ones: then only a threshold can be given.

        Examples:
            >>> from memedge import Detector
            >>> strict = Detector.load(provider="cpu").at(threshold=-14.0)
            >>> strict.detect(["the left luggage sign"])[0].reason
            'score -11.44 ≥ threshold -14, as given'
        """
        if threshold is None and target_fpr is None:
            return self
        info = self._info
        own = Rule.of(info.manifest, info.key)
        what = f"{info.path} for {info.key}"
        return self._with(operating_at(own, info.calibration, threshold, target_fpr, what))

    def _with(self, rule: Rule) -> "Detector":
        detector = Detector(self._engine, rule)
        detector._opened = self._opened
        return detector

    @property
    def engine(self) -> Engine:
        """The opened engine. Mitigation and rival detectors run on it too."""
        return self._engine

    @cached_property
    def gradients(self) -> Gradients:
        """The engine's derivatives.

        Raises:
            ProviderError: the engine or the provider has none.
        """
        return OnnxGradients(self._engine)

    @property
    def info(self) -> EngineInfo:
        """What runs: engine, provider, precision, threads, calibration."""
        return self._info

    def warmup(self, batch: int | Iterable[int] = 1) -> None:
        """Run prompts, so that the first real calls find memory allocated, graphs compiled and kernels chosen.

        Runtimes prepare themselves for each number of rows anew, so that a first call of 16 prompts may take ten times
        as long as the second one, whatever was run before. On provider "cuda", calls of one prompt are recorded as CUDA
        graphs, which takes the UNet's weights on the GPU twice more; let nothing else use the GPU meanwhile.

        Args:
            batch: how many prompts calls will have; several numbers, such as (1, 4, 16), where they differ.

        Raises:
            InputError: no number of at least 1.
        """
        sizes = [batch] if isinstance(batch, int) else list(batch)
        if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
            raise InputError(f"batch is {batch!r}: give the number of prompts of a call, or several numbers.")
        self._engine.backend.record(self._engine.rows_per_call)
        for size in sizes:
            prompts = [f"warm up {place}" for place in range(size)]
            self.score(prompts)
            self.detect(prompts)  # its calls have other numbers of rows than those of score
            if self._rule.screens:
                self.detect(prompts, "screen")

    def score(
        self, prompts: Iterable[str], *, alignment: Alignment | None = None, operands: Operands | None = None
    ) -> Scores:
        """Compute every statistic of every prompt (docs/methods.md §1).

        Args:
            prompts: any iterable. It is read in batches, and memory stays bounded but for the results.
            alignment: "channel" or "flat" cosine. Default: the calibration's, or "channel" without one.
            operands: "uncond_delta", "cond_uncond" or "cond_delta". Default: the calibration's, or "uncond_delta"
                without one. With another cosine than the calibration's, score and memorized are None.

        Raises:
            InputError: no prompts, one string instead of a list, something that is not text, an unknown option.
            NotFiniteError: the model produced NaN or infinity.

        Examples:
            >>> from memedge import Detector
            >>> detector = Detector.load(provider="cpu")
            >>> scores = detector.score(["the left luggage sign", "a green star on a hill", ""])
            >>> scores.score.round(2)
            array([-11.44, -22.85,   0.  ])
            >>> scores.memorized
            array([ True, False, False])
        """
        rule = self._rule.measuring(alignment, operands)
        parts = []
        for prompts_of_batch in _batches(prompts, self._batch):
            ids, truncated = self._engine.tokenize(prompts_of_batch)
            parts.append((*self._statistics(self._encode(ids), rule), truncated))
        if not parts:
            raise InputError("There are no prompts to score: give at least one.")
        norm, aligned, truncated = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _judge(norm, aligned, truncated, rule)

    def score_embeddings(
        self,
        states: npt.ArrayLike,
        pooled: npt.ArrayLike | None = None,
        *,
        mask: npt.ArrayLike | None = None,
        alignment: Alignment | None = None,
        operands: Operands | None = None,
    ) -> Scores:
        """Like `score`, for prompt embeddings of this engine's text encoder (floats, converted to float32).

        Args:
            states: [B, L, D], diffusers' `prompt_embeds`. Of models that read as many tokens as a prompt has, L may be
                any up to the engine's, or this is a list of [n, D], as Z-Image's pipeline has it.
            pooled: [B, P], diffusers' `pooled_prompt_embeds`: for SDXL and Stable Diffusion 3, and for no other model.
            mask: [B, L], diffusers' `prompt_embeds_mask`, for Qwen-Image: 1 at tokens that are there, then 0. None: all
                are there.
            alignment: as in `score`.
            operands: as in `score`.

        Raises:
            InputError: no numbers, other shapes, or no rows; pooled embeddings or a mask missing or not wanted.
            NotFiniteError: the embeddings or the model's output hold NaN or infinity.

        Examples:
            >>> from diffusers import StableDiffusionPipeline
            >>> from memedge import Detector
            >>> pipe = StableDiffusionPipeline.from_pretrained("model")
            >>> states, _ = pipe.encode_prompt("the left luggage sign", "cpu", 1, False)
            >>> Detector.load("engine", provider="cpu").score_embeddings(states.detach()).score.round(2)
            array([-11.44])
        """
        rule = self._rule.measuring(alignment, operands)
        array = pack(self._info.manifest, states, pooled, mask)
        batches = (array[i : i + self._batch] for i in range(0, len(array), self._batch))
        parts = [self._statistics(self._embed(batch), rule) for batch in batches]
        norm, aligned = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _judge(norm, aligned, np.zeros(len(array), dtype=bool), rule)

    def detect(
        self,
        prompts: Iterable[str],
        early: Early = "proven",
        *,
        threshold: float | None = None,
        target_fpr: float | None = None,
    ) -> Verdicts:
        """Return one verdict per prompt, with its passes and its reason.

        Args:
            prompts: any iterable of prompts.
            early: which passes may be left out. "proven": those that cannot change the verdict, whatever the alignment
                is; verdicts are those of `score`. "conformal": also those that change the verdict for at most a share δ
                of prompts like the calibration's; the calibration and the reason state δ. "screen": a prompt whose
                first effects on the UNet are as a clean one's is clean, for a small part of a pass; at most a share α
                of the memorized prompts that the full rule finds is passed so. All others go on as in "conformal".
                "off": none.
            threshold: another operating point for this call: see `at`.
            target_fpr: likewise.

        Raises:
            InputError: an unknown `early`; "conformal" with a calibration that stores no interval, "screen" with one
                that stores no screen, or at another threshold than the calibrated one; and as `score` and `at`.
            NotFiniteError: the model produced NaN or infinity.

        Examples:
            >>> from memedge import Detector
            >>> verdicts = Detector.load(provider="cpu").detect(["the left luggage sign", "a green star on a hill"])
            >>> [verdict.memorized for verdict in verdicts]
            [True, False]
            >>> verdicts[0].reason
            'score -11.44 ≥ threshold -16.22'
            >>> screened = Detector.load(provider="cpu").detect(["a green star on a hill"], early="screen")
            >>> round(screened[0].passes, 4), screened[0].norm
            (0.0068, None)
        """
        if threshold is not None or target_fpr is not None:
            return self.at(threshold, target_fpr).detect(prompts, early)
        check_early(self._rule, early, self._info.path, self._info.key)
        verdicts = Verdicts()
        for batch in _batches(prompts, self._batch):
            ids, truncated = self._engine.tokenize(batch)
            outcome = self._outcome(self._encode(ids), early)
            made = make_verdicts(batch, truncated, outcome, self._rule, self._info.key)
            log(made, self._info.key)
            verdicts += made
        if not verdicts:
            raise InputError("There are no prompts to score: give at least one.")
        return verdicts

    def explain(
        self, prompt: str, method: ExplanationMethod = "mask", *, progress: Callable[[int, int], None] | None = None
    ) -> Explanation:
        """Say which words of a prompt carry its score.

        Args:
            prompt: one prompt.
            method: "mask": how much the score falls when a word is masked, or a token alone (explain.Masks). A prompt
                of k words costs as much as k + 1 prompts, and some more for words of several tokens. "gradient": how
                steeply the norm changes with a word's embeddings (explain.by_gradient). It costs a forward and a
                backward pass per draw, and says less: Masks has the comparison.
            progress: called with (scored, total) maskings.

        Raises:
            InputError: something that is not text, or an unknown method.
            ProviderError: "gradient" on an engine or a provider that has no gradients.
            NotFiniteError: the model produced NaN or infinity.

        Examples:
            >>> from memedge import Detector
            >>> explanation = Detector.load(provider="cpu").explain("the left luggage sign")
            >>> word = explanation.words[2]
            >>> word.text, round(word.significance, 1)
            ('luggage', 14.0)
        """
        if method not in get_args(ExplanationMethod):
            raise InputError(f"There is no method={method!r}: use 'mask' or 'gradient'.")
        (prompt,) = checked_prompts([prompt])
        if method == "gradient":
            return self._explain_by_gradient(prompt)
        masks = Masks(self._engine.tokenizer, prompt)
        rule, parts = self._rule, []
        for start in range(0, len(masks.ids), self._batch):
            states = self._engine.encode(masks.ids[start : start + self._batch])
            if rule.fitted:
                parts.append(rule.score(*self._engine.statistics(states, rule.alignment, rule.operands)))
            else:
                parts.append(self._engine.norm(states))
            if progress:
                progress(start + len(states.empty), len(masks.ids))
        scores = np.concatenate(parts)
        return Explanation(
            prompt=prompt,
            score=float(scores[0]),
            kind="norm" if rule.source == "not fitted" else rule.source,
            threshold=rule.threshold,
            words=masks.words(scores),
            method=method,
            passes=len(masks.ids) * (self._engine.passes if rule.fitted else self._engine.draws),
        )

    def _explain_by_gradient(self, prompt: str) -> Explanation:
        if self._info.manifest.token_lengths:
            raise InputError(
                f"The text encoders of {self._info.path} read a prompt in rows of their own, so a word has no one "
                "gradient: use method='mask'."
            )
        states = self._engine.encode(self._engine.tokenize([prompt])[0])
        array = self._engine.backend.memory.download(states.tensor)
        found = self.gradients.statistics(array, norm_weight=1.0, alignment_weight=0.0)
        return Explanation(
            prompt=prompt,
            score=0.0 if states.empty[0] else float(found.norm[0]),
            kind="norm",
            threshold=None,
            words=by_gradient(self._engine.tokenizer, prompt, found.states[0, : self._info.manifest.tokens]),
            method="gradient",
            passes=self._engine.draws,
        )

    def _encode(self, ids: Indices) -> _Batch:
        engine = self._engine
        return _Batch(engine.encode(ids), lambda row: engine.encode(ids[row : row + 1]))

    def _embed(self, array: npt.NDArray[np.float32]) -> _Batch:
        engine = self._engine
        return _Batch(engine.embed(array), lambda row: engine.embed(array[row : row + 1]))

    def _statistics(self, batch: _Batch, rule: Rule) -> tuple[Floats, Floats]:
        """Return norm and alignment of a batch. If a verdict hangs on rounding, the prompt is evaluated alone."""
        norm, aligned = self._engine.statistics(batch.states, rule.alignment, rule.operands)
        settle(self._engine, rule, batch.alone, np.arange(len(norm)), norm, aligned)
        return norm, aligned

    def _outcome(self, batch: _Batch, early: Early) -> Outcome:
        """Evaluate a batch for `detect`."""
        engine, rule = self._engine, self._rule
        if early == "off" or rule.threshold is None:
            norm, aligned = engine.statistics(batch.states, rule.alignment, rule.operands)
            outcome = Outcome.whole(rule, norm, aligned, engine.passes)
        elif early == "screen":
            outcome = decide_screened(engine, rule, batch.states, batch.alone)
        else:
            outcome = decide_early(engine, rule if early == "conformal" else rule.without_conformal(), batch.states)
        settle_outcome(engine, self._rule, batch.alone, outcome)
        return outcome


def _open_again(
    path: str | None,
    threads: int | None,
    rows: int | None,
    provider: str,
    precision: str,
    rule: Rule,
    fingerprint: str,
) -> Detector:
    """Return the detector that was pickled; raises EngineError where the same engine cannot be had."""
    detector = Detector.load(path, provider, precision, threads, batch_size=rows)
    detector = detector._with(replace(rule, screen=detector.info.rule.screen))
    if detector.info.fingerprint != fingerprint:
        raise IntegrityError(
            f"{detector.info.path} is not the engine that was pickled, or was calibrated since: load it again."
        )
    return detector


def _judge(norm: Floats, alignment: Floats, truncated: Bools, rule: Rule) -> Scores:
    score = rule.score(norm, alignment) if rule.fitted else None
    memorized = None if score is None else rule.memorized(norm, score)
    return Scores(norm, alignment, score, memorized, truncated, rule.threshold)


def _batches(prompts: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = checked_prompts(prompts)
    while batch := list(islice(rest, size)):
        yield batch
