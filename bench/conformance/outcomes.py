"""Calls of a mechanism, and how far apart what they return is."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from attentions.contract import Grid
from bench.conformance.subject import FailedError, Subject, VerdictError, one_line

OUTPUT = "the output"


def show(grid: Grid) -> str:
    """`6x8` for (6, 8)."""
    return f"{grid[0]}x{grid[1]}"


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value, but at least to 1."""
    if actual.shape != expected.shape:
        raise FailedError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not actual.numel():
        return 0.0
    actual, expected = actual.double(), expected.double()
    largest = max(1.0, float(expected.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    same = torch.isclose(actual, expected, rtol=0, atol=0, equal_nan=True)
    gap = (actual - expected).abs().nan_to_num(nan=float("inf")).masked_fill(same, 0.0)
    return float(gap.max()) / largest


def run(module: nn.Module, x: Tensor, grid: Grid, when: str) -> Tensor:
    """Call a mechanism without gradients, on a copy of x, with the same random numbers each time.

    Whether it changes its input or draws at random is for `calls` alone to say.

    Raises:
        FailedError: where the result is no tensor of the input's shape, or is not finite.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        y = module(x.clone(), grid)
    check_output(y, x, when)
    return y


def check_output(y: object, x: Tensor, when: str) -> None:
    """Raise `FailedError` where y is no finite tensor of the shape of x."""
    if not isinstance(y, Tensor):
        raise FailedError(f"{when}: returns {type(y).__name__}, not a tensor", "return one tensor")
    if y.shape != x.shape:
        raise FailedError(
            f"{when}: output {tuple(y.shape)} for input {tuple(x.shape)}",
            "return as many tokens and channels as came in, global tokens first",
        )
    if not y.isfinite().all():
        raise FailedError(
            f"{when}: the output is not finite",
            "look for a division by zero, a softmax over nothing, or an overflow",
        )


@contextlib.contextmanager
def during(subject: Subject, when: str, advice: str = "") -> Iterator[None]:
    """Say when an error of the mechanism happened, as a `FailedError`."""
    try:
        yield
    except VerdictError:
        raise
    except Exception as error:
        raise FailedError(f"{when}: {subject.reason(error)}", advice) from error


def refusals(
    subject: Subject, grids: Sequence[Grid], *, dtype: torch.dtype | None = None
) -> list[str]:
    """Call on every grid; return what was said where one was refused by a clear error."""
    refused = []
    for grid in grids:
        when = f"grid {show(grid)}"
        with during(subject, when):
            module, x = subject.module(grid=grid, dtype=dtype), subject.tokens(grid, dtype=dtype)
            try:
                run(module, x, grid, when)
            except ValueError as error:
                if show(grid) not in str(error):
                    raise
                refused.append(one_line(error))
    return refused


def no_leaf(x: Tensor) -> Tensor:
    """x for a mechanism that changes it in place, as no leaf may be; `calls` says that it does."""
    return x + 0


def output_gradient(y: Tensor) -> Tensor:
    """A gradient for the output that favours no direction."""
    return torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)


def outcome(
    module: nn.Module, x: Tensor, grid: Grid, *, call: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter; of `call`, where it is given."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(0)
    y = (module if call is None else call)(no_leaf(x), grid)
    if y.requires_grad:
        y.backward(output_gradient(y))
    gradients = {
        f"the gradient of {name}": parameter.grad.clone()
        for name, parameter in [("the input", x), *module.named_parameters()]
        if parameter.grad is not None
    }
    return {OUTPUT: y.detach(), **gradients}


def differences(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """How far apart each part of two outcomes is; a part that one of them lacks is infinitely."""
    for what in {**expected, **actual}:
        both = what in actual and what in expected
        yield what, difference(actual[what], expected[what]) if both else float("inf")
