"""Images that are there more than once: copies, also encoded or resized anew, turned or mirrored.

Copies that were made grey or put between plain bars are found too.

Trained on and evaluated with, they make accuracies that say nothing of other images.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.annotations import Entry
from bench.data.coco import CocoDataset
from bench.data.findings import Finding, finding
from bench.data.images import resize
from bench.files import sha256

# Sides of a look, how far cells of two looks of one image are apart at most (of 255), and the
# standard deviation from which on a look tells images apart.
_SIDE, _APART, _CONTRAST = 16, 6, 8

# Names of what is made of one source: Roboflow's augmented copies, and tiles of DOTA's tools.
_OF_A_SOURCE = re.compile(r"(.+)(?:\.rf\.\w+|__[\d.]+__-?\d+___-?\d+)\.\w+")

# Brightness of red, green and blue; the spread of channels above which an image has colour, the
# range of what is plain, and the width of a bar and how far two are from being even, as shares.
_LUMA, _COLOURED, _PLAIN, _BAR, _EVEN = (0.299, 0.587, 0.114), 4, 12, 0.03, 0.01

COPIED, ALIKE = "image in two splits", "image alike in two splits"
# The share of a split's images from which on they are not independent; quarters of looks are means
# of so many cells.
_MANY, _QUARTER = 0.1, _SIDE // 2

Cells = NDArray[np.int16]


class Look(NamedTuple):
    """The grey of each cell of a grid over an image, (side, side).

    Attributes:
        mean: of the mean of its channels.
        luma: as images are made grey by their brightness; None where it is grey.
        inner: of the mean, without the plain bars around it; None where there are none.
    """

    mean: Cells
    luma: Cells | None
    inner: Cells | None


def look(pixels: Tensor) -> Look | None:
    """Return the look of an image, uint8 (3, height, width); None without contrast."""
    channels = pixels.float()
    mean = channels.mean(dim=0)
    cells = _cells(mean)
    if cells.std() < _CONTRAST:
        return None
    luma = _cells(torch.tensordot(torch.tensor(_LUMA), channels, 1))
    within = _within_bars(mean)
    inner = None if within is None else _cells(within)
    barred = inner is not None and inner.std() >= _CONTRAST
    coloured = bool((channels.amax(dim=0) - channels.amin(dim=0)).mean() > _COLOURED)
    return Look(cells, luma if coloured else None, inner if barred else None)


def _cells(grey: Tensor) -> Cells:
    return np.rint(resize(grey[None], (_SIDE, _SIDE))[0].numpy()).astype(np.int16)


def _within_bars(grey: Tensor) -> Tensor | None:
    """What is left without plain bars around it, or at the right or below; None without bars."""
    inner = grey
    for _ in range(2):
        busy = torch.nonzero(inner.amax(dim=1) - inner.amin(dim=1) > _PLAIN).flatten()
        if not len(busy):
            return None
        first, last = int(busy[0]), int(busy[-1]) + 1
        # A copy in the middle of a canvas has bars of one width, one in its corner has one bar.
        before, behind, all_ = first, len(inner) - last, len(inner)
        even = abs(before - behind) <= max(_EVEN * all_, 1)
        if behind >= _BAR * all_ and (even or before <= 1):
            inner = inner[first:last]
        inner = inner.T
    return None if inner.shape == grey.shape else inner


class _Looks:
    """Looks of one kind, and whose they are."""

    def __init__(self) -> None:
        self._looks: list[Cells] = []
        self._places: list[str] = []
        self._sorted: tuple[NDArray[np.float64], Cells, NDArray[np.int64]] | None = None

    def add(self, cells: Cells, place: str) -> None:
        """Take one up."""
        self._looks.append(cells)
        self._places.append(place)
        self._sorted = None

    def find(self, cells: Cells) -> tuple[str, str] | None:
        """One that looks the same, turned or mirrored, and how; None where there is none."""
        if self._sorted is None:
            looks = np.reshape(self._looks, (-1, _SIDE, _SIDE))
            means = looks.mean(axis=(1, 2))
            order = np.argsort(means)
            self._sorted = means[order], looks, order
        means, looks, order = self._sorted
        # A mean that is further off belongs to other cells, turned or not.
        near = order[slice(*np.searchsorted(means, [cells.mean() - _APART, cells.mean() + _APART]))]
        for how, turned in _turned(cells):
            apart = np.abs(looks[near] - turned).max(axis=(1, 2), initial=0)
            if len(near) and apart.min() <= _APART:
                return self._places[near[apart.argmin()]], how
        return None


class Seen:
    """What was seen of the splits of a data set, one after the other."""

    def __init__(self) -> None:
        self._pixels: dict[str, tuple[str, str]] = {}
        self._files: dict[int, list[Path]] = defaultdict(list)
        self._split_of: dict[Path, str] = {}
        self._looks: dict[str, _Looks] = defaultdict(_Looks)
        self._sources: dict[str, tuple[str, str]] = {}
        self._sha256 = cache(sha256)

    def again(self, dataset: CocoDataset, entry: Entry, digest: str) -> Iterator[Finding]:
        """Whether the pixels were there before, in this split or another, under another name."""
        place = (dataset.split, str(dataset.path(entry)))
        before = self._pixels.setdefault(digest, place)
        if before != place:
            within = before[0] == place[0]
            yield finding(
                "image twice in a split" if within else COPIED,
                other=f"{Path(before[1]).name} of {before[0]}",
                **place_of(entry),
            )

    def alike(
        self, dataset: CocoDataset, looks: Sequence[tuple[Entry, Look | None]]
    ) -> Iterator[Finding]:
        """Which images look like one of the splits before, as they are, turned or mirrored.

        How many look like another of this split is said where they are many.

        Args:
            looks: of the images of this split that are not copies.
        """
        known = [(entry, seen) for entry, seen in looks if seen is not None]
        count = _repeated([seen.mean for _, seen in known])
        if count and count >= _MANY * len(looks):
            yield finding("images alike in a split", count=count, all=len(looks))
        for entry, seen in known:
            tries = [(seen.mean, "mean"), (seen.mean, "inner"), (seen.inner, "mean")]
            tries += [(seen.mean, "luma") if seen.luma is None else (seen.luma, "grey")]
            for cells, kind in tries:
                found = None if cells is None else self._looks[kind].find(cells)
                if found is not None:
                    other, how = found
                    yield finding(ALIKE, other=other, how=how, **place_of(entry))
                    break
        for entry, seen in known:
            place = f"{dataset.path(entry).name} of {dataset.split}"
            kinds = {"mean": seen.mean, "inner": seen.inner, "luma": seen.luma}
            kinds["grey"] = seen.mean if seen.luma is None else None
            for kind, cells in kinds.items():
                if cells is not None:
                    self._looks[kind].add(cells, place)

    def files(self, dataset: CocoDataset, known: set[int | None]) -> Iterator[Finding]:
        """Which files are, byte by byte, those of the splits before; only equal sizes are read.

        Args:
            known: ids of images that are known to be there twice.
        """
        paths: list[tuple[int, Path]] = []
        for index in range(len(dataset)):
            entry, _ = dataset.entry(index)
            path = dataset.path(entry)
            with suppress(OSError):
                size = path.stat().st_size
                paths.append((size, path))
                if entry["id"] not in known:
                    found = next((p for p in self._files[size] if self._same(p, path)), None)
                    if found is not None:
                        other = f"{found.name} of {self._split_of[found]}"
                        yield finding(COPIED, other=other, **place_of(entry))
        for size, path in paths:
            self._files[size].append(path)
            self._split_of.setdefault(path, dataset.split)

    def sources(self, dataset: CocoDataset, found: Iterable[Finding]) -> Iterator[Finding]:
        """Which images are, by their names, made of the source of one of the splits before.

        Args:
            found: what was found of this split; images that are there twice are passed over.
        """
        known = {f.image for f in found if f.kind in (COPIED, ALIKE)}
        for index in range(len(dataset)):
            entry, _ = dataset.entry(index)
            name = dataset.path(entry).name
            source = _OF_A_SOURCE.fullmatch(name)
            if source is not None:
                split, other = self._sources.setdefault(source[1], (dataset.split, name))
                if split != dataset.split and entry["id"] not in known:
                    kind = "source in two splits"
                    yield finding(kind, other=f"{other} of {split}", **place_of(entry))

    def _same(self, one: Path, other: Path) -> bool:
        return one == other or self._sha256(one) == self._sha256(other)


def _repeated(looks: Sequence[Cells]) -> int:
    """How many look like another one, as frames of a video do."""
    cells = np.reshape(looks, (-1, _SIDE, _SIDE))
    means = cells.mean(axis=(1, 2))
    order = np.argsort(means)
    cells, means = cells[order], means[order]
    # Means of parts that are further off belong to other cells, and are cheap to compare.
    quarters = cells.reshape(-1, 2, _QUARTER, 2, _QUARTER).mean(axis=(2, 4)).reshape(-1, 4)
    ends = np.searchsorted(means, means + _APART, side="right")
    alike = np.zeros(len(cells), dtype=bool)
    for place, end in enumerate(ends.tolist()):
        after = slice(place + 1, end)
        if alike[place:end].all():
            continue
        near = np.abs(quarters[after] - quarters[place]).max(axis=1) <= _APART
        near = place + 1 + np.flatnonzero(near)
        near = near[np.abs(cells[near] - cells[place]).max(axis=(1, 2), initial=0) <= _APART]
        alike[near] = True
        alike[place] |= len(near) > 0
    return int(alike.sum())


def _turned(seen: Cells) -> Iterator[tuple[str, Cells]]:
    """The looks of an image as it is, mirrored and turned by right angles, and what they are."""
    mirrored = seen[:, ::-1]
    yield from (("", seen), (", mirrored", mirrored))
    for quarters in (1, 2, 3):
        yield ", turned", np.rot90(seen, quarters)
        yield ", mirrored and turned", np.rot90(mirrored, quarters)


def place_of(entry: Entry) -> dict[str, Any]:
    """What a finding says of an image."""
    return {"image": entry["id"], "name": str(entry["file_name"])}
