"""The contact sheet of an audit: each picture, and what its caption and the embedding that was found print."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from memedge.audit.figures import Audit
from memedge.audit.words import outcome
from memedge.plain import plain

MOST = 60  # pictures shown
LABEL, GAP, HEAD, SIZE = 260, 8, 26, 13  # pixels
WRAP = 38  # characters
COLUMNS = "training picture | generations of its caption | of the best embedding found"


def sheet(found: Audit, strips: Sequence[bytes]) -> Image.Image:
    """Return the sheet of the first MOST pictures; `strips` are PNGs, as many as pictures."""
    pictures = [Image.open(io.BytesIO(strip)).convert("RGB") for strip in strips[:MOST]]
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    row = max(height, 4 * (SIZE + 3)) + GAP
    drawn = Image.new("RGB", (LABEL + width + 2 * GAP, HEAD + row * len(pictures)), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(SIZE)
    draw.text((LABEL, 5), COLUMNS, fill="black", font=font)
    for place, (image, picture) in enumerate(zip(found.images, pictures, strict=False)):
        top = HEAD + place * row
        drawn.paste(picture, (LABEL, top))
        name = plain(image.caption or image.image)
        # The font that comes with PIL knows Latin letters alone.
        name = name.encode("latin-1", "replace").decode("latin-1")
        lines = [*textwrap.wrap(name, WRAP)[:2], *textwrap.wrap(outcome(image), WRAP)]
        draw.text((GAP, top), "\n".join(lines), fill="#b34f00" if image.by_audit else "black", font=font)
    return drawn
