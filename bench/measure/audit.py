"""Three counts of multiply-adds that know nothing of each other, compared.

- **declared**: the closed form of the mechanism, its `multiply_adds(grid)`.
- **operators**: `bench.measure.flops`, from the operators that the dispatcher runs.
- **fvcore**: `fvcore.nn.FlopCountAnalysis`, from the traced graph, with `HANDLES` for operators
  that it has no formula for, or one that is not exact.

Besides these, what two counters give as they come: fvcore without `HANDLES`, and torch's
`FlopCounterMode` on a CPU, in multiply-adds. fvcore does not know fused attention, and torch 2.11
counts that of the CPU as nothing.

fvcore runs what it counts, and on the meta device its graphs lose convolutions without a word: it
counts on the CPU, and so do the two that are taken as they come.
"""

import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import einsum_flop_jit, get_shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attentions
from attentions.contract import Grid
from bench.errors import InputError
from bench.measure import flops
from bench.measure.fake import copied
from bench.measure.formulas import is_free

# Counts that differ by more than this share of the largest one do not agree.
TOLERANCE = 0.01
# The mechanisms that are audited: channels, heads and global tokens.
DIM, NUM_HEADS, NUM_GLOBAL = 96, 3, 2
# Tokens of a grid that a mechanism is still run on: full attention makes tables of their square.
LARGEST_GRID = 2**13
# Characters of an error: some print tensors.
_LONGEST = 300
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Audit:
    """What each counter found in one module, for one image; unit: multiply-adds.

    Attributes:
        declared: the closed form; None where the mechanism declares nothing.
        operators: from the operators that ran.
        fvcore: from the traced graph, with our handles; None where it cannot be traced.
        fvcore_alone: fvcore without our handles; None where it cannot be traced.
        torch_on_cpu: torch's own counter on a CPU; None where it fails.
        uncounted: calls without a formula, by counter and name; empty in complete counts.
        failures: why a counter counted nothing, by counter ("fvcore", "torch on CPU").
        notes: on the count of operators.
        unsummed: products of elements that are in no sum of that count.
    """

    declared: int | None
    operators: int
    fvcore: int | None = None
    fvcore_alone: int | None = None
    torch_on_cpu: int | None = None
    uncounted: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unsummed: int = 0
    unit: str = flops.UNIT

    @property
    def found(self) -> tuple[int, ...]:
        """Those of the three counts that there are.

        A count of fvcore that is incomplete can only be too small: it then counts where it is not.
        """
        fvcore = self.fvcore
        if fvcore is not None and "fvcore" in self.uncounted:
            fvcore = max(fvcore, self.operators)
        return tuple(c for c in (self.declared, self.operators, fvcore) if c is not None)

    @property
    def disagreement(self) -> float:
        """The largest difference between two of the three counts, as a share of the largest."""
        largest = max(self.found)
        return (largest - min(self.found)) / largest if largest else 0.0

    @property
    def agrees(self) -> bool:
        """Whether two counts or three agree, and the operators that ran are all counted."""
        complete = "operators" not in self.uncounted
        return complete and len(self.found) > 1 and self.disagreement <= TOLERANCE

    def missed(self, count: int | None) -> float | None:
        """The share of `operators` that another counter's `count` lacks; None without a count."""
        return None if count is None or not self.operators else 1 - count / self.operators


