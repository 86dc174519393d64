"""Multiply-adds over the true image sizes of a data set, not those of one image.

A table of costs is of one image size; a data set has hundreds. Images are resized as the published
recipe does (shortest edge, longest edge) and padded to whole strides of the backbone, which leaves
few distinct sizes. Besides the mean, this says what padding costs: pixels that pad images, and, of
mechanisms with windows, products with what pads the grid to whole windows.
"""

import csv
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bench.config.schema import RunConfig
from bench.errors import choose
from bench.measure import flops
from bench.measure.published import IMAGE_SIZE, RESULTS
from bench.model.backbone import ViL
from bench.model.build import build_detector
from bench.model.detectors import Detector

SHORTEST, LONGEST = 800, 1333
COCO_CLASSES = 80

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
class WindowPadding:
    """What windows cost that hold no token, in one stage, over all images.

    Attributes:
        stage: "stage1" …
        attention: the mechanism.
        window: side of a window.
        padded_queries: share of the queries that pad the grid to whole windows.
        padded_products: share of the products of queries and keys of which at least one is no
            token of the grid: padding, or a window beyond the edge.
    """

    stage: str
    attention: str
    window: int
    padded_queries: float
    padded_products: float


@dataclass(frozen=True)
class SizesReport:
    """Multiply-adds of a detector over a data set, as `flops.FlopReport.total` counts them.

    Attributes:
        dataset: its name.
        by_size: each padded size, the smallest count first.
        padded_pixels: share of all pixels that pad images.
        windows: of each stage that has windows.
        fixed_size: the one (height, width) that every image is stretched to, or None.
        one_size: multiply-adds at the one size that published tables are of.
        proposals: boxes in the box head.
        unit: "multiply-adds".
    """

    dataset: str
    by_size: tuple[SizeCount, ...]
    padded_pixels: float
    windows: tuple[WindowPadding, ...]
    fixed_size: Size | None
    one_size: int
    proposals: int
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


def resized(size: Size, *, shortest: int = SHORTEST, longest: int = LONGEST) -> Size:
    """The size of an image in a detector, before it is padded.

    The shorter edge becomes `shortest`, or as much less as keeps the longer one at `longest`; both
    are rounded to the nearest pixel, as detectron2 does (torchvision rounds down).
    """
    scale = min(shortest / min(size), longest / max(size))
    height, width = (math.floor(side * scale + 0.5) for side in size)
    return height, width


