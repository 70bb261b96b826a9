"""The journal of an audit: each picture's result, which survives a kill at any moment."""

import io
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image

from memedge.audit.figures import AuditedImage
from memedge.audit.picture import Found
from memedge.autograd.diffusion_model import Pictures
from memedge.scoring.journal import JobFile

THUMBNAIL = 128  # pixels a side, at most
_HEADER = {
    "format": "version of memedge",
    "checkpoint": "checkpoint",
    "pairs": "list of pictures or captions",
    "settings": "choice of options",
    "similarity": "measure of similarity",
    "processes": "number of processes",
}
_TABLE = "CREATE TABLE results (image PRIMARY KEY, result NOT NULL, strip NOT NULL, embedding NOT NULL) WITHOUT ROWID"


class AuditJournal(JobFile):
    """Results, pictures to look at, and embeddings."""

    def __init__(self, path: Path, header: dict[str, str], resume: bool):
        """Open the journal at `path`, or make it where there is none; raises as JobFile."""
        super().__init__(path, {"format": "1", **header}, _HEADER, _TABLE, resume)

    def __contains__(self, image: str) -> bool:
        return self.find("SELECT 1 FROM results WHERE image = ?", image) is not None

    def put(self, found: Found, picture: Pictures) -> None:
        """Commit a picture's result, with the picture itself [S, S, 3]."""
        embedding = io.BytesIO()
        np.save(embedding, found.embedding.numpy(), allow_pickle=False)
        row = found.image.image, msgspec.json.encode(found.image), _strip(found, picture), embedding.getvalue()
        self.insert("INSERT INTO results VALUES (?, ?, ?, ?)", [row])

    def get(self, image: str) -> tuple[AuditedImage, bytes, torch.Tensor]:
        """Return a result, its strip as PNG, and the embedding [L, D]."""
        row = self.find("SELECT result, strip, embedding FROM results WHERE image = ?", image)
        assert row is not None
        embedding = torch.from_numpy(np.load(io.BytesIO(row[2]), allow_pickle=False))
        return msgspec.json.decode(row[0], type=AuditedImage), row[1], embedding


def _strip(found: Found, picture: Pictures) -> bytes:
    """Return a PNG: the picture | generations of its caption, if it has one | of the best embedding. Gaps are white."""
    parts = [part for part in (picture[None], found.by_prompt, found.by_audit) if part is not None]
    side = min(THUMBNAIL, picture.shape[0])
    gap = side // 8
    strip = Image.new("RGB", (sum(map(len, parts)) * side + (len(parts) - 1) * gap, side), "white")
    left = 0
    for part in parts:
        for one in part:
            strip.paste(Image.fromarray(one).resize((side, side), Image.Resampling.BOX), (left, 0))
            left += side
        left += gap
    stream = io.BytesIO()
    strip.save(stream, "png")
    return stream.getvalue()
