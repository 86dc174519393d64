"""FLOPs, memory and latency against resolution: planned, measured, recorded, resumed.

A point is one mechanism at one size, in one mode, at one batch size; it becomes one record. The
points of a mechanism, mode and batch size make a walk from the smallest image up, in a fresh
process of its own, which reports each measurement when it has it: if it dies, for want of memory
for one, nothing else is harmed, and what it had reported is kept. A walk ends at the first point
that runs out of memory or of time; its larger points are recorded as skipped.

Multiply-adds need no device and are counted for skipped points too.
"""

import contextlib
import datetime
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attentions
from bench import latency, machine, memory, record, subjects
from bench.arch import parse
from bench.backends import what_ran
from bench.config import RunConfig, build_config, profile_configs
from bench.errors import InputError
from bench.latency import Effort
from bench.progress import SuiteProgress
from bench.record import Record
from bench.runner import error_section, make_fabric, model_section
from bench.workload import timing_section

SUITE = "sweep"
MODES = ("inference", "training")
QUANTITIES = ("flops", "memory", "latency")
_MEASURED = ("memory", "latency")
# A slow call is warm after its second, and three samples tell its median well enough.
_WARM_UP_SECONDS = 2.0
# The free memory that a walk may use where no limit is given; the rest keeps the machine alive.
_SHARE_OF_FREE = 0.9
# How much larger a limit must be for what failed under it to be tried again.
_RAISED = 1.1
_KILLED = -signal.SIGKILL
# Seconds after which a silent process is no reason for a silent display.
_TELL_EVERY = 5.0
# What libraries say that get no memory under a limit, oneDNN the first two.
_NO_MEMORY = (
    "could not create a primitive",
    "could not create a memory",
    "bad_alloc",
    "annot allocate memory",
)
_ENDS = {"out_of_memory": "ran out of memory", "too_slow": "was too slow"}
_FINAL = (*_ENDS, "skipped")

Size = tuple[int, int]


@dataclass(frozen=True)
class Limits:
    """What a point may use.

    Attributes:
        memory: bytes that the process may take above what it has after its start, on the CPU; None
            for most of what is free then. A GPU is its own limit.
        seconds: of all measurements of a point; None for no limit.
    """

    memory: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Point:
    """One mechanism at one size, in one mode, at one batch size.

    Attributes:
        config: the row with image size and batch size, as `bench.runner` takes it.
        scope: one of `bench.subjects.SCOPES`.
        mode: "inference" or "training".
        what: some of QUANTITIES.
    """

    config: RunConfig
    scope: str
    mode: str
    what: tuple[str, ...]

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        height, width = self.config.profile.image_size
        return height, width

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.size[0] * self.size[1]

    def values(self) -> dict[str, Any]:
        """The whole configuration, for the record."""
        own = {"scope": self.scope, "mode": self.mode, "what": list(self.what)}
        return {**self.config.as_dict(), "sweep": own}

    @property
    def key(self) -> str:
        """Of the record: a hash of what the numbers depend on."""
        values = self.values()
        data, train = values["data"], values["train"]
        named = ("row", "seed", "device", "model", "profile", "sweep")
        return record.key(
            {name: values[name] for name in named}
            | {"path": data["path"], "fixed_size": data["fixed_size"]}
            | {"precision": train["precision"]}
        )

    def __str__(self) -> str:
        return "x".join(map(str, self.size))


Walk = tuple[Point, ...]
"""Points that differ in their size alone, the smallest first."""


