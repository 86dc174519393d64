"""How far a suite is: a live bar with the time left, or plain lines where there is no terminal."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY = 15.0


class SuiteProgress:
    """Progress over the rows of a suite and within the row in hand.

    Use as a context manager; `row` before each row, `update` within it.

    Args:
        rows: how many rows there are to run.
        console: where to write; a live bar if it is a terminal, else a line now and then.
        clock: seconds from any start.
    """

    def __init__(
        self,
        rows: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.rows = rows
        self._clock = clock
        self._start = self._row_start = self._last_line = clock()
        self._finished = 0
        self._name = ""
        self._suite_task: TaskID | None = None
        self._row_task: TaskID | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            # A row's parts differ in pace; a short window would make the time left jump.
            speed_estimate_period=600,
        )

    def __enter__(self) -> "SuiteProgress":
        self._bar.start()
        if self.console.is_terminal:
            self._suite_task = self._bar.add_task(f"suite of {self.rows} rows", total=self.rows)
            self._row_task = self._bar.add_task("", total=1.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def row(self, name: str) -> None:
        """A row begins."""
        self._name = name
        self._row_start = self._clock()
        self._last_line = self._row_start
        if self._row_task is not None:
            self._bar.reset(self._row_task, description=name)
        else:
            self.console.print(f"{self._place()} {name}: started", highlight=False)

    def update(self, done: float, doing: str) -> None:
        """The row in hand is `done` (0 to 1) and does `doing`."""
        if self._row_task is not None and self._suite_task is not None:
            self._bar.update(self._row_task, completed=done, description=f"{self._name}: {doing}")
            self._bar.update(self._suite_task, completed=self._finished + done)
            return
        now = self._clock()
        if now - self._last_line < _LINE_EVERY:
            return
        self._last_line = now
        row_left = self._left(now - self._row_start, done, 1.0)
        suite_left = self._left(now - self._start, self._finished + done, self.rows)
        self.console.print(
            f"{self._place()} {self._name}: {doing}; left for the row {row_left},"
            f" for the suite {suite_left}",
            highlight=False,
            soft_wrap=True,
        )

    def finish_row(self, outcome: str) -> None:
        """The row in hand ended."""
        took = _duration(self._clock() - self._row_start)
        self.console.print(
            f"{self._place()} {self._name}: {outcome} in {took}", highlight=False, soft_wrap=True
        )
        self._finished += 1
        if self._suite_task is not None:
            self._bar.update(self._suite_task, completed=self._finished)

    def _place(self) -> str:
        return rf"\[{self._finished + 1}/{self.rows}]"

    @staticmethod
    def _left(elapsed: float, done: float, total: float) -> str:
        return _duration(elapsed / done * (total - done)) if done > 0 else "unknown"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
