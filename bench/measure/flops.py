"""Multiply-adds of a backbone, a detector or a mechanism, by part, from the operators that run.

One multiply-add is one unit: half of what `torch.utils.flop_counter` calls a FLOP. A complex
product is four. In the published convention attention is counted by the formulas of the published
table.

Counted are matrix products, convolutions and fused attention (queries times keys and weights times
values, densely: a causal or additive mask saves nothing), and products written out: an elementwise
product of two tensors that is summed over an axis which both have, or three or more of them that
are added up, as in a loop over neighbours, or a difference of all pairs that is squared and summed
(`products`). A sparse operand costs what it stores. Not counted are operators without products of
matrices, such as views, other elementwise operators, biases, reductions, normalisation, softmax,
pooling, interpolation, indexing, copies, sorting, random numbers and creation (`formulas.FREE`).
Every other operator that ran without a formula is listed in `uncounted`, and the count is then
incomplete. So are elementwise operators where their results hold far more elements than what is
counted and what a module gets account for; other differences that are squared and summed, as
distances to neighbours are, where they may be a hundredth of the count; threads that a module
starts; and tensors that operators made or wrote out of sight, as in threads from before the count,
and large ones that leave torch, as for NumPy. Elementwise products that are in no sum, as those of
gates, are counted apart, in `unsummed`.

A copy of the module runs on the meta device, so nothing is allocated or computed, whatever the size
of the image, and nothing is left in the module. A mechanism that cannot run there, since it reads a
value or holds a constant of the CPU, runs on random tokens on the CPU instead, inside of a
backbone that is still on the meta device. A mechanism is called twice, and its second call is
counted: tables that it makes once are no cost of an image.
"""

import copy
import gc
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from attentions.reads import deterministic
from bench.errors import InputError, choose
from bench.measure.fake import copied
from bench.measure.formulas import formula_of, is_complex, is_free
from bench.measure.memory import JUST_MADE, LiveTensors, is_made_of_others, run_higher_order
from bench.measure.products import Products
from bench.model.backbone import AttentionPlace, ViL
from bench.model.detectors import backbone_stages

Convention = Literal["actual", "published"]
CONVENTIONS = ("actual", "published")
UNIT = "multiply-adds"
# The name of products that are written out, among the operators.
WRITTEN_OUT = "aten.mul, aten.sum"
# Elementwise operators among those that are not counted, by the elements of their results.
ELEMENTWISE = "elements of elementwise operators"
# Threads that a module starts, whatever runs in them, and what is found to be made or written by
# operators in threads from before, or where modes are disabled.
THREADS, UNSEEN = "threads", "results of operators out of sight"
# Gradients of products that are written out, where fewer multiply-adds are found than they take.
GRADIENTS = "gradients of products written out"
# Where calls take now more and now less, or ever more.
CALLS = "multiply-adds of other calls"
# Differences of two tensors, squared and summed: distances to neighbours, or norms, which are free.
SQUARES = "squared differences"
# A share of a count that may be missing.
_FEW = 0.01
# Such elements that may be left out: as a share of what is counted, and for each element that a
# module gets; and those of sums with a product, as a recurrence adds up. No mechanism here that is
# linear in its tokens has 70 each, or adds up more than a sixth of what is counted.
_MANY, _MANY_ADDED = (0.5, 100), (0.2, 12)
# Elements of a constant that a mechanism may write in a list.
_SMALL = 100
_UNREGISTERED = (
    "it computes with a weight of shape {} that is not among its parameters: nothing would train,"
    " count or keep it; make it in __init__, as an nn.Parameter or within nn.ModuleList; or,"
    " if it is a variable of forward, as a tensor with requires_grad_()"
)
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_LEAVE = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist, Tensor.data_ptr)
# What a mechanism may take that has to run for real, in bytes and multiply-adds.
LARGEST_REAL_BYTES, LARGEST_REAL_COUNT = 4 * 10**9, 10**12

# The published totals hold every part but this one.
OUTSIDE_TOTAL = ("mask_head",)
_STAGE_1_STRIDE = 4
_META, _CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten


