"""FlexAttention on the meta device: what it costs by its block mask, and what it returns.

A block mask that would be made on the meta device is made on the CPU, so that its sparsity is
known.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

OPERATOR = torch.ops.higher_order.flex_attention
DENSE = "flex_attention (counted as dense: its block mask has no values on the meta device)"
# A block mask is computed from every pair of tokens, a byte each; beyond this it has no values.
LARGEST_MASK = 2**26
_META = torch.device("meta")


def multiply_adds(
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


def knows_blocks(
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


def outputs(query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """What the operator returns: output (B, H, L, V), log-sum-exp and maximum score (B, H, L)."""
    shape = query.shape[:3]
    statistics = [query.new_zeros(shape, dtype=torch.float32) for _ in range(2)]
    return query.new_zeros((*shape, value.shape[3])), *statistics


@contextmanager
def accept_masks_with_values() -> Iterator[None]:
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
