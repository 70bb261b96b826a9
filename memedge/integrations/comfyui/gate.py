"""The handle from a Memorization Gate to its reports: the hooks in a model, and the runs that they saw."""

from collections import deque
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import convert_cond

from memedge.engine.errors import InputError
from memedge.integrations.comfyui.run import EMPTY, Action, Run

KEPT = 8  # runs whose reports may still be asked for


class Gate:
    """Measures every run of a sampler on the model that it patched.

    ComfyUI keeps a node's outputs, so a gate outlives many runs. Each run is measured afresh, and a report asks for the
    one that made its latents: never for the latest.
    """

    def __init__(self, threshold: float | None, action: Action, empty: Any = None):
        """Take from which norm on an image is memorized, what is done then, and the empty prompt's CONDITIONING.

        Raises:
            InputError: an action other than "flag" without a threshold.
        """
        if threshold is None and action != "flag":
            raise InputError(f"To {action} runs the gate needs a threshold: set one above 0, or use action 'flag'.")
        self._threshold, self._action, self._empty = threshold, action, empty
        self._current: Run | None = None
        self._runs: deque[Run] = deque(maxlen=KEPT)

    def patch(self, model: Any) -> Any:
        """Return a clone of a MODEL with this gate's hooks in it.

        One hook comes before classifier-free guidance, where both halves can be read and replaced, so that functions
        which do the guidance their own way stay in their place. The other one is around the whole run.
        """
        patched = model.clone()
        # Functions, not methods: a further clone copies what it finds in the options, a method's object with it.
        patched.set_model_sampler_pre_cfg_function(lambda args: self._see(args))
        patched.add_wrapper_with_key(
            WrappersMP.OUTER_SAMPLE, "memedge", lambda *args, **kwargs: self._run(*args, **kwargs)
        )
        return patched

    def _run(self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        guider, has_empty = executor.class_obj, self._empty is not None
        if has_empty:  # the guider prepares it with its own ones
            guider.conds[EMPTY] = convert_cond(self._empty)
        run = self._current = Run(guider, sigmas, self._threshold, self._action, has_empty)
        try:
            samples = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        finally:
            self._current = None
        run.end(samples)
        self._runs.append(run)
        return samples

    def _see(self, args: dict[str, Any]) -> Any:
        return args["conds_out"] if self._current is None else self._current.see(args)

    def run_of(self, samples: Any) -> Run:
        """Return the run that made these latents, torch [B, C, H, W].

        Raises:
            InputError: none of the last runs did.
        """
        here = samples.detach().cpu()
        for run in reversed(self._runs):
            if run.samples.shape == here.shape and bool((run.samples.to(here.dtype) == here).all()):
                return run
        raise InputError(
            "These latents come from none of the last runs on the gate's model: connect the LATENT of the sampler that "
            "has it, and run that again."
        )
