"""What an annotation file in COCO format may hold, and what becomes of it.

Each rule reports what it finds as a `Finding`: an error, or something odd and how it is handled.
Whoever reads decides: `CocoDataset` stops at the first error, `python -m bench data check` collects
all. Polygons are treated as detectron2 treats them: those of fewer than three points are left out,
and so is an annotation that has no other.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api
from numpy.typing import NDArray

from bench.errors import InputError

IMAGE_KEYS = {"id": int, "file_name": str, "height": int, "width": int}
CATEGORY_KEYS = {"id": int, "name": str}
ANNOTATION_KEYS = {"id": int, "image_id": int, "category_id": int, "bbox": list}

_KINDS = {int: "a whole number", str: "a text", list: "a list"}
_LEAST_POLYGON = 6
# Pixels from the origin. The rasteriser allocates in proportion to a polygon's length: a wild
# coordinate would take gigabytes.
_FARTHEST = 1e5
# Pixels that a box or polygon may reach over the image's edge unsaid: COCO's own do, by rounding.
_ROUNDING = 1.0

Entry = dict[str, Any]
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Finding:
    """Something wrong or odd in a data set.

    Attributes:
        kind: what it is, in words that do not name the place.
        text: the same in one line that does.
        handled: how it is handled; None for an error, with which the data cannot be used.
        image, annotation: the ids it concerns.
        left_out: whether data is left out for it.
    """

    kind: str
    text: str
    handled: str | None = None
    image: int | None = None
    annotation: int | None = None
    left_out: bool = False

    @property
    def is_error(self) -> bool:
        """Whether the data cannot be used with it."""
        return self.handled is None


Report = Callable[[Finding], None]


def listed(
    content: Mapping[str, Any], name: str, keys: Mapping[str, type], report: Report
) -> Iterator[Entry]:
    """Yield the entries of a section that have the keys, each id once."""
    section = content.get(name)
    if not isinstance(section, list):
        report(Finding("section missing", f"no list {name!r}"))
        return
    seen: set[int] = set()
    for position, entry in enumerate(section):
        wrong = _malformed(entry, keys)
        if wrong:
            report(Finding("malformed entry", f"{name}[{position}] {wrong}"))
        elif entry["id"] in seen:
            text = f"{name} id {entry['id']} stands twice"
            place: dict[str, Any] = {}
            if name == "annotations":
                place = {"image": entry["image_id"], "annotation": entry["id"]}
            elif name == "images":
                place = {"image": entry["id"]}
            report(Finding("id used twice", text, **place))
        else:
            seen.add(entry["id"])
            yield entry


def _malformed(entry: Any, keys: Mapping[str, type]) -> str:
    if not isinstance(entry, dict):
        return "is no object"
    for key, kind in keys.items():
        if key not in entry:
            return f"has no {key!r}"
        if not isinstance(entry[key], kind):
            return f"has {key!r} {entry[key]!r}, which is not {_KINDS[kind]}"
    return ""


class AnnotationReader:
    """Reads annotations one by one.

    Args:
        images: the images by id.
        labels: the labels by category id.
        drop_degenerate: leave out boxes without area, which are errors otherwise.
        report: told of everything that is found.
    """

    def __init__(
        self,
        images: Mapping[int, Entry],
        labels: Mapping[int, int],
        *,
        drop_degenerate: bool,
        report: Report,
    ) -> None:
        self._images = images
        self._labels = labels
        self._drop_degenerate = drop_degenerate
        self._report = report

    def read(self, raw: Entry) -> Entry | None:
        """Return the annotation with defaults for what it lacks; None where it is left out."""
        image = self._images.get(raw["image_id"])
        if image is None:
            self._error(
                raw,
                "annotation of no image",
                f"points to image {raw['image_id']}, which is not listed",
            )
        known = raw["category_id"] in self._labels
        if not known:
            self._error(raw, "unknown category", f"has the unknown category {raw['category_id']}")
        sound = self._check_numbers(raw) & known
        if raw.get("ignore"):
            self._odd(
                raw, "marked 'ignore'", "is marked 'ignore'", "only 'iscrowd' is read; it counts"
            )
        if image is None:
            return None
        corners = self._corners(raw, image)
        if corners is None:
            return None
        x1, y1, x2, y2 = corners
        complete = {"iscrowd": 0, "area": (x2 - x1) * (y2 - y1)} | raw
        if raw.get("segmentation"):
            segmentation = self._segmentation(raw, image)
        else:
            segmentation = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            self._odd(
                raw,
                "annotation without a segmentation",
                "has no segmentation",
                "its box is its mask",
            )
        if segmentation is None or not sound:
            return None
        return complete | {"segmentation": segmentation}

    def _check_numbers(self, raw: Entry) -> bool:
        sound = True
        if raw.get("iscrowd", 0) not in (0, 1):
            self._error(
                raw, "malformed iscrowd", f"has iscrowd {raw['iscrowd']!r}; 0 or 1 is needed"
            )
            sound = False
        if "area" not in raw:
            self._odd(raw, "annotation without an area", "has no area", "its box's area is used")
        elif not _is_number(raw["area"], _FARTHEST**2) or raw["area"] < 0:
            self._error(raw, "malformed area", f"has area {raw['area']!r}, which is no area")
            sound = False
        return sound

    def _corners(self, raw: Entry, image: Entry) -> Corners | None:
        """The box within the image, as x1, y1, x2, y2; None where it cannot be used."""
        box = raw["bbox"]
        if len(box) != 4 or not all(_is_number(value, _FARTHEST) for value in box):
            self._error(
                raw, "malformed box", f"has bbox {box!r}, which is no [x, y, width, height]"
            )
            return None
        x1, y1 = max(box[0], 0), max(box[1], 0)
        x2, y2 = min(box[0] + box[2], image["width"]), min(box[1] + box[3], image["height"])
        if x1 >= x2 or y1 >= y2:
            kind, text = (
                "box without area in the image",
                f"has a box without area in the image, {box}",
            )
            if self._drop_degenerate:
                self._odd(raw, kind, text, "the annotation is left out", left_out=True)
            else:
                self._error(raw, kind, f"{text}; data.degenerate_boxes=drop leaves such boxes out")
            return None
        over = max(
            -box[0], -box[1], box[0] + box[2] - image["width"], box[1] + box[3] - image["height"]
        )
        if over > _ROUNDING:
            self._odd(
                raw,
                "box over the image's edge",
                f"has the box {box}, which reaches {over:g} pixels over the edge of"
                f" {image['height']}x{image['width']} (height x width)",
                "it is cut off at the edge",
            )
        return x1, y1, x2, y2

    def _segmentation(self, raw: Entry, image: Entry) -> Any:
        """What of the segmentation can be used; None where the annotation cannot."""
        segmentation = raw["segmentation"]
        if not isinstance(segmentation, list):
            return segmentation if self._is_run_length(raw, segmentation, image) else None
        if raw.get("iscrowd") == 1:
            self._odd(
                raw, "crowd outlined by polygons", "is a crowd and has polygons", "it is a crowd"
            )
        other = next((part for part in segmentation if not isinstance(part, list)), None)
        if other is not None:
            self._error(
                raw,
                "malformed polygon",
                f"has the polygon {other!r}; a list of x, y in turn is needed",
            )
            return None
        verdicts = [self._is_polygon(raw, polygon, image) for polygon in segmentation]
        if None in verdicts:
            return None
        kept = [p for p, valid in zip(segmentation, verdicts, strict=True) if valid]
        if not kept:
            self._odd(
                raw,
                "annotation without a valid polygon",
                "has no valid polygon",
                "the annotation is left out",
                left_out=True,
            )
            return None
        return kept

    def _is_polygon(self, raw: Entry, polygon: list[Any], image: Entry) -> bool | None:
        """Whether it is a polygon; None where it is an error."""
        if len(polygon) < _LEAST_POLYGON or len(polygon) % 2:
            self._odd(
                raw,
                "polygon of fewer than 3 points"
                if len(polygon) < _LEAST_POLYGON
                else "polygon of an odd count of numbers",
                f"has a polygon of {len(polygon)} numbers ({len(polygon) / 2:g} points)",
                "the polygon is left out",
                left_out=True,
            )
            return False
        try:
            # The sum is no number where one of them is none, which the extremes do not show.
            low, high, total = min(polygon), max(polygon), sum(polygon)
            sound = -_FARTHEST < low <= high < _FARTHEST and total == total
        except TypeError:
            sound = False
        if not sound:
            wrong = next(value for value in polygon if not _is_number(value, _FARTHEST))
            self._error(
                raw,
                "malformed polygon",
                f"has a polygon with the coordinate {wrong!r}; a number of pixels is needed",
            )
            return None
        edges = (image["width"], image["height"])
        if low < -_ROUNDING or high > min(edges) + _ROUNDING:
            over = max(-low, max(polygon[::2]) - edges[0], max(polygon[1::2]) - edges[1])
            if over > _ROUNDING:
                self._odd(
                    raw,
                    "polygon over the image's edge",
                    f"has a polygon that reaches {over:g} pixels over the image's edge",
                    "its mask is cut off at the edge",
                )
        return True

    def _is_run_length(self, raw: Entry, segmentation: Any, image: Entry) -> bool:
        size = segmentation.get("size") if isinstance(segmentation, dict) else None
        expected = [image["height"], image["width"]]
        kind = "run-length mask of the wrong size"
        if size != expected:
            self._error(
                raw, kind, f"has a run-length mask of size {size!r}; its image is {expected}"
            )
            return False
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            return True
        if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
            self._error(
                raw,
                "malformed run-length mask",
                "has a run-length mask whose counts are no text and no numbers",
            )
            return False
        pixels = expected[0] * expected[1]
        if sum(counts) != pixels:
            self._error(
                raw,
                kind,
                f"has a run-length mask of {sum(counts)} pixels; its image has {pixels}",
            )
            return False
        return True

    def _error(self, raw: Entry, kind: str, text: str) -> None:
        self._report(_of_annotation(raw, kind, text))

    def _odd(
        self, raw: Entry, kind: str, text: str, handled: str, *, left_out: bool = False
    ) -> None:
        self._report(_of_annotation(raw, kind, text, handled, left_out=left_out))


def _of_annotation(
    raw: Entry, kind: str, text: str, handled: str | None = None, *, left_out: bool = False
) -> Finding:
    return Finding(
        kind=kind,
        text=f"annotation {raw['id']} (image {raw['image_id']}) {text}",
        handled=handled,
        image=raw["image_id"],
        annotation=raw["id"],
        left_out=left_out,
    )


def run_lengths(annotation: Entry, height: int, width: int) -> Entry:
    """The run lengths of the mask of an annotation as `AnnotationReader` returns it.

    Those that come compressed in the file are as they are; `decode_mask` tells whether they are
    sound.
    """
    segmentation = annotation["segmentation"]
    runs: Entry
    if isinstance(segmentation, list):
        runs = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = mask_api.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    return runs


def decode_mask(annotation: Entry, height: int, width: int) -> NDArray[np.uint8]:
    """The mask (height, width) of an annotation as `AnnotationReader` returns it.

    Raises:
        InputError: for run lengths that cannot be read; naming the annotation, not the file.
    """
    try:
        mask: NDArray[np.uint8] = mask_api.decode(run_lengths(annotation, height, width))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"annotation {annotation['id']} (image {annotation['image_id']}) has a segmentation"
            f" that cannot be read: {' '.join(str(error).split())}"
        ) from error
    return mask


def _is_number(value: Any, limit: float) -> bool:
    """Whether it is a number within the limit, which NaN is not."""
    return isinstance(value, int | float) and abs(value) < limit
