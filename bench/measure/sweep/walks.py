"""Walks from the smallest image up, each measured by processes of its own."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attentions
from bench.config.arch import parse
from bench.config.schema import RunConfig
from bench.measure import subjects
from bench.measure.sweep.points import Point, Walk
from bench.measure.sweep.process import MEASURED, Job, measure_points
from bench.measure.sweep.store import (
    ENDS,
    Limits,
    Store,
    Task,
    error_kind,
    reason_to_skip,
    unfinished,
)
from bench.record import Record
from bench.system import machine
from bench.system.progress import SuiteProgress

# The free memory that a walk may use where no limit is given; the rest keeps the machine alive.
_SHARE_OF_FREE = 0.9
_KILLED = -signal.SIGKILL
# Seconds after which a silent process is no reason for a silent display.
_TELL_EVERY = 5.0


def sweep(
    walks: Sequence[Walk],
    *,
    output: Path,
    limits: Limits,
    command: Sequence[str],
    console: Console,
) -> list[Record]:
    """Measure what has no record in `output/records` yet, and return the records of all points.

    What ran out of memory or time is tried again where the limit is larger now.

    Args:
        walks: of `plan`.
        output: folder; each point is written into it, whole, as soon as it is measured.
        limits: of each point.
        command: the command line, for the records.
        console: for the progress.

    Raises:
        InputError: if the folder cannot be written.
        KeyboardInterrupt: when interrupted; all points measured before are written.
    """
    store = Store(output / "records", limits, command)
    todo = [(walk, tasks) for walk in walks if (tasks := unfinished(walk, store))]
    points = [point for walk in walks for point in walk]
    missing = sum(len(tasks) for _, tasks in todo)
    if missing < len(points):
        console.print(f"{len(points) - missing} of {len(points)} points are recorded already")
    with SuiteProgress(len(todo), console=console) as progress:
        for walk, tasks in todo:
            first = walk[0]
            batch = first.config.profile.batch_size
            progress.row(f"{first.config.row}, {first.mode}" + f", batch {batch}" * (batch > 1))
            _Walker(tasks, store, progress).run()
    return [store.records[point.key] for point in points]


class _Walker:
    """Measures the tasks of one walk, from the smallest up, in as many processes as it takes."""

    def __init__(self, tasks: Sequence[Task], store: Store, progress: SuiteProgress) -> None:
        self.tasks = tasks
        self.store = store
        self.progress = progress
        # Most costs are about linear; for the time left alone.
        self.costs = [task.point.pixels for task in tasks]
        self.place = 0
        self.reason = ""
        self.doing = "starting"
        self.failures = 0
        self.limit: int | None = None

    def run(self) -> None:
        """Write a record of each task."""
        for task in self.tasks:
            self.progress.update(0.0, f"counting {task.point}")
            _count(task)
        if not any(quantity in self.tasks[0].point.what for quantity in MEASURED):
            while self.place < len(self.tasks):
                self._finish(None)
        while self.place < len(self.tasks):
            if reason := self._skips():
                self._finish({"kind": "skipped", "message": reason})
            else:
                self._measure()
        failed = f", {self.failures} not measured" if self.failures else ""
        self.progress.finish_row(f"{len(self.tasks)} points{failed}")

    def _skips(self) -> str:
        """Why the point in hand is not to be measured, or nothing."""
        return self.reason or self.tasks[self.place].skipped

    def _measure(self) -> None:
        """Let a fresh process measure until it is through, dies or has to be stopped."""
        tasks = [task for task in self.tasks[self.place :] if not task.skipped]
        self.limit = _memory_limit(self.store.limits, tasks[0].point)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=measure_points,
            args=(theirs, [Job.of(task.point) for task in tasks], self.limit),
            kwargs={"threads": torch.get_num_threads()},
            daemon=True,
        )
        process.start()
        theirs.close()
        try:
            self._listen(ours, process)
        finally:
            process.kill()
            process.join()
            ours.close()

    def _listen(self, ours: Connection, process: Any) -> None:
        deadline: float | None = None
        while self.place < len(self.tasks) and not self._skips():
            left = _TELL_EVERY if deadline is None else deadline - time.monotonic()
            if left <= 0:
                limit = self.store.limits.seconds
                self._finish({"kind": "too_slow", "message": f"took more than {limit:g} s"})
                return
            if not wait([ours], min(left, _TELL_EVERY)):
                self._tell()
                continue
            try:
                kind, content = ours.recv()
            except (EOFError, ConnectionError):
                process.join()
                self._finish(_death(process.exitcode))
                return
            if kind == "begins" and self.store.limits.seconds is not None:
                deadline = time.monotonic() + self.store.limits.seconds
            self._hear(kind, content)

    def _hear(self, kind: str, content: Any) -> None:
        """Take in one message of the process about the point in hand."""
        task = self.tasks[self.place]
        if kind in MEASURED:
            task.sections[kind] = content
            return
        take: dict[str, Callable[[Any], None]] = {
            "begins": lambda _: None,
            "measures": self._tell,
            "note": task.notes.append,
            "ends": self._finish,
        }
        take[kind](content)

    def _tell(self, doing: str | None = None) -> None:
        """Say what is measured, by default still the same, and how far the walk is."""
        self.doing = doing or self.doing
        done = sum(self.costs[: self.place]) / sum(self.costs)
        self.progress.update(done, f"{self.tasks[self.place].point}, {self.doing}")

    def _finish(self, error: Mapping[str, Any] | None) -> None:
        """Write the record of the point in hand and go on to the next."""
        task = self.tasks[self.place]
        written = self.store.write(task, error, self.limit)
        self.place += 1
        self.failures += error is not None
        self.progress.console.print(
            f"  {task.point}: {describe(written)}", highlight=False, markup=False, soft_wrap=True
        )
        if error_kind(written) in ENDS:
            self.reason = self.reason or reason_to_skip(written)


def _count(task: Task) -> None:
    point = task.point
    if fixed := _fixed_size(point.config):
        task.notes.append(
            f"{fixed} works for one size only: made anew for each, with other weights"
        )
    if "flops" not in point.what:
        return
    try:
        counted = subjects.count(point.scope, point.config, point.mode)
    except Exception as error:
        # A mechanism that cannot run on the meta device may well be measured.
        task.notes.append(f"FLOPs not counted: {type(error).__name__}: {error}")
        return
    if counted is None:
        task.notes.append("FLOPs not counted: the training of a detector depends on the image")
        return
    task.sections["flops"] = counted


def _fixed_size(config: RunConfig) -> str:
    """The mechanism of a row that works for one image size only, if there is one."""
    names = config.model.attention.split(",")
    stages = parse(config.model.arch, names[0] if len(names) == 1 else names)
    return next(
        (s.attention for s in stages if getattr(attentions.find(s.attention), "fixed_size", False)),
        "",
    )


def _memory_limit(limits: Limits, point: Point) -> int | None:
    if point.config.device.startswith("cuda"):
        return None
    free = machine.free_memory()
    if limits.memory is not None or free is None:
        return limits.memory
    return int(_SHARE_OF_FREE * free)


def _death(code: int | None) -> dict[str, Any]:
    """The error of a point whose process died."""
    if code == _KILLED:
        return {
            "kind": "out_of_memory",
            "message": "the process was killed, as systems do that run out of memory",
        }
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return {"kind": "error", "message": f"the process ended with {how}"}


def describe(point: Record) -> str:
    """What a point cost, or why it is not known, in a line."""
    mode = point.config["sweep"]["mode"]
    error = point.error or {}
    parts = [f"{error['kind'].replace('_', ' ')}: {error['message']}"] if error else []
    if point.flops:
        parts.append(f"{point.flops['total'] / 1e9:,.2f} G multiply-adds")
    if point.memory:
        parts.append(f"{point.memory[mode] / 1e6:,.0f} MB")
    if point.latency:
        parts.append(f"{point.latency[mode]['median'] * 1e3:,.1f} ms")
    return ", ".join(parts)
