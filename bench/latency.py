"""Wall-clock time of a call: warmed up until stable, synchronised, as raw samples.

A sample is one call between two synchronisations of the device, so it holds all that the call did
there. Medians and quartiles are reported, not means: other work on a machine only ever adds time.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

UNIT = "s"
# The spread (interquartile range / median) up to which a median is worth comparing.
LARGEST_SPREAD = 0.1
# The difference between the medians of the first and the last third of samples, likewise.
LARGEST_DRIFT = 0.1
# Warm-up ends when the median of this many calls differs from that of as many before by less.
_WARM_UP_WINDOW = 3
_WARM_UP_CHANGE = 0.05
_FEWEST_FOR_DRIFT = 9


@dataclass(frozen=True)
class Latency:
    """Seconds a call took.

    Attributes:
        samples: seconds of each call, in the order of measurement.
        median: of the samples.
        q1: first quartile.
        q3: third quartile.
        stable: whether warm-up settled, and spread and drift are small.
        notes: what makes the numbers doubtful, in words; a loaded machine among it.
        warm_up: calls before the first sample.
        device: where it ran.
        unit: "s".
    """

    samples: tuple[float, ...]
    median: float
    q1: float
    q3: float
    stable: bool
    notes: tuple[str, ...]
    warm_up: int
    device: str
    unit: str = UNIT

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0

    def overlaps(self, other: "Latency") -> bool:
        """Whether the interquartile ranges meet, so that neither can be called faster."""
        return self.q1 <= other.q3 and other.q1 <= self.q3


def measure(
    fn: Callable[[], object],
    *,
    device: torch.device | str,
    min_repeats: int = 10,
    min_seconds: float = 1.0,
    max_repeats: int = 1000,
    max_warm_up: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[], float | None] | None = None,
) -> Latency:
    """Time `fn`: at least `min_repeats` calls and `min_seconds`, at most `max_repeats` calls.

    Args:
        fn: the work; it may leave work queued on the device.
        device: where it runs; synchronised before and after each call.
        min_repeats: fewest samples.
        min_seconds: samples add up to at least this, within `max_repeats`.
        max_repeats: most samples.
        max_warm_up: most calls before the first sample.
        clock: seconds from any origin; for tests.
        load: busy processes for each core, or None where unknown; for tests.

    Raises:
        ValueError: for fewer than two repeats, or contradicting bounds.
    """
    measured = interleaved(
        {"": fn},
        device=device,
        min_repeats=min_repeats,
        min_seconds=min_seconds,
        max_repeats=max_repeats,
        max_warm_up=max_warm_up,
        clock=clock,
        load=load,
    )
    return measured[""]


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    min_repeats: int = 10,
    min_seconds: float = 1.0,
    max_repeats: int = 1000,
    max_warm_up: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[], float | None] | None = None,
) -> dict[str, Latency]:
    """Time several calls in rounds, one call of each a round, so that drift hits all alike.

    All are warmed up first, then rounds go on until each has `min_repeats` samples that add up to
    `min_seconds`, or `max_repeats`. Every other round runs backwards, so that none is always the
    one after the same other. Arguments and errors as for `measure`.
    """
    if not 2 <= min_repeats <= max_repeats:
        raise ValueError(
            f"min_repeats {min_repeats} must be at least 2 and at most max_repeats {max_repeats}"
        )
    if min_seconds < 0 or max_warm_up < 1:
        raise ValueError(
            f"min_seconds {min_seconds} must not be negative and max_warm_up {max_warm_up} positive"
        )
    if not fns:
        return {}
    device = torch.device(device)
    load = machine_load if load is None else load
    # Read now: while measuring, this process is part of the load.
    busy = load()
    warm = {name: _warm_up(fn, device, max_warm_up, clock) for name, fn in fns.items()}
    samples: dict[str, list[float]] = {name: [] for name in fns}
    order = list(fns)
    while len(samples[order[0]]) < max_repeats and any(
        len(times) < min_repeats or sum(times) < min_seconds for times in samples.values()
    ):
        for name in order:
            samples[name].append(_time(fns[name], device, clock))
        order.reverse()
    return {
        name: _summarise(tuple(times), warm=warm[name], busy=busy, device=device)
        for name, times in samples.items()
    }


def machine_load() -> float | None:
    """Runnable processes for each core over the last minute; None where the system cannot tell."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


@dataclass(frozen=True)
class _WarmUp:
    calls: int
    settled: bool


def _warm_up(
    fn: Callable[[], object], device: torch.device, most: int, clock: Callable[[], float]
) -> _WarmUp:
    times: list[float] = []
    while len(times) < most:
        times.append(_time(fn, device, clock))
        if len(times) < 2 * _WARM_UP_WINDOW:
            continue
        new = statistics.median(times[-_WARM_UP_WINDOW:])
        old = statistics.median(times[-2 * _WARM_UP_WINDOW : -_WARM_UP_WINDOW])
        if abs(new - old) <= _WARM_UP_CHANGE * old:
            return _WarmUp(len(times), settled=True)
    return _WarmUp(len(times), settled=False)


def _time(fn: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    _synchronise(device)
    start = clock()
    fn()
    _synchronise(device)
    return clock() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summarise(
    samples: Sequence[float], *, warm: _WarmUp, busy: float | None, device: torch.device
) -> Latency:
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    doubts = []
    if not warm.settled:
        doubts.append(f"still changing after {warm.calls} warm-up calls")
    if q3 - q1 > LARGEST_SPREAD * median:
        spread = (q3 - q1) / median if median else math.inf
        doubts.append(f"large spread: interquartile range is {spread:.0%} of the median")
    drift = _drift(samples)
    if abs(drift) > LARGEST_DRIFT:
        doubts.append(f"drift: the last third differs by {drift:+.0%} from the first")
    notes = list(doubts)
    if busy is not None and busy > 1:
        notes.append(f"loaded machine: {busy:.1f} runnable processes for each core")
    return Latency(
        samples=tuple(samples),
        median=median,
        q1=q1,
        q3=q3,
        stable=not doubts,
        notes=tuple(notes),
        warm_up=warm.calls,
        device=str(device),
    )


def _drift(samples: Sequence[float]) -> float:
    """Change of the median from the first to the last third, as a share; 0 for a few samples."""
    if len(samples) < _FEWEST_FOR_DRIFT:
        return 0.0
    third = len(samples) // 3
    first, last = statistics.median(samples[:third]), statistics.median(samples[-third:])
    return (last - first) / first if first else 0.0
