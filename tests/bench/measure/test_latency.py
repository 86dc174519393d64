import statistics
import time

import pytest
import torch

from bench.measure import latency
from bench.measure.latency import Effort, Instruments, Latency
from bench.system import machine


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, durations):
        durations = iter(durations)

        def fn():
            self.now += next(durations)

        return fn


def endless(first, then):
    yield from first
    while True:
        yield then


def instruments(clock, **others):
    quiet = {"load": lambda: 0.1, "others": lambda: None, "throttled": lambda: None}
    quiet |= {"clock_mhz": lambda _: None}
    return Instruments(clock=clock, **quiet | others)


def measure(clock, fn, *, look=None, **effort):
    return latency.measure(
        fn,
        device="cpu",
        effort=Effort(**{"min_repeats": 4, "min_seconds": 0.0} | effort),
        instruments=instruments(clock, **look or {}),
    )


def timing(*samples):
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Latency(
        samples, median=median, q1=q1, q3=q3, stable=True, notes=(), warm_up=1, device="cpu"
    )


def test_warm_up_goes_on_until_calls_take_equally_long():
    clock = Clock()
    result = measure(clock, clock.call(endless([9, 7, 5, 4, 3, 2], 1.0)), min_repeats=5)
    assert result.warm_up > 6
    assert result.samples == pytest.approx((1.0,) * 5)
    assert result.median == result.q1 == result.q3 == pytest.approx(1.0)
    assert result.stable
    assert result.notes == ()


def test_warm_up_is_bounded_and_says_that_it_did_not_settle():
    clock = Clock()
    result = measure(clock, clock.call(0.5**i for i in range(100)), max_warm_up=8)
    assert result.warm_up == 8
    assert not result.stable
    assert any("still changing after 8 warm-up calls" in note for note in result.notes)


@pytest.mark.parametrize(("first", "settled"), [([10.1], True), ([20.0], False)])
def test_warm_up_of_a_slow_call_ends_after_its_second(first, settled):
    clock = Clock()
    result = measure(clock, clock.call(endless(first, 10.0)), max_warm_up_seconds=5.0)
    assert result.warm_up == 2
    assert result.stable is settled


def test_goes_on_until_enough_seconds():
    clock = Clock()
    result = measure(clock, clock.call(endless([], 0.5)), min_repeats=3, min_seconds=4.0)
    assert len(result.samples) == 8


def test_stops_at_the_most_repeats():
    clock = Clock()
    result = measure(clock, clock.call(endless([], 0.5)), min_seconds=1e9, max_repeats=7)
    assert len(result.samples) == 7


def test_median_and_quartiles():
    clock = Clock()
    result = measure(clock, clock.call([1] * 6 + [5, 1, 4, 2, 3]), min_repeats=5)
    assert sorted(result.samples) == pytest.approx([1, 2, 3, 4, 5])
    assert (result.q1, result.median, result.q3) == pytest.approx((2, 3, 4))
    assert result.spread == pytest.approx(2 / 3)
    assert not result.stable
    assert any("large spread" in note for note in result.notes)


def test_a_drift_is_noticed_although_the_spread_is_small():
    clock = Clock()
    steps = [1 + 0.014 * i for i in range(12)]
    result = measure(clock, clock.call([1] * 6 + steps), min_repeats=12)
    assert result.spread < latency.LARGEST_SPREAD
    assert not result.stable
    assert ["drift" in note for note in result.notes] == [True]


def test_a_load_is_said_where_nothing_better_is_known():
    clock = Clock()
    result = measure(clock, clock.call(endless([], 1.0)), look={"load": lambda: 3.0})
    assert ["loaded machine: 3.0" in note for note in result.notes] == [True]


def test_an_unknown_load_is_no_load():
    clock = Clock()
    assert measure(clock, clock.call(endless([], 1.0)), look={"load": lambda: None}).notes == ()


@pytest.mark.parametrize(("busy", "said"), [(0.1, False), (1.0, True)])
def test_other_processes_are_noticed_where_they_leave_too_few_cores(monkeypatch, busy, said):
    clock = Clock()
    monkeypatch.setattr(machine, "cores", lambda: torch.get_num_threads())
    # A high load that may be this process's own says nothing where others are known.
    look = {"load": lambda: 3.0, "others": lambda: 100 + busy * clock.now}
    notes = measure(clock, clock.call(endless([], 1.0)), look=look).notes
    assert ["others kept 1.0 of" in note for note in notes] == [True] * said


@pytest.mark.parametrize(("cores", "said"), [(31, False), (3, True)])
def test_other_processes_may_use_a_small_share_of_what_is_not_needed(monkeypatch, cores, said):
    clock = Clock()
    monkeypatch.setattr(machine, "cores", lambda: torch.get_num_threads() + cores)
    # On a small machine a training that has its own core still shares caches and memory.
    look = {"others": lambda: 1.5 * clock.now}
    notes = measure(clock, clock.call(endless([], 1.0)), look=look).notes
    assert ["others kept 1.5 of" in note for note in notes] == [True] * said


@pytest.mark.parametrize(("share", "said"), [(0.0, False), (1.0, True)])
def test_a_quota_of_cores_that_was_used_up_is_noticed(monkeypatch, share, said):
    clock = Clock()
    monkeypatch.setattr(latency, "usable_cores", lambda: 0.25)
    look = {"throttled": lambda: 7 + int(share * clock.now)}
    result = measure(clock, clock.call(endless([], 1.0)), look=look, min_repeats=4)
    periods = len(result.samples) + result.warm_up
    expected = f"throttled: 0.25 cores' time was used up in {periods} periods"
    assert result.notes == (expected,) * said
    assert result.noticed == result.notes


