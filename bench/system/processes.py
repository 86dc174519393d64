"""Processes: those that share one run, and those that do the rows of a suite side by side.

One run over several processes is started by torchrun, by Slurm's srun, or by `spawn` here, which
`run_all.py --devices N` uses. This module imports no torch.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from bench.errors import InputError
from bench.files import cores
from bench.system.interrupt import EXIT_CODE, SIGNALS

# A process of several failed while the others went on: they cannot, and are started anew.
ABANDONED = 3
_WATCHED = "BENCH_ENDS_WITH_ITS_PARENT"
_STARTED_FIRST = "BENCH_STARTED_FIRST"
_SHARED_CORES = "BENCH_SHARED_CORES"
_GRACE = 60.0
# Seconds in which processes that fail for the same reason all report it.
_TOGETHER = 15.0
_POLL = 0.1


@dataclass(frozen=True)
class World:
    """The processes that share a run.

    Attributes:
        rank: which one this is, of `size`.
        local_rank: which one on this machine, of `local_size`.
        launcher: what started them: "none", "torchrun", "slurm" or "spawn".
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"

    @property
    def is_first(self) -> bool:
        """Whether this process writes records, checkpoints and progress."""
        return self.rank == 0


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Return the processes that this one belongs to, as its launcher says in the environment.

    Raises:
        InputError: where that is not understood.
    """
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    }
    launcher = "slurm" if "SLURM_STEP_NUM_TASKS" in environment else "none"
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launcher = "torchrun"
    if launcher == "none":
        return World()
    try:
        rank, size, local_rank, local_size = (int(environment[name]) for name in names[launcher])
        if launcher == "slurm":
            local_size = size // int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the environment of {launcher} is not understood: {error}; it needs whole numbers in"
            f" {', '.join(names[launcher])}"
        ) from error
    if size == 1:
        return World()
    if "TORCHELASTIC_RUN_ID" not in environment and launcher == "torchrun":
        launcher = "spawn"
    return World(rank, size, local_rank, local_size, launcher)


def spawn(command: Sequence[str], count: int) -> int:
    """Run `command` in `count` processes of one world and return the exit code of them all.

    The first that fails ends the others. Ctrl-C and SIGTERM are passed on, and the processes have
    time to finish what they do; a second one ends them at once.
    """
    first = datetime.now(UTC).isoformat(timespec="seconds")
    again: dict[str, str] = {}
    while True:
        port = _free_port()
        processes = [
            start(
                command,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    # With all cores each, the processes would wait for one another.
                    **_threads(count),
                    **again,
                },
            )
            for rank in range(count)
        ]
        code = _wait(processes)
        if code != ABANDONED:
            return code
        again = {_STARTED_FIRST: first}


def _threads(count: int) -> dict[str, str]:
    """Threads of each of `count` processes, unless the user has set them."""
    if os.environ.get("OMP_NUM_THREADS"):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // count)), _SHARED_CORES: "1"}


def forget_world() -> None:
    """Go on as one process, after the others of its world were done."""
    own = world()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        os.environ.pop(name, None)
    if own.launcher == "spawn" and os.environ.pop(_SHARED_CORES, ""):
        os.environ.pop("OMP_NUM_THREADS", None)


def started_first(environment: Mapping[str, str] = os.environ) -> str | None:
    """When `spawn` began, UTC, ISO 8601, in processes that it started anew; else None."""
    return environment.get(_STARTED_FIRST)


def start(
    command: Sequence[str], environment: Mapping[str, str], output: int | None = None
) -> "subprocess.Popen[bytes]":
    """Start a process that ends when this one does, however that ends.

    It has a session of its own, so that Ctrl-C reaches it through this process alone.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **environment, _WATCHED: "1"},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def end_with_parent() -> None:
    """In a process that `start` started: end when the one that did is gone."""
    if os.environ.pop(_WATCHED, None) is None:
        return

    def watch() -> None:
        with suppress(OSError, ValueError):
            os.read(0, 1)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, daemon=True).start()


