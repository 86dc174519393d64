"""A mechanism under test: how it is built, called and compared, and the verdicts on it."""

import contextlib
import inspect
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import attentions
from attentions.contract import Grid
from bench.measure.memory import is_made_of_others

DIM, NUM_HEADS, NUM_GLOBAL = 48, 3, 2
GRID: Grid = (6, 8)
BATCH = 3
# Added to the initial parameters, so that one that starts at zero does not hide the others.
_SPREAD = 0.2
# The largest difference between two sums of the same numbers in another order, relative to the
# largest value but at least to 1.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
_WIDE |= dict.fromkeys((torch.complex32, torch.complex64), torch.complex128)
OUTPUT = "the output"
# Characters of an error that are shown.
_LONGEST = 200


class VerdictError(Exception):
    """What a check found, other than that all is well.

    Args:
        reason: in one line.
        advice: what to change; empty where the check's own advice says it.
    """

    status: str

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice


class FailedError(VerdictError):
    """A rule is broken."""

    status = "failed"


class WarnedError(VerdictError):
    """A rule is kept, but at a cost or within limits."""

    status = "warning"


class SkippedError(VerdictError):
    """A rule does not apply."""

    status = "skipped"


@dataclass(frozen=True)
class Subject:
    """A mechanism under test with one set of options.

    Attributes:
        name: registered, `package.module:Class` or `file.py:Class`.
        options: given to the constructor.
        grid: (rows, columns) of the ordinary calls.
        dim: channels.
        num_heads: attention heads.
        dtype: of the ordinary calls.
    """

    name: str
    options: Mapping[str, Any]
    grid: Grid = GRID
    dim: int = DIM
    num_heads: int = NUM_HEADS
    dtype: torch.dtype = torch.float64

    @property
    def factory(self) -> type[nn.Module]:
        """The class."""
        return attentions.find(self.name)

    @property
    def fixed_size(self) -> bool:
        """Whether it says that it works for one image size only."""
        return bool(getattr(self.factory, "fixed_size", False))

    @property
    def least_globals(self) -> int:
        """The fewest global tokens that it says it works with."""
        return int(getattr(self.factory, "least_globals", 0))

    @property
    def num_global(self) -> int:
        """Global tokens of the ordinary calls."""
        return max(NUM_GLOBAL, self.least_globals)

    @property
    def other_grid(self) -> Grid:
        """A grid that differs from the ordinary one on both sides."""
        return self.grid[0] + 2, self.grid[1] + 4

    @property
    def odd_grids(self) -> tuple[Grid, ...]:
        """Grids with odd sides, none of them square."""
        rows, columns = (side - side % 2 for side in self.grid)
        return (rows - 1, columns - 1), (columns + 1, rows - 1), (rows + 1, 2 * columns - 1)

    @property
    def rounding(self) -> float:
        """How far apart equal results may be."""
        return _ROUNDING[self.dtype]

    def build(
        self, *, grid: Grid | None = None, num_global: int | None = None, seed: int = 0, **more: Any
    ) -> nn.Module:
        """Build it for a largest grid, as a backbone does, with initial parameters of `seed`."""
        torch.manual_seed(seed)
        return attentions.build_for(
            self.name,
            grid=grid or self.grid,
            dim=self.dim,
            num_heads=self.num_heads,
            num_global=self.num_global if num_global is None else num_global,
            **{**self.options, **more},
        )

    def module(self, *, dtype: torch.dtype | None = None, seed: int = 0, **how: Any) -> nn.Module:
        """Build it with parameters moved off their initial values, evaluating."""
        module = self.build(seed=seed, **how)
        disturb(module, seed)
        return module.to(dtype or self.dtype).eval()

    def tokens(
        self,
        grid: Grid | None = None,
        *,
        num_global: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Random input (B, N, dim)."""
        rows, columns = grid or self.grid
        count = (self.num_global if num_global is None else num_global) + rows * columns
        generator = torch.Generator().manual_seed(1 + seed)
        shape = (BATCH, count, self.dim)
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        return random.to(dtype or self.dtype)

    def reason(self, error: BaseException) -> str:
        """An error in one line, and where in the mechanism's file it arose."""
        file = inspect.getsourcefile(self.factory) or ""
        # What torch.compile stumbles over has a stack of its own.
        stack = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in stack if frame.filename == file]
        place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        return f"{type(error).__name__}: {one_line(error)}{place}"


class InFloat64(TorchDispatchMode):
    """Leaves out that a mechanism rounds to less inside, as a softmax in float32 does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_made_of_others(types):
            return NotImplemented
        args, kwargs = tree_map_only(torch.dtype, lambda d: _WIDE.get(d, d), (args, kwargs or {}))
        return func(*args, **kwargs)


def disturb(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter off its value by a little, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(_SPREAD * noise.to(parameter.dtype))


def forget(module: nn.Module) -> None:
    """Let a mechanism drop what it keeps while evaluating, as between two trainings' steps."""
    mode = module.training
    module.train()
    module.train(mode)


def one_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], _LONGEST, placeholder=" …") if lines else "without a message"


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
        FailedError: where the result is not a finite tensor of the input's shape.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        y = module(x.clone(), grid)
    check_output(y, x, when)
    return y


def check_output(y: object, x: Tensor, when: str) -> None:
    """Raise `FailedError` where y is not a finite tensor of the shape of x."""
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
            "look for a division by zero, a softmax over nothing, an overflow, or values of"
            " torch.empty that nothing writes",
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
    forget(module)
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
