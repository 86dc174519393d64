import statistics
import time

import pytest

from bench import latency


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


def measure(clock, fn, **options):
    options = {"min_repeats": 4, "min_seconds": 0.0, "load": lambda: 0.1, **options}
    return latency.measure(fn, device="cpu", clock=clock, **options)


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


def test_a_loaded_machine_is_said():
    clock = Clock()
    result = measure(clock, clock.call(endless([], 1.0)), load=lambda: 3.0)
    assert ["loaded machine: 3.0" in note for note in result.notes] == [True]


def test_an_unknown_load_is_no_load():
    clock = Clock()
    assert measure(clock, clock.call(endless([], 1.0)), load=lambda: None).notes == ()


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
        min_repeats=4,
        min_seconds=0.0,
        clock=clock,
        load=lambda: 0.0,
    )
    warm_up = sum(result.warm_up for result in results.values())
    assert "".join(order[warm_up:]) == "abccbaabccba"
    assert {len(result.samples) for result in results.values()} == {4}


def test_drift_hits_interleaved_rows_alike():
    clock = Clock()
    results = latency.interleaved(
        {
            name: clock.call([1.0] * 6 + [factor * (1 + i) for i in range(10)])
            for name, factor in (("slow", 2.0), ("fast", 1.0))
        },
        device="cpu",
        min_repeats=10,
        min_seconds=0.0,
        clock=clock,
        load=lambda: 0.0,
    )
    assert results["slow"].median / results["fast"].median == pytest.approx(2.0)


def test_overlapping_rows_are_indistinguishable():
    def of(*samples):
        clock = Clock()
        return measure(clock, clock.call([1] * 6 + list(samples)), min_repeats=len(samples))

    fast, close, slow = of(1, 1.1, 1.2, 1.3), of(1.1, 1.2, 1.3, 1.4), of(3, 3.1, 3.2, 3.3)
    assert fast.overlaps(close)
    assert close.overlaps(fast)
    assert not fast.overlaps(slow)


@pytest.mark.parametrize(
    "options",
    [
        {"min_repeats": 1},
        {"min_repeats": 9, "max_repeats": 8},
        {"min_seconds": -1.0},
        {"max_warm_up": 0},
    ],
)
def test_contradicting_bounds(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        latency.measure(lambda: None, device="cpu", **options)


def test_a_failing_call_is_not_hidden():
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        latency.measure(fail, device="cpu")


def test_real_clock():
    result = latency.measure(
        lambda: time.sleep(0.002), device="cpu", min_repeats=5, min_seconds=0.0
    )
    assert result.median >= 0.002
    assert result.median == statistics.median(result.samples)
    assert result.device == "cpu"
    assert result.unit == "s"
