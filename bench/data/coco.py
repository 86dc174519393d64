"""A split of a data set in COCO layout.

`root/annotations/instances_{split}.json` and the images in `root/{split}/`. Crowds, images without
annotations and gaps in category ids are as in COCO itself; what is wrong is said in one line that
names the file and the annotation.
"""

import hashlib
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from bench.errors import InputError, choose

Target = dict[str, Tensor]

_SHOWN = 5
_LEAST_POLYGON = 6
# Pixels from the origin. The rasteriser allocates in proportion to a polygon's length: a wild
# coordinate would take gigabytes.
_FARTHEST = 1e5
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_DEEPEST = 65535

_IMAGE_KEYS = {"id": int, "file_name": str, "height": int, "width": int}
_CATEGORY_KEYS = {"id": int, "name": str}
_ANNOTATION_KEYS = {"id": int, "image_id": int, "category_id": int, "bbox": list}
_KINDS = {int: "a whole number", str: "a text", list: "a list"}


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and instances of one split.

    Args:
        root: folder in COCO layout.
        split: name of the annotation file and the image folder, such as "train2017".
        degenerate_boxes: "error", or "drop" to leave out boxes without area.

    `dataset[i]` is an image, uint8 (3, height, width), and its target: `image_id` (), `boxes`
    (n, 4) as x1, y1, x2, y2 in pixels, `labels` (n,) from 1 in the order of category ids, `masks`
    uint8 (n, height, width), `area` (n,) in pixels and `iscrowd` (n,). Boxes are cut off at the
    image's edge; an annotation without a segmentation has its box as its mask.

    Raises:
        InputError: for a missing or malformed file, an image that is not there, or an annotation
            that cannot be right; naming it.
    """

    def __init__(self, root: str | Path, split: str, *, degenerate_boxes: str = "error") -> None:
        choose(degenerate_boxes, ("error", "drop"), "degenerate_boxes")
        self.root = Path(root)
        self.split = split
        self.annotation_file = self.root / "annotations" / f"instances_{split}.json"
        self.folder = self.root / split
        self.warnings: list[str] = []
        content, self.fingerprint = _read(self.annotation_file, self.root, split)
        self._content = content
        self._images = {image["id"]: image for image in self._section("images", _IMAGE_KEYS)}
        self._check_sizes()
        categories = sorted(self._section("categories", _CATEGORY_KEYS), key=lambda c: c["id"])
        self.categories = tuple((category["id"], category["name"]) for category in categories)
        if not self.categories:
            raise InputError(f"{self.annotation_file}: no categories")
        self._labels = {id_: label for label, (id_, _) in enumerate(self.categories, start=1)}
        self._annotations = self._check_annotations(degenerate_boxes)
        self._check_files()
        self.ids = tuple(self._images)

    @property
    def num_classes(self) -> int:
        """Number of categories; labels are 1 to this number."""
        return len(self.categories)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        id_ = self.ids[index]
        image = self._decode(id_)
        height, width = image.shape[-2:]
        annotations = self._annotations.get(id_, [])
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        masks = [self._mask(a, height, width) for a in annotations]
        return image, {
            "image_id": torch.tensor(id_),
            "boxes": torch.minimum(boxes.clamp(min=0), limit),
            "labels": torch.tensor([self._labels[a["category_id"]] for a in annotations]).long(),
            "masks": torch.from_numpy(np.stack(masks))
            if masks
            else torch.zeros(0, height, width, dtype=torch.uint8),
            "area": torch.tensor([float(a["area"]) for a in annotations]),
            "iscrowd": torch.tensor([int(a["iscrowd"]) for a in annotations]).long(),
        }

    def instances(self, index: int) -> int:
        """How many annotations that are no crowd the image has."""
        return sum(not a["iscrowd"] for a in self._annotations.get(self.ids[index], []))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width that the annotation file gives, without reading the image."""
        image = self._images[self.ids[index]]
        return int(image["height"]), int(image["width"])

    def ground_truth(self) -> dict[str, Any]:
        """The split as a COCO dictionary, without the annotations that were left out.

        Every annotation has a segmentation, and they are numbered anew from 1: to the rules of
        COCO's evaluation, a match with annotation 0 is no match.
        """
        kept = (a for group in self._annotations.values() for a in group)
        return {
            "images": [dict(image) for image in self._images.values()],
            "categories": [dict(category) for category in self._content["categories"]],
            "annotations": [{**a, "id": number} for number, a in enumerate(kept, start=1)],
        }

    def check(self, *, decode: bool = False) -> list[str]:
        """Return what is odd but usable, a line each; with `decode`, read every image and mask.

        Raises:
            InputError: for an image or a mask that cannot be read.
        """
        if decode:
            for index in range(len(self)):
                self[index]
        groups = self._annotations.values()
        used = {a["category_id"] for group in groups for a in group if not a["iscrowd"]}
        unused = [name for id_, name in self.categories if id_ not in used]
        empty = [id_ for id_ in self.ids if not self._annotations.get(id_)]
        crowds = [
            id_
            for id_, group in self._annotations.items()
            if group and all(a["iscrowd"] for a in group)
        ]
        lines = list(self.warnings)
        for what, found in (
            ("classes without an instance", unused),
            ("images without annotations", empty),
            ("images with crowds only", crowds),
        ):
            if found:
                lines.append(f"{self.annotation_file}: {len(found)} {what} ({_some(found)})")
        return lines

    def _section(self, name: str, keys: Mapping[str, type]) -> list[dict[str, Any]]:
        section = self._content.get(name)
        if not isinstance(section, list):
            raise InputError(f"{self.annotation_file}: no list {name!r}")
        for position, item in enumerate(section):
            if not isinstance(item, dict):
                raise InputError(f"{self.annotation_file}: {name}[{position}] is no object")
            for key, kind in keys.items():
                if key not in item:
                    raise InputError(f"{self.annotation_file}: {name}[{position}] has no {key!r}")
                if not isinstance(item[key], kind):
                    raise InputError(
                        f"{self.annotation_file}: {name}[{position}] has {key!r} {item[key]!r},"
                        f" which is not {_KINDS[kind]}"
                    )
        twice = [id_ for id_, n in Counter(item["id"] for item in section).items() if n > 1]
        if twice:
            raise InputError(f"{self.annotation_file}: {name} id {_some(twice)} stands twice")
        return section

    def _check_sizes(self) -> None:
        for id_, image in self._images.items():
            if min(image["height"], image["width"]) < 1:
                raise InputError(
                    f"{self.annotation_file}: image {id_} has the size"
                    f" {image['height']}x{image['width']} (height x width)"
                )

    def _check_annotations(self, degenerate_boxes: str) -> dict[int, list[dict[str, Any]]]:
        groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
        dropped: list[int] = []
        for annotation in self._section("annotations", _ANNOTATION_KEYS):
            where = f"{self.annotation_file}: annotation {annotation['id']}"
            image = self._images.get(annotation["image_id"])
            if image is None:
                raise InputError(
                    f"{where} points to image {annotation['image_id']}, which is not listed"
                )
            if annotation["category_id"] not in self._labels:
                raise InputError(f"{where} has the unknown category {annotation['category_id']}")
            box = annotation["bbox"]
            if len(box) != 4 or not all(_is_number(value, _FARTHEST) for value in box):
                raise InputError(f"{where} has bbox {box!r}, which is no [x, y, width, height]")
            # What lies outside the image is cut off, as COCO's own boxes reach a little over it.
            x1, y1 = max(box[0], 0), max(box[1], 0)
            x2, y2 = min(box[0] + box[2], image["width"]), min(box[1] + box[3], image["height"])
            if x1 >= x2 or y1 >= y2:
                if degenerate_boxes == "error":
                    raise InputError(
                        f"{where} (image {annotation['image_id']}) has a box without area in the"
                        f" image, {box}; data.degenerate_boxes=drop leaves such boxes out"
                    )
                dropped.append(annotation["id"])
                continue
            complete = {"iscrowd": 0, "area": (x2 - x1) * (y2 - y1)} | annotation
            if complete["iscrowd"] not in (0, 1):
                raise InputError(f"{where} has iscrowd {complete['iscrowd']!r}; 0 or 1 is needed")
            if not _is_number(complete["area"], _FARTHEST**2) or complete["area"] < 0:
                raise InputError(f"{where} has area {complete['area']!r}, which is no area")
            # Data without segmentations trains and scores boxes, and masks that fill them.
            if not complete.get("segmentation"):
                complete["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            _check_segmentation(complete["segmentation"], image, where)
            groups[annotation["image_id"]].append(complete)
        if dropped:
            self.warnings.append(
                f"{self.annotation_file}: {len(dropped)} annotations with a box without area left"
                f" out ({_some(dropped)})"
            )
        return dict(groups)

    def _check_files(self) -> None:
        try:
            there = {path.name for path in self.folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"no image folder {self.folder} for split {self.split!r}") from error
        except OSError as error:
            raise InputError(f"cannot read image folder {self.folder}: {error.strerror}") from error
        for image in self._images.values():
            if image["file_name"] in there or (self.folder / image["file_name"]).is_file():
                continue
            raise InputError(
                f"image {image['id']} of {self.annotation_file} is missing:"
                f" {self.folder / image['file_name']}"
            )

    def _decode(self, id_: int) -> Tensor:
        entry = self._images[id_]
        path = self.folder / entry["file_name"]
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)
                tensor = pil_to_tensor(_to_rgb(upright))
        except (
            OSError,
            SyntaxError,
            ValueError,
            struct.error,
            Image.DecompressionBombError,
        ) as error:
            raise InputError(f"cannot read image {path}: {_one_line(error)}") from error
        size = (entry["height"], entry["width"])
        if tuple(tensor.shape[-2:]) != size:
            raise InputError(
                f"image {path} is {tensor.shape[-2]}x{tensor.shape[-1]} (height x width), but"
                f" {self.annotation_file} says {size[0]}x{size[1]}"
            )
        return tensor

    def _mask(self, annotation: Mapping[str, Any], height: int, width: int) -> Any:
        segmentation = annotation["segmentation"]
        try:
            if isinstance(segmentation, list):
                run = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                run = mask_api.frPyObjects(segmentation, height, width)
            else:
                run = segmentation
            return mask_api.decode(run)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.annotation_file}: annotation {annotation['id']} has a segmentation that"
                f" cannot be read: {_one_line(error)}"
            ) from error


