"""Multiply-adds, counted from the operators that run.

One multiply-add is one unit: half of what `torch.utils.flop_counter.FlopCounterMode` calls a FLOP.
Modules run on the meta device with meta copies of their parameters and buffers, so nothing is
allocated or computed, whatever the size of the image.

Counted are matrix products, convolutions and fused attention (queries times keys and weights times
values, densely: a causal or additive mask saves nothing; FlexAttention by the blocks that its
block mask keeps). Not counted, because they hold no product of matrices, are views, elementwise
operators, biases, reductions and everything in `FREE`: normalisation, softmax, pooling,
interpolation, indexing, copies, sorting, random numbers, creation. A product written out as an
elementwise one followed by a sum is not seen. Every other operator that ran without a formula is
listed in `uncounted`.

On the meta device `scaled_dot_product_attention` splits into two `bmm`. A fused operator that a
module calls itself, or that runs on a real device, is counted by `FORMULAS`, which adds what torch
lacks. A block mask for FlexAttention that would be made on the meta device is made on the CPU, so
that its sparsity is known.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol, runtime_checkable
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.backbone import AttentionPlace, ViL
from bench.errors import InputError, choose

Convention = Literal["actual", "published"]
CONVENTIONS = ("actual", "published")
UNIT = "multiply-adds"

# The published totals hold every part but this one.
OUTSIDE_TOTAL = ("mask_head",)
_STAGE_1_STRIDE = 4
_META = torch.device("meta")

aten = torch.ops.aten
_FLEX = torch.ops.higher_order.flex_attention

FLEX_DENSE = "flex_attention (counted as dense: its block mask has no values on the meta device)"
# A block mask is computed from every pair of tokens, a byte each; beyond this it has no values.
LARGEST_MASK = 2**26

FREE = {
    "normalisation": (
        "native_layer_norm native_group_norm native_batch_norm _fused_rms_norm"
        " _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm_update_stats"
    ),
    "softmax": "_softmax _log_softmax _safe_softmax logsumexp",
    "pooling": (
        "avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices adaptive_max_pool2d"
        " avg_pool1d avg_pool3d _adaptive_avg_pool3d max_pool3d_with_indices"
    ),
    "interpolation": (
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d"
        " upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa"
        " grid_sampler_2d"
    ),
    "indexing": (
        "index index_put index_put_ index_select gather scatter scatter_ scatter_add scatter_add_"
        " embedding masked_fill masked_fill_ masked_scatter masked_select nonzero take"
        " slice_scatter select_scatter triu tril where roll flip rot90"
    ),
    "copies": (
        "cat stack _unsafe_view clone copy_ _to_copy contiguous constant_pad_nd reflection_pad1d"
        " reflection_pad2d replication_pad1d replication_pad2d repeat repeat_interleave im2col"
        " col2im pixel_shuffle pixel_unshuffle channel_shuffle _reshape_copy lift lift_fresh"
        " lift_fresh_copy split_with_sizes_copy resize_ set_ _local_scalar_dense"
    ),
    "sorting": "sort topk kthvalue argsort searchsorted bucketize unique_consecutive _unique2",
    "gradients of the above": (
        "native_layer_norm_backward native_group_norm_backward native_batch_norm_backward"
        " _softmax_backward_data _log_softmax_backward_data avg_pool2d_backward"
        " _adaptive_avg_pool2d_backward max_pool2d_with_indices_backward embedding_dense_backward"
        " upsample_nearest2d_backward upsample_bilinear2d_backward native_dropout_backward"
        " slice_backward select_backward"
    ),
    "scans": "cumsum cumprod cummax cummin _cummax_helper _cummin_helper logcumsumexp",
    "reductions": "var_mean std_mean aminmax linalg_vector_norm equal",
    "random numbers": (
        "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_"
        " native_dropout uniform_ normal_ random_ exponential_ multinomial normal"
    ),
    "creation": (
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros"
        " new_ones new_full zeros zeros_like ones ones_like full full_like fill_ zero_ arange"
        " linspace eye scalar_tensor tril_indices triu_indices"
    ),
}
"""Operators of aten without products of matrices, by the reason, besides those that torch tags as
views, pointwise or reductions."""

_FREE_NAMES = frozenset(name for names in FREE.values() for name in names.split())
_FREE_TAGS = (torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.inplace_view, torch.Tag.view_copy)


@dataclass(frozen=True)
class OperatorCount:
    """Multiply-adds of the operators that ran.

    Attributes:
        by_operator: multiply-adds by operator.
        by_module: the same within each module that ran, by its name in the outermost one
            (`Class.path.to.module`, as `torch.utils.module_tracker` names it).
        uncounted: calls of operators that have no formula and are not free by nature.
    """

    by_operator: Mapping[str, int]
    by_module: Mapping[str, Mapping[str, int]]
    uncounted: Mapping[str, int]

    @property
    def total(self) -> int:
        """Multiply-adds of all operators."""
        return sum(self.by_operator.values())


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
    unit: str = UNIT

    @property
    def total_with_mask_head(self) -> int:
        """Multiply-adds of all parts."""
        return sum(self.by_part.values())


@dataclass(frozen=True)
class Audit:
    """Two counts of one mechanism that know nothing of each other.

    Attributes:
        declared: the mechanism's `multiply_adds(grid)`; None where it declares nothing.
        operators: counted from the operators that ran.
        uncounted: calls of operators without a formula.
    """

    declared: int | None
    operators: int
    uncounted: Mapping[str, int]

    @property
    def disagreement(self) -> float | None:
        """|declared - operators| / operators; None where nothing is declared."""
        if self.declared is None:
            return None
        if self.operators == 0:
            return 0.0 if self.declared == 0 else math.inf
        return abs(self.declared - self.operators) / self.operators


@runtime_checkable
class _DividesIntoParts(Protocol):
    def part_calls(
        self, image_size: tuple[int, int], *, proposals: int, detections: int
    ) -> Iterable[Any]: ...


def count(
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
    """
    choose(convention, CONVENTIONS, "FLOP convention")
    _check_positive(image_size=image_size, proposals=proposals, detections=detections, grid=grid)
    if isinstance(module, _DividesIntoParts):
        calls = module.part_calls(image_size, proposals=proposals, detections=detections)
        parts = [
            part
            for call in calls
            for part in _count_part(
                call.name,
                call.module,
                call.make_inputs(_META, _dtype(module)),
                image_size,
                convention,
            )
        ]
    elif isinstance(module, ViL):
        images = torch.empty(1, 3, *image_size, device=_META, dtype=_dtype(module))
        parts = _count_part("backbone", module, (images,), image_size, convention)
    else:
        grid = grid or (image_size[0] // _STAGE_1_STRIDE, image_size[1] // _STAGE_1_STRIDE)
        parts = [_count_attention(module, grid, convention)]
    inside = [part for part in parts if part.name not in OUTSIDE_TOTAL]
    by_operator = _merge(part.by_operator for part in inside)
    return FlopReport(
        total=sum(by_operator.values()),
        by_part={part.name: sum(part.by_operator.values()) for part in parts},
        by_operator=dict(sorted(by_operator.items())),
        uncounted=dict(sorted(_merge(part.uncounted for part in parts).items())),
        image_size=image_size,
        proposals=proposals,
        detections=detections,
        convention=convention,
    )


def audit(attention: nn.Module, grid: tuple[int, int]) -> Audit:
    """Compare what a mechanism declares with what its operators do, for one image on `grid`."""
    declare = getattr(attention, "multiply_adds", None)
    counted = count_call(attention, (tokens(attention, grid), grid))
    return Audit(
        declared=None if declare is None else declare(grid),
        operators=counted.total,
        uncounted=counted.uncounted,
    )


def count_call(module: nn.Module, inputs: tuple[object, ...]) -> OperatorCount:
    """Count `module(*inputs)` in evaluation, on meta copies of its parameters and buffers.

    Args:
        module: on any device; neither moved nor changed.
        inputs: with their tensors on the meta device.
    """
    # Each place of a tensor once: `functional_call` would restore a shared module's twice, wrongly.
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        parameters = part.named_parameters(recurse=False, remove_duplicate=False)
        buffers = part.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in chain(parameters, buffers):
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(_META)
            state[f"{path}.{name}" if path else name] = copies[id(tensor)]
    with evaluating(module), torch.no_grad():
        return count_operators(
            lambda: torch.func.functional_call(module, state, inputs, tie_weights=False)
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of `module` into evaluation, and back into its own mode at the end."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def count_operators(run: Callable[[], object]) -> OperatorCount:
    """Count whatever `run()` does, on whatever device, as it runs (backward passes too).

    Compiled functions run uncompiled, `nn.MultiheadAttention` without its fast path, whose one
    operator hides the rest, and FlexAttention is counted (forward only) instead of run: it gives
    zeros.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    watch = _Watch(counter)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_accept_meta_device())
            stack.enter_context(counter)
            stack.enter_context(watch)
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    by_module = {
        name: {str(operator): flops // 2 for operator, flops in operators.items()}
        for name, operators in counter.get_flop_counts().items()
    }
    return OperatorCount(
        by_operator=by_module.pop("Global", {}),
        by_module=by_module,
        uncounted=dict(watch.uncounted),
    )


@dataclass(frozen=True)
class _Part:
    name: str
    by_operator: Mapping[str, int]
    uncounted: Mapping[str, int]


def _count_part(
    name: str,
    module: nn.Module,
    inputs: tuple[object, ...],
    image_size: tuple[int, int],
    convention: Convention,
) -> list[_Part]:
    """Count one part of a detector; a backbone becomes a part for each of its stages."""
    counted = count_call(module, inputs)
    found = [(path, part) for path, part in module.named_modules() if isinstance(part, ViL)]
    if not found:
        return [_Part(name, counted.by_operator, counted.uncounted)]
    path, vil = found[0]
    root = ".".join(filter(None, (type(module).__name__, path)))
    padded = (
        math.ceil(image_size[0] / vil.stride) * vil.stride,
        math.ceil(image_size[1] / vil.stride) * vil.stride,
    )
    places = list(vil.attention_places())
    parts = []
    for layer in vil.channels:
        operators = _subtree(counted.by_module, f"{root}.{layer}", vil.get_submodule(layer))
        if convention == "published":
            for place in places:
                if place.name.startswith(f"{layer}."):
                    operators.subtract(counted.by_module[f"{root}.{place.name}"])
                    operators[_formula_name(place.module)] += _published(place, padded)
        parts.append(_Part(layer.replace("layer", "stage"), +operators, {}))
    rest = Counter(counted.by_operator)
    for layer in vil.channels:
        rest.subtract(_subtree(counted.by_module, f"{root}.{layer}", vil.get_submodule(layer)))
    # What runs outside the stages belongs to the part too; a plain ViL has nothing there.
    if +rest:
        parts.append(_Part(name, +rest, {}))
    parts[-1] = _Part(parts[-1].name, parts[-1].by_operator, counted.uncounted)
    return parts


def _subtree(
    by_module: Mapping[str, Mapping[str, int]], name: str, module: nn.Module
) -> Counter[str]:
    """Operators within a module, or, where it only holds modules and never runs, within those."""
    if name in by_module:
        return Counter(by_module[name])
    children = module.named_children()
    return _merge(_subtree(by_module, f"{name}.{child}", part) for child, part in children)


def _merge(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for one in counts:
        merged.update(one)
    return merged


def _count_attention(module: nn.Module, grid: tuple[int, int], convention: Convention) -> _Part:
    counted = count_call(module, (tokens(module, grid), grid))
    by_operator = counted.by_operator
    if convention == "published":
        by_operator = {_formula_name(module): _published_formula(module, grid)}
    return _Part("attention", by_operator, counted.uncounted)


def tokens(attention: nn.Module, grid: tuple[int, int], *, device: torch.device = _META) -> Tensor:
    """Tokens of one image for a mechanism: zeros (1, num_global + rows * columns, dim).

    Raises:
        InputError: for a module that does not say its `dim` and `num_global`.
    """
    num_global, dim = getattr(attention, "num_global", None), getattr(attention, "dim", None)
    if not (isinstance(num_global, int) and isinstance(dim, int)):
        raise InputError(
            f"cannot count {type(attention).__name__}: it is no ViL, has no part_calls as detectors"
            " have, and no whole numbers dim and num_global as attention modules have"
        )
    return torch.zeros(
        1, num_global + grid[0] * grid[1], dim, device=device, dtype=_dtype(attention)
    )


def _dtype(module: nn.Module) -> torch.dtype:
    kinds = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(kinds, torch.get_default_dtype())


def _formula_name(attention: nn.Module) -> str:
    return f"formula of {type(attention).__name__}"


def _published(place: AttentionPlace, image_size: tuple[int, int]) -> int:
    return _published_formula(place.module, place.grid(image_size))


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


class _Watch(TorchDispatchMode):
    """Sees every operator first: notes what has no formula, and counts FlexAttention."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _FLEX:
            for name in self.counter.mod_tracker.parents:
                self.counter.flop_counts[name][_FLEX] += 2 * _flex_multiply_adds(*args, **kwargs)
            if not _knows_blocks(*args, **kwargs):
                self.uncounted[FLEX_DENSE] += 1
            return _flex_outputs(*args, **kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.uncounted[str(func)] += 1
            return func(*args, **kwargs)
        if func.overloadpacket not in self.counter.flop_registry and not is_free(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self.uncounted[str(func.overloadpacket)] += 1
        return func(*args, **kwargs)


def is_free(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator holds no product of matrices, by its nature (see the module)."""
    if operator.is_view or any(tag in operator.tags for tag in _FREE_TAGS):
        return True
    space, _, name = operator.overloadpacket._qualified_op_name.partition("::")
    return space == "prim" or (space == "aten" and name in _FREE_NAMES)


Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """`q kᵀ` and `weights v`: q (..., H, L, M), k (..., S, M), v (..., S, V), H heads or fewer."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    _grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    """The scores again, and the gradients of weights, values, queries and keys."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _matrix_vector_flops(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _add_matrix_vector_flops(_bias: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _add_batched_flops(_bias: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _product_flops(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _convolution_backward_flops(
    grad: Shape,
    image: Shape,
    weight: Shape,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **__: Any,
) -> int:
    """As much as the forward pass for each gradient wanted, of the image and of the weight.

    torch's own formula takes the weight's gradient of a grouped convolution for that of a dense
    one, too much by the number of groups.
    """
    places = image[2:] if transposed else grad[2:]
    return 2 * sum(wanted[:2]) * grad[0] * math.prod(places) * math.prod(weight)


FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.convolution_backward: _convolution_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    aten._scaled_dot_product_attention_math_for_mps: _attention_flops,
    aten._scaled_dot_product_flash_attention: _attention_flops,
    aten._scaled_dot_product_efficient_attention: _attention_flops,
    aten._scaled_dot_product_cudnn_attention: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward_flops,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward_flops,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward_flops,
    aten.mv: _matrix_vector_flops,
    aten.dot: _matrix_vector_flops,
    aten.vdot: _matrix_vector_flops,
    aten.addmv: _add_matrix_vector_flops,
    aten.addbmm: _add_batched_flops,
    aten._addmm_activation: _add_batched_flops,
    aten._int_mm: _product_flops,
}
"""FLOPs (two a multiply-add) of operators that torch has no formula for, or none for grouped heads,
from the shapes of their arguments."""


def _flex_multiply_adds(
    query: Tensor, key: Tensor, value: Tensor, _score_mod: Any, block_mask: tuple[Any, ...], *_: Any
) -> int:
    """Scores and values of the blocks that the block mask keeps; all, if it has no values.

    `block_mask` is `BlockMask.as_tuple()`: the two lengths, then the numbers of kept key blocks for
    each block of queries (B, H, Q blocks), partly masked ones at 2 and full ones at 4; the block
    sizes of queries and keys stand before the last entry.
    """
    batch, heads, length = query.shape[:3]
    partial, full = block_mask[2], block_mask[4]
    block_q, block_k = block_mask[-3], block_mask[-2]
    dense = batch * heads * length * key.shape[2]
    kept = dense
    if partial.device != _META:
        blocks = partial.to(torch.int64)
        if full is not None:
            blocks = blocks + full
        blocks = blocks.expand(batch, heads, -1)
        # A block at the lower edge holds fewer queries, one at the right edge fewer keys; the count
        # goes by whole blocks, which is what the kernel computes, but never above the whole.
        kept = min(dense, int(blocks.sum()) * block_q * block_k)
    return kept * (query.shape[3] + value.shape[3])


def _knows_blocks(
    query: Tensor,
    key: Tensor,
    _value: Tensor,
    _score_mod: Any,
    block_mask: tuple[Any, ...],
    *_: Any,
) -> bool:
    """Whether the block mask has values, or is one block, as that of a call without any is."""
    single = block_mask[-3] >= query.shape[2] and block_mask[-2] >= key.shape[2]
    return single or block_mask[2].device != _META


def _flex_outputs(query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """What the operator returns: output (B, H, L, V), log-sum-exp and maximum score (B, H, L)."""
    shape = query.shape[:3]
    statistics = [query.new_zeros(shape, dtype=torch.float32) for _ in range(2)]
    return query.new_zeros((*shape, value.shape[3])), *statistics


@contextmanager
def _accept_meta_device() -> Iterator[None]:
    """Let `flex_attention` and `torch.autocast` take the meta device, which they refuse untried."""
    autocast = torch.autocast.__init__

    def autocast_of_cpu(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    with (
        _accept_masks_with_values(),
        patch.object(torch.autocast, "__init__", autocast_of_cpu),
    ):
        yield


@contextmanager
def _accept_masks_with_values() -> Iterator[None]:
    """Make block masks on the CPU where meta is asked for, and let queries on meta meet them."""
    create_mask, as_tuple = flex_attention.create_mask, flex_attention.BlockMask.as_tuple
    blocks = _BlockCounts()

    def with_values(
        function: Any, batch: int, heads: int, queries: int, keys: int, device: Any = None
    ) -> Tensor:
        small = (batch or 1) * (heads or 1) * queries * keys <= LARGEST_MASK
        if device is not None and torch.device(device) == _META and small:
            with suppress(RuntimeError, NotImplementedError):
                mask: Tensor = create_mask(function, batch, heads, queries, keys, "cpu")
                return mask
            # The function reads tensors on the meta device: its values cannot be known.
        return create_mask(function, batch, heads, queries, keys, device)

    def with_own_devices(mask: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        blocks.shown_on = None
        parts: tuple[Any, ...] = as_tuple(mask, *args, **kwargs)
        return parts

    def note_device(query: Tensor, _key: Tensor, _value: Tensor) -> None:
        blocks.shown_on = query.device

    with (
        patch.object(flex_attention, "_validate_device", note_device),
        patch.object(flex_attention, "create_mask", with_values),
        patch.object(flex_attention.BlockMask, "kv_num_blocks", blocks, create=True),
        patch.object(flex_attention.BlockMask, "as_tuple", with_own_devices),
    ):
        yield


class _BlockCounts:
    """`BlockMask.kv_num_blocks`, shown on the device that `flex_attention` compares it with."""

    def __init__(self) -> None:
        self.shown_on: torch.device | None = None

    def __get__(self, mask: Any, _owner: type) -> Any:
        counts = vars(mask)["kv_num_blocks"]
        return counts.to(_META) if self.shown_on == _META else counts

    def __set__(self, mask: Any, counts: Tensor) -> None:
        vars(mask)["kv_num_blocks"] = counts
