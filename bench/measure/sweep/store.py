"""The records of a sweep, and what is left to measure."""

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.errors import InputError
from bench.measure.sweep.points import SUITE, Point, Walk
from bench.model.build import model_section
from bench.record import Record
from bench.system.devices import make_fabric

# How much larger a limit must be for what failed under it to be tried again.
_RAISED = 1.1
ENDS = {"out_of_memory": "ran out of memory", "too_slow": "was too slow"}
_FINAL = (*ENDS, "skipped")


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


def unfinished(walk: Walk, store: "Store") -> list[Task]:
    """What is left to do of a walk; after a point that ended it, there is nothing to measure."""
    tasks = []
    skipped = ""
    for point in walk:
        known = store.records.get(point.key)
        if known is not None and store.ends_walk(known):
            skipped = skipped or reason_to_skip(known)
        elif known is None or not (
            known.status == "done" or (skipped and error_kind(known) in _FINAL)
        ):
            tasks.append(Task(point, skipped))
    return tasks


def reason_to_skip(known: Record) -> str:
    """Why the points larger than this one are skipped."""
    size = "x".join(map(str, known.config["profile"]["image_size"]))
    return f"larger than {size}, which {ENDS[error_kind(known)]}"


def error_kind(known: Record) -> str:
    return str((known.error or {}).get("kind"))


class Store:
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
