"""What measures the points of a walk, in a process of its own."""

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.config.schema import MODES
from bench.config.suites import build_config
from bench.measure import latency, memory, subjects
from bench.measure.backends import what_ran
from bench.measure.latency import Effort
from bench.measure.sweep.points import Point
from bench.measure.workload import timing_section
from bench.record import error_section
from bench.system.devices import make_fabric

MEASURED = ("memory", "latency")
# A slow call is warm after its second, and three samples tell its median well enough.
_WARM_UP_SECONDS = 2.0
# What libraries say that get no memory under a limit, oneDNN the first two.
_NO_MEMORY = (
    "could not create a primitive",
    "could not create a memory",
    "bad_alloc",
    "annot allocate memory",
)


@dataclass(frozen=True)
class Job:
    """A point as it travels to the process that measures it."""

    values: Mapping[str, Any]
    scope: str
    mode: str
    what: tuple[str, ...]

    @classmethod
    def of(cls, point: Point) -> "Job":
        """That of a point."""
        return cls(point.config.as_dict(), point.scope, point.mode, point.what)


def measure_points(
    connection: Connection, jobs: Sequence[Job], limit: int | None, *, threads: int
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


def _measure_point(job: Job, send: Callable[[str, Any], None]) -> None:
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
