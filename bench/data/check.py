"""Everything that is wrong or odd in a data set, not only the first of it.

The annotations are read by `CocoDataset`, as for training; what is found here besides needs pixels
or all splits. Runs say the same of what they read: `remarks`.
"""

import hashlib
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as mask_api
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from bench.data import images, layout
from bench.data.annotations import Entry, outline
from bench.data.classes import ClassDataset
from bench.data.coco import CocoDataset
from bench.data.copies import COPIED, Look, Seen, look, place_of
from bench.data.findings import Finding, Tally, finding, quoted
from bench.data.images import DEEP_MODES, DEEPEST, Picture
from bench.data.loader import clear_worker_errors, prepare_worker
from bench.data.masks import Runs
from bench.errors import InputError
from bench.system.progress import Bar

_AT_ONCE = 8
# A run looks at all images of splits up to this size, and at some of larger ones.
_LOOKED_AT_WHOLE, _LOOKED_AT = 2000, 200
# An area or box that differs from its mask's by more is taken for a mistake, not for rounding.
_AREA_FACTOR, _AREA_PIXELS = 2.0, 50.0
_BOX_OVERLAP, _BOX_PIXELS = 0.5, 3.0
# An area within the first share of its box's is that of the box, where the mask leaves more than
# the second free; polygons that share more than that of their mask do so on purpose.
_ROUNDED, _SPARE = 0.01, 0.05
# The share of boxes that has to fit better in another format, or to lie beside their masks alike,
# before that is said.
_MANY, _SOME = 0.5, 0.2
# Share of the darkest and of the brightest pixels of a deep image that may be defects, scale bars
# or an edge, and steps of 255, a tenth, that the others of a good one have.
_FEW_PIXELS, _PART_OF_DEEP = 0.04, 26
# Boxes whose edges are all off those of their masks by the same pixels lie beside them, from so
# many boxes and pixels on; rounding moves a single edge by half a pixel.
_BESIDE, _OFF, _ALIKE = 16, 0.75, 0.5
# Boxes whose sides are others than their masks', by a share and by pixels: drawn well they are not.
_LONGER, _LONGER_PIXELS = 1.04, 2.0
# Areas that differ by a share and half a rim from those of masks or boxes, where nearly all do so,
# or from what the turns of a polygon enclose.
# Of boxes they do not where each is another share of its box: not nearly that of others of its
# image, from so many objects on, nor less than the last.
_OFF_AREA, _NEARLY_ALL, _ALIKE_AREAS, _SHARING, _NO_SHARE = 0.1, 0.75, 0.05, 5, 0.05
# Pixels that boxes of one object are apart by, at most, where one of them was rounded.
_SAME_PIXELS = 1
# Outlines that take this share of their own box are boxes, where such a share of all does: of
# COCO's, one in a hundred does.
_FILLS, _FILLING = 0.98, 0.2

# Values of 255 that those of an image span at least; labels and shares of 1 do not.
_CONTRAST = 16

# Categories of characters: blanks, controls, formats, dashes and underscores.
_BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf", "Pd", "Pc")

# What other benchmarks call what counts neither as an object nor as a miss, by its letters.
_NO_OBJECTS = re.compile(
    r"background|don.?tcare|ignored?(region|area)?s?|(un|not)labell?ed|noobjects?|void"
)

# Kinds by Pillow's modes; RGB is the ordinary one.
_MODES = {
    "1": "black-and-white image",
    "L": "grey image",
    "LA": "grey image with transparency",
    "P": "image with a palette",
    "PA": "image with a palette",
    "RGBA": "transparent image",
    "CMYK": "CMYK image",
    **dict.fromkeys(DEEP_MODES, "16-bit image"),
}


