"""Wall-clock time of a call: warmed up until stable, synchronised, as raw samples.

A sample is one call between two synchronisations of the device, so it holds all that the call did
there; on CUDA the time between two events on the device around the call is kept beside it. Medians
and quartiles are reported, not means: other work on a machine only ever adds time.

`torch.utils.benchmark` measures one statement after the other, each in blocks of many calls; here
several calls take turns, one call of each a round, so that drift of the machine hits all alike.
"""

import math
import statistics
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench import cgroups
from bench.files import usable_cores
from bench.system import machine

UNIT = "s"
# The spread (interquartile range / median) up to which a median is worth comparing.
LARGEST_SPREAD = 0.1
# The difference between the medians of the first and the last third of samples, likewise.
LARGEST_DRIFT = 0.1
# How far a clock may fall while measuring, as a share, before it is said.
LARGEST_CLOCK_DROP = 0.1
# The chance that the true median lies outside of its interval.
ERROR = 0.05
# Warm-up ends when the median of this many calls differs from that of as many before by less.
_WARM_UP_WINDOW = 3
_WARM_UP_CHANGE = 0.05
_FEWEST_FOR_DRIFT = 9
# A core that others use for less than this share of the time is free.
_FREE_CORE = 0.25
# What others may keep busy although they leave enough cores, in cores and as a share of them: with
# a training beside it a call shares caches, memory and clock.
_QUIET_CORES, _QUIET_SHARE = 0.5, 0.1
_SECONDS_BETWEEN_CLOCKS = 0.5
# How many times over a call has had its effort when it is left out of further rounds.
_AMPLE = 10


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        min_repeats: fewest samples of each call.
        min_seconds: the samples of each call add up to at least this, within `max_repeats`.
        max_repeats: most samples of each call.
        max_warm_up: most calls before the first sample.
        max_warm_up_seconds: warm-up ends after the second call once it has taken this long.

    Raises:
        ValueError: for fewer than two repeats, or contradicting bounds.
    """

    min_repeats: int = 10
    min_seconds: float = 1.0
    max_repeats: int = 1000
    max_warm_up: int = 20
    max_warm_up_seconds: float = math.inf

    def __post_init__(self) -> None:
        if not 2 <= self.min_repeats <= self.max_repeats:
            raise ValueError(
                f"min_repeats {self.min_repeats} must be at least 2 and at most max_repeats"
                f" {self.max_repeats}"
            )
        if self.min_seconds < 0 or self.max_warm_up < 1 or self.max_warm_up_seconds < 0:
            raise ValueError(
                f"min_seconds {self.min_seconds} and max_warm_up_seconds"
                f" {self.max_warm_up_seconds} must not be negative and max_warm_up"
                f" {self.max_warm_up} must be positive"
            )

    def wants_more(self, samples: Sequence[float]) -> bool:
        """Whether so many samples, in seconds, are too few."""
        few = len(samples) < self.min_repeats or sum(samples) < self.min_seconds
        return few and len(samples) < self.max_repeats

    def is_ample(self, samples: Sequence[float]) -> bool:
        """Whether they are enough many times over, and others alone need more."""
        return len(samples) >= self.min_repeats and sum(samples) >= _AMPLE * self.min_seconds


@dataclass(frozen=True)
class Instruments:
    """What times are read from; others for tests.

    Attributes:
        clock: seconds from any origin.
        load: runnable processes for each core.
        others: core-seconds that other processes have used.
        throttled: periods in which a quota of cores was used up.
        clock_mhz: of the device.
    """

    clock: Callable[[], float] = time.perf_counter
    load: Callable[[], float | None] = machine.load
    others: Callable[[], float | None] = machine.other_cpu_seconds
    throttled: Callable[[], int | None] = cgroups.throttled
    clock_mhz: Callable[[torch.device], float | None] = machine.clock_mhz


@dataclass(frozen=True)
class Latency:
    """Seconds a call took.

    Attributes:
        samples: seconds of each call, in the order of measurement.
        median: of the samples.
        q1: first quartile.
        q3: third quartile.
        stable: whether warm-up settled, and spread and drift are small.
        notes: what makes the numbers doubtful, in words; a loaded machine, a used-up quota or a
            falling clock too.
        warm_up: calls before the first sample.
        device: where it ran.
        device_samples: seconds of each call between two events on the device; empty on the CPU.
        settled: whether warm-up did.
        noticed: of the notes, those on the machine.
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
    device_samples: tuple[float, ...] = ()
    settled: bool = True
    noticed: tuple[str, ...] = ()
    unit: str = UNIT

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true median lies; see `median_interval`."""
        return median_interval(self.samples)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return where the true median lies, but for a chance of ERROR, whatever the distribution.

    Of n samples, each is above the true median with probability 1/2. The interval reaches from the
    k-th smallest to the k-th largest, with the largest k that keeps the error; from the smallest to
    the largest where there are too few samples for that.
    """
    ordered, count = sorted(samples), len(samples)
    k, tail = 1, 1 + count
    # In whole numbers: 2 to the power of the samples may be too large for a float.
    while round(2 / ERROR) * tail <= 2**count:
        k += 1
        tail += math.comb(count, k)
    return ordered[k - 1], ordered[-k]


