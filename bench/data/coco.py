"""A split of a data set in COCO format.

Where its files are, `bench.data.layout` says. Crowds, images without annotations and gaps in
category ids are as in COCO itself; what is wrong is said in one line that names the file and the
annotation, and what is left out or taken otherwise is counted.
"""

import gc
import hashlib
import json
import math
import os
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

from bench.data import images, layout, masks
from bench.data.annotations import (
    ANNOTATION_KEYS,
    CATEGORY_KEYS,
    IMAGE_KEYS,
    AnnotationReader,
    Entry,
    box_polygon,
    has_size,
    listed,
    outline,
    unread_of_images,
)
from bench.data.findings import Finding, Report, Tally, finding, quoted
from bench.errors import InputError, choose, saying, some

Target = dict[str, Tensor]
Categories = tuple[tuple[int, str], ...]

# A share of boxes that ordinary data does not come near.
_MANY, _FEW, _SOME = 0.1, 0.01, 2
# Detections of an image and class that the rules of COCO look at.
MOST_FOUND = 100
_SECTIONS = ("images", "annotations", "categories")
_ONE_OBJECT = "annotations are one JSON object with lists images, annotations and categories"
_LOOKED_FOR = ("neg_category_ids", "not_exhaustive_category_ids")
# Sides of squares that models and tools scale images to; boxes of such nearly reach them, in images
# that are larger and most of them no squares.
_SQUARES, _NEARLY, _LARGER = (512, 640, 1000, 1024), 0.95, 1.1
# Half of an image, and what rounding adds.
_NEAR = 0.52


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
        root: the data set's folder.
        split: its name, such as "train2017".
        file, images: its annotation file and its folder of images; None where the layout says.
        degenerate_boxes: "error", or "drop" to leave out boxes without area.
        deep_white: the value that becomes 255 in grey images of 16 bits.
        report: receives everything wrong or odd; an error then leaves out what it concerns instead
            of being raised.

    `dataset[i]` is an image, uint8 (3, height, width), and its target: `image_id` () (the id, or a
    number in its place where an id has more than 64 bits), `boxes` (n, 4) as x1, y1, x2, y2 in
    pixels, `labels` (n,) from 1 in the order of category ids, `masks` uint8 (n, height, width),
    `area` (n,) in pixels and `iscrowd` (n,). Boxes are cut off at the image's edge; an annotation
    without a segmentation has its box as its mask.

    Raises:
        InputError: for a missing or malformed file, an image that is not there, or an annotation
            that cannot be right; naming it.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        file: Path | None = None,
        images: Path | None = None,
        degenerate_boxes: str = "error",
        deep_white: int = images.DEEPEST,
        report: Report | None = None,
    ) -> None:
        choose(degenerate_boxes, ("error", "drop"), "degenerate_boxes")
        self.root, self.split = Path(root), split
        self.place = layout.find(self.root, split, file=file, images=images)
        self.annotation_file, self.folder = self.place.annotation_file, self.place.folder
        self.deep_white = deep_white
        self.tally = Tally()
        self.ids: tuple[int, ...] = ()
        self._told = report
        with _no_garbage_collection():
            self._open(drop_degenerate=degenerate_boxes == "drop")
        # What it receives stays with the caller; workers need no copy.
        del self._told

    def _open(self, *, drop_degenerate: bool) -> None:
        content, self.fingerprint = _read(self.annotation_file)
        if self.place.alias:
            kind, path = "split of another name", self.place.alias
            self._report(finding(kind, split=self.split, path=path))
        entries = {
            image["id"]: image
            for image in listed(content, "images", IMAGE_KEYS, self._report)
            if has_size(image, self._report)
        }
        looked = [e for e in entries.values() if any(map(e.get, _LOOKED_FOR))]
        if looked:
            counts: dict[str, Any] = {"count": len(looked), "all": len(entries)}
            self._report(finding("classes of each image", **counts))
        fields = unread_of_images([*entries.values()])
        if fields:
            self._report(finding("fields of images that are not read", fields=some(fields)))
        categories = sorted(
            listed(content, "categories", CATEGORY_KEYS, self._report), key=lambda c: int(c["id"])
        )
        if content.get("categories") == []:
            self._report(finding("section missing", why="no categories"))
        self.categories: Categories = tuple((c["id"], c["name"]) for c in categories)
        self._labels = {id_: label for label, (id_, _) in enumerate(self.categories, start=1)}
        groups = self._groups(content, entries, drop=drop_degenerate)
        del content
        for category in categories:
            if category["id"] in self._used and category.get("isthing") == 0:
                self._report(finding("class of stuff", name=f"class {quoted(category['name'])}"))
        self._find_files(entries.values())
        self._keep(entries, groups)
        self._suspect()

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
        return self.read(index)

    def read(
        self,
        index: int,
        *,
        size: tuple[int, int] | None = None,
        flip: bool = False,
        crowds: bool = True,
        masks: bool = True,
    ) -> tuple[Tensor, Target]:
        """An image and its target, as `dataset[index]`.

        Args:
            size: rows and columns that masks get where they have more pixels as they are, each
                pixel the nearest one: memory does not grow with the image's size times its objects.
            flip: mirror all left to right.
            crowds: whether crowds are in the target.
            masks: whether masks are decoded; the target has none otherwise.
        """
        entry, annotations = self.entry(index)
        if not crowds:
            annotations = [a for a in annotations if not a["iscrowd"]]
        image = self._decode(entry)
        height, width = image.shape[-2:]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        if flip:
            image, boxes[:, [0, 2]] = image.flip(-1), width - boxes[:, [2, 0]]
        target = {
            "image_id": torch.tensor(int(self._keys[index])),
            "boxes": boxes,
            "labels": torch.tensor([self._labels[a["category_id"]] for a in annotations]).long(),
            "area": torch.tensor([float(a["area"]) for a in annotations]),
            "iscrowd": torch.tensor([int(a["iscrowd"]) for a in annotations]).long(),
        }
        if masks:
            target["masks"] = _stacked(annotations, (height, width), size, flip=flip)
        return image, target

    def entry(self, index: int) -> tuple[Entry, list[Entry]]:
        """What the annotation file says of an image, and its annotations that are used."""
        entry, annotations = self._packed[index]
        return entry, annotations

    def require_instances(self, purpose: str) -> None:
        """Refuse a split of no use.

        Raises:
            InputError: where no image has an instance `purpose`.
        """
        if not self._instances.any():
            raise InputError(
                f"{self.annotation_file}: no image has an instance {purpose} (crowds do not count;"
                " data check says what else is left out)"
            )

    def instances(self, index: int) -> int:
        """Return how many annotations other than crowds the image has."""
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
        COCO's evaluation, a match with annotation 0 does not count as one. Images have the numbers
        of `image_id` in targets.
        """
        entries: list[Entry] = []
        annotations: list[Entry] = []
        for key, (entry, own) in zip(self._keys.tolist(), self._packed, strict=True):
            entries.append(entry | {"id": key})
            for annotation in own:
                annotation |= {"id": len(annotations) + 1, "image_id": key}
                if annotation["segmentation"] is None:
                    box = box_polygon(annotation["bbox"], entry["height"], entry["width"])
                    annotation["segmentation"] = [box]
                annotations.append(annotation)
        return {
            "images": entries,
            "categories": [{"id": id_, "name": name} for id_, name in self.categories],
            "annotations": annotations,
        }

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

    def _report(self, found: Finding) -> None:
        """Count what is found, and stop at an error where nobody receives it."""
        self.tally.add(found)
        if self._told is not None:
            self._told(found)
        elif found.is_error:
            raise InputError(f"{self.annotation_file}: {found.text}")

    def _groups(
        self, content: dict[str, Any], entries: dict[int, Entry], *, drop: bool
    ) -> dict[int, list[Entry]]:
        classes = dict(self.categories)
        reader = AnnotationReader(entries, classes, drop_degenerate=drop, report=self._report)
        groups: dict[int, list[Entry]] = defaultdict(list)
        self._used: set[int] = set()
        scores: list[Any] = []
        for raw in listed(content, "annotations", ANNOTATION_KEYS, self._report):
            complete = reader.read(raw)
            if complete is None:
                continue
            groups[complete["image_id"]].append(complete)
            scores += [raw["score"]] if raw.get("score") is not None else []
            if not complete["iscrowd"]:
                self._used.add(complete["category_id"])
        for own in groups.values():
            self._say_twins(own)
        if reader.unread:
            fields = [f"{name!r} ({count})" for name, count in reader.unread.most_common()]
            self._report(finding("fields that are not read", fields=some(fields)))
        # Of people's own labels some exports write 1.
        if any(score != 1 for score in scores):
            under = sum(isinstance(score, int | float) and score < 1 for score in scores)
            counts: dict[str, Any] = {
                "count": len(scores),
                "all": sum(map(len, groups.values())),
                "under": under,
            }
            self._report(finding("annotations with a score", **counts))
        return groups

    def _say_twins(self, annotations: Iterable[Entry]) -> None:
        """Report the annotations of an image that are there twice, as after merging files."""
        first: dict[tuple[float, ...], Entry] = {}
        for one in annotations:
            other = first.setdefault((one["category_id"], one["iscrowd"], *one["bbox"]), one)
            if other is not one and other["segmentation"] == one["segmentation"]:
                place = {"image": one["image_id"], "annotation": one["id"]}
                self._report(finding("annotation twice", other=other["id"], **place))

    def _keep(self, entries: dict[int, Entry], groups: dict[int, list[Entry]]) -> None:
        """Put away what is needed later, in a form that takes little memory."""
        self.ids = tuple(entries)
        # Ids are names; a tensor holds those of 64 bits.
        fit = all(-(2**63) <= id_ < 2**63 for id_ in self.ids)
        ranks = {id_: rank for rank, id_ in enumerate(sorted(self.ids), start=1)}
        self._keys = np.array([id_ if fit else ranks[id_] for id_ in self.ids], dtype=np.int64)
        self._sizes = np.array([(e["height"], e["width"]) for e in entries.values()]).reshape(-1, 2)
        self._annotated = np.array([len(groups.get(id_, ())) for id_ in entries], dtype=np.int64)
        self._instances = np.array(
            [sum(not a["iscrowd"] for a in groups.get(id_, ())) for id_ in entries], dtype=np.int64
        )
        found = [a for own in groups.values() for a in own]
        outlined = [a["segmentation"] is not None for a in found if not a["iscrowd"]]
        self.has_masks = not outlined or any(outlined)
        self._reach = max((_reach(a["bbox"], entries[a["image_id"]]) for a in found), default=1)
        self._ends = [
            max((a["bbox"][axis] + a["bbox"][axis + 2] for a in found), default=0)
            for axis in (0, 1)
        ]
        starts = [a["bbox"][:2] for a in found]
        first = min(map(min, starts), default=0)
        self._first = first if first in (-1, 1) else 0
        self._at_first = sum(first in start for start in starts) if self._first else 0
        # From -1 begins what is cut off at the edge, and from 0 what lies a pixel within.
        if first == -1 and self._at_first <= sum(0 in start for start in starts):
            self._at_first = 0
        self._packed = Packed((entries[id_], groups.pop(id_, [])) for id_ in self.ids)

    def limit(self, count: int) -> None:
        """Leave out all images but the first `count`."""
        self.ids, self._keys = self.ids[:count], self._keys[:count]
        self._sizes, self._annotated = self._sizes[:count], self._annotated[:count]
        self._instances = self._instances[:count]
        self._packed = Packed(self._packed[index] for index in range(len(self.ids)))

    def _suspect(self) -> None:
        """Say what the boxes of the whole split look like, and that masks are missing."""
        count = self.num_annotations
        kinds = {
            "boxes that look like fractions": "box smaller than a pixel",
            "polygons that look like fractions": "mask within the first pixel",
            "boxes that look like corners": "box over the image's edge",
        }
        for kind, single in kinds.items():
            wrong = self.tally.counts[single]
            if wrong >= max(_SOME, _MANY * count):
                self._report(finding(kind, count=wrong, all=count))
        if count >= _SOME**4 and self._reach <= _NEAR:
            self._report(finding("boxes near the origin alone", all=count, reach=self._reach))
        side = self._square() if count >= _SOME**4 else 0
        if side:
            self._report(finding("boxes within a square", all=count, side=side))
        if self._at_first >= max(_SOME**2, _FEW * count):
            kind = f"boxes that look counted from {self._first:g}"
            self._report(finding(kind, count=self._at_first, all=count))
        over = self._instances[self._instances > MOST_FOUND]
        if len(over):
            kind, most = "images of many objects", int(over.max())
            self._report(finding(kind, count=len(over), all=len(self), most=most, found=MOST_FOUND))
        crowds = count - int(self._instances.sum())
        if crowds:
            kind = "many crowds" if crowds >= max(_SOME, _MANY * count) else "crowds"
            self._report(finding(kind, count=crowds, all=count))
        if not self.has_masks:
            self._report(finding("no masks at all"))

    def _square(self) -> int:
        """The side of the square that boxes end within, and nearly reach; 0 where there is none."""
        sizes = self._sizes[self._annotated > 0]
        short, long = sizes.min(axis=1), sizes.max(axis=1)
        if np.median(long / short) < _LARGER:
            return 0
        low, high = min(self._ends), max(self._ends)
        sides = [s for s in _SQUARES if _NEARLY * s <= low <= high <= s]
        return next((side for side in sides if short.min() > _LARGER * side), 0)

    def _find_files(self, entries: Iterable[Entry]) -> None:
        """Look for the file of each image, and put where it is in the place of its name."""
        try:
            with os.scandir(self.folder) as files:
                there = {file.name for file in files if file.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        except OSError as error:
            raise InputError(f"cannot read image folder {self.folder}: {error.strerror}") from error
        missing: list[Entry] = []
        named: dict[str, int] = {}
        for image in entries:
            name = image["file_name"]
            path = name if name in there else self.place.find(name)
            if path is None:
                missing.append(image)
                continue
            plain = os.path.normpath(name)
            if path not in (plain, *(f"{beside}{os.sep}{plain}" for beside in layout.BESIDE)):
                self._say_of(image, "image file of another path", path=path)
            other = named.setdefault(path, image["id"])
            if other != image["id"]:
                self._say_of(image, "file named by two images", other=other, path=path)
            image["file_name"] = path
        if not named and not self.folder.is_dir():
            others = sorted(path.name for path in self.root.iterdir() if path.is_dir())
            why = (
                f"no image folder {self.folder} for split {self.split!r}, where the images"
                f" belong; folders there: {', '.join(others)}"
            )
            self._report(finding("image folder missing", why=why))
            return
        for image in missing:
            self._say_of(image, "image missing", path=self.folder / image["file_name"])

    def _say_of(self, image: Entry, kind: str, **values: Any) -> None:
        self._report(finding(kind, image=image["id"], **values))

    def _decode(self, entry: Entry) -> Tensor:
        expected = (entry["height"], entry["width"])
        path = self.path(entry)
        picture = images.read(path, white=self.deep_white, expected=expected)
        if picture.size != expected:
            raise InputError(
                f"image {path} is {picture.size[0]}x{picture.size[1]} (height x width),"
                f" but {self.annotation_file} says {expected[0]}x{expected[1]}"
                f"{picture.hint(expected)}"
            )
        return picture.pixels


def _reach(box: Sequence[float], image: Entry) -> float:
    """Where a box ends, as a share of the image's width or height, whichever is more."""
    x, y, width, height = box
    return max((x + width) / image["width"], (y + height) / image["height"])


