"""Calls into native code, and the end of the interpreter.

A daemon thread that comes back from C++ after Python has ended is unwound through it, which aborts the process. So the
end waits for the calls that are under way, and threads that would begin another one stay where they are.
"""

import atexit
import os
import threading
from types import TracebackType

PATIENCE = 30.0  # seconds; a call is one batch


class NativeCalls:
    """Counts the calls that are under way: `with native.CALLS:` around each. Any number of threads may be in it."""

    def __init__(self) -> None:
        self._reset()
        atexit.register(self._end)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # the other threads' calls are not the child's

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._under_way, self._ended = 0, False

    def __enter__(self) -> None:
        with self._changed:
            if self._ended and threading.current_thread() is not threading.main_thread():
                self._changed.wait_for(lambda: False)  # the interpreter ends meanwhile
            self._under_way += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._under_way == 0, PATIENCE)


CALLS = NativeCalls()