@pytest.mark.parametrize(("slow", "said"), [(1900.0, True), (2500.0, False)])
def test_a_falling_clock_is_noticed(slow, said):
    clock = Clock()
    speeds = endless([2600.0, 2600.0], slow)
    look = {"clock_mhz": lambda _: next(speeds)}
    notes = measure(clock, clock.call(endless([], 1.0)), look=look, min_repeats=6).notes
    assert ["between 1900 and 2600 MHz" in note for note in notes] == [True] * said


def test_the_clock_is_not_read_at_every_call():
    clock, reads = Clock(), []
    look = {"clock_mhz": lambda _: reads.append(clock.now) or 1.0}
    measure(clock, clock.call(endless([], 0.01)), look=look, min_repeats=100)
    assert len(reads) == 2


def test_rounds_interleave_and_alternate():
    clock = Clock()
    order = []

    def row(name):
        def fn():
            order.append(name)
            clock.now += 1.0

        return fn

    results = latency.interleaved(
        {name: row(name) for name in "abc"},
        device="cpu",
        effort=Effort(min_repeats=4, min_seconds=0.0),
        instruments=instruments(clock),
    )
    warm_up = sum(result.warm_up for result in results.values())
    assert "".join(order[warm_up:]) == "abccbaabccba"
    assert {len(result.samples) for result in results.values()} == {4}


def test_what_takes_a_thousand_times_as_long_is_not_called_as_often():
    clock = Clock()
    results = latency.interleaved(
        {"slow": clock.call(endless([], 2.0)), "fast": clock.call(endless([], 0.002))},
        device="cpu",
        effort=Effort(min_repeats=10, min_seconds=1.0),
        instruments=instruments(clock),
    )
    assert len(results["slow"].samples) == 10
    assert sum(results["fast"].samples) == pytest.approx(1.0, abs=0.003)


def test_drift_hits_interleaved_rows_alike():
    clock = Clock()
    results = latency.interleaved(
        {
            name: clock.call([1.0] * 6 + [factor * (1 + i) for i in range(10)])
            for name, factor in (("slow", 2.0), ("fast", 1.0))
        },
        device="cpu",
        effort=Effort(min_repeats=10, min_seconds=0.0),
        instruments=instruments(clock),
    )
    assert results["slow"].median / results["fast"].median == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # Of k, from tables of the sign test: the error is at most 5 %.
    [(2, 1, 2), (5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15), (50, 18, 33), (2000, 956, 1045)],
)
def test_the_interval_of_a_median(count, low, high):
    assert timing(*range(count, 0, -1)).interval == (low, high)


def test_what_cannot_be_told_apart_shares_a_letter():
    marks = latency.groups(
        {"slow": timing(3, 3.1, 3.2), "near": timing(1.1, 1.2, 1.3), "fast": timing(1, 1.1, 1.2)}
    )
    assert marks == {"fast": "a", "near": "a", "slow": "b"}


def test_groups_are_no_chain():
    # b meets both neighbours, which do not meet each other: nobody is merged.
    marks = latency.groups({"a": timing(1, 3), "b": timing(2, 5), "c": timing(4, 6)})
    assert marks == {"a": "a", "b": "ab", "c": "b"}


def test_a_letter_is_shared_exactly_where_intervals_meet():
    spans = [(1, 4), (2, 3), (3, 8), (5, 6), (6, 9), (9, 10), (11, 12), (7, 12)]
    timings = {str(i): timing(*span) for i, span in enumerate(spans)}
    marks = latency.groups(timings)
    for one, (low, high) in zip(timings, spans, strict=True):
        for other, (low2, high2) in zip(timings, spans, strict=True):
            assert bool(set(marks[one]) & set(marks[other])) == (low <= high2 and low2 <= high)


def test_more_groups_than_letters():
    marks = latency.groups({str(i): timing(i, i) for i in range(100)})
    assert len(set(marks.values())) == 100
    assert latency.groups({}) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"min_repeats": 1},
        {"min_repeats": 9, "max_repeats": 8},
        {"min_seconds": -1.0},
        {"max_warm_up": 0},
        {"max_warm_up_seconds": -1.0},
    ],
)
def test_contradicting_bounds(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Effort(**options)


def test_a_failing_call_is_not_hidden():
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        latency.measure(fail, device="cpu")


def test_real_instruments():
    result = latency.measure(
        lambda: time.sleep(0.002), device="cpu", effort=Effort(min_repeats=5, min_seconds=0.0)
    )
    assert result.median >= 0.002
    assert result.median == statistics.median(result.samples)
    assert result.device == "cpu"
    assert result.unit == "s"
    assert result.device_samples == ()


def test_this_process_is_no_other_process():
    before, start = machine.other_cpu_seconds(), time.process_time()
    if before is None:
        pytest.skip("the system does not tell")
    wall = time.monotonic()
    while time.process_time() - start < 0.3:
        pass
    others = machine.other_cpu_seconds() - before
    assert others <= machine.cores() * (time.monotonic() - wall) - 0.3 + 0.05


def test_free_memory_is_less_than_all(cgroup):
    free = machine.free_memory()
    assert free is None or free > 1e8
    cgroup("0::/", {".": {"memory.max": "5000", "memory.current": "2000"}})
    assert machine.free_memory() == 3000


@pytest.mark.gpu
def test_events_on_the_device_agree_with_the_wall_clock():
    x = torch.randn(4096, 4096, device="cuda")
    result = latency.measure(lambda: x @ x, device="cuda", effort=Effort(min_seconds=0.1))
    assert len(result.device_samples) == len(result.samples)
    on_device = statistics.median(result.device_samples)
    assert 0.5 * result.median < on_device <= 1.05 * result.median
