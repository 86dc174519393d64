"""What an annotation file in COCO format may hold, and what becomes of it.

Each rule reports what it finds (`bench.data.findings`). Whoever reads decides: `CocoDataset` stops
at the first error and counts the rest, `python -m bench data check` collects all. Polygons are
treated as detectron2 treats them: those of fewer than three points are left out, and so is an
annotation that has no other.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from reprlib import repr as shortened
from typing import Any

from faster_coco_eval.core import mask as mask_api

from bench.data import masks
from bench.data.findings import Report, finding

IMAGE_KEYS = {"id": int, "file_name": str, "height": int, "width": int}
CATEGORY_KEYS = {"id": int, "name": str}
ANNOTATION_KEYS = {"id": int, "image_id": int, "category_id": int, "bbox": list}

# What is read of an annotation; its attributes one by one are not. What tools write into each
# besides says nothing of an object.
_READ = {*ANNOTATION_KEYS, "iscrowd", "area", "segmentation", "score", "attributes"}
_READ |= {"width", "height", "color", "dataset_id"}
_CLASS_NAMES = ("category_name", "label")
# What images are left out by, where it is true or false, in lower case.
_IGNORED = re.compile(r"(is_?)?(ignored?|deleted|excluded?|skip(ped)?)(_?(regions?|areas?))?")
_ANNOTATED = re.compile(r"(is_?)?(annotated|labell?ed|valid)")
_SPLITS = ("split", "subset")
_XYWH = (None, 1, "1", "XYWH_ABS", "BoxMode.XYWH_ABS")
_KINDS = {int: "a whole number", str: "a text", list: "a list"}
_ANEW = "; nothing refers to ids of annotations: number them anew, from 1"
_WHOLE = re.compile(r"\s*[+-]?\d{1,99}\s*", flags=re.ASCII)
_DECIMAL = re.compile(
    r"\s*[+-]?(\d{1,99}(\.\d{0,99})?|\.\d{1,99})(e[+-]?\d{1,2})?\s*",
    flags=re.ASCII | re.IGNORECASE,
)
_LEAST_POLYGON = 6
# Pixels from the origin. The rasteriser allocates in proportion to a polygon's length: a wild
# coordinate would take gigabytes.
_FARTHEST = 1e5
# Run lengths count the pixels of an image in 32 bits.
_MOST_PIXELS = 2**31
# Pixels that a box or polygon may reach over the image's edge unsaid: COCO's own do, by rounding.
_ROUNDING = 1.0
# Sides that are smaller, in pixels or as a share of where they end, vanish in single precision.
_LEAST_SIDE = 1e-6

Entry = dict[str, Any]
Corners = tuple[float, float, float, float]


def listed(
    content: Mapping[str, Any], section: str, keys: Mapping[str, type], report: Report
) -> Iterator[Entry]:
    """Yield the entries of a section that have the keys, each id once."""
    entries = content.get(section)
    if not isinstance(entries, list):
        report(finding("section missing", why=f"no list {section!r}"))
        return
    seen: set[int] = set()
    for position, raw in enumerate(entries):
        where = f"{section}[{position}]"
        if not isinstance(raw, dict):
            report(finding("malformed entry", why=f"{where} is not an object"))
            continue
        # LVIS names files by their addresses alone, which end in SPLIT/NAME.
        if "file_name" in keys and "file_name" not in raw and isinstance(raw.get("coco_url"), str):
            raw = raw | {"file_name": "/".join(raw["coco_url"].split("/")[-2:])}
        entry = raw if _is_plain(raw, keys) else _coerced(raw, keys, where, report)
        if entry is None:
            continue
        if entry["id"] in seen:
            place: dict[str, Any] = {"name": f"{section} id {entry['id']}"}
            if section == "annotations":
                place = {"image": entry["image_id"], "annotation": entry["id"]}
            elif section == "images":
                place = {"image": entry["id"]}
            hint = _ANEW if section == "annotations" else ""
            report(finding("id used twice", section=section, hint=hint, **place))
        else:
            seen.add(entry["id"])
            yield entry


def _is_plain(raw: Entry, keys: Mapping[str, type]) -> bool:
    return all(type(raw.get(key)) is kind for key, kind in keys.items())


def _coerced(raw: Entry, keys: Mapping[str, type], where: str, report: Report) -> Entry | None:
    """The entry with whole numbers where they are written otherwise; None where it is an error."""
    entry = dict(raw)
    for key, kind in keys.items():
        hint = _ANEW if key == "id" and "image_id" in keys else ""
        if key not in raw:
            report(finding("malformed entry", why=f"{where} has no {key!r}{hint}"))
            return None
        value = whole(raw[key]) if kind is int else raw[key]
        if type(value) is not kind:
            said = f"{where} has {key!r} {shortened(raw[key])}, which is not {_KINDS[kind]}{hint}"
            report(finding("malformed entry", why=said))
            return None
        if value is not raw[key]:
            kind_ = "number written as text or fraction"
            report(finding(kind_, name=where, key=key, value=shortened(raw[key])))
            entry[key] = value
    return entry


def whole(value: Any) -> Any:
    """A whole number that is written as a text or a fraction, such as "12" or 12.0, as one."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _decimal(value: Any) -> Any:
    """A number that is written as a text, such as "333.0337", as one."""
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value


