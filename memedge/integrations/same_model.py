"""Whether a pipeline's denoiser, as it stands, predicts what the engine's does; adapters, hooks, edits change that."""

from typing import Any

import numpy as np

from memedge.detector import Detector
from memedge.engine.denoiser import norms
from memedge.engine.embeddings import unpack
from memedge.engine.errors import InputError
from memedge.integrations.families.find import family_of
from memedge.wording import counted

# ‖ε − ε_0‖ / ‖ε_0‖ that rounding makes, with a margin of four and more: the embedded model, whose weights are halves
# anyhow, is 3e-7 off in fp32, 5e-4 in fp16 and 5e-3 in bf16. Convolutions of a GPU in TF32 count as fp32.
ROUNDING = {"torch.float32": 3e-3, "torch.float16": 5e-3, "torch.bfloat16": 2e-2}


def check_same_model(pipe: Any, detector: Detector, attention: dict[str, Any] | None = None) -> None:
    """Raise InputError unless the pipeline's denoiser predicts the engine's ε_0 on the engine's own noise.

    One call of two rows, at the engine's two timesteps: what a change moves most depends on it.

    Args:
        attention: cross_attention_kwargs, or joint_attention_kwargs, which may scale a LoRA.
    """
    import torch

    family = family_of(pipe)
    denoiser = family.denoiser(pipe)
    if getattr(denoiser, family.adapter, None) is not None:
        raise InputError(
            "The pipeline has an IP-Adapter, whose pictures guide it beside the prompt: call pipe.unload_ip_adapter()."
        )
    engine = detector.engine
    manifest, baseline = engine.directory.manifest, engine.directory.baseline
    empty = engine.backend.memory.download(engine.encode(engine.tokenize([""])[0]).tensor)
    device, dtype = pipe._execution_device, denoiser.dtype

    def tensor(array: Any) -> Any:
        return torch.as_tensor(np.array(array)).to(device, dtype)

    states, pooled = unpack(manifest, empty[0])  # of its own length
    timesteps = torch.tensor(manifest.timesteps, device=device)
    sample = baseline.sample[[0, 0]]
    rows = tensor([states, states]), None if pooled is None else tensor([pooled, pooled])
    with torch.no_grad():
        prediction = family.predict(pipe, manifest, tensor(sample), timesteps, *rows, attention)
    pipe.maybe_free_model_hooks()  # as a pipeline does at its end
    own, expected = prediction.double().cpu().numpy(), baseline.uncond[:, 0].astype(np.float64)
    if family.flow:  # what engines give of flow matching: v + x · [σ < 1] / (1 − σ)
        share = [1000 / (1000 - timestep) if timestep < 1000 else 0.0 for timestep in manifest.timesteps]
        own = own + np.array(share)[:, None, None, None] * sample
    difference = float((norms(own - expected) / norms(expected)).max())
    allowed = ROUNDING.get(str(dtype), 0.0) + manifest.parity.epsilon_relative
    if not difference <= allowed:  # NaN too
        beside = beside_the_weights(pipe)
        adapters = f" (with {', '.join(beside)})" if beside else ""
        raise InputError(
            f"The pipeline's {family.network}{adapters} is not the engine's model, {manifest.source.id}: its "
            f"prediction differs by {difference:.2g} of the norm, where rounding makes at most {allowed:.2g}; make an "
            "engine of the pipeline's own model, LoRAs included, with `memedge export`."
        )


def beside_the_weights(pipe: Any) -> list[str]:
    """Return what may change what the denoiser predicts, or the embeddings, beside weights: in words, for a message.

    Adapters (LoRAs) that are active, hooks of others than accelerate, and attention of others than diffusers. They may
    leave the empty prompt's prediction alone, and change other prompts'.
    """
    found = [f"adapter {name}" for name in _active_adapters(pipe)]
    family = family_of(pipe)
    denoiser = family.denoiser(pipe)
    modules = denoiser.modules() if hasattr(denoiser, "modules") else ()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    if hooks:
        found.append(f"{counted(hooks, 'hook')} on the {family.network}")
    kinds = {type(one) for one in getattr(denoiser, "attn_processors", {}).values()}
    names = sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith("diffusers."))
    return found + [f"attention by {name}" for name in names]


def _active_adapters(pipe: Any) -> list[str]:
    names: list[str] = []
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module: Any = getattr(pipe, part, None)
        if getattr(module, "_hf_peft_config_loaded", False):
            found = module.active_adapters() if callable(module.active_adapters) else module.active_adapters
            names += [found] if isinstance(found, str) else found
    return list(dict.fromkeys(names))