class NotCountedError(InputError):
    """A module whose operators cannot be counted; the reason is in the message.

    Attributes:
        needs_values: whether it could be counted if its parameters were not on the meta device.
    """

    def __init__(self, message: str, *, needs_values: bool = False) -> None:
        super().__init__(message)
        self.needs_values = needs_values


@dataclass(frozen=True)
class FlopReport:
    """Multiply-adds of a forward pass of one image.

    Attributes:
        total: what published tables count: the backbone without its classification head, FPN, RPN
            head and box head, or RetinaNet head. The mask head is not in it.
        by_part: by "stage1" …, "fpn", "rpn", "box_head", "mask_head", "retinanet_head" (whichever
            there are), or "attention" for a bare mechanism. Without "mask_head" they sum to
            `total`.
        by_operator: by operator, of what `total` holds. In the published convention attention is
            one entry a mechanism, "formula of <class>".
        uncounted: calls of operators without a formula, in all parts; empty in a complete count.
        image_size: (height, width) in pixels.
        proposals: boxes in the box head.
        detections: boxes in the mask head.
        convention: "actual" or "published".
        notes: how it was counted, where not on the meta device alone, and what first calls take.
        unsummed: multiply-adds of elementwise products that are in no sum that `total` holds, as
            those of gates.
        unit: "multiply-adds".
    """

    total: int
    by_part: Mapping[str, int]
    by_operator: Mapping[str, int]
    uncounted: Mapping[str, int]
    image_size: tuple[int, int]
    proposals: int
    detections: int
    convention: Convention
    notes: tuple[str, ...] = ()
    unsummed: int = 0
    unit: str = UNIT


@dataclass(frozen=True)
class OperatorCount:
    """Multiply-adds of the operators that ran.

    Attributes:
        by_part: multiply-adds by part and operator. Parts are, of a backbone, "stage1" … and
            "stage1 attention" …, and "" for everything else.
        uncounted: calls of operators that have no formula and are not free by nature, and elements
            of elementwise ones where they are too many to be left out.
        notes: what was counted on real tensors, and why, and what first calls take.
        unsummed: multiply-adds of elementwise products in the forward pass that are in no sum that
            is counted, as those of gates.
    """

    by_part: Mapping[str, Mapping[str, int]]
    uncounted: Mapping[str, int]
    notes: tuple[str, ...] = ()
    unsummed: int = 0

    @property
    def by_operator(self) -> Mapping[str, int]:
        """Multiply-adds by operator, of all parts."""
        return _merge(self.by_part.values())

    @property
    def total(self) -> int:
        """Multiply-adds of all operators."""
        return sum(self.by_operator.values())


@runtime_checkable
class _DividesIntoParts(Protocol):
    def part_calls(
        self, image_size: tuple[int, int], *, proposals: int, detections: int
    ) -> Iterable[Any]: ...


def count_flops(
    module: nn.Module,
    *,
    image_size: tuple[int, int] = (800, 1344),
    grid: tuple[int, int] | None = None,
    proposals: int = 1000,
    detections: int = 100,
    convention: Convention = "actual",
) -> FlopReport:
    """Count the multiply-adds of one image through a backbone, a detector or a bare mechanism.

    The module may be on any device, the meta device included; it is neither moved nor changed, and
    counted as in evaluation.

    Args:
        module: a `ViL`, a detector (it has `part_calls`), or an attention module (it has `dim` and
            `num_global`).
        image_size: (height, width) in pixels; padded to the backbone's total stride.
        grid: (rows, columns) for an attention module; by default that of stage 1, `image_size` / 4.
        proposals: boxes in the box head of a detector.
        detections: boxes in the mask head of a detector.
        convention: "actual", or "published": attention by the formulas of the published table,
            everything else as it runs.

    Raises:
        InputError: for an unknown convention, sizes that are not positive, a mechanism without a
            published formula, or a module that is none of the three.
        NotCountedError: for a mechanism that runs neither on the meta device nor, within
            LARGEST_REAL_BYTES and LARGEST_REAL_COUNT, on the CPU.
        ValueError: from a mechanism, for a size that it does not take.
    """
    choose(convention, CONVENTIONS, "FLOP convention")
    _check_positive(image_size=image_size, proposals=proposals, detections=detections, grid=grid)
    by_part: dict[str, Mapping[str, int]] = {}
    counts, unsummed = [], 0
    for name, part, inputs in _calls(module, image_size, grid, proposals, detections):
        counted = count_call(part, inputs)
        counts.append(counted)
        unsummed += counted.unsummed * (name not in OUTSIDE_TOTAL)
        by_part |= _parts(name, part, inputs, counted, published=convention == "published")
    by_operator = _merge(part for name, part in by_part.items() if name not in OUTSIDE_TOTAL)
    return FlopReport(
        total=sum(by_operator.values()),
        by_part={name: sum(part.values()) for name, part in by_part.items()},
        by_operator=dict(sorted(by_operator.items())),
        uncounted=dict(sorted(_merge(counted.uncounted for counted in counts).items())),
        image_size=image_size,
        proposals=proposals,
        detections=detections,
        convention=convention,
        notes=tuple(dict.fromkeys(note for counted in counts for note in counted.notes)),
        unsummed=unsummed,
    )


