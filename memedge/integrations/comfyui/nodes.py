"""The nodes: Memorization Gate, Memorization Report, Memorization Score (docs/comfyui.md)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io, ui

from memedge.detector import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.errors import InputError
from memedge.engine.manifest import FILE_NAME
from memedge.integrations.comfyui.gate import Gate

CATEGORY = "memedge"
GateType = io.Custom("MEMORIZATION_GATE")
PIXELS_PER_LATENT = 8  # in each direction, as Stable Diffusion's, Flux's and most others' autoencoders have
EMBEDDED = "embedded"


class MemorizationGate(io.ComfyNode):  # type: ignore[misc]
    """Patches a model, so that every run of a sampler on it is measured, and stopped or steered if asked."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="MemedgeMemorizationGate",
            display_name="Memorization Gate",
            category=CATEGORY,
            description="Measures, at no further pass of the model, how hard the prompt pulls in the first step.",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    round=0.0001,
                    tooltip="From which norm of the first step on an image is memorized. 0: only measure.",
                ),
                io.Combo.Input(
                    "action",
                    options=["flag", "interrupt", "steer"],
                    default="flag",
                    tooltip="What to do then. interrupt: end the run, if all its images are memorized. steer: guide "
                    "memorized images away from the prompt until timestep 650.",
                ),
                io.Conditioning.Input(
                    "empty",
                    optional=True,
                    tooltip="The empty prompt, where the sampler's negative prompt is another one.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL"), GateType.Output(display_name="gate")],
        )

    @classmethod
    def execute(cls, model: Any, threshold: float, action: Any, empty: Any = None) -> Any:
        """Return the patched model, and the gate for reports."""
        gate = Gate(threshold or None, action, empty)
        return io.NodeOutput(gate.patch(model), gate)


class MemorizationReport(io.ComfyNode):  # type: ignore[misc]
    """What a gate saw in the run that made these latents."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="MemedgeMemorizationReport",
            display_name="Memorization Report",
            category=CATEGORY,
            description="Score, verdict and map of the run that made these latents, as a Memorization Gate saw it.",
            is_output_node=True,
            inputs=[
                GateType.Input("gate"),
                io.Latent.Input("latent", tooltip="Of the sampler that has the gate's model."),
                io.Image.Input("image", optional=True, tooltip="The decoded latents, to lay the map over."),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="The largest norm of the batch's first steps."),
                io.Boolean.Output(display_name="memorized", tooltip="Whether any image is memorized."),
                io.String.Output(display_name="verdict", tooltip="A line for each image."),
                io.Image.Output(display_name="map", tooltip="Where the prompt pulls; red over the image, if given."),
                io.Mask.Output(
                    display_name="mask", tooltip="The map as a mask, from 0 to the batch's largest value, 1."
                ),
            ],
        )

    @classmethod
    def execute(cls, gate: Gate, latent: dict[str, Any], image: Any = None) -> Any:
        """Return score, verdict and map.

        Raises:
            InputError: the latents are of no run that the gate saw, or the images are not theirs.
        """
        samples = latent["samples"]
        run = gate.run_of(samples)
        rows = len(samples)
        if image is not None and len(image) != rows:
            raise InputError(f"There are {len(image)} images for {rows} latents: connect the decoded latents as image.")
        size = [PIXELS_PER_LATENT * side for side in samples.shape[2:]] if image is None else image.shape[1:3]
        mask = torch.from_numpy(run.map(*size))
        shown = mask[..., None].expand(*mask.shape, 3) if image is None else _laid_over(image.cpu(), mask)
        memorized = run.memorized is not None and bool(run.memorized.any())
        verdict = "\n".join(run.reasons())
        return io.NodeOutput(float(run.norm.max()), memorized, verdict, shown, mask, ui=ui.PreviewText(verdict))


class MemorizationScore(io.ComfyNode):  # type: ignore[misc]
    """Judges a prompt with an engine, before anything is generated."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="MemedgeMemorizationScore",
            display_name="Memorization Score",
            category=CATEGORY,
            description="Judges a prompt with an engine that memedge exported from the model, before generating.",
            is_output_node=True,
            inputs=[
                io.String.Input("prompt", multiline=True),
                io.String.Input(
                    "engine",
                    default=EMBEDDED,
                    tooltip=f"The folder of an engine of this workflow's model. {EMBEDDED}: a small model of emoji.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score"),
                io.Float.Output(display_name="norm"),
                io.Boolean.Output(display_name="memorized"),
                io.String.Output(display_name="verdict"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, prompt: str, engine: str) -> Any:
        """Return what the engine's verdicts change with, so that a calibration is not overlooked."""
        return prompt, engine, _changed(engine)

    @classmethod
    def execute(cls, prompt: str, engine: str) -> Any:
        """Return score, norm and verdict.

        Raises:
            MemedgeError: as Detector.load and detect; InputError if the engine is not calibrated for what runs.
        """
        detector = _detector(engine, _changed(engine))
        (verdict,) = detector.detect([prompt], early="off")
        if verdict.memorized is None:
            raise InputError(
                f"{engine} gives no verdicts for {detector.info.key}: run `memedge calibrate` on it first."
            )
        text = f"{'memorized' if verdict.memorized else 'ok'}: {verdict.reason}"
        return io.NodeOutput(verdict.score, verdict.norm, verdict.memorized, text, ui=ui.PreviewText(text))


class MemedgeExtension(ComfyExtension):  # type: ignore[misc]
    """All nodes of the package."""

    async def get_node_list(self) -> list[Any]:
        """Return the nodes' classes."""
        return [MemorizationGate, MemorizationReport, MemorizationScore]


def _laid_over(image: Any, mask: Any) -> Any:
    """Return an image, [B, H, W, 3] in 0…1, that is as red as the mask says."""
    share = mask[..., None]
    return image * (1 - share) + share * torch.tensor([1.0, 0.0, 0.0])


def _folder(engine: str) -> Path:
    return EMBEDDED_ENGINE if engine == EMBEDDED else Path(engine)


def _changed(engine: str) -> int | None:
    """Return when an engine's manifest was last written; None where there is none."""
    try:
        return (_folder(engine) / FILE_NAME).stat().st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=1)
def _detector(engine: str, _changed: int | None) -> Detector:
    return Detector.load(_folder(engine))
