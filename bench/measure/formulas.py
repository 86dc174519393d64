"""What operators cost: those that are free by nature, and formulas that torch lacks.

Free, because they hold no product of matrices, are views, elementwise operators, reductions and
everything in `FREE`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

aten = torch.ops.aten

_UNTAGGED = "elementwise, without torch's tag"
FREE = {
    "normalisation": (
        "native_layer_norm native_group_norm native_batch_norm _fused_rms_norm"
        " _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm_update_stats"
    ),
    "softmax": "_softmax _log_softmax _safe_softmax logsumexp",
    "pooling": (
        "avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices adaptive_max_pool2d"
        " avg_pool1d avg_pool3d _adaptive_avg_pool3d max_pool3d_with_indices max_unpool2d"
        " fractional_max_pool2d"
    ),
    "interpolation": (
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d"
        " upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa"
        " upsample_linear1d upsample_trilinear3d _unsafe_index grid_sampler_2d grid_sampler_3d"
    ),
    "indexing": (
        "index index_put index_put_ index_select gather scatter scatter_ scatter_add scatter_add_"
        " embedding index_add index_copy index_reduce scatter_reduce diag_embed diagonal_scatter"
        " block_diag trace masked_fill masked_fill_ masked_scatter masked_select nonzero take"
        " index_add_ index_fill_ slice_scatter select_scatter triu tril where roll flip rot90"
    ),
    "copies": (
        "cat stack _unsafe_view clone copy_ _to_copy contiguous constant_pad_nd reflection_pad1d"
        " reflection_pad2d replication_pad1d replication_pad2d repeat repeat_interleave im2col"
        " col2im pixel_shuffle pixel_unshuffle channel_shuffle _reshape_copy lift lift_fresh"
        " lift_fresh_copy split_with_sizes_copy unsafe_split resize_ set_ _local_scalar_dense"
    ),
    "sparse storage": (
        "_to_sparse _to_sparse_csr _to_sparse_csc _to_sparse_bsr _to_sparse_bsc _to_dense"
        " _sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors"
        " _sparse_coo_tensor_unsafe _validate_sparse_coo_tensor_args _coalesce _coalesced_"
        " _sparse_compressed_tensor_unsafe _validate_sparse_compressed_tensor_args"
        " sparse_compressed_tensor sparse_mask _sparse_softmax _nnz _indices _values"
    ),
    "questions": "equal is_same_size _has_same_storage_numel",
    "sorting": (
        "sort topk kthvalue median nanmedian mode histc bincount isin argsort searchsorted"
        " bucketize unique_consecutive _unique2"
    ),
    "gradients, besides those that are called as their operator": (
        "_softmax_backward_data _log_softmax_backward_data embedding_dense_backward"
        " log_sigmoid_backward nll_loss_forward nll_loss_backward"
    ),
    "scans": "cumsum cumprod cummax cummin _cummax_helper _cummin_helper logcumsumexp",
    "reductions": "var_mean std_mean aminmax linalg_vector_norm renorm",
    "random numbers": (
        "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_"
        " native_dropout uniform_ normal_ random_ exponential_ geometric_ multinomial normal"
    ),
    _UNTAGGED: (
        "glu hardswish leaky_relu log_sigmoid_forward _prelu_kernel rrelu_with_noise complex polar"
        " _weight_norm_interface mse_loss smooth_l1_loss binary_cross_entropy_with_logits"
        " linalg_cross floor_divide"
    ),
    "creation": (
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros"
        " _new_zeros_with_same_feature_meta"
        " new_ones new_full zeros zeros_like ones ones_like full full_like fill_ zero_ arange"
        " linspace eye scalar_tensor tril_indices triu_indices _efficientzerotensor"
    ),
}
"""Operators of aten without products of matrices, by the reason, besides those that torch tags as
views, pointwise or reductions."""

_FREE_NAMES = frozenset(name for names in FREE.values() for name in names.split())
_FREE_TAGS = (torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.inplace_view, torch.Tag.view_copy)


def is_free(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator holds no product of matrices, by its nature (see the module)."""
    if operator.is_view or any(tag in operator.tags for tag in _FREE_TAGS):
        return True
    space, _, name = operator.overloadpacket._qualified_op_name.partition("::")
    other = _not_in_place(operator.overloadpacket)
    if space == "aten" and name.endswith("_backward"):
        # What is no product of matrices has no gradient that is one.
        other = getattr(aten, name.removesuffix("_backward"), None)
    if other is not None and name not in _FREE_NAMES:
        # Not all that write in place have the tags of those that do not, as hardswish_.
        return is_free(getattr(other, other.overloads()[0]))
    return space == "prim" or (space == "aten" and name in _FREE_NAMES)


