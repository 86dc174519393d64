"""Whether an attention module keeps the contract that the suite relies on.

`CHECKS` is the table of promises (`bench.conformance.promises`) with what to say about each.
Whatever a mechanism itself raises is a failure of that check and never ends the others, except
where nothing further can be learnt: a mechanism that cannot be built or called.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import attentions
from attentions.contract import Grid, accepted_options
from bench.conformance import promises
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
class Check:
    """One promise of the contract.

    Attributes:
        name: for the table.
        promise: what holds where it passes.
        advice: what to change where the mechanism itself raises an error.
        run: raises a `VerdictError`; whatever else it raises is a failure.
        essential: without it the checks that follow mean nothing.
        once: run with the first set of options alone, for what takes long.
    """

    name: str
    promise: str
    advice: str
    run: Callable[[Subject], None]
    essential: bool = False
    once: bool = False


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        check: its name.
        status: "passed", "warning", "failed" or "skipped".
        detail: the promise where it passed, else the reason in one line.
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
        results: one a check, in the order of `CHECKS`; none after an essential check that failed.
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
        InputError: for a name that is no mechanism, or options that it refuses.
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
    return Result(one.name, PASSED, one.promise)


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
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


CHECKS: tuple[Check, ...] = (
    Check(
        "constructor",
        "takes dim, num_heads and num_global; every option has a default",
        "build it with Class(dim=48, num_heads=3, num_global=2) and correct what it raises",
        promises.constructor,
        essential=True,
    ),
    Check(
        "keywords",
        "arguments by keyword only, unknown ones refused, declarations true",
        "see attentions/contract.py for what a mechanism may declare",
        promises.keywords,
    ),
    Check(
        "output",
        "as many tokens and channels as came in, and their dtype",
        "forward(self, x, grid) takes x (B, num_global + rows * columns, dim) and returns the like",
        promises.plain_output,
        essential=True,
    ),
    Check(
        "odd grids",
        "grids with odd sides, none of them square",
        "take rows and columns from grid; pad what must be a multiple, and cut the result",
        promises.odd_grids,
    ),
    Check(
        "thin grids",
        "grids of one token, one row and one column",
        "handle it, or raise ValueError with the grid as ROWSxCOLUMNS and the least that works",
        promises.thin_grids,
    ),
    Check(
        "global tokens",
        "no global token, one and several",
        "the first num_global tokens of x are global, the grid comes after",
        promises.few_globals,
    ),
    Check(
        "resolution",
        "one module takes another image size, or says that it cannot",
        "let nothing depend on the grid it was made for, or declare fixed_size = True",
        promises.resolution,
    ),
    Check(
        "batch",
        "an image comes out the same whatever is beside it in the batch",
        "reduce over tokens or channels, never over dimension 0",
        promises.batch,
    ),
    Check(
        "gradients",
        "finite gradients reach the input and every parameter",
        "call backward on its output while training and correct what it raises",
        promises.gradients,
    ),
    Check(
        "calls",
        "no call leaves a trace: same input, same output; the input stays as it is",
        "keep nothing on self in forward, and draw random numbers only where self.training",
        promises.calls,
    ),
    Check(
        "instances",
        "instances share nothing",
        "keep nothing that changes in the class body or the module",
        promises.instances,
    ),
    Check(
        "copies",
        "deep copies and loaded state dicts are equal and independent",
        "register every tensor as a parameter or, by register_buffer, as a buffer",
        promises.copies,
    ),
    Check(
        "precision",
        "float64 stays float64, and float32 agrees with it",
        "make new tensors with the dtype and device of x: x.new_zeros(…), torch.ones_like(x)",
        promises.precision,
    ),
    Check(
        "autocast",
        "bfloat16 autocast: finite output and gradients",
        "keep one dtype in each product; compute exponentials and sums of them in float32",
        promises.autocast,
    ),
    Check(
        "compile",
        "torch.compile gives the same output, in one graph",
        "avoid what torch.compile cannot trace, or wrap it with torch.compiler.disable",
        promises.compiles,
        once=True,
    ),
    Check(
        "FLOPs",
        "runs on the meta device, every operator counted, multiply_adds true",
        "branch on no value of a tensor: no .item(), .tolist(), .numpy() or boolean indexing",
        promises.multiply_adds,
    ),
    Check(
        "reference",
        "implementation='fast' equals 'reference', gradients too",
        "both take the same parameters by name; correct the one that differs from the paper",
        promises.reference,
    ),
)