@dataclass(frozen=True)
class SplitReport:
    """What was found in a split.

    Attributes:
        split: its name.
        images, annotations: how many are used.
        categories: (id, name), in the order of labels.
        decoded: how many images were decoded.
        findings: everything found, in the order of the files.
    """

    split: str
    images: int
    annotations: int
    categories: tuple[tuple[int, str], ...]
    decoded: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings with which the data cannot be used."""
        return tuple(found for found in self.findings if found.is_error)

    @property
    def odd(self) -> tuple[Finding, ...]:
        """The findings that are handled."""
        return tuple(found for found in self.findings if not found.is_error)


def check(
    root: Path,
    chosen: Sequence[str] = (),
    *,
    decode: bool = True,
    workers: int = 0,
    degenerate_boxes: str = "drop",
    pictures: Path | None = None,
) -> list[SplitReport]:
    """Read a data set and report everything wrong or odd, split by split.

    Args:
        root: its folder, or an annotation file, which is the only split then.
        chosen: names of splits; all that have an annotation file where empty.
        decode: whether to decode every image; else only annotations and masks are read.
        workers: processes that decode.
        degenerate_boxes: "drop" to leave out boxes without area, or "error", as when training.
        pictures: folder of the images; None to look for them near the annotations.

    Raises:
        InputError: for a folder or a split that is not there.
        DataWorkerError: where a worker died.
    """
    file = root if root.is_file() else None
    if file is None and not root.is_dir():
        raise InputError(f"no data folder {root}")
    there = layout.splits(root) if file is None else (root.stem,)
    if not there:
        raise InputError(
            f"no annotations/instances_SPLIT.json in {root}; needed: {layout.LAYOUT}, or"
            " SPLIT/_annotations.coco.json beside its images; any other file may be named itself"
        )
    missing = [name for name in chosen if name not in there]
    if missing:
        raise InputError(f"no split {missing[0]!r} in {root}; splits there: {', '.join(there)}")
    reports: list[SplitReport] = []
    seen = Seen()
    for split in dict.fromkeys(chosen or there):
        found: list[Finding] = []
        try:
            dataset = CocoDataset(
                root if file is None else root.parent,
                split,
                file=file,
                images=pictures,
                degenerate_boxes=degenerate_boxes,
                report=found.append,
            )
        except InputError as error:
            unreadable = finding("annotation file unreadable", why=error)
            reports.append(SplitReport(split, 0, 0, (), 0, (unreadable,)))
            continue
        absent = {f.image for f in found if f.kind == "image missing"}
        decoding = decode and dataset.folder.is_dir()
        decoded = 0
        outlined, areas = [], []
        for one in _inspect(dataset, seen, absent, decode=decoding, workers=workers):
            found += one.found
            outlined.append(one.outlined)
            areas.append(one.areas)
            decoded += bool(one.digest)
        found += seen.sources(dataset, found)
        found += [*_of_the_whole(dataset, found, outlined, areas), *_unlisted(dataset)]
        found += [*_other_classes(dataset, reports), *_of_no_use(dataset, found)]
        reports.append(
            SplitReport(
                split=split,
                images=len(dataset),
                annotations=dataset.num_annotations,
                categories=dataset.categories,
                decoded=decoded,
                findings=tuple(found),
            )
        )
    return reports


def remarks(datasets: Iterable[CocoDataset]) -> list[str]:
    """What is left out of data sets or taken otherwise, a line for each kind and split.

    Of a large split some images are looked at, evenly spread; its annotations are read whole, and
    its files are compared with those of the splits before.

    Args:
        datasets: the splits of a run, the most important one first.

    Raises:
        InputError: for an image or a mask that cannot be read; naming it.
    """
    lines: list[str] = []
    seen = Seen()
    datasets = list(datasets)
    sampled = any(len(dataset) > _LOOKED_AT_WHOLE for dataset in datasets)
    for dataset in datasets:
        tally = Tally.of(dataset.tally)
        most = len(dataset) if len(dataset) <= _LOOKED_AT_WHOLE else _LOOKED_AT
        found: list[Finding] = []
        outlined, areas = [], []
        for one in _inspect(dataset, seen, set(), most=most):
            found += one.found
            outlined.append(one.outlined)
            areas.append(one.areas)
            error = next((f for f in one.found if f.is_error), None)
            if error is not None:
                raise InputError(f"{dataset.annotation_file}: {error.text}")
        if sampled:
            found += seen.files(dataset, {f.image for f in found if f.kind == COPIED})
        found += seen.sources(dataset, found)
        for each in [*found, *_of_the_whole(dataset, found, outlined, areas)]:
            tally.add(each)
        part = "" if most == len(dataset) else f" (pixels of {most} of {len(dataset)} images)"
        lines += tally.lines(f"{dataset.annotation_file}{part}")
    return lines


def class_remarks(splits: Iterable[ClassDataset], white: int) -> list[str]:
    """What is odd in images by class, a line for each kind and split.

    Of a large split some are looked at, evenly spread.

    Args:
        splits: of a data set.
        white: the value that becomes 255 in grey images of 16 bits.

    Raises:
        InputError: for an image that cannot be read; naming it.
    """
    lines: list[str] = []
    before: dict[str, str] = {}
    found: list[Finding]
    for split in splits:
        tally, found, seen = Tally(), [], {}
        if split.folder.name != split.split:
            tally.add(finding("split of another name", split=split.split, path=split.folder))
        for name in split.shards_beside:
            tally.add(finding("shard beside folders of classes", name=name))
        empty, others = split.left_out()
        for name in empty:
            kind = "class number without an image" if split.is_sharded else "class without an image"
            tally.add(finding(kind, name=name))
        for name in others:
            shards = split.is_sharded
            kind = "second image of a sample" if shards else "file of a class that is no image"
            tally.add(finding(kind, name=name, ending=Path(name).suffix))
        most = len(split) if len(split) <= _LOOKED_AT_WHOLE else _LOOKED_AT
        for index in np.linspace(0, len(split), most, endpoint=False).astype(int).tolist():
            picture, place = split.picture(index, white)
            for kind, values in _oddities(picture):
                found.append(finding(kind, **values, name=place))
                tally.add(found[-1])
            digest = _digest(picture)
            seen[digest] = place
            if digest in before:
                tally.add(finding(COPIED, other=before[digest], name=place))
        before |= seen
        for whole in _small_range(found, white):
            tally.add(whole)
        part = "" if most == len(split) else f" (pixels of {most} of {len(split)} images)"
        lines += tally.lines(f"{split.folder}{part}")
    return lines


class _Inspection(NamedTuple):
    """Of an image what is found, a digest and a look of its pixels, `_outlined` and `_areas`."""

    found: list[Finding]
    digest: str = ""
    look: Look | None = None
    outlined: NDArray[np.float64] = np.empty((0, 6))
    areas: NDArray[np.float64] = np.empty((0, 4))


class _Inspections(Dataset[_Inspection]):
    """What is found in each image and its annotations."""

    def __init__(self, dataset: CocoDataset, absent: set[int | None], *, decode: bool) -> None:
        self.dataset, self.absent, self.decode = dataset, absent, decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Inspection:
        entry, annotations = self.dataset.entry(index)
        found: list[Finding] = []
        digest, seen = "", None
        if self.decode and entry["id"] not in self.absent:
            digest, seen = _inspect_file(self.dataset, entry, found)
        areas = []
        for annotation in annotations:
            runs = outline(annotation, entry["height"], entry["width"])
            found += _inspect_mask(annotation, entry, runs)
            areas += [] if annotation["iscrowd"] else [_areas(annotation, runs)]
        found += _nearly_twice(annotations)
        sizes = np.reshape(areas, (-1, 4))
        return _Inspection(found, digest, seen, _outlined(annotations, entry), sizes)


def _inspect(
    dataset: CocoDataset,
    seen: Seen,
    absent: set[int | None],
    *,
    decode: bool = True,
    workers: int = 0,
    most: int | None = None,
) -> Iterator[_Inspection]:
    count = len(dataset) if most is None else min(most, len(dataset))
    chosen = np.linspace(0, len(dataset), count, endpoint=False).astype(int).tolist()
    loader = DataLoader(
        _Inspections(dataset, absent, decode=decode),
        sampler=chosen,
        batch_size=_AT_ONCE,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=prepare_worker,
    )
    console = Console(emoji=False, stderr=True, quiet=most is not None)
    with Bar(f"checking {dataset.split}", count, console=console) as bar, clear_worker_errors():
        places = iter(chosen)
        looks: list[tuple[Entry, Look | None]] = []
        for batch in loader:
            for one in batch:
                entry, _ = dataset.entry(next(places))
                copies = list(seen.again(dataset, entry, one.digest)) if one.digest else []
                looks += [] if copies else [(entry, one.look)]
                yield one._replace(found=[*one.found, *copies])
            bar.advance(len(batch))
        yield _Inspection(list(seen.alike(dataset, looks)))


def _inspect_file(
    dataset: CocoDataset, entry: Entry, found: list[Finding]
) -> tuple[str, Look | None]:
    """Add what is found in an image's file; return digest and look of its pixels, or nothing."""
    path, own = dataset.path(entry), place_of(entry)
    expected = (entry["height"], entry["width"])
    try:
        raw = path.read_bytes()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            picture = images.read(path, raw, white=dataset.deep_white, expected=expected)
    except OSError as error:
        found.append(finding("image unreadable", why=f"{path}: {error.strerror}", **own))
        return "", None
    except InputError as error:
        found.append(finding("image unreadable", why=error, **own))
        return "", None
    if picture.size != expected:
        size: dict[str, Any] = {"rows": picture.size[0], "columns": picture.size[1]}
        stated = {"height": expected[0], "width": expected[1], "hint": picture.hint(expected)}
        found.append(finding("image of another size", **size, **stated, **own))
    found += (finding(kind, **values, **own) for kind, values in _oddities(picture))
    why = images.damage(raw, picture.mode)
    found += [finding("damaged JPEG", why=why, **own)] if why else []
    found += (finding("image with a warning", why=each.message, **own) for each in caught)
    return _digest(picture), look(picture.pixels)


