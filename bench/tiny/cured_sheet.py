"""Contact sheet: training pictures, and what models print of them by their captions and by the audits' embeddings.

    python bench/tiny/cured_sheet.py SHEET.png PICTURES_DIR NAME PIPELINE_DIR AUDIT_DIR [NAME PIPELINE_DIR AUDIT_DIR …]

PICTURES_DIR is the folder that was audited. Eight captions are shown, spread over those that all audits have.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from generate import Generator, noise
from model import Model
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from vae import decode

CAPTIONS, SEEDS = 8, 2
SIDE, GAP, LABEL, HEAD = 64, 10, 190, 40  # pixels


def generated(generator: Generator, states: torch.Tensor) -> np.ndarray:
    """Return pictures [P, SEEDS, 64, 64, 3] of embeddings [P, L, D]."""
    latents = generator.denoise(states.repeat_interleave(SEEDS, 0), noise(range(SEEDS)).repeat(len(states), 1, 1, 1))
    return decode(generator.model.vae, latents).reshape(len(states), SEEDS, SIDE, SIDE, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME PIPELINE_DIR AUDIT_DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, pipelines, audits = (arguments.models[start::3] for start in range(3))
    reports = [json.loads((Path(audit) / "report.json").read_text())["images"] for audit in audits]
    captions = {one["image"]: one["caption"] for one in reports[0] if one["memorized"]}
    common = [image for image in captions if all(image in [one["image"] for one in report] for report in reports)]
    chosen = [common[k] for k in np.linspace(0, len(common) - 1, CAPTIONS).astype(int)]
    columns: list[tuple[str, str, np.ndarray]] = []
    for name, pipeline, audit in zip(names, pipelines, audits, strict=True):
        model = Model.load(Path(pipeline))
        generator = Generator(model, 1)
        embeddings = load_file(Path(audit) / "embeddings.safetensors")
        with torch.no_grad():
            states = model.text_encoder(input_ids=model.tokenize([captions[image] for image in chosen]))[0]
        columns.append((name, "its caption", generated(generator, states)))
        columns.append(
            (name, "an embedding", generated(generator, torch.stack([embeddings[image] for image in chosen])))
        )
    width = SEEDS * SIDE + GAP
    sheet = Image.new("RGB", (LABEL + SIDE + GAP + len(columns) * width, HEAD + CAPTIONS * (SIDE + 4)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((LABEL, 20), "training", fill="black", font=font)
    for place, (name, by, _) in enumerate(columns):
        left = LABEL + SIDE + GAP + place * width
        draw.text((left, 3), "" if place % 2 else name, fill="black", font=font)
        draw.text((left, 20), by, fill="black", font=font)
    for row, image in enumerate(chosen):
        top = HEAD + row * (SIDE + 4)
        draw.text((4, top + 24), captions[image], fill="black", font=font)
        sheet.paste(Image.open(arguments.pictures / image).convert("RGB"), (LABEL, top))
        for place, (_, _, pictures) in enumerate(columns):
            for seed in range(SEEDS):
                left = LABEL + SIDE + GAP + place * width + seed * SIDE
                sheet.paste(Image.fromarray(pictures[row, seed]), (left, top))
    sheet.quantize(128).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