def has_size(image: Entry, report: Report) -> bool:
    """Whether an image has a size that it can have."""
    height, width = image["height"], image["width"]
    sound = 1 <= height <= _FARTHEST and 1 <= width <= _FARTHEST and height * width < _MOST_PIXELS
    if not sound:
        report(
            finding(
                "image without a size",
                image=image["id"],
                height=shortened(height),
                width=shortened(width),
            )
        )
    return sound


class AnnotationReader:
    """Reads annotations one by one.

    Args:
        images: the images by id.
        classes: the names of classes by category id.
        drop_degenerate: leave out boxes without area, which are errors otherwise.
        report: receives everything that is found.
    """

    def __init__(
        self,
        images: Mapping[int, Entry],
        classes: Mapping[int, str],
        *,
        drop_degenerate: bool,
        report: Report,
    ) -> None:
        self._images = images
        self._classes = classes
        self._drop_degenerate = drop_degenerate
        self._report = report
        self._count = 0
        self._unread: Counter[str] = Counter()
        self._true: Counter[str] = Counter()

    @property
    def unread(self) -> Counter[str]:
        """The fields that say something and are not read, and in how many annotations each does.

        A field of "attributes" is called `attributes.NAME`. What is true of all tells none apart,
        but where it leaves them out elsewhere.
        """
        return Counter(
            {
                name: count
                for name, count in self._unread.items()
                if self._true[name] < self._count
                or _IGNORED.fullmatch(name.removeprefix("attributes.").casefold())
            }
        )

    def read(self, raw: Entry) -> Entry | None:
        """Return the annotation with defaults for what it lacks; None where it is left out.

        It has a "segmentation" where it came with one, and None where its box is its mask.
        """
        raw = self._without_texts(raw)
        image = self._images.get(raw["image_id"])
        known = raw["category_id"] in self._classes
        if image is None:
            self._say(raw, "annotation of no image", other=raw["image_id"])
        if not known:
            self._say(raw, "unknown category", category=raw["category_id"])
        complete = self._numbers(raw)
        unread = _unread(raw, self._classes.get(raw["category_id"]))
        self._count += 1
        self._unread.update(unread.keys())
        self._true.update(name for name, value in unread.items() if value is True)
        if image is None:
            return None
        corners = self._corners(raw, image)
        if corners is None:
            return None
        given = _has_segmentation(raw)
        segmentation = self._segmentation(raw, image) if given else None
        if not given:
            self._say(raw, "annotation without a segmentation")
        if complete is None or not known or (given and segmentation is None):
            return None
        complete["segmentation"] = segmentation
        if complete.get("area") is None:
            x1, y1, x2, y2 = corners
            complete["area"] = (x2 - x1) * (y2 - y1)
            if given:
                runs = masks.encode(segmentation, image["height"], image["width"])
                complete["area"] = float(mask_api.area(runs))
        return complete

    def _without_texts(self, raw: Entry) -> Entry:
        """The annotation with numbers in its box and area where they are written as texts."""
        given = [raw.get("area"), *raw["bbox"]]
        area, *box = read = [*map(_decimal, given)]
        if any(isinstance(value, str) for value in read) or all(map(is_, read, given)):
            return raw
        key = "area" if all(map(is_, box, raw["bbox"])) else "bbox"
        self._say(raw, "box or area written as text", key=key, value=raw[key])
        return raw | {"area": area, "bbox": box}

    def _numbers(self, raw: Entry) -> Entry | None:
        """The annotation with what is read of iscrowd and area; None where they are malformed."""
        crowd = whole(0 if raw.get("iscrowd") is None else raw["iscrowd"])
        sound = isinstance(crowd, int) and crowd in (0, 1)
        if not sound:
            self._say(raw, "malformed iscrowd", value=raw["iscrowd"])
        area = raw.get("area")
        if area is None:
            self._say(raw, "annotation without an area")
        elif not _is_number(area, _FARTHEST**2) or area < 0:
            self._say(raw, "malformed area", value=area)
            sound = False
        return raw | {"iscrowd": int(crowd)} if sound else None

    def _corners(self, raw: Entry, image: Entry) -> Corners | None:
        """The box within the image, as x1, y1, x2, y2; None where it cannot be used."""
        box, height, width = raw["bbox"], image["height"], image["width"]
        if len(box) != 4 or not all(_is_number(value, _FARTHEST) for value in box):
            self._say(raw, "malformed box", value=box)
            return None
        x1, y1 = max(box[0], 0), max(box[1], 0)
        x2, y2 = min(box[0] + box[2], width), min(box[1] + box[3], height)
        if _is_thin(x1, x2) or _is_thin(y1, y2):
            remedy = "data.degenerate_boxes=drop leaves such boxes out"
            error = "" if self._drop_degenerate else f"it has no area in the image; {remedy}"
            self._say(raw, "box without area in the image", box=box, error=error)
            return None
        over = max(-box[0], -box[1], box[0] + box[2] - width, box[1] + box[3] - height)
        if over > _ROUNDING:
            size = {"height": height, "width": width}
            self._say(raw, "box over the image's edge", box=box, over=over, **size)
        if max(box[2], box[3]) < 1:
            self._say(raw, "box smaller than a pixel", box=box)
        return x1, y1, x2, y2

    def _segmentation(self, raw: Entry, image: Entry) -> Any:
        """What of the segmentation can be used; None where the annotation cannot."""
        segmentation = raw["segmentation"]
        if not isinstance(segmentation, list | dict):
            self._say(raw, "malformed polygon", what=f"the segmentation {shortened(segmentation)}")
            return None
        if not isinstance(segmentation, list):
            counts = segmentation.get("counts")
            if isinstance(counts, list):
                # A count of 12.0 is equal, but no whole number.
                segmentation = segmentation | {"counts": [whole(count) for count in counts]}
            if not self._is_run_length(raw, segmentation, image):
                return None
            # So is a size of 480.0.
            return segmentation | {"size": [image["height"], image["width"]]}
        if whole(raw.get("iscrowd")) == 1:
            self._say(raw, "crowd outlined by polygons")
        if _is_flat(segmentation):
            self._say(raw, "polygon in no list of polygons")
            segmentation = [segmentation]
        others = [part for part in segmentation if not isinstance(part, list)]
        if others:
            self._say(raw, "malformed polygon", what=f"the polygon {shortened(others[0])}")
            return None
        polygons = _joined(segmentation)
        if polygons is not segmentation:
            self._say(raw, "polygon of point pairs")
        verdicts = [self._is_polygon(raw, polygon, image) for polygon in polygons]
        if None in verdicts:
            return None
        kept = [p for p, valid in zip(polygons, verdicts, strict=True) if valid]
        if not kept:
            self._say(raw, "annotation without a valid polygon")
            return None
        if all(min(polygon) >= -1 and max(polygon) <= 1 for polygon in kept):
            self._say(raw, "mask within the first pixel")
        return kept

    def _is_polygon(self, raw: Entry, polygon: list[Any], image: Entry) -> bool | None:
        """Whether it is a polygon; None where it is an error."""
        try:
            # The sum is not a number where one of them is none, which the extremes do not show.
            low, high, total = min(polygon, default=0), max(polygon, default=0), sum(polygon)
            sound = -_FARTHEST < low <= high < _FARTHEST and total == total
        except (TypeError, OverflowError):
            sound = False
        if not sound:
            wrong = next(value for value in polygon if not _is_number(value, _FARTHEST))
            what = f"a polygon with the coordinate {shortened(wrong)}"
            self._say(raw, "malformed polygon", what=what)
            return None
        count = len(polygon)
        if count < _LEAST_POLYGON or count % 2:
            kind = "polygon of an odd count of numbers"
            if count < _LEAST_POLYGON:
                kind = "polygon of two corners" if count == 4 else "polygon of fewer than 3 points"
            self._say(raw, kind, count=count)
            return False
        edges = (image["width"], image["height"])
        if low < -_ROUNDING or high > min(edges) + _ROUNDING:
            over = max(-low, max(polygon[::2]) - edges[0], max(polygon[1::2]) - edges[1])
            if over > _ROUNDING:
                self._say(raw, "polygon over the image's edge", over=over)
        return True

    def _is_run_length(self, raw: Entry, segmentation: Entry, image: Entry) -> bool:
        size = segmentation.get("size")
        height, width = image["height"], image["width"]
        wrong, malformed = "run-length mask of the wrong size", "malformed run-length mask"
        if size != [height, width]:
            said = {"size": f"size {shortened(size)}", "own": f"is {[height, width]}"}
            self._say(raw, wrong, **said)
            return False
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            try:
                pixels = int(masks.run_counts(counts).sum())
            except ValueError as error:
                self._say(raw, malformed, why=error)
                return False
        elif isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
            pixels = sum(counts)
        else:
            self._say(raw, malformed, why="its counts are neither text nor numbers")
            return False
        if pixels != height * width:
            self._say(raw, wrong, size=f"{pixels} pixels", own=f"has {height * width}")
            return False
        return True

    def _say(self, raw: Entry, kind: str, *, error: str = "", **values: Any) -> None:
        for key in ("value", "box", "other", "category"):
            if key in values:
                values[key] = shortened(values[key])
        place = {"image": raw["image_id"], "annotation": raw["id"]}
        self._report(finding(kind, error=error, **place, **values))


