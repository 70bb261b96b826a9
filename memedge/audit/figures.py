"""What an audit finds, and its summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, median

CHECKS = (0, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 5000)  # steps after which generations are looked at
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class AuditSettings:
    """How pictures are searched for.

    Attributes:
        steps: of the search, at most. Enough steps bring back *any* picture: controls say how many mean something.
        generations: pictures made at each check; a start succeeds when more than half of them are copies.
        guidance: the scale of classifier-free guidance that they are made with.
        inference_steps: of DDIM.
        rows: of the UNet, at most, at once: less takes less memory, and finds the same but for rounding.
        seed: of all noise.
    """

    steps: int = 50
    generations: int = 4
    guidance: float = 7.5
    inference_steps: int = 50
    rows: int = 8
    seed: int = 0

    @property
    def checks(self) -> list[int]:
        """Steps after which generations are looked at."""
        return [*(one for one in CHECKS if one < self.steps), self.steps]


DEFAULTS = AuditSettings()


@dataclass(frozen=True)
class Check:
    """A start's generations after some steps of its search.

    Attributes:
        start: "caption", "perturbed" or "random".
        steps: of the search before.
        copies: how many generations are copies of the picture.
        similarity: of the generations with it, their mean.
    """

    start: str
    steps: int
    copies: int
    similarity: float


@dataclass(frozen=True)
class AuditedImage:
    """A picture's audit.

    Attributes:
        image: its file.
        caption: its caption, or None.
        memorized: as it was known, or None.
        by_prompt: whether its caption makes the model print it; None without a caption.
        by_audit: whether its caption or an embedding that was found does.
        start: from which start, or None.
        steps: after how many steps of the search, 0 by the caption itself; or None.
        similarity: of the generations with it, in the best check.
        checks: all of them, in order.
        seconds: taken.
    """

    image: str
    caption: str | None
    memorized: bool | None
    by_prompt: bool | None
    by_audit: bool
    start: str | None
    steps: int | None
    similarity: float
    checks: list[Check]
    seconds: float

    def within(self, steps: int) -> bool:
        """Whether it was printed after so many steps, or fewer."""
        return self.steps is not None and self.steps <= steps


@dataclass(frozen=True)
class Share:
    """A share of pictures, with its 95 % interval (Wilson)."""

    count: int
    of: int
    value: float
    low: float
    high: float

    @staticmethod
    def among(found: Sequence[bool]) -> "Share":
        """Return the share of True in `found`, which is not empty."""
        n, p = len(found), sum(found) / len(found)
        middle, spread = p + _Z**2 / (2 * n), _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        low, high = ((middle + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
        return Share(sum(found), n, p, max(0.0, low), min(1.0, high))


@dataclass(frozen=True)
class Group:
    """Pictures of one kind.

    Attributes:
        name: "memorized", "not memorized", or "unlabelled".
        images: how many.
        by_prompt: the share that their captions print; None where there are no captions.
        by_audit: the share that their captions or embeddings print.
        within: the same after at most so many steps.
        median_steps: of those that were printed; None if none was.
    """

    name: str
    images: int
    by_prompt: Share | None
    by_audit: Share
    within: dict[int, Share]
    median_steps: float | None


@dataclass(frozen=True)
class Audit:
    """An audit: what was run, and what it found.

    Attributes:
        checkpoint, checkpoint_sha256: what was audited.
        similarity, copy: the measure, and from which value on a generation is a copy.
        settings: how.
        device: where.
        date, command, version: when, how it was asked for, by which memedge.
        cautions: what makes the figures mean less than they seem to, in sentences.
        groups: the summary.
        images: each picture's.
    """

    checkpoint: str
    checkpoint_sha256: str
    similarity: str
    copy: float
    settings: AuditSettings
    device: str
    date: str
    command: str
    version: str
    cautions: list[str]
    groups: list[Group]
    images: list[AuditedImage]


@dataclass(frozen=True)
class Cost:
    """What an audit costs at most; pictures that are printed early cost less.

    Attributes:
        images: how many pictures.
        forward: rows of the UNet without gradients, for generations.
        backward: rows with gradients, for the search.
        seconds: measured on a few, and multiplied.
        device: where.
    """

    images: int
    forward: int
    backward: int
    seconds: float
    device: str


def summarise(images: Sequence[AuditedImage], settings: AuditSettings) -> list[Group]:
    """Return the groups that there are."""
    names = {True: "memorized", False: "not memorized", None: "unlabelled"}
    groups = []
    for label, name in names.items():
        if not (some := [one for one in images if one.memorized is label]):
            continue
        prompts = [one.by_prompt for one in some if one.by_prompt is not None]
        steps = [one.steps for one in some if one.steps is not None]
        groups.append(
            Group(
                name,
                len(some),
                Share.among(prompts) if prompts else None,
                Share.among([one.by_audit for one in some]),
                {step: Share.among([one.within(step) for one in some]) for step in settings.checks},
                median(steps) if steps else None,
            )
        )
    return groups
