"""A process that holds one workload and answers questions about it, one after the other.

What is measured in it has seen nothing else. If it dies, for want of memory for one, that is an
error of the one question, and nothing else is harmed.
"""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.config.suites import build_config
from bench.measure import costs, energy, workload
from bench.measure.backends import what_ran
from bench.measure.latency import Call, Effort, Sample, Timed, WarmUp, synchronize
from bench.record import error_section

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

# Windows has no such signal.
_KILLED = -getattr(signal, "SIGKILL", 9)
# Seconds after which the display moves on although a process is silent.
_TELL_EVERY = 5.0
# What libraries say that get no memory under a limit, oneDNN the first two.
_NO_MEMORY = (
    "could not create a primitive",
    "could not create a memory",
    "bad_alloc",
    "annot allocate memory",
)


class WorkerError(RuntimeError):
    """An error in another process; its cause is the traceback there.

    Attributes:
        kind: one of `bench.record.ERROR_KINDS`.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A fresh process, to be asked what the methods of `Server` answer.

    Args:
        threads: for torch.
        memory_limit: bytes that the process may take above what it has after its start.
    """

    def __init__(self, *, threads: int, memory_limit: int | None = None) -> None:
        context = _context()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, memory_limit), daemon=True
        )
        self._process.start()
        theirs.close()
        # Core-seconds that the process had used when it last answered.
        self.cpu_seconds = 0.0

    def ask(
        self,
        question: str,
        *arguments: Any,
        deadline: float | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> Any:
        """Return the answer of `Server`.

        Args:
            question: name of a method.
            deadline: of `time.monotonic`.
            waiting: called now and then.

        Raises:
            WorkerError: for an error there, or if the process died.
            TimeoutError: at the deadline; the process is of no use then.
        """
        try:
            self._connection.send((question, arguments))
            self._wait(deadline, waiting)
            answer, error, self.cpu_seconds = self._connection.recv()
        except (EOFError, ConnectionError) as lost:
            self._process.join()
            raise _death(self._process.exitcode) from lost
        if error is not None:
            raise WorkerError(error["message"], error["kind"]) from RuntimeError(error["traceback"])
        return answer

    def _wait(self, deadline: float | None, waiting: Callable[[], None] | None) -> None:
        left = _TELL_EVERY
        while not self._connection.poll(left):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            if waiting is not None:
                waiting()
            if deadline is not None:
                left = max(0.0, min(_TELL_EVERY, deadline - time.monotonic()))

    def timed(self, mode: str) -> Timed:
        """Return the call of a mode, to be timed in rounds with those of others."""
        return Timed(
            warm_up=functools.partial(self.ask, "warm_up", mode),
            sample=functools.partial(self.ask, "sample"),
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


class Server:
    """What runs in a worker: one workload, and the methods that answer questions about it."""

    def __init__(self) -> None:
        self._workload: Any = None
        self._call: Any = None

    def ready(self) -> None:
        """Nothing but that the process has started."""

    def count(
        self, values: Mapping[str, Any], device: str
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """What a configuration costs without running it; see `costs.counted`."""
        return costs.counted(build_config(values), device=device)

    def build(
        self, values: Mapping[str, Any], scope: str, root: Path | None, stage: int = 1
    ) -> dict[str, Any]:
        """Build the workload of a configuration, in the place of the one before.

        Returns:
            `Workload.conditions`.
        """
        self._workload = self._call = None
        gc.collect()
        self._workload = workload.build(build_config(values), scope, root=root, stage=stage)
        conditions: dict[str, Any] = self._workload.conditions
        return conditions

    def ran(self, mode: str) -> dict[str, Any]:
        """What ran in a call; `bench.measure.backends.Ran` as plain values."""
        call = self._workload.call(mode)
        return dataclasses.asdict(what_ran(call, device=self._workload.fabric.device))

    def memory(self, modes: Sequence[str], by_part: bool) -> tuple[dict[str, Any], list[str]]:
        """The `memory` section, and notes on it."""
        return costs.measure_memory(self._workload, modes, by_part=by_part)

    def latency(self, modes: Sequence[str], effort: Effort) -> dict[str, Any]:
        """The `latency` section of the workload alone."""
        return costs.measure_latency(self._workload, modes, effort)

    def energy(self, mode: str) -> dict[str, Any]:
        """Energy of a call, `bench.measure.energy.Energy` as plain values, or why there is none."""
        device = self._workload.fabric.device
        call = self._workload.call(mode)
        try:
            counter = energy.counter(device)
            wait = functools.partial(synchronize, device)
            return dataclasses.asdict(energy.measure(call, counter, synchronize=wait))
        except energy.NotAvailableError as error:
            return {"not_available": str(error)}

    def warm_up(self, mode: str, effort: Effort) -> WarmUp:
        """Make ready for samples of a mode."""
        self._call = Call(self._workload.call(mode), self._workload.fabric.device)
        found: WarmUp = self._call.warm_up(effort)
        return found

    def sample(self) -> Sample:
        """Time one call of the mode that was made ready."""
        found: Sample = self._call.sample()
        return found

    def parts(self, mode: str, effort: Effort) -> dict[str, dict[str, float]]:
        """Latency of the parts of a detector."""
        return costs.part_latencies(self._workload, mode, effort)

    def phases(self, effort: Effort) -> dict[str, dict[str, float]]:
        """Latency of the phases of a training step."""
        return costs.phase_latencies(self._workload, effort)


@functools.cache
def _context() -> "ForkServerContext | SpawnContext":
    """How workers start: from a process that has imported what they need and done nothing else.

    Importing takes seconds for each worker otherwise. Not where a fork after imports is not safe.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.measure.forked_from", __name__])
    return context


def _serve(connection: Connection, threads: int, limit: int | None) -> None:
    """Answer until the other side is gone; runs in a process of its own."""
    # Ctrl-C reaches the whole group; what is in hand ends when the process that asks does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if limit is not None:
        _limit_memory(limit)
    server = Server()
    while True:
        try:
            question, arguments = connection.recv()
        except EOFError:
            return
        answer, failed = None, None
        try:
            answer = getattr(server, question)(*arguments)
        except Exception as error:
            # Whatever it is, it is an answer.
            failed = error_section(error)
            if limit is not None and any(word in failed["message"] for word in _NO_MEMORY):
                failed["kind"] = "out_of_memory"
        used = os.times()
        connection.send((answer, failed, used.user + used.system))


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


def _death(code: int | None) -> WorkerError:
    if code == _KILLED:
        return WorkerError(
            "the process was killed, as systems do that run out of memory", "out_of_memory"
        )
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return WorkerError(f"the process ended with {how}", "error")
