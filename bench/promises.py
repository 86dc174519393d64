"""The promises of an attention module's contract, one small function each.

`attentions/contract.py` says what a mechanism is. Each function here tries one promise on a
`Subject`, a mechanism with one set of options, and raises `FailedError` with what to change where
it is broken. `bench.conformance` runs them all and says what they found.
"""

import contextlib
import copy
import inspect
import itertools
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attentions
from attentions.contract import Grid, accepted_options
from bench.flops import count_call

SIZE = ("dim", "num_heads", "num_global")
PLACE = ("grid", "seq_len", "position", "block_index")
DIM, NUM_HEADS, NUM_GLOBAL = 48, 3, 2
GRID: Grid = (6, 8)
_BATCH = 3
# Added to the initial parameters, so that one that starts at zero does not hide the others.
_SPREAD = 0.2
_FEW_GLOBALS = (0, 1, 3)
# Largest differences, relative to the largest value but at least to 1: between two sums of the same
# numbers in another order, and between single or half precision and the one above.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_SINGLE, _HALF = 1e-3, 0.1
# Characters of an error that are shown.
_LONGEST = 200
# Of multiply-adds.
_DECLARED = 0.01
# It traces forward and backward as any backend does, and needs no compiler of the system.
_BACKEND = "aot_eager"
_UNKNOWN_OPTION = "an_option_that_no_mechanism_has"


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
    """A promise is broken."""

    status = "failed"


class WarnedError(VerdictError):
    """A promise is kept, but at a cost or within limits."""

    status = "warning"


class SkippedError(VerdictError):
    """A promise does not apply."""

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
        shape = (_BATCH, count, self.dim)
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


def disturb(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter off its value by a little, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(_SPREAD * noise.to(parameter.dtype))


def one_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], _LONGEST, placeholder=" …") if lines else "without a message"


def constructor(subject: Subject) -> None:
    """It can be built from its size, its place and the options given."""
    accepted = accepted_options(subject.factory)
    absent = [name for name in SIZE if name not in accepted]
    if absent:
        raise FailedError(
            f"the constructor does not take {', '.join(absent)}",
            "def __init__(self, *, dim: int, num_heads: int, num_global: int = 1, …)",
        )
    without = [
        name
        for name, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and name not in (*SIZE, *PLACE)
    ]
    if without:
        raise FailedError(
            f"no default for the option {', '.join(without)}",
            f"give {without[0]!r} a default: a suite builds every mechanism by its size alone",
        )
    subject.build()


def keywords(subject: Subject) -> None:
    """Arguments are given by keyword, unknown ones refused, and declarations true."""
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
    place = dict(zip(PLACE, (subject.grid, tokens, "absolute", 0), strict=True))
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


def plain_output(subject: Subject) -> None:
    """In float32, it returns what came in: tokens, channels and dtype."""
    refused = _refused(subject, [subject.grid], dtype=torch.float32)
    if refused:
        raise FailedError(refused[0], "handle it; or, if it is too small, name a larger --grid")
    module, x = subject.module(dtype=torch.float32), subject.tokens(dtype=torch.float32)
    y = _call(module, x, subject.grid, f"grid {_size(subject.grid)}")
    if y.dtype != x.dtype:
        raise FailedError(
            f"{y.dtype} for an input of {x.dtype}", "end with the input's dtype: y.to(x.dtype)"
        )


def odd_grids(subject: Subject) -> None:
    """It takes grids with odd sides."""
    refused = _refused(subject, subject.odd_grids)
    if refused:
        raise FailedError(
            refused[0],
            "pad the grid inside and cut the result; or, if its options are for larger grids,"
            " name a larger --grid",
        )


def thin_grids(subject: Subject) -> None:
    """It takes grids of one row or column, or says clearly that it does not."""
    refused = _refused(subject, [(1, 1), (1, subject.grid[1]), (subject.grid[0], 1)])
    if refused:
        raise WarnedError(f"refused, by a clear error: {refused[0]}")


