"""How a checkpoint is cured, what that costs, and what it did."""

from dataclasses import dataclass, field

from memedge.audit import AuditSettings, Group


@dataclass(frozen=True)
class CureSettings:
    """How a checkpoint is cured.

    Attributes:
        epochs: how often each picture is searched for and trained away.
        rate: of AdamW. The default suits Stable Diffusion's size; small models take more.
        audit: of the audits; its steps are the searches' in training too.
    """

    epochs: int = 5
    rate: float = 1e-5
    audit: AuditSettings = field(default_factory=AuditSettings)


DEFAULTS = CureSettings()


@dataclass(frozen=True)
class Cure:
    """What a cure did.

    Attributes:
        checkpoint, checkpoint_sha256: what was cured.
        settings: how.
        memorized, ordinary: numbers of pairs.
        of_captions: of how many pictures the surrogates are of their captions; of others they are of the empty prompt.
        before, after: the audits' summaries; controls are pictures that the file marks as not memorized.
        loss_before, loss_after: mean squared error on ordinary pairs that were not trained on, same noise.
        seconds: of the training alone.
        device: where.
    """

    checkpoint: str
    checkpoint_sha256: str
    settings: CureSettings
    memorized: int
    ordinary: int
    of_captions: int
    before: list[Group]
    after: list[Group]
    loss_before: float
    loss_after: float
    seconds: float
    device: str


@dataclass(frozen=True)
class CureCost:
    """What a cure costs at most.

    Attributes:
        audits: rows of the UNet, without gradients and with, of both audits.
        surrogates: rows without gradients.
        searches: rows with gradients of embeddings.
        updates: rows with gradients of all weights.
        seconds: measured on a few rows, and multiplied.
        device: where.
    """

    audits: tuple[int, int]
    surrogates: int
    searches: int
    updates: int
    seconds: float
    device: str
