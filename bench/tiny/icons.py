"""Emoji drawings of the same concepts by several vendors, read from npm packages of SVG icon sets.

Several vendors draw the same concept, so that "seen often, always the same picture" and "seen as often, always
different" can be told apart.
"""

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

PACKAGES = {  # vendor -> npm package; licences and credits: ATTRIBUTION.md beside the embedded engine
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
RENDER_SIZE = 80  # a little over the pictures' size: poses resample it
SAME = 0.92  # correlation from which two drawings pass for one, so that their concepts can't be in different groups
# Names that are variations of one drawing (skin tones, clock hands), or text rather than a picture.
EXCLUDED = re.compile(
    r"skin-tone|-tone[0-9]|^flag|keycap|button|^letter|^digit|^[0-9]|^[a-z]$|oclock|o-clock|-thirty|family|kiss-|couple-with|-medium|-dark|-light$"
)


def fetch(package: str, folder: Path) -> dict:
    """Return the icon set (Iconify JSON) of an npm package, downloading it into `folder` on first use."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None, f"{archive.name} holds no icons.json"
        return json.load(member)


def icons_by_name(icon_set: dict) -> dict[str, dict]:
    """Return name -> icon, aliases that merely rename an icon included."""
    icons = dict(icon_set["icons"])
    for alias, entry in icon_set.get("aliases", {}).items():
        if set(entry) == {"parent"} and entry["parent"] in icons:
            icons[alias] = icons[entry["parent"]]
    return icons


def render(icon_set: dict, icon: dict) -> np.ndarray:
    """Return the icon as premultiplied RGBA, uint8 [80, 80, 4]."""
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" viewBox="{box}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE))
    image = Image.open(io.BytesIO(png)).convert("RGBA").resize((RENDER_SIZE, RENDER_SIZE))
    rgba = np.asarray(image).astype(np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return rgba.round().astype(np.uint8)


def load_concepts(folder: Path) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Return (concept -> its drawings, one per vendor that has it; all icon names, as text for the tokenizer)."""
    sets = {vendor: fetch(package, folder) for vendor, package in PACKAGES.items()}
    icons = {vendor: icons_by_name(icon_set) for vendor, icon_set in sets.items()}
    names = sorted({n for by_name in icons.values() for n in by_name if not EXCLUDED.search(n)})
    concepts = {}
    for name in names:
        drawings = [render(sets[v], icons[v][name]) for v in PACKAGES if name in icons[v]]
        drawings = [d for d in drawings if d[..., 3].mean() >= 8]  # blank: an SVG feature the renderer lacks
        if drawings:
            concepts[name] = drawings
    text = [n.replace("-", " ") for by_name in icons.values() for n in by_name if "skin-tone" not in n]
    return distinct(concepts), text


def distinct(concepts: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Return the concepts none of whose drawings looks like one of another's; of two alike, what more vendors draw.

    Vendors name the same drawing differently, and draw men, women and persons alike.
    """
    kept: dict[str, list[np.ndarray]] = {}
    seen = np.zeros((0, 3 * 20 * 20), np.float32)
    for name in sorted(concepts, key=lambda n: (-len(concepts[n]), len(n), n)):
        signs = np.stack([_signature(drawing) for drawing in concepts[name]])
        if not len(seen) or (signs @ seen.T).max() < SAME:
            kept[name] = concepts[name]
            seen = np.concatenate([seen, signs])
    return kept


def _signature(drawing: np.ndarray) -> np.ndarray:
    """Return the drawing on grey at 20 x 20, centred and of unit length: dot products are correlations."""
    rgb = drawing[..., :3] + (255.0 - drawing[..., 3:]) / 2
    small = rgb.reshape(20, RENDER_SIZE // 20, 20, RENDER_SIZE // 20, 3).mean((1, 3)) - rgb.mean((0, 1))
    return (small / max(np.linalg.norm(small), 1e-6)).ravel().astype(np.float32)
