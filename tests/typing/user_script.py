"""A user's script with every public call and result. It is not run: a type checker reads it in strict mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch

import memedge
from memedge.integrations.diffusers import Action, GuardedOutput, GuardedPipeline, GuardVerdict, guard
from memedge.training import MemorizationFilter

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def detect(prompts: list[str], early: memedge.Early = "proven") -> list[str]:
    detector = memedge.Detector.load("engine", provider="cpu", precision="fp32", threads=2, batch_size="auto")
    detector.warmup()
    verdicts = detector.detect(prompts, early)
    assert_type(verdicts, memedge.Verdicts)
    assert_type(verdicts[0], memedge.Verdict)
    assert_type(verdicts.to_dict(), dict[str, list[Any]])
    print(len(verdicts.to_pandas()), verdicts.to_pandas().columns)
    for verdict in verdicts:
        assert_type(verdict.prompt, str)
        assert_type(verdict.memorized, bool | None)
        assert_type(verdict.score, float | None)
        assert_type(verdict.norm, float | None)
        assert_type(verdict.alignment, float | None)
        assert_type(verdict.threshold, float | None)
        assert_type(verdict.truncated, bool)
        assert_type(verdict.passes, float)
        assert_type(verdict.reason, str)
    return [verdict.prompt for verdict in verdicts if verdict.memorized]


def score(detector: memedge.Detector, states: Singles) -> Floats | None:
    alignment: memedge.Alignment = "flat"
    operands: memedge.Operands = "cond_delta"
    scores = detector.score((prompt for prompt in ("a", "b")), alignment=alignment, operands=operands)
    assert_type(scores, memedge.Scores)
    assert_type(scores.norm, Floats)
    assert_type(scores.alignment, Floats)
    assert_type(scores.score, Floats | None)
    assert_type(scores.memorized, Bools | None)
    assert_type(scores.truncated, Bools)
    assert_type(scores.threshold, float | None)
    assert_type(len(scores), int)
    assert_type(scores.to_dict(), dict[str, list[Any]])
    print(scores.to_pandas().shape)
    return detector.score_embeddings(states, pooled=None).score


def explain(detector: memedge.Detector, method: memedge.ExplanationMethod = "mask") -> dict[str, float]:
    explanation = detector.explain("a prompt", method, progress=lambda done, total: print(done / total))
    assert_type(explanation, memedge.Explanation)
    assert_type(explanation.score, float)
    assert_type(explanation.kind, memedge.ScoreKind)
    assert_type(explanation.threshold, float | None)
    assert_type(explanation.method, memedge.ExplanationMethod)
    assert_type(explanation.passes, int)
    assert_type(explanation.words, tuple[memedge.Word, ...])
    assert_type(explanation.words[0].tokens, tuple[memedge.Token, ...])
    assert_type(explanation.words[0].tokens[0].significance, float | None)
    return {word.text: word.significance for word in explanation.words if word.significance is not None}


def info(detector: memedge.Detector) -> str:
    found = detector.info
    assert_type(found, memedge.EngineInfo)
    assert_type(found.path, Path)
    assert_type(found.provider + found.precision + found.key + found.fingerprint, str)
    assert_type(found.threads, int)
    rule = found.rule
    assert_type(rule, memedge.Rule)
    assert_type(rule.gamma_norm * rule.gamma_alignment, float)
    assert_type(rule.fitted, bool)
    assert_type(rule.score(np.zeros(2), np.zeros(2)), Floats)
    assert_type(found.calibration, memedge.Calibration | None)
    if found.calibration:
        assert_type(found.calibration.memorized, memedge.PromptList)
        assert_type(found.calibration.cross_validation, memedge.CrossValidation)
        assert_type(found.calibration.cross_validation.auc, memedge.Estimate)
        assert_type(found.calibration.conformal, memedge.Conformal | None)
        assert_type(found.calibration.screen, memedge.Screen | None)
        assert_type(found.calibration.gain, memedge.Gain | None)
    return describe(found.manifest)


def describe(manifest: memedge.Manifest) -> str:
    assert_type(manifest.source, memedge.CheckpointSource)
    assert_type(manifest.prediction_type, memedge.PredictionType)
    assert_type(manifest.precision, memedge.Precision)
    assert_type(manifest.latent_shape, tuple[int, int, int])
    assert_type(manifest.schedule, memedge.Schedule)
    assert_type(manifest.flow, memedge.Flow | None)
    assert_type(manifest.parity, memedge.Parity)
    assert_type(manifest.flops, memedge.Flops)
    assert_type(manifest.drift, memedge.Drift | None)
    assert_type(manifest.preset, memedge.Preset | None)
    assert_type(manifest.taps, tuple[memedge.Tap, ...])
    assert_type(manifest.files, dict[str, memedge.FileEntry])
    assert_type(manifest.calibrations, dict[str, memedge.Calibration])
    return manifest.source.id


def free_norm(eps_cond: Singles, eps_uncond: Singles) -> Floats:
    stats = memedge.guidance_stats(eps_cond, eps_uncond, prediction_type="v_prediction", alpha_cumprod=0.1)
    assert_type(stats, memedge.GuidanceStats)
    assert_type(stats.alignment, Floats)
    return stats.norm


def watch(x: Singles, eps_cond: Singles, eps_uncond: Singles) -> list[memedge.MonitorVerdict]:
    calibration = memedge.MonitorCalibration.load("engine/monitor.json")
    settings = memedge.GenerationSettings("StableDiffusionPipeline", "DDIMScheduler", 50, 7.5)
    calibration.check(settings)
    print(calibration.settings.steps, calibration.looks)
    monitor = memedge.Monitor(calibration, prediction_type="v_prediction", alphas_cumprod=[0.9, 0.1])
    monitor.step(x, eps_cond, eps_uncond, 981)
    monitor.step(x, eps_cond, eps_uncond, sigma=2.0)
    assert_type(monitor.norm, Floats)
    assert_type(monitor.mean_norm(2), Floats)
    assert_type(monitor.map((512, 512), smooth=False), Singles)
    assert_type(monitor.memorized, npt.NDArray[np.bool_])
    return monitor.verdicts()


def calibrate_monitor(pipe: object) -> memedge.MonitorCalibration:
    return memedge.Monitor.calibrate(pipe, ["a memorized prompt"], ["a clean prompt"], num_inference_steps=20)


def mitigate(detector: memedge.Detector, loss: memedge.Loss = "norm") -> Singles:
    mitigator = memedge.Mitigator.load("engine", "cpu", 2, checkpoint="model")
    result = mitigator.embedding("a prompt", 1.5, loss=loss, steps=3)
    assert_type(result, memedge.Mitigation)
    assert_type(result.states, Singles)
    assert_type(result.pooled, Singles | None)
    assert_type(result.score, float | None)
    assert_type(result.memorized, bool | None)
    assert_type(result.succeeded, bool)
    assert_type(result.distance + result.before - result.after, float)
    noise = memedge.Mitigator.for_detector(detector).noise("a prompt", draws=2, seed=1)
    assert_type(noise, memedge.MitigatedNoise)
    assert_type(noise.succeeded, bool | None)
    return noise.noise


def guarded(pipe: Any, detector: memedge.Detector, action: Action = "mitigate") -> list[GuardVerdict]:
    pipeline = guard(pipe, detector, action)
    assert_type(pipeline, GuardedPipeline)
    output = pipeline(["a prompt"], num_inference_steps=2)
    assert_type(output, GuardedOutput)
    for verdict in output.verdicts:
        assert_type(verdict.prompt, str | None)
        assert_type(verdict.score, float | None)
        assert_type(verdict.mitigation, memedge.Mitigation | None)
    return [verdict for verdict in output.verdicts if verdict.action == "blocked"]


def calibrate(progress: Callable[[int, int], None]) -> float:
    prompts = memedge.Prompts.given(["one prompt", "another"], "known")
    done = memedge.calibrate(Path("engine"), prompts, "clean.csv", 0.01, provider="cpu", progress=progress)
    assert_type(done, memedge.Calibrated)
    assert_type(done.warnings, tuple[str, ...])
    assert_type(done.engine, Path)
    return done.calibration.threshold


def evaluate(folder: Path) -> dict[str, float]:
    evaluation = memedge.evaluate("engine", "memorized.txt", "clean.txt", folder, detectors=["norm"], draws=[1, 4])
    assert_type(evaluation, memedge.Evaluation)
    assert_type(evaluation.run, memedge.EvaluationRun)
    assert_type(evaluation.clean, memedge.PromptFile)
    assert_type(evaluation.cautions, list[str])
    assert_type(evaluation.rule, memedge.Rule)
    assert_type(evaluation.detectors, list[memedge.EvaluatedDetector])
    assert_type(evaluation.prompts, list[memedge.ScoredPrompt])
    assert_type(evaluation.screen, memedge.ScreenFigures | None)
    findings = evaluation.findings
    assert_type(findings, memedge.Findings)
    assert_type(findings.lines, list[memedge.DetectorFigures])
    assert_type(findings.lines[0].auc, memedge.Figure)
    assert_type(findings.differences, list[memedge.DetectorDifference])
    assert_type(findings.stability, list[memedge.DetectorStability])
    assert_type(findings.rocs, list[memedge.RocCurve])
    assert_type(findings.verdicts, memedge.Confusion | None)
    return {line.detector: line.auc.value for line in findings.lines}


def export(model: Path) -> memedge.Manifest:
    return memedge.export_engine(
        model, "engine", draws=4, precision="fp16", loras=["a.safetensors:0.5"], progress=print
    )


def train(unet: torch.nn.Module, noisy: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    memorization = MemorizationFilter(unet, [2.0] * 1000, scheduler=None)
    assert_type(memorization.target, torch.Tensor)
    assert_type(memorization.norm(noisy, t, states, states[:1], prediction=noisy), torch.Tensor)
    return memorization.mask(noisy, t, states, states[:1])


def many_callers(detector: memedge.Detector) -> memedge.Verdict:
    def count(one: memedge.Round) -> None:
        assert_type(one.waited, tuple[float, ...])

    with memedge.Gate(detector, most_prompts=100, observe=count) as gate:
        assert_type(gate.warmup(10), float)
        assert_type(gate.detect_all(["a", "b"], "off"), list[memedge.Verdict])
        return gate.detect("a", timeout=1.0)


async def coroutine(gate: memedge.Gate) -> memedge.Verdict:
    assert_type(await gate.adetect_all(["a"]), list[memedge.Verdict])
    return await gate.adetect("a", timeout=1.0)


def why(error: memedge.MemedgeError) -> str:
    """Tell errors apart, the narrow ones first."""
    match error:
        case memedge.ManifestError() | memedge.IntegrityError():
            return "the engine directory"
        case memedge.ProviderError():
            return "the provider"
        case memedge.NotFiniteError():
            return "the model"
        case memedge.EngineError():
            return "the engine"
        case memedge.OverloadedError():
            return f"try again in {error.retry_after} s"
        case memedge.DeadlineError() | memedge.ClosedError():
            return "too late"
        case memedge.TooLargeError():
            return "fewer at a time"
        case memedge.InputError():
            return "the input"
        case memedge.ExportError():
            return "the checkpoint"
        case _:
            return str(error)
