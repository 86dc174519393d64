"""The rows of a suite side by side: as processes of this machine, or as jobs of Slurm.

Every job is the command that a person would type for its row, so that it resumes as that does.
"""

import importlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.files import cores
from bench.system import processes as launch
from bench.system.interrupt import EXIT_CODE

SUBMITIT_INSTALL = "pip install '.[slurm]'"
_POLL = 0.2


@dataclass(frozen=True)
class Job:
    """A row and its command.

    Attributes:
        log: where its output goes.
    """

    row: str
    command: tuple[str, ...]
    log: Path


def run_local(jobs: Sequence[Job], *, count: int, devices: int, say: Callable[[str], None]) -> int:
    """Run `jobs`, `count` at a time, and return 0, or the first exit code that is not 0.

    Each takes its share of the cores, or `devices` GPUs of its own where there are GPUs.
    """
    waiting, free = list(jobs), list(range(count))
    running: dict[subprocess.Popen[bytes], tuple[Job, int, float]] = {}
    codes: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []
    with launch.PassedOn(processes) as passed_on:
        while running or (waiting and not passed_on.received):
            while waiting and free and not passed_on.received:
                job, slot = waiting.pop(0), free.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("ab") as file:
                    environment = _share(slot, count, devices)
                    process = launch.start(job.command, environment, file.fileno())
                processes.append(process)
                running[process] = job, slot, time.monotonic()
                say(f"{job.row}: started, output in {job.log}")
            for process in [process for process in running if process.poll() is not None]:
                job, slot, since = running.pop(process)
                free.append(slot)
                codes.append(process.returncode)
                took = time.monotonic() - since
                outcome = "done" if process.returncode == 0 else _last_line(job.log)
                say(f"[{len(codes)}/{len(jobs)}] {job.row}: {outcome} in {took:.0f} s")
            if passed_on.received > 1:
                for process in running:
                    process.kill()
            time.sleep(_POLL)
    if passed_on.received:
        return EXIT_CODE
    return next((code for code in codes if code), 0)


class SlurmJob:
    """What a job does: run its command, and be requeued when the cluster takes its place.

    submitit calls `checkpoint` when the job is about to end.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.folder = tuple(command), folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        self._process = launch.start(self.command, {})
        code = self._process.wait()
        if code not in (0, 1):
            raise RuntimeError(f"{' '.join(self.command)} ended with exit code {code}")
        return code

    def checkpoint(self) -> Any:
        """End the run, which then leaves a checkpoint, and ask to be queued again."""
        submitit = _submitit()
        if self._process is not None:
            self._process.terminate()
            # Not its `wait`, which the call that this interrupts is in, and holds a lock of.
            with suppress(ChildProcessError):
                os.waitpid(self._process.pid, 0)
        return submitit.helpers.DelayedSubmission(SlurmJob(self.command, self.folder))


def submit(
    jobs: Sequence[Job],
    *,
    folder: Path,
    devices: int,
    options: Mapping[str, Any],
    cluster: str | None = None,
) -> list[Any]:
    """Submit a job for each row through submitit and return its handles.

    Args:
        folder: where submitit keeps what it needs and what the jobs print.
        devices: GPUs of each job.
        options: parameters of submitit's executor, such as slurm_partition or timeout_min.
        cluster: "local" runs the jobs on this machine; None takes Slurm.

    Raises:
        InputError: where submitit is not importable, there is no Slurm, or an option is unknown.
    """
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster or "slurm")
        executor.update_parameters(name="vil-bench", timeout_min=7 * 24 * 60)
        if (cluster or "slurm") == "slurm":
            executor.update_parameters(gpus_per_node=devices, tasks_per_node=1)
        executor.update_parameters(**options)
    except (RuntimeError, TypeError, ValueError, NameError) as error:
        raise InputError(f"--launcher slurm: {' '.join(str(error).split())}") from error
    return [executor.submit(SlurmJob(job.command, folder)) for job in jobs]


def slurm_options(text: str | None) -> dict[str, Any]:
    """`slurm_partition=gpu,timeout_min=60` -> a dictionary; whole numbers become numbers.

    Raises:
        InputError: for a part that is no key=value.
    """
    options: dict[str, Any] = {}
    for part in (text or "").split(","):
        name, equals, value = part.strip().partition("=")
        if not part.strip():
            continue
        if not equals or not name.isidentifier():
            raise InputError(
                f"--slurm {text}: {part!r} is no key=value, for example slurm_partition=gpu"
            )
        options[name] = int(value) if value.isdigit() else value
    return options


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise InputError(
            f"--launcher slurm needs submitit, which is not importable ({error}); install it with:"
            f" {SUBMITIT_INSTALL}"
        ) from error


def _share(slot: int, count: int, devices: int) -> dict[str, str]:
    """The part of the machine that the job in a slot has."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = visible.split(",") if visible else [str(number) for number in range(_gpus())]
    if not listed:
        return {"OMP_NUM_THREADS": threads}
    own = [listed[(slot * devices + place) % len(listed)] for place in range(devices)]
    return {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(own)}


def _gpus() -> int:
    torch = importlib.import_module("torch")
    return int(torch.cuda.device_count())


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"failed, {lines[-1].strip()}" if lines else "failed"