def plan(
    names: Sequence[str],
    *,
    sizes: Sequence[Size],
    batch_sizes: Sequence[int] = (1,),
    modes: Sequence[str] = MODES,
    scope: str = "backbone",
    what: Sequence[str] = QUANTITIES,
    backbone: str = "tiny",
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Walk, ...]:
    """Return the walks of a sweep.

    Every module is made for the size that it is measured at, so that mechanisms that know one size
    only take part as well.

    Args:
        names: as `bench.config.profile_configs` takes them, but "all" for every mechanism once.
        sizes: (height, width) of images in pixels.
        batch_sizes: images in a batch.
        modes: some of MODES.
        scope: one of `bench.subjects.SCOPES`.
        what: some of QUANTITIES.
        backbone: one of `configs/backbones.yaml`.
        values: nested configuration values besides.
        overrides: `key=value`.

    Raises:
        InputError: as `profile_configs`, and for a device that is not there.
    """
    every = [one for name in names for one in (attentions.names() if name == "all" else [name])]
    ordered = sorted(dict.fromkeys(sizes), key=lambda size: (size[0] * size[1], size))
    walks = []
    found: dict[tuple[str, int], list[RunConfig]] = {}
    for batch_size in dict.fromkeys(batch_sizes):
        for size in ordered:
            for config in profile_configs(
                every,
                backbone=backbone,
                image_size=size,
                values=_with(values or {}, size, batch_size),
                overrides=overrides,
            ):
                device = make_fabric(config).device.type
                named = config.device if ":" in config.device else device
                config = replace(config, suite=SUITE, device=named)
                found.setdefault((config.row, batch_size), []).append(config)
    for configs in found.values():
        walks += [
            tuple(Point(config, scope, mode, tuple(what)) for config in configs) for mode in modes
        ]
    return tuple(walks)


def _with(values: Mapping[str, Any], size: Size, batch_size: int) -> dict[str, Any]:
    return {
        **values,
        "data": {**values.get("data", {}), "fixed_size": list(size)},
        "profile": {**values.get("profile", {}), "batch_size": batch_size},
    }


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
    store = _Store(output / "records", limits, command)
    todo = [(walk, tasks) for walk in walks if (tasks := _tasks(walk, store))]
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


@dataclass
class _Task:
    """A point that has no final record, and what is known of it so far.

    Attributes:
        point: the point.
        skipped: why it is not to be measured, or nothing.
        sections: of its record.
        notes: of its record.
    """

    point: Point
    skipped: str
    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _tasks(walk: Walk, store: "_Store") -> list[_Task]:
    """What is left to do of a walk; after a point that ended it, there is nothing to measure."""
    tasks = []
    skipped = ""
    for point in walk:
        known = store.records.get(point.key)
        if known is not None and store.ends_walk(known):
            skipped = skipped or _why(known)
        elif known is None or not (known.status == "done" or (skipped and _kind(known) in _FINAL)):
            tasks.append(_Task(point, skipped))
    return tasks


def _why(known: Record) -> str:
    """Why the points larger than this one are skipped."""
    size = "x".join(map(str, known.config["profile"]["image_size"]))
    return f"larger than {size}, which {_ENDS[_kind(known)]}"


def _kind(known: Record) -> str:
    return str((known.error or {}).get("kind"))