def outline(annotation: Entry, height: int, width: int) -> masks.Runs:
    """The run lengths of the mask of an annotation as `AnnotationReader` returns it."""
    segmentation = annotation["segmentation"]
    if segmentation is None:
        segmentation = [box_polygon(annotation["bbox"], height, width)]
    return masks.encode(segmentation, height, width)


def box_polygon(box: list[float], height: int, width: int) -> list[float]:
    """The part of a box within the image, as a polygon."""
    x1, y1 = max(box[0], 0), max(box[1], 0)
    x2, y2 = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def _unread(raw: Entry, class_name: str | None) -> dict[str, Any]:
    """The fields that are not read and say something: neither false, nor 0, nor empty.

    What is read says no more where it is written twice.
    """
    more = {name: value for name, value in raw.items() if name not in _READ}
    for name in _CLASS_NAMES:
        if name in more and more[name] == class_name:
            del more[name]
    if "ignore" in more and whole(more["ignore"]) == whole(raw.get("iscrowd")):
        del more["ignore"]
    # What detectron2 calls 0 are corners; what is read it calls 1.
    if "bbox_mode" in more and more["bbox_mode"] not in _XYWH:
        more["bbox_mode"] = "other"
    else:
        more.pop("bbox_mode", None)
    for name, value in _attributes(raw.get("attributes")):
        more[f"attributes.{name}" if name else "attributes"] = value
    return {name: value for name, value in more.items() if whole(value)}


