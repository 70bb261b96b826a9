"""What generations are counted by: which are copies of training pictures, and which show their caption's concept."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from copies import fields, nearest, printed
from dataset import Caption, load_captions
from diffusers import AutoencoderKL
from label import COPY
from pictures import render, varied

POSES = 16  # of each drawing, in the gallery
POOL = 8  # pixels of a picture that the gallery takes the mean of, each way
NEAREST = 0.05  # of the concepts


class Data:
    """What prepare.py and train_vae.py wrote."""

    def __init__(self, folder: Path, vae: AutoencoderKL):
        self.captions = load_captions(folder / "captions.json")
        stored = np.load(folder / "pictures.npz")
        self.pictures, self.drawing, self.cover = (stored[name] for name in ("pictures", "drawing", "cover"))
        self.drawings = {name: np.asarray(icons) for name, icons in np.load(folder / "drawings.npz").items()}
        self._folder, self._vae = folder, vae

    @cached_property
    def fields(self) -> torch.Tensor:
        """The training pictures' fields, [N, D]; that takes a minute."""
        return printed(self._vae, np.load(self._folder / "latents.npy"))

    def replicated(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which pictures [S, 64, 64, 3] are copies, bool [S], and the training picture nearest to each."""
        similarity, picture = nearest(fields(pictures), self.fields)
        return (similarity >= COPY).numpy(), picture.numpy()

    def drawing_of(self, caption: Caption) -> int:
        """Return which of its concept's drawings a caption showed most often."""
        return int(self.drawing[max(caption.pictures, key=lambda pair: pair[1])[0]])


class Gallery:
    """Drawings of all concepts that the model was trained on, in random poses and on random backgrounds.

    The concept that a picture shows is that of the drawing it is most similar to, in small: at 8 × 8 pixels a drawing
    is more similar to itself in another pose than at 64 × 64.
    """

    def __init__(self, data: Data):
        names = dict.fromkeys(caption.concept for caption in data.captions if caption.pictures)
        self.concepts = list(names)
        rng, icons, of_concept, of_drawing, pictures = np.random.default_rng(7), [], [], [], []
        for place, name in enumerate(self.concepts):
            for drawing, icon in enumerate(data.drawings[name]):
                pictures += varied(rng, (len(icons),), POSES)
                icons.append(icon)
                of_concept += [place] * POSES
                of_drawing += [drawing] * POSES
        self._concept, self._drawing = torch.tensor(of_concept), torch.tensor(of_drawing)
        self._small = small(render(pictures, np.stack(icons))[0])

    def ranks(self, pictures: np.ndarray, concept: str, without: int | None = None) -> np.ndarray:
        """Return the share of concepts that pictures [S, 64, 64, 3] are nearer to than to `concept`, [S].

        `without` is the place of a drawing of the concept that is left out.
        """
        own = self.concepts.index(concept)
        similar = small(pictures) @ self._small.T
        if without is not None:
            similar = similar.masked_fill((self._concept == own) & (self._drawing == without), -1)
        best = torch.full((len(pictures), len(self.concepts)), -1.0)
        best.scatter_reduce_(1, self._concept.expand(len(pictures), -1), similar, "amax")
        return (best > best[:, own, None]).float().mean(1).numpy()

    def shows(self, pictures: np.ndarray, concept: str, without: int | None = None) -> np.ndarray:
        """Return which pictures [S, 64, 64, 3] show a concept, bool [S]; arguments as of `ranks`."""
        return self.ranks(pictures, concept, without) < NEAREST


def small(pictures: np.ndarray) -> torch.Tensor:
    """Return unit vectors [N, 3 · 8 · 8] of pictures uint8 [N, 64, 64, 3]: coarse, without the background's colour."""
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    border = torch.cat([values[:, :, 0], values[:, :, -1], values[:, :, :, 0], values[:, :, :, -1]], dim=2)
    coarse = F.avg_pool2d(values - border.median(2).values[:, :, None, None], POOL)
    return F.normalize(coarse.flatten(1))


@dataclass(frozen=True)
class Judged:
    """Of one caption's generations [S]: which are replicas, and which show the concept."""

    replica: np.ndarray
    concept: np.ndarray
    other_drawings: np.ndarray


def judge(data: Data, gallery: Gallery, caption: Caption, pictures: np.ndarray) -> Judged:
    return Judged(
        data.replicated(pictures)[0],
        gallery.shows(pictures, caption.concept),
        gallery.shows(pictures, caption.concept, data.drawing_of(caption)),
    )
