"""Energy of a call: idle is taken off, counters may begin anew, and none is said."""

from pathlib import Path

import pytest
import torch

from bench.measure import energy
from bench.measure.energy import Counter


def test_idle_is_taken_off() -> None:
    now, used = 0.0, 0.0

    def spend(seconds: float, watts: float) -> None:
        nonlocal now, used
        now, used = now + seconds, used + seconds * watts

    found = energy.measure(
        lambda: spend(0.5, 10 + 40),
        Counter("made up", lambda: used),
        seconds=3.0,
        clock=lambda: now,
        sleep=lambda seconds: spend(seconds, 10),
    )
    assert [found.joules, found.idle_watts, found.calls] == pytest.approx([20.0, 10.0, 6])


def test_a_processor_counter_begins_anew(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 0), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    counter = energy.counter(torch.device("cpu"), root=tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("50\n")
    assert counter.joules() == pytest.approx(250e-6)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(energy.NotAvailableError, match="no RAPL counter"):
        energy.counter(torch.device("cpu"), root=tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    with pytest.raises(energy.NotAvailableError, match="cannot be read"):
        energy.counter(torch.device("cpu"), root=tmp_path)
