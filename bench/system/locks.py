"""One process at a time: locks of the system, which end with the process that has them."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FOREVER = -1.0

log = logging.getLogger(__name__)


class HeldError(RuntimeError):
    """Another process has the lock.

    Attributes:
        holder: which one and since when, as far as it said so.
    """

    def __init__(self, path: Path) -> None:
        self.holder = _holder(path)
        super().__init__(f"{path} is locked by {self.holder}")


@contextmanager
def locked(path: Path, *, patience: float = FOREVER) -> Iterator[None]:
    """Have the lock at `path`, a file that says who has it.

    It stays, unless the caller removes it as the last thing that is done under the lock.

    Where the file system has no locks, that is logged and the caller goes on without one.

    Args:
        patience: seconds to wait for another process that has it.

    Raises:
        HeldError: where another process still has it then.
        OSError: where the file cannot be made.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.parent)
    # A lock that is a file's mere existence would outlive a killed process.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise HeldError(path) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            raise
        log.warning("%s: the file system has no locks; let no other process write there", path)
    try:
        if lock.is_locked:
            _sign(path)
        yield
    finally:
        lock.release()


def _sign(path: Path) -> None:
    """Say who has the lock, for those who wait for it; it holds without."""
    with suppress(OSError):
        path.write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            ),
            encoding="utf-8",
        )


def _holder(path: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It has it since a moment ago, or the system lets nobody else read it.
        return "another process"
