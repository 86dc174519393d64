"""What is told of progress, with and without a terminal."""

import re

import pytest
from rich.console import Console

from bench.system.progress import Bar, SuiteProgress


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain():
    """A console that is no terminal; `export_text` says what it got."""
    return Console(width=120, force_terminal=False, record=True)


@pytest.fixture
def terminal():
    return Console(width=120, force_terminal=True, record=True)


def test_a_bar_without_a_terminal_prints_lines_with_the_time_left(plain, clock):
    with Bar("checking", 80, console=plain, clock=clock) as bar:
        for _ in range(4):
            clock.now += 10
            bar.advance(10)
    assert plain.export_text().splitlines() == [
        "checking: 20 of 80, left 1:00",
        "checking: 40 of 80, left 0:40",
    ]


def test_a_share_with_what_is_done(plain, clock):
    with Bar("profiling", 100, unit=" %", console=plain, clock=clock) as bar:
        clock.now += 30
        bar.update(0.75, "[ViL]: counting")
    assert plain.export_text() == "profiling: [ViL]: counting: 75 of 100 %, left 0:10\n"


def test_rows_without_a_terminal_are_lines(plain, clock):
    with SuiteProgress(2, console=plain, clock=clock) as progress:
        progress.row("full [a]")
        clock.now += 20
        progress.update(0.5, "training")
        progress.update(0.6, "training")
        clock.now += 20
        progress.finish_row("done")
        progress.row("ViL")
    assert plain.export_text().splitlines() == [
        "[1/2] full [a]: started",
        "[1/2] full [a]: training; left for the row 0:20, for the suite 1:00",
        "[1/2] full [a]: done in 0:40",
        "[2/2] ViL: started",
    ]


def test_a_terminal_shows_a_live_display_and_the_outcome_alone_as_a_line(terminal, clock):
    with SuiteProgress(2, console=terminal, clock=clock) as progress:
        progress.row("full [a]")
        clock.now += 20
        progress.update(0.5, "training")
        progress.finish_row("done")
        progress.update(0.5, "evaluating")
    shown = terminal.export_text()
    assert "[1/2] full [a]: done in 0:20" in shown
    assert "left for the row" not in shown
    assert "started" not in shown
    assert re.search(r"suite of 2 rows .* 75 %", shown)
    assert "full [a]: evaluating" in shown
