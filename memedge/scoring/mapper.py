"""Who scores the batches of a job: this process, or others."""

from collections.abc import Callable, Iterator

from memedge.results import Scores

Batches = Iterator[list[str]]
Mapper = Callable[[Batches], Iterator[tuple[list[str], Scores]]]
"""Takes batches of prompts, and yields each of them once with its scores, in whatever order they are done.

It reads no further ahead than keeps its workers busy. What scoring raised, and what `batches` raised, comes out as it
was raised.
"""


def here(score: Callable[[list[str]], Scores]) -> Mapper:
    """Return the mapper that scores in this process, one batch after the other."""

    def mapper(batches: Batches) -> Iterator[tuple[list[str], Scores]]:
        for batch in batches:
            yield batch, score(batch)

    return mapper