def is_elementwise(operator: torch._ops.OpOverload) -> bool:
    """Whether it computes each element of its result from those at the same place."""
    name = operator.overloadpacket.__name__
    return torch.Tag.pointwise in operator.tags or name in FREE[_UNTAGGED].split()


def _not_in_place(operator: Any) -> Any:
    """The operator that does not write in place what this one does; None if this one does not."""
    space, _, name = operator._qualified_op_name.partition("::")
    writes = space == "aten" and name.endswith("_") and not name.endswith("__")
    return getattr(aten, name.removesuffix("_"), None) if writes else None


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


def _distance_flops(left: Shape, right: Shape, p: float = 2.0, *_: Any, **__: Any) -> int:
    """Differences of all pairs, squared; other powers have no products."""
    return 2 * math.prod(left) * right[-2] if p == 2 else 0


def _distance_backward_flops(
    _grad: Shape, left: Shape, right: Shape, p: float, *_: Any, **__: Any
) -> int:
    return _distance_flops(left, right, p)


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
    aten._sparse_addmm: _add_batched_flops,
    aten._euclidean_dist: _distance_flops,
    aten._cdist_forward: _distance_flops,
    aten._cdist_backward: _distance_backward_flops,
}
"""FLOPs (two a multiply-add) of operators that torch has no formula for, or none for grouped heads,
from the shapes of their arguments."""


def formula_of(operator: Any) -> Callable[..., int | None] | None:
    """FLOPs (two a multiply-add) of an operator from its arguments and `out_val`, its result.

    None where there is no formula. The formula gives None for sparse operands that it has no count
    for; of one sparse operand, the elements that it stores count.
    """
    dense = _WRAPPED.get(operator) or flop_registry.get(operator)
    if dense is None:
        other = _not_in_place(operator)
        return None if other is None else formula_of(other)

    def formula(*args: Any, out_val: Any, **kwargs: Any) -> int | None:
        sparse = [arg for arg in args if isinstance(arg, Tensor) and arg.layout != torch.strided]
        if not sparse:
            return int(dense(*args, out_val=out_val, **kwargs))
        if operator not in _SPARSE_PRODUCTS or len(sparse) > 1:
            return None
        left, right = args[-2:] if operator in _SPARSE_ADDED else args[:2]
        if right is sparse[0]:
            return 2 * _stored(right) * left.shape[-2]
        return 2 * _stored(left) * (right.shape[-1] if right.dim() > 1 else 1)

    return formula


_WRAPPED = {operator: shape_wrapper(formula) for operator, formula in FORMULAS.items()}
_SPARSE_ADDED = (aten.addmm, aten.addmv, aten._sparse_addmm)
_SPARSE_PRODUCTS = (aten.mm, aten.mv, aten.bmm, *_SPARSE_ADDED)


def _stored(sparse: Tensor) -> int:
    """Elements that a sparse tensor stores."""
    values = sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()
    return values.numel()


def is_complex(args: Any) -> bool:
    """Whether a tensor among the arguments is complex, which makes four products of one."""
    return any(isinstance(arg, Tensor) and arg.is_complex() for arg in tree_leaves(args))


def varying(tensor: Tensor) -> frozenset[int]:
    """Axes of a tensor, counted from the last (-1), along which it is not broadcast."""
    strides = tensor.stride() if tensor.layout == torch.strided else tensor.shape
    sides = zip(tensor.shape, strides, strict=True)
    return frozenset(
        axis - tensor.dim() for axis, (side, stride) in enumerate(sides) if side > 1 and stride != 0
    )