class _Store:
    """The records of a sweep, by key, in memory and on disk."""

    def __init__(self, folder: Path, limits: Limits, command: Sequence[str]) -> None:
        self.folder = folder
        self.limits = limits
        self.command = command
        self.records: dict[str, Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
        for path in sorted(folder.glob("*.json")):
            # What is no record is the report's to warn of.
            with contextlib.suppress(InputError):
                self._remember(record.read(path))

    def _remember(self, one: Record) -> None:
        known = self.records.get(one.key)
        if known is None or (known.status == "done", known.created) <= (
            one.status == "done",
            one.created,
        ):
            self.records[one.key] = one

    def ends_walk(self, known: Record) -> bool:
        """Whether a point failed for a limit that is not larger now."""
        before = known.environment.get("limits") or {}
        limit = {"out_of_memory": "memory", "too_slow": "seconds"}.get(_kind(known))
        if limit is None:
            return False
        now, then = getattr(self.limits, limit), before.get(limit)
        if limit == "memory" and now is None:
            # Free memory comes and goes; only a limit that was asked for is a reason to try again.
            return True
        return then is not None and now is not None and now <= _RAISED * then

    def write(self, task: _Task, error: Mapping[str, Any] | None, limit: int | None) -> Record:
        """Write the record of a point, done or failed."""
        point = task.point
        config = point.config
        device = make_fabric(config).device
        model = model_section(config)
        if point.scope != "detector":
            model |= {"method": "none", "library": "none"}
        written = Record(
            suite=SUITE,
            row=config.row,
            key=point.key,
            status="failed" if error else "done",
            error=error,
            created=datetime.datetime.now(datetime.UTC).isoformat(),
            seed=config.seed,
            config=point.values(),
            environment={
                **record.environment(command=self.command, device=_device_name(device)),
                "threads": torch.get_num_threads(),
                "limits": {"memory": limit, "seconds": self.limits.seconds},
            },
            model=model,
            notes=task.notes,
            **task.sections,
        )
        record.write(written, self.folder)
        self._remember(written)
        return written


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


class _Walker:
    """Measures the tasks of one walk, from the smallest up, in as many processes as it takes."""

    def __init__(self, tasks: Sequence[_Task], store: _Store, progress: SuiteProgress) -> None:
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
        if not any(quantity in self.tasks[0].point.what for quantity in _MEASURED):
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
            args=(theirs, [_job(task.point) for task in tasks], self.limit),
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
        if kind in _MEASURED:
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
        if _kind(written) in _ENDS:
            self.reason = self.reason or _why(written)


def _count(task: _Task) -> None:
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


@dataclass(frozen=True)
class _Job:
    """A point as it travels to the process that measures it."""

    values: Mapping[str, Any]
    scope: str
    mode: str
    what: tuple[str, ...]


def _job(point: Point) -> _Job:
    return _Job(point.config.as_dict(), point.scope, point.mode, point.what)


def measure_points(
    connection: Connection, jobs: Sequence[_Job], limit: int | None, *, threads: int
) -> None:
    """Measure points and send each result; runs in a process of its own.

    Args:
        connection: gets pairs (kind, content). Of each point: ("begins", None), some of
            ("measures", a word), ("note", text), ("memory", section), ("latency", section), then
            ("ends", None or the error section).
        jobs: the points, the smallest first; it stops at one that runs out of memory.
        limit: bytes that the process may take from now on, or None.
        threads: for torch.
    """
    # Ctrl-C reaches the whole group; what is in hand ends when the process that listens does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if limit is not None:
        _limit_memory(limit)
    for job in jobs:
        connection.send(("begins", None))
        error: dict[str, Any] | None = None
        try:
            _measure_point(job, lambda *message: connection.send(message))
        except Exception as caught:
            # Whatever it is, it is this point's and goes into its record.
            error = error_section(caught)
            if limit is not None and any(word in error["message"] for word in _NO_MEMORY):
                error["kind"] = "out_of_memory"
        connection.send(("ends", error))
        if error is not None and error["kind"] == "out_of_memory":
            return


def _measure_point(job: _Job, send: Callable[[str, Any], None]) -> None:
    config = build_config(job.values)
    profile = config.profile
    send("measures", "building")
    subject = subjects.make(job.scope, config)
    device = make_fabric(config).device
    call = subject.call(job.mode)
    send("measures", "first call")
    # The first call also makes what stays, such as the state of the optimiser.
    ran = what_ran(call, device=device)
    common = {
        "device": str(device),
        "batch_size": profile.batch_size,
        "image_size": list(profile.image_size),
        "precision": config.train.precision,
    }
    if "memory" in job.what:
        send("measures", "memory")
        peak = memory.peak(call, device=device, live=subject.live(job.mode))
        found = {"before": peak.before, "reserved": peak.reserved, "device": peak.device}
        modes = dict.fromkeys(MODES) | {job.mode: peak.bytes}
        send("memory", {"unit": "bytes", **common, "kind": peak.kind, **found, **modes})
    if "latency" in job.what:
        send("measures", "latency")
        effort = Effort(
            min_repeats=profile.repeats,
            min_seconds=profile.seconds,
            max_warm_up_seconds=_WARM_UP_SECONDS,
        )
        timing = latency.measure(call, device=device, effort=effort)
        section = {
            "unit": latency.UNIT,
            **common,
            "threads": torch.get_num_threads(),
            "notes": list(timing.notes),
            "ran": {"sdpa": dict(ran.sdpa), "dtypes": list(ran.dtypes), "compiled": ran.compiled},
        }
        send("latency", section | dict.fromkeys(MODES) | {job.mode: timing_section(timing)})
    for note in ran.notes:
        send("note", note)


def _limit_memory(limit: int) -> None:
    """Let this process take `limit` bytes more than it holds in memory now.

    The system limits addresses, of which libraries reserve more than they use; what is reserved
    now does not count.
    """
    try:
        import resource
    except ImportError:
        # No such limit on Windows: there the system has to say no.
        return
    with contextlib.suppress(OSError, ValueError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[:1]
        reserved = int(pages[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = reserved + limit
        if soft == resource.RLIM_INFINITY or wanted < soft:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