def _digest(picture: Picture) -> str:
    return hashlib.blake2b(picture.pixels.numpy().tobytes(), digest_size=16).hexdigest()


def _oddities(picture: Picture) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and values of what is odd in an image."""
    if picture.mode != "RGB":
        kind = _MODES.get(picture.mode, "image of an unusual mode")
        kind = "image of premultiplied colours" if picture.divided else kind
        yield kind, {"mode": picture.mode, "top": picture.top}
        if kind == "16-bit image":
            yield from _few_apart(picture)
    if picture.cut:
        yield "16-bit colour image", {"top": int(picture.pixels.max())}
        yield from _few_apart(picture)
    low, high = int(picture.pixels.min()), int(picture.pixels.max())
    if high - low < _CONTRAST:
        yield "image without contrast", {"low": low, "high": high}
    if picture.orientation != 1:
        yield "image turned by EXIF", {"orientation": picture.orientation}
    if picture.animated:
        yield "image of several frames", {}


def _few_apart(picture: Picture) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whether but for a few pixels all are much alike."""
    pixels = picture.pixels.amax(dim=0).numpy()
    ends = [int(pixels.min()), int(pixels.max())]
    if ends[1] - ends[0] < _CONTRAST:
        return
    # What a scanner or a mask writes around its picture has one value, often an extreme one.
    often = int(np.bincount(pixels.ravel()).argmax())
    inner = pixels[~np.isin(pixels, [*ends, often])]
    share = (_FEW_PIXELS, 1 - _FEW_PIXELS)
    # Where nothing is left, these three values are all.
    low, high = map(int, np.quantile(inner if inner.size else [often], share, method="nearest"))
    if high - low < _PART_OF_DEEP:
        yield "image without contrast but for a few pixels", {"low": low, "high": high}