def groups(latencies: Mapping[str, Latency]) -> dict[str, str]:
    """Mark what cannot be told apart: two calls that share a letter may be equally fast.

    Two calls are told apart if the intervals of their medians do not meet. That is not transitive:
    where a and b cannot be told apart, nor b and c, c may still be slower than a. So a call may
    carry several letters, and nothing is merged: a is marked "a", b "ab" and c "b". The fastest
    carry an "a".

    The intervals hold for samples that are independent of each other; on a machine that others use,
    they come in phases, and differences may be marked that another hour would not show.
    """
    intervals = {name: timing.interval for name, timing in latencies.items()}
    # All intervals that hold one point meet each other; only where one ends can such a set be
    # complete.
    together: list[set[str]] = []
    for point in sorted(high for _, high in intervals.values()):
        members = {name for name, (low, high) in intervals.items() if low <= point <= high}
        if not any(members <= others for others in together):
            together.append(members)
    marks = [*string.ascii_letters, *(f"({i})" for i in range(len(together)))]
    return {
        name: "".join(
            mark for mark, members in zip(marks, together, strict=False) if name in members
        )
        for name in latencies
    }


def measure(
    fn: Callable[[], object],
    *,
    device: torch.device | str,
    effort: Effort | None = None,
    instruments: Instruments | None = None,
) -> Latency:
    """Time `fn` alone.

    Args:
        fn: the work; it may leave work queued on the device.
        device: where it runs; synchronised before and after each call.
        effort: how long to measure.
        instruments: for tests.
    """
    return interleaved({"": fn}, device=device, effort=effort, instruments=instruments)[""]


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    effort: Effort | None = None,
    instruments: Instruments | None = None,
) -> dict[str, Latency]:
    """Time several calls in rounds, one call of each a round, so that drift hits all alike.

    All are warmed up first, then rounds go on until each has had the effort; what has had it ten
    times over is left out of the next ones. Every other round runs backwards, so that none is
    always the one after the same other. Arguments as for `measure`.
    """
    effort = effort or Effort()
    instruments = instruments or Instruments()
    device = torch.device(device)
    calls = {name: Call(fn, device, instruments.clock) for name, fn in fns.items()}
    timed = {name: Timed(call.warm_up, call.sample) for name, call in calls.items()}
    return rounds(timed, device=device, effort=effort, instruments=instruments)


@dataclass(frozen=True)
class Timed:
    """What can be timed in rounds: a call of this process, or of another.

    Attributes:
        warm_up: calls until the times settle, or the effort ends.
        sample: times one call.
    """

    warm_up: Callable[[Effort], "WarmUp"]
    sample: Callable[[], "Sample"]


