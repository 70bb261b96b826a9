"""Whether a pipeline's UNet, as it stands, predicts what the engine's does: adapters, hooks and edits change that."""

from typing import Any

import numpy as np

from memedge.detector import Detector
from memedge.engine.denoiser import norms
from memedge.engine.embeddings import unpack
from memedge.engine.errors import InputError
from memedge.wording import counted

VAE_SCALE = 8  # pixels per latent, as the export counts them for SDXL's time ids
# ‖ε − ε_0‖ / ‖ε_0‖ that rounding makes, with a margin of four and more: the embedded model, whose weights are halves
# anyhow, is 3e-7 off in fp32, 5e-4 in fp16 and 5e-3 in bf16. Convolutions of a GPU in TF32 count as fp32.
ROUNDING = {"torch.float32": 3e-3, "torch.float16": 5e-3, "torch.bfloat16": 2e-2}


def check_same_model(pipe: Any, detector: Detector, attention: dict[str, Any] | None = None) -> None:
    """Raise InputError unless the pipeline's UNet predicts the engine's ε_0 on the engine's own noise.

    One call of two rows, at the engine's two timesteps: what a change moves most depends on it.

    Args:
        attention: cross_attention_kwargs, which may scale a LoRA.
    """
    import torch

    if getattr(pipe.unet, "encoder_hid_proj", None) is not None:
        raise InputError(
            "The pipeline has an IP-Adapter, whose pictures guide it beside the prompt: call pipe.unload_ip_adapter()."
        )
    engine = detector.engine
    manifest, baseline = engine.directory.manifest, engine.directory.baseline
    empty = engine.backend.memory.download(engine.encode(engine.tokenize([""])[0]).tensor)
    device, dtype = pipe._execution_device, pipe.unet.dtype

    def tensor(array: Any) -> Any:
        return torch.as_tensor(np.array(array)).to(device, dtype)

    states, pooled = unpack(manifest, empty)
    more = {}
    if pooled is not None:
        height, width = (VAE_SCALE * side for side in manifest.latent_shape[1:])
        ids = [[height, width, 0, 0, height, width]] * 2
        more["added_cond_kwargs"] = {"text_embeds": tensor(pooled[[0, 0]]), "time_ids": tensor(ids)}
    with torch.no_grad():
        output = pipe.unet(
            tensor(baseline.sample[[0, 0]]),
            torch.tensor(manifest.timesteps, device=device),
            encoder_hidden_states=tensor(states[[0, 0]]),
            cross_attention_kwargs=attention,
            return_dict=False,
            **more,
        )
    pipe.maybe_free_model_hooks()  # as a pipeline does at its end
    own, expected = output[0].double().cpu().numpy(), baseline.uncond[:, 0].astype(np.float64)
    difference = float((norms(own - expected) / norms(expected)).max())
    allowed = ROUNDING.get(str(dtype), 0.0) + manifest.parity.epsilon_relative
    if not difference <= allowed:  # NaN too
        beside = beside_the_weights(pipe)
        adapters = f" (with {', '.join(beside)})" if beside else ""
        raise InputError(
            f"The pipeline's UNet{adapters} is not the engine's model, {manifest.source.id}: its prediction differs by "
            f"{difference:.2g} of the norm, where rounding makes at most {allowed:.2g}; make an engine of the "
            "pipeline's own model, LoRAs included, with `memedge export`."
        )


def beside_the_weights(pipe: Any) -> list[str]:
    """Return what may change what the UNet predicts, or the embeddings, beside weights: in words, for a message.

    Adapters (LoRAs) that are active, hooks of others than accelerate, and attention of others than diffusers. They may
    leave the empty prompt's prediction alone, and change other prompts'.
    """
    found = [f"adapter {name}" for name in _active_adapters(pipe)]
    modules = pipe.unet.modules() if hasattr(pipe.unet, "modules") else ()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    if hooks:
        found.append(f"{counted(hooks, 'hook')} on the UNet")
    kinds = {type(one) for one in getattr(pipe.unet, "attn_processors", {}).values()}
    names = sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith("diffusers."))
    return found + [f"attention by {name}" for name in names]


def _active_adapters(pipe: Any) -> list[str]:
    names: list[str] = []
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module: Any = getattr(pipe, part, None)
        if getattr(module, "_hf_peft_config_loaded", False):
            found = module.active_adapters() if callable(module.active_adapters) else module.active_adapters
            names += [found] if isinstance(found, str) else found
    return list(dict.fromkeys(names))
