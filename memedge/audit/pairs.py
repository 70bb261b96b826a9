"""Training pictures and their captions: a folder, and a file that says which picture has which caption."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from memedge.autograd.diffusion_model import Pictures
from memedge.engine.errors import InputError, shown
from memedge.prompts.columns import Columns, listed
from memedge.prompts.files import PromptFile, read_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_NAMES = ("image", "file_name")  # the second is that of Hugging Face's image folders
OPAQUE = ("1", "L", "P", "RGB")
TRANSPARENT = ("LA", "PA", "RGBA")
LABELS = {"true": True, "false": False, "1": True, "0": False, "": None}


@dataclass(frozen=True)
class Pair:
    """A training picture.

    Attributes:
        name: the picture's file, relative to the folder.
        path: where it is.
        caption: its caption; None: unknown.
        memorized: whether it is known to be memorized; None: unknown.
    """

    name: str
    path: Path
    caption: str | None = None
    memorized: bool | None = None


def read_pairs(images: Path, captions: Path | None = None) -> list[Pair]:
    """Return the pictures of a folder, in the order of their names, or of the file.

    Args:
        images: the folder.
        captions: a .csv, .tsv, .jsonl or .parquet file with the columns `image` (or `file_name`), the caption
            (prompt, caption or text; an empty one is unknown) and, if it is known, `memorized` (true or false). Only
            its pictures count. None: all pictures of the folder, without captions.

    Raises:
        InputError: there is no such folder, or no picture in it; the file cannot be read, lacks a column, or names a
            picture twice, or one that is not there.
    """
    if not images.is_dir():
        raise InputError(f"{images} is no folder: name the one that holds the training pictures.")
    if captions is None:
        found = [Pair(path.name, path) for path in sorted(images.iterdir()) if path.suffix.lower() in SUFFIXES]
        if not found:
            raise InputError(f"{images} holds no pictures ({', '.join(SUFFIXES)}): name the folder that does.")
        return found
    pairs: dict[str, Pair] = {}
    missing: list[str] = []
    for pair in _rows(images, captions):
        if pair.name in pairs:
            raise InputError(f"{captions} names {shown(pair.name)!r} twice: name each picture once.")
        pairs[pair.name] = pair
        if not pair.path.is_file():
            missing.append(pair.name)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(pairs)} pictures in {captions} are not in {images}, such as "
            f"{shown(missing[0])!r}: correct the names, or remove the rows."
        )
    if not pairs:
        raise InputError(f"{captions} has no rows: put at least one in it.")
    return list(pairs.values())


def unlisted(images: Path, pairs: list[Pair]) -> int:
    """Return how many pictures of the folder are in no pair."""
    known = {pair.name for pair in pairs}
    return sum(path.suffix.lower() in SUFFIXES and path.name not in known for path in images.iterdir())


def read_all(pairs: Iterable[Pair], side: int) -> tuple[str, int]:
    """Read every picture once; return a SHA-256 over all, and how many are of another size.

    Raises:
        InputError: as load_picture.
    """
    digest, others = hashlib.sha256(), 0
    for pair in pairs:
        picture, changed = load_picture(pair, side)
        others += changed
        digest.update(f"{pair.name}\n{pair.caption}\n{pair.memorized}\n".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest(), others


def load_picture(pair: Pair, side: int) -> tuple[Pictures, bool]:
    """Return a picture as a training script sees it, uint8 [side, side, 3], and whether it was of another size.

    Others are scaled until they cover it, and cut about their centre, as diffusers' script does.

    Raises:
        InputError: a file is no picture, or is transparent, or of a mode that has no one way to RGB (CMYK, 16 bit).
    """
    path = pair.path
    try:
        with Image.open(path) as opened:
            opened.load()
            picture: Image.Image = opened
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture, or damaged"
        raise InputError(f"{path} cannot be read ({reason}): replace it, or leave it out.") from None
    if picture.mode in TRANSPARENT or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            raise InputError(f"{path} is transparent: put it on the background that it was trained with.")
    elif picture.mode not in OPAQUE:
        raise InputError(f"{path} is of mode {picture.mode}, not RGB: convert it as it was for the training.")
    changed = picture.size != (side, side)
    if changed:
        width, height = picture.size
        scale = side / min(width, height)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        picture = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return np.array(picture.convert("RGB")), changed  # a copy, which torch may write to


def _rows(images: Path, captions: Path) -> Iterator[Pair]:
    file = PromptFile.at(captions)
    if file.kind.format == "txt":
        raise InputError(f"{captions} has no columns: give a .csv, .tsv, .jsonl or .parquet with image and caption.")
    for row in read_rows(file, Columns(kept=None)):
        column = next((name for name in IMAGE_NAMES if name in row.kept), None)
        if column is None:
            raise InputError(f"{captions} has no column 'image' or 'file_name', only {listed(row.kept)}: add one.")
        name, known = row.kept[column], row.kept.get("memorized")
        if not isinstance(name, str) or not name:
            raise InputError(f"{captions} has a row without a picture's name in {column!r}: fill it in, or remove it.")
        label = "" if known is None else str(known).strip().lower()
        if label not in LABELS:
            raise InputError(
                f"{captions} has {shown(str(known))!r} in its column 'memorized': write true, false, or nothing."
            )
        yield Pair(name, images / name, row.prompt or None, LABELS[label])