def _stacked(
    annotations: Sequence[Entry],
    given: tuple[int, int],
    wanted: tuple[int, int] | None,
    *,
    flip: bool,
) -> Tensor:
    """The masks of an image of the size `given`, uint8 (n, rows, columns), one after the other."""
    size = wanted if wanted and math.prod(wanted) < math.prod(given) else None
    found = torch.zeros(len(annotations), *(size or given), dtype=torch.uint8)
    for place, annotation in enumerate(annotations):
        mask = masks.pixels(outline(annotation, *given), size, flip=flip)
        found[place] = torch.from_numpy(np.ascontiguousarray(mask))
    return found


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


def _twice(raw: bytes) -> set[str]:
    """The names that stand twice in an object, of any depth."""
    found: set[str] = set()

    def pairs(values: list[tuple[str, Any]]) -> dict[str, Any]:
        once = dict(values)
        if len(once) < len(values):
            found.update(name for name in once if sum(name == key for key, _ in values) > 1)
        return once

    json.loads(raw, object_pairs_hook=pairs)
    return found


def _read(path: Path) -> tuple[dict[str, Any], str]:
    with saying(f"cannot read {path}"):
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        lines = text.startswith("Extra data")
        hint = f"; {_ONE_OBJECT}, not lines of objects" if lines else ""
        raise InputError(f"{path} is not valid JSON: {text}{hint}") from error
    for section in _SECTIONS:
        # Of two lists of one name the last is kept.
        if raw.count(f'"{section}"'.encode()) > 1 and section in _twice(raw):
            raise InputError(f"{path} has two lists {section!r}; {_ONE_OBJECT}, each once")
    if not isinstance(content, dict):
        what = "a list, as files of detections are" if isinstance(content, list) else "no object"
        raise InputError(f"{path} holds {what}; {_ONE_OBJECT}")
    return content, hashlib.sha256(raw).hexdigest()
