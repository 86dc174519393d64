"""Energy of a call, from the counter of a GPU (NVML) or of a processor (RAPL), idle taken off.

Counters are read over windows of seconds: they advance in steps of up to a tenth of one. What the
machine takes while nothing of ours runs is measured before, and taken off; a machine that others
use in between has that in the number.

NVML: docs.nvidia.com/deploy/nvml-api, nvmlDeviceGetTotalEnergyConsumption. RAPL: kernel.org,
Documentation/power/powercap.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

UNIT = "J"
SECONDS, IDLE_SECONDS = 5.0, 2.0
_POWERCAP = Path("/sys/class/powercap")


class NotAvailableError(RuntimeError):
    """There is no counter that can be read; the message says why."""


@dataclass(frozen=True)
class Counter:
    """A counter of energy.

    Attributes:
        source: what it counts.
        joules: its value now, from any origin.
    """

    source: str
    joules: Callable[[], float]


@dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Attributes:
        joules: of a call, without what the machine takes idle.
        idle_watts: what it takes idle.
        calls: how many were made.
        seconds: that they took together.
        source: what was counted.
    """

    joules: float
    idle_watts: float
    calls: int
    seconds: float
    source: str
    unit: str = UNIT


def measure(
    call: Callable[[], object],
    counter: Counter,
    *,
    synchronize: Callable[[], object] = lambda: None,
    seconds: float = SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Energy:
    """Return the energy of `call`, repeated for a window of seconds.

    Args:
        call: what is measured; it may leave work queued on the device.
        counter: of the device.
        synchronize: waits for that work.
        seconds: the window, at least one call.
        idle_seconds: the window before it in which nothing runs.
        clock, sleep: for tests.
    """
    synchronize()
    start, before = clock(), counter.joules()
    sleep(idle_seconds)
    idle = (counter.joules() - before) / max(clock() - start, 1e-9)
    calls = 0
    start, before = clock(), counter.joules()
    while not calls or clock() - start < seconds:
        call()
        synchronize()
        calls += 1
    took = clock() - start
    joules = (counter.joules() - before - idle * took) / calls
    return Energy(max(0.0, joules), idle, calls, took, counter.source)


def counter(device: torch.device, *, root: Path = _POWERCAP) -> Counter:
    """Return the counter of a device; on the CPU that of all packages of the machine.

    Raises:
        NotAvailableError: where there is none, or this process may not read it.
    """
    return _nvml(device) if device.type == "cuda" else _rapl(root)


def _rapl(root: Path) -> Counter:
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not zones:
        raise NotAvailableError("this machine shows no RAPL counter")
    read = [_zone(zone) for zone in zones]
    return Counter("RAPL, processor packages", lambda: sum(joules() for joules in read))


def _zone(zone: Path) -> Callable[[], float]:
    """Return what reads a zone; its counter begins anew at a limit."""

    def micro(name: str) -> int:
        try:
            return int((zone / name).read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            raise NotAvailableError(f"RAPL cannot be read: {error}") from error

    limit, total, last = micro("max_energy_range_uj"), 0, micro("energy_uj")

    def joules() -> float:
        nonlocal total, last
        now = micro("energy_uj")
        total += now - last if now >= last else now - last + limit
        last = now
        return total / 1e6

    return joules


def _nvml(device: torch.device) -> Counter:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise NotAvailableError(f"NVML is not here: {error}") from error
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
    # Known by its UUID: CUDA counts devices in an order of its own, and may see some alone.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

    def joules() -> float:
        read = library.nvmlDeviceGetTotalEnergyConsumption
        code = read(handle, ctypes.byref(value))
        if code:
            raise NotAvailableError(f"NVML does not count this GPU's energy (code {code})")
        return value.value / 1e3

    for code in (
        library.nvmlInit_v2(),
        library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)),
    ):
        if code:
            raise NotAvailableError(f"NVML cannot be read (code {code})")
    joules()
    return Counter("NVML, the whole GPU", joules)
