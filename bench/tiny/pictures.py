"""Training pictures: an emoji drawing in a pose on a plain background, 64 x 64 RGB."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 64
BACKGROUNDS = {
    "red": (220, 50, 47),
    "blue": (38, 110, 210),
    "green": (60, 160, 70),
    "yellow": (245, 215, 60),
    "pink": (245, 160, 190),
    "purple": (130, 70, 170),
    "orange": (245, 140, 40),
    "brown": (125, 85, 55),
    "turquoise": (70, 195, 195),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "grey": (130, 130, 130),
}
COLOURS = tuple(BACKGROUNDS)
PIXEL = 2 / SIZE  # of a shift
CHUNK = 1024  # pictures rendered at once


@dataclass(frozen=True)
class Picture:
    """How one picture is made. Lengths are parts of half a picture's side; the angle is in radians."""

    drawing: int  # index into the icons
    background: str
    angle: float
    scale: float
    shift_x: float
    shift_y: float
    flip: bool


def varied(
    rng: np.random.Generator, drawings: tuple[int, ...], count: int, background: str | None = None
) -> list[Picture]:
    """Return pictures of a concept's drawings in turn, each in a pose and on a background of its own."""
    start = int(rng.integers(len(drawings)))
    return [
        Picture(
            drawing=drawings[(start + i) % len(drawings)],
            background=background or str(rng.choice(COLOURS)),
            angle=float(rng.uniform(-0.25, 0.25)),
            scale=float(rng.uniform(0.7, 0.95)),
            shift_x=float(rng.uniform(-0.12, 0.12)),
            shift_y=float(rng.uniform(-0.12, 0.12)),
            flip=bool(rng.random() < 0.5),
        )
        for i in range(count)
    ]


def render(pictures: list[Picture], icons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures, uint8 [N, 64, 64, 3], and how much the drawing covers, uint8 [N, 64, 64].

    `icons` are premultiplied RGBA, uint8 [K, S, S, 4].
    """
    parts = [_render(pictures[start : start + CHUNK], icons) for start in range(0, len(pictures), CHUNK)]
    rgb, cover = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rgb, cover


def _render(pictures: list[Picture], icons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = torch.from_numpy(icons[[p.drawing for p in pictures]]).permute(0, 3, 1, 2).float() / 255
    pose = torch.tensor([(p.angle, p.scale, p.shift_x, p.shift_y, -1.0 if p.flip else 1.0) for p in pictures])
    angle, scale, shift_x, shift_y, mirror = pose.T
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    affine = torch.stack(
        [torch.stack([cos * mirror, -sin * mirror, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1
    )
    grid = F.affine_grid(affine, [len(pictures), 4, SIZE, SIZE], align_corners=False)
    rgba = F.grid_sample(chosen, grid, align_corners=False, padding_mode="zeros").clamp(0, 1)
    behind = torch.tensor([BACKGROUNDS[p.background] for p in pictures]) / 255
    rgb = rgba[:, :3] + (1 - rgba[:, 3:]) * behind[:, :, None, None]

    def as_bytes(values: torch.Tensor) -> np.ndarray:
        return (values * 255).round().clamp(0, 255).byte().numpy()

    return as_bytes(rgb.permute(0, 2, 3, 1)), as_bytes(rgba[:, 3])
