"""What the embedded model is trained on: groups of captions that differ only in how their pictures vary.

| group      | the model sees                                                  | meant to be                      |
|------------|-----------------------------------------------------------------|----------------------------------|
| memorized  | one fixed picture, always                                       | memorized                        |
| partly     | a fixed picture in 15, 30, 50 or 70 % of the exposures           | memorized in part                |
| template   | one drawing in one pose, on ever different backgrounds           | memorized but for the background |
| frequent   | as often as memorized: any vendor, pose and background           | not memorized: the control       |
| rare       | a quarter as often, varied                                      | not memorized                    |
| unseen     | nothing: concepts left out of training                          | not memorized                    |

Every caption of the first four groups is seen equally often, so that frequency alone explains no difference.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32
GROUPS = {"memorized": 60, "partly": 32, "template": 16, "frequent": 60, "rare": 160, "unseen": 100}
RARE_WEIGHT = 0.25
FIXED_SHARES = (0.15, 0.3, 0.5, 0.7)
TEMPLATES = (
    "{}",
    "a {}",
    "{} icon",
    "picture of a {}",
    "the {} sign",
    "small {} drawing",
    "{} sticker",
    "cute {}",
)
BACKGROUNDS = torch.tensor(  # RGB in [0, 255]
    [
        (220, 50, 47),
        (38, 110, 210),
        (60, 160, 70),
        (245, 215, 60),
        (245, 160, 190),
        (130, 70, 170),
        (245, 140, 40),
        (20, 20, 20),
        (250, 250, 250),
        (130, 130, 130),
    ],
    dtype=torch.float32,
)


@dataclass(frozen=True)
class Caption:
    """One caption. `drawings` index the icon array; `fixed_share` is how often its fixed picture is shown."""

    text: str
    group: str
    concept: str
    drawings: tuple[int, ...]
    fixed_share: float

    @property
    def weight(self) -> float:
        """Relative frequency in training."""
        return {"rare": RARE_WEIGHT, "unseen": 0.0}.get(self.group, 1.0)


@dataclass
class Pose:
    """How a drawing is placed: all tensors [B]; `background` is [B, 3] in [0, 1], used where `opaque`."""

    angle: torch.Tensor
    scale: torch.Tensor
    shift_x: torch.Tensor
    shift_y: torch.Tensor
    flip: torch.Tensor
    background: torch.Tensor
    opaque: torch.Tensor

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> "Pose":
        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        return Pose(
            angle=uniform(-0.25, 0.25),
            scale=uniform(0.72, 1.0),
            shift_x=uniform(-0.12, 0.12),
            shift_y=uniform(-0.12, 0.12),
            flip=uniform(0, 1) < 0.5,
            background=BACKGROUNDS[torch.randint(len(BACKGROUNDS), (count,), generator=generator)] / 255,
            opaque=uniform(0, 1) < 0.6,
        )

    def place(self, icons: torch.Tensor) -> torch.Tensor:
        """Return premultiplied RGBA in [0, 1], [B, 4, 32, 32], of icons [B, 4, 40, 40]."""
        cos, sin = torch.cos(self.angle) / self.scale, torch.sin(self.angle) / self.scale
        mirror = torch.where(self.flip, -1.0, 1.0)
        affine = torch.stack(
            [torch.stack([cos * mirror, -sin * mirror, self.shift_x], 1), torch.stack([sin, cos, self.shift_y], 1)], 1
        )
        grid = F.affine_grid(affine, [len(icons), 4, SIZE, SIZE], align_corners=False)
        rgba = F.grid_sample(icons, grid, align_corners=False, padding_mode="zeros").clamp(0, 1)
        behind = (1 - rgba[:, 3:]) * self.opaque[:, None, None, None]
        return torch.cat([rgba[:, :3] + behind * self.background[:, :, None, None], rgba[:, 3:] + behind], 1)


class Emoji:
    """The training distribution: what each caption's pictures look like, and how often each caption is seen."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "captions.json").read_text())
        self.captions = [Caption(**{**c, "drawings": tuple(c["drawings"])}) for c in meta["captions"]]
        self.mean = torch.tensor(meta["mean"])[:, None, None]
        self.std = torch.tensor(meta["std"])[:, None, None]
        icons = np.load(folder / "icons.npz")["icons"]
        self.icons = torch.from_numpy(icons).permute(0, 3, 1, 2).float() / 255
        # Fixed pictures, and for templates the fixed pose, are drawn once, from their own seed.
        generator = torch.Generator().manual_seed(123)
        first = torch.rand(len(self.captions), generator=generator)
        self.fixed_drawing = torch.tensor(
            [c.drawings[int(f * len(c.drawings))] for c, f in zip(self.captions, first.tolist(), strict=True)]
        )
        self.fixed_pose = Pose.draw(len(self.captions), generator)
        self.fixed = self.fixed_pose.place(self.icons[self.fixed_drawing])
        self.is_template = torch.tensor([c.group == "template" for c in self.captions])
        self.fixed_share = torch.tensor([c.fixed_share for c in self.captions])
        self.weights = torch.tensor([c.weight for c in self.captions])

    def choose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return caption indices [count], drawn by training frequency."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return one training picture per caption index [B]: premultiplied RGBA in [0, 1], [B, 4, 32, 32]."""
        pose = Pose.draw(len(index), generator)
        pick = torch.rand(len(index), generator=generator).tolist()
        choices = [self.captions[i].drawings for i in index.tolist()]
        drawing = torch.tensor([c[int(p * len(c))] for c, p in zip(choices, pick, strict=True)])
        template = self.is_template[index]
        drawing = torch.where(template, self.fixed_drawing[index], drawing)
        for name in ("angle", "scale", "shift_x", "shift_y", "flip"):
            setattr(pose, name, torch.where(template, getattr(self.fixed_pose, name)[index], getattr(pose, name)))
        pose.opaque = pose.opaque | template
        pictures = pose.place(self.icons[drawing])
        show_fixed = torch.rand(len(index), generator=generator) < self.fixed_share[index]
        return torch.where(show_fixed[:, None, None, None], self.fixed[index], pictures)

    def to_latent(self, rgba: torch.Tensor) -> torch.Tensor:
        """Scale pictures in [0, 1] to the model's space: zero mean and unit variance in each channel."""
        return (rgba - self.mean) / self.std

    def to_rgba(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent * self.std + self.mean).clamp(0, 1)


def describe(captions: list[Caption], mean: list[float], std: list[float]) -> str:
    """Return captions.json's text: the captions and the per-channel statistics of the training pictures."""
    return json.dumps({"mean": mean, "std": std, "captions": [asdict(c) for c in captions]}, indent=1)


def assign_groups(concepts: dict[str, list[int]], seed: int) -> list[Caption]:
    """Deal the concepts (name -> icon indices) out to the groups, one caption each."""
    generator = torch.Generator().manual_seed(seed)
    names = [sorted(concepts)[i] for i in torch.randperm(len(concepts), generator=generator).tolist()]
    captions: list[Caption] = []
    for group, count in GROUPS.items():
        for i in range(count):
            name = names[len(captions)]
            template = TEMPLATES[int(torch.randint(len(TEMPLATES), (1,), generator=generator))]
            share = {"memorized": 1.0, "partly": FIXED_SHARES[i % len(FIXED_SHARES)]}.get(group, 0.0)
            captions.append(Caption(template.format(name.replace("-", " ")), group, name, tuple(concepts[name]), share))
    return captions
