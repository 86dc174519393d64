"""Peak memory before anything is allocated: a prediction from shapes.

What would be measured runs on tensors that have shapes and no memory (`fake.py`): forward, backward
and optimizer step, through the true autograd graph, under the true autocast.
`memory.LiveTensors` adds up what is alive, as it does for a measurement on the CPU. So the
prediction follows the operators that run, and nothing has to be declared by a mechanism.

Of a detector the parts run, and what is large between them (`fake.run_parts`). What depends on data
is assumed: Mask R-CNN has stated numbers of RoIs (`detectors.rois`), by default the most it is
configured for, as it has where it is measured; a run that finds fewer needs less. Every RoI lies on
the first pyramid level.

Not in it: the process, libraries and the CUDA context; scratch that a kernel allocates and frees
(cuDNN's and cuBLAS's workspaces); and what the allocator of CUDA reserves and does not use. On CUDA
every storage is rounded up to the allocator's 512 bytes.
"""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from attentions.parts import fake_on
from bench.config.schema import MODES
from bench.errors import InputError, choose
from bench.measure.fake import AsOnCuda, copied, run_parts
from bench.measure.memory import LiveTensors, Storage, no_collector
from bench.model.backbone import MlpBlock, ViL
from bench.model.detectors import Detector, backbone_stages
from bench.model.detectors.rois import Counts, most

KIND = "prediction from shapes"
UNIT = "bytes"
DEVICES = ("cpu", "cuda")
PRECISIONS: Mapping[str, torch.dtype | None] = {
    "32-true": None,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}
VARY = ("image_size", "batch_size")

aten = torch.ops.aten

# What is not within a part: matching, RoI pooling, losses, pasting of masks.
BETWEEN = "between parts"
_WEIGHTS, _INPUTS = "weights", "inputs"
_CUDA_BLOCK = 512
_STAGE_1_STRIDE = 4
_TO_SPARSE = (
    *(aten._to_sparse, aten._to_sparse_csr, aten._to_sparse_csc),
    *(aten._to_sparse_bsr, aten._to_sparse_bsc),
)
_SIDE = 32
_FIRST_SIDE = 256


class NotPredictedError(InputError):
    """A module that needs the values of tensors to run; the reason is in the message."""


@dataclass(frozen=True)
class MemoryPrediction:
    """The predicted peak, and what is alive at it.

    `total` is the sum of `weights`, `gradients`, `optimizer_state`, `inputs`, `activations` and
    `transient`, all of them as they are at the moment of the peak.

    Attributes:
        total: bytes at the peak.
        weights: parameters, buffers and what else modules keep.
        gradients: of parameters.
        optimizer_state: of all parameters.
        inputs: images and targets, or tokens.
        activations: saved for the backward pass and not yet released, by part; under autocast with
            the weights in half precision. "between parts" holds RoI pooling and losses.
        transient: everything else: what an operator reads and writes, and gradients of activations.
        phase: "forward", "backward" or "optimizer step".
        part: the part where the peak is.
        operator: the operator at the peak.
        saved: by part, what the forward pass saved for the backward pass in all; empty for
            inference.
        mode, precision, device, image_size, batch_size, counts: what was predicted.
    """

    total: int
    weights: int
    gradients: int
    optimizer_state: int
    inputs: int
    activations: Mapping[str, int]
    transient: int
    phase: str
    part: str
    operator: str
    saved: Mapping[str, int]
    mode: str
    precision: str
    device: str
    image_size: tuple[int, int]
    batch_size: int
    counts: Counts
    kind: str = KIND
    unit: str = UNIT