def _calls(
    module: nn.Module,
    image_size: tuple[int, int],
    grid: tuple[int, int] | None,
    proposals: int,
    detections: int,
) -> Iterator[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Each part with its name and its inputs on the meta device."""
    dtype = _dtype(module)
    if isinstance(module, _DividesIntoParts):
        calls = module.part_calls(image_size, proposals=proposals, detections=detections)
        for call in calls:
            yield call.name, call.module, call.make_inputs(_META, dtype)
    elif isinstance(module, ViL):
        yield "backbone", module, (torch.empty(1, 3, *image_size, device=_META, dtype=dtype),)
    else:
        grid = grid or (image_size[0] // _STAGE_1_STRIDE, image_size[1] // _STAGE_1_STRIDE)
        yield "attention", module, (tokens(module, grid), grid)


def _parts(
    name: str,
    module: nn.Module,
    inputs: tuple[Any, ...],
    counted: OperatorCount,
    *,
    published: bool,
) -> dict[str, Mapping[str, int]]:
    """Operators by part: of a backbone by stage, and everything outside of them as `name`."""
    places = _places(module)
    if not places:
        if not published or name != "attention":
            return {name: counted.by_operator}
        return {name: {_formula_name(module): _published_formula(module, inputs[1])}}
    parts: dict[str, Mapping[str, int]] = {}
    for stage in dict.fromkeys(f"stage{place.stage.number}" for place in places):
        attention = counted.by_part.get(f"{stage} attention", {})
        if published:
            height, width = inputs[0].shape[-2:]
            attention = _merge(
                {_formula_name(p.module): _published_formula(p.module, p.grid((height, width)))}
                for p in places
                if f"stage{p.stage.number}" == stage
            )
        parts[stage] = _merge([counted.by_part.get(stage, {}), attention])
    # What runs outside the stages belongs to the part too; a plain ViL has nothing there.
    rest = counted.by_part.get("", {})
    return parts | ({name: rest} if rest else {})


def count_call(
    module: nn.Module, inputs: tuple[Any, ...], *, training: bool = False
) -> OperatorCount:
    """Count `module(*inputs)`, in evaluation or as forward and backward of a training step.

    Args:
        module: on any device; neither moved nor changed: a copy on the meta device runs.
        inputs: with their tensors on the meta device.
        training: count the backward pass from the sum of all outputs too. A mechanism that does not
            run on the meta device is then not counted.

    Raises:
        NotCountedError: where it does not run on the meta device, nor on real tensors.
        ValueError: from a mechanism, for a size that it does not take.
    """
    counter = _Counter()
    on_meta = copied(module, lambda tensor: tensor.to(_META)).train(training)
    for one in (module, on_meta):
        counter.know_parameters(one)
    _follow(on_meta, module, counter, training=training)
    _MADE.see([inputs, [vars(part) for part in on_meta.modules()]])

    def run() -> None:
        outputs = on_meta(*inputs)
        counter.find_unseen(outputs)
        if training:
            parts = [out.sum() for out in tree_leaves(outputs) if isinstance(out, Tensor)]
            torch.stack(parts).sum().backward()

    counter.knows_inputs = True
    # Deterministic algorithms are other operators, as of interpolation.
    with torch.set_grad_enabled(training), deterministic(False), _SeesArrays(counter):
        try:
            return _run(counter, run, training=training)
        except (ValueError, NotCountedError):
            raise
        except Exception as error:
            # Whatever a module of others raises, a caller has one kind of error to know.
            raise NotCountedError(_not_counted(module, error)) from error


def count_operators(run: Callable[[], object]) -> OperatorCount:
    """Count whatever `run()` does, on whatever device, as it runs (backward passes too).

    Compiled functions run uncompiled, and `nn.MultiheadAttention` without its fast path, whose one
    operator hides the rest.
    """
    return _run(_Counter(), run)


def _run(
    counter: "_Counter", run: Callable[[], object], *, training: bool = False
) -> OperatorCount:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), _new_threads_marked(counter), counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    by_part = {part: dict(operators) for part, operators in counter.by_part.items()}
    for part, given in counter.given.items():
        # Gradients of matrix products would hide what the forward pass leaves out.
        for total, *elements in (counter.ahead[part], counter.elementwise[part]):
            over = (
                each > max(share * total, most * given)
                for each, (share, most) in zip(elements, (_MANY, _MANY_ADDED), strict=True)
            )
            if any(over):
                counter.uncounted[ELEMENTWISE] += max(elements)
                break
    if counter.squares > _FEW * counter.total:
        counter.uncounted[SQUARES] = counter.squares
    if training and counter.due - counter.found > _FEW * counter.total:
        counter.uncounted[GRADIENTS] = counter.due - counter.found
    if counter.of_first:
        more = f"{counter.of_first:,} multiply-adds of first calls, which the next ones do not take"
        counter.notes[f"{more}, are not counted"] = None
    unsummed = max(0, counter.products - counter.summed)
    return OperatorCount(by_part, dict(counter.uncounted), tuple(counter.notes), unsummed)


@contextmanager
def _new_threads_marked(counter: "_Counter") -> Iterator[None]:
    """A mode sees the operators of its own thread alone."""

    def mark(*_: object) -> None:
        sys.setprofile(None)
        counter.uncounted[THREADS] += 1

    before = threading.getprofile()
    threading.setprofile(mark)
    try:
        yield
    finally:
        threading.setprofile(before)


class _Storages:
    """Storages that were made before an operator's eyes, and how often written.

    What a mechanism keeps from one count to the next has been seen too.
    """

    def __init__(self) -> None:
        self._writes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def see(self, things: object, *, writes: int = 0) -> None:
        for _, storage, version in self._each(things):
            key = storage._cdata
            self._writes[key] = max(self._writes.get(key, 0), version + writes)
            if key not in self._references:
                self._references[key] = weakref.ref(storage, partial(self._freed, key))

    def see_all(self) -> None:
        """See what is there, as constants that a mechanism on the CPU keeps anywhere."""
        # A module that is not initialised yet, of another row perhaps, has nothing to see.
        found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
        self.see([one for one in found if not is_lazy(one)])

    def unseen(self, things: object, *, on_cpu: bool) -> int:
        """How many of the tensors were made or written otherwise.

        Indices and small constants do not count: nothing sees them made of values of Python in a
        backward pass. Nor do those in memory of NumPy's, which is not resizable.
        """
        return sum(
            (one.is_meta or (on_cpu and storage.resizable()))
            and _is_large(one)
            and version > self._writes.get(storage._cdata, -1)
            for one, storage, version in self._each(things)
        )

    def _each(self, things: object) -> Iterator[tuple[Tensor, torch.UntypedStorage, int]]:
        for one in tree_leaves(things):
            if isinstance(one, Tensor) and one.layout == torch.strided and not one.is_nested:
                yield one, one.untyped_storage(), 0 if one.is_inference() else one._version

    def _freed(self, key: int, _: object) -> None:
        del self._writes[key], self._references[key]


_MADE = _Storages()


class _SeesArrays(TorchFunctionMode):
    """Sees what is made of values of Python, where no operator does it, and what leaves torch."""

    def __init__(self, counter: "_Counter") -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LEAVE and _is_large(args[0]):
            self._counter.uncounted[UNSEEN] += 1
        elif func in _FROM_VALUES:
            _MADE.see(result)
        return result


def _is_large(tensor: Tensor) -> bool:
    """Whether it is no index or constant, which a mechanism may write in a list."""
    return tensor.numel() > _SMALL and (tensor.is_floating_point() or tensor.is_complex())


class _Counter(TorchDispatchMode):
    """Sees every operator and adds up what it costs, for the part that runs."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.parts = [""]
        self.by_part: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.uncounted: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        # Whether all tensors of before are known.
        self.knows_inputs = False
        # Parameters of what runs, of its copies too.
        self._parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # By part: multiply-adds, elements of all results that are not counted, and those of sums
        # with a product among them; of the forward pass alone; and elements that each module got.
        self.elementwise: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.ahead: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.given: Counter[str] = Counter()
        # Of products that are written out: what their gradients cost, and what of it was found.
        self.due, self.found = 0, 0
        # What first calls took more than second ones.
        self.of_first = 0
        self.squares = 0
        # Multiply-adds that the forward pass makes element by element, and those found in a sum.
        self.products, self.summed = 0, 0
        self._products = Products()
        self._live: LiveTensors | None = None
        self._limit = 0

    @property
    def total(self) -> int:
        return sum(part.total() for part in self.by_part.values())

    @contextmanager
    def undone(self, *, if_it_fails: bool = False) -> Iterator[None]:
        """Forget what is counted inside, or else where it ends with an error alone."""
        names = "by_part uncounted elementwise ahead squares due found products summed"
        counts = {name: copy.deepcopy(getattr(self, name)) for name in names.split()}
        depth, undone = len(self.parts), True
        try:
            yield
            undone = not if_it_fails
        finally:
            if undone:
                vars(self).update(counts)
                del self.parts[depth:]

    def second(self, call: Callable[[], Any]) -> Any:
        """Count a later call than the first, which makes tables that others find."""
        first = self._once(call)
        training = torch.is_grad_enabled()
        # After the call that is counted nothing may write in place what its backward pass needs.
        other = self._once(call) if training else None
        before = self.total
        result = call()
        counted = self.total - before
        if not training and first != counted:
            other = self._once(call)
        if other not in (None, counted):
            self.uncounted[CALLS] += abs(other - counted)
        else:
            self.of_first += max(0, first - counted)
        return result

    def _once(self, call: Callable[[], Any]) -> int:
        """What a call takes, without counting it."""
        before = self.total
        with self.undone():
            call()
            return self.total - before

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Refuse operators on real tensors that take too much memory or time."""
        self._limit = self.total + LARGEST_REAL_COUNT
        with LiveTensors() as self._live:
            try:
                yield
            finally:
                self._live = None

    def _check_limits(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        most = f"counting it on the CPU takes more than {LARGEST_REAL_BYTES / 1e9:g} GB"
        if self._live is None:
            return
        if self._live.current + _result_bytes(func, args, kwargs) > LARGEST_REAL_BYTES:
            raise NotCountedError(most)
        if self.total > self._limit:
            raise NotCountedError(f"{most} or {LARGEST_REAL_COUNT:.0e} multiply-adds")

    def know_parameters(self, module: nn.Module) -> None:
        self._parameters.update(dict.fromkeys(module.parameters()))
        kept = tree_leaves([vars(part) for part in module.modules()])
        self.check_weights(one for one in kept if isinstance(one, Tensor) and one.is_leaf)

    def check_weights(self, things: Iterable[object]) -> None:
        """Refuse weights that are no parameters: nothing would train, count or keep them."""
        for one in things:
            if isinstance(one, Tensor) and one.requires_grad and one not in self._parameters:
                raise ValueError(_UNREGISTERED.format(tuple(one.shape)))

    def find_unseen(self, things: object) -> None:
        """Mark the count where tensors were made or written by what no mode sees."""
        if not self.knows_inputs:
            return
        unseen = _MADE.unseen(things, on_cpu=self._live is not None)
        if unseen:
            self.uncounted[UNSEEN] += unseen
            _MADE.see(things)

    def add(self, operator: object, multiply_adds: int) -> None:
        if multiply_adds:
            self.by_part[self.parts[-1]][str(operator)] += multiply_adds
            self._tally(multiply_adds, 0, 0)

    def _tally(self, *counts: int) -> None:
        """Add multiply-adds, elements and elements of sums to those of this part."""
        part, is_ahead = self.parts[-1], torch._C._current_graph_task_id() == -1
        for tally in (self.elementwise[part], *([self.ahead[part]] if is_ahead else [])):
            tally[:] = (have + more for have, more in zip(tally, counts, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_made_of_others(types):
            return NotImplemented
        if isinstance(func, torch._ops.HigherOrderOperator):
            if torch._C.DispatchKey.CompositeExplicitAutograd not in func.py_kernels:
                self.uncounted[str(func)] += 1
            return run_higher_order(self, func, *args, **kwargs)
        operator = func.overloadpacket
        formula = formula_of(operator)
        if formula is None and not is_free(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self.uncounted[str(operator)] += 1
        self._check_limits(func, args, kwargs)
        if func not in JUST_MADE:
            self.find_unseen([args, kwargs])
        if self.knows_inputs:
            leaves = tree_leaves([args, kwargs])
            self.check_weights(one for one in leaves if isinstance(one, nn.Parameter))
        result = func(*args, **kwargs)
        _MADE.see(result, writes=func._schema.is_mutable)
        self._see_elements(func, args, result)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            if flops is None:
                self.uncounted[f"{operator} of sparse tensors"] += 1
            else:
                self.add(operator, flops // 2 * (4 if is_complex(args) else 1))
        return result

    def _see_elements(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Count products that are summed, and the elements of what is not counted."""
        seen = self._products.see(func, args, result)
        # A backward pass that computes a forward pass again has the gradients of the first.
        if torch._C._current_graph_task_id() == -1:
            self.due += seen.gradients
            self.products += seen.products
            self.summed += seen.multiply_adds
        elif not torch.is_grad_enabled():
            self.found += seen.multiply_adds
        self.squares += seen.squares
        self.add(WRITTEN_OUT, seen.multiply_adds)
        self._tally(0, seen.elements, seen.added)


def _follow(on_meta: nn.Module, module: nn.Module, counter: _Counter, *, training: bool) -> None:
    """Tell the counter which part runs, and let mechanisms run that cannot on the meta device."""
    for vil in _backbones(on_meta):
        for stage, layers in backbone_stages(vil).items():
            for layer in layers.children():
                _label(layer, stage, counter)
    originals = [place.module for place in _places(module)]
    for place, original in zip(_places(on_meta), originals, strict=True):
        _label(place.module, f"stage{place.stage.number} attention", counter)
        _let_run_for_real(place.module, original, counter, training=training)
    if not originals:
        _label(on_meta, "", counter)
        _let_run_for_real(on_meta, module, counter, training=training)


def _label(layer: nn.Module, part: str, counter: _Counter) -> None:
    def enter(_: nn.Module, inputs: Any) -> None:
        counter.parts.append(part)
        counter.given[part] += sum(x.numel() for x in tree_leaves(inputs) if isinstance(x, Tensor))

    def leave(*_: Any) -> None:
        counter.parts.pop()

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)