def few_globals(subject: Subject) -> None:
    """It takes no global token, or as few as it declares, and several."""
    for count in dict.fromkeys(max(few, subject.least_globals) for few in _FEW_GLOBALS):
        least = f"; or declare least_globals = {count + 1}" if count < 1 else ""
        with _when(
            subject,
            f"num_global {count}",
            f"the first num_global tokens of x are global, the grid comes after{least}",
        ):
            module = subject.module(num_global=count)
            _call(module, subject.tokens(num_global=count), subject.grid, f"num_global {count}")


def resolution(subject: Subject) -> None:
    """One module takes another size and keeps nothing of the one before; or refuses it."""
    grid, other = subject.grid, subject.other_grid
    if subject.fixed_size:
        return _refuses(subject, other)
    module, fresh = (subject.module(grid=other) for _ in range(2))
    before = _call(module, subject.tokens(), grid, f"grid {_size(grid)}")
    when = f"grid {_size(other)} after {_size(grid)}"
    depends = "let nothing depend on the grid it was made for, or declare fixed_size = True"
    with _when(subject, when, depends):
        changed = _call(module, subject.tokens(other), other, when)
    keeps = "make what depends on the grid anew at each call, or keep it by its grid"
    expected = _call(fresh, subject.tokens(other), other, f"grid {_size(other)}")
    if _apart(changed, expected) > subject.rounding:
        raise FailedError(f"{when}: another output than without the call before", keeps)
    if _apart(_call(module, subject.tokens(), grid, "again"), before) > subject.rounding:
        raise FailedError(f"grid {_size(grid)} after {_size(other)}: another output", keeps)
    return None


def _refuses(subject: Subject, other: Grid) -> None:
    module = subject.module()
    try:
        module(subject.tokens(other), other)
    except ValueError:
        return
    raise FailedError(
        f"fixed_size is declared, but grid {_size(other)} is taken after {_size(subject.grid)}",
        "raise ValueError for another size, or take fixed_size out",
    )


def batch(subject: Subject) -> None:
    """An image does not see its neighbours in the batch."""
    module, x = subject.module(), subject.tokens()
    together = _call(module, x, subject.grid, "a batch")
    for i in range(_BATCH):
        alone = _call(module, x[i : i + 1], subject.grid, "one image")
        if _apart(together[i : i + 1], alone) > subject.rounding:
            raise FailedError(f"image {i} of {_BATCH} comes out otherwise than alone")
    crowded = _call(module, torch.cat([x[:1], 30 * x[1:]]), subject.grid, "a batch")
    if _apart(crowded[:1], together[:1]) > subject.rounding:
        raise FailedError("an image comes out otherwise where its neighbours are large")


def gradients(subject: Subject) -> None:
    """Finite gradients reach the input and every parameter while training."""
    module, x = subject.module().train(), subject.tokens().requires_grad_()
    y = module(_no_leaf(x), subject.grid)
    _check_output(y, x, "while training")
    if not y.requires_grad:
        raise FailedError("the output has no gradient", "remove no_grad, detach and .data")
    y.backward(_weights(y))
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


