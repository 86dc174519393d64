"""Ctrl-C and a job's end, delayed until a good moment to stop."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 130

log = logging.getLogger(__name__)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While it is entered, SIGINT ends the process in a line: libraries take seconds to import."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(EXIT_CODE)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM only sets `requested`; a second ends all.

    Python runs handlers in the main thread alone; entered in another one it does nothing.

    Args:
        quiet: say nothing, as another process does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested = False
        self._quiet = quiet
        self._before: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Processes that were forked meanwhile, such as those that read data, finish no step.
        if self.requested or os.getpid() != self._owner:
            os._exit(EXIT_CODE)
        self.requested = True
        if not self._quiet:
            with suppress(OSError):
                log.warning("stopping after this step; once more ends at once")
