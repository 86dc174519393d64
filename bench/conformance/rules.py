"""The rules of an attention module's contract, one small function each.

`attentions/contract.py` says what a mechanism is. Each function here tries one rule, which its
docstring states, on a `Subject`, and raises `FailedError` with what to change where it is broken.
`bench.conformance.check` runs them all, in the order of this file.
"""

import gc
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attentions.contract import Grid, accepted_options
from bench.conformance.subject import (
    BATCH,
    OUTPUT,
    FailedError,
    InFloat64,
    SkippedError,
    Subject,
    WarnedError,
    check_output,
    difference,
    differences,
    disturb,
    during,
    forget,
    no_leaf,
    outcome,
    output_gradient,
    refusals,
    run,
    show,
)
from bench.measure.fake import copied
from bench.measure.flops import CALLS, ELEMENTWISE, SQUARES, THREADS, UNSEEN, count_call
from bench.measure.memory import LiveTensors
from bench.model.attributes import attributes, changed, plain

_SIZE = ("dim", "num_heads", "num_global")
_PLACE = ("grid", "seq_len", "position", "block_index")
_FEW_GLOBALS = (0, 1, 3)
# The largest difference between single or half precision and the one above, relative to the largest
# value but at least to 1.
_SINGLE, _HALF = 1e-3, 0.1
# Of multiply-adds.
_DECLARED = 0.01
# It traces forward and backward as any backend does, and needs no compiler of the system.
_BACKEND = "aot_eager"
# What to change where a count lacks something, by its name; _FORMULA of operators.
_FORMULA = (
    "register a formula with torch.utils.flop_counter.register_flop_formula, or use matrix products"
)
_COUNTED_IF = {
    CALLS: "do the same in each call after the first: nothing counts calls or grows with them",
    SQUARES: "write squared distances as |q|² + |k|² - 2 q kᵀ, with a matrix product",
    ELEMENTWISE: "write what multiplies and adds as matrix products or torch.einsum",
    **dict.fromkeys(
        (THREADS, UNSEEN),
        "run all operators in the thread that calls forward, with dispatch modes on: a batched"
        " product does the work of several threads",
    ),
}
# Products in no sum that is counted, as a share of the count: more than gates and recurrences are.
_UNSUMMED = 0.2
_UNKNOWN_OPTION = "an_option_that_no_mechanism_has"
# Steps of central differences in float64: a small one, which seldom crosses a kink, and a larger
# one, which rounding harms less. A gradient is wrong where neither agrees with it, to this share of
# the scale of the derivative.
_STEPS, _DERIVATIVE = (1e-6, 5e-5), 1e-5


@dataclass(frozen=True)
class Check:
    """One rule of the contract.

    Attributes:
        name: for the table.
        advice: what to change where the mechanism itself raises an error.
        run: raises a `VerdictError`; whatever else it raises is a failure.
        essential: without it the checks that follow mean nothing.
        once: run with the first set of options alone, for what takes long.
    """

    name: str
    advice: str
    run: Callable[[Subject], None]
    essential: bool = False
    once: bool = False

    @property
    def rule(self) -> str:
        """What holds where it passes."""
        text = " ".join((self.run.__doc__ or "").split()).removesuffix(".")
        return text[:1].lower() + text[1:]


CHECKS: list[Check] = []


