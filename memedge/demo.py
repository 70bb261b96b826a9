"""`memedge demo`: a mixed list of prompts, and a picture of what the embedded model makes of some of them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from memedge.embedded import captions
from memedge.engine import atomic
from memedge.results import Verdict

SIDE = 32
ZOOM = 3
GENERATED = 4
TEXT = 330
GAP = 12
HEADINGS = ("training image", "what the model generates (4 seeds)", "prompt and verdict")


def prompts() -> list[str]:
    """Return the demo's prompts: captions the model has memorized, learnt and never seen, and the empty prompt."""
    return [*_strips(), ""]


def _strips() -> dict[str, Path]:
    """Return prompt → its strip of pictures, for the captions that have one."""
    return {caption.prompt: caption.strip for caption in captions() if caption.strip}


def draw(verdicts: Sequence[Verdict], path: Path) -> None:
    """Draw a row per prompt that has pictures: training image | generations | verdict; write a PNG to `path`."""
    pictures_of = _strips()
    rows = [(v, pictures_of[v.prompt]) for v in verdicts if v.prompt in pictures_of]
    tile, line = SIDE * ZOOM, SIDE * ZOOM + GAP
    columns = (GAP, tile + 2 * GAP, (1 + GENERATED) * tile + 3 * GAP)
    canvas = Image.new("RGB", (columns[2] + TEXT, line * len(rows) + 3 * GAP), "white")
    pen, font, bold = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(18)
    for x, heading in zip(columns, HEADINGS, strict=True):
        pen.text((x, GAP // 2), heading, fill="dimgray", font=font)
    for i, (verdict, strip) in enumerate(rows):
        y = 3 * GAP + i * line
        with Image.open(strip) as image:
            pictures = image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
        canvas.paste(pictures.crop((0, 0, tile, tile)), (columns[0], y))
        canvas.paste(pictures.crop((tile, 0, pictures.width, tile)), (columns[1], y))
        label, colour = ("MEMORIZED", "firebrick") if verdict.memorized else ("ok", "seagreen")
        pen.text((columns[2], y + 8), verdict.prompt, fill="black", font=font)
        pen.text((columns[2], y + 30), label, fill=colour, font=bold)
        reason = verdict.reason.replace("≥", ">=")  # Pillow's own font lacks the sign
        pen.text((columns[2], y + 56), reason, fill="dimgray", font=font)
    content = BytesIO()
    canvas.save(content, format="PNG", optimize=True)
    atomic.write(path, content.getvalue())
