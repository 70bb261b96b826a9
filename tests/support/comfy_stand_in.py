"""A stand-in for the parts of ComfyUI that memedge's nodes touch: the same names and signatures, and nothing else.

tests/memedge/integrations/test_comfyui.py runs on it, and on the real one where MEMEDGE_COMFYUI names its folder.
"""

# ruff: noqa: ARG002 - the signatures are ComfyUI's
import math
import sys
from enum import Enum
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class InterruptProcessingException(Exception):  # noqa: N818
    """What ComfyUI ends a run with that a user interrupted."""


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"


class Executor:
    """Calls wrappers, each of which calls the next, and at last the method of `class_obj`."""

    def __init__(self, original: Any, class_obj: Any, wrappers: list[Any]):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class EPS:
    def calculate_input(self, sigma: Any, noise: Any) -> Any:
        return noise / (1 + sigma**2) ** 0.5

    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        return model_input - sigma * model_output

    def noise_scaling(self, sigma: Any, noise: Any, latent_image: Any, max_denoise: bool = False) -> Any:
        return latent_image + noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma)


class V_PREDICTION(EPS):  # noqa: N801
    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        return (model_input / (1 + sigma**2) ** 0.5 - sigma * model_output) / (1 + sigma**2) ** 0.5


class EDM(V_PREDICTION):
    pass


class X0(EPS):
    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        return model_output


class CONST:
    def calculate_input(self, sigma: Any, noise: Any) -> Any:
        return noise

    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        return model_input - sigma * model_output

    def noise_scaling(self, sigma: Any, noise: Any, latent_image: Any, max_denoise: bool = False) -> Any:
        return sigma * noise + (1 - sigma) * latent_image


class ModelSamplingDiscrete(torch.nn.Module):
    def __init__(self, model_config: Any = None):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        self.register_buffer("sigmas", ((1 - alphas) / alphas).sqrt().float())

    def timestep(self, sigma: Any) -> Any:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0)

    def sigma(self, timestep: Any) -> Any:
        low = timestep.float().floor().long()
        share = timestep.float().frac()
        logs = self.sigmas.log()
        return ((1 - share) * logs[low] + share * logs[(low + 1).clamp(max=999)]).exp()


class ModelSamplingDiscreteFlow(torch.nn.Module):
    def __init__(self, model_config: Any = None):
        super().__init__()
        self.register_buffer("sigmas", torch.arange(1, 1001) / 1000)

    def timestep(self, sigma: Any) -> Any:
        return 1000 * sigma

    def sigma(self, timestep: Any) -> Any:
        return timestep / 1000


class ModelType(Enum):
    EPS = 1
    V_PREDICTION = 2
    FLOW = 6


class BASE:
    """A model's configuration."""

    def __init__(self, unet_config: Any):
        self.unet_config = unet_config


class BaseModel(torch.nn.Module):
    def __init__(self, model_config: Any, model_type: Any = ModelType.EPS, device: Any = None, unet_model: Any = None):
        super().__init__()
        self.diffusion_model = unet_model(**model_config.unet_config, device=device, operations=None)
        schedule = ModelSamplingDiscreteFlow if model_type is ModelType.FLOW else ModelSamplingDiscrete
        kind = {ModelType.EPS: EPS, ModelType.V_PREDICTION: V_PREDICTION, ModelType.FLOW: CONST}[model_type]
        self.model_sampling = type("ModelSampling", (schedule, kind), {})(model_config)

    def apply_model(self, x: Any, t: Any, c_crossattn: Any = None) -> Any:
        sampling, sigma = self.model_sampling, t.reshape(-1, 1, 1, 1)
        output = self.diffusion_model(
            sampling.calculate_input(sigma, x), sampling.timestep(t).float(), context=c_crossattn
        )
        return sampling.calculate_denoised(sigma, output, x)


class ModelPatcher:
    def __init__(self, model: Any, load_device: Any, offload_device: Any):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> "ModelPatcher":
        from copy import deepcopy

        new = ModelPatcher(self.model, self.load_device, self.offload_device)
        new.model_options, new.object_patches = deepcopy(self.model_options), self.object_patches.copy()
        new.wrappers = {kind: {key: list(one) for key, one in keys.items()} for kind, keys in self.wrappers.items()}
        return new

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name, None))

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def set_model_sampler_cfg_function(
        self, sampler_cfg_function: Any, disable_cfg1_optimization: bool = False
    ) -> None:
        self.model_options["sampler_cfg_function"] = sampler_cfg_function
        self.model_options["disable_cfg1_optimization"] = disable_cfg1_optimization

    def set_model_sampler_pre_cfg_function(
        self,
        pre_cfg_function: Any,
        disable_cfg1_optimization: bool = False,
    ) -> None:
        found = self.model_options.get("sampler_pre_cfg_function", [])
        self.model_options["sampler_pre_cfg_function"] = [*found, pre_cfg_function]

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)


def convert_cond(cond: Any) -> list[dict[str, Any]]:
    return [{**options, "cross_attn": states} for states, options in cond]


def calc_cond_batch(model: Any, conds: Any, x_in: Any, timestep: Any, model_options: Any) -> list[Any]:  # noqa: ARG001
    """Return what is denoised with each conditioning; zeros for None, as ComfyUI does."""
    found = []
    for cond in conds:
        if cond is None:
            found.append(torch.zeros_like(x_in))
        else:
            found.append(model.apply_model(x_in, timestep, cond[0]["cross_attn"].expand(len(x_in), -1, -1)))
    return found