def _attributes(given: Any) -> Iterator[tuple[str, Any]]:
    """Attributes by name: of an object, of a list of objects with name and value, or of texts."""
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, dict) and "name" in one:
            yield str(one["name"]), one.get("value", True)
        elif isinstance(one, dict):
            yield from one.items()
        else:
            yield (one if isinstance(one, str) else ""), one


def unread_of_images(images: Sequence[Entry]) -> list[str]:
    """Fields by which images, or regions of them, are left out elsewhere, and of how many images.

    Of splits in one file each is named, where there are several.
    """
    names = sorted({name for image in images for name in image})
    found: list[str] = []
    for name in names:
        told = [whole(image[name]) for image in images if name in image]
        if _IGNORED.fullmatch(name.casefold()):
            count = sum(map(bool, told))
            found += [f"{name!r} ({count})"] if count else []
        elif _ANNOTATED.fullmatch(name.casefold()):
            count = sum(value is not None and value in (0, "false") for value in told)
            found += [f"{name!r} false ({count})"] if count else []
        elif name.casefold() in _SPLITS:
            values = Counter(value for value in told if isinstance(value, str | int))
            if len(values) > 1:
                found += [f"{name!r} {shortened(v)} ({n})" for v, n in values.most_common()]
    return found


def _has_segmentation(raw: Entry) -> bool:
    """Whether there is one; exports of boxes alone write null, [], {} or [[]]."""
    segmentation = raw.get("segmentation")
    empty = isinstance(segmentation, list) and all(part == [] for part in segmentation)
    return bool(segmentation) and not empty