def rounds(
    timed: Mapping[str, Timed],
    *,
    device: torch.device,
    effort: Effort,
    instruments: Instruments | None = None,
    lost: Callable[[str, Exception], None] | None = None,
) -> dict[str, Latency]:
    """Time what is in `timed` in rounds; see `interleaved`.

    Args:
        lost: receives the name and the error of what cannot be timed, which is then left out;
            without it the error is raised.
    """
    watch = _Watch(device, instruments or Instruments())
    warm: dict[str, WarmUp] = {}
    samples: dict[str, list[Sample]] = {}
    order = list(timed)

    def call(name: str) -> None:
        """Warm up, or take one sample."""
        try:
            if name not in warm:
                warm[name] = timed[name].warm_up(effort)
            else:
                samples[name].append(timed[name].sample())
        except Exception as error:
            if lost is None:
                raise
            lost(name, error)
            del samples[name]

    for name in timed:
        samples[name] = []
        call(name)
    backwards = False
    while any(effort.wants_more([one.wall for one in taken]) for taken in samples.values()):
        for name in sorted(samples, key=order.index, reverse=backwards):
            # A mask head would else be called as often as a layer of a thousandth of its time.
            if not effort.is_ample([one.wall for one in samples[name]]):
                call(name)
            watch.look()
        backwards = not backwards
    notes = watch.notes()
    return {
        name: _summarise(samples[name], warm=warm[name], notes=notes, device=device)
        for name in samples
    }


