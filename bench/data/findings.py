"""What can be wrong or odd in a data set: a table of kinds, with how each is handled."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_SHOWN = 5


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        text: what is said of its place; fields in braces are values of the finding.
        handled: how it is handled; None for an error, with which the data cannot be used.
        left_out: whether data is left out for it.
    """

    text: str
    handled: str | None = None
    left_out: bool = False


_BOTH_USED = "both are used as they are"
_PART = "the polygon is left out"
_WHOLE = "the annotation is left out"
_AREA = "the area decides whether an object counts as small, medium or large"
_CROWDS = "not trained on; what is found there counts neither for nor against"
_GREY = "three equal channels"
_TRANSPARENT = "the transparency is dropped"
_RGB = "converted to RGB"
_MODE = "has Pillow's mode {mode}"

# Errors first, then what decides on a whole split, then single places.
KINDS: Mapping[str, Kind] = {
    "annotation file unreadable": Kind("{why}"),
    "section missing": Kind("{why}"),
    "malformed entry": Kind("{why}"),
    "id used twice": Kind("has an id that stands twice in the list {section!r}{hint}"),
    "image without a size": Kind("has the size {height}x{width} (height x width)"),
    "image folder missing": Kind("{why}"),
    "image missing": Kind(
        "is missing: {path}; --images names the folder of images that are elsewhere"
    ),
    "image unreadable": Kind("cannot be read: {why}"),
    "image of another size": Kind(
        "is {rows}x{columns} (height x width), {height}x{width} in the annotation file{hint}"
    ),
    "annotation of no image": Kind("points to image {other}, which is not listed"),
    "unknown category": Kind("has the unknown category {category}"),
    "malformed iscrowd": Kind("has iscrowd {value}; 0 or 1 is needed"),
    "malformed area": Kind("has area {value}; a number of pixels, 0 or more, is needed"),
    "malformed box": Kind("has bbox {value}; [x, y, width, height] in pixels is needed"),
    "malformed polygon": Kind(
        "has {what}; a list of numbers, x and y in turn, in pixels, is needed"
    ),
    "malformed run-length mask": Kind("has a run-length mask that cannot be read: {why}"),
    "run-length mask of the wrong size": Kind("has a run-length mask of {size}; its image {own}"),
    "classes of the splits differ": Kind("{why}"),
    "split without an instance": Kind(
        "of {count} images none has an instance to train on or to evaluate with; {crowds} crowds do"
        " not count"
    ),
    "split without annotations": Kind(
        "none of {count} images has an annotation: is it a test split?",
        "a run refuses to train on it or to evaluate with it",
    ),
    "boxes that look like fractions": Kind(
        "{count} of {all} boxes are smaller than a pixel: are they fractions of the image?",
        "taken as pixels",
    ),
    "polygons that look like fractions": Kind(
        "{count} of {all} masks lie within the first pixel: are their polygons fractions of the"
        " image?",
        "taken as pixels",
    ),
    "boxes near the origin alone": Kind(
        "all {all} boxes end within {reach:.0%} of the width and height of their images: are they"
        " percentages, or of smaller images?",
        "taken as pixels",
    ),
    "boxes within a square": Kind(
        "all {all} boxes end within {side} pixels in x and in y, and nearly reach them, in larger"
        " images: are they of images stretched to {side}x{side}, or shares of {side}?",
        "taken as pixels",
    ),
    "boxes that look like corners": Kind(
        "{count} of {all} boxes reach over the image's edge: are they x1, y1, x2, y2, around their"
        " centre, of images before they were cropped or turned, or of hidden parts too?",
        "taken as x, y, width, height",
    ),
    "boxes that look counted from 1": Kind(
        "{count} of {all} boxes begin at 1 and none before: is the first pixel 1?",
        "taken as counted from 0",
    ),
    "boxes that look counted from -1": Kind(
        "{count} of {all} boxes begin at -1, fewer at 0 and none before: was 1 taken off what was"
        " counted from 0?",
        "taken as counted from 0",
    ),
    "boxes in another format than the masks": Kind(
        "{count} of {all} boxes fit their masks if they are read as {format}",
        "taken as x, y, width, height",
    ),
    "boxes beside their masks": Kind(
        "{count} of {all} boxes begin {begin} and end {end} pixels (x, y) off their masks: were"
        " they cut to whole pixels, or are both not counted from the same first one?",
        "both are used as they are",
    ),
    "boxes of another size than the masks": Kind(
        "{count} of {all} boxes are {what} than their masks, {usual:.2f} times as long and wide as"
        " a rule: are they around boxes that were turned, or drawn otherwise?",
        "both are used as they are",
    ),
    "areas that do not fit": Kind(
        "{count} of {all} areas are not those of their masks or boxes, but {usual:.2g} times as"
        " large as a rule: are they of images of another size, or not in pixels?",
        _AREA,
    ),
    "many crowds": Kind(
        "{count} of {all} annotations are crowds: are they groups, or objects whose masks an export"
        " wrote as run lengths?",
        _CROWDS,
    ),
    "crowds": Kind("{count} of {all} annotations are crowds", _CROWDS),
    "images of many objects": Kind(
        "{count} of {all} images have more than {found} objects, up to {most}",
        "where they are evaluated, the others count as missed: detectors give"
        " model.detector.detections of an image, and COCO's rules take {found} of a class",
    ),
    "classes of each image": Kind(
        "{count} of {all} images list classes that were looked for in them, or not, as LVIS's do",
        "not read: what is not annotated counts as not there, so AP is not that of LVIS",
    ),
    "annotations with a score": Kind(
        "{count} of {all} annotations have a score, {under} of them under 1: are they predictions?",
        "taken as the truth",
    ),
    "fields that are not read": Kind(
        "annotations have {fields}",
        "not read: each counts ('iscrowd' alone is heeded), its box is upright, of x, y, width and"
        " height, and its class is that of its category_id",
    ),
    "fields of images that are not read": Kind(
        "images have {fields}",
        "not read: every image is used as a whole, and what is not annotated in it counts as not"
        " there",
    ),
    "masks that look like boxes": Kind(
        "{count} of {all} masks fill their boxes: are they boxes?",
        "taken as masks, so that mask AP says little besides box AP",
    ),
    "deep images with a small range": Kind(
        "values up to {top} of 65535 in {count} 16-bit images",
        "scaled by 65535, which leaves {left} of 255; data.deep_white={white} scales by that",
    ),
    "deep images of which some have a small range": Kind(
        "values up to {top} of 65535 in {count} of {all} 16-bit images: have they fewer bits than"
        " the others?",
        "scaled by 65535 as those, and dark",
    ),
    "deep colour images with a small range": Kind(
        "values up to {top} of 255 in the upper 8 bits of {count} of {all} 16-bit colour images:"
        " have they fewer bits?",
        "taken as they are, and dark; scale them to all 16 bits, or to 8",
    ),
    "no masks at all": Kind(
        "no annotation has a segmentation",
        "boxes are the masks to train on, evaluated it has no mask AP;"
        " --method retinanet needs none",
    ),
    "split of another name": Kind("{split} is read from {path}", "used as {split}"),
    "file named by two images": Kind(
        "names the same file as image {other}, {path}",
        "used twice, each time with the annotations of one entry alone",
    ),
    "image in two splits": Kind(
        "has the pixels of {other}", "trained on and evaluated with, if you choose both splits"
    ),
    "image alike in two splits": Kind(
        "looks like {other}{how}: is it a copy, encoded or resized anew?",
        "trained on and evaluated with, if you choose both splits",
    ),
    "source in two splits": Kind(
        "is made of the same image as {other}, by its name: is it an augmented copy, or a tile?",
        "trained on and evaluated with, if you choose both splits",
    ),
    "image twice in a split": Kind("has the pixels of {other}", "used twice"),
    "class without an image": Kind("has no image", "left out", left_out=True),
    "class number without an image": Kind(
        "has no image: do classes count from 1, or is one missing?",
        "an output of the classifier all the same",
    ),
    "shard beside folders of classes": Kind(
        "is a shard beside folders of classes", "left out", left_out=True
    ),
    "second image of a sample": Kind("is beside another image of its sample", "left out"),
    "file of a class that is no image": Kind(
        "has the ending {ending!r}, no image's that is read", "left out", left_out=True
    ),
    "images alike in a split": Kind(
        "{count} of {all} images look like another of the split: are they frames of a video, or"
        " copies?",
        "used as they are; intervals of mAP take images for independent, and are too narrow",
    ),
    "image file of another path": Kind("is found as {path}", "read from there"),
    "number written as text or fraction": Kind("has {key!r} {value}", "taken as a whole number"),
    "box or area written as text": Kind("has {key!r} {value}", "read as numbers"),
    "box without area in the image": Kind("has the box {box}", _WHOLE, left_out=True),
    "annotation without a valid polygon": Kind("has no valid polygon", _WHOLE, left_out=True),
    "polygon of two corners": Kind(
        "has a polygon of 4 numbers, perhaps a box x1, y1, x2, y2", _PART, left_out=True
    ),
    "polygon of fewer than 3 points": Kind(
        "has a polygon of {count} numbers", _PART, left_out=True
    ),
    "polygon of an odd count of numbers": Kind(
        "has a polygon of {count} numbers", _PART, left_out=True
    ),
    "polygon of point pairs": Kind(
        "has a polygon of [x, y] pairs", "read as x and y in turn, as COCO writes them"
    ),
    "polygon in no list of polygons": Kind(
        "has x, y, x, y, … where a list of polygons belongs", "read as one polygon"
    ),
    "annotation twice": Kind(
        "has the class, box and segmentation of annotation {other}", _BOTH_USED
    ),
    "annotation nearly twice": Kind(
        "has the class of annotation {other}, and its box but for a pixel", _BOTH_USED
    ),
    "annotation without a segmentation": Kind(
        "has no segmentation", "its box is its mask, to train on and in mask AP"
    ),
    "annotation without an area": Kind("has no area", "that of its mask is used"),
    "box over the image's edge": Kind(
        "has the box {box}, which reaches {over:g} pixels over the edge of {height}x{width}"
        " (height x width)",
        "cut off at the edge in training; evaluated as it is, which no box within the image equals",
    ),
    "polygon over the image's edge": Kind(
        "has a polygon that reaches {over:g} pixels over the image's edge",
        "its mask is cut off at the edge",
    ),
    "box smaller than a pixel": Kind("has the box {box}", "used as it is"),
    "crowd outlined by polygons": Kind("is a crowd and has polygons", "it is a crowd"),
    "mask within the first pixel": Kind("has a mask within the first pixel", "used as it is"),
    "mask without a pixel": Kind(
        "has a mask without a pixel", "its box is used, with an empty mask"
    ),
    "box that does not fit its mask": Kind(
        "has the box {box}, but its mask's is {extent} (x, y, width, height)", _BOTH_USED
    ),
    "polygons within each other": Kind(
        "has polygons that share {pixels:g} pixels",
        "they are added: what is meant as a hole is filled",
    ),
    "polygon that crosses itself": Kind(
        "has a polygon of {count} points that crosses itself: are they in another order?",
        "used as it is, though its mask may lack a part",
    ),
    "area of the box": Kind(
        "has the area of its box, {area:g}, but its mask has {pixels:g} pixels",
        _AREA,
    ),
    "area of the whole image": Kind(
        "has the area of its whole image, {area:g}, but its mask has {pixels:g} pixels",
        _AREA,
    ),
    "area that does not fit its mask": Kind(
        "has the area {area:g}, but its mask has {pixels:g} pixels",
        _AREA,
    ),
    "image without annotations": Kind(
        "has no annotation",
        "left out of training; where it is evaluated, every detection is a false one",
    ),
    "image with crowds only": Kind("has crowds only", "left out of training; evaluated"),
    "class without an instance": Kind(
        "has no instance but crowds, or none at all",
        "it keeps its label; evaluated, its AP is left out of the mean",
    ),
    "class of no objects": Kind(
        "has a name that others give to what is no object", "it is a class like any other"
    ),
    "class without a name": Kind("has no name", "it is a class like any other"),
    "class of stuff": Kind(
        "is of regions, not of objects ('isthing' 0)", "it is a class like any other"
    ),
    "class name used twice": Kind("is the name of {count} classes", "they stay apart"),
    "class names alike": Kind(
        "differs from {other} in case, blanks, dashes or the form of letters alone",
        "they are two classes",
    ),
    "file that no image names": Kind("is named by no image", "not used"),
    "black-and-white image": Kind(_MODE, _GREY),
    "grey image": Kind(_MODE, _GREY),
    "grey image with transparency": Kind(_MODE, f"{_GREY}, {_TRANSPARENT}"),
    "image with a palette": Kind(_MODE, _RGB),
    "transparent image": Kind(_MODE, _TRANSPARENT),
    "image of premultiplied colours": Kind(
        _MODE + " and, by its tag, colours that were multiplied by its fourth channel",
        f"they are divided by it, and {_TRANSPARENT}",
    ),
    "CMYK image": Kind(_MODE, _RGB),
    "16-bit image": Kind(_MODE + " and values up to {top}", "grey, scaled to 8 bit"),
    "image without contrast but for a few pixels": Kind(
        "has values of {low} to {high} of 255 when scaled to 8 bit, but for the extremes, the most"
        " frequent and 8 % of the others: is it a small part of 16 bits, with defects, a scale bar"
        " or an edge?",
        "used as it is",
    ),
    "16-bit colour image": Kind(
        "has 16 bits a channel, whose upper 8 go up to {top}",
        "the upper 8 bits are used, whatever data.deep_white is",
    ),
    "image of an unusual mode": Kind(_MODE, _RGB),
    "image turned by EXIF": Kind("has the EXIF orientation {orientation}", "turned upright"),
    "image without contrast": Kind(
        "has values of {low} to {high} of 255 alone: is it of 0 to 1, a map of labels, of a small"
        " part of 16 bits, or empty?",
        "used as it is",
    ),
    "image of several frames": Kind("has several frames", "the first is used"),
    "damaged JPEG": Kind("is damaged: {why}", "what can be decoded of it is used"),
    "image with a warning": Kind("makes Pillow warn: {why}", "read all the same"),
}