def _inspect_mask(annotation: Entry, entry: Entry, runs: Runs) -> Iterator[Finding]:
    """Compare an annotation's mask with its box and its area."""
    height, width = entry["height"], entry["width"]
    own = {"image": entry["id"], "annotation": annotation["id"]}
    pixels = float(mask_api.area(runs))
    if not pixels:
        yield finding("mask without a pixel", **own)
        return
    x, y, w, h = mask_api.toBbox(runs).tolist()
    extent = np.array([x, y, x + w, y + h])
    box = annotation["bbox"]
    corners = _corners(box)
    if not _fits(corners, extent, height, width):
        sides = np.array([width, height, width, height])
        formats = {
            "x1, y1, x2, y2": np.array(box, dtype=float),
            "a centre, width and height": corners - np.tile(np.array(box[2:]) / 2, 2),
            "y, x, height, width": _corners([box[place] for place in (1, 0, 3, 2)]),
            "x, y from the bottom, width, height": _corners(
                [box[0], height - box[1] - box[3], *box[2:]]
            ),
            "fractions of the image": corners * sides,
            "percentages of the image": corners * sides / 100,
        }
        fitting = [name for name, read in formats.items() if _fits(read, extent, height, width)]
        shown = [int(value) for value in (x, y, w, h)]
        yield finding(
            "box that does not fit its mask",
            box=box,
            extent=shown,
            format=next(iter(fitting), ""),
            **own,
        )
    area = float(annotation["area"])
    ratio = max(area, pixels) / max(min(area, pixels), 1.0)
    # Without a mask the box stands for it, of which an object may take any share but none at all.
    unmasked = annotation["segmentation"] is None and 1 <= area < pixels
    if ratio > _AREA_FACTOR and abs(area - pixels) > _AREA_PIXELS and not unmasked:
        whole = area == height * width
        kind = "area of the whole image" if whole else "area that does not fit its mask"
        yield finding(kind, area=area, pixels=pixels, **own)
    elif annotation["segmentation"] is not None:
        around = float(np.prod(annotation["bbox"][2:]))
        if abs(area - around) <= _ROUNDED * around and around - pixels > _SPARE * around:
            yield finding("area of the box", area=area, pixels=pixels, **own)
    parts = annotation["segmentation"]
    if isinstance(parts, list):
        alone = mask_api.area(mask_api.frPyObjects(parts, height, width))
        shared = float(alone.sum()) - pixels
        if shared > _SPARE * pixels:
            yield finding("polygons within each other", pixels=shared, **own)
        for part, inside in zip(parts, alone, strict=True):
            points = np.reshape(part, (-1, 2)).astype(float)
            if _crosses_itself(points, float(inside), height, width):
                yield finding("polygon that crosses itself", count=len(points), **own)