class CFGGuider:
    def __init__(self, model_patcher: Any):
        self.model_patcher, self.model_options = model_patcher, model_patcher.model_options
        self.original_conds: dict[str, Any] = {}
        self.cfg = 1.0

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.original_conds = {"positive": convert_cond(positive), "negative": convert_cond(negative)}

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def __call__(self, x: Any, timestep: Any) -> Any:
        return self.predict_noise(x, timestep, self.model_options)

    def predict_noise(self, x: Any, timestep: Any, model_options: Any, seed: Any = None) -> Any:
        """Do classifier-free guidance with the patches of `model_options`; return what is denoised."""
        model, scale = self.model_patcher.model, self.cfg
        short = math.isclose(scale, 1) and not model_options.get("disable_cfg1_optimization", False)
        conds = [self.conds["positive"], None if short else self.conds["negative"]]
        out = calc_cond_batch(model, conds, x, timestep, model_options)
        args = {"cond_scale": scale, "input": x, "sigma": timestep, "model": model, "model_options": model_options}
        for function in model_options.get("sampler_pre_cfg_function", []):
            out = function({"conds": conds, "conds_out": out, "timestep": timestep, **args})
        if "sampler_cfg_function" in model_options:
            halves = {"cond_denoised": out[0], "uncond_denoised": out[1], "cond": x - out[0], "uncond": x - out[1]}
            return x - model_options["sampler_cfg_function"]({**args, **halves})
        return out[1] + scale * (out[0] - out[1])

    def outer_sample(
        self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *others: Any, latent_shapes: Any = None
    ) -> Any:
        sampling = self.model_patcher.get_model_object("model_sampling")
        full = math.isclose(float(sigmas[0]), float(sampling.sigmas[-1]), rel_tol=1e-5)
        return sampler(self, sampling.noise_scaling(sigmas[0], noise, latent_image, full), sigmas)

    def sample(
        self,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: Any = False,
        seed: Any = None,
    ) -> Any:
        self.conds = {name: [dict(one) for one in cond] for name, cond in self.original_conds.items()}
        keys = self.model_patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
        run = Executor(self.outer_sample, self, [one for wrappers in keys.values() for one in wrappers])
        others, shapes = (denoise_mask, callback, disable_pbar, seed), [latent_image.shape]
        return run(noise, latent_image, sampler, sigmas, *others, latent_shapes=shapes)


def euler(model: Any, x: Any, sigmas: Any, heun: bool = False) -> Any:
    """Integrate from the first σ to the last, by Euler's method or Heun's."""
    for sigma, after in pairwise(sigmas):
        slope = (x - model(x, sigma.expand(len(x)))) / sigma
        ahead = x + slope * (after - sigma)
        if heun and after > 0:
            slope = (slope + (ahead - model(ahead, after.expand(len(x)))) / after) / 2
            ahead = x + slope * (after - sigma)
        x = ahead
    return x


SAMPLERS = {"euler": euler, "heun": lambda model, x, sigmas: euler(model, x, sigmas, heun=True)}


def sample(
    model: Any, noise: Any, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any, negative: Any,
    latent_image: Any, denoise: float = 1.0, seed: Any = None, disable_pbar: bool = False,
) -> Any:  # fmt: skip
    """Return latents, as ComfyUI's KSampler with the scheduler "simple" does."""
    assert scheduler == "simple"
    trained = model.get_model_object("model_sampling").sigmas
    total = int(steps / denoise)
    sigmas = torch.stack([trained[-(1 + int(step * len(trained) / total))] for step in range(total)])
    sigmas = torch.cat([sigmas, torch.zeros(1)])[-(steps + 1) :]
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    with torch.no_grad():
        return guider.sample(noise, latent_image, SAMPLERS[sampler_name], sigmas, None, None, disable_pbar, seed)


class Put:
    """An input or an output of a node, as it was described."""

    def __init__(self, id: str | None = None, **described: Any):
        self.id, self.described = id, described


class Schema(SimpleNamespace):
    pass


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None):
        self.args, self.ui = args, ui

    @property
    def result(self) -> tuple[Any, ...]:
        return self.args


class ComfyExtension:
    pass


def io_type(*_name: str) -> Any:
    return SimpleNamespace(Input=Put, Output=Put)


def install() -> None:
    """Put the stand-in into sys.modules, where ComfyUI's modules would be."""
    types = ("Model", "Float", "Combo", "Conditioning", "Latent", "Image", "Mask", "Boolean", "String")
    io = SimpleNamespace(ComfyNode=object, Schema=Schema, NodeOutput=NodeOutput, Custom=io_type)
    vars(io).update({name: io_type() for name in types})
    ui = SimpleNamespace(PreviewText=lambda value: SimpleNamespace(as_dict=lambda: {"text": (value,)}))
    here = globals()
    contents = {
        "comfy.model_management": ["InterruptProcessingException"],
        "comfy.patcher_extension": ["WrappersMP"],
        "comfy.model_sampling": ["CONST", "EDM", "EPS", "V_PREDICTION", "X0", "ModelSamplingDiscrete"],
        "comfy.model_base": ["BaseModel", "ModelType"],
        "comfy.supported_models_base": ["BASE"],
        "comfy.model_patcher": ["ModelPatcher"],
        "comfy.sampler_helpers": ["convert_cond"],
        "comfy.samplers": ["CFGGuider", "calc_cond_batch"],
        "comfy.sample": ["sample"],
    }
    modules = {name: {one: here[one] for one in names} for name, names in contents.items()}
    modules |= {
        "comfy": {},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": ComfyExtension, "io": io, "ui": ui},
    }
    for name, content in modules.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(content)
        parent, _, own = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], own, module)