_WITHOUT_CONTRAST = "image without contrast", "image without contrast but for a few pixels"
# What is said of a whole split, and the kinds of single places that then need no line.
_COVERED = {
    "boxes that look like fractions": (
        *("box smaller than a pixel", "mask without a pixel", "boxes near the origin alone"),
    ),
    "polygons that look like fractions": ("mask within the first pixel", "mask without a pixel"),
    "boxes that look like corners": ("box over the image's edge",),
    "areas that do not fit": ("area that does not fit its mask",),
    "no masks at all": ("annotation without a segmentation",),
    "deep images with a small range": _WITHOUT_CONTRAST,
    "deep colour images with a small range": _WITHOUT_CONTRAST,
}


@dataclass(frozen=True)
class Finding:
    """Something wrong or odd in a data set.

    Attributes:
        kind: a key of `KINDS`.
        values: what `KINDS` fills its text with.
        image, annotation: the ids it concerns.
        name: what it concerns where that has no id, or the image's file.
        is_error: whether the data cannot be used with it.
        remedy: what makes an error of it something handled.
    """

    kind: str
    values: Mapping[str, Any]
    image: int | None = None
    annotation: int | None = None
    name: str = ""
    is_error: bool = False
    remedy: str = ""

    @property
    def place(self) -> str:
        """What it concerns, in words; empty where that is a whole split."""
        if self.annotation is not None:
            return f"annotation {self.annotation} (image {self.image})"
        if self.image is None:
            return self.name
        return f"image {self.image} ({self.name})" if self.name else f"image {self.image}"

    @property
    def text(self) -> str:
        """It and its place, in one line."""
        said = KINDS[self.kind].text.format(**self.values)
        return " ".join(f"{self.place} {said}{self.remedy}".split())

    @property
    def handled(self) -> str | None:
        """How it is handled; None for an error."""
        if self.is_error:
            return None
        return (KINDS[self.kind].handled or "").format(**self.values)

    @property
    def left_out(self) -> bool:
        """Whether data is left out for it."""
        return not self.is_error and KINDS[self.kind].left_out


