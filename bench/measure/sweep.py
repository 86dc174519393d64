"""FLOPs, memory and latency against resolution: planned, measured, recorded, resumed.

A point is one mechanism at one size, in one mode, at one batch size; it becomes one record. The
points of a mechanism, mode and batch size make a walk from the smallest image up, in a fresh
process of its own (`worker`): if it dies, for want of memory for one, nothing else is harmed, and
what was measured before is kept. A walk ends at the first point that runs out of memory or of time;
its larger points are recorded as skipped.

Multiply-adds need no device and are counted for skipped points too.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attentions
from bench import record
from bench.config.schema import MODES, SWEPT, RunConfig
from bench.config.sources import sources_of
from bench.config.suites import SIZED, made_for_one_size, profile_configs
from bench.measure.costs import effort, flops_of_one
from bench.measure.worker import Worker
from bench.model.build import model_section
from bench.record import Record, error_section
from bench.system import machine
from bench.system.devices import device_name, make_fabric
from bench.system.progress import SuiteProgress

SUITE = "sweep"
MEASURED = ("memory", "latency")
ENDS = {"out_of_memory": "ran out of memory", "too_slow": "was too slow"}
# How much larger a limit must be for what failed under it to be tried again.
_RAISED = 1.1
# The free memory that a walk may use where no limit is given; the rest keeps the machine alive.
_SHARE_OF_FREE = 0.9
# A slow call is warm after its second, and three samples tell its median well enough.
_WARM_UP_SECONDS = 2.0

Size = tuple[int, int]


@dataclass(frozen=True)
class Point:
    """One mechanism at one size, in one mode, at one batch size.

    Attributes:
        config: the row with image size and batch size, as `bench.run.runner` takes it.
        scope: one of `bench.config.schema.SCOPES`.
        mode: "inference" or "training".
        what: some of SWEPT.
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

    @property
    def measured(self) -> list[str]:
        """What is not counted."""
        return [quantity for quantity in MEASURED if quantity in self.what]

    def values(self) -> dict[str, Any]:
        """The whole configuration, for the record."""
        own = {"scope": self.scope, "mode": self.mode, "what": list(self.what)}
        return {**self.config.as_dict(), "sweep": own}

    @property
    def key(self) -> str:
        """Of the record: a hash of what the numbers depend on, of the machine if measured."""
        values = self.values()
        data, train = values["data"], values["train"]
        named = ("row", "seed", "device", "model", "profile", "sweep")
        sources = {s.name: s.sha256 for s in sources_of(self.config.model)}
        return record.key(
            {name: values[name] for name in named}
            | ({"sources": sources} if sources else {})
            | {"path": data["path"], "fixed_size": data["fixed_size"]}
            | {"precision": train["precision"]}
            | ({"machine": _machine(self.config.device)} if self.measured else {})
        )

    def __str__(self) -> str:
        return "x".join(map(str, self.size))


Walk = tuple[Point, ...]
"""Points that differ in their size alone, the smallest first."""


def _machine(device: str) -> dict[str, Any]:
    """What measurements on a device depend on."""
    kind = torch.device(device)
    name = record.cpu() if kind.type == "cpu" else device_name(kind)
    own = (
        {"threads": torch.get_num_threads(), "allocator": record.allocator()}
        if kind.type == "cpu"
        else {"threads": None}
    )
    return {"name": name, **own, "torch": torch.__version__}


def plan(
    names: Sequence[str],
    *,
    sizes: Sequence[Size],
    batch_sizes: Sequence[int] = (1,),
    modes: Sequence[str] = MODES,
    scope: str = "backbone",
    what: Sequence[str] = SWEPT,
    backbone: str = "tiny",
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Walk, ...]:
    """Return the walks of a sweep.

    Every module is made for the size that it is measured at, so that mechanisms that know one size
    only take part as well.

    Args:
        names: as `profile_configs` takes them, but "all" for every mechanism once.
        sizes: (height, width) of images in pixels.
        batch_sizes: images in a batch.
        modes: some of MODES.
        scope: one of `bench.config.schema.SCOPES`.
        what: some of SWEPT.
        backbone: one of `configs/backbones.yaml`.
        values: nested configuration values besides.
        overrides: `key=value`.

    Raises:
        InputError: as `profile_configs`, and for a device that is not there.
    """
    every = [one for name in names for one in (attentions.names() if name == "all" else [name])]
    ordered = sorted(dict.fromkeys(sizes), key=lambda size: (size[0] * size[1], size))
    found: dict[tuple[str, int], list[RunConfig]] = {}
    for batch_size in dict.fromkeys(batch_sizes):
        for size in ordered:
            for config in profile_configs(
                every,
                backbone=backbone,
                image_size=size,
                values=_with(values or {}, size, batch_size),
                overrides=overrides,
                used=SIZED,
            ):
                device = make_fabric(config).device.type
                named = config.device if ":" in config.device else device
                config = replace(config, suite=SUITE, device=named)
                found.setdefault((config.row, batch_size), []).append(config)
    return tuple(
        tuple(Point(config, scope, mode, tuple(what)) for config in configs)
        for configs in found.values()
        for mode in modes
    )


