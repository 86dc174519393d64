"""Multiply-adds over the true image sizes of a data set, not those of one image.

A table of costs is of one image size; a data set has hundreds. Images are resized as the published
recipe does (shortest edge, longest edge) and padded to whole strides of the backbone, which leaves
few distinct sizes, each counted once. Besides the mean, this says how many pixels pad images.
"""

import csv
import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bench.data.images import NetworkSize
from bench.errors import choose
from bench.measure import flops
from bench.measure.published import IMAGE_SIZE, RESULTS
from bench.model.backbone import ViL
from bench.model.detectors import Detector

# As the published recipe resizes images.
RESIZE = NetworkSize((800,), 1333)

Size = tuple[int, int]


@dataclass(frozen=True)
class SizeCount:
    """One padded size.

    Attributes:
        image_size: (height, width) in pixels, padded.
        images: how many images have it.
        total: multiply-adds of one of them.
    """

    image_size: Size
    images: int
    total: int


@dataclass(frozen=True)
class SizesReport:
    """Multiply-adds of a detector over a data set, as `flops.FlopReport.total` counts them.

    Attributes:
        dataset: its name.
        by_size: each padded size, the smallest count first.
        padded_pixels: share of all pixels that pad images.
        fixed_size: the one (height, width) that every image is stretched to, or None.
        one_size: multiply-adds at the one size that published tables are of.
        proposals: boxes in the box head.
        uncounted: calls of operators without a formula in the count at `one_size`; empty in
            complete counts.
        unit: "multiply-adds".
        unsummed: products of elements that are in no sum of that count.
    """

    dataset: str
    by_size: tuple[SizeCount, ...]
    padded_pixels: float
    fixed_size: Size | None
    one_size: int
    proposals: int
    uncounted: Mapping[str, int] = field(default_factory=dict)
    unsummed: int = 0
    unit: str = flops.UNIT

    @property
    def images(self) -> int:
        """Images of the data set."""
        return sum(size.images for size in self.by_size)

    @property
    def mean(self) -> float:
        """The mean over all images."""
        return sum(size.images * size.total for size in self.by_size) / self.images

    @property
    def deviation(self) -> float:
        """The standard deviation over all images."""
        squares = sum(size.images * (size.total - self.mean) ** 2 for size in self.by_size)
        return math.sqrt(squares / self.images)

    @property
    def minimum(self) -> int:
        """The least."""
        return self.by_size[0].total

    @property
    def maximum(self) -> int:
        """The most."""
        return self.by_size[-1].total

    def histogram(self, bins: int = 12) -> list[tuple[float, float, int]]:
        """Images by multiply-adds: (lower edge, upper edge, images) of bins of equal width."""
        totals = [size.total for size in self.by_size]
        images, edges = np.histogram(totals, bins, weights=[size.images for size in self.by_size])
        return [
            (float(low), float(high), round(float(count)))
            for low, high, count in zip(edges[:-1], edges[1:], images, strict=True)
        ]


def datasets() -> tuple[str, ...]:
    """Names of the data sets whose image sizes are stored, in `results/*_sizes.csv`."""
    return tuple(sorted(path.name[: -len("_sizes.csv")] for path in RESULTS.glob("*_sizes.csv")))


@functools.cache
def image_sizes(dataset: str) -> Mapping[Size, int]:
    """How many images of a data set have each (height, width), before any resize.

    Raises:
        InputError: for a data set whose sizes are not stored.
    """
    choose(dataset, datasets(), "data set for --sizes")
    with (RESULTS / f"{dataset}_sizes.csv").open(newline="", encoding="utf-8") as table:
        return {
            (int(row["height"]), int(row["width"])): int(row["images"])
            for row in csv.DictReader(table)
        }


def padded(size: Size, stride: int) -> Size:
    """`size` rounded up to whole strides."""
    height, width = (-(-side // stride) * stride for side in size)
    return height, width


def count_over(
    detector: Detector, dataset: str = "val2017", *, proposals: int = 1000
) -> SizesReport:
    """Count a detector for every image of a data set, each distinct padded size once.

    Args:
        detector: on any device, meta included. One whose mechanism works for one image size is
            counted at that: every image is stretched to it.
        dataset: one of `datasets()`.
        proposals: boxes in the box head.

    Raises:
        InputError: for an unknown data set.
    """
    fixed = _fixed_size(detector.vil)
    before: Counter[Size] = Counter()
    for size, images in image_sizes(dataset).items():
        before[fixed or RESIZE.of(*size)] += images
    after: Counter[Size] = Counter()
    for size, images in before.items():
        after[padded(size, detector.vil.stride)] += images

    @functools.cache
    def count(size: Size) -> flops.FlopReport:
        return flops.count_flops(detector, image_size=size, proposals=proposals)

    by_size = [SizeCount(size, images, count(size).total) for size, images in after.items()]
    published = count(fixed or IMAGE_SIZE)
    return SizesReport(
        dataset=dataset,
        by_size=tuple(sorted(by_size, key=lambda size: size.total)),
        padded_pixels=1 - _pixels(before) / _pixels(after),
        fixed_size=fixed,
        one_size=published.total,
        proposals=proposals,
        uncounted=published.uncounted,
        unsummed=published.unsummed,
    )


def _fixed_size(vil: ViL) -> Size | None:
    """The one size that the backbone's mechanisms work for, or None."""
    if not any(getattr(place.module, "fixed_size", False) for place in vil.attention_places()):
        return None
    height, width = vil.largest
    return height, width


def _pixels(sizes: Mapping[Size, int]) -> int:
    return sum(images * height * width for (height, width), images in sizes.items())