Report = Callable[[Finding], None]


def quoted(name: str) -> str:
    """A name in quotes, with escapes for letters that look like others."""
    return repr(name) if unicodedata.is_normalized("NFC", name) else ascii(name)


def finding(
    kind: str,
    *,
    image: int | None = None,
    annotation: int | None = None,
    name: str = "",
    error: str = "",
    **values: Any,
) -> Finding:
    """Return the finding of a kind; `error` makes one of what is handled otherwise, and why."""
    return Finding(
        kind=kind,
        values=values,
        image=image,
        annotation=annotation,
        name=name,
        is_error=bool(error) or KINDS[kind].handled is None,
        remedy=error and f"; {error}",
    )


def by_kind(findings: Iterable[Finding]) -> Mapping[str, list[Finding]]:
    """The findings by their kind, in the order of `KINDS`."""
    kinds: dict[str, list[Finding]] = {}
    for found in findings:
        kinds.setdefault(found.kind, []).append(found)
    return {kind: kinds[kind] for kind in KINDS if kind in kinds}


class Tally:
    """Counts findings by kind, and keeps the first few of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[Finding]] = {}

    @classmethod
    def of(cls, other: "Tally") -> "Tally":
        """A copy."""
        copy = cls()
        copy.counts.update(other.counts)
        copy._first = {kind: list(first) for kind, first in other._first.items()}
        return copy

    def add(self, found: Finding) -> None:
        """Count one."""
        self.counts[found.kind] += 1
        first = self._first.setdefault(found.kind, [])
        if len(first) < _SHOWN:
            first.append(found)

    def lines(self, where: str) -> list[str]:
        """One line for each kind that is handled: how many, where, and how.

        Args:
            where: what they are of, such as the annotation file.
        """
        covered = {single for whole in self._first for single in _COVERED.get(whole, ())}
        return [
            f"{where}: {_line(self._first[kind], self.counts[kind])}"
            for kind in KINDS
            if kind in self._first and kind not in covered and not self._first[kind][0].is_error
        ]


def _line(first: Sequence[Finding], count: int) -> str:
    found = first[0]
    if found.image is None and count == 1:
        return f"{found.text}; {found.handled}"
    of, ids = "", [f.name or f.text for f in first]
    if found.annotation is not None:
        of, ids = "annotations ", [str(f.annotation) for f in first]
    elif found.image is not None:
        of, ids = "images ", [str(f.image) for f in first]
    more = ", …" if count > len(first) else ""
    return f"{count} of: {found.kind} ({of}{', '.join(ids)}{more}); {found.handled}"