def calls(subject: Subject) -> None:
    """While evaluating, a call leaves no trace and draws no random number."""
    module, x, other = subject.module(), subject.tokens(), subject.tokens(seed=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kept = x.clone()
    with torch.no_grad():
        first = module(x, subject.grid)
        if not torch.equal(x, kept):
            raise FailedError("it changes its input", "work on a copy: no x += …, no x[…] = …")
        module(other, subject.grid)
        if _apart(module(x, subject.grid), first) > 0:
            raise FailedError("the same input gives another output after a call in between")
    changed = [
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    ]
    if changed:
        raise FailedError(
            f"a call while evaluating changes {', '.join(changed)}",
            "change parameters and buffers only where self.training",
        )


def instances(subject: Subject) -> None:
    """Two instances share no parameter, and a call of one does not change the other."""
    one, other = subject.module(seed=0), subject.module(seed=1)
    mine = {p.data_ptr(): name for name, p in one.named_parameters() if p.numel()}
    shared = [mine[p.data_ptr()] for p in other.parameters() if p.numel() and p.data_ptr() in mine]
    if shared:
        raise FailedError(
            f"two instances share the parameter {', '.join(map(repr, shared))}",
            "make it in __init__, not in the class body or the module",
        )
    x = subject.tokens()
    before = _call(one, x, subject.grid, "the first instance")
    _outcome(other.train(), subject.tokens(seed=1), subject.grid)
    _call(other.eval(), subject.tokens(seed=2), subject.grid, "the second instance")
    if _apart(_call(one, x, subject.grid, "the first instance"), before) > 0:
        raise FailedError("calling one instance changes the output of another")


def copies(subject: Subject) -> None:
    """Deep copies and loaded state dicts are equal to what they are of, and independent."""
    module, loaded = subject.module(seed=0), subject.module(seed=1)
    x = subject.tokens()
    expected = _call(module, x, subject.grid, "the original")
    loose = [
        ".".join(filter(None, (path, name)))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    ]
    named = f": {', '.join(loose)}" if loose else ""
    register = f"register every tensor as a parameter or, by register_buffer, as a buffer{named}"
    loaded.load_state_dict(module.state_dict())
    if _apart(_call(loaded, x, subject.grid, "a loaded state dict"), expected) > 0:
        raise FailedError(
            "the state dict of one, loaded into another, gives another output", register
        )
    copied = copy.deepcopy(module)
    if _apart(_call(copied, x, subject.grid, "a deep copy"), expected) > 0:
        raise FailedError("a deep copy gives another output", register)
    disturb(copied)
    _call(copied, x, subject.grid, "a deep copy")
    if _apart(_call(module, x, subject.grid, "the original"), expected) > 0:
        raise FailedError("changing a deep copy changes the original", register)


def precision(subject: Subject) -> None:
    """float64 in, float64 out, and float32 close to it."""
    module, x = subject.module(dtype=torch.float64), subject.tokens(dtype=torch.float64)
    exact = _call(module, x, subject.grid, "float64")
    if exact.dtype != x.dtype:
        raise FailedError(f"{exact.dtype} for an input of {x.dtype}")
    single = _call(copy.deepcopy(module).float(), x.float(), subject.grid, "float32")
    apart = _apart(single, exact)
    if apart > _SINGLE:
        raise FailedError(
            f"float32 is {apart:.0e} of the largest value away from float64",
            "look for differences of large numbers and sums of many small ones",
        )


def autocast(subject: Subject) -> None:
    """Under bfloat16 autocast, output and gradients are finite."""
    module = subject.module(dtype=torch.float32)

    def rounded(x: Tensor, grid: Grid) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = module(x, grid)
        return y

    worst = 0.0
    for scale in (1, 10):
        x = scale * subject.tokens(dtype=torch.float32)
        exact = _outcome(module, x, subject.grid)
        found = _outcome(module, x, subject.grid, call=rounded)
        for what, value in found.items():
            if not value.isfinite().all() and exact[what].isfinite().all():
                times = f", its input times {scale}" if scale > 1 else ""
                raise FailedError(f"under bfloat16 autocast{times}, {what} is not finite")
        if scale == 1:
            worst = _apart(found[_OUTPUT], exact[_OUTPUT])
    if worst > _HALF:
        raise WarnedError(
            f"bfloat16 autocast is {worst:.0%} of the largest value away from float32",
            "compute what is delicate with torch.autocast(x.device.type, enabled=False)",
        )


def compiles(subject: Subject) -> None:
    """torch.compile gives the same output and gradients, in one graph."""
    module, x = subject.module(), subject.tokens()
    expected = _outcome(module, x, subject.grid)
    torch._dynamo.reset()
    broken = ""
    try:
        compiled = torch.compile(module, backend=_BACKEND, fullgraph=True)
        actual = _outcome(module, x, subject.grid, call=compiled)
    except torch._dynamo.exc.TorchDynamoException as error:
        broken = subject.reason(error)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=_BACKEND)
        actual = _outcome(module, x, subject.grid, call=compiled)
    finally:
        torch._dynamo.reset()
    for what, apart in _differences(actual, expected):
        if apart > subject.rounding:
            raise FailedError(f"compiled, {what} is off by {apart:.0e} of the largest value")
    if broken:
        raise WarnedError(
            f"it compiles in pieces: {broken}",
            "avoid .item(), prints and branches on values of tensors in forward",
        )


