"""Prompts given in Python, checked to be text."""

from collections.abc import Iterable, Iterator

from memedge.engine.errors import InputError


def checked_prompts(prompts: Iterable[str]) -> Iterator[str]:
    """Yield the prompts, each checked to be text; raises InputError."""
    if isinstance(prompts, str | bytes):
        raise InputError("prompts is one string: give a list of prompts, as in score([prompt]).")
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts is {type(prompts).__name__}: give a list or another iterable of strings.")
    for position, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise InputError(f"Prompt {position} is {type(prompt).__name__}, not text: give strings only.")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"Prompt {position} is not valid UTF-8 text: correct or remove it.") from None
        yield prompt
