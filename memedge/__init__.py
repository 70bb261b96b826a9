"""memedge: catches prompts that make a text-to-image diffusion model reproduce a training image.

    from memedge import Detector
    detector = Detector.load()
    detector.detect(["a prompt"])

Importing this package loads neither torch nor transformers, diffusers or onnx; each name loads what it needs.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memedge.detector import Detector as Detector
    from memedge.detector import EngineInfo as EngineInfo
    from memedge.engine.errors import EngineError as EngineError
    from memedge.engine.errors import InputError as InputError
    from memedge.engine.errors import MemedgeError as MemedgeError
    from memedge.explain import Explanation as Explanation
    from memedge.guidance import GuidanceStats as GuidanceStats
    from memedge.guidance import guidance_stats as guidance_stats
    from memedge.mitigation.mitigator import MitigatedNoise as MitigatedNoise
    from memedge.mitigation.mitigator import Mitigation as Mitigation
    from memedge.mitigation.mitigator import Mitigator as Mitigator
    from memedge.results import Scores as Scores
    from memedge.results import Verdict as Verdict

__version__ = "0.1.0"

_HOMES = {
    "Detector": "memedge.detector",
    "EngineInfo": "memedge.detector",
    "EngineError": "memedge.engine.errors",
    "InputError": "memedge.engine.errors",
    "MemedgeError": "memedge.engine.errors",
    "Explanation": "memedge.explain",
    "GuidanceStats": "memedge.guidance",
    "guidance_stats": "memedge.guidance",
    "MitigatedNoise": "memedge.mitigation.mitigator",
    "Mitigation": "memedge.mitigation.mitigator",
    "Mitigator": "memedge.mitigation.mitigator",
    "Scores": "memedge.results",
    "Verdict": "memedge.results",
}
__all__ = list(_HOMES)

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "engine" / "manifest.py").is_file():
    # A checkout that is not installed: memedge.engine and memedge.export live beside this folder, not in it.
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'memedge' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from memedge.engine.errors import not_installed

        otherwise = ", or `python -m pip install '.[cpu]'` in a checkout"
        raise ImportError(not_installed("memedge", error, "cpu", otherwise)) from error
