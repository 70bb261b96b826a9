"""What flow-matching pipelines have in common: noise levels, and sizes and lengths that a call may choose."""

from collections.abc import Callable, Sequence
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.flow import size_shift
from memedge.engine.manifest import Flow, Manifest
from memedge.integrations.families.family import Arguments, Fact, Family


class FlowFamily(Family):
    """Transformers of flow matching, called by names of arguments.

    Attributes:
        clock: what a timestep of the transformer's is multiplied by to be 1000 σ.
        per_row: the arguments that have a row for each prediction, but for embeddings.
        cuts_embeddings: whether the pipeline cuts embeddings that it is given to max_sequence_length.
    """

    part = "transformer"
    network = "transformer"
    flow = True
    clock = 1
    per_row: tuple[str, ...] = ("hidden_states", "timestep")
    cuts_embeddings = False

    def model_facts(self, config: Any, manifest: Manifest) -> list[Fact]:
        """Return what a transformer's configuration and an engine's manifest say of the model's shapes."""
        raise NotImplementedError

    def length(self, pipe: Any, manifest: Manifest) -> int:
        """Return the engine's max_sequence_length."""
        del pipe
        return manifest.tokens

    def side(self, pipe: Any) -> int:
        """Return the side of the pipeline's own latents."""
        return int(pipe.default_sample_size)

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        return [
            ("prediction type", "flow", manifest.prediction_type),
            *self.model_facts(pipe.transformer.config, manifest),
            *_noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        _check_size(get, manifest, pipe.vae_scale_factor, self.side(pipe))
        if get("prompt_embeds") is None or self.cuts_embeddings:
            _check_length(get, self.length(pipe, manifest))

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del args
        return kwargs["hidden_states"], self.clock * float(kwargs["timestep"][0])

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        more = {name: kwargs[name][rows] for name in self.per_row if kwargs[name] is not None}
        more["encoder_hidden_states"] = empty[0][prompts]
        if empty[1] is not None:
            more["pooled_projections"] = empty[1][prompts]
        return args, kwargs | more


def _noise_facts(pipe: Any, manifest: Manifest) -> list[Fact]:
    """Return how a flow-matching pipeline's scheduler spreads its noise levels at the engine's size."""
    kind, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    known = ("scheduler", kind, "FlowMatchEulerDiscreteScheduler")
    if manifest.flow is None or kind != known[2]:
        return [known]
    flow, shift, mu = manifest.flow, None, None
    if config.use_dynamic_shifting:
        mu = size_shift(config, manifest.latent_shape)
    else:
        shift = float(pipe.scheduler.shift)
    own = Flow(shift, mu, config.time_shift_type, config.shift_terminal or None, flow.sigmas)
    return [
        ("shift of noise levels", own.shift, flow.shift),
        ("mu of noise levels", own.mu, flow.mu),
        ("shift_terminal", own.terminal, flow.terminal),
        ("time_shift_type", own.time_shift, flow.time_shift),
    ]


def _check_length(get: Callable[[str], Any], own: int) -> None:
    """Raise InputError unless a call's prompts are read up to the engine's max_sequence_length."""
    length = get("max_sequence_length")
    if length != own:
        raise InputError(
            f"max_sequence_length is {length}, and the engine's is {own}: call the pipeline with that one, or export "
            f"an engine with --max-sequence-length {length}."
        )


def _check_size(get: Callable[[str], Any], manifest: Manifest, scale: int, default: int) -> None:
    """Raise InputError unless a call's latents are as large as the engine's.

    Args:
        get: returns the value of one of the call's arguments, or None.
        manifest: the engine's.
        scale: pixels per latent.
        default: the side of the pipeline's own latents.
    """
    latents = get("latents")
    own = [scale * side for side in manifest.latent_shape[1:]]
    found = [int(get(name) or default * scale) for name in ("height", "width")]
    if latents is not None and latents.ndim == 4:  # packed ones are of the size that is said, or it is an error
        found = [scale * side for side in latents.shape[-2:]]
    if found != own:
        raise InputError(
            f"The call's pictures are of {found[1]}x{found[0]} pixels, and the engine's statistics of {own[1]}x{own[0]}"
            f": call the pipeline with width={own[1]} and height={own[0]}, or export an engine with --size "
            f"{found[1]}x{found[0]}."
        )