@dataclass(frozen=True)
class Audited:
    """One line of an audit.

    Attributes:
        name: of a mechanism.
        options: of it.
        counts: None where it could not be built or counted for this size.
        error: why.
    """

    name: str
    options: Mapping[str, Any]
    counts: Audit | None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether there are counts and they agree."""
        return self.counts is not None and self.counts.agrees


def audit(attention: nn.Module, grid: Grid) -> Audit:
    """Count a mechanism in three ways, for one image on `grid` (rows, columns).

    Args:
        attention: with real parameters on the CPU, where a copy of it is run.
        grid: (rows, columns). On one of more than `LARGEST_GRID` tokens nothing is run: closed form
            and operators are compared alone.

    Raises:
        InputError: for a module that does not say its `dim` and `num_global`, or cannot be counted.
        ValueError: from the mechanism, for a grid that it does not take.
    """
    declare = getattr(attention, "multiply_adds", None)
    declared = None if declare is None else declare(grid)
    counted = flops.count_call(attention, (flops.tokens(attention, grid), grid))
    if grid[0] * grid[1] > LARGEST_GRID:
        why = f"not run on grids of more than {LARGEST_GRID} tokens"
        failures = dict.fromkeys(("fvcore", "torch on CPU"), why)
        uncounted = {"operators": counted.uncounted} if counted.uncounted else {}
        return _audit(counted, declared, uncounted=uncounted, failures=failures)
    tokens = flops.tokens(attention, grid, device=_CPU)
    return _compare(_OnGrid(attention, grid), (tokens,), counted, declared)


def audit_mechanisms(names: Iterable[str], grid: Grid) -> Iterator[Audited]:
    """Audit each mechanism with each of its example options, on one grid.

    A mechanism that cannot be counted on the grid gives a line that says so.

    Raises:
        InputError: for an unknown mechanism, before anything is counted.
    """
    try:
        found = {name: attentions.find(name) for name in names}
    except ValueError as error:
        raise InputError(str(error)) from error
    examples = [
        (name, example)
        for name, factory in found.items()
        for example in getattr(factory, "examples", (dict[str, Any](),))
    ]
    return (_line(name, example, grid) for name, example in examples)


def _line(name: str, options: Mapping[str, Any], grid: Grid) -> Audited:
    try:
        attention: Any = attentions.build_for(
            name, grid=grid, dim=DIM, num_heads=NUM_HEADS, num_global=NUM_GLOBAL, **options
        )
        # A mechanism of others need not say them.
        for key, value in (("dim", DIM), ("num_global", NUM_GLOBAL)):
            setattr(attention, key, getattr(attention, key, value))
        return Audited(name, options, audit(attention, grid))
    except ValueError as error:
        return Audited(name, options, None, " ".join(str(error).split()))
    except Exception as error:
        # A mechanism of others may fail in any way; the other lines are none the worse for it.
        return Audited(name, options, None, _described(error))


def _compare(
    module: nn.Module, inputs: tuple[Any, ...], counted: flops.OperatorCount, declared: int | None
) -> Audit:
    """Run the counters that are not ours, whose failures belong into the audit."""
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    uncounted = {"operators": dict(counted.uncounted), "fvcore": dict[str, int]()}
    # torch's counter cannot follow a parameter that is given to a part of its module.
    module = copied(module, lambda tensor: tensor.to(_CPU, copy=True)).eval().requires_grad_(False)
    with torch.no_grad():
        try:
            found["fvcore"], uncounted["fvcore"] = count_graph(module, inputs, HANDLES)
            found["fvcore_alone"], _ = count_graph(module, inputs, {})
        except Exception as error:
            failures["fvcore"] = _described(error)
        try:
            with FlopCounterMode(display=False) as counter:
                module(*inputs)
            found["torch_on_cpu"] = int(counter.get_total_flops()) // 2
        except Exception as error:
            failures["torch on CPU"] = _described(error)
    if flops.WRITTEN_OUT in counted.by_operator and "fvcore" in found:
        # fvcore takes these for elementwise operators without products.
        uncounted["fvcore"] |= {"products written out": 1}
    elif {"fvcore", "torch_on_cpu"} <= found.keys():
        enough = (1 - TOLERANCE) * counted.total
        if found["fvcore"] < enough <= found["torch_on_cpu"]:
            # A trace has nothing whose result is not used.
            uncounted["fvcore"] |= {"operators without a use": 1}
    uncounted = {counter: names for counter, names in uncounted.items() if names}
    return _audit(counted, declared, **found, uncounted=uncounted, failures=failures)


def _audit(counted: flops.OperatorCount, declared: int | None, **found: Any) -> Audit:
    found |= {"notes": counted.notes, "unsummed": counted.unsummed}
    return Audit(declared, counted.total, **found)


def _described(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST, placeholder=" …")


class _OnGrid(nn.Module):
    """A mechanism on one grid, so that tokens are its only input: a trace takes tensors alone."""

    def __init__(self, attention: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.attention = attention
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, self.grid)
        return out


def count_graph(
    module: nn.Module, inputs: tuple[Any, ...], handles: Mapping[str, Any]
) -> tuple[int, dict[str, int]]:
    """Count by fvcore: multiply-adds, and calls of operators without a formula.

    Args:
        module: in evaluation, on the CPU.
        inputs: on the CPU.
        handles: besides those of fvcore.
    """
    analysis = FlopCountAnalysis(module, inputs).set_op_handle(**handles)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = round(analysis.total())
    lacking = analysis.unsupported_ops()
    return total, {name: calls for name, calls in lacking.items() if not _is_free(name)}


def _is_free(name: str) -> bool:
    """Whether an operator of a traced graph, such as "aten::add", holds no product of matrices."""
    space, _, short = name.partition("::")
    packet = getattr(torch.ops.aten, short, None)
    if space != "aten" or packet is None:
        return space == "prim"
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return short in FREE_COMPOSITES.split() or any(map(is_free, overloads))


FREE_COMPOSITES = (
    "unflatten pad cartesian_prod meshgrid numpy_T softmax log_softmax tile concat concatenate"
    " hstack vstack broadcast_to movedim swapaxes tensor_split one_hot std var frobenius_norm"
    " upsample_nearest3d upsample_bicubic2d index_add unsafe_chunk __or__ __xor__ max_pool1d"
    " max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool3d"
)
"""Operators that a trace keeps whole, made of others without products of matrices."""


def _times(handle: Callable[..., float]) -> Callable[..., float]:
    """A handle that counts a product of complex numbers as four."""

    def times(inputs: Sequence[Any], outputs: Sequence[Any]) -> float:
        complex_numbers = "Complex" in str(outputs[0].type().scalarType())
        return handle(inputs, outputs) * (4 if complex_numbers else 1)

    return times


def _attention_handle(inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
    query, key, value = (get_shape(part) for part in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _matmul_handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    # fvcore takes all of the left operand and so misses that it is repeated for a longer right one.
    return math.prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def _added_product_handle(inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
    left, right = get_shape(inputs[1]), get_shape(inputs[2])
    return math.prod(left) * (right[-1] if len(right) > 1 else 1)


def _vector_handle(inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
    return math.prod(get_shape(inputs[0]))


def _einsum_handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> float:
    """Of two operands, the sizes of all indices; of more, fvcore's count, which has four digits.

    None where nothing is summed: an outer product is no product of matrices.
    """
    shapes = [get_shape(operand) for operand in inputs[1].node().inputs()]
    given, arrow, made = inputs[0].toIValue().replace(" ", "").partition("->")
    if len(shapes) != 2:
        count: float = einsum_flop_jit(inputs, outputs)
        return count
    sizes: dict[str, int] = {}
    for term, shape in zip(given.split(","), shapes, strict=True):
        for index, size in zip(_indices(term, len(shape)), shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    if arrow and sizes.keys() <= {*_indices(made, len(get_shape(outputs[0])))}:
        return 0
    return math.prod(sizes.values())


def _indices(term: str, dimensions: int) -> list[str]:
    """One name a dimension; those behind an ellipsis are named by their place from its end."""
    before, ellipsis, after = term.partition("...")
    hidden = dimensions - len(before) - len(after) if ellipsis else 0
    return [*before, *(f"...{place}" for place in range(hidden, 0, -1)), *after]


def _no_products(_inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
    return 0


_NOT_PRODUCTS = (
    "batch_norm group_norm layer_norm instance_norm upsample_nearest2d upsample_bilinear2d"
    " adaptive_avg_pool2d grid_sampler"
)

HANDLES: Mapping[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "aten::scaled_dot_product_attention": _attention_handle,
    "aten::einsum": _times(_einsum_handle),
    **dict.fromkeys(("aten::matmul", "aten::mm", "aten::bmm"), _times(_matmul_handle)),
    **dict.fromkeys(
        ("aten::baddbmm", "aten::addbmm", "aten::addmv"), _times(_added_product_handle)
    ),
    **dict.fromkeys(("aten::mv", "aten::dot"), _times(_vector_handle)),
    **dict.fromkeys((f"aten::{name}" for name in _NOT_PRODUCTS.split()), _no_products),
}
"""For fvcore: formulas that it lacks or that are not exact, and 0 for what it counts although it
holds no product of matrices. (`None`, by its documentation, ignores an operator; where fvcore has a
formula it does not.)"""
