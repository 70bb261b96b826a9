"""A scorer for worker processes: it is imported there, and what it does hangs on the prompts."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from memedge.engine.errors import InputError
from memedge.results import Scores


class OddError(Exception):
    """An error that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("odd")
        self.function = lambda: None


class FakeScorer:
    """Norms are the prompts' lengths. "kill once PATH" ends the process, unless the file is there; "kill" always."""

    info = "a fake"

    def score(self, prompts: list[str]) -> Scores:
        for prompt in prompts:
            word, _, rest = prompt.partition(" once ")
            if word == "kill" and not (rest and Path(rest).exists()):
                if rest:
                    Path(rest).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "refuse":
                raise InputError("This prompt is refused: leave it out.")
            if word == "odd":
                raise OddError
            if word == "sleep":
                time.sleep(0.05)
        norm = np.array([float(len(prompt)) for prompt in prompts])
        no = np.zeros(len(prompts), dtype=bool)
        return Scores(norm, norm / 1000, None, None, no, None)


def refuse_to_open() -> FakeScorer:
    raise InputError("The engine cannot be opened: export it again.")


def die_while_opening() -> FakeScorer:
    os._exit(7)