class PassedOn:
    """While it is entered, SIGINT and SIGTERM go to `processes` instead of this process."""

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        self.processes = processes
        self.received = 0
        self.since = 0.0

    def __enter__(self) -> "PassedOn":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        self.since = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait for all; once one fails, end the others, which then wait for it in vain."""
    deadline: float | None = None
    first_code = 0
    with PassedOn(processes) as passed_on:
        while any(process.poll() is None for process in processes):
            failed = [p.returncode for p in processes if p.poll()]
            if passed_on.received and deadline is None:
                deadline = passed_on.since + _GRACE
            if failed and deadline is None:
                first_code = failed[0]
                wait = 0.0 if first_code == ABANDONED else _TOGETHER
                deadline = time.monotonic() + wait
            if passed_on.received > 1 or (deadline is not None and time.monotonic() > deadline):
                for process in processes:
                    if process.poll() is None:
                        process.kill()
            time.sleep(_POLL)
    if passed_on.received:
        return EXIT_CODE
    codes = [process.returncode for process in processes]
    if ABANDONED in codes:
        # What the others ended with is that this one was gone.
        return ABANDONED
    code = first_code or next((code for code in codes if code), 0)
    if code >= 0:
        return code
    print(
        f"one of {len(processes)} processes was ended by {signal.Signals(-code).name}; the same"
        " command continues",
        file=sys.stderr,
    )
    return 128 - code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def this_command(arguments: Sequence[str]) -> list[str]:
    """`run_all.py` with `arguments`, in this interpreter."""
    script = Path(__file__).resolve().parents[2] / "run_all.py"
    return [sys.executable, str(script), *arguments]


@dataclass(frozen=True)
class Job:
    """A row and its command.

    Attributes:
        log: where its output goes.
    """

    row: str
    command: tuple[str, ...]
    log: Path


def run_local(jobs: Sequence[Job], *, count: int, devices: int, log: Callable[[str], None]) -> int:
    """Run `jobs`, `count` at a time, and return 0, or the first exit code that is not 0.

    Each takes its share of the cores, or `devices` GPUs of its own where there are GPUs.
    """
    waiting, free = list(jobs), list(range(count))
    running: dict[subprocess.Popen[bytes], tuple[Job, int, float]] = {}
    codes: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []
    with PassedOn(processes) as passed_on:
        while running or (waiting and not passed_on.received):
            while waiting and free and not passed_on.received:
                job, slot = waiting.pop(0), free.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("ab") as file:
                    environment = _share(slot, count, devices)
                    process = start(job.command, environment, file.fileno())
                processes.append(process)
                running[process] = job, slot, time.monotonic()
                log(f"{job.row}: started, output in {job.log}")
            for process in [process for process in running if process.poll() is not None]:
                job, slot, since = running.pop(process)
                free.append(slot)
                codes.append(process.returncode)
                took = time.monotonic() - since
                outcome = "done" if process.returncode == 0 else _last_line(job.log)
                log(f"[{len(codes)}/{len(jobs)}] {job.row}: {outcome} in {took:.0f} s")
            if passed_on.received > 1:
                for process in running:
                    process.kill()
            time.sleep(_POLL)
    if passed_on.received:
        return EXIT_CODE
    return next((code for code in codes if code), 0)


def _share(slot: int, count: int, devices: int) -> dict[str, str]:
    """The part of the machine that the job in a slot has."""
    threads = _threads(count)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = visible.split(",") if visible else [str(number) for number in range(_gpus())]
    if not listed:
        return threads
    own = [listed[(slot * devices + place) % len(listed)] for place in range(devices)]
    return threads | {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def _gpus() -> int:
    torch = importlib.import_module("torch")
    return int(torch.cuda.device_count())


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"failed, {lines[-1].strip()}" if lines else "failed"
