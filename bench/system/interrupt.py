"""Ctrl-C and a job's end, delayed until a good moment to stop."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 130
# Called by torch's code in C++, which ends the process for some errors from them.
_WITHIN_TORCH = ("__torch_dispatch__", "find_torch_dispatch_rule")
_SECONDS_BETWEEN = 0.01

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


@contextmanager
def raised_where_it_arrives(*numbers: signal.Signals) -> Iterator[None]:
    """While it is entered, signals raise KeyboardInterrupt, a little later where it would be lost.

    torch ends the process with an abort for one in the midst of an operator that Python sees, and
    Python drops one in a callback of a weak reference.
    """
    usual = (signal.default_int_handler, signal.SIG_DFL)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in usual}
    pending: list[threading.Timer] = []
    received = [signal.SIGINT]

    def again() -> None:
        timer = threading.Timer(_SECONDS_BETWEEN, _to_main_thread, received)
        timer.daemon = True
        pending[:] = [timer]
        timer.start()

    def handle(number: int, frame: FrameType | None) -> None:
        received[:] = [signal.Signals(number)]
        while frame is not None:
            if frame.f_code.co_name in _WITHIN_TORCH:
                again()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def dropped(error: Any) -> None:
        if issubclass(error.exc_type, KeyboardInterrupt):
            again()
        else:
            hook(error)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for timer in pending:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _to_main_thread(number: int) -> None:
    """Send a signal to the thread that waits in a call of the system, which ends."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


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