def padded(size: Size, stride: int) -> Size:
    """`size` rounded up to whole strides."""
    height, width = (-(-side // stride) * stride for side in size)
    return height, width


def count_over(
    detector: Detector,
    dataset: str = "val2017",
    *,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
    proposals: int = 1000,
) -> SizesReport:
    """Count a detector for every image of a data set, each distinct padded size once.

    Args:
        detector: on any device, meta included. One whose mechanism works for one image size is
            counted at that: every image is stretched to it.
        dataset: one of `datasets()`.
        shortest: edge in pixels.
        longest: edge in pixels.
        proposals: boxes in the box head.

    Raises:
        InputError: for an unknown data set.
    """
    fixed = _fixed_size(detector.vil)
    before: Counter[Size] = Counter()
    for size, images in image_sizes(dataset).items():
        before[fixed or resized(size, shortest=shortest, longest=longest)] += images
    after: Counter[Size] = Counter()
    for size, images in before.items():
        after[padded(size, detector.vil.stride)] += images
    count = counter(detector, proposals=proposals)
    by_size = [SizeCount(size, images, count(size)) for size, images in after.items()]
    return SizesReport(
        dataset=dataset,
        by_size=tuple(sorted(by_size, key=lambda size: size.total)),
        padded_pixels=1 - _pixels(before) / _pixels(after),
        windows=tuple(window_padding(detector.vil, after)),
        fixed_size=fixed,
        one_size=count(fixed or IMAGE_SIZE),
        proposals=proposals,
    )


def count_row(config: RunConfig, dataset: str = "val2017") -> SizesReport:
    """Count the detector of a row, made on the meta device for COCO's classes; see `count_over`.

    Raises:
        InputError: for an unknown data set.
    """
    with torch.device("meta"):
        detector = build_detector(config, COCO_CLASSES)
    return count_over(detector, dataset, proposals=config.profile.proposals)


def _fixed_size(vil: ViL) -> Size | None:
    """The one size that the backbone's mechanisms work for, or None."""
    if not any(getattr(place.module, "fixed_size", False) for place in vil.attention_places()):
        return None
    height, width = vil.largest
    return height, width


def _pixels(sizes: Mapping[Size, int]) -> int:
    return sum(images * height * width for (height, width), images in sizes.items())


def counter(detector: Detector, *, proposals: int = 1000) -> Callable[[Size], int]:
    """A quick form of `flops.count(detector, image_size=size, …).total` for many padded sizes.

    Outside of attention a detector's cost is a sum of constants times the areas of its maps, which
    a few counts give. Two more check that; where it does not hold, each size is
    counted by itself. Attention is its own closed form, or counted for each grid.
    """

    def whole(size: Size) -> int:
        return flops.count(detector, image_size=size, proposals=proposals).total

    attention = _attention_counter(detector.vil)
    stride = detector.vil.stride

    def areas(size: Size) -> list[int]:
        # The maps up to the backbone's stride are proportional; the two coarser ones are rounded.
        return [1, *(math.prod(-(-side // (stride * k)) for side in size) for k in (1, 2, 4))]

    def strides(*pairs: Size) -> list[Size]:
        return [(stride * rows, stride * columns) for rows, columns in pairs]

    samples, checks = strides((16, 16), (32, 16), (17, 16), (18, 17)), strides((23, 35), (30, 21))
    if _fixed_size(detector.vil) is not None or min(detector.vil.largest) < 35 * stride:
        return whole
    weights = np.linalg.solve(
        np.array([areas(size) for size in samples], dtype=float),
        np.array([whole(size) - attention(size) for size in samples], dtype=float),
    )

    def quick(size: Size) -> int:
        return round(float(weights @ areas(size))) + attention(size)

    return quick if all(quick(size) == whole(size) for size in checks) else whole


def _attention_counter(vil: ViL) -> Callable[[Size], int]:
    places = list(vil.attention_places())

    @functools.cache
    def one(module: nn.Module, grid: Size) -> int:
        declare = getattr(module, "multiply_adds", None)
        counted: int = flops.audit(module, grid).operators if declare is None else declare(grid)
        return counted

    return lambda size: sum(one(place.module, place.grid(size)) for place in places)


def window_padding(vil: ViL, sizes: Mapping[Size, int]) -> list[WindowPadding]:
    """What each stage's windows cost that hold no token, over images of padded `sizes`.

    Of mechanisms that say their `window`; `reach` is how many windows to each side a window sees.
    """
    first = {place.stage.number: place for place in reversed(list(vil.attention_places()))}
    found = []
    for number, place in sorted(first.items()):
        window, reach = getattr(place.module, "window", None), getattr(place.module, "reach", 0)
        if window is None:
            continue
        grids = [(place.grid(size), images) for size, images in sizes.items()]
        queries = _padded_share(grids, functools.partial(_queries, window=window))
        products = _padded_share(grids, functools.partial(_products, window=window, reach=reach))
        name = place.stage.attention
        found.append(WindowPadding(f"stage{number}", name, window, queries, products))
    return found


def _padded_share(
    grids: Iterable[tuple[Size, int]], along: Callable[[int], tuple[int, int]]
) -> float:
    """The share that is no token's, from how much is and how much there is along each side."""
    of_tokens = of_all = 0
    for (rows, columns), images in grids:
        vertical, horizontal = along(rows), along(columns)
        of_tokens += images * vertical[0] * horizontal[0]
        of_all += images * vertical[1] * horizontal[1]
    return 1 - of_tokens / of_all


def _queries(side: int, *, window: int) -> tuple[int, int]:
    """Along one side of the grid: tokens, and places of whole windows."""
    return side, -(-side // window) * window


def _products(side: int, *, window: int, reach: int) -> tuple[int, int]:
    """Along one side: pairs of a query and a key of which both are tokens, and all pairs."""
    windows = -(-side // window)
    tokens = [min(window, side - window * place) for place in range(windows)]
    keys = [sum(tokens[max(0, place - reach) : place + reach + 1]) for place in range(windows)]
    pairs = sum(own * seen for own, seen in zip(tokens, keys, strict=True))
    return pairs, windows * window * (2 * reach + 1) * window
