"""`memedge info ENGINE_DIR`: what an engine is."""

from typing import TYPE_CHECKING

from memedge.commands import descriptions, terminal
from memedge.commands.options import (
    EngineArgument,
    EngineOption,
    JsonOption,
    PrecisionOption,
    ProviderOption,
    ThreadsOption,
    app,
    load_detector,
    one_engine,
)

if TYPE_CHECKING:
    from memedge.detector import EngineInfo
    from memedge.engine.manifest import Manifest


@app.command()
def info(
    directory: EngineArgument = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Verify an engine; show what it is, runs on, was fitted to."""
    detector = load_detector(one_engine(directory, engine), provider, precision, threads)
    terminal.print_json(detector.info) if json else print_info(detector.info)


def print_info(info: "EngineInfo") -> None:
    manifest, calibration = info.manifest, info.calibration
    terminal.print_facts(
        [
            ("engine", f"{info.path} (verified)"),
            ("checkpoint", f"{manifest.source.id}, sha256 {manifest.source.sha256[:16]}…"),
            ("prediction", _prediction(manifest)),
            ("latents", " × ".join(map(str, manifest.latent_shape))),
            ("prompts", _prompts(manifest)),
            ("timesteps", f"norm at {manifest.timesteps[0]}, alignment at {manifest.timesteps[1]}"),
            *_told(manifest),
            *(("note", note) for note in manifest.notes),
            ("draws", f"{manifest.draws} (seed {manifest.seed})"),
            ("runs on", f"{info.provider}, {info.precision}, {info.threads} threads"),
            ("size", descriptions.size(manifest)),
            ("work", _work(manifest)),
            ("parity", descriptions.parity(manifest)),
            *([("int8 drift", descriptions.drift(manifest.drift))] if manifest.drift else []),
            ("exported by", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
            *(descriptions.calibration_facts(calibration) if calibration else [("calibration", _uncalibrated(info))]),
            *_history(info),
        ]
    )


def _history(info: "EngineInfo") -> list[tuple[str, str]]:
    """Return the calibrations that were replaced, the newest first."""
    from memedge.calibration.history import earlier

    found = earlier(info.path, info.manifest, info.key)
    return [
        ("kept" if place == 0 else "", f"{one.date}: ≥ {one.threshold:.4g}, for a rate of {one.target_fpr:g}")
        for place, one in enumerate(reversed(found))
    ]


def _prediction(manifest: "Manifest") -> str:
    flow = manifest.flow
    if flow is None:
        return manifest.prediction_type
    shift = f"shift {flow.shift:g}" if flow.shift is not None else f"mu {flow.mu:g} ({flow.time_shift})"
    end = "" if flow.terminal is None else f", down to {flow.terminal:g}"
    return f"flow matching, {shift}{end}; timesteps are 1000 σ"


def _told(manifest: "Manifest") -> list[tuple[str, str]]:
    return [] if manifest.guidance is None else [("guidance", f"{manifest.guidance:g}, which the model is told")]


def _prompts(manifest: "Manifest") -> str:
    pooled = f", and a pooled state of width {manifest.pooled_width}" if manifest.pooled_width else ""
    return f"{manifest.tokens} tokens of width {manifest.state_width}{pooled}"


def _work(manifest: "Manifest") -> str:
    flops = manifest.flops
    return (
        f"{flops.remaining / 1e9:.4g} of {flops.unet / 1e9:.4g} GFLOP per UNet row ({flops.prefix / 1e9:.3g} cached), "
        f"{flops.text_encoder / 1e9:.3g} per prompt in the text encoder"
    )


def _uncalibrated(info: "EngineInfo") -> str:
    rule = info.rule
    if not rule.fitted:
        return f"none for {info.key}: norm and alignment only, no verdicts; run `memedge calibrate`"
    return (
        f"none for {info.key}, so no verdicts: run `memedge calibrate`. score = {rule.formula}, of {rule.family}: "
        "published, not fitted here"
    )