def multiply_adds(subject: Subject) -> None:
    """It runs on the meta device, every operator is counted, and what it declares is true."""
    for grid in (subject.grid, subject.other_grid):
        with torch.device("meta"):
            module = subject.build(grid=grid)
            tokens = torch.empty(1, subject.num_global + grid[0] * grid[1], subject.dim)
            counted = count_call(module, (tokens, grid))
        if counted.uncounted:
            raise FailedError(
                f"no formula for {', '.join(counted.uncounted)}",
                "register one with torch.utils.flop_counter.register_flop_formula, or use matrix"
                " products",
            )
        declare = getattr(module, "multiply_adds", None)
        if declare is None:
            continue
        declared = declare(grid)
        if abs(declared - counted.total) > _DECLARED * counted.total:
            raise FailedError(
                f"multiply_adds(({grid[0]}, {grid[1]})) declares {declared:,},"
                f" but {counted.total:,} run",
                "correct multiply_adds, or remove it: what runs is counted anyway",
            )


def reference(subject: Subject) -> None:
    """The fast form equals the oracle, gradients too."""
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
        for what, apart in _differences(_outcome(fast, x, grid), _outcome(slow, x, grid)):
            if apart > subject.rounding:
                raise FailedError(
                    f"grid {_size(grid)}, num_global {count}:"
                    f" {what} is off by {apart:.0e} of the largest value"
                )


_OUTPUT = "the output"


def _size(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value, but at least to 1."""
    if actual.shape != expected.shape:
        raise FailedError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not actual.numel():
        return 0.0
    actual, expected = actual.double(), expected.double()
    largest = max(1.0, float(expected.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    same = torch.isclose(actual, expected, rtol=0, atol=0, equal_nan=True)
    difference = (actual - expected).abs().nan_to_num(nan=float("inf")).masked_fill(same, 0.0)
    return float(difference.max()) / largest


def _call(module: nn.Module, x: Tensor, grid: Grid, when: str) -> Tensor:
    """Call a mechanism without gradients, on a copy of x, with the same random numbers each time.

    Whether it changes its input or draws at random is for `calls` alone to say.

    Raises:
        FailedError: where the result is no tensor of the input's shape, or is not finite.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        y = module(x.clone(), grid)
    _check_output(y, x, when)
    return y


def _check_output(y: object, x: Tensor, when: str) -> None:
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
def _when(subject: Subject, when: str, advice: str = "") -> Iterator[None]:
    """Say when an error of the mechanism happened, as a `FailedError`."""
    try:
        yield
    except VerdictError:
        raise
    except Exception as error:
        raise FailedError(f"{when}: {subject.reason(error)}", advice) from error


def _refused(
    subject: Subject, grids: Sequence[Grid], *, dtype: torch.dtype | None = None
) -> list[str]:
    """Call on every grid; return what was said where one was refused by a clear error."""
    refused = []
    for grid in grids:
        when = f"grid {_size(grid)}"
        with _when(subject, when):
            module, x = subject.module(grid=grid, dtype=dtype), subject.tokens(grid, dtype=dtype)
            try:
                _call(module, x, grid, when)
            except ValueError as error:
                if _size(grid) not in str(error):
                    raise
                refused.append(one_line(error))
    return refused


def _no_leaf(x: Tensor) -> Tensor:
    """x for a mechanism that changes it in place, as no leaf may be; `calls` says that it does."""
    return x + 0


def _weights(y: Tensor) -> Tensor:
    """A gradient for the output that favours no direction."""
    return torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)


def _outcome(
    module: nn.Module, x: Tensor, grid: Grid, *, call: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter; of `call`, where it is given."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(0)
    y = (module if call is None else call)(_no_leaf(x), grid)
    if y.requires_grad:
        y.backward(_weights(y))
    gradients = {
        f"the gradient of {name}": parameter.grad.clone()
        for name, parameter in [("the input", x), *module.named_parameters()]
        if parameter.grad is not None
    }
    return {_OUTPUT: y.detach(), **gradients}


def _differences(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """How far apart each part of two outcomes is; a part that one of them lacks is infinitely."""
    for what in {**expected, **actual}:
        both = what in actual and what in expected
        yield what, _apart(actual[what], expected[what]) if both else float("inf")
