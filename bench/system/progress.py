"""How far something is: a live display with the time left, or a plain line now and then."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY = 15.0


class _Display:
    """A live display where the console is a terminal, else lines; a context manager.

    Args:
        columns: between the bar and the time left.
        console: where to write.
        clock: seconds from any start.
        window: seconds of the past that tell the time left.
        transient: whether the live display goes away at the end.
    """

    def __init__(
        self,
        *columns: ProgressColumn,
        console: Console,
        clock: Callable[[], float],
        window: float,
        transient: bool,
    ) -> None:
        self.console = console
        self._clock = clock
        self._start = self._last_line = clock()
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=transient,
            speed_estimate_period=window,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _is_due(self) -> bool:
        """Whether it is time for a line; then the next one is due some time from now."""
        now = self._clock()
        if self.console.is_terminal or now - self._last_line < _LINE_EVERY:
            return False
        self._last_line = now
        return True

    def _left(self, start: float, done: float, total: float) -> str:
        elapsed = self._clock() - start
        return _duration(elapsed / done * (total - done)) if done > 0 else "unknown"


class Bar(_Display):
    """Progress of one job, on stderr, so that what a command prints can be piped.

    Args:
        what: the job, in few words.
        total: units in all.
        unit: after the numbers.
        console: a live bar if it is a terminal.
        clock: seconds from any start.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            MofNCompleteColumn(),
            console=console or Console(emoji=False, stderr=True),
            clock=clock,
            window=60,
            transient=True,
        )
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._task = self._live.add_task(what, total=total)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._show(self._done + count, self._what)

    def update(self, share: float, doing: str = "") -> None:
        """A share of all, 0 to 1, is done; `doing` is in hand."""
        self._show(round(share * self._total), f"{self._what}: {doing}" if doing else self._what)

    def _show(self, done: int, what: str) -> None:
        self._done = done
        self._live.update(self._task, completed=done, description=what)
        if not self._is_due():
            return
        left = self._left(self._start, done, self._total)
        self._say(f"{what}: {done} of {self._total}{self._unit}, left {left}")


class SuiteProgress(_Display):
    """Progress over the rows of a suite and within the row in hand.

    Call `row` before each row, `update` within it, `finish_row` after it.

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
        super().__init__(
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console or Console(emoji=False),
            clock=clock,
            # A row's parts differ in pace; a short window would make the time left jump.
            window=600,
            transient=False,
        )
        self.rows = rows
        self._row_start = self._start
        self._finished = 0
        self._name = ""
        self._suite_task = self._live.add_task(f"suite of {rows} rows", total=rows)
        self._row_task = self._live.add_task("", total=1.0)

    def row(self, name: str) -> None:
        """A row begins."""
        self._name = name
        self._row_start = self._last_line = self._clock()
        self._live.reset(self._row_task, description=name)
        if not self.console.is_terminal:
            self._say(f"{self._place()} {name}: started")

    def update(self, done: float, doing: str) -> None:
        """The row in hand is `done` (0 to 1) and does `doing`."""
        self._live.update(self._row_task, completed=done, description=f"{self._name}: {doing}")
        self._live.update(self._suite_task, completed=self._finished + done)
        if self._is_due():
            row_left = self._left(self._row_start, done, 1.0)
            suite_left = self._left(self._start, self._finished + done, self.rows)
            self._say(
                f"{self._place()} {self._name}: {doing}; left for the row {row_left},"
                f" for the suite {suite_left}"
            )

    def finish_row(self, outcome: str) -> None:
        """The row in hand ended."""
        took = _duration(self._clock() - self._row_start)
        self._say(f"{self._place()} {self._name}: {outcome} in {took}")
        self._finished += 1
        self._live.update(self._suite_task, completed=self._finished)

    def _place(self) -> str:
        return f"[{self._finished + 1}/{self.rows}]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
