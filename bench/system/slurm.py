"""The rows of a suite as jobs of Slurm, through submitit.

Every job is the command that a person would type for its row, so that it resumes as that does.
"""

import io
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from bench.config.values import assigned
from bench.errors import InputError, import_optional
from bench.system import processes
from bench.system.processes import Job

SUBMITIT_INSTALL = "pip install '.[slurm]'"


class SlurmJob:
    """What a job does: run its command, and be requeued when the cluster takes its place.

    submitit calls `checkpoint` when the job is about to end.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.folder = tuple(command), folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        self._process = processes.start(self.command, {})
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
    gpus: int,
    options: Mapping[str, Any],
    cluster: str | None = None,
) -> list[Any]:
    """Submit a job for each row through submitit and return its handles.

    Without jobs it only says what is wrong with the options.

    Args:
        folder: where submitit keeps what it needs and what the jobs print.
        gpus: GPUs of each job; none are asked for where it is 0.
        options: parameters of submitit's executor, such as slurm_partition or timeout_min.
        cluster: "local" runs the jobs on this machine; None takes Slurm.

    Raises:
        InputError: where submitit is not importable, there is no Slurm, an option is unknown, or
            Slurm refuses a job.
    """
    submitit = _submitit()
    cluster = cluster or "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name="vil-bench", timeout_min=7 * 24 * 60)
        if cluster == "slurm":
            executor.update_parameters(
                tasks_per_node=1, **({"gpus_per_node": gpus} if gpus else {})
            )
        executor.update_parameters(**options)
        # submitit repeats there what sbatch says, which is in its error too.
        with redirect_stderr(io.StringIO()):
            return [executor.submit(SlurmJob(job.command, folder)) for job in jobs]
    except (OSError, RuntimeError, TypeError, ValueError, NameError, AssertionError) as error:
        # submitit asserts the type of an option.
        raise InputError(f"--launcher slurm: {_reason(error)}") from error


def read_options(text: str | None) -> dict[str, Any]:
    """`slurm_partition=gpu,timeout_min=60` -> a dictionary; values are read as those of settings.

    Raises:
        InputError: for a part that is not key=value.
    """
    try:
        return assigned(part.strip() for part in (text or "").split(",") if part.strip())
    except InputError as error:
        raise InputError(f"--slurm {text}: {error}") from error


def _submitit() -> Any:
    return import_optional("submitit", "--launcher slurm needs submitit, which", SUBMITIT_INSTALL)


def _reason(error: Exception) -> str:
    """What went wrong, in one line: what sbatch said, where it was sbatch that refused."""
    said = str(error)
    refused = [line for line in said.splitlines() if line.startswith("sbatch: error:")]
    return " ".join(" ".join(refused or [said]).split())
