"""Images that are there more than once: copies, also encoded or resized anew, turned or mirrored.

Trained on and evaluated with, they make accuracies that say nothing of other images.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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

COPIED, ALIKE = "image in two splits", "image alike in two splits"

Look = NDArray[np.int16]


def look(pixels: Tensor) -> Look | None:
    """The grey of each cell of a grid over an image, (side, side); None without contrast.

    Args:
        pixels: uint8 (3, height, width).
    """
    grey = pixels.float().mean(dim=0)[None]
    cells = resize(grey, (_SIDE, _SIDE))[0].numpy()
    return np.rint(cells).astype(np.int16) if cells.std() >= _CONTRAST else None


class Seen:
    """What was seen of the splits of a data set, one after the other."""

    def __init__(self) -> None:
        self._pixels: dict[str, tuple[str, str]] = {}
        self._files: dict[int, list[Path]] = defaultdict(list)
        self._split_of: dict[Path, str] = {}
        self._looks: list[Look] = []
        self._places: list[str] = []
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

        Args:
            looks: of the images of this split that are not copies.
        """
        known = [(entry, seen) for entry, seen in looks if seen is not None]
        before = np.reshape(self._looks, (-1, _SIDE, _SIDE))
        # A mean that is further off belongs to other cells, turned or not.
        means = before.mean(axis=(1, 2))
        order = np.argsort(means)
        for entry, seen in known:
            ends = np.searchsorted(means[order], [seen.mean() - _APART, seen.mean() + _APART])
            near = order[slice(*ends)]
            for how, turned in _turned(seen):
                apart = np.abs(before[near] - turned).max(axis=(1, 2), initial=0)
                if len(near) and apart.min() <= _APART:
                    other = self._places[near[apart.argmin()]]
                    yield finding(ALIKE, other=other, how=how, **place_of(entry))
                    break
        self._looks += [seen for _, seen in known]
        self._places += [f"{dataset.path(entry).name} of {dataset.split}" for entry, _ in known]

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


def _turned(seen: Look) -> Iterator[tuple[str, Look]]:
    """The looks of an image as it is, mirrored and turned by right angles, and what they are."""
    mirrored = seen[:, ::-1]
    yield from (("", seen), (", mirrored", mirrored))
    for quarters in (1, 2, 3):
        yield ", turned", np.rot90(seen, quarters)
        yield ", mirrored and turned", np.rot90(mirrored, quarters)


def place_of(entry: Entry) -> dict[str, Any]:
    """What a finding says of an image."""
    return {"image": entry["id"], "name": str(entry["file_name"])}
