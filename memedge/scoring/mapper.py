"""How a job's batches of prompts are scored: here, by processes (workers.py), or on a cluster."""

from collections.abc import Callable, Iterator

from memedge.results import Scores

# Takes batches of prompts, and yields each with its scores, in whatever order they come. It reads ahead only as far as
# keeps its workers busy: the batches are made while they are read. What scoring raises, it raises.
Mapper = Callable[[Iterator[list[str]]], Iterator[tuple[list[str], Scores]]]


def here(score: Callable[[list[str]], Scores]) -> Mapper:
    """Return a mapper that scores in this process, one batch after the other."""

    def mapper(batches: Iterator[list[str]]) -> Iterator[tuple[list[str], Scores]]:
        for batch in batches:
            yield batch, score(batch)

    return mapper
