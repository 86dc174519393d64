"""Everything that is wrong or odd in a data set, not only the first of it."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faster_coco_eval.core import mask as mask_api
from torch.utils.data import DataLoader, Dataset

from bench.data import images
from bench.data.annotations import Entry, Finding, decode_mask, run_lengths
from bench.data.coco import LAYOUT, CocoDataset, splits
from bench.data.images import DEEP_MODES, Picture
from bench.data.loader import clear_worker_errors, prepare_worker
from bench.errors import InputError
from bench.system.progress import Bar

_AT_ONCE = 8
# An area or box that differs from its mask's by more is taken for a mistake, not for rounding.
_AREA_FACTOR, _AREA_PIXELS = 2.0, 50.0
_BOX_OVERLAP, _BOX_PIXELS = 0.5, 3.0

_GREY = ("grey image", "three equal channels")
_TRANSPARENT = ("transparent image", "the transparency is dropped")
_PALETTE = ("image with a palette", "converted to RGB")
# Pillow's modes; RGB is the ordinary one.
_MODES = {
    "1": ("black-and-white image", _GREY[1]),
    "L": _GREY,
    "LA": ("grey image with transparency", f"{_GREY[1]}, {_TRANSPARENT[1]}"),
    "P": _PALETTE,
    "PA": _PALETTE,
    "RGBA": _TRANSPARENT,
    "CMYK": ("CMYK image", "converted to RGB"),
    **dict.fromkeys(DEEP_MODES, ("16-bit image", "grey, scaled to 8 bit")),
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
        return tuple(finding for finding in self.findings if finding.is_error)

    @property
    def odd(self) -> tuple[Finding, ...]:
        """The findings that are handled."""
        return tuple(finding for finding in self.findings if not finding.is_error)


def check(
    root: Path,
    chosen: Sequence[str] = (),
    *,
    decode: bool = True,
    workers: int = 0,
    degenerate_boxes: str = "drop",
) -> list[SplitReport]:
    """Read a data set and report everything wrong or odd, split by split.

    Args:
        chosen: names of splits; all that have an annotation file where empty.
        decode: whether to decode every image; else only annotations and masks are read.
        workers: processes that decode.
        degenerate_boxes: "drop" to leave out boxes without area, or "error", as when training.

    Raises:
        InputError: for a folder or a split that is not there.
        DataWorkerError: where a worker died.
    """
    there = splits(root) if root.is_dir() else ()
    if not root.is_dir():
        raise InputError(f"no data folder {root}")
    if not there:
        raise InputError(f"no annotations/instances_SPLIT.json in {root}; needed: {LAYOUT}")
    missing = [name for name in chosen if name not in there]
    if missing:
        raise InputError(f"no split {missing[0]!r} in {root}; splits there: {', '.join(there)}")
    reports: list[SplitReport] = []
    first_seen: dict[str, str] = {}
    for split in dict.fromkeys(chosen or there):
        report = _check_split(
            root,
            split,
            decode=decode,
            workers=workers,
            degenerate_boxes=degenerate_boxes,
            first_seen=first_seen,
            before=reports,
        )
        reports.append(report)
    return reports


def _check_split(
    root: Path,
    split: str,
    *,
    decode: bool,
    workers: int,
    degenerate_boxes: str,
    first_seen: dict[str, str],
    before: Sequence[SplitReport],
) -> SplitReport:
    findings: list[Finding] = []
    try:
        dataset = CocoDataset(
            root, split, degenerate_boxes=degenerate_boxes, report=findings.append
        )
    except InputError as error:
        unreadable = Finding("annotation file unreadable", str(error))
        return SplitReport(split, 0, 0, (), 0, (unreadable,))
    decode = decode and dataset.folder.is_dir()
    absent = {finding.image for finding in findings if finding.kind == "image missing"}
    decoded = 0
    inspections = _inspect(dataset, absent, decode=decode, workers=workers)
    for index, (found, digest) in enumerate(inspections):
        findings += found
        if digest:
            decoded += 1
            findings += _twice(dataset, index, digest, first_seen)
    findings += _of_the_whole(dataset, findings, before)
    return SplitReport(
        split=split,
        images=len(dataset),
        annotations=dataset.num_annotations,
        categories=dataset.categories,
        decoded=decoded,
        findings=tuple(findings),
    )


_Inspection = tuple[list[Finding], str]


class _Inspections(Dataset[_Inspection]):
    """For each image what is found in it and its annotations, and a digest of its file."""

    def __init__(self, dataset: CocoDataset, absent: set[int | None], *, decode: bool) -> None:
        self.dataset, self.absent, self.decode = dataset, absent, decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Inspection:
        entry, annotations = self.dataset.entry(index)
        findings: list[Finding] = []
        digest = ""
        if self.decode and entry["id"] not in self.absent:
            digest = _inspect_file(self.dataset, entry, findings)
        for annotation in annotations:
            findings += _inspect_mask(annotation, entry)
        return findings, digest


def _inspect(
    dataset: CocoDataset, absent: set[int | None], *, decode: bool, workers: int
) -> Iterator[_Inspection]:
    loader = DataLoader(
        _Inspections(dataset, absent, decode=decode),
        batch_size=_AT_ONCE,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=prepare_worker,
    )
    with Bar(f"checking {dataset.split}", len(dataset)) as bar, clear_worker_errors():
        for batch in loader:
            yield from batch
            bar.advance(len(batch))


def _inspect_file(dataset: CocoDataset, entry: Entry, findings: list[Finding]) -> str:
    """Add what is found in an image's file; return its digest, or nothing if it is no image."""
    path, where = dataset.path(entry), f"image {entry['id']} ({entry['file_name']})"
    own = {"image": entry["id"]}
    try:
        raw = path.read_bytes()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            picture = images.read(path, raw)
    except OSError as error:
        text = f"image {entry['id']} cannot be read: {path}: {error.strerror}"
        findings.append(Finding("image unreadable", text, **own))
        return ""
    except InputError as error:
        text = f"image {entry['id']}: {error}"
        findings.append(Finding("image unreadable", text, **own))
        return ""
    expected = (entry["height"], entry["width"])
    if picture.size != expected:
        findings.append(
            Finding(
                "image of another size",
                f"{where} is {picture.size[0]}x{picture.size[1]} (height x width),"
                f" {expected[0]}x{expected[1]} in the annotation file{picture.hint(expected)}",
                **own,
            )
        )
    findings += (
        Finding(kind, f"{where} {text}", handled, **own)
        for kind, text, handled in _oddities(picture)
    )
    findings += (
        Finding("image with a warning", f"{where}: {warning.message}", "read all the same", **own)
        for warning in caught
    )
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _oddities(picture: Picture) -> Iterator[tuple[str, str, str]]:
    """Kind, text and handling of what is odd in an image."""
    if picture.mode != "RGB":
        kind, handled = _MODES.get(
            picture.mode, (f"image of the mode {picture.mode}", "converted to RGB")
        )
        yield kind, f"has Pillow's mode {picture.mode}", handled
    if picture.orientation != 1:
        yield (
            "image turned by EXIF",
            f"has the EXIF orientation {picture.orientation}",
            "turned upright",
        )
    if picture.animated:
        yield "image of several frames", "has several frames", "the first is used"