def _crosses_itself(points: NDArray[np.float64], inside: float, height: int, width: int) -> bool:
    """Whether a polygon with so many pixels encloses parts the other way round, or twice."""
    low, high = points.min(axis=0), points.max(axis=0)
    if abs(_enclosed(points) - inside) <= _OFF_AREA * inside + float((high - low).sum()):
        return False
    # Lines to a hole or to another part run there and back; what is over the edge has no pixels.
    joined = len(np.unique(points, axis=0)) < len(points) - 1
    over = float(np.max([-low, high - [width, height]]))
    return not joined and over <= _SAME_PIXELS


def _areas(annotation: Entry, runs: Runs) -> list[float]:
    """The area of an annotation, that of its mask or else box, half its rim, and if it has a mask.

    An area that is its box's or its image's, but not its mask's, is said of the single annotation,
    and equal here.
    """
    width, height = annotation["bbox"][2:]
    area, around = float(annotation["area"]), float(width * height)
    if area == math.prod(runs["size"]):
        around = area
    masked = annotation["segmentation"] is not None
    of_box = not masked or abs(area - around) <= _ROUNDED * around
    return [area, around if of_box else float(mask_api.area(runs)), width + height, masked]


def _other_areas(images: Sequence[NDArray[np.float64]]) -> Iterator[Finding]:
    """Whether nearly all areas are of something else, as of images before they were resized."""
    every = np.concatenate([np.empty((0, 4)), *images])
    area, pixels, rim, masked = every.T
    ratio = area / np.maximum(pixels, 1)
    ends = np.cumsum([0, *map(len, images)])
    typical = np.full(len(every), np.median(ratio) if len(every) else 0)
    for one in map(slice, ends[:-1], ends[1:]):
        if len(ratio[one]) >= _SHARING:
            typical[one] = np.median(ratio[one])
    # Of a box an area may be any share, but not the same or next to nothing of all.
    unlike_a_share = (np.abs(ratio - typical) <= _ALIKE_AREAS * typical) | (ratio > 1)
    wrong = (masked > 0) | unlike_a_share | (ratio < _NO_SHARE)
    wrong &= np.abs(area - pixels) > _OFF_AREA * pixels + rim
    count = int(wrong.sum())
    if len(every) >= _BESIDE and count >= _NEARLY_ALL * len(every):
        kind, usual = "areas that do not fit", float(np.median(ratio[wrong]))
        yield finding(kind, count=count, all=len(every), usual=usual)