def predict(
    module: nn.Module,
    *,
    image_size: tuple[int, int] = (800, 1344),
    batch_size: int = 1,
    mode: str = "inference",
    precision: str = "32-true",
    device: str = "cpu",
    grid: tuple[int, int] | None = None,
    proposals: int | None = None,
    detections: int | None = None,
    rois: int | None = None,
    mask_rois: int | None = None,
    targets: int = Counts.targets,
    parts: int = 1,
) -> MemoryPrediction:
    """Predict the peak memory of inference, or of a training step, that is not the first.

    A training step is forward, backward and optimizer; the gradients of the step before are gone
    when it begins. Of a backbone or a mechanism alone the loss is the sum of its outputs.

    Args:
        module: a detector, a `ViL` or an attention module, on any device, meta too; it is neither
            moved nor changed.
        image_size: (height, width) in pixels as the network sees it.
        batch_size: images.
        mode: one of MODES.
        precision: one of PRECISIONS.
        device: where it would run, "cpu" or "cuda"; it need not be there.
        grid: (rows, columns) for an attention module; by default that of stage 1, `image_size` / 4.
        proposals, detections: RoIs an image in the box and mask heads when evaluating; by default
            the most that the detector is configured for.
        rois, mask_rois: the same when training.
        targets: objects an image when training.
        parts: of a training step, of `batch_size` images each, whose gradients add up.

    Raises:
        InputError: for an unknown value, one that is not positive, or a size that the module
            cannot take.
        NotPredictedError: for a mechanism that asks for the value of a tensor.
    """
    choose(mode, MODES, "mode")
    choose(precision, tuple(PRECISIONS), "precision")
    choose(device, DEVICES, "device")
    if device == "cpu" and precision == "16-mixed":
        raise InputError("precision 16-mixed needs device cuda; the CPU takes 32-true, bf16-mixed")
    _check_positive(image_size=min(image_size), batch_size=batch_size, targets=targets, rois=rois)
    _check_positive(parts=parts)
    _check_positive(grid=None if grid is None else min(grid))
    counts = Counts(
        proposals=proposals,
        detections=detections,
        rois=rois,
        mask_rois=mask_rois,
        targets=targets,
    )
    if isinstance(module, Detector):
        counts = most(module, counts)
    case = _Case(
        image_size=image_size,
        batch_size=batch_size,
        mode=mode,
        dtype=PRECISIONS[precision],
        device=device,
        grid=grid,
        counts=counts,
        parts=parts,
    )
    try:
        peak = _dry_run(module, case)
    except ValueError as error:
        height, width = image_size
        raise InputError(f"no prediction at {height}x{width}: {error}") from error
    except Exception as error:
        # A mechanism of others may fail in any way where tensors have no values.
        lines = str(error).strip().splitlines() or [""]
        raise NotPredictedError(
            f"{type(module).__name__} does not run on shapes alone"
            f" ({type(error).__name__}: {lines[0]})"
        ) from error
    return MemoryPrediction(
        **peak,
        mode=mode,
        precision=precision,
        device=device,
        image_size=image_size,
        batch_size=batch_size,
        counts=counts,
    )


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What `predict` was asked."""

    image_size: tuple[int, int]
    batch_size: int
    mode: str
    dtype: torch.dtype | None
    device: str
    grid: tuple[int, int] | None
    counts: Counts
    parts: int

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def all_at_once(self) -> bool:
        """Whether the optimizer takes all parameters at once, as torch does by itself on a GPU."""
        return self.device == "cuda"

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.dtype)


class _Ledger(LiveTensors):
    """Live tensors with the part that made them, and what was alive at the peak."""

    def __init__(self, *, block: int) -> None:
        super().__init__(block=block)
        self.label = BETWEEN
        self.at_peak: tuple[Storage, ...] = ()
        self.operator = ""
        self.part = ""
        self._parts = [BETWEEN]
        # Autograd numbers the nodes of its graph in the order of the forward pass.
        self._numbers: list[int] = []
        self._parts_by_number: list[str] = []

    def enter(self, part: str) -> None:
        self._parts.append(part)
        self._switch()

    def leave(self) -> None:
        self._parts.pop()
        self._switch()

    def _switch(self) -> None:
        self.label = self._parts[-1]
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._parts_by_number.append(self.label)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = 0, ()

    def phase(self, name: str) -> "_Phase":
        """The peak since the last start, and start again."""
        found = _Phase(name, self.at_peak, self.part, self.operator)
        self.restart()
        return found

    def peaked(self, operator: object) -> None:
        self.at_peak = self.alive()
        self.operator = str(operator).removesuffix(".default")
        self.part = self._part_now()

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.overloadpacket in _TO_SPARSE:
            raise RuntimeError("how much a sparse tensor stores depends on values")
        result = super().call(func, args, kwargs)
        if func.overloadpacket is aten.col2im:
            # torch makes it as large as what is folded, and keeps the memory.
            result.untyped_storage().resize_(args[0].nbytes)
        return result

    def _part_now(self) -> str:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self.label
        place = bisect.bisect_right(self._numbers, node._sequence_nr())
        return self._parts_by_number[place - 1] if place else BETWEEN


@dataclass(frozen=True)
class _Phase:
    """The peak within one phase of the call."""

    name: str
    storages: tuple[Storage, ...]
    part: str
    operator: str
    state: int = 0


def _dry_run(module: nn.Module, case: _Case) -> dict[str, Any]:
    """The fields of a `MemoryPrediction` that are found by running."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copy: Any = copied(module, _shaped_in(fake))
    copy.train(case.training)
    ledger = _Ledger(block=_CUDA_BLOCK if case.device == "cuda" else 1)
    with ExitStack() as stack:
        _follow_parts(copy, ledger)
        if case.device == "cuda":
            stack.enter_context(AsOnCuda())
        stack.enter_context(_Refusals(case.device))
        stack.enter_context(fake_on("cpu" if case.device == "cpu" else "other"))
        stack.enter_context(no_collector())
        stack.enter_context(fake)
        call, inputs = _call(copy, case)
        leaves = [*copy.parameters(), *(x for x in tree_leaves(inputs) if x.requires_grad)]
        ledger.label = _WEIGHTS
        ledger.found_before(copy)
        ledger.label = _INPUTS
        ledger.found_before(inputs)
        ledger.label = BETWEEN
        stack.enter_context(ledger)
        found = _train(call, leaves, case, ledger) if case.training else _infer(call, case, ledger)
    return max((_terms(phase, found) for phase in found.phases), key=lambda t: t["total"])


