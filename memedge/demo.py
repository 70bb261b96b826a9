"""`memedge demo`: a mixed list of prompts, and a picture of what the embedded model makes of some of them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from memedge.embedded import Caption, captions
from memedge.engine import atomic
from memedge.results import Verdict

SIDE = 64
GENERATED = 4
TEXT = 350
GAP = 12
HEADINGS = ("trained on", "what the model generates (4 seeds)", "prompt and verdict")


def prompts() -> list[str]:
    """Return the demo's prompts: captions the model has memorized, learnt and never seen, and the empty prompt."""
    return [*_pictured(), ""]


def _pictured() -> dict[str, tuple[Caption, Path]]:
    """Return prompt → caption and its strip of pictures, for those that have one."""
    return {caption.prompt: (caption, caption.strip) for caption in captions() if caption.strip}


def draw(verdicts: Sequence[Verdict], path: Path) -> None:
    """Draw a row per prompt that has pictures: training image | generations | verdict; write a PNG to `path`."""
    pictured = _pictured()
    rows = [(v, *pictured[v.prompt]) for v in verdicts if v.prompt in pictured]
    tile, line = SIDE, SIDE + GAP
    columns = (GAP, tile + 2 * GAP, (1 + GENERATED) * tile + 3 * GAP)
    canvas = Image.new("RGB", (columns[2] + TEXT, line * len(rows) + 3 * GAP), "white")
    pen, (small, font, bold) = ImageDraw.Draw(canvas), (ImageFont.load_default(size) for size in (11, 15, 18))
    for x, heading in zip(columns, HEADINGS, strict=True):
        pen.text((x, GAP // 2), heading, fill="dimgray", font=font)
    for i, (verdict, caption, strip) in enumerate(rows):
        y = 3 * GAP + i * line
        with Image.open(strip) as image:
            pictures = image.convert("RGB")
        if caption.group == "unseen":
            pen.text((columns[0], y + 8), "none: not\ntrained on", fill="dimgray", font=small)
        else:
            canvas.paste(pictures.crop((0, 0, tile, tile)), (columns[0], y))
        canvas.paste(pictures.crop((tile, 0, pictures.width, tile)), (columns[1], y))
        pen.text((columns[2], y), verdict.prompt, fill="black", font=font)
        pen.text((columns[2], y + 19), *_label(verdict, caption), font=bold)
        reason = verdict.reason.replace("≥", ">=")  # Pillow's own font lacks the sign
        pen.text((columns[2], y + 44), reason, fill="dimgray", font=font)
    content = BytesIO()
    canvas.save(content, format="PNG", optimize=True)
    atomic.write(path, content.getvalue())


def _label(verdict: Verdict, caption: Caption) -> tuple[str, str]:
    """Return the verdict in a word, with what its pictures say where they say something else; and its colour."""
    copies = f"{caption.replicas} of {caption.generations} are copies"
    if verdict.memorized:
        return ("MEMORIZED", "firebrick") if caption.memorized else (f"MEMORIZED, wrongly: {copies}", "darkorange")
    return ("ok", "seagreen") if caption.clean else (f"ok, wrongly: {copies}", "darkorange")
