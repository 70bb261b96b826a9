"""What a gate answers instead of a verdict."""

from memedge.engine.errors import InputError, MemedgeError


class OverloadedError(MemedgeError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(MemedgeError):
    """The deadline passed before the verdict was there."""


class ClosedError(MemedgeError):
    """The gate was closed, and takes no prompts any more."""


class TooLargeError(InputError):
    """More prompts or text at once than the gate ever takes."""
