"""What groups of Linux that hold this process, such as a container's, leave it; cgroups v1 and v2.

This module imports no torch, so that records can say it anywhere.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")


def quota() -> float | None:
    """Return how many cores' time the groups allow, of all of them the least; None for no limit."""
    found = [_quota(folder) for folder in _folders("cpu")]
    return min((share for share in found if share is not None), default=None)


def throttled() -> int | None:
    """Return in how many periods so far a quota was used up, for which processes had to wait.

    The difference of two readings says whether that happened between them.
    """
    found = None
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):
            for line in (folder / "cpu.stat").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "nr_throttled":
                    found = (found or 0) + int(value)
    return found


def memory_left() -> int | None:
    """Return how many bytes the groups leave, of all of them the least; "max" means no limit."""
    return min((limit - used for limit, used in _memory()), default=None)


def memory_limit() -> int | None:
    """Return how many bytes the groups allow, of all of them the least; None for no limit."""
    return min((limit for limit, _ in _memory()), default=None)


def _memory() -> Iterator[tuple[int, int]]:
    """Bytes that each group may use, and uses; "max" means no limit, in v1 a very large number."""
    for folder in _folders("memory"):
        for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with suppress(OSError, ValueError):
                limit, used = ((folder / f"memory.{name}").read_text("ascii") for name in names)
                yield int(limit), int(used)


def _folders(controller: str) -> list[Path]:
    """The process's own group and those above it, in v1 and v2.

    A container may see its own group as the topmost one, under whatever path the process has.
    """
    found = []
    with suppress(OSError, ValueError):
        for line in _OF_PROCESS.read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            # The one line of v2 names no controller.
            if not names or controller in names.split(","):
                top, own = _ROOT / (controller if names else ""), Path(path.lstrip("/"))
                found += [top / group for group in (own, *own.parents)]
    return found


def _quota(folder: Path) -> float | None:
    """Of one group, whose file of v2 has both numbers."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        files = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
        if (folder / "cpu.max").exists():
            files = [folder / "cpu.max"]
        allowed, period = map(int, " ".join(f.read_text(encoding="ascii") for f in files).split())
        return allowed / period if allowed > 0 else None
    return None
