"""Files that appear whole or not at all, and what the system says of them."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from bench import cgroups
from bench.errors import InputError


def write_whole(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all, and make it survive a power cut.

    Args:
        path: the file; its folder is made where it is missing, a file that is there is replaced.
        content: text (UTF-8, with escapes for the bytes of a path that are not), bytes, or a
            function that writes to the open file.

    Raises:
        InputError: where it cannot be written; a file that is there already stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch turns a failed write into a RuntimeError of its own.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {reason(error)}") from error


def check_writable(folder: Path) -> None:
    """Make the folder of --output, before anything is done that could then not be written.

    Raises:
        InputError: where that is not possible, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise InputError(
            f"--output {folder} cannot be written: {reason(error)}; name another folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: Exception) -> str:
    """Return why a file could not be read or written, without its name.

    torch hides the error of a failed write behind one of its own.
    """
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "strerror", None):
        cause = cause.__cause__ or cause.__context__
    return getattr(cause, "strerror", None) or " ".join(str(error).split())


def usable_cores() -> float:
    """Return the number of cores that this process may use, a fraction where a quota leaves one."""
    there = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    allowed = cgroups.quota()
    if allowed is None or allowed >= there:
        return there
    return int(allowed) if allowed.is_integer() else round(allowed, 3)


def cores() -> int:
    """Return how many processes or threads the usable cores are enough for, at least one."""
    return max(1, int(usable_cores()))
