"""What a pipeline puts around a prompt before a language model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from memedge.engine.errors import ExportError
from memedge.engine.tokenizer_file import LONGEST_TEMPLATE
from memedge.export.sources import weights
from memedge.export.sources.architectures import Architecture

PROBES = (" a cat ", "", "a")  # the first would lose its spaces where a template trims prompts


@dataclass(frozen=True)
class Template:
    """The ids around a prompt's own.

    Prompts are read alone, and the ids put around them: at the borders a tokenizer may join what it reads as one text.
    Both published templates have a line's end before the prompt, so that the one difference is a prompt that begins
    with blank lines: they make one token with that line's end in the pipeline, and a token of their own here.

    Attributes:
        before, behind: the ids.
        dropped: how many of the first states the pipeline leaves out.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]
    dropped: int

    def length(self, rows: int) -> int:
        """Return how many ids a tokenizer has to give for `rows` states.

        The end of the template has room of its own. So what is cut of a long prompt is cut where the pipeline cuts it,
        which cuts the template's end first: states of its first rows depend on nothing behind them.
        """
        return self.dropped + rows + len(self.behind)

    def rows(self, length: int) -> int:
        """Return how many states there are for so many ids."""
        return length - self.dropped - len(self.behind)

    def put(self, tokenizer: Tokenizer) -> None:
        """Let a tokenizer put the ids around every prompt, as special tokens."""
        parts = {"before": self.before, "behind": self.behind}
        tokens = [
            {"id": name, "ids": list(ids), "tokens": [tokenizer.id_to_token(one) for one in ids]}
            for name, ids in parts.items()
        ]
        tokenizer.post_processor = TemplateProcessing(single=["before", "$A", "behind"], special_tokens=tokens)


def read_templates(architecture: Architecture, tokenizers: Sequence[Any]) -> tuple[Template | None, ...]:
    """Return the template of each text encoder of a family; None: prompts are read as they are.

    Args:
        architecture: the family.
        tokenizers: transformers' fast ones.

    Raises:
        ExportError: a tokenizer has no chat template, or one that does not stand around prompts alone.
    """
    pairs = zip(architecture.encoders, tokenizers, strict=True)
    return tuple(_read(encoder.template, architecture.pipeline, tokenizer) for encoder, tokenizer in pairs)


def _read(kind: str, pipeline: str, tokenizer: Any) -> Template | None:
    if not kind:
        return None
    dropped = 0
    if kind == "pipeline":
        parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
        own = getattr(diffusers, pipeline)(**parts)
        texts = [own.prompt_template_encode.format(prompt) for prompt in PROBES]
        dropped = int(own.prompt_template_encode_start_idx)
    else:
        with weights.reading(tokenizer.name_or_path):
            texts = [_chat(tokenizer, prompt) for prompt in PROBES]
    start, found, end = texts[0].partition(PROBES[0])
    before, behind = (tuple(tokenizer(part).input_ids) for part in (start, end))
    whole = [[*before, *tokenizer(prompt).input_ids, *behind] for prompt in PROBES]
    lengths = [len(before), len(behind)]
    if (
        not found
        or whole != [tokenizer(text).input_ids for text in texts]
        or not 1 <= min(lengths) <= max(lengths) <= LONGEST_TEMPLATE
    ):
        raise ExportError(
            f"The tokenizer {tokenizer.name_or_path} does not read a prompt within its template as it reads it alone: "
            "memedge exports templates of up to 256 tokens that leave prompts as they are."
        )
    return Template(before, behind, dropped)


def _chat(tokenizer: Any, prompt: str) -> str:
    """Return what Z-Image's pipeline makes of a prompt: one message of a user, for a model that may think."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return text