def _nearly_twice(annotations: Iterable[Entry]) -> Iterator[Finding]:
    """Which annotations are, but for rounding, another one of their image."""
    ordered = sorted(annotations, key=lambda one: float(one["bbox"][0]))
    for place, one in enumerate(ordered):
        for other in ordered[place + 1 :]:
            offsets = np.subtract(other["bbox"], one["bbox"])
            if offsets[0] > _SAME_PIXELS:
                break
            kinds = [(a["category_id"], a["iscrowd"]) for a in (one, other)]
            same = other["bbox"] == one["bbox"] and other["segmentation"] == one["segmentation"]
            # The same is said by the data set.
            if np.abs(offsets).max() <= _SAME_PIXELS and kinds[0] == kinds[1] and not same:
                own = {"image": other["image_id"], "annotation": other["id"]}
                yield finding("annotation nearly twice", other=one["id"], **own)
                break


def _outlined(annotations: Iterable[Entry], entry: Entry) -> NDArray[np.float64]:
    """How far the edges of boxes are off those of their outlines, and what share these fill.

    Returns:
        (n, 6): offsets of x1, y1, x2, y2, the share of its own box that an outline takes, and how
        many times as long as that its annotation's box is.
    """
    found = []
    for annotation in annotations:
        outlined = annotation["segmentation"]
        if isinstance(outlined, list):
            # Not of its pixels, which are a rounding away from it.
            parts = [np.reshape(part, (-1, 2)).astype(float) for part in outlined]
            points = np.concatenate(parts)
            extent = np.concatenate([points.min(axis=0), points.max(axis=0)])
            area = sum(map(_enclosed, parts))
        elif outlined is not None:
            runs = outline(annotation, entry["height"], entry["width"])
            extent = _corners(mask_api.toBbox(runs).tolist())
            area = float(mask_api.area(runs))
        else:
            continue
        around = max(float(np.prod(extent[2:] - extent[:2])), 1e-9)
        longer = (float(np.prod(annotation["bbox"][2:])) / around) ** 0.5
        found.append([*(_corners(annotation["bbox"]) - extent), area / around, longer])
    return np.reshape(found, (-1, 6))