def _let_run_for_real(
    mechanism: Any, original: nn.Module, counter: _Counter, *, training: bool
) -> None:
    """Make a mechanism on the meta device run a copy of `original` on the CPU where it fails."""
    on_meta = mechanism.forward

    def forward(*inputs: Any) -> Any:
        try:
            with counter.undone(if_it_fails=True):
                return counter.second(lambda: on_meta(*inputs))
        except NotCountedError:
            raise
        except Exception as error:
            # A mechanism of others may fail in any way where tensors have no values.
            reason = _not_counted(original, error)
            state = [*original.parameters(), *original.buffers()]
            without_values = any(tensor.is_meta for tensor in state)
            # It may be the size that it does not take.
            if isinstance(error, ValueError) and training:
                raise
            if training:
                raise NotCountedError(f"{reason}; training is counted there alone") from error
            if without_values:
                raise NotCountedError(reason, needs_values=True) from error
        try:
            with counter.undone(if_it_fails=True):
                out = _run_for_real(original, inputs, counter)
        except (ValueError, NotCountedError) as error:
            raise error from None
        except Exception as error:
            raise NotCountedError(f"{reason}; on the CPU: {_said(error)}") from error
        counter.notes[f"FLOPs counted with random tokens on the CPU: {reason}"] = None
        return out

    mechanism.forward = forward


