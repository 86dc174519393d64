"""Data sets in COCO's format, made up by tests."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def annotation(
    id_: int, image_id: int, category_id: int, bbox: list[float], **changes: Any
) -> dict[str, Any]:
    """A box as mask and area too, unless `changes` say otherwise; None leaves a key out."""
    x, y, w, h = bbox
    sound = {
        "id": id_,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }
    return {key: value for key, value in (sound | changes).items() if value is not None}


def content(
    categories: Mapping[int, str],
    sizes: Mapping[int, tuple[int, int]],
    annotations: list[dict[str, Any]],
) -> dict[str, Any]:
    """What the annotation file holds; `sizes` are (height, width) by the id of an image."""
    return {
        "categories": [{"id": id_, "name": name} for id_, name in categories.items()],
        "images": [
            {"id": id_, "file_name": f"{id_}.png", "height": height, "width": width}
            for id_, (height, width) in sizes.items()
        ],
        "annotations": annotations,
    }


def write(
    root: Path,
    data: dict[str, Any],
    pixels: Callable[[dict[str, Any]], np.ndarray],
    split: str = "train2017",
) -> Path:
    """Write the annotation file, which is returned, and the images; `pixels` are (H, W, 3)."""
    folder, path = root / split, root / "annotations" / f"instances_{split}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    for image in data["images"]:
        Image.fromarray(pixels(image)).save(folder / image["file_name"])
    path.write_text(json.dumps(data))
    return path


def assert_same(found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Images and targets of two data sets, or of two lists of batches, are equal to the bit."""
    torch.testing.assert_close([*found], [*expected], rtol=0, atol=0)
