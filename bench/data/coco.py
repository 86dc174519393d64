"""A split of a data set in COCO layout.

`root/annotations/instances_{split}.json` and the images in `root/{split}/`. Crowds, images without
annotations and gaps in category ids are as in COCO itself; what is wrong is said in one line that names
the file and the annotation.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from bench.errors import InputError

Target = dict[str, Tensor]

_SHOWN = 5
_LEAST_POLYGON = 6
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and instances of one split.

    Args:
        root: folder in COCO layout.
        split: name of the annotation file and the image folder, such as "train2017".
        degenerate_boxes: "error", or "drop" to leave out boxes without area.

    `dataset[i]` is an image, uint8 (3, height, width), and its target: `image_id` (), `boxes` (n, 4)
    as x1, y1, x2, y2 in pixels, `labels` (n,) from 1 in the order of category ids, `masks` uint8
    (n, height, width), `area` (n,) in pixels and `iscrowd` (n,).

    Raises:
        InputError: for a missing or malformed file, an image that is not there, or an annotation that
            cannot be right; naming it.
    """

    def __init__(
        self, root: str | Path, split: str, *, degenerate_boxes: str = "error"
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.annotation_file = self.root / "annotations" / f"instances_{split}.json"
        self.folder = self.root / split
        self.warnings: list[str] = []
        content, self.fingerprint = _read(self.annotation_file, self.root, split)
        self._content = content
        self._images = {image["id"]: image for image in self._section("images", _IMAGE_KEYS)}
        self._no_duplicates("images")
        categories = sorted(self._section("categories", ("id", "name")), key=lambda c: c["id"])
        self._no_duplicates("categories")
        self.categories = tuple((category["id"], str(category["name"])) for category in categories)
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
        """The split as a COCO dictionary, without the annotations that were left out."""
        annotations = [a for group in self._annotations.values() for a in group]
        return {
            "images": list(self._images.values()),
            "categories": list(self._content["categories"]),
            "annotations": annotations,
        }

    def check(self, *, decode: bool = False) -> list[str]:
        """Return what is odd but usable, a line each; with `decode`, read every image.

        Raises:
            InputError: for an image that cannot be read.
        """
        if decode:
            for id_ in self.ids:
                self._decode(id_)
        used = Counter(a["category_id"] for g in self._annotations.values() for a in g)
        unused = [name for id_, name in self.categories if not used[id_]]
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

    def _section(self, name: str, keys: Iterable[str]) -> list[dict[str, Any]]:
        section = self._content.get(name)
        if not isinstance(section, list):
            raise InputError(f"{self.annotation_file}: no list {name!r}")
        for position, item in enumerate(section):
            if not isinstance(item, dict):
                raise InputError(f"{self.annotation_file}: {name}[{position}] is no object")
            for key in keys:
                if key not in item:
                    raise InputError(f"{self.annotation_file}: {name}[{position}] has no {key!r}")
        return section

    def _no_duplicates(self, section: str) -> None:
        twice = [k for k, n in Counter(i["id"] for i in self._content[section]).items() if n > 1]
        if twice:
            raise InputError(f"{self.annotation_file}: {section} id {_some(twice)} stands twice")

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
            if not _is_box(box):
                raise InputError(f"{where} has bbox {box}, which is no [x, y, width, height]")
            # What lies outside the image is cut off, as COCO's own boxes reach a little over it.
            width = min(box[0] + box[2], image["width"]) - max(box[0], 0)
            height = min(box[1] + box[3], image["height"]) - max(box[1], 0)
            if width <= 0 or height <= 0:
                if degenerate_boxes == "error":
                    raise InputError(
                        f"{where} (image {annotation['image_id']}) has a box without area in the"
                        f" image, {box}; data.degenerate_boxes=drop leaves such boxes out"
                    )
                dropped.append(annotation["id"])
                continue
            complete = {"iscrowd": 0, "area": box[2] * box[3]} | annotation
            _check_segmentation(complete, image, where)
            groups[annotation["image_id"]].append(complete)
        self._no_duplicates("annotations")
        if dropped:
            self.warnings.append(
                f"{self.annotation_file}: {len(dropped)} annotations with a box without area left"
                f" out ({_some(dropped)})"
            )
        return dict(groups)

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"no image folder {self.folder} for split {self.split!r}")
        with os.scandir(self.folder) as entries:
            there = {entry.name for entry in entries}
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
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise InputError(f"cannot read image {path}: {_one_line(error)}") from error
        size = (entry["height"], entry["width"])
        if tuple(tensor.shape[-2:]) != size:
            raise InputError(
                f"image {path} is {tensor.shape[-2]}x{tensor.shape[-1]} (height x width), but"
                f" {self.annotation_file} says {size[0]}x{size[1]}"
            )
        return tensor

    def _mask(self, annotation: Mapping[str, Any], height: int, width: int) -> Any:
        segmentation = annotation.get("segmentation")
        if not segmentation:
            # A box alone is its own mask, so that data without segmentation trains boxes.
            x, y, w, h = (round(value) for value in annotation["bbox"])
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
            return mask
        if isinstance(segmentation, list):
            run = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            run = mask_api.frPyObjects(segmentation, height, width)
        else:
            run = segmentation
        return mask_api.decode(run)


_IMAGE_KEYS = ("id", "file_name", "height", "width")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox")


def _read(path: Path, root: Path, split: str) -> tuple[dict[str, Any], str]:
    if not root.is_dir():
        raise InputError(f"no data folder {root}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        there = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json"))
        listed = f"; splits there: {', '.join(there)}" if there else ""
        raise InputError(f"no annotation file {path} for split {split!r}{listed}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        content = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content, hashlib.sha256(raw).hexdigest()


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and np.isfinite(v) for v in box)
    )


def _check_segmentation(
    annotation: Mapping[str, Any], image: Mapping[str, Any], where: str
) -> None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if (
                not isinstance(polygon, list)
                or len(polygon) < _LEAST_POLYGON
                or len(polygon) % 2
                or not all(isinstance(v, int | float) for v in polygon)
            ):
                raise InputError(
                    f"{where} has a polygon of {len(polygon) // 2 if isinstance(polygon, list) else 0}"
                    " points; at least 3 points, as x, y in turn, are needed"
                )
        return
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    expected = [image["height"], image["width"]]
    if not isinstance(segmentation, dict) or "counts" not in segmentation or size != expected:
        raise InputError(f"{where} has a run-length mask of size {size}; its image is {expected}")
    counts = segmentation["counts"]
    if isinstance(counts, list) and sum(counts) != expected[0] * expected[1]:
        raise InputError(
            f"{where} has a run-length mask of {sum(counts)} pixels; its image has"
            f" {expected[0] * expected[1]}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:
        # Pillow clips deep pixels at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        top = max(float(values.max(initial=0.0)), 255.0)
        scale = 65535.0 if top > 255 else 255.0
        image = Image.fromarray((values.clip(0, scale) * (255 / scale)).astype(np.uint8))
    return image.convert("RGB")


def _some(found: list[Any]) -> str:
    shown = ", ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown}, …"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
