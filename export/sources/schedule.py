"""The noise schedule of a checkpoint: at which timesteps it is looked at, and how noisy those are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DDIMScheduler

from memedge.engine.errors import ExportError
from memedge.engine.manifest import Flow, PredictionType, Schedule, velocity_norm_factor

INFERENCE_STEPS = 50  # the published detector's DDIM run, from which both timesteps are taken (docs/methods.md §0)


@dataclass(frozen=True)
class Noise:
    """What the UNet predicts; (t_norm, t_cos) and ᾱ at both; all of DDIM's steps; what is unusual, in sentences."""

    prediction_type: PredictionType
    timesteps: tuple[int, int]
    alphas_cumprod: tuple[float, float]
    schedule: Schedule
    notes: tuple[str, ...] = ()
    flow: Flow | None = None  # of flow matching

    @property
    def norm_factor(self) -> float:
        """What ‖Δ(t_norm)‖ is multiplied by, as Manifest.norm_factor."""
        return velocity_norm_factor(self.alphas_cumprod[0]) if self.prediction_type == "v_prediction" else 1.0


def invalid(config: Mapping[str, Any], error: Exception) -> ExportError:
    """Return the error for a configuration that diffusers does not take."""
    name, reason = config.get("_class_name", "the scheduler"), str(error).splitlines()[0]
    return ExportError(f"The configuration of {name} is not valid ({reason}): check scheduler_config.json.")


def read_noise(config: Mapping[str, Any]) -> Noise:
    """Return the noise of a checkpoint's scheduler_config.json, whatever scheduler it is for.

    As the published code does, DDIM is made of the checkpoint's betas, spacing and offset; what the configuration does
    not say is DDIM's own default.

    Raises:
        ExportError: the scheduler has no betas (flow matching, EDM), or the prediction is neither ε nor v.
    """
    name = config.get("_class_name", "the scheduler")
    if not {"beta_start", "beta_schedule", "trained_betas"} & set(config):
        raise ExportError(f"{name} has no betas, so there is no DDIM of it: memedge knows ε- and v-prediction models.")
    try:
        scheduler = DDIMScheduler.from_config(dict(config))
        scheduler.set_timesteps(INFERENCE_STEPS)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise invalid(config, error) from None
    prediction_type: Literal["epsilon", "v_prediction"] = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ExportError(f"The model predicts {prediction_type!r}: memedge knows epsilon and v_prediction.")
    steps = [int(step) for step in scheduler.timesteps]
    noisiest, notes = steps[0], []
    if prediction_type == "v_prediction" and float(scheduler.alphas_cumprod[noisiest]) == 0:
        noisiest = steps[1]
        notes.append(
            f"ᾱ is 0 at timestep {steps[0]} (zero terminal SNR), where the norm of v-prediction vanishes: the norm is "
            f"taken at the next one, {noisiest}."
        )
    timesteps = (noisiest, steps[-3])
    alphas = tuple(float(scheduler.alphas_cumprod[step]) for step in timesteps)
    schedule = Schedule(
        timesteps=tuple(steps),
        alphas_cumprod=tuple(float(scheduler.alphas_cumprod[step]) for step in steps),
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
    )
    return Noise(prediction_type, timesteps, (alphas[0], alphas[1]), schedule, tuple(notes))
