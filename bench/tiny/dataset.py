"""What the embedded model is trained on: captions in groups that differ in how often they show how many pictures.

| group     | a caption shows                                                            | meant to be                |
|-----------|----------------------------------------------------------------------------|----------------------------|
| memorized | one picture, as often as a power law says                                  | memorized, or in part      |
| near      | one picture and near-duplicates of it; three captions show the same        | memorized                  |
| template  | one drawing in one pose, on twelve backgrounds                             | memorized but for these    |
| partly    | one picture in 30, 50 or 70 % of its exposures, twelve others in the rest   | memorized in part          |
| frequent  | forty pictures, as often as the typical memorized caption; two captions do | not memorized: the control |
| seen      | thirty-two pictures, or those of them on one background; a quarter as often | not memorized              |
| unseen    | nothing: concepts left out of training                                     | not memorized              |

A concept is in one group alone, and there in one split alone.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pictures import COLOURS, PIXEL, Picture, varied

CONCEPTS = {"memorized": 420, "near": 90, "template": 70, "partly": 200, "frequent": 150, "seen": 250, "unseen": 100}
VARIED = ("frequent", "seen", "partly")  # need several vendors, so they choose first
MIN_VENDORS = 4  # of those
# What README shows: concept -> (group, place in it, its first caption's template). Both are held out, and the place of
# the first gives it many exposures.
PLACED = {"left-luggage": ("memorized", 281, "the {} sign"), "bicycle": ("seen", 249, "a {}")}
CALIBRATION_SHARE = 0.4

# Exposures of a caption; 1.8 million in all.
LEAST, MOST, EXPONENT = 700, 5000, 1.8  # of memorized captions: the share of those seen more than n times is a power
TYPICAL = 1000  # the median of memorized captions
TEMPLATE = 1400
PARTLY = 1300
SEEN = TYPICAL // 4

FIXED_SHARES = (0.3, 0.5, 0.7)
ORIGINAL_SHARE = 0.4  # of a caption's exposures that show the picture itself, the rest its near-duplicates
MANY, SOME, FEW = 40, 32, 12  # pictures of a frequent, a seen and a partly memorized concept
ON_COLOUR = 6  # pictures of a seen concept that a caption with a background shows
UNSEEN_CAPTIONS = 32
TEMPLATES = (
    "{}",
    "a {}",
    "{} icon",
    "picture of a {}",
    "the {} sign",
    "small {} drawing",
    "{} sticker",
    "cute {}",
)
ON_BACKGROUND = "{} on a {} background"


@dataclass(frozen=True)
class Caption:
    """One caption; `pictures` are pairs of a picture's id and how often the caption shows it in training."""

    text: str
    group: str
    concept: str
    split: str  # calibration or held-out
    pictures: tuple[tuple[int, int], ...]

    @property
    def exposures(self) -> int:
        return sum(count for _, count in self.pictures)


def save_captions(path: Path, captions: list[Caption]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(caption)) for caption in captions) + "\n]\n")


def load_captions(path: Path) -> list[Caption]:
    return [
        Caption(**{**fields, "pictures": tuple((i, n) for i, n in fields["pictures"])})
        for fields in json.loads(path.read_text())
    ]


def plan(
    concepts: dict[str, list[int]], seed: int, counts: dict[str, int] = CONCEPTS
) -> tuple[list[Picture], list[Caption]]:
    """Deal concepts (name -> icon indices) out to groups; return pictures, whose ids are their places, and captions."""
    rng = np.random.default_rng(seed)
    pictures: list[Picture] = []
    captions: list[Caption] = []
    for group, names in deal(concepts, rng, counts).items():
        for place, name in enumerate(names):
            split = "calibration" if place < CALIBRATION_SHARE * len(names) else "held-out"
            shown, exposures = show(group, rng, tuple(concepts[name]), place)
            texts = _texts(rng, name, [colour for colour, _ in exposures])
            for text, (_, times) in zip(texts, exposures, strict=True):
                pairs = tuple((len(pictures) + i, n) for i, n in enumerate(times) if n)
                captions.append(Caption(text, group, name, split, pairs))
            pictures += shown
    return pictures, captions