class _Refusals(TorchFunctionMode):
    """Refuses layers for which a library (oneDNN, cuDNN) keeps what no operator of torch shows."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._names = {"cpu": ("lstm",), "cuda": ("lstm", "gru", "rnn_tanh", "rnn_relu")}[device]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._names:
            raise RuntimeError(f"what {name} keeps is its library's, and not known from shapes")
        return func(*args, **(kwargs or {}))


def _shaped_in(mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    def shaped(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    return shaped


def _follow_parts(module: nn.Module, ledger: _Ledger) -> None:
    """Tell the ledger which part runs."""
    if isinstance(module, Detector):
        parts = module.parts()
    elif isinstance(module, ViL):
        parts = backbone_stages(module)
    else:
        parts = {"attention": module}
    for name, part in parts.items():
        blocks = [block for block in part.modules() if isinstance(block, MlpBlock)]
        # With hooks inside, these would keep more than without.
        inside = {layer for block in blocks for layer in block.modules()} - {*blocks}
        for layer in set(part.modules()) - inside:
            layer.register_forward_pre_hook(lambda *_, name=name: ledger.enter(name))
            layer.register_forward_hook(lambda *_: ledger.leave())


def _call(module: nn.Module, case: _Case) -> tuple[Callable[[], Any], object]:
    """What runs, and its inputs."""
    batch, (height, width) = case.batch_size, case.image_size
    if isinstance(module, Detector):
        images = [torch.empty(3, height, width) for _ in range(batch)]
        if not case.training:
            return partial(run_parts, module, images, None, case.counts, device=case.device), images
        masks = module.method == "mask_rcnn"
        targets = [_target(case.counts.targets, case.image_size, masks=masks) for _ in images]
        run = partial(run_parts, module, images, targets, case.counts, device=case.device)
        return run, (images, targets)
    if isinstance(module, ViL):
        batched = torch.empty(batch, 3, height, width)
        return lambda: module(batched), batched
    rows, columns = case.grid or (height // _STAGE_1_STRIDE, width // _STAGE_1_STRIDE)
    dim, num_global = getattr(module, "dim", None), getattr(module, "num_global", None)
    if not isinstance(dim, int) or not isinstance(num_global, int):
        raise InputError(
            f"no prediction for {type(module).__name__}: it is neither a detector nor a ViL and"
            " has no whole numbers dim and num_global, as attention modules have"
        )
    tokens = torch.empty(batch, num_global + rows * columns, dim, requires_grad=case.training)
    return lambda: module(tokens, (rows, columns)), tokens


def _target(objects: int, image_size: tuple[int, int], *, masks: bool) -> dict[str, Tensor]:
    target = {
        "boxes": torch.empty(objects, 4),
        "labels": torch.empty(objects, dtype=torch.int64),
    }
    if masks:
        target["masks"] = torch.empty(objects, *image_size, dtype=torch.uint8)
    return target


@dataclass(frozen=True)
class _Found:
    """The peaks of all phases, and what the storages in them are."""

    phases: list[_Phase]
    saved: set[Storage] = field(default_factory=set)
    gradients: set[Storage] = field(default_factory=set)
    state: set[Storage] = field(default_factory=set)


def _infer(call: Callable[[], Any], case: _Case, ledger: _Ledger) -> _Found:
    def once() -> None:
        ledger.restart()
        with torch.no_grad(), case.autocast():
            call()

    before = ledger.current
    once()
    if ledger.current > before:
        # It keeps tables, which later calls need not make.
        once()
    return _Found([ledger.phase("forward")])


def _train(call: Callable[[], Any], leaves: list[Tensor], case: _Case, ledger: _Ledger) -> _Found:
    """One step; the state that a step before it would have left is added to what comes before.

    The gradients of that step are gone before the forward pass, as in training.

    Args:
        leaves: parameters, and inputs with a gradient.
    """
    parameters = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
    # A mechanism may have no parameters, an optimizer's only group too.
    optimizer = torch.optim.AdamW([{"params": parameters}], foreach=case.all_at_once)
    if case.parts > 1:
        # All parts but the first one find the gradients of those before.
        _forward(call, case)[0].backward()
    before = ledger.alive()
    ledger.restart()
    loss, outputs = _forward(call, case)
    saved = {*ledger.alive()}.difference(before)
    forward = ledger.phase("forward")
    loss.backward()
    backward = ledger.phase("backward")
    del loss, outputs
    gradients = ledger.storages([leaf.grad for leaf in leaves if leaf.grad is not None])
    # The first step makes the state, the second one is like all that follow.
    optimizer.step()
    state = ledger.storages(optimizer.state)
    # One parameter after the other: the step of the largest needs most.
    kept = [] if case.all_at_once else _keep_largest_gradient(parameters)
    ledger.restart()
    optimizer.step()
    step = ledger.phase("optimizer step")
    del kept
    forward = dataclasses.replace(forward, state=_size(state))
    backward = dataclasses.replace(backward, state=_size(state))
    return _Found([forward, backward, step], saved, gradients, state)


def _forward(call: Callable[[], Any], case: _Case) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the outputs that it is the sum of."""
    with case.autocast():
        outputs = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, Tensor)]
    return torch.stack([output.sum() for output in outputs]).sum(), outputs


