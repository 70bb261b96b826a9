"""Every error a user can meet. Each message is one sentence that says what is wrong and what to do."""


class MemedgeError(Exception):
    """Base of all errors that are not bugs: the command line prints its message and exits with code 1."""


class InputError(MemedgeError):
    """Prompts, files, arrays or arguments that cannot be used."""


class EngineError(MemedgeError):
    """Base of everything that can be wrong with an engine directory or with running it."""


class ManifestError(EngineError):
    """The directory is no engine, or its manifest is unreadable or of another schema."""


class IntegrityError(EngineError):
    """A file of the engine is missing, changed, truncated or outside the directory."""


class ProviderError(EngineError):
    """The provider or precision asked for cannot run here."""


class NotFiniteError(EngineError):
    """A tensor holds NaN or infinity where a score would have been made from it."""


class ExportError(MemedgeError):
    """A checkpoint cannot be exported, or its export does not agree with it."""


def shown(text: str, most: int = 120) -> str:
    """Return text of a stranger's for a message: one line of at most `most` characters that a terminal can show.

    Whatever is neither a letter nor another character with a picture becomes "?": control characters, lone surrogates,
    marks that turn the direction of writing.
    """
    line = "".join(character if character.isprintable() else "?" for character in text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


def install(extra: str) -> str:
    """Return how to install what an extra of memedge brings, for a message."""
    return f"run `python -m pip install 'memedge[{extra}]'`"


def not_installed(purpose: str, missing: str | ImportError, extra: str, otherwise: str = "") -> str:
    """Return the one sentence for a package that is not installed.

    Args:
        purpose: what needs it, such as "Evaluating".
        missing: its name, or the error of importing it.
        extra: of memedge, which brings it.
        otherwise: what else to do, such as ", or leave the checkpoint out".
    """
    name = repr(missing.name) if isinstance(missing, ImportError) else missing
    return f"{purpose} needs {name}, which is not installed: {install(extra)}{otherwise}."