def _inspect_mask(annotation: Entry, entry: Entry) -> Iterator[Finding]:
    """Compare an annotation's mask with its box and its area."""
    height, width = entry["height"], entry["width"]
    where = f"annotation {annotation['id']} (image {entry['id']})"
    own = {"image": entry["id"], "annotation": annotation["id"]}
    if "counts" in annotation["segmentation"]:
        try:
            decode_mask(annotation, height, width)
        except InputError as error:
            yield Finding("malformed run-length mask", str(error), **own)
            return
    runs = run_lengths(annotation, height, width)
    pixels = float(mask_api.area(runs))
    if not pixels:
        yield Finding(
            "mask without a pixel",
            f"{where} has a mask without a pixel",
            "its box is used, with an empty mask",
            **own,
        )
        return
    limits = [width, height, width, height]
    extent, box = (
        np.clip([x, y, x + w, y + h], 0, limits)
        for x, y, w, h in (mask_api.toBbox(runs).tolist(), annotation["bbox"])
    )
    if np.abs(box - extent).max() > _BOX_PIXELS and _overlap(box, extent) < _BOX_OVERLAP:
        shown = [*extent[:2], *(extent[2:] - extent[:2])]
        yield Finding(
            "box that does not fit its mask",
            f"{where} has the box {annotation['bbox']}, but its mask's is"
            f" {[int(value) for value in shown]} (x, y, width, height)",
            "both are used as they are",
            **own,
        )
    area = float(annotation["area"])
    ratio = max(area, pixels) / max(min(area, pixels), 1.0)
    if ratio > _AREA_FACTOR and abs(area - pixels) > _AREA_PIXELS:
        yield Finding(
            "area that does not fit its mask",
            f"{where} has the area {area:g}, but its mask has {pixels:g} pixels",
            "the area decides whether it counts as small, medium or large",
            **own,
        )


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    common = float(np.prod(np.clip(high - low, 0, None)))
    both = float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]))
    return common / max(both - common, 1e-9)


