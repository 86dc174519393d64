"""A split of a data set in COCO layout.

`root/annotations/instances_{split}.json` and the images in `root/{split}/`. Crowds, images without
annotations and gaps in category ids are as in COCO itself; what is wrong is said in one line that
names the file and the annotation.
"""

import gc
import hashlib
import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.data import images
from bench.data.annotations import (
    ANNOTATION_KEYS,
    CATEGORY_KEYS,
    IMAGE_KEYS,
    AnnotationReader,
    Entry,
    Finding,
    Report,
    decode_mask,
    listed,
)
from bench.errors import InputError, choose

LAYOUT = "annotations/instances_SPLIT.json and the images in SPLIT/, for example train2017"

Target = dict[str, Tensor]
Categories = tuple[tuple[int, str], ...]

_SHOWN = 5


def splits(root: Path) -> tuple[str, ...]:
    """The splits that have an annotation file."""
    found = (root / "annotations").glob("instances_*.json")
    return tuple(sorted(path.stem.removeprefix("instances_") for path in found))


class Packed(Sequence[Any]):
    """Plain objects as one block of bytes, unpacked one at a time.

    Worker processes share the block with their parent. A list of objects they would copy, page by
    page, as reading an object counts its references; and a block takes a fifth of the memory.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        block, ends = bytearray(), [0]
        for item in objects:
            block += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(block))
        self._block = np.frombuffer(block, dtype=np.uint8)
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        start, end = self._ends[range(len(self))[index]], self._ends[range(len(self))[index] + 1]
        return pickle.loads(self._block[start:end].data)


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and instances of one split.

    Args:
        root: folder in COCO layout.
        split: name of the annotation file and the image folder, such as "train2017".
        degenerate_boxes: "error", or "drop" to leave out boxes without area.
        report: told of everything wrong or odd; an error then leaves out what it concerns instead
            of being raised.

    `dataset[i]` is an image, uint8 (3, height, width), and its target: `image_id` (), `boxes`
    (n, 4) as x1, y1, x2, y2 in pixels, `labels` (n,) from 1 in the order of category ids, `masks`
    uint8 (n, height, width), `area` (n,) in pixels and `iscrowd` (n,). Boxes are cut off at the
    image's edge; an annotation without a segmentation has its box as its mask.

    Raises:
        InputError: for a missing or malformed file, an image that is not there, or an annotation
            that cannot be right; naming it.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        degenerate_boxes: str = "error",
        report: Report | None = None,
    ) -> None:
        choose(degenerate_boxes, ("error", "drop"), "degenerate_boxes")
        self.root = Path(root)
        self.split = split
        self.annotation_file = self.root / "annotations" / f"instances_{split}.json"
        self.folder = self.root / split
        self._left_out: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._report = report or self._refuse
        with _no_garbage_collection():
            self._open(drop_degenerate=degenerate_boxes == "drop")
        # What it is told stays with the caller; workers need no copy.
        del self._report

    def _open(self, *, drop_degenerate: bool) -> None:
        content, self.fingerprint = _read(self.annotation_file, self.root, self.split)
        entries = {
            image["id"]: image
            for image in listed(content, "images", IMAGE_KEYS, self._report)
            if self._has_size(image)
        }
        categories = sorted(
            listed(content, "categories", CATEGORY_KEYS, self._report), key=lambda c: int(c["id"])
        )
        if content.get("categories") == []:
            self._report(Finding("section missing", "no categories"))
        self.categories: Categories = tuple((c["id"], c["name"]) for c in categories)
        self._category_entries = categories
        self._labels = {id_: label for label, (id_, _) in enumerate(self.categories, start=1)}
        groups = self._groups(content, entries, drop=drop_degenerate)
        del content
        self._check_files(entries.values())
        self._keep(entries, groups)

    @property
    def num_classes(self) -> int:
        """Number of categories; labels are 1 to this number."""
        return len(self.categories)

    @property
    def num_annotations(self) -> int:
        """Number of annotations that are used, crowds included."""
        return int(self._annotated.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry, annotations = self.entry(index)
        image = self._decode(entry)
        height, width = image.shape[-2:]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        masks = [self._mask(a, height, width) for a in annotations]
        return image, {
            "image_id": torch.tensor(entry["id"]),
            "boxes": torch.minimum(boxes.clamp(min=0), limit),
            "labels": torch.tensor([self._labels[a["category_id"]] for a in annotations]).long(),
            "masks": torch.from_numpy(np.stack(masks))
            if masks
            else torch.zeros(0, height, width, dtype=torch.uint8),
            "area": torch.tensor([float(a["area"]) for a in annotations]),
            "iscrowd": torch.tensor([int(a["iscrowd"]) for a in annotations]).long(),
        }

    def entry(self, index: int) -> tuple[Entry, list[Entry]]:
        """What the annotation file says of an image, and its annotations that are used."""
        entry, annotations = self._packed[index]
        return entry, annotations

    def instances(self, index: int) -> int:
        """How many annotations that are no crowd the image has."""
        return int(self._instances[index])

    def size(self, index: int) -> tuple[int, int]:
        """Height and width that the annotation file gives, without reading the image."""
        return int(self._sizes[index, 0]), int(self._sizes[index, 1])

    def path(self, entry: Entry) -> Path:
        """The file of an image."""
        return self.folder / str(entry["file_name"])

    def ground_truth(self) -> dict[str, Any]:
        """The split as a COCO dictionary, without the annotations that were left out.

        Every annotation has a segmentation, and they are numbered anew from 1: to the rules of
        COCO's evaluation, a match with annotation 0 is no match.
        """
        entries: list[Entry] = []
        annotations: list[Entry] = []
        for entry, own in self._packed:
            entries.append(entry)
            annotations += own
        return {
            "images": entries,
            "categories": [dict(category) for category in self._category_entries],
            "annotations": [{**a, "id": number} for number, a in enumerate(annotations, start=1)],
        }

    def check(self, *, decode: bool = False) -> list[str]:
        """Return what is odd but usable, a line each; with `decode`, read every image and mask.

        Raises:
            InputError: for an image or a mask that cannot be read.
        """
        if decode:
            for index in range(len(self)):
                self[index]
        lines = [
            f"{self.annotation_file}: {len(found)} of: {kind} ({_some(found)}); {handled}"
            for (kind, handled), found in self._left_out.items()
        ]
        for what, found in (
            ("classes without an instance", self.unused_classes()),
            ("images without annotations", self.empty_images()),
            ("images with crowds only", self.crowded_images()),
        ):
            if found:
                lines.append(f"{self.annotation_file}: {len(found)} {what} ({_some(found)})")
        return lines

    def unused_classes(self) -> list[str]:
        """Names of the categories of which there is no instance but crowds."""
        return [name for id_, name in self.categories if id_ not in self._used]

    def empty_images(self) -> list[int]:
        """Ids of the images without annotations."""
        return [self.ids[index] for index in np.flatnonzero(self._annotated == 0)]

    def crowded_images(self) -> list[int]:
        """Ids of the images whose annotations are all crowds."""
        chosen = (self._annotated > 0) & (self._instances == 0)
        return [self.ids[index] for index in np.flatnonzero(chosen)]

    def _refuse(self, finding: Finding) -> None:
        """Stop at an error, and remember what is left out."""
        if finding.handled is None:
            raise InputError(f"{self.annotation_file}: {finding.text}")
        if finding.left_out and finding.annotation is not None:
            self._left_out[finding.kind, finding.handled].append(finding.annotation)

    def _has_size(self, image: Entry) -> bool:
        if min(image["height"], image["width"]) >= 1:
            return True
        self._report(
            Finding(
                "image without a size",
                f"image {image['id']} has the size {image['height']}x{image['width']}"
                " (height x width)",
                image=image["id"],
            )
        )
        return False

    def _groups(
        self, content: dict[str, Any], entries: dict[int, Entry], *, drop: bool
    ) -> dict[int, list[Entry]]:
        reader = AnnotationReader(entries, self._labels, drop_degenerate=drop, report=self._report)
        groups: dict[int, list[Entry]] = defaultdict(list)
        self._used: set[int] = set()
        for raw in listed(content, "annotations", ANNOTATION_KEYS, self._report):
            complete = reader.read(raw)
            if complete is None:
                continue
            groups[complete["image_id"]].append(complete)
            if not complete["iscrowd"]:
                self._used.add(complete["category_id"])
        return groups

    def _keep(self, entries: dict[int, Entry], groups: dict[int, list[Entry]]) -> None:
        """Put away what is needed later, in a form that takes little memory."""
        self.ids = tuple(entries)
        self._sizes = np.array([(e["height"], e["width"]) for e in entries.values()]).reshape(-1, 2)
        self._annotated = np.array([len(groups.get(id_, ())) for id_ in entries], dtype=np.int64)
        self._instances = np.array(
            [sum(not a["iscrowd"] for a in groups.get(id_, ())) for id_ in entries], dtype=np.int64
        )
        self._packed = Packed((entries[id_], groups.pop(id_, [])) for id_ in self.ids)

    def _check_files(self, entries: Iterable[Entry]) -> None:
        try:
            there = {path.name for path in self.folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            others = sorted(path.name for path in self.root.iterdir() if path.is_dir())
            self._report(
                Finding(
                    "image folder missing",
                    f"no image folder {self.folder} for split {self.split!r}, where the images"
                    f" belong; folders there: {', '.join(others)}",
                )
            )
            return
        except OSError as error:
            raise InputError(f"cannot read image folder {self.folder}: {error.strerror}") from error
        for image in entries:
            if image["file_name"] in there or self.path(image).is_file():
                continue
            self._report(
                Finding(
                    "image missing",
                    f"image {image['id']} is missing: {self.path(image)}",
                    image=image["id"],
                )
            )

    def _decode(self, entry: Entry) -> Tensor:
        picture = images.read(self.path(entry))
        expected = (entry["height"], entry["width"])
        if picture.size != expected:
            raise InputError(
                f"image {self.path(entry)} is {picture.size[0]}x{picture.size[1]} (height x width),"
                f" but {self.annotation_file} says {expected[0]}x{expected[1]}"
                f"{picture.hint(expected)}"
            )
        return picture.pixels

    def _mask(self, annotation: Entry, height: int, width: int) -> Any:
        try:
            return decode_mask(annotation, height, width)
        except InputError as error:
            raise InputError(f"{self.annotation_file}: {error}") from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of objects are made and none of them is garbage: do not look for it all the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(path: Path, root: Path, split: str) -> tuple[dict[str, Any], str]:
    if not root.is_dir():
        raise InputError(f"no data folder {root}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        there = ", ".join(splits(root)) or "none"
        raise InputError(
            f"no annotation file {path} for split {split!r}; splits there: {there}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path} is no valid JSON: {text}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content, hashlib.sha256(raw).hexdigest()


def _some(found: Sequence[Any]) -> str:
    shown = ", ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown}, …"
