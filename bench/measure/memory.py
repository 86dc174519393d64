"""Peak memory of a call.

On a CUDA device: what torch's caching allocator handed out, its statistics reset before.

On the CPU: live tensor bytes, the sum of the storages that are alive, each counted once. They are
taken after every operator, so the number is the same on each run and on each machine, and holds no
allocator slack, no Python and no library. Scratch that a kernel allocates and frees within one
operator (an oneDNN convolution reorders its input, for one) is not in it: it differs between
processors and says nothing about the model. What the fast path of nn.MultiheadAttention does in one
operator is: its scores are the model's. It is a measure of the model's tensors, not of the
process.
"""

import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATOR = "allocator"
LIVE_TENSORS = "live tensor bytes"

# Their argument is a tensor made just then outside of the dispatcher, as by `torch.tensor`.
JUST_MADE = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


class NotMeasuredError(RuntimeError):
    """A call that runs, but not where its tensors are watched."""


@dataclass(frozen=True)
class MemoryPeak:
    """The peak during a call.

    Attributes:
        bytes: the largest amount in use at once, what was in use before included.
        kind: "allocator" on CUDA, "live tensor bytes" on the CPU.
        device: for example "cpu" or "cuda:0 (NVIDIA H100)".
        before: bytes in use before the call: parameters, optimizer state, inputs.
        after: bytes in use after the call; more than before where calls leave ever more.
        reserved: the allocator's largest reservation in bytes; None on the CPU.
    """

    bytes: int
    kind: str
    device: str
    before: int
    after: int
    reserved: int | None = None


def peak(
    fn: Callable[[], object],
    *,
    device: torch.device | str,
    live: Iterable[object] = (),
    prepare: Callable[[], object] | None = None,
    watch: "LiveTensors | None" = None,
) -> MemoryPeak:
    """Run `fn` once and return the peak memory on `device`.

    Args:
        fn: the work; what it returns is dropped.
        device: "cpu" or a CUDA device.
        live: on the CPU, what was alive before `fn` and counts: tensors, modules (parameters,
            buffers, gradients), optimizers (state, parameters, gradients), or containers of them.
            Tensors that `fn` uses and did not make are found without it. On CUDA it is not needed.
        prepare: run before; a first call of `fn`, where that allocates what stays: optimizer state,
            or what a mechanism keeps, which `fn` need not use.
        watch: on the CPU, that of measurements before, which knows what they left.

    Raises:
        ValueError: for another kind of device.
        NotMeasuredError: on the CPU, for a call that runs only where nobody sees its operators.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if prepare is not None:
            prepare()
        gc.collect()
        return _allocator_peak(fn, device)
    if device.type != "cpu":
        raise ValueError(f"memory cannot be measured on device {device}; allowed: cpu, cuda")
    return _live_peak(fn, live, prepare, watch or LiveTensors())


def _allocator_peak(fn: Callable[[], object], device: torch.device) -> MemoryPeak:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    gc.collect()
    return MemoryPeak(
        bytes=torch.cuda.max_memory_allocated(device),
        kind=ALLOCATOR,
        device=f"{device} ({torch.cuda.get_device_name(device)})",
        before=before,
        after=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
    )


def _live_peak(
    fn: Callable[[], object],
    live: Iterable[object],
    prepare: Callable[[], object] | None,
    watch: "LiveTensors",
) -> MemoryPeak:
    watch.found_before(live)
    watch.begin()
    error: Exception | None = None
    try:
        with no_collector(), watch:
            if prepare is not None:
                prepare()
                gc.collect()
                watch.begin()
            fn()
            gc.collect()
    except Exception as caught:
        error = caught
    # What torch traced under a mode (FlexAttention, torch.cond) fails without it.
    torch.compiler.reset()
    if error is not None:
        # What fails unseen too is no matter of the watch.
        if prepare is not None:
            prepare()
        fn()
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise NotMeasuredError(f"it does not run where its tensors are watched ({said})") from error
    return MemoryPeak(
        bytes=watch.peak,
        kind=LIVE_TENSORS,
        device="cpu",
        before=watch.before,
        after=watch.current,
    )


@contextmanager
def no_collector() -> Iterator[None]:
    """Without it, tensors in reference cycles are freed whenever the collector happens to run."""
    # Under a first dispatch mode torch imports its compiler, whose modules keep frames in reference
    # cycles: of all that is on the stack then, a mechanism's forward pass with its tensors for one.
    with LiveTensors():
        torch.empty(0)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def is_made_of_others(types: Iterable[type]) -> bool:
    """Whether tensors of such types do by others what is asked of them, as nested ones do.

    A mode that returns NotImplemented for them sees what these do.
    """
    return any(hasattr(kind, "__tensor_flatten__") for kind in types)


def run_higher_order(mode: TorchDispatchMode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator of functions, such as FlexAttention, so that a mode sees what it does.

    One without a form that is made of operators runs unseen.
    """
    dense = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
    if func is torch.ops.higher_order.cond:
        # Its own form refuses modes.
        condition, if_true, if_false, args = args
        dense = if_true if condition else if_false
    if dense is None:
        return func(*args, **kwargs)
    with mode:
        # Within torch's own call of its compiler it would be traced, with the mode in it.
        return torch.compiler.disable(dense)(*args, **kwargs)


def _tensors(things: object) -> Iterator[Tensor]:
    """Every tensor in nested containers, modules and optimizers."""
    if isinstance(things, Tensor):
        yield from _dense(things)
        if things.is_leaf and things.grad is not None:
            yield from _dense(things.grad)
    elif isinstance(things, nn.Module):
        yield from _held(things, set())
    elif isinstance(things, torch.optim.Optimizer):
        yield from _tensors([things.param_groups, things.state])
    elif isinstance(things, Mapping):
        yield from _tensors(list(things.values()))
    elif isinstance(things, Iterable) and not isinstance(things, str | bytes):
        for thing in things:
            yield from _tensors(thing)