def _twice(
    dataset: CocoDataset, index: int, digest: str, first_seen: dict[str, str]
) -> Iterator[Finding]:
    """Whether the same file came before, in this split or another."""
    entry, _ = dataset.entry(index)
    place = f"{entry['file_name']} of {dataset.split}"
    before = first_seen.setdefault(digest, place)
    if before == place:
        return
    within = before.endswith(f" of {dataset.split}")
    yield Finding(
        "image twice in a split" if within else "image in two splits",
        f"image {entry['id']} ({entry['file_name']}) is the same file as {before}",
        "used twice" if within else "trained on and evaluated with, if you choose both splits",
        image=entry["id"],
    )


def _of_the_whole(
    dataset: CocoDataset, findings: Sequence[Finding], before: Sequence[SplitReport]
) -> Iterator[Finding]:
    wrong = {finding.image for finding in findings if finding.annotation is not None}
    for kind, ids, handled in (
        (
            "image without annotations",
            dataset.empty_images(),
            "left out of training; evaluated, where every detection is a false one",
        ),
        ("image with crowds only", dataset.crowded_images(), "left out of training; evaluated"),
    ):
        for id_ in ids:
            if id_ not in wrong:
                text = f"image {id_} has {'no annotation' if 'without' in kind else 'crowds only'}"
                yield Finding(kind, text, handled, image=id_)
    for name in dataset.unused_classes():
        yield Finding(
            "class without an instance",
            f"class {name!r} has no instance but crowds, or none at all",
            "it keeps its label; its AP is left out of the mean",
        )
    names = Counter(name for _, name in dataset.categories)
    for name in (name for name, count in names.items() if count > 1):
        yield Finding(
            "class name used twice", f"{names[name]} classes are named {name!r}", "they stay apart"
        )
    yield from _unlisted(dataset)
    yield from _other_classes(dataset, before)


def _unlisted(dataset: CocoDataset) -> Iterator[Finding]:
    if not dataset.folder.is_dir():
        return
    listed = {str(dataset.entry(index)[0]["file_name"]) for index in range(len(dataset))}
    files = {
        path.relative_to(dataset.folder).as_posix()
        for path in dataset.folder.rglob("*")
        if path.is_file()
    }
    for name in sorted(files - listed):
        yield Finding("file that no image names", f"{dataset.folder / name}", "not used")


def _other_classes(dataset: CocoDataset, before: Sequence[SplitReport]) -> Iterator[Finding]:
    for report in before:
        if report.categories and dataset.categories and report.categories != dataset.categories:
            differing = sorted({*report.categories} ^ {*dataset.categories})
            yield Finding(
                "classes of the splits differ",
                f"{dataset.split} has {len(dataset.categories)} classes and {report.split}"
                f" {len(report.categories)}; in one of them only: "
                + ", ".join(f"{id_} {name!r}" for id_, name in differing),
            )


def by_kind(findings: Sequence[Finding]) -> Mapping[str, list[Finding]]:
    """The findings by their kind, errors first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda f: not f.is_error):
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds
