"""tokenizer.json, read before the `tokenizers` library does.

The library does what the file says: padding to 2⁴⁰ tokens aborts the process, a normalizer may multiply text, and a
regular expression may take for ever. So a file may have the shapes that CLIP's, T5's and Qwen's tokenizers have, with
their own regular expressions, and nothing else. With these, work grows as n log n with a prompt's length.

The template that a pipeline puts around prompts for a language model is in the file, too: as the ids that stand before
and behind every prompt.
"""

import re
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from memedge.engine.charsmap import check_charsmap
from memedge.engine.errors import IntegrityError, shown

SIZE_LIMIT: Final = 64 << 20  # bytes; CLIP's have 2 MB, those of many languages 20
# CLIP's words, as older and newer releases of transformers write them.
WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL_WORDS: Final = r"<\|startoftext\|>|<\|endoftext\|>|" + WORDS
QWEN_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_TEMPLATE: Final = 256  # ids before a prompt, or behind it; Qwen-Image's has 34 and 5

Words = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{'|'.join(map(re.escape, (WORDS, SPECIAL_WORDS, QWEN_WORDS)))})\Z")]
Token = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 22)]
Suffix = Annotated[str, msgspec.Meta(max_length=16)]
Score = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


class Plain(msgspec.Struct, forbid_unknown_fields=True):
    """A part that is written without its type."""


class Part(msgspec.Struct, forbid_unknown_fields=True, tag_field="type"):
    """A part whose type is the name of its class, but for sequences."""


class Regex(Plain):
    regex: Literal[r"\s+", " {2,}"] = msgspec.field(name="Regex")


class WordRegex(Plain):
    regex: Words = msgspec.field(name="Regex")


class Fixed(Plain):
    length: int = msgspec.field(name="Fixed")


class Truncation(Plain):
    max_length: int
    strategy: Literal["LongestFirst"]
    stride: Literal[0]
    direction: Literal["Right"] = "Right"


class Padding(Plain):
    strategy: Fixed
    direction: Literal["Right"]
    pad_to_multiple_of: None
    pad_id: Id
    pad_type_id: Id
    pad_token: Token


class AddedToken(Plain):
    id: Id
    content: Token
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class NFC(Part, tag=True):
    pass


class Lowercase(Part, tag=True):
    pass


class Replace(Part, tag=True):
    pattern: Regex
    content: Literal[" ", "▁"]


class Strip(Part, tag=True):
    strip_left: bool
    strip_right: bool


class Precompiled(Part, tag=True):
    precompiled_charsmap: str

    def __post_init__(self) -> None:
        check_charsmap(self.precompiled_charsmap)


Normalizer = NFC | Lowercase | Replace | Strip | Precompiled


class Normalizers(Part, tag="Sequence"):
    normalizers: Annotated[tuple[Normalizer, ...], msgspec.Meta(max_length=8)]


class Split(Part, tag=True):
    pattern: WordRegex
    behavior: Literal["Removed", "Isolated"]
    invert: bool


class ByteLevel(Part, tag=True):
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool = True


class WhitespaceSplit(Part, tag=True):
    pass


class Metaspace(Part, tag=True):
    replacement: Literal["▁"]
    prepend_scheme: Literal["always", "first", "never"]
    split: bool


PreTokenizer = Split | ByteLevel | WhitespaceSplit | Metaspace


class PreTokenizers(Part, tag="Sequence"):
    pretokenizers: Annotated[tuple[PreTokenizer, ...], msgspec.Meta(max_length=8)]


class RobertaProcessing(Part, tag=True):
    sep: tuple[Token, Id]
    cls: tuple[Token, Id]
    trim_offsets: bool
    add_prefix_space: bool


class Place(Plain):
    id: Token
    type_id: Id


class TemplatePart(Plain):
    sequence: Place | msgspec.UnsetType = msgspec.field(name="Sequence", default=msgspec.UNSET)
    special: Place | msgspec.UnsetType = msgspec.field(name="SpecialToken", default=msgspec.UNSET)


class TemplateToken(Plain):
    id: Token
    ids: Annotated[tuple[Id, ...], msgspec.Meta(min_length=1, max_length=LONGEST_TEMPLATE)]
    tokens: Annotated[tuple[Token, ...], msgspec.Meta(min_length=1, max_length=LONGEST_TEMPLATE)]


class TemplateProcessing(Part, tag=True):
    single: Annotated[tuple[TemplatePart, ...], msgspec.Meta(max_length=4)]
    pair: Annotated[tuple[TemplatePart, ...], msgspec.Meta(max_length=8)]
    special_tokens: Annotated[dict[Token, TemplateToken], msgspec.Meta(max_length=4)]


class BPE(Part, tag=True):
    vocab: dict[Token, Id]
    merges: list[str | tuple[str, str]]
    dropout: None = None
    unk_token: Token | None = None
    continuing_subword_prefix: Literal[""] | None = None  # others cut characters in two
    end_of_word_suffix: Suffix | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class Unigram(Part, tag=True):
    vocab: list[tuple[Token, Score]]
    unk_id: Id
    byte_fallback: bool = False


class TokenizerFile(Plain):
    """What a tokenizer.json may hold. A decoder is not used, so it is not kept."""

    version: Literal["1.0"]
    truncation: Truncation
    padding: Padding
    added_tokens: Annotated[tuple[AddedToken, ...], msgspec.Meta(max_length=4096)]
    normalizer: Normalizers | Normalizer | None
    pre_tokenizer: PreTokenizers | PreTokenizer | None
    post_processor: RobertaProcessing | TemplateProcessing
    decoder: msgspec.Raw
    model: BPE | Unigram


def read_tokenizer(path: Path, tokens: int) -> str:
    """Return a tokenizer's file as JSON for the library; no more than was looked at.

    Args:
        path: of the file.
        tokens: the length that it must pad and cut prompts to.

    Raises:
        IntegrityError: it is none, or of another shape than CLIP's, T5's and Qwen's tokenizers have.
    """
    refused = f"{path} is not a tokenizer as CLIP's, T5's and Qwen's are"
    advice = "do not use this engine, or export it again"
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise IntegrityError(f"{refused} (it has more than 64 MiB): {advice}.")
        found = msgspec.json.decode(path.read_bytes(), type=TokenizerFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{refused} ({shown(str(error), 200)}): {advice}.") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}): export the engine again.") from None
    if not found.padding.strategy.length == found.truncation.max_length == tokens:
        raise IntegrityError(f"{path} does not pad and cut prompts to {tokens} tokens: export the engine again.")
    if len(found.model.vocab) == 0:
        raise IntegrityError(f"{refused} (it has no vocabulary): {advice}.")
    kept = msgspec.structs.replace(found, decoder=msgspec.Raw(b"null"))
    return msgspec.json.encode(kept).decode()
