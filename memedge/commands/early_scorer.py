"""What scores with passes left out: `memedge score --early`."""

from dataclasses import dataclass

from memedge.decision.early import Early, check_early
from memedge.detector import Detector, EngineInfo
from memedge.engine.engine import Engine
from memedge.results import Verdicts


@dataclass(frozen=True)
class EarlyScorer:
    """A detector whose results are verdicts; it can be pickled where the detector can.

    Raises:
        InputError: when it is made: the engine cannot leave out passes in this way.
    """

    detector: Detector
    early: Early

    def __post_init__(self) -> None:
        info = self.info
        check_early(info.rule, self.early, info.path, info.key)

    @property
    def info(self) -> EngineInfo:
        """What runs."""
        return self.detector.info

    @property
    def engine(self) -> Engine:
        """The opened engine."""
        return self.detector.engine

    def score(self, prompts: list[str]) -> Verdicts:
        """Return the verdicts on prompts."""
        return self.detector.detect(prompts, self.early)