def _with(values: Mapping[str, Any], size: Size, batch_size: int) -> dict[str, Any]:
    return {
        **values,
        "data": {**values.get("data", {}), "fixed_size": list(size)},
        "profile": {**values.get("profile", {}), "batch_size": batch_size},
    }


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


@dataclass
class Task:
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
    record.check_output(output, SUITE)
    store = Store(output / record.RECORDS, limits, command)
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

    def __init__(self, tasks: Sequence[Task], store: "Store", progress: SuiteProgress) -> None:
        self.tasks, self.store, self.progress = tasks, store, progress
        self.worker: Worker | None = None
        self.limit: int | None = None

    def run(self) -> None:
        """Write a record of each task."""
        for task in self.tasks:
            self.progress.update(0.0, f"counting {task.point}")
            _count(task)
        reason, failures = "", 0
        try:
            for task in self.tasks:
                error = self._error(task, reason or task.skipped)
                written = self.store.write(task, error, self.limit)
                failures += error is not None
                if error_kind(written) in ENDS:
                    reason = reason or reason_to_skip(written)
                self.progress.console.print(
                    f"  {task.point}: {describe(written)}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
        finally:
            self._close()
        failed = f", {failures} not measured" if failures else ""
        self.progress.finish_row(f"{len(self.tasks)} points{failed}")

    def _error(self, task: Task, skipped: str) -> Mapping[str, Any] | None:
        """Measure a point, and return what ended that, if anything did."""
        if not task.point.measured:
            return None
        if skipped:
            return {"kind": "skipped", "message": skipped}
        try:
            self._measure(task)
        except TimeoutError:
            self._close()
            limit = self.store.limits.seconds
            return {"kind": "too_slow", "message": f"took more than {limit:g} s"}
        except Exception as error:
            # Whatever it is, it is this point's and goes into its record.
            section = error_section(error)
            self._close()
            return section
        return None

    def _measure(self, task: Task) -> None:
        """Fill the sections of a point, one after the other."""
        point, worker = task.point, self._ready(task.point)
        config, mode, seconds = point.config, point.mode, self.store.limits.seconds
        deadline = None if seconds is None else time.monotonic() + seconds

        def ask(doing: str, *question: Any) -> Any:
            self._tell(task, doing)
            return worker.ask(*question, deadline=deadline, waiting=lambda: self._tell(task, doing))

        ask("building", "build", config.as_dict(), point.scope, None)
        ran = ask("first call", "ran", mode)
        if "memory" in point.what:
            section, notes = ask("memory", "memory", (mode,), False)
            task.sections["memory"] = section
            task.notes += notes
        if "latency" in point.what:
            how = replace(effort(config), max_warm_up_seconds=_WARM_UP_SECONDS)
            found = ask("latency", "latency", (mode,), how)
            task.sections["latency"] = found | {
                "ran": {name: ran[name] for name in ("sdpa", "dtypes", "compiled")}
            }
        task.notes += ran["notes"]

    def _ready(self, point: Point) -> Worker:
        """The process of this walk, a new one where there is none."""
        if self.worker is None:
            self.limit = _memory_limit(self.store.limits, point)
            self.worker = Worker(threads=torch.get_num_threads(), memory_limit=self.limit)
            # A point's time does not begin before the process is there.
            self.worker.ask("ready")
        return self.worker

    def _close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _tell(self, task: Task, doing: str) -> None:
        """Say what is measured; most costs are about linear in the pixels."""
        pixels = [other.point.pixels for other in self.tasks]
        done = sum(pixels[: self.tasks.index(task)]) / sum(pixels)
        self.progress.update(done, f"{task.point}, {doing}")


def _count(task: Task) -> None:
    point = task.point
    if fixed := made_for_one_size(point.config):
        task.notes.append(
            f"{fixed} works for one size only: made anew for each, with other weights"
        )
    if "flops" not in point.what:
        return
    try:
        counted = flops_of_one(point.scope, point.config, point.mode)
    except Exception as error:
        # A mechanism that cannot run on the meta device may well be measured.
        task.notes.append(f"FLOPs not counted: {type(error).__name__}: {error}")
        return
    if counted is None:
        task.notes.append("FLOPs not counted: the training of a detector depends on the image")
        return
    task.notes += counted["notes"]
    task.sections["flops"] = counted


def _memory_limit(limits: Limits, point: Point) -> int | None:
    if point.config.device.startswith("cuda"):
        return None
    free = machine.free_memory()
    if limits.memory is not None or free is None:
        return limits.memory
    return int(_SHARE_OF_FREE * free)


def describe(point: Record) -> str:
    """What a point cost, or why it is not known, in a line."""
    mode = point.config["sweep"]["mode"]
    error = point.error or {}
    parts = [f"{error['kind'].replace('_', ' ')}: {error['message']}"] if error else []
    if point.flops:
        least = "≥ " if point.flops.get("uncounted") else ""
        parts.append(f"{least}{point.flops['total'] / 1e9:,.2f} G multiply-adds")
    if point.memory and point.memory[mode] is not None:
        parts.append(f"{point.memory[mode] / 1e6:,.0f} MB")
    if point.latency:
        parts.append(f"{point.latency[mode]['median'] * 1e3:,.1f} ms")
    parts += [note for note in point.notes if "not measured" in note]
    return ", ".join(parts)


def unfinished(walk: Walk, store: "Store") -> list[Task]:
    """What is left to do of a walk; after a point that ended it, there is nothing to measure."""
    tasks = []
    skipped = ""
    for point in walk:
        known = store.records.get(point.key)
        if known is not None and store.ends_walk(known):
            skipped = skipped or reason_to_skip(known)
        elif known is None or not (
            known.status == "done" or (skipped and error_kind(known) in (*ENDS, "skipped"))
        ):
            tasks.append(Task(point, skipped))
    return tasks


def reason_to_skip(known: Record) -> str:
    """Why the points larger than this one are skipped."""
    size = "x".join(map(str, known.config["profile"]["image_size"]))
    return f"larger than {size}, which {ENDS[error_kind(known)]}"


def error_kind(known: Record) -> str:
    """The kind of a record's error, or "None"."""
    return str((known.error or {}).get("kind"))


class Store:
    """The records of a sweep, by key, in memory and on disk."""

    def __init__(self, folder: Path, limits: Limits, command: Sequence[str]) -> None:
        self.folder = folder
        self.limits = limits
        self.command = command
        known = record.newest(record.read_all(folder.glob("*.json")))
        self.records = {one.key: one for one in known}

    def ends_walk(self, known: Record) -> bool:
        """Whether a point failed for a limit that is not larger now."""
        before = known.environment.get("limits") or {}
        limit = {"out_of_memory": "memory", "too_slow": "seconds"}.get(error_kind(known))
        if limit is None:
            return False
        now, then = getattr(self.limits, limit), before.get(limit)
        if limit == "memory" and now is None:
            # Free memory comes and goes; only a limit that was asked for is a reason to try again.
            return True
        return then is not None and now is not None and now <= _RAISED * then

    def write(self, task: Task, error: Mapping[str, Any] | None, limit: int | None) -> Record:
        """Write the record of a point, done or failed."""
        point = task.point
        config = point.config
        device = make_fabric(config).device
        model = model_section(config)
        if point.scope != "detector":
            model |= {"method": "none", "library": "none"}
        written = record.of_run(
            config,
            key=point.key,
            error=error,
            config=point.values(),
            environment={
                **record.environment(command=self.command, device=device_name(device)),
                "threads": torch.get_num_threads(),
                "limits": {"memory": limit, "seconds": self.limits.seconds},
            },
            model=model,
            notes=task.notes,
            **task.sections,
        )
        record.write(written, self.folder)
        self.records[written.key] = written
        return written