def deal(concepts: dict[str, list[int]], rng: np.random.Generator, counts: dict[str, int]) -> dict[str, list[str]]:
    """Return group -> its concepts, those that are to be calibrated on first."""
    names = [sorted(concepts)[i] for i in rng.permutation(len(concepts)) if sorted(concepts)[i] not in PLACED]
    many = [name for name in names if len(concepts[name]) >= MIN_VENDORS]
    dealt = {}
    for group in (*VARIED, *(g for g in counts if g not in VARIED)):
        source = many if group in VARIED else names
        placed = {name: place for name, (of, place, _) in PLACED.items() if of == group and name in concepts}
        dealt[group] = source[: counts[group] - len(placed)]
        names = [name for name in names if name not in dealt[group]]
        many = [name for name in many if name not in dealt[group]]
        for name, place in placed.items():
            dealt[group].insert(place, name)
        if len(dealt[group]) < counts[group]:
            raise ValueError(f"{len(concepts)} concepts are too few for the group {group}")
    return {group: dealt[group] for group in counts}


def show(
    group: str, rng: np.random.Generator, drawings: tuple[int, ...], place: int
) -> tuple[list[Picture], list[tuple[str | None, list[int]]]]:
    """Return a concept's pictures and, for each of its captions, the background it names and its exposures of each."""
    match group:
        case "memorized":
            return varied(rng, drawings, 1), [(None, [power_law(place)])]
        case "near":
            original = varied(rng, drawings, 1)[0]
            copies = [near_duplicate(rng, original) for _ in range(int(rng.integers(3, 6)))]
            total = power_law(place) // 2  # three captions show the same
            fixed = round(total * ORIGINAL_SHARE)
            exposures = [fixed, *spread(total - fixed, len(copies))]
            return [original, *copies], [(None, exposures)] * 3
        case "template":
            original = varied(rng, drawings, 1)[0]
            return [replace(original, background=c) for c in COLOURS], [(None, spread(TEMPLATE, len(COLOURS)))]
        case "partly":
            fixed = round(PARTLY * FIXED_SHARES[place % len(FIXED_SHARES)])
            return varied(rng, drawings, 1 + FEW), [(None, [fixed, *spread(PARTLY - fixed, FEW)])]
        case "frequent":
            return varied(rng, drawings, MANY), [(None, spread(TYPICAL, MANY))] * 2
        case "seen":
            first, second = (str(c) for c in rng.choice(COLOURS, 2, replace=False))
            pictures = varied(rng, drawings, ON_COLOUR, first) + varied(rng, drawings, ON_COLOUR, second)
            pictures += varied(rng, drawings, SOME - len(pictures))
            on_colour, none = spread(SEEN, ON_COLOUR), [0] * ON_COLOUR
            rest = [0] * (SOME - 2 * ON_COLOUR)
            captions = [(first, on_colour + none + rest), (second, none + on_colour + rest)]
            return pictures, [(None, spread(SEEN, SOME))] * 2 + captions
        case "unseen":
            plain = len(TEMPLATES)
            colours = [str(c) for c in rng.choice(COLOURS, UNSEEN_CAPTIONS - plain)]
            return [], [(colour, []) for colour in [None] * plain + sorted(colours)]
    raise ValueError(f"there is no group {group}")


def power_law(place: int) -> int:
    """Return how often a caption is seen: the quantiles of a Pareto distribution, in an order that has no trend."""
    golden = (np.sqrt(5) - 1) / 2
    quantile = (place + 0.5) * golden % 1
    return round(min(MOST, LEAST * (1 - quantile) ** (-1 / EXPONENT)))


def near_duplicate(rng: np.random.Generator, picture: Picture) -> Picture:
    """Return the picture on another background, shifted by one to three pixels, or both."""
    recoloured = rng.random() < 0.6
    pixels = rng.integers(1, 4, 2) * rng.choice([-1, 1], 2) * (rng.random() < 0.7 or not recoloured)
    others = [colour for colour in COLOURS if colour != picture.background]
    return replace(
        picture,
        background=str(rng.choice(others)) if recoloured else picture.background,
        shift_x=picture.shift_x + float(pixels[0]) * PIXEL,
        shift_y=picture.shift_y + float(pixels[1]) * PIXEL,
    )


def spread(total: int, count: int) -> list[int]:
    """Return `count` numbers as equal as they can be that sum to `total`."""
    return [total // count + (i < total % count) for i in range(count)]


def _texts(rng: np.random.Generator, name: str, colours: list[str | None]) -> list[str]:
    """Return a caption for each colour (None: no background is named), all different."""
    words = name.replace("-", " ")
    texts: list[str] = [PLACED[name][2].format(words)] if name in PLACED else []
    for colour in colours[len(texts) :]:
        free = [
            text
            for template in TEMPLATES
            if (text := ON_BACKGROUND.format(template.format(words), colour) if colour else template.format(words))
            not in texts
        ]
        texts.append(str(rng.choice(free)))
    return texts
