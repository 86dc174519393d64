"""Working through long sequences piece by piece, so that what is wide is never there as a whole."""

from collections.abc import Iterator

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
