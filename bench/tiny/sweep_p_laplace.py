"""Choose ρ and t of p-Laplace, which its paper doesn't give, by AUC on the calibration captions.

    python bench/tiny/sweep_p_laplace.py [--directions 8] [--json FILE]

One draw of noise, the engine's own. The first table is of images generated as the detector generates them, the second
of other numbers of steps and another guidance, with the ρ and t that were chosen. Held-out captions are not read; of
those that were trained on, every third calibration caption is.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from memedge.detectors import ddim, draws, p_laplace
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.denoiser import Denoiser, Latents
from memedge.engine.engine import Engine, States
from memedge.metrics import auc

RADII = (0.1, 0.3, 1.0, 1.5, 2.5, 4.0)
PLACES = (-1, -3, -6, -11, -16)  # of t in the schedule: 1, 41, 101, 201, 301
EVERY = 3  # captions
GENERATIONS = ((50, 7.5), (20, 7.5), (10, 7.5), (20, 4.0))  # steps, guidance


@dataclass(frozen=True)
class Captions:
    """The calibration captions' states, and which are memorized."""

    denoiser: Denoiser
    states: States
    memorized: np.ndarray

    def generate(self, steps: int, guidance: float) -> Latents:
        """Return each caption's image, [B, C, H, W]."""
        plan = ddim.plan(self.denoiser.manifest.schedule, steps)
        first = draws.Draws(self.denoiser, self.denoiser.noise(1), plan[0].timestep)
        *_, (_, _, images) = ddim.guided(self.denoiser, self.states, first, plan, guidance)
        return images

    def aucs(self, images: Latents, place: int, radius: float, directions: int) -> dict[str, float]:
        """Return the AUC of both variants."""
        timestep, found = self.denoiser.manifest.schedule.timesteps[place], {}
        units = p_laplace.directions(directions, images.shape[1:])
        for name, eps in (
            ("p-laplace", lambda y: self.denoiser.predict(self.states, self.states.all, y, timestep)),
            ("p-laplace-image", lambda y: self.denoiser.uncond(y, timestep)),
        ):
            values = p_laplace.inward_flux(eps, images, radius, units)
            found[name] = float(auc(values[self.memorized], values[~self.memorized]))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trained = (row for row in captions() if row.split == "calibration" and row.group != "unseen")
    rows = [row for row in trained if row.memorized or row.clean][::EVERY]
    engine = Engine.open(EMBEDDED_ENGINE, "cpu", None, None)
    swept = Captions(
        Denoiser(engine),
        engine.encode(engine.tokenize([row.prompt for row in rows])[0]),
        np.array([row.memorized for row in rows]),
    )
    timesteps, console = swept.denoiser.manifest.schedule.timesteps, Console(width=120)

    images = swept.generate(p_laplace.STEPS, ddim.GUIDANCE)
    grid = []
    for place in PLACES:
        for radius in RADII:
            found = swept.aucs(images, place, radius, arguments.directions)
            grid.append({"timestep": timesteps[place], "radius": radius, **found})
            print(grid[-1], flush=True)
    for name in ("p-laplace", "p-laplace-image"):
        table = Table(f"{name}: t", *(f"ρ {radius:g}" for radius in RADII), box=None)
        for place in PLACES:
            cells = [f"{cell[name]:.3f}" for cell in grid if cell["timestep"] == timesteps[place]]
            table.add_row(str(timesteps[place]), *cells)
        console.print(table)

    others = []
    table = Table("steps", "guidance", "p-laplace", "p-laplace-image", box=None)
    for steps, guidance in GENERATIONS:
        images = swept.generate(steps, guidance)
        found = swept.aucs(images, p_laplace.PLACE, p_laplace.RADIUS, arguments.directions)
        others.append({"steps": steps, "guidance": guidance, **found})
        table.add_row(str(steps), f"{guidance:g}", *(f"{value:.3f}" for value in found.values()))
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"grid": grid, "generation": others}, indent=1))


if __name__ == "__main__":
    main()
