"""How far a long job on data is: a live bar with the time left, or a line now and then."""

import datetime
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY = 15.0
_MEGA = 1e6


class Bar:
    """Progress of one job, on stderr, so that what a command prints can be piped.

    Args:
        what: the job, in few words.
        total: images or bytes in all.
        done: of which these are done.
        in_bytes: whether it counts bytes.
        console: a live bar if it is a terminal.
        clock: seconds from any start.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        done: int = 0,
        in_bytes: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._unit = _MEGA if in_bytes else 1
        self._suffix = " MB" if in_bytes else ""
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._start = self._last_line = clock()
        counts: tuple[ProgressColumn, ...] = (
            (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
        )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *counts,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = self._clock()
        if self._console.is_terminal or now - self._last_line < _LINE_EVERY:
            return
        self._last_line = now
        speed = (self._done - self._first) / (now - self._start)
        seconds = round((self._total - self._done) / speed) if speed else None
        left = "unknown" if seconds is None else datetime.timedelta(seconds=seconds)
        self._console.print(
            f"{self._what}: {self._done / self._unit:.0f} of {self._total / self._unit:.0f}"
            f"{self._suffix}, left {left}",
            highlight=False,
            soft_wrap=True,
        )
