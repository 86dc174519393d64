"""Masks as run lengths, and as pixels of any size."""

from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from numpy.typing import NDArray
from torch import Tensor

THRESHOLD = 0.5
# Pixels of the masks that are pasted into an image at one time: 128 MB in float32.
PASTED_AT_ONCE = 2**25

Runs = dict[str, Any]
"""{"size": [height, width], "counts": ...}: lengths of zeros and ones in turn, column by column."""


class RunLengths:
    """Masks of an image as compressed run lengths; `shape` is what they would have as pixels.

    Not a dataclass: Fabric looks for tensors in the fields of those.
    """

    def __init__(self, counts: tuple[bytes, ...], shape: tuple[int, ...]) -> None:
        self.counts, self.shape = counts, shape


def encode(segmentation: Any, height: int, width: int) -> Runs:
    """The compressed run lengths of polygons or of run lengths of either kind."""
    runs: Runs
    if isinstance(segmentation, list):
        runs = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = mask_api.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    return runs


def run_counts(text: str | bytes) -> NDArray[np.int64]:
    """The run lengths that COCO's text stands for: 5 bits a character, the lowest first.

    Raises:
        ValueError: for a text that is none.
    """
    raw = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64)
    raw -= 48
    if not len(raw) or raw.min() < 0 or raw.max() > 63 or raw[-1] & 32:
        raise ValueError("its counts are not run lengths")
    ends = np.flatnonzero(raw < 32) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > 7:
        raise ValueError("its counts are too large")
    starts = ends - lengths
    shifts = 5 * (np.arange(len(raw)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((raw & 31) << shifts, starts)
    counts -= np.where(raw[ends - 1] & 16, 1 << (5 * lengths), 0)
    # From the fourth on they are differences from the one before the last.
    for first in (1, 2):
        counts[first::2] = np.cumsum(counts[first::2])
    if counts.min() < 0:
        raise ValueError("its counts are not run lengths")
    return counts


def encode_soft(soft: Tensor) -> tuple[bytes, ...]:
    """The run lengths of soft masks (n, 1, H, W), whose pixels are those of 0.5 or more."""
    if len(soft) == 0:
        return ()
    binary = (soft[:, 0] >= THRESHOLD).byte().cpu().numpy()
    runs = mask_api.encode(np.asfortranarray(binary.transpose(1, 2, 0)))
    return tuple(run["counts"] for run in runs)


def pixels(
    runs: Runs, size: tuple[int, int] | None = None, *, flip: bool = False
) -> NDArray[np.uint8]:
    """The mask of compressed run lengths, uint8 (rows, columns).

    Args:
        size: rows and columns, by the nearest pixel; None as it is. Memory grows with this size
            and the mask's own extent alone.
        flip: mirror it left to right first.
    """
    height, width = runs["size"]
    if size is None:
        mask: NDArray[np.uint8] = mask_api.decode(runs)
        return mask[:, ::-1] if flip else mask
    rows, columns = _nearest(height, size[0]), _nearest(width, size[1])
    if flip:
        columns = width - 1 - columns
    found = np.zeros(size, dtype=np.uint8)
    ends = np.cumsum(run_counts(runs["counts"]))
    if len(ends) < 2:
        return found
    # Its columns alone are made, from the first to the last with a pixel.
    left, right = int(ends[0]) // height, -(-int(ends[1::2][-1]) // height)
    clipped = np.clip(ends, left * height, right * height)
    lengths = clipped - np.append(left * height, clipped[:-1])
    strip = np.repeat((np.arange(len(lengths)) & 1).astype(np.uint8), lengths)
    inside = (columns >= left) & (columns < right)
    places = np.ix_(columns[inside] - left, rows)
    found[:, inside] = strip.reshape(right - left, height)[places].T
    return found


def _nearest(given: int, wanted: int) -> NDArray[np.int64]:
    """Which of `given` pixels each of `wanted` is, as torch's "nearest-exact" has it."""
    places = torch.arange(given, dtype=torch.float32)[None, None]
    return (
        torch.nn.functional.interpolate(places, size=wanted, mode="nearest-exact")
        .long()
        .flatten()
        .numpy()
    )