def _held(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor of a module: parameters, buffers, and what other attributes hold."""
    if isinstance(thing, Tensor):
        yield from _tensors(thing)
    elif isinstance(thing, nn.Module | dict | list | tuple | set | deque) and id(thing) not in seen:
        seen.add(id(thing))
        inside = vars(thing) if isinstance(thing, nn.Module) else thing
        for one in list(inside.values() if isinstance(inside, dict) else inside):
            yield from _held(one, seen)


_ROWS = ("crow_indices", "col_indices", "values")
_COLUMNS = ("ccol_indices", "row_indices", "values")
# The tensors that a sparse one is made of, which has no storage of its own.
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
}


# Whole layers in one operator, the fast path of nn.MultiheadAttention and TransformerEncoderLayer.
_LAYERS = (
    torch.ops.aten._native_multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd,
)


def _within(call: Callable[[], Any]) -> tuple[Any, int]:
    """Run an operator; return its result, and the most bytes that it held above those of before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        result = call()
    # All that the allocator gives and takes back, in turn.
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    given = (event.nbytes() for event in events if event.name() == "[memory]")
    return result, max(itertools.accumulate(given), default=0)


def _dense(thing: object) -> tuple[Tensor, ...]:
    """The tensors with a storage that `thing` is made of; none if it is not a tensor."""
    if not isinstance(thing, Tensor):
        return ()
    if thing.layout not in _SPARSE:
        return (thing,)
    return tuple(getattr(thing.detach(), name)() for name in _SPARSE[thing.layout])


@dataclass(eq=False)
class Storage:
    """A storage that is or was alive.

    Attributes:
        size: in bytes.
        label: what `LiveTensors.label` was when it was first seen.
    """

    size: int
    label: str


class LiveTensors(TorchDispatchMode):
    """Keeps the sum of the CPU storages that are alive, and its peak, in bytes.

    Tensors without memory count like others: those of `FakeTensorMode` that claim to be on the CPU.

    Args:
        block: storages count as whole multiples of so many bytes.

    Attributes:
        before: bytes of what was alive before the watch began, or began anew.
        current: bytes alive now.
        peak: the largest `current` so far; it may be set back to `current` in between.
        label: given to storages that are first seen from now on.
    """

    supports_higher_order_operators = True

    def __init__(self, *, block: int = 1) -> None:
        super().__init__()
        self.block = block
        self.before = 0
        self.current = 0
        self.peak = 0
        self.label = ""
        self._alive: dict[int, Storage] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._usual: list[Any] = []

    def __enter__(self) -> "LiveTensors":
        usual = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = usual(storage, size)
            self._resized(storage)
            return result

        # No operator of torch does it; blocks that free their input and remake it do.
        self._usual.append(usual)
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010
        super().__enter__()
        return self

    def __exit__(self, *caught: Any) -> None:
        super().__exit__(*caught)
        setattr(torch.UntypedStorage, "resize_", self._usual.pop())  # noqa: B010

    def found_before(self, things: object) -> None:
        """Count tensors that were alive all the time."""
        for tensor in _tensors(things):
            self._add_before(tensor)

    def begin(self) -> None:
        """Let what is alive now be what was alive before, and forget the peak."""
        self.before = self.peak = self.current

    def storages(self, things: object) -> set[Storage]:
        """The storages of tensors in nested containers, modules and optimizers."""
        keys = {self._key(tensor) for tensor in _tensors(things)}
        return {self._alive[key] for key in keys if key in self._alive}

    def alive(self) -> tuple[Storage, ...]:
        """The storages that are alive now."""
        return tuple(self._alive.values())

    def peaked(self, operator: object) -> None:
        """Called after each operator that made a new peak."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator."""
        return func(*args, **kwargs)

    def _add_before(self, tensor: Tensor) -> None:
        added = self._update(tensor)
        self.before += added
        self.peak += added

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_made_of_others(types):
            return NotImplemented
        if isinstance(func, torch._ops.HigherOrderOperator):
            return run_higher_order(self, func, *args, **kwargs)
        if func not in JUST_MADE:
            for value in tree_leaves((args, kwargs)):
                for part in _dense(value):
                    if self._key(part) not in self._alive:
                        self._add_before(part)
        before, within, beside = self.current, 0, 0
        if func.overloadpacket in _LAYERS and not isinstance(args[0], FakeTensor):
            result, within = _within(lambda: self.call(func, args, kwargs))
        else:
            result = self.call(func, args, kwargs)
        for value in tree_leaves(result):
            for part in _dense(value):
                self._update(part)
        if func.overloadpacket is torch.ops.aten._safe_softmax:
            # A byte for each score says which are masked.
            beside = result.numel()
        most = max(self.current + beside, before + within)
        if most > self.peak:
            self.peak = most
            self.peaked(func)
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _update(self, tensor: Tensor) -> int:
        """Count a storage as large as it is now and return by how many bytes the sum grew."""
        if tensor.device.type != "cpu":
            return 0
        return self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = Storage(0, self.label)
            self._references[key] = weakref.ref(storage, lambda _: self._freed(key))
        entry = self._alive[key]
        grown = -(-storage.nbytes() // self.block) * self.block - entry.size
        entry.size += grown
        self.current += grown
        return grown

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            self._count(storage)
            self.peak = max(self.peak, self.current)

    def _freed(self, key: int) -> None:
        self.current -= self._alive.pop(key).size
        del self._references[key]
