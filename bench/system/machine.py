"""What else the machine does, and how fast its clocks run; None where the system does not say."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

from bench import cgroups, record

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")
# Fields of a line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
_WORKING = (0, 1, 2, 5, 6, 7)
# Of glibc's `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let the CPU keep the memory of freed tensors for the next ones, as CUDA's allocator does.

    glibc gives tensors of more than 32 MB back to the system when they are freed, and to touch each
    page of the next one anew takes longer than much of the arithmetic: costs of large images would
    grow faster than their work. An allocator that the environment chose is left alone.
    """
    if record.allocator() == record.MEMORY_KEPT:
        with suppress(AttributeError, OSError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_TRIM_THRESHOLD, -1)
            mallopt(_M_MMAP_MAX, 0)


def load() -> float | None:
    """Runnable processes for each core, this one among them, over the last minute."""
    try:
        return os.getloadavg()[0] / cores()
    except (AttributeError, OSError):
        return None


def cores() -> int:
    """Cores of the machine."""
    return os.cpu_count() or 1


def other_cpu_seconds() -> float | None:
    """Core-seconds that all but this process have used since the machine started.

    The difference of two readings says how many cores others kept busy between them.
    """
    with suppress(OSError, ValueError, AttributeError, IndexError):
        fields = (_PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        everything = sum(int(fields[place]) for place in _WORKING) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return everything - own.user - own.system
    return None


def clock_mhz(device: torch.device) -> float | None:
    """The clock of a GPU, or of the fastest core now: the one that was just busy, in MHz."""
    if device.type == "cuda":
        # torch asks NVML, whose Python package need not be there.
        with suppress(ImportError, RuntimeError):
            return float(torch.cuda.clock_rate(device))
        return None
    with suppress(OSError, ValueError):
        found = [int(path.read_text()) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
        if found:
            return max(found) / 1000
        lines = (_PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        speeds = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        return max(speeds, default=None)
    return None


def temperature(device: torch.device) -> int | None:
    """Of a GPU, in degrees Celsius."""
    if device.type == "cuda":
        with suppress(ImportError, RuntimeError):
            return int(torch.cuda.temperature(device))
    return None


def free_memory() -> int | None:
    """Bytes of main memory that this process and its children can still take."""
    free = [_available(), cgroups.memory_left()]
    return min((size for size in free if size is not None), default=None)


def _available() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