def _is_flat(segmentation: list[Any]) -> bool:
    """Whether it is one polygon where a list of polygons belongs."""
    count = len(segmentation)
    numbers = all(_is_number(value, _FARTHEST) for value in segmentation)
    return count >= _LEAST_POLYGON and count % 2 == 0 and numbers


def _joined(polygons: list[list[Any]]) -> list[list[Any]]:
    """Polygons whose points are pairs, [[x, y], [x, y], …], as COCO's x, y in turn."""
    alone = _in_turn(polygons) if len(polygons) * 2 >= _LEAST_POLYGON else None
    if alone is not None:
        return [alone]
    found = [_in_turn(polygon) for polygon in polygons]
    if found.count(None) == len(found):
        return polygons
    return [old if new is None else new for old, new in zip(polygons, found, strict=True)]


def _in_turn(points: list[Any]) -> list[Any] | None:
    """The x and y of pairs, which OpenCV has in a list of one each; None of anything else."""
    # Of millions of polygons in COCO's own form one number is looked at.
    if not points or not isinstance(points[0], list):
        return None
    pairs = [point[0] if isinstance(point, list) and len(point) == 1 else point for point in points]
    return [value for pair in pairs for value in pair] if all(map(_is_pair, pairs)) else None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and not any(isinstance(part, list | dict) for part in value)
    )


def _is_thin(start: float, end: float) -> bool:
    return bool(end - start <= _LEAST_SIDE * max(end, 1))


def _is_number(value: Any, limit: float) -> bool:
    """Whether it is a number within the limit, which NaN is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < limit