def _enclosed(points: NDArray[np.float64]) -> float:
    """The area that a polygon (n, 2) encloses."""
    x, y = (points - points[0]).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _corners(box: Sequence[float]) -> NDArray[np.float64]:
    x, y, width, height = box
    return np.array([x, y, x + width, y + height], dtype=float)


def _fits(box: NDArray[np.float64], extent: NDArray[np.float64], height: int, width: int) -> bool:
    """Whether a box x1, y1, x2, y2 is nearly that of the pixels of its mask."""
    box = np.clip(box, 0, [width, height, width, height])
    if np.abs(box - extent).max() <= _BOX_PIXELS:
        return True
    low, high = np.maximum(box[:2], extent[:2]), np.minimum(box[2:], extent[2:])
    common = float(np.prod(np.clip(high - low, 0, None)))
    both = float(np.prod(box[2:] - box[:2]) + np.prod(extent[2:] - extent[:2]))
    return common / max(both - common, 1e-9) >= _BOX_OVERLAP


def _of_the_whole(
    dataset: CocoDataset,
    found: Sequence[Finding],
    outlined: Sequence[NDArray[np.float64]],
    areas: Sequence[NDArray[np.float64]],
) -> Iterator[Finding]:
    """What only a whole split shows, from what was found in its parts."""
    yield from _other_areas(areas)
    outlines = np.concatenate([np.empty((0, 6)), *outlined])
    filling, every = int((outlines[:, 4] >= _FILLS).sum()), len(outlines)
    if every >= _BESIDE and filling >= _FILLING * every:
        yield finding("masks that look like boxes", count=filling, all=every)
    yield from _small_range(found, dataset.deep_white)
    formats = Counter(
        f.values["format"] for f in found if f.kind == "box that does not fit its mask"
    )
    formats.pop("", None)
    format_, count = formats.most_common(1)[0] if formats else ("", 0)
    if count >= max(2, _MANY * every):
        kind = "boxes in another format than the masks"
        yield finding(kind, count=count, all=every, format=format_)
    else:
        yield from _beside(outlines)
    wrong = {f.image for f in found if f.annotation is not None and f.is_error}
    for kind, ids in (
        ("image without annotations", dataset.empty_images()),
        ("image with crowds only", dataset.crowded_images()),
    ):
        yield from (finding(kind, image=id_) for id_ in ids if id_ not in wrong)
    for name in dataset.unused_classes():
        yield finding("class without an instance", name=f"class {name!r}")
    names = Counter(name for _, name in dataset.categories)
    for name in (name for name, count in names.items() if count > 1):
        yield finding("class name used twice", name=repr(name), count=names[name])
    first: dict[str, str] = {}
    for name in names.keys() - {*dataset.unused_classes()}:
        if _NO_OBJECTS.fullmatch(_letters(name)):
            yield finding("class of no objects", name=f"class {quoted(name)}")
    for name in names:
        if not any(c.isprintable() and c != " " for c in name):
            yield finding("class without a name", name=f"class {quoted(name)}")
        other = first.setdefault(_letters(name), name)
        if other != name:
            yield finding("class names alike", name=f"class {quoted(name)}", other=quoted(other))


def _small_range(found: Sequence[Finding], white: int) -> Iterator[Finding]:
    """Whether the highest values of 16-bit images say that they have fewer bits, all or some."""
    colours = [one.values["top"] for one in found if one.kind == "16-bit colour image"]
    # Of 14 bits, rounded up.
    dark = [one for one in colours if one <= 64]
    if dark and len(dark) >= _SOME * len(colours):
        values: dict[str, Any] = {"count": len(dark), "all": len(colours), "top": max(dark)}
        yield finding("deep colour images with a small range", **values)
    tops = [one.values["top"] for one in found if one.kind == "16-bit image"]
    top = max(tops, default=white)
    dark = [one for one in tops if 4 * one < DEEPEST]
    if white == DEEPEST and len(dark) >= _SOME * len(tops) and len(dark) < len(tops):
        values = {"count": len(dark), "all": len(tops), "top": max(dark)}
        yield finding("deep images of which some have a small range", **values)
    if white == DEEPEST and 4 * top < DEEPEST:
        left = round(255 * top / DEEPEST)
        bits = 2 ** max(top.bit_length(), 8) - 1
        kind = "deep images with a small range"
        yield finding(kind, top=top, count=len(tops), left=f"0 to {left}", white=bits)


