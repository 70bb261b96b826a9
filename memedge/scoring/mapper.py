"""Who scores the batches of a job: this process, or others."""

from collections.abc import Callable, Iterator

from memedge.results import Scores, Verdicts

Results = Scores | Verdicts
"""What is found of a batch's prompts: all of their statistics; or verdicts, where passes may be left out."""

Batches = Iterator[list[str]]
Mapper = Callable[[Batches], Iterator[tuple[list[str], Results]]]
"""Takes batches of prompts, and yields each of them once with its results, in whatever order they are done.

It reads no further ahead than keeps its workers busy. What scoring raised, and what `batches` raised, comes out as it
was raised.
"""


def here(score: Callable[[list[str]], Results]) -> Mapper:
    """Return the mapper that scores in this process, one batch after the other."""

    def mapper(batches: Batches) -> Iterator[tuple[list[str], Results]]:
        for batch in batches:
            yield batch, score(batch)

    return mapper
