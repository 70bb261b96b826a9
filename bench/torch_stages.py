"""The method in plain torch, as the ladder's lower rungs: what the released code evaluates, and what is needed of it.

Every stage is a callable, prompt -> (norm, alignment), for n = 1 and ε-prediction.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import fx
from transformers import AutoTokenizer, CLIPTextModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Stage = Callable[[str], tuple[float, float]]


class Torch:
    """A checkpoint, loaded as its users would for speed: bf16 in channels-last."""

    def __init__(self, folder: Path, precision: str):
        self.dtype = DTYPES[precision]
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=self.dtype).eval()
        if precision == "bf16":
            self.unet.to(memory_format=torch.channels_last)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=self.dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(50)
        self.timesteps = (int(scheduler.timesteps[0]), int(scheduler.timesteps[-3]))
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        self.sample = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(42)).to(self.dtype)

    def encode(self, *prompts: str) -> torch.Tensor:
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids)[0]

    @torch.no_grad()
    def stages(self) -> dict[str, Stage]:
        stages: dict[str, Stage] = {
            "published": lambda prompt: self.guided(prompt, 4),
            "minimal": lambda prompt: self.guided(prompt, 2),
            "cached": self.cached(),
            "prefix": self.prefix(),
        }
        return {name: torch.no_grad()(stage) for name, stage in stages.items()}

    def guided(self, prompt: str, calls: int) -> tuple[float, float]:
        """UNet calls on [unconditional, conditional]: the released code makes 4, the formulas need 2."""
        states = self.encode("", prompt)
        both = torch.cat([self.sample, self.sample])
        outputs = [self.unet(both, t, states, return_dict=False)[0].chunk(2) for t in self.timesteps]
        for t in self.timesteps * (calls // 2 - 1):
            self.unet(both, t, states, return_dict=False)
        return reduce([uncond for uncond, _ in outputs], [cond for _, cond in outputs])

    def cached(self) -> Stage:
        """The unconditional predictions, computed once; a call per timestep is left."""
        return self._with_cache(lambda states, t: self.unet(self.sample, t, states, return_dict=False)[0])

    def prefix(self) -> Stage:
        """And, of the conditional calls, only what depends on the prompt."""
        rest = {t: split(self.unet, self.sample, t, self.encode("")) for t in self.timesteps}
        return self._with_cache(lambda states, t: rest[t](states))

    def _with_cache(self, predict: Callable[[torch.Tensor, int], torch.Tensor]) -> Stage:
        empty = self.encode("")
        uncond = [predict(empty, t) for t in self.timesteps]

        def stage(prompt: str) -> tuple[float, float]:
            states = self.encode(prompt)
            return reduce(uncond, [predict(states, t) for t in self.timesteps])

        return stage


def reduce(uncond: list[torch.Tensor], cond: list[torch.Tensor]) -> tuple[float, float]:
    (first, second), (cond_first, cond_second) = uncond, cond
    norm = (cond_first - first).float().flatten(1).norm(dim=1).mean()
    delta = (cond_second - second).float()
    return norm.item(), F.cosine_similarity(second.float(), delta, dim=1).mean().item()


class _Call(torch.nn.Module):
    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, timestep, states, return_dict=False)[0]


class _Recorder(fx.Interpreter):
    """Runs a graph and remembers the values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]):
        super().__init__(module, garbage_collect_values=False)
        self.wanted, self.found = wanted, {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.wanted:
            self.found[node] = value
        return value


def split(
    unet: Any, sample: torch.Tensor, timestep: int, states: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return states -> prediction, with all that doesn't depend on the states computed beforehand."""
    inputs = (sample, torch.tensor([timestep]), states)
    module = torch.export.export(_Call(unet), inputs).module()
    graph = module.graph
    start = [node for node in graph.nodes if node.op == "placeholder"][-1]
    dependent = {start}
    for node in graph.nodes:
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    frontier = {s for node in dependent for s in node.all_input_nodes if s not in dependent and s.op != "get_attr"}
    recorder = _Recorder(module, frontier)
    recorder.run(*inputs)
    rest = fx.Graph()
    copied = {start: rest.placeholder("states")}
    for number, node in enumerate(graph.nodes):
        if node.op == "output":
            rest.output(copied[node.all_input_nodes[0]])
        elif node in frontier:
            setattr(module, f"cached_{number}", recorder.found[node])
            copied[node] = rest.get_attr(f"cached_{number}")
        elif (node in dependent and node is not start) or (node.op == "get_attr" and dependent & set(node.users)):
            copied[node] = rest.node_copy(node, copied.__getitem__)
    return fx.GraphModule(module, rest)