def _letters(name: str) -> str:
    """What of a name is read: without blanks, seen or not, dashes and the forms of letters."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in plain if unicodedata.category(c) not in _BLANK)


def _beside(outlines: NDArray[np.float64]) -> Iterator[Finding]:
    """Whether boxes lie beside their masks or end before them, all alike, or are longer."""
    if len(outlines) < _BESIDE:
        return
    offsets, longer = outlines[:, :4], outlines[:, 5]
    usual = np.median(offsets, axis=0)
    alike = int((np.abs(offsets - usual).max(axis=1) <= _ALIKE).sum())
    # Outlines through the middles of the outer pixels end a pixel before boxes around them.
    off = np.abs(usual[:2]).max() >= _OFF or usual[2:].min() <= -_OFF
    if off and alike >= _MANY * len(offsets):
        edges = [f"{value + 0.0:+.1f}".removesuffix(".0") for value in usual]
        begin, end = ", ".join(edges[:2]), ", ".join(edges[2:])
        kind, whole = "boxes beside their masks", len(offsets)
        yield finding(kind, count=alike, all=whole, begin=begin, end=end)
        return
    # Of a few pixels, rounding is a share.
    more = np.abs((offsets[:, 2:] - offsets[:, :2]).mean(axis=1)) > _LONGER_PIXELS
    for what, wrong in (
        ("larger", more & (longer > _LONGER)),
        ("smaller", more & (longer < 1 / _LONGER)),
    ):
        count = int(wrong.sum())
        if count >= _MANY * len(outlines):
            kind, times = "boxes of another size than the masks", float(np.median(longer[wrong]))
            yield finding(kind, count=count, all=len(outlines), what=what, usual=times)


def _unlisted(dataset: CocoDataset) -> Iterator[Finding]:
    """Files in a split's own folder that none of its images names."""
    if dataset.folder.name != dataset.split or not dataset.folder.is_dir():
        return
    listed = {str(dataset.entry(index)[0]["file_name"]) for index in range(len(dataset))}
    files = {
        path.relative_to(dataset.folder).as_posix()
        for path in dataset.folder.rglob("*")
        if path.is_file() and path != dataset.annotation_file
    }
    for name in sorted(files - listed):
        yield finding("file that no image names", name=str(dataset.folder / name))


def _of_no_use(dataset: CocoDataset, found: Sequence[Finding]) -> Iterator[Finding]:
    """Whether a split has no instance: where nothing else is wrong, runs refuse it for that."""
    if any(map(dataset.instances, range(len(dataset)))) or any(f.is_error for f in found):
        return
    # Test splits are published without annotations.
    bare = len(dataset) and not dataset.num_annotations and not any(f.left_out for f in found)
    kind = "split without annotations" if bare else "split without an instance"
    yield finding(kind, count=len(dataset), crowds=dataset.num_annotations)


def _other_classes(dataset: CocoDataset, before: Sequence[SplitReport]) -> Iterator[Finding]:
    for report in before:
        if report.categories and dataset.categories and report.categories != dataset.categories:
            differing = sorted({*report.categories} ^ {*dataset.categories})
            yield finding(
                "classes of the splits differ",
                why=f"{dataset.split} has {len(dataset.categories)} classes and {report.split}"
                f" {len(report.categories)}; in one of them only: "
                + ", ".join(f"{id_} {quoted(name)}" for id_, name in differing),
            )