class _Watch:
    """Notices other processes, a quota and a falling clock while something is measured."""

    def __init__(self, device: torch.device, instruments: Instruments) -> None:
        self.device = device
        self.instruments = instruments
        # Read now: while measuring, this process is part of the load.
        self._load = instruments.load()
        self._others = instruments.others()
        self._throttled = instruments.throttled()
        self._start = instruments.clock()
        self._looked = -math.inf
        self._speeds: list[float | None] = []

    def look(self) -> None:
        """Read the clock of the device, now and then."""
        now = self.instruments.clock()
        if now - self._looked >= _SECONDS_BETWEEN_CLOCKS:
            self._looked = now
            self._speeds.append(self.instruments.clock_mhz(self.device))

    def notes(self) -> tuple[str, ...]:
        """What was noticed."""
        return (*self._contention(), *self._quota(), *self._throttling())

    def _contention(self) -> list[str]:
        others, seconds = self.instruments.others(), self.instruments.clock() - self._start
        if others is None or self._others is None:
            if self._load is not None and self._load > 1:
                return [f"loaded machine: {self._load:.1f} runnable processes for each core"]
            return []
        busy = (others - self._others) / seconds if seconds > 0 else 0.0
        needed = torch.get_num_threads() if self.device.type == "cpu" else 1
        available = machine.cores()
        quiet = max(_QUIET_CORES, _QUIET_SHARE * available)
        if busy <= min(quiet, available - needed + _FREE_CORE):
            return []
        return [f"loaded machine: others kept {busy:.1f} of {available} cores busy"]

    def _quota(self) -> list[str]:
        throttled = self.instruments.throttled()
        periods = 0 if throttled is None else throttled - (self._throttled or 0)
        if not periods:
            return []
        return [f"throttled: {usable_cores():g} cores' time was used up in {periods} periods"]

    def _throttling(self) -> list[str]:
        speeds = [speed for speed in self._speeds if speed]
        if not speeds or min(speeds) >= (1 - LARGEST_CLOCK_DROP) * max(speeds):
            return []
        heat = machine.temperature(self.device)
        at = "" if heat is None else f", at {heat} °C now"
        return [f"the clock went between {min(speeds):.0f} and {max(speeds):.0f} MHz{at}"]


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, and those between two events on a GPU."""

    wall: float
    on_device: float | None


@dataclass(frozen=True)
class WarmUp:
    """Calls before the first sample, and whether their times had settled."""

    calls: int
    settled: bool


class Call:
    """A call of this process, to be timed.

    Args:
        fn: the work.
        device: synchronised before and after.
        clock: seconds.
    """

    def __init__(
        self,
        fn: Callable[[], object],
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.fn, self.device, self.clock = fn, device, clock

    def warm_up(self, effort: Effort) -> WarmUp:
        """Call until the times settle, or `effort` ends."""
        times: list[float] = []
        while len(times) < effort.max_warm_up:
            times.append(self.sample().wall)
            out_of_time = len(times) > 1 and sum(times) >= effort.max_warm_up_seconds
            if len(times) < 2 * _WARM_UP_WINDOW and not out_of_time:
                continue
            window = min(_WARM_UP_WINDOW, len(times) // 2)
            new = statistics.median(times[-window:])
            old = statistics.median(times[-2 * window : -window])
            settled = abs(new - old) <= _WARM_UP_CHANGE * old
            if settled or out_of_time:
                return WarmUp(len(times), settled=settled)
        return WarmUp(len(times), settled=False)

    def sample(self) -> Sample:
        """Time one call."""
        synchronize(self.device)
        if self.device.type != "cuda":
            start = self.clock()
            self.fn()
            synchronize(self.device)
            return Sample(self.clock() - start, None)
        with torch.cuda.device(self.device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start = self.clock()
            before.record()
            self.fn()
            after.record()
            synchronize(self.device)
            return Sample(self.clock() - start, before.elapsed_time(after) / 1e3)


def phases(
    fn: Callable[[], object],
    listen: Callable[[Callable[[str], None]], object],
    *,
    device: torch.device,
    effort: Effort,
) -> dict[str, Latency]:
    """Time the phases of a call, each from the end of the one before.

    Args:
        fn: the work.
        listen: receives a function that `fn` is to call with the name of each phase at its end.
        device: synchronised at each end.
        effort: how long to measure.
    """
    taken: dict[str, list[Sample]] = {}
    last = 0.0

    def after(phase: str) -> None:
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        taken.setdefault(phase, []).append(Sample(now - last, None))
        last = now

    call = Call(fn, device)
    warm = call.warm_up(effort)
    listen(after)
    whole: list[float] = []
    while effort.wants_more(whole):
        synchronize(device)
        last = begun = time.perf_counter()
        fn()
        whole.append(time.perf_counter() - begun)
    listen(lambda _phase: None)
    return {
        name: _summarise(samples, warm=warm, notes=(), device=device)
        for name, samples in taken.items()
    }


def synchronize(device: torch.device) -> None:
    """Wait for what a device has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summarise(
    taken: Sequence[Sample], *, warm: WarmUp, notes: Sequence[str], device: torch.device
) -> Latency:
    samples = [one.wall for one in taken]
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
    return Latency(
        samples=tuple(samples),
        median=median,
        q1=q1,
        q3=q3,
        stable=not doubts,
        notes=(*doubts, *notes),
        warm_up=warm.calls,
        device=str(device),
        device_samples=tuple(one.on_device for one in taken if one.on_device is not None),
        settled=warm.settled,
        noticed=tuple(notes),
    )


def joined(parts: Sequence[Latency]) -> Latency:
    """Return what was timed in several turns as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    clocks = [part.device_samples or (None,) * len(part.samples) for part in parts]
    taken = [
        Sample(wall, on_device)
        for part, times in zip(parts, clocks, strict=True)
        for wall, on_device in zip(part.samples, times, strict=True)
    ]
    notes = dict.fromkeys(note for part in parts for note in part.noticed)
    warm = WarmUp(sum(part.warm_up for part in parts), settled=all(part.settled for part in parts))
    return _summarise(taken, warm=warm, notes=tuple(notes), device=torch.device(first.device))


def _drift(samples: Sequence[float]) -> float:
    """Change of the median from the first to the last third, as a share; 0 for a few samples."""
    if len(samples) < _FEWEST_FOR_DRIFT:
        return 0.0
    third = len(samples) // 3
    first, last = statistics.median(samples[:third]), statistics.median(samples[-third:])
    return (last - first) / first if first else 0.0