def check(
    name: str, advice: str, *, essential: bool = False, once: bool = False
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a function to CHECKS; its docstring is the rule."""

    def add(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS.append(Check(name, advice, run, essential=essential, once=once))
        return run

    return add


@check(
    "constructor",
    "build it with Class(dim=48, num_heads=3, num_global=2) and correct what it raises",
    essential=True,
)
def constructor(subject: Subject) -> None:
    """Takes dim, num_heads and num_global; every option has a default."""
    accepted = accepted_options(subject.factory)
    absent = [name for name in _SIZE if name not in accepted]
    if absent:
        raise FailedError(
            f"the constructor does not take {', '.join(absent)}",
            "def __init__(self, *, dim: int, num_heads: int, num_global: int = 1, …)",
        )
    without = [
        name
        for name, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and name not in (*_SIZE, *_PLACE)
    ]
    if without:
        raise FailedError(
            f"no default for the option {', '.join(without)}",
            f"give {without[0]!r} a default: a suite builds every mechanism by its size alone",
        )
    subject.build()


@check("keywords", "see attentions/contract.py for what a mechanism may declare")
def keywords(subject: Subject) -> None:
    """Arguments by keyword only, unknown ones refused, declarations true."""
    accepted = accepted_options(subject.factory)
    positional = [
        name for name, p in accepted.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    if positional:
        raise FailedError(
            f"{', '.join(positional)} can be given by position",
            f"put * before {positional[0]!r}: def __init__(self, *, {positional[0]}, …)",
        )
    arch_option = getattr(subject.factory, "arch_option", None)
    if arch_option is not None and arch_option not in accepted:
        raise FailedError(
            f"arch_option names {arch_option!r}, which the constructor does not take",
            f"name one of {', '.join(accepted)}, or take {arch_option!r}",
        )
    if "relative" in getattr(subject.factory, "positions", ()) and "position" not in accepted:
        raise FailedError(
            "positions holds 'relative', but the constructor takes no position",
            "take position: str = 'absolute', or take 'relative' out of positions",
        )
    rows, columns = subject.grid
    tokens = subject.num_global + rows * columns
    place = dict(zip(_PLACE, (subject.grid, tokens, "absolute", 0), strict=True))
    arguments = {
        "dim": subject.dim,
        "num_heads": subject.num_heads,
        "num_global": subject.num_global,
        **{key: value for key, value in place.items() if key in accepted},
        **subject.options,
    }
    try:
        subject.factory(**arguments, **{_UNKNOWN_OPTION: None})
    except Exception:
        return
    raise FailedError(
        "any keyword is taken, so that a misspelt option goes unnoticed",
        "pass **kwargs on to super().__init__, or remove it",
    )


@check(
    "output",
    "forward(self, x, grid) takes x (B, num_global + rows * columns, dim) and returns the like",
    essential=True,
)
def plain_output(subject: Subject) -> None:
    """As many tokens and channels as came in, and their dtype."""
    refused = refusals(subject, [subject.grid], dtype=torch.float32)
    if refused:
        raise FailedError(refused[0], "handle it; or, if it is too small, name a larger --grid")
    module, x = subject.module(dtype=torch.float32), subject.tokens(dtype=torch.float32)
    y = run(module, x, subject.grid, f"grid {show(subject.grid)}")
    if y.dtype != x.dtype:
        raise FailedError(
            f"{y.dtype} for an input of {x.dtype}", "end with the input's dtype: y.to(x.dtype)"
        )


@check(
    "odd grids", "take rows and columns from grid; pad what must be a multiple, and cut the result"
)
def odd_grids(subject: Subject) -> None:
    """Grids with odd sides, none of them square."""
    refused = refusals(subject, subject.odd_grids)
    if refused:
        raise FailedError(
            refused[0],
            "pad the grid inside and cut the result; or, if its options are for larger grids,"
            " name a larger --grid",
        )


@check(
    "thin grids",
    "handle it, or raise ValueError with the grid as ROWSxCOLUMNS and the least that works",
)
def thin_grids(subject: Subject) -> None:
    """Grids of one token, one row and one column."""
    refused = refusals(subject, [(1, 1), (1, subject.grid[1]), (subject.grid[0], 1)])
    if refused:
        raise WarnedError(f"refused, by a clear error: {refused[0]}")


@check("global tokens", "the first num_global tokens of x are global, the grid comes after")
def few_globals(subject: Subject) -> None:
    """No global token, one and several."""
    for count in dict.fromkeys(max(few, subject.least_globals) for few in _FEW_GLOBALS):
        least = f"; or declare least_globals = {count + 1}" if count < 1 else ""
        with during(
            subject,
            f"num_global {count}",
            f"the first num_global tokens of x are global, the grid comes after{least}",
        ):
            module = subject.module(num_global=count)
            run(module, subject.tokens(num_global=count), subject.grid, f"num_global {count}")


@check("resolution", "let nothing depend on the grid it was made for, or declare fixed_size = True")
def resolution(subject: Subject) -> None:
    """One module takes another image size, or says that it cannot."""
    grid, other = subject.grid, subject.other_grid
    if subject.fixed_size:
        return _refuses(subject, other)
    module, fresh = (subject.module(grid=other) for _ in range(2))
    before = run(module, subject.tokens(), grid, f"grid {show(grid)}")
    when = f"grid {show(other)} after {show(grid)}"
    depends = "let nothing depend on the grid it was made for, or declare fixed_size = True"
    with during(subject, when, depends):
        changed = run(module, subject.tokens(other), other, when)
    keeps = "make what depends on the grid anew at each call, or keep it by its grid"
    expected = run(fresh, subject.tokens(other), other, f"grid {show(other)}")
    if difference(changed, expected) > subject.rounding:
        raise FailedError(f"{when}: another output than without the call before", keeps)
    if difference(run(module, subject.tokens(), grid, "again"), before) > subject.rounding:
        raise FailedError(f"grid {show(grid)} after {show(other)}: another output", keeps)
    return None


def _refuses(subject: Subject, other: Grid) -> None:
    module = subject.module()
    try:
        module(subject.tokens(other), other)
    except Exception:
        # Layers of others say it as they like.
        return
    raise FailedError(
        f"fixed_size is declared, but grid {show(other)} is taken after {show(subject.grid)}",
        "raise ValueError for another size, or take fixed_size out",
    )


@check("batch", "reduce over tokens or channels, never over dimension 0")
def batch(subject: Subject) -> None:
    """An image comes out the same whatever is beside it in the batch."""
    try:
        _alone_as_together(subject)
    except FailedError:
        # It may round to less inside, where sums of other batches are in another order.
        with InFloat64():
            _alone_as_together(subject)


def _alone_as_together(subject: Subject) -> None:
    module, x = subject.module(), subject.tokens()
    together = run(module, x, subject.grid, "a batch")
    for i in range(BATCH):
        alone = run(module, x[i : i + 1], subject.grid, "one image")
        if difference(together[i : i + 1], alone) > subject.rounding:
            raise FailedError(f"image {i} of {BATCH} comes out otherwise than alone")
    crowded = run(module, torch.cat([x[:1], 30 * x[1:]]), subject.grid, "a batch")
    if difference(crowded[:1], together[:1]) > subject.rounding:
        raise FailedError("an image comes out otherwise where its neighbours are large")


@check("gradients", "call backward on its output while training and correct what it raises")
def gradients(subject: Subject) -> None:
    """Finite gradients reach the input and every parameter, and the output's stays as it is."""
    module, x = subject.module().train(), subject.tokens().requires_grad_()
    y = module(no_leaf(x), subject.grid)
    check_output(y, x, "while training")
    if not y.requires_grad:
        raise FailedError("the output has no gradient", "remove no_grad, detach and .data")
    incoming = output_gradient(y)
    y.backward(incoming)
    if not torch.equal(incoming, output_gradient(y)):
        raise FailedError(
            "its backward changes the gradient of the output in place",
            "return new tensors from it: a residual connection gets the same gradient",
        )
    places = [("the input", x), *((f"parameter {n!r}", p) for n, p in module.named_parameters())]
    for what, value in places:
        if not value.requires_grad:
            continue
        if value.grad is None:
            raise FailedError(f"{what} got no gradient", "use it in forward, or remove it")
        if not value.grad.isfinite().all():
            raise FailedError(
                f"{what} got a gradient that is not finite",
                "look for a square root or a norm at zero, or a division by zero",
            )
        if not value.grad.any():
            raise FailedError(
                f"{what} got a gradient that is zero everywhere",
                "it has no effect on the output: do not detach or round it, or remove it",
            )


@check(
    "derivatives",
    "correct its backward: torch.autograd.gradcheck finds the part of it that is wrong; where it is"
    " meant, as of what is rounded, declare gradient_note",
)
def derivatives(subject: Subject) -> None:
    """Gradients equal central differences, for each layout of input and incoming gradient."""
    if subject.dtype != torch.float64:
        raise SkippedError("it does not work in float64, which finite differences need")
    try:
        gradients(subject)
    except FailedError as error:
        raise SkippedError(f"its gradients fail already: {error.reason}") from error
    try:
        with InFloat64():
            outcome(subject.module(), subject.tokens(), subject.grid)
    except Exception as error:
        raise SkippedError(
            "it rounds to less than float64 inside, which finite differences need, and does not run"
            f" where that is left out: {subject.reason(error)}"
        ) from error
    wrong: dict[int, str] = {}
    for batch, (layout, x, gradient) in itertools.product((1, 2), _layouts(subject)):
        found = _wrong_derivative(subject, x[:batch], gradient[:batch])
        if found:
            wrong.setdefault(batch, f"batch {batch}, {layout}: {found}")
    if not wrong:
        return
    note = getattr(subject.factory, "gradient_note", "")
    if note:
        raise WarnedError(f"by intent it is not the derivative: {note}")
    advice = ""
    if 2 not in wrong:
        advice = (
            "only batch 1 is wrong: on the CPU, some layers of torch 2.11, as nn.InstanceNorm2d,"
            " return a wrong gradient for batch 1 when the incoming one is channels-last; call"
            " .contiguous() on their input and their output's gradient, or write them otherwise"
        )
    raise FailedError(next(iter(wrong.values())), advice)


def _layouts(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Input and incoming gradient, each contiguous or strided as channels-first data is."""
    x = subject.tokens()
    gradient = output_gradient(x)

    def strided(value: Tensor) -> Tensor:
        return value.transpose(1, 2).contiguous().transpose(1, 2)

    yield "contiguous", x, gradient
    yield "strided incoming gradient", x, strided(gradient)
    yield "strided input", strided(x), gradient


def _wrong_derivative(subject: Subject, x: Tensor, gradient: Tensor) -> str | None:
    """Name the input or parameter whose gradient differs from central differences, if any does.

    Each is moved along one random direction; the derivative along it is the gradient's product
    with the direction.
    """
    module = subject.module()
    # What a call changes while training (running averages, the vectors of a spectral norm) is a
    # constant to its gradient, and another at each call; while evaluating it stays as it is.
    module.train(not _changed_by(subject.module().train(), x, subject.grid))
    moved = no_leaf(x.detach()).requires_grad_()

    def loss() -> Tensor:
        torch.manual_seed(0)
        forget(module)
        with InFloat64():
            y: Tensor = module(no_leaf(moved), subject.grid)
        return y

    module.zero_grad()
    with InFloat64():
        loss().backward(gradient)
    generator = torch.Generator().manual_seed(2)
    places = [
        ("the input", moved),
        *((f"parameter {n!r}", p) for n, p in module.named_parameters()),
    ]
    for what, value in places:
        if value.grad is None:
            continue
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        analytic = float((value.grad * direction).sum())
        for step in _STEPS:
            terms = _central_difference(loss, value, direction, step) * gradient
            numeric = float(terms.sum())
            # What a difference can tell is limited by the terms that cancel in the sum.
            scale = max(abs(numeric), float(terms.abs().sum()) ** 0.5, 1.0)
            if abs(numeric - analytic) <= _DERIVATIVE * scale:
                break
        else:
            return (
                f"the gradient of {what} is wrong: along a random direction it says"
                f" {analytic:.6g} and the output changes by {numeric:.6g}"
            )
    return None


@torch.no_grad()
def _central_difference(
    loss: Callable[[], Tensor], value: Tensor, direction: Tensor, step: float
) -> Tensor:
    """Return how the output changes with `value` along `direction`."""
    kept = value.clone()
    value.add_(direction, alpha=step)
    after = loss()
    value.copy_(kept).sub_(direction, alpha=step)
    before = loss()
    value.copy_(kept)
    return (after - before) / (2 * step)


@check("calls", "keep nothing on self in forward, and draw random numbers only where self.training")
def calls(subject: Subject) -> None:
    """No call leaves a trace: same input, same output; the input stays as it is."""
    module, x, other = subject.module(), subject.tokens(), subject.tokens(seed=1)
    kept = x.clone()
    with torch.no_grad():
        first = module(x, subject.grid)
        if not torch.equal(x, kept):
            raise FailedError("it changes its input", "work on a copy: no x += …, no x[…] = …")
        module(other, subject.grid)
        if difference(module(x, subject.grid), first) > 0:
            raise FailedError("the same input gives another output after a call in between")
    changed = _changed_by(subject.module(), x, subject.grid)
    if changed:
        raise FailedError(
            f"a call while evaluating changes {', '.join(changed)}",
            "change parameters and buffers only where self.training",
        )
    more = _kept_by(module, x, subject.grid)
    if more:
        raise FailedError(f"each call keeps {more:,} bytes more than the one before it")


@torch.no_grad()
def _kept_by(module: nn.Module, x: Tensor, grid: Grid) -> int:
    """Bytes that a call leaves more than it found, after others; 0 where that cannot be watched."""
    try:
        with LiveTensors() as watch:
            # What is kept by grid, or of the last few calls, is kept then.
            for _ in range(4):
                module(x, grid)
            before = watch.current
            module(x, grid)
            if watch.current > before:
                # Cycles of references are none that it keeps.
                gc.collect()
            return max(watch.current - before, 0)
    except Exception:
        # Not all that runs elsewhere does under a dispatch mode.
        return 0
    finally:
        torch.compiler.reset()


def _changed_by(module: nn.Module, x: Tensor, grid: Grid) -> list[str]:
    """Names of the parameters and buffers that a call changes."""
    before = {n: v.clone() for n, v in module.state_dict().items() if isinstance(v, Tensor)}
    with torch.no_grad():
        module(x.clone(), grid)
    after = module.state_dict()
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


@check("instances", "keep nothing that changes in the class body or the module")
def instances(subject: Subject) -> None:
    """Instances share nothing."""
    one, other = subject.module(seed=0), subject.module(seed=1)
    mine = {p.data_ptr(): name for name, p in one.named_parameters() if p.numel()}
    shared = [mine[p.data_ptr()] for p in other.parameters() if p.numel() and p.data_ptr() in mine]
    if shared:
        raise FailedError(
            f"two instances share the parameter {', '.join(map(repr, shared))}",
            "make it in __init__, not in the class body or the module",
        )
    x = subject.tokens()
    before = run(one, x, subject.grid, "the first instance")
    outcome(other.train(), subject.tokens(seed=1), subject.grid)
    run(other.eval(), subject.tokens(seed=2), subject.grid, "the second instance")
    if difference(run(one, x, subject.grid, "the first instance"), before) > 0:
        raise FailedError("calling one instance changes the output of another")


@check("copies", "register every tensor as a parameter or, by register_buffer, as a buffer")
def copies(subject: Subject) -> None:
    """Deep copies and loaded state dicts are equal and independent."""
    module, loaded, used = subject.module(seed=0), *(subject.module(seed=1) for _ in range(2))
    x = subject.tokens()
    run(used, x, subject.grid, "another seed")
    expected = run(module, x, subject.grid, "the original")
    loose = [
        ".".join(filter(None, (path, name)))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    ]
    named = f": {', '.join(loose)}" if loose else ""
    register = f"register every tensor as a parameter or, by register_buffer, as a buffer{named}"
    for other in (loaded, used):
        other.load_state_dict(module.state_dict())
        forget(other)
    if difference(run(loaded, x, subject.grid, "a loaded state dict"), expected) > 0:
        raise FailedError(
            "the state dict of one, loaded into another, gives another output", register
        )
    if difference(run(used, x, subject.grid, "a loaded state dict"), expected) > 0:
        raise FailedError(
            "the state dict of one, loaded into another after a call, gives another output",
            "keep nothing between calls that is made of weights, or drop it in train()",
        )
    before = attributes(used)
    run(used.train(), x, subject.grid, "a call in training")
    others = plain(changed(before, attributes(used)))
    loaded.load_state_dict(used.eval().state_dict())
    for other in (loaded, used):
        forget(other)
    trained = run(used, x, subject.grid, "after a call in training")
    is_lost = difference(run(loaded, x, subject.grid, "a loaded state dict"), trained) > 0
    twin = copied(module, Tensor.clone)
    if difference(run(twin, x, subject.grid, "a deep copy"), expected) > 0:
        raise FailedError("a deep copy gives another output", register)
    disturb(twin)
    run(twin, x, subject.grid, "a deep copy")
    if difference(run(module, x, subject.grid, "the original"), expected) > 0:
        raise FailedError("changing a deep copy changes the original", register)
    if others or is_lost:
        raise WarnedError(
            f"a call in training changes {', '.join(others) or 'later outputs by something'}, which"
            " no state dict holds",
            "keep what later calls go by in a buffer, by register_buffer",
        )


@check(
    "precision",
    "make new tensors with the dtype and device of x: x.new_zeros(…), torch.ones_like(x)",
)
def precision(subject: Subject) -> None:
    """Float64 stays float64, and float32 agrees with it."""
    module, x = subject.module(dtype=torch.float64), subject.tokens(dtype=torch.float64)
    exact = run(module, x, subject.grid, "float64")
    if exact.dtype != x.dtype:
        raise FailedError(f"{exact.dtype} for an input of {x.dtype}")
    single = run(copied(module, Tensor.clone).float(), x.float(), subject.grid, "float32")
    apart = difference(single, exact)
    if apart > _SINGLE:
        raise FailedError(
            f"float32 is {apart:.0e} of the largest value away from float64",
            "look for differences of large numbers and sums of many small ones",
        )


@check(
    "autocast", "keep one dtype in each product; compute exponentials and sums of them in float32"
)
def autocast(subject: Subject) -> None:
    """Bfloat16 autocast: finite output and gradients."""
    module = subject.module(dtype=torch.float32)

    def rounded(x: Tensor, grid: Grid) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = module(x, grid)
        return y

    worst = 0.0
    for scale in (1, 10):
        x = scale * subject.tokens(dtype=torch.float32)
        exact = outcome(module, x, subject.grid)
        found = outcome(module, x, subject.grid, call=rounded)
        for what, value in found.items():
            if not value.isfinite().all() and exact[what].isfinite().all():
                times = f", its input times {scale}" if scale > 1 else ""
                raise FailedError(f"under bfloat16 autocast{times}, {what} is not finite")
        if scale == 1:
            worst = difference(found[OUTPUT], exact[OUTPUT])
    if worst > _HALF:
        raise WarnedError(
            f"bfloat16 autocast is {worst:.0%} of the largest value away from float32",
            "compute what is delicate with torch.autocast(x.device.type, enabled=False)",
        )


@check(
    "compile",
    "avoid what torch.compile cannot trace, or wrap it with torch.compiler.disable",
    once=True,
)
def compiles(subject: Subject) -> None:
    """Torch.compile gives the same output, in one graph."""
    module, x = subject.module(), subject.tokens()
    expected = outcome(module, x, subject.grid)
    torch._dynamo.reset()
    broken = ""
    try:
        compiled = torch.compile(module, backend=_BACKEND, fullgraph=True)
        actual = outcome(module, x, subject.grid, call=compiled)
    except torch._dynamo.exc.TorchDynamoException as error:
        broken = subject.reason(error)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=_BACKEND)
        actual = outcome(module, x, subject.grid, call=compiled)
    finally:
        torch._dynamo.reset()
    for what, apart in differences(actual, expected):
        if apart > subject.rounding:
            raise FailedError(f"compiled, {what} is off by {apart:.0e} of the largest value")
    if broken:
        raise WarnedError(
            f"it compiles in pieces: {broken}",
            "avoid .item(), prints and branches on values of tensors in forward",
        )


@check(
    "FLOPs",
    "make constants with device=x.device, and branch on no value of a tensor: no .item(),"
    " .tolist(), .numpy() or boolean indexing",
)
def multiply_adds(subject: Subject) -> None:
    """Each operator has its FLOPs counted, and multiply_adds is true."""
    # The second is large enough for what grows with the square of the tokens to stand out.
    for grid in (subject.grid, (4 * subject.grid[0], 4 * subject.grid[1])):
        module = subject.build(grid=grid)
        length = subject.num_global + grid[0] * grid[1]
        counted = count_call(module, (torch.empty(1, length, subject.dim, device="meta"), grid))
        if counted.uncounted:
            raise FailedError(
                f"not in the count: {', '.join(counted.uncounted)}",
                "; ".join(dict.fromkeys(_COUNTED_IF.get(n, _FORMULA) for n in counted.uncounted)),
            )
        declare = getattr(module, "multiply_adds", None)
        declared = counted.total if declare is None else declare(grid)
        if abs(declared - counted.total) > _DECLARED * counted.total:
            raise FailedError(
                f"multiply_adds(({grid[0]}, {grid[1]})) declares {declared:,},"
                f" but {counted.total:,} run",
                "correct multiply_adds, or remove it: what runs is counted anyway",
            )
    # Nothing ran on this grid before.
    with during(subject, "after a count", "keep what forward makes by the device of x too"):
        run(module.to(subject.dtype).eval(), subject.tokens(grid), grid, "after a count")
    if counted.unsummed > _UNSUMMED * counted.total:
        raise WarnedError(
            f"{counted.unsummed:,} products of elements are in no sum that is counted, beside"
            f" {counted.total:,} multiply-adds that are",
            "write those of scores and weighted sums as matrix products",
        )
    if counted.notes:
        raise WarnedError(
            counted.notes[0],
            "make constants with device=x.device and branch on no value of a tensor",
        )


@check(
    "reference",
    "both take the same parameters by name; correct the one that differs from the paper",
)
def reference(subject: Subject) -> None:
    """Implementation='fast' equals 'reference', gradients too."""
    if "implementation" not in accepted_options(subject.factory):
        raise SkippedError("no option 'implementation': there is no oracle to compare with")
    grids = (subject.grid, *subject.odd_grids[:2])
    few = dict.fromkeys((subject.least_globals, subject.num_global))
    for grid, count in itertools.product(grids, few):
        fast, slow = (
            subject.module(grid=grid, num_global=count, implementation=form)
            for form in ("fast", "reference")
        )
        slow.load_state_dict(fast.state_dict())
        x = subject.tokens(grid, num_global=count)
        for what, apart in differences(outcome(fast, x, grid), outcome(slow, x, grid)):
            if apart > subject.rounding:
                raise FailedError(
                    f"grid {show(grid)}, num_global {count}:"
                    f" {what} is off by {apart:.0e} of the largest value"
                )
