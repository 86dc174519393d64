"""Whether an attention module keeps the contract that the suite relies on.

`CHECKS` are the rules of `bench.conformance.rules`.
Whatever a mechanism itself raises is a failure of that check and never ends the others, except
where nothing further can be learnt: a mechanism that cannot be built or called.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import attentions
from attentions.contract import Grid, accepted_options
from attentions.reads import deterministic
from bench.conformance.rules import CHECKS, Check
from bench.conformance.subject import (
    DIM,
    GRID,
    NUM_HEADS,
    Subject,
    VerdictError,
    one_line,
)
from bench.errors import InputError

PASSED, WARNED, FAILED, SKIPPED = "passed", "warning", "failed", "skipped"
_WORST_FIRST = (FAILED, WARNED, PASSED, SKIPPED)
# What the code of a user may raise, an attempt to end the program included.
_ANY_ERROR = (Exception, SystemExit)


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        check: its name.
        status: "passed", "warning", "failed" or "skipped".
        detail: the rule where it passed, else the reason in one line.
        advice: what to change, where it failed or warned.
    """

    check: str
    status: str
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """What all checks found of one mechanism.

    Attributes:
        mechanism: its name.
        options: the sets of options that were run.
        results: one a check, in the order of CHECKS; none after an essential check that failed.
    """

    mechanism: str
    options: tuple[Mapping[str, Any], ...]
    results: tuple[Result, ...]

    @property
    def not_run(self) -> int:
        """Checks that were not reached."""
        return len(CHECKS) - len(self.results)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.count(FAILED)

    def count(self, status: str) -> int:
        """The number of checks that ended so."""
        return sum(result.status == status for result in self.results)


def check(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    grid: Grid = GRID,
    dim: int = DIM,
    num_heads: int = NUM_HEADS,
) -> Report:
    """Run every check on one mechanism.

    Args:
        name: a registered name, `package.module:Class` or `file.py:Class`.
        options: for its constructor; by default the class's `examples`, one after the other, or
            else its defaults with each kind of positions that it declares.
        grid: (rows, columns) of the ordinary calls; the odd grids are near it.
        dim: channels.
        num_heads: attention heads.

    Raises:
        InputError: for a name that is not a mechanism, or options that it refuses.
    """
    try:
        factory = attentions.find(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    sets = (dict(options),) if options else _option_sets(factory)
    subjects = [Subject(name, own, grid=grid, dim=dim, num_heads=num_heads) for own in sets]
    if options:
        _refuse_wrong_options(subjects[0])
    subjects = [replace(subject, dtype=_widest(subject)) for subject in subjects]
    results: list[Result] = []
    for one in CHECKS:
        results.append(_check_all(one, subjects))
        if one.essential and results[-1].status == FAILED:
            break
    return Report(name, tuple(sets), tuple(results))


def _option_sets(factory: type[nn.Module]) -> tuple[Mapping[str, Any], ...]:
    examples = getattr(factory, "examples", None)
    if examples:
        return tuple(examples)
    positions = getattr(factory, "positions", ())
    if len(positions) < 2 or "position" not in accepted_options(factory):
        return ({},)
    return tuple({"position": position} for position in positions)


def _refuse_wrong_options(subject: Subject) -> None:
    """Tell options that the mechanism refuses from a mechanism that cannot be built at all."""
    error = _error_of_building(subject)
    if error is None:
        return
    accepted = accepted_options(subject.factory)
    unknown = [key for key in subject.options if key not in accepted]
    if unknown or _error_of_building(replace(subject, options={})) is None:
        given = " ".join(f"{key}={value}" for key, value in subject.options.items())
        raise InputError(f"--option {given}: {one_line(error)}") from error


def _error_of_building(subject: Subject) -> BaseException | None:
    try:
        with _contained():
            subject.build()
    except _ANY_ERROR as error:
        return error
    return None


def _widest(subject: Subject) -> torch.dtype:
    """float64, whose rounding hides no mistake; float32 where the mechanism cannot work in it."""
    try:
        with _contained(), torch.no_grad():
            y = subject.module()(subject.tokens(), subject.grid)
    except _ANY_ERROR:
        # Why it cannot is what the check of precision says.
        return torch.float32
    return torch.float64 if getattr(y, "dtype", None) == torch.float64 else torch.float32


def _check_all(one: Check, subjects: Sequence[Subject]) -> Result:
    """Run a check on every set of options; the worst result counts."""
    found = []
    for subject in subjects[:1] if one.once else subjects:
        # Without it, a trace that fails in inference mode leaves a state in which no operator runs.
        with torch._C._PreserveDispatchKeyGuard():
            result = _check_one(one, subject)
        if result.status in (FAILED, WARNED) and len(subjects) > 1:
            said = ", ".join(f"{key}={value}" for key, value in subject.options.items())
            result = replace(result, detail=f"{result.detail} [with {said or 'its defaults'}]")
        found.append(result)
        if result.status == FAILED:
            break
    return min(found, key=lambda result: _WORST_FIRST.index(result.status))


def _check_one(one: Check, subject: Subject) -> Result:
    try:
        with _contained():
            one.run(subject)
    except VerdictError as verdict:
        advice = verdict.advice or (one.advice if verdict.status == FAILED else "")
        return Result(one.name, verdict.status, verdict.reason, advice)
    except _ANY_ERROR as error:
        # Whatever the mechanism raises is what this check found.
        return Result(one.name, FAILED, subject.reason(error), one.advice)
    return Result(one.name, PASSED, one.rule)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep what a mechanism prints, warns and draws at random from the rest of the program."""
    disabled = logging.root.manager.disable
    # torch.compile logs every break of a graph, over many lines.
    logging.disable(logging.WARNING)
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sys.stderr),
        deterministic(True, fills=True),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