def _read(path: Path, root: Path, split: str) -> tuple[dict[str, Any], str]:
    if not root.is_dir():
        raise InputError(f"no data folder {root}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        found = path.parent.glob("instances_*.json")
        there = ", ".join(sorted(p.stem.removeprefix("instances_") for p in found)) or "none"
        raise InputError(
            f"no annotation file {path} for split {split!r}; splits there: {there}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content, hashlib.sha256(raw).hexdigest()


def _is_number(value: Any, limit: float) -> bool:
    """Whether it is a number within the limit, which NaN is not."""
    return isinstance(value, int | float) and abs(value) < limit


def _check_segmentation(segmentation: Any, image: Mapping[str, Any], where: str) -> None:
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, where)
        return
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    expected = [image["height"], image["width"]]
    if size != expected:
        raise InputError(f"{where} has a run-length mask of size {size!r}; its image is {expected}")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        return
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise InputError(f"{where} has a run-length mask whose counts are no text and no numbers")
    if sum(counts) != expected[0] * expected[1]:
        raise InputError(
            f"{where} has a run-length mask of {sum(counts)} pixels; its image has"
            f" {expected[0] * expected[1]}"
        )


def _check_polygon(polygon: Any, where: str) -> None:
    if not isinstance(polygon, list):
        raise InputError(f"{where} has the polygon {polygon!r}; a list of x, y in turn is needed")
    if len(polygon) < _LEAST_POLYGON or len(polygon) % 2:
        raise InputError(
            f"{where} has a polygon of {len(polygon)} numbers ({len(polygon) // 2} points);"
            " at least 3 points, as x, y in turn, are needed"
        )
    for value in polygon:
        if not _is_number(value, _FARTHEST):
            raise InputError(
                f"{where} has a polygon with the coordinate {value!r}; a number of pixels is needed"
            )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("the range of floating-point pixels is not known; 8 or 16 bit are needed")
    if image.mode in _DEEP_MODES:
        # Pillow clips deep pixels at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.int64)
        low, high = values.min(), values.max()
        if low < 0 or high > _DEEPEST:
            raise ValueError(f"pixels of {low} to {high}, which are not of 8 or 16 bit")
        image = Image.fromarray(np.rint(values * (255 / _DEEPEST)).astype(np.uint8))
    # Straight to RGB, Pillow warns of the transparency that it drops.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _some(found: list[Any]) -> str:
    shown = ", ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown}, …"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