def _run_for_real(original: nn.Module, inputs: tuple[Any, ...], counter: _Counter) -> Any:
    mechanism = copied(original, lambda tensor: tensor.detach().to(_CPU, copy=True)).eval()
    with torch.random.fork_rng([]), counter.limited():
        torch.manual_seed(0)
        real = tree_map_only(Tensor, lambda x: torch.randn(x.shape).to(x.dtype), inputs)
        _MADE.see_all()
        counter.know_parameters(mechanism)
        result = counter.second(lambda: mechanism(*real))
        return tree_map_only(Tensor, lambda out: out.to(_META), result)


def _result_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What an operator will allocate; 0 where that depends on values, which is never more."""
    if isinstance(func, torch._ops.HigherOrderOperator) or func.is_view or func._schema.is_mutable:
        return 0
    try:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(_META), (args, kwargs))
        kwargs |= {"device": _META} if "device" in kwargs else {}
        results = tree_leaves(func(*args, **kwargs))
        return sum(result.nbytes for result in results if isinstance(result, Tensor))
    except Exception:
        # An operator without a form for the meta device, or a sparse result.
        return 0


def _not_counted(module: nn.Module, error: Exception) -> str:
    return f"{type(module).__name__} does not run on the meta device ({_said(error)})"


def _said(error: Exception) -> str:
    """The first sentence of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].partition('. ')[0]}"