def _keep_largest_gradient(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Take the gradients of all other parameters away, and return all gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    largest = max((p for p in parameters if p.grad is not None), key=Tensor.numel, default=None)
    for parameter in parameters:
        if parameter is not largest:
            parameter.grad = None
    return gradients


def _terms(phase: _Phase, found: _Found) -> dict[str, Any]:
    """What is alive at the peak of a phase; the amounts add up to its total."""
    amounts: Counter[str] = Counter(optimizer_state=phase.state)
    activations: Counter[str] = Counter()
    for storage in phase.storages:
        if storage.label in (_WEIGHTS, _INPUTS):
            amounts[storage.label] += storage.size
        elif storage in found.gradients:
            amounts["gradients"] += storage.size
        elif storage in found.state:
            amounts["optimizer_state"] += storage.size
        elif storage in found.saved:
            activations[storage.label] += storage.size
        else:
            amounts["transient"] += storage.size
    names = (_WEIGHTS, "gradients", "optimizer_state", _INPUTS, "transient")
    return {
        **{name: amounts[name] for name in names},
        "total": amounts.total() + activations.total(),
        "activations": dict(activations),
        "saved": _by_part(found.saved),
        "phase": phase.name,
        "part": phase.part,
        "operator": phase.operator,
    }


def _by_part(storages: set[Storage]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for storage in storages:
        sums[storage.label] += storage.size
    return dict(sums)


def _size(storages: set[Storage]) -> int:
    return sum(storage.size for storage in storages)


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be positive")


@dataclass(frozen=True)
class Fit:
    """The largest size that fits a budget.

    Attributes:
        vary: "image_size" or "batch_size".
        largest: side of a square image in pixels, or images.
        prediction: at `largest`.
        beyond: the prediction at the next larger size, which does not fit; None where `largest` is
            the limit of the search.
        budget: bytes.
    """

    vary: str
    largest: int
    prediction: MemoryPrediction
    beyond: MemoryPrediction | None
    budget: int


def fit(
    build: Callable[[tuple[int, int]], nn.Module],
    *,
    budget_bytes: int,
    vary: str = "image_size",
    limit: int | None = None,
    image_size: tuple[int, int] = (800, 1344),
    batch_size: int = 1,
    mode: str = "training",
    precision: str = "32-true",
    device: str = "cpu",
    proposals: int | None = None,
) -> Fit:
    """Find the largest square image (its side a multiple of 32) or batch that fits a budget.

    Args:
        build: makes the module for images of a size (height, width), best on the meta device.
        budget_bytes: what the predicted peak may be.
        vary: one of VARY.
        limit: the largest side or batch that is tried; 8192 pixels or 4096 images by default.
        image_size: where the batch is varied.
        batch_size: where the image is varied.
        mode, precision, device, proposals: as `predict` has them.

    Raises:
        InputError: where not even the smallest size fits; naming what it needs.
    """
    choose(vary, VARY, "vary")
    sides = vary == "image_size"

    def predicted(units: int) -> MemoryPrediction:
        size = (units * _SIDE, units * _SIDE) if sides else image_size
        return predict(
            build(size),
            image_size=size,
            batch_size=batch_size if sides else units,
            mode=mode,
            precision=precision,
            device=device,
            proposals=proposals,
        )

    unit, start, last = (_SIDE, _FIRST_SIDE // _SIDE, 8192 // _SIDE) if sides else (1, 1, 4096)
    if limit is not None:
        _check_positive(limit=limit // unit)
        last = limit // unit
    found, beyond = _largest(predicted, budget_bytes, start=min(start, last), last=last)
    largest = found.image_size[0] if sides else found.batch_size
    return Fit(vary, largest, found, beyond, budget_bytes)


def _largest(
    predicted: Callable[[int], MemoryPrediction], budget: int, *, start: int, last: int
) -> tuple[MemoryPrediction, MemoryPrediction | None]:
    """The prediction at the largest number that fits, and at the next; doubling, then bisection."""
    low, high = 0, start
    fits: MemoryPrediction | None = None
    while (beyond := predicted(high)).total <= budget:
        low, fits = high, beyond
        if high == last:
            return fits, None
        high = min(2 * high, last)
    while high - low > 1:
        middle = (low + high) // 2
        prediction = predicted(middle)
        if prediction.total <= budget:
            low, fits = middle, prediction
        else:
            high, beyond = middle, prediction
    if fits is None:
        height, width = beyond.image_size
        raise InputError(
            f"a memory budget of {budget / 1e9:.2f} GB is too small: {beyond.mode} of"
            f" {beyond.batch_size} x {height}x{width} is predicted to need"
            f" {beyond.total / 1e9:.2f} GB"
        )
    return fits, beyond
