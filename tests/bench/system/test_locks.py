"""One process at a time: who has a lock is said, and a killed process leaves none behind."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest

from bench.system import locks
from tests.bench.data.test_generated import digests

ROOT = Path(__file__).parents[3]
HOLD = (
    "import pathlib, sys, time; from bench.system import locks\n"
    "with locks.locked(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(600)\n"
)
GENERATE = (
    "import sys; from bench.data.generated import generate\n"
    "sys.stdin.readline(); generate(sys.argv[1], train_images=40, val_images=2)\n"
)


@contextmanager
def holder(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has the lock at `path`, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lock_that_another_process_has_names_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "row.lock"
    with holder(path) as process:
        with pytest.raises(locks.LockedError) as caught, locks.locked(path, timeout=0.1):
            pass
        assert caught.value.holder.startswith(f"process {process.pid} on ")
        # A refusal leaves what the holder said.
        with pytest.raises(locks.LockedError, match=f"process {process.pid} on "):
            locks.locked(path, timeout=0).__enter__()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_in_any_way_leaves_no_lock(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "row.lock"
    with holder(path) as process:
        os.kill(process.pid, number)
        process.wait()
        with locks.locked(path, timeout=0):
            assert str(os.getpid()) in path.read_text()


def test_who_does_not_say_who_it_is_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "row.lock"
    with holder(path):
        path.write_text("{")
        with pytest.raises(locks.LockedError, match="locked by another process"):
            locks.locked(path, timeout=0).__enter__()


def test_without_locks_in_the_file_system_it_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with locks.locked(tmp_path / "row.lock"):
        pass
    assert "the file system has no locks" in caplog.text


def test_processes_that_generate_the_same_data_at_once_make_it_once(tmp_path: Path) -> None:
    def start(root: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", GENERATE, str(root)]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)

    alone = start(tmp_path / "alone")
    alone.communicate("\n")
    together = [start(tmp_path / "together") for _ in range(3)]
    for process in together:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in together:
        process.communicate()
    assert [process.returncode for process in (alone, *together)] == [0] * 4
    assert digests(tmp_path / "together") == digests(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]
