"""Working through long sequences piece by piece, so that what is wide is never there as a whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attentions.parts import at_once

# Bytes of the widest tensor of a piece. On a CPU it should stay in the caches; an accelerator needs
# enough work for each kernel.
LARGEST_PIECE = {"cpu": 2**21, "other": 2**26}


def budget(x: Tensor) -> int:
    """Bytes of the widest tensor of a piece, where x is."""
    return at_once(x, LARGEST_PIECE)


def pieces(x: Tensor, bytes_per_token: int) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and tokens that cover x: whole images together, or parts of one image.

    Shapes: x (B, N, ...).

    Args:
        bytes_per_token: of the widest tensor that is made for a piece.
    """
    batch, tokens = x.shape[:2]
    length = max(1, budget(x) // bytes_per_token)
    images = max(1, length // max(tokens, 1))
    for first in range(0, batch, images):
        for start in range(0, tokens, length):
            yield slice(first, first + images), slice(start, start + length)


def piece(x: Tensor, part: tuple[slice, slice], dtype: torch.dtype) -> Tensor:
    """A contiguous piece of x (B, H, N, M) in `dtype`."""
    return x[part[0], :, part[1]].to(dtype).contiguous()


def qkv_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as views: (B, N, 3 C) -> three of (B, H, N, M)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def lowered(x: Tensor) -> Tensor:
    """x in the dtype of autocast's matrix products, so that several layers keep one copy of it."""
    # The meta device has no autocast.
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


class _NoContext:
    """Takes what a forward pass keeps for the backward pass, which will not come."""

    def save_for_backward(self, *_: Any) -> None:
        """Keep nothing."""


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """`function.apply`, or its forward pass alone where nothing is differentiated.

    A traced graph then holds the operators, which counters of FLOPs look for.
    """
    if torch.is_grad_enabled():
        applied: Tensor = function.apply(*arguments)
        return applied
    result: Tensor = function.forward(_NoContext(), *arguments)
    return result
