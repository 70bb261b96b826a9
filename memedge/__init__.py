"""memedge: catches prompts that make a text-to-image diffusion model reproduce a training image.

    from memedge import Detector
    detector = Detector.load()
    detector.detect(["a prompt"])

Importing this package loads neither torch nor transformers, diffusers or onnx; each name loads what it needs.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers, which _PUBLIC tells nothing; a test compares the two
    from memedge.calibration.calibrate import Calibrated as Calibrated
    from memedge.calibration.calibrate import calibrate as calibrate
    from memedge.decision.early import Early as Early
    from memedge.decision.rule import Rule as Rule
    from memedge.detector import Detector as Detector
    from memedge.detector import EngineInfo as EngineInfo
    from memedge.engine.errors import EngineError as EngineError
    from memedge.engine.errors import ExportError as ExportError
    from memedge.engine.errors import InputError as InputError
    from memedge.engine.errors import IntegrityError as IntegrityError
    from memedge.engine.errors import ManifestError as ManifestError
    from memedge.engine.errors import MemedgeError as MemedgeError
    from memedge.engine.errors import NotFiniteError as NotFiniteError
    from memedge.engine.errors import ProviderError as ProviderError
    from memedge.engine.manifest import Alignment as Alignment
    from memedge.engine.manifest import Calibration as Calibration
    from memedge.engine.manifest import CheckpointSource as CheckpointSource
    from memedge.engine.manifest import Conformal as Conformal
    from memedge.engine.manifest import CrossValidation as CrossValidation
    from memedge.engine.manifest import Drift as Drift
    from memedge.engine.manifest import Estimate as Estimate
    from memedge.engine.manifest import FileEntry as FileEntry
    from memedge.engine.manifest import Flops as Flops
    from memedge.engine.manifest import Flow as Flow
    from memedge.engine.manifest import Gain as Gain
    from memedge.engine.manifest import Manifest as Manifest
    from memedge.engine.manifest import Operands as Operands
    from memedge.engine.manifest import Parity as Parity
    from memedge.engine.manifest import Precision as Precision
    from memedge.engine.manifest import PredictionType as PredictionType
    from memedge.engine.manifest import Preset as Preset
    from memedge.engine.manifest import PromptList as PromptList
    from memedge.engine.manifest import Schedule as Schedule
    from memedge.engine.manifest import Screen as Screen
    from memedge.engine.manifest import Tap as Tap
    from memedge.evaluation.evaluate import evaluate as evaluate
    from memedge.evaluation.figures import Confusion as Confusion
    from memedge.evaluation.figures import DetectorDifference as DetectorDifference
    from memedge.evaluation.figures import DetectorFigures as DetectorFigures
    from memedge.evaluation.figures import DetectorStability as DetectorStability
    from memedge.evaluation.figures import EvaluatedDetector as EvaluatedDetector
    from memedge.evaluation.figures import Evaluation as Evaluation
    from memedge.evaluation.figures import EvaluationRun as EvaluationRun
    from memedge.evaluation.figures import Figure as Figure
    from memedge.evaluation.figures import Findings as Findings
    from memedge.evaluation.figures import PromptFile as PromptFile
    from memedge.evaluation.figures import RocCurve as RocCurve
    from memedge.evaluation.figures import ScoredPrompt as ScoredPrompt
    from memedge.evaluation.figures import ScreenFigures as ScreenFigures
    from memedge.explain import Explanation as Explanation
    from memedge.explain import ExplanationMethod as ExplanationMethod
    from memedge.explain import ScoreKind as ScoreKind
    from memedge.explain import Token as Token
    from memedge.explain import Word as Word
    from memedge.export import export as _export
    from memedge.guidance import GuidanceStats as GuidanceStats
    from memedge.guidance import guidance_stats as guidance_stats
    from memedge.mitigation.mitigator import MitigatedNoise as MitigatedNoise
    from memedge.mitigation.mitigator import Mitigation as Mitigation
    from memedge.mitigation.mitigator import Mitigator as Mitigator
    from memedge.mitigation.target import Loss as Loss
    from memedge.monitor.calibration import GenerationSettings as GenerationSettings
    from memedge.monitor.calibration import MonitorCalibration as MonitorCalibration
    from memedge.monitor.monitor import Monitor as Monitor
    from memedge.monitor.verdicts import MonitorVerdict as MonitorVerdict
    from memedge.prompts.labelled import Prompts as Prompts
    from memedge.results import Scores as Scores
    from memedge.results import Verdict as Verdict
    from memedge.results import Verdicts as Verdicts
    from memedge.serving.errors import ClosedError as ClosedError
    from memedge.serving.errors import DeadlineError as DeadlineError
    from memedge.serving.errors import OverloadedError as OverloadedError
    from memedge.serving.errors import TooLargeError as TooLargeError
    from memedge.serving.gate import Gate as Gate
    from memedge.serving.gate import Round as Round

    export_engine = _export.export  # `import export as export_engine` would not count as a public name

__version__ = "0.1.0"

# The one logger: verdicts, without prompts, at INFO. It says nothing until the application gives it a handler.
logging.getLogger("memedge").addHandler(logging.NullHandler())

# The public names, by the module that they come from.
_PUBLIC = {
    "memedge.calibration.calibrate": "Calibrated calibrate",
    "memedge.decision.early": "Early",
    "memedge.decision.rule": "Rule",
    "memedge.detector": "Detector EngineInfo",
    "memedge.engine.errors": (
        "EngineError ExportError InputError IntegrityError ManifestError MemedgeError NotFiniteError ProviderError"
    ),
    "memedge.engine.manifest": (
        "Alignment Calibration CheckpointSource Conformal CrossValidation Drift Estimate FileEntry Flops Flow "
        "Gain Manifest Operands Parity Precision PredictionType Preset PromptList Schedule "
        "Screen Tap"
    ),
    "memedge.evaluation.evaluate": "evaluate",
    "memedge.evaluation.figures": (
        "Confusion DetectorDifference DetectorFigures DetectorStability EvaluatedDetector Evaluation "
        "EvaluationRun Figure Findings PromptFile RocCurve ScoredPrompt ScreenFigures"
    ),
    "memedge.explain": "Explanation ExplanationMethod ScoreKind Token Word",
    "memedge.guidance": "GuidanceStats guidance_stats",
    "memedge.mitigation.mitigator": "MitigatedNoise Mitigation Mitigator",
    "memedge.mitigation.target": "Loss",
    "memedge.monitor.calibration": "GenerationSettings MonitorCalibration",
    "memedge.monitor.monitor": "Monitor",
    "memedge.monitor.verdicts": "MonitorVerdict",
    "memedge.prompts.labelled": "Prompts",
    "memedge.results": "Scores Verdict Verdicts",
    "memedge.serving.errors": "ClosedError DeadlineError OverloadedError TooLargeError",
    "memedge.serving.gate": "Gate Round",
}
# Where each is found; the package memedge.export keeps its name.
_HOMES = {name: (module, name) for module, names in _PUBLIC.items() for name in names.split()}
_HOMES["export_engine"] = ("memedge.export.export", "export")
__all__ = sorted(_HOMES)

# What a module needs beyond the extra "cpu".
_EXTRAS = {"memedge.evaluation": "eval", "memedge.export": "export"}

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "engine" / "manifest.py").is_file():
    # A checkout that is not installed: memedge.engine and memedge.export live beside this folder, not in it.
    __path__.append(str(_checkout))


if not TYPE_CHECKING:  # else type checkers would take every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'memedge' has no attribute {name!r}")
        module, own_name = _HOMES[name]
        try:
            return getattr(import_module(module), own_name)
        except ModuleNotFoundError as error:
            from memedge.engine.errors import not_installed

            extra = ",".join(["cpu", *(extra for wing, extra in _EXTRAS.items() if module.startswith(wing))])
            otherwise = f", or `python -m pip install '.[{extra}]'` in a checkout"
            raise ImportError(not_installed(f"memedge.{name}", error, extra, otherwise)) from error