def tokens(attention: nn.Module, grid: tuple[int, int], *, device: torch.device = _META) -> Tensor:
    """Tokens of one image for a mechanism: zeros (1, num_global + rows * columns, dim).

    Raises:
        InputError: for a module that does not say its `dim` and `num_global`.
    """
    num_global, dim = getattr(attention, "num_global", None), getattr(attention, "dim", None)
    if not (isinstance(num_global, int) and isinstance(dim, int)):
        raise InputError(
            f"cannot count {type(attention).__name__}: it is not a ViL, has no part_calls as"
            " detectors have, and no whole numbers dim and num_global as attention modules have"
        )
    return torch.zeros(
        1, num_global + grid[0] * grid[1], dim, device=device, dtype=_dtype(attention)
    )


def _backbones(module: nn.Module) -> Iterator[ViL]:
    return (part for part in module.modules() if isinstance(part, ViL))


def _places(module: nn.Module) -> list[AttentionPlace]:
    """Every attention module within the backbones of a module."""
    return [place for vil in _backbones(module) for place in vil.attention_places()]


def _merge(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for one in counts:
        merged.update(one)
    return merged


def _dtype(module: nn.Module) -> torch.dtype:
    kinds = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(kinds, torch.get_default_dtype())


def _formula_name(attention: nn.Module) -> str:
    return f"formula of {type(attention).__name__}"


def _published_formula(attention: nn.Module, grid: tuple[int, int]) -> int:
    declare = getattr(attention, "published_multiply_adds", None)
    multiply_adds = None if declare is None else declare(grid)
    if multiply_adds is None:
        raise InputError(
            f"{type(attention).__name__} has no count in the convention 'published', which knows"
            " only mechanisms of the published table; use the convention 'actual'"
        )
    return int(multiply_adds)


def _check_positive(**sizes: int | tuple[int, int] | None) -> None:
    for name, value in sizes.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number < 1 for number in numbers):
            raise InputError(f"{name} {value} must be positive")
