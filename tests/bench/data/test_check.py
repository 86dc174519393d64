"""The check of a whole data set: everything wrong or odd is found, and where it is."""

import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin, TiffTags

from bench import cli
from bench.data.check import SplitReport, check, remarks
from bench.data.coco import CocoDataset
from bench.data.findings import Finding
from bench.errors import InputError
from tests import coco

HEIGHT, WIDTH = 40, 60
# Of an annotation in the sound data set: a rectangle as box, polygon and area.
BOX = [10, 5, 20, 12]
POLYGON = [10, 5, 30, 5, 30, 17, 10, 17]
PAIRS = [[10, 5], [30, 5], [30, 17], [10, 17]]


def annotation(id_: int, image_id: int, **changes: Any) -> dict[str, Any]:
    sound = {"category_id": 3, "bbox": BOX, "area": 240, "segmentation": [POLYGON]}
    return coco.annotation(id_, image_id, **(sound | changes))


def content(count: int = 4) -> dict[str, Any]:
    """`count` images from 1 with an instance each, numbered from 101; classes of ids 3 and 8."""
    numbers = range(1, count + 1)
    found = [annotation(100 + n, n, category_id=3 if n % 2 else 8) for n in numbers]
    return coco.content({3: "train", 8: "cup"}, dict.fromkeys(numbers, (HEIGHT, WIDTH)), found)


def picture(number: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).convert(mode)


def write(root: Path, data: dict[str, Any], split: str = "train2017", first: int = 0) -> Path:
    coco.write(root, data, lambda image: np.asarray(picture(first + int(image["id"]))), split)
    return root / split


def only(root: Path, **options: Any) -> SplitReport:
    (report,) = check(root, **options)
    return report


def kinds(findings: tuple[Finding, ...]) -> Counter[str]:
    return Counter(finding.kind for finding in findings)


def test_sound_data_has_no_findings(tmp_path: Path) -> None:
    write(tmp_path, content())
    report = only(tmp_path)
    assert report.findings == ()
    assert (report.images, report.annotations, report.decoded) == (4, 4, 4)
    assert report.categories == ((3, "train"), (8, "cup"))


RUN = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 240, 240]}

RUN_OF_BOX = {
    "size": [HEIGHT, WIDTH],
    "counts": [405, *([12, 28] * 19), 12, HEIGHT * WIDTH - 405 - 40 * 19 - 12],
}

# What is changed in annotation 101 of image 1, the kind that is found, and words of its text.
ERRORS: list[tuple[dict[str, Any], str, str]] = [
    ({"image_id": 99}, "annotation of no image", "image 99"),
    ({"category_id": 5}, "unknown category", "category 5"),
    ({"bbox": [1, 2, 3]}, "malformed box", "[1, 2, 3]"),
    ({"bbox": ["a", 2, 3, 4]}, "malformed box", "'a'"),
    ({"bbox": [1, 2, "3", "nan"]}, "malformed box", "'nan'"),
    ({"bbox": [1, 2, "3,5", 4]}, "malformed box", "'3,5'"),
    ({"iscrowd": 2}, "malformed iscrowd", "iscrowd 2"),
    ({"area": -1}, "malformed area", "area -1"),
    ({"area": "1e2 px"}, "malformed area", "area '1e2 px'"),
    ({"segmentation": [[1, 2, "a", 4, 5, 6]]}, "malformed polygon", "'a'"),
    ({"segmentation": [1, 2, 3]}, "malformed polygon", "polygon 1"),
    ({"segmentation": RUN | {"size": [9, 9]}}, "run-length mask of the wrong size", "[9, 9]"),
    ({"segmentation": RUN | {"counts": [7]}}, "run-length mask of the wrong size", "7 pixels"),
    ({"segmentation": RUN | {"counts": [-1, 2]}}, "malformed run-length mask", "counts"),
    ({"segmentation": RUN | {"counts": "S5a0g"}}, "malformed run-length mask", "cannot be read"),
    ({"segmentation": [[{"x": 1, "y": 2}]]}, "malformed polygon", "'x': 1"),
    (
        {"segmentation": "[[1, 2, 3]]"},
        "malformed polygon",
        "the segmentation '[[1, 2, 3]]'; a list",
    ),
    ({"bbox": None}, "malformed entry", "annotations[0]"),
    ({"id": 102}, "id used twice", "twice in the list 'annotations'; nothing refers to ids of"),
    ({"id": "7f3a"}, "malformed entry", "not a whole number; nothing refers to ids of annotations"),
]

ODD: list[tuple[dict[str, Any], str, str, int]] = [
    ({"bbox": [10, 5, 0, 12]}, "box without area in the image", "left out", 0),
    ({"bbox": [70, 5, 9, 12]}, "box without area in the image", "left out", 0),
    ({"segmentation": [POLYGON, [1, 2, 3, 4]]}, "polygon of two corners", "left out", 1),
    ({"segmentation": [POLYGON, [1, 2]]}, "polygon of fewer than 3 points", "left out", 1),
    ({"segmentation": [PAIRS]}, "polygon of point pairs", "x and y in turn", 1),
    ({"segmentation": PAIRS}, "polygon of point pairs", "x and y in turn", 1),
    # As OpenCV's findContours has them.
    ({"segmentation": [[pair] for pair in PAIRS]}, "polygon of point pairs", "x and y in turn", 1),
    (
        {"segmentation": [[[pair] for pair in PAIRS]]},
        "polygon of point pairs",
        "x and y in turn",
        1,
    ),
    ({"segmentation": POLYGON}, "polygon in no list of polygons", "as one polygon", 1),
    (
        {"segmentation": [POLYGON, [1, 2, 3, 4, 5, 6, 7]]},
        "polygon of an odd count of numbers",
        "left out",
        1,
    ),
    ({"segmentation": None}, "annotation without a segmentation", "and in mask AP", 1),
    ({"segmentation": []}, "annotation without a segmentation", "its box is its mask", 1),
    ({"segmentation": [[]]}, "annotation without a segmentation", "its box is its mask", 1),
    ({"area": None}, "annotation without an area", "that of its mask", 1),
    ({"bbox": [10, 5, "20.0", " 12"]}, "box or area written as text", "read as numbers", 1),
    ({"bbox": [*map(str, BOX)], "area": "2.4e+02"}, "box or area written as text", "numbers", 1),
    ({"area": HEIGHT * WIDTH}, "area of the whole image", "small, medium or large", 1),
    ({"iscrowd": 1}, "crowd outlined by polygons", "crowd", 1),
    ({"area": 600}, "area that does not fit its mask", "small, medium or large", 1),
    ({"bbox": [10, 5, 30, 17]}, "box that does not fit its mask", "both are used", 1),
    (
        {"segmentation": [[10, 5, 30, 5, 10, 17, 30, 17]], "area": 120},
        "polygon that crosses itself",
        "lack a part",
        1,
    ),
    (
        {"segmentation": [[12.1, 6.1, 12.2, 6.1, 12.2, 6.2]]},
        "mask without a pixel",
        "empty mask",
        1,
    ),
]


@pytest.mark.parametrize(("changes", "kind", "words"), ERRORS, ids=str)
def test_an_error_is_found_by_the_annotation_s_id(
    tmp_path: Path, changes: dict[str, Any], kind: str, words: str
) -> None:
    data = content()
    data["annotations"][0] = annotation(101, 1) | changes
    data["annotations"][0] = {k: v for k, v in data["annotations"][0].items() if v is not None}
    write(tmp_path, data)
    (error,) = only(tmp_path).errors
    assert error.kind == kind
    assert words in error.text
    if kind != "malformed entry":
        assert error.annotation == data["annotations"][0]["id"]
        assert str(error.annotation) in error.text
    with pytest.raises(InputError, match=rf"instances_train2017\.json: {re.escape(error.text)}"):
        CocoDataset(tmp_path, "train2017")


@pytest.mark.parametrize(("changes", "kind", "words", "used"), ODD, ids=str)
def test_what_is_odd_is_said_with_how_it_is_handled(
    tmp_path: Path, changes: dict[str, Any], kind: str, words: str, used: int
) -> None:
    data = content()
    changed = annotation(101, 1) | changes
    data["annotations"][0] = {k: v for k, v in changed.items() if v is not None}
    write(tmp_path, data)
    report = only(tmp_path)
    assert report.errors == ()
    # Another class would be without instances besides.
    (found,) = [finding for finding in report.odd if finding.annotation is not None]
    assert found.kind == kind
    assert found.annotation == 101
    assert found.image == 1
    assert words in str(found.handled)
    dataset = CocoDataset(tmp_path, "train2017", degenerate_boxes="drop")
    assert len(dataset[0][1]["boxes"]) == used
    assert report.annotations == 3 + used


def test_boxes_written_as_text_are_those_of_numbers(tmp_path: Path) -> None:
    data = content()
    write(tmp_path, data)
    sound = CocoDataset(tmp_path, "train2017")
    for one in data["annotations"]:
        one |= {"bbox": [*one["bbox"][:2], *(f"{side:.4f}" for side in one["bbox"][2:])]}
        one |= {"area": str(one["area"])}
    write(tmp_path, data)
    texts = CocoDataset(tmp_path, "train2017")
    for (_, first), (_, second) in zip(sound, texts, strict=True):
        assert all(first[key].equal(second[key]) for key in first)
    (line,) = remarks([texts])
    said = "4 of: box or area written as text (annotations 101, 102, 103, 104); read as numbers"
    assert line.endswith(said)


@pytest.mark.parametrize(
    ("box", "polygon", "over"),
    [
        ([-5, 5, 20, 12], [-5, 5, 15, 5, 15, 17, -5, 17], "5 pixels"),
        ([50, 5, 14, 12], [50, 5, 64, 5, 64, 17, 50, 17], "4 pixels"),
        ([10, 30, 20, 13], [10, 30, 30, 30, 30, 43, 10, 43], "3 pixels"),
    ],
)
def test_what_reaches_over_the_edge_is_cut_off(
    tmp_path: Path, box: list[int], polygon: list[int], over: str
) -> None:
    data = content()
    data["annotations"][0] = annotation(101, 1, bbox=box, segmentation=[polygon])
    write(tmp_path, data)
    report = only(tmp_path)
    assert report.errors == ()
    assert kinds(report.odd)["box over the image's edge"] == 1
    assert kinds(report.odd)["polygon over the image's edge"] == 1
    assert all(over in finding.text for finding in report.odd if "edge" in finding.kind)
    (said,) = {f.handled for f in report.odd if f.kind == "box over the image's edge"}
    assert "in training; evaluated as it is" in str(said)
    # What COCO's own tools do too.
    dataset = CocoDataset(tmp_path, "train2017")
    assert dataset.ground_truth()["annotations"][0]["bbox"] == box


@pytest.mark.parametrize("way", [1, -1])
def test_a_line_to_a_hole_or_another_part_crosses_nothing(tmp_path: Path, way: int) -> None:
    data = content()
    for one, far, wide in zip(data["annotations"][:2], (0, 26), (20, 42), strict=True):
        inner = np.add([[14, 8], [26, 8], [26, 14], [14, 14], [14, 8]], [far, 0])[::way]
        joined = [[10, 5], [30, 5], [30, 17], [10, 17], [10, 5], *inner.tolist(), [10, 5]]
        one.update(segmentation=[np.ravel(joined).tolist()], bbox=[10, 5, wide, 12], area=None)
    write(tmp_path, data)
    assert "polygon that crosses itself" not in kinds(only(tmp_path).odd)


def test_a_pixel_over_the_edge_is_rounding(tmp_path: Path) -> None:
    data = content()
    wide = [-0.5, 0, WIDTH + 1, HEIGHT + 0.9]
    edge = [0, 0, WIDTH + 0.9, 0, WIDTH, HEIGHT + 0.5, -0.5, HEIGHT]
    data["annotations"][0] = annotation(101, 1, bbox=wide, segmentation=[edge], area=2400)
    write(tmp_path, data)
    assert only(tmp_path).findings == ()


Spoil = Callable[[Path], None]


def saved(image: Image.Image, **options: Any) -> Spoil:
    return lambda path: image.save(path, "PNG", **options)


def premultiplied(path: Path) -> None:
    """RGBA in a TIFF whose ExtraSamples say that the colours were multiplied by the fourth."""
    picture(9, "RGBA").save(path, "TIFF")
    extra_samples = struct.pack("<HHI", 338, 3, 1)
    plain, multiplied = (extra_samples + struct.pack("<I", kind) for kind in (2, 1))
    raw = path.read_bytes()
    assert raw.count(plain) == 1
    path.write_bytes(raw.replace(plain, multiplied))


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"IDAT") + 3000] ^= 255
    path.write_bytes(raw)


FILES: list[tuple[Spoil, str, str, bool]] = [
    (Path.unlink, "image missing", "image 2 is missing", True),
    (truncate, "image unreadable", "truncated", True),
    (damage, "image unreadable", "broken PNG file", True),
    (lambda path: path.write_bytes(b""), "image unreadable", "image 2 ", True),
    (lambda path: path.write_text("no"), "image unreadable", "unknown format", True),
    (saved(Image.new("RGB", (60, 41))), "image of another size", "41x60", True),
    (
        saved(picture(9), exif=orientation(6)),
        "image of another size",
        "without its EXIF orientation (6) it would fit",
        True,
    ),
    (saved(picture(9), exif=orientation(3)), "image turned by EXIF", "orientation 3", False),
    (saved(picture(9, "L")), "grey image", "mode L", False),
    (saved(picture(9, "LA")), "grey image with transparency", "mode LA", False),
    (saved(picture(9, "1")), "black-and-white image", "mode 1", False),
    (saved(picture(9, "P")), "image with a palette", "mode P", False),
    (saved(picture(9, "RGBA")), "transparent image", "mode RGBA", False),
    (premultiplied, "image of premultiplied colours", "mode RGBA", False),
    (
        saved(Image.fromarray(np.full((HEIGHT, WIDTH), 9000, dtype=np.uint16))),
        "16-bit image",
        "mode I;16",
        False,
    ),
    (lambda path: picture(9, "CMYK").save(path, "JPEG"), "CMYK image", "mode CMYK", False),
]


@pytest.mark.parametrize(("spoil", "kind", "words", "is_error"), FILES)
def test_a_file_is_found_by_the_image_s_id(
    tmp_path: Path, spoil: Spoil, kind: str, words: str, is_error: bool
) -> None:
    folder = write(tmp_path, content())
    spoil(folder / "2.png")
    report = only(tmp_path)
    (found,) = [finding for finding in report.findings if finding.kind == kind]
    assert (found.image, found.is_error) == (2, is_error)
    assert words in found.text
    assert "\n" not in found.text
    assert only(tmp_path, decode=False).findings == ((found,) if kind == "image missing" else ())


@pytest.mark.parametrize(
    ("subfile", "frames"), [({}, 1), ({254: 0}, 1), ({254: 2}, 1), ({254: 1}, 0), ({254: 4}, 0)]
)
def test_smaller_copies_and_masks_in_a_tiff_are_no_frames(
    tmp_path: Path, subfile: dict[int, int], frames: int
) -> None:
    """Pages of cloud-optimised GeoTIFFs; those that say nothing of themselves are frames."""
    folder = write(tmp_path, content())
    pages = [picture(8), picture(9).resize((30, 20))]
    picture(2).save(folder / "2.png", "TIFF", save_all=True, append_images=pages, tiffinfo=subfile)
    report = only(tmp_path)
    assert report.errors == ()
    assert kinds(report.findings)["image of several frames"] == frames


@pytest.mark.parametrize(
    ("tag", "value", "frames"),
    [
        (32997, 4, 1),
        (32997, 1, 0),
        (270, "ImageJ=1.53t\nimages=3\nslices=3\n", 1),
        (270, "ImageJ=1.53t\nimages=9\nslices=9\n", 0),
        (270, "ImageJ=1.53t\nimages=1\n", 0),
        (270, "a field of view\nimages=9", 0),
    ],
)
def test_planes_behind_one_header_of_a_tiff_are_frames(
    tmp_path: Path, tag: int, value: int | str, frames: int
) -> None:
    """As tifffile writes volumes, and ImageJ stacks above 4 GB; one of nine, saved anew, is one."""
    folder = write(tmp_path, content())
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype[tag] = TiffTags.LONG if isinstance(value, int) else TiffTags.ASCII
    info[tag] = value
    picture(2).save(folder / "2.png", "TIFF", tiffinfo=info)
    with (folder / "2.png").open("ab") as file:
        file.write(picture(3).tobytes() + picture(4).tobytes())
    assert kinds(only(tmp_path).findings)["image of several frames"] == frames


def test_everything_is_found_at_once(tmp_path: Path) -> None:
    """One of every kind, in one data set: neither hides the other."""
    data = content(len(ERRORS) + len(ODD) + len(FILES))
    expected: Counter[str] = Counter()
    changes = [*ERRORS, *[odd[:3] for odd in ODD]]
    for number, (change, kind, _) in enumerate(changes):
        changed = data["annotations"][number] | change
        if change.get("id") == 102:
            changed["id"] = 101
        data["annotations"][number] = {k: v for k, v in changed.items() if v is not None}
        expected[kind] += 1
    folder = write(tmp_path, data)
    for number, (spoil, kind, _, _) in enumerate(FILES, start=len(changes) + 1):
        spoil(folder / f"{number}.png")
        expected[kind] += 1
    # One of the files that is turned is of another size too.
    expected["image turned by EXIF"] += 1
    for workers in (0, 2):
        report = only(tmp_path, workers=workers)
        found = kinds(report.findings)
        assert {kind: found[kind] for kind in expected} == expected
        assert report.decoded == len(data["images"]) - sum(
            kind in ("image missing", "image unreadable") for _, kind, _, _ in FILES
        )


def test_images_and_classes_without_instances(tmp_path: Path) -> None:
    data = content()
    data["categories"].append({"id": 9, "name": "cup"})
    crowd = annotation(101, 1, iscrowd=1, segmentation=RUN, bbox=[54, 0, 6, 40])
    data["annotations"] = [crowd, annotation(102, 2), annotation(103, 3)]
    write(tmp_path, data)
    report = only(tmp_path)
    assert report.errors == ()
    by_kind = {finding.kind: finding for finding in report.odd}
    assert by_kind["image with crowds only"].image == 1
    assert by_kind["image without annotations"].image == 4
    assert "'cup'" in by_kind["class name used twice"].text
    assert kinds(report.odd)["class without an instance"] == 2


@pytest.mark.parametrize(
    ("images", "changes", "kind", "is_error"),
    [
        (0, [], "split without an instance", True),
        (4, [], "split without annotations", False),
        (4, [{"iscrowd": 1, "segmentation": RUN}], "split without an instance", True),
        (4, [{"bbox": [5, 5, 0, 9]}], "split without an instance", True),
        (4, [{}], "", False),
    ],
)
def test_a_split_that_runs_refuse_is_said(
    tmp_path: Path, images: int, changes: list[dict[str, Any]], kind: str, is_error: bool
) -> None:
    data = content(images)
    data["annotations"] = [annotation(101, 1, **change) for change in changes]
    write(tmp_path, data)
    report = only(tmp_path)
    assert [f.kind for f in report.errors] == [kind] * is_error
    found = [f.kind for f in report.findings if f.kind.startswith("split without")]
    assert found == [kind] * bool(kind)


def test_broken_structure_is_found(tmp_path: Path) -> None:
    data = content()
    data["images"][1] = {"id": 2}
    data["images"].append(data["images"][0])
    data["images"][3]["height"] = 0
    data["categories"].append("cup")
    folder = write(tmp_path, content())
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    assert kinds(only(tmp_path).errors) == {
        "malformed entry": 2,
        "id used twice": 1,
        "image without a size": 1,
        # Of the images that cannot be used.
        "annotation of no image": 2,
    }
    for broken in ("", "[1, 2]"):
        (tmp_path / "annotations" / "instances_train2017.json").write_text(broken)
        (error,) = only(tmp_path).errors
        assert error.kind == "annotation file unreadable"
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    assert kinds(only(tmp_path).errors) == {"section missing": 3}
    assert folder.is_dir()


def test_files_that_no_image_names_and_files_that_are_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path, content())
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "extra.png").write_bytes(b"")
    write(tmp_path, content(), split="val2017", first=50)
    # The same pixels in other bytes.
    Image.open(folder / "2.png").save(tmp_path / "val2017" / "2.png", compress_level=0)
    data = content()
    data["images"][0]["neg_category_ids"] = [3]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    train, val = check(tmp_path)
    assert "1 of 4 images list classes" in train.findings[0].text
    train = replace(train, findings=train.findings[1:])
    assert kinds(train.findings) == {"image twice in a split": 1, "file that no image names": 1}
    assert train.findings[0].image == 3
    assert "extra.png" in train.findings[1].text
    assert kinds(val.findings) == {"image in two splits": 1}
    assert "2.png of train2017" in val.findings[0].text


def test_splits_of_other_classes_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path, content())
    other = content()
    other["categories"][1]["name"] = "mug"
    write(tmp_path, other, split="val2017", first=50)
    train, val = check(tmp_path)
    assert train.findings == ()
    (error,) = val.errors
    assert error.kind == "classes of the splits differ"
    assert "8 'cup', 8 'mug'" in error.text
    assert [report.split for report in check(tmp_path, ["val2017"])] == ["val2017"]
    assert check(tmp_path, ["val2017"])[0].findings == ()


def test_a_file_that_two_images_name_is_found(tmp_path: Path) -> None:
    data = content()
    write(tmp_path, data)
    data["images"][2]["file_name"] = "./1.png"
    data["images"][3]["file_name"] = "job\\2.png"
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    report = only(tmp_path)
    twice = [f for f in report.findings if f.kind == "file named by two images"]
    assert [(f.image, f.values["other"]) for f in twice] == [(3, 1), (4, 2)]
    assert kinds(report.findings)["image twice in a split"] == 0
    (line,) = [x for x in remarks([CocoDataset(tmp_path, "train2017")]) if "two images" in x]
    assert "2 of: file named by two images (images 3, 4)" in line


Change = Callable[[dict[str, Any]], None]


def fractions(a: dict[str, Any]) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def points(a: dict[str, Any]) -> None:
    a["bbox"] = [*a["bbox"][:2], 1, 1]


def corners(a: dict[str, Any]) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [x, y, x + w, y + h]


def centres(a: dict[str, Any]) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [x + w / 2, y + h / 2, w, h]


def from_the_bottom(a: dict[str, Any]) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [x, HEIGHT - y - h, w, h]


def rows_first(a: dict[str, Any]) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [y, x, h, w]


@pytest.mark.parametrize(
    ("change", "masks", "said"),
    [
        (fractions, False, "4 of 4 boxes are smaller than a pixel: are they fractions"),
        (fractions, True, "4 of 4 boxes fit their masks if they are read as fractions"),
        (points, False, ""),
        (corners, False, "4 of 4 boxes reach over the image's edge: are they x1, y1, x2, y2"),
        (corners, True, "4 of 4 boxes fit their masks if they are read as x1, y1, x2, y2"),
        (centres, False, "4 of 4 boxes reach over the image's edge"),
        (centres, True, "4 of 4 boxes fit their masks if they are read as a centre"),
        (from_the_bottom, True, "4 of 4 boxes fit their masks if they are read as x, y from the"),
        (rows_first, True, "4 of 4 boxes fit their masks if they are read as y, x, height, width"),
        (None, False, ""),
        (None, True, ""),
    ],
)
def test_boxes_of_another_format_are_suspected(
    tmp_path: Path, change: Change | None, masks: bool, said: str
) -> None:
    data = content()
    for a in data["annotations"]:
        a["bbox"], a["area"] = [32, 20, 24, 14], 24 * 14
        a["segmentation"] = []
        if masks:
            a["bbox"], a["area"] = [20, 12, 12, 8], 12 * 8
            a["segmentation"] = [[20, 12, 32, 12, 32, 20, 20, 20]]
        if change is not None:
            change(a)
    write(tmp_path, data)
    suspected = [x for x in remarks([CocoDataset(tmp_path, "train2017")]) if " of 4 boxes " in x]
    assert any(said in line for line in suspected) if said else suspected == []
    assert len(suspected) == len({f.text for f in only(tmp_path).odd if " of 4 boxes " in f.text})


def test_boxes_of_another_format_are_suspected_by_those_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.data.check._LOOKED_AT_WHOLE", 2)
    monkeypatch.setattr("bench.data.check._LOOKED_AT", 3)
    data = content(12)
    for one in data["annotations"]:
        corners(one)
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any("3 of 3 boxes fit their masks if they are read as x1, y1" in line for line in lines)


@pytest.mark.parametrize("pairs", [False, True])
def test_polygons_as_shares_of_the_image_are_suspected(tmp_path: Path, pairs: bool) -> None:
    data = content()
    for a in data["annotations"]:
        a["segmentation"] = [[0.17, 0.12, 0.5, 0.12, 0.5, 0.43, 0.17, 0.43]]
        if pairs:
            a["segmentation"] = [[[0.17, 0.12], [0.5, 0.12], [0.5, 0.43]]]
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    (said,) = [line for line in lines if "fractions" in line]
    assert "4 of 4 masks lie within the first pixel: are their polygons fractions" in said
    assert not any("without a pixel" in line for line in lines)
    for a in data["annotations"][1:]:
        a["segmentation"] = [POLYGON]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any("1 of: mask within the first pixel (annotations 101)" in line for line in lines)
    assert not any("fractions" in line for line in lines)


def test_what_areas_holes_and_names_make_of_a_mask_is_said(tmp_path: Path) -> None:
    data = content()
    data["categories"][1]["name"] = "Train "
    outer = [10, 5, 30, 5, 30, 17, 20, 17, 10, 11]
    inner = [14, 7, 26, 7, 26, 11, 14, 11]
    first, second, *_ = data["annotations"]
    # The area is that of the box, whose corner the mask leaves out.
    first["segmentation"] = [outer]
    second |= {"segmentation": [POLYGON, inner], "area": 240 - 48}
    write(tmp_path, data)
    found = {(f.kind, f.annotation, f.name) for f in only(tmp_path).odd}
    assert found == {
        ("area of the box", 101, ""),
        ("polygons within each other", 102, ""),
        ("class names alike", None, "class 'Train '"),
    }
    assert len(remarks([CocoDataset(tmp_path, "train2017")])) == 3


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("boxes", [2, 4])
def test_boxes_written_as_masks_are_suspected(tmp_path: Path, boxes: int, runs: bool) -> None:
    data = content(16)
    for number, one in enumerate(data["annotations"]):
        # Closed, as some write polygons, or cut at a corner.
        one["segmentation"] = [[10, 5, 30, 5, 30, 17, 20, 17, 10, 11]]
        if number < boxes:
            one["segmentation"] = RUN_OF_BOX if runs else [[*POLYGON, 10, 5]]
    write(tmp_path, data)
    said = f"{boxes} of 16 masks fill their boxes: are they boxes?; taken as masks"
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert [said in line for line in lines if "fill" in line] == [True] * (boxes == 4)


def test_fields_that_are_not_read_are_said(tmp_path: Path) -> None:
    data = content()
    for one, more in zip(
        data["annotations"],
        (
            {"ignore": 1, "iscrowd": 0, "score": 1},
            {"ignore": 0, "difficult": "1", "angle": 0.0, "isfake": False, "keypoints": []},
            {"attributes": {"rotation": 30.5, "occluded": False}, "ignore": "1"},
            {"attributes": [], "category_name": "mug", "caption": None},
        ),
        strict=True,
    ):
        one.update(more)
    write(tmp_path, data)
    (line,) = remarks([CocoDataset(tmp_path, "train2017")])
    fields = "'ignore' (2), 'difficult' (1), 'attributes.rotation' (1), 'category_name' (1)"
    assert f"annotations have {fields}; not read: each counts" in line
    assert "its box is upright" in line


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attributes": [{"name": "ignore", "value": True}]}, "'attributes.ignore' (1)"),
        ({"attributes": [{"name": "ignore", "value": False}, {"occluded": 0}]}, ""),
        ({"attributes": ["crowd"]}, "'attributes.crowd' (1)"),
        ({"attributes": "ignore"}, "'attributes.ignore' (1)"),
        ({"attributes": [7]}, "'attributes' (1)"),
        ({"bbox_mode": 0}, "'bbox_mode' (1)"),
        ({"bbox_mode": "BoxMode.XYXY_ABS"}, "'bbox_mode' (1)"),
        ({"bbox_mode": 1}, ""),
    ],
    ids=str,
)
def test_attributes_in_any_form_and_modes_of_boxes_are_said(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    data = content()
    data["annotations"][1] |= fields
    write(tmp_path, data)
    assert [f.text for f in only(tmp_path).odd] == [f"annotations have {said}"] * bool(said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 60, "height": 40, "color": "#fff", "dataset_id": 1}, ""),
        ({"category_name": "cup", "label": "cup"}, "'category_name' (2), 'label' (2)"),
        ({"ignore": True, "iscrowd": 0}, "'ignore' (4)"),
        ({"isVisible": True, "attributes": {"keyframe": True}}, ""),
        ({"bbox_mode": 0}, "'bbox_mode' (4)"),
    ],
    ids=str,
)
def test_fields_that_say_nothing_more_are_not_said(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    data = content()
    for one in data["annotations"]:
        one |= fields
    write(tmp_path, data)
    assert [f.text for f in only(tmp_path).odd] == [f"annotations have {said}"] * bool(said)
    data["annotations"][0] |= {"ignore": 1, "iscrowd": 1}
    write(tmp_path, data)
    found = [f.values["fields"] for f in only(tmp_path).odd if f.kind.startswith("fields")]
    assert found == [said.replace("ignore' (4)", "ignore' (3)")] * bool(said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([{"ignore": True}, {"ignore": False}, {"ignore": "1"}], "'ignore' (2)"),
        ([{"deleted": 1, "annotated": True}], "'deleted' (1)"),
        ([{"is_annotated": False}, {"is_annotated": None}], "'is_annotated' false (1)"),
        ([{"ignore_regions": [[1, 2, 3, 4]]}, {"ignore_regions": []}], "'ignore_regions' (1)"),
        ([{"split": "train"}] * 3 + [{"split": "val"}], "'split' 'train' (3), 'split' 'val' (1)"),
        ([{"split": "train", "license": 1, "valid": 1, "deleted": False}], ""),
    ],
    ids=str,
)
def test_fields_of_images_that_leave_them_out_elsewhere_are_said(
    tmp_path: Path, fields: list[dict[str, Any]], said: str
) -> None:
    data = content()
    for image, more in zip(data["images"], fields, strict=False):
        image.update(more)
    write(tmp_path, data)
    assert [f.text for f in only(tmp_path).odd] == [f"images have {said}"] * bool(said)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert ["not read: every image is used" in line for line in lines] == [True] * bool(said)


@pytest.mark.parametrize("name", ["Ignored Regions", "ignore-region", "Don\u2019t Care"])
def test_a_class_of_regions_to_ignore_is_said_where_it_has_an_instance(
    tmp_path: Path, name: str
) -> None:
    data = content()
    data["categories"] += [
        {"id": 0, "name": "__background__"},
        {"id": 1, "name": name},
    ]
    data["annotations"][2]["category_id"] = 1
    write(tmp_path, data)
    assert [(f.kind, f.name) for f in only(tmp_path).odd] == [
        ("class without an instance", "class '__background__'"),
        ("class of no objects", f"class {name!r}"),
    ]


@pytest.mark.parametrize("other", ["Ka\u0308fer", "K\u00e4 fer\u200b", "k\u00c4-fer"])
def test_names_of_classes_that_look_alike_are_said(tmp_path: Path, other: str) -> None:
    data = content()
    for place, name in enumerate(("K\u00e4fer", other)):
        data["categories"][place]["name"] = name
    write(tmp_path, data)
    (found,) = only(tmp_path).odd
    assert found.kind == "class names alike"
    first, second = re.findall("'.*?'", found.text)
    assert first != second


@pytest.mark.parametrize(
    ("times", "masked", "said"),
    [
        ([0], False, "0 times"),
        ([0.0011, 0.0009, 0.0012], False, "0.0011 times"),
        ([1 / HEIGHT / WIDTH], False, "0.00042 times"),
        # Of images before they were resized, each its own way.
        ([1.5, 2.5], False, "2 times"),
        ([1.5, 2.5], True, "2 times"),
        ([0.5], False, "0.5 times"),
        ([0.5], True, "0.5 times"),
        ([1], False, ""),
        ([0.96, 1, 1.04], True, ""),
        # Of masks that are left out.
        ([0.3 + 0.04 * number for number in range(16)], False, ""),
    ],
)
def test_areas_of_something_else_are_suspected_all_at_once(
    tmp_path: Path, times: list[float], masked: bool, said: str
) -> None:
    data = content(16)
    for number, one in enumerate(data["annotations"]):
        x, y, w, h = 8, 4, 30 + number % 4, 30 - number // 4
        segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]] if masked else []
        area = w * h * times[number % len(times)]
        one.update(bbox=[x, y, w, h], area=area, segmentation=segmentation)
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    found = [line for line in lines if "areas are not" in line]
    whole = f"16 of 16 areas are not those of their masks or boxes, but {said} as large"
    assert [whole in line for line in found] == [True] * bool(said)


@pytest.mark.parametrize("masked", [True, False])
def test_areas_of_whole_images_are_said_once(tmp_path: Path, masked: bool) -> None:
    data = content(16)
    for number, one in enumerate(data["annotations"]):
        w, h = 10 + number % 4, 10 - number // 4
        one.update(bbox=[8, 4, w, h], area=HEIGHT * WIDTH)
        one["segmentation"] = [[8, 4, 8 + w, 4, 8 + w, 4 + h, 8, 4 + h]] if masked else []
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert sum("16 of: area of the whole image" in line for line in lines) == 1
    assert not any("areas are not" in line for line in lines)


def test_an_area_without_a_pixel_is_no_share_of_a_box(tmp_path: Path) -> None:
    data = content()
    data["annotations"][1] |= {"area": 0, "segmentation": []}
    data["annotations"][2] |= {"area": 60, "segmentation": []}
    write(tmp_path, data)
    found = [f for f in only(tmp_path).odd if "area" in f.kind]
    assert [(f.kind, f.annotation) for f in found] == [("area that does not fit its mask", 102)]


def test_many_crowds_are_suspected(tmp_path: Path) -> None:
    """As CVAT writes what was drawn with a brush."""
    data = content(12)
    said = "2 of 12 annotations are crowds: are they groups, or objects whose masks an export"
    for one in data["annotations"][:2]:
        write(tmp_path, data)
        assert not any(said in line for line in remarks([CocoDataset(tmp_path, "train2017")]))
        one.update(iscrowd=1, segmentation=RUN_OF_BOX)
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any(f"{said} wrote as run lengths?; not trained on" in line for line in lines)


def test_a_few_crowds_are_counted(tmp_path: Path) -> None:
    """As of objects in several parts, which some exports write so."""
    data = content(16)
    data["annotations"][3].update(iscrowd=1, segmentation=RUN_OF_BOX)
    write(tmp_path, data)
    said = "1 of 16 annotations are crowds; not trained on; what is found there counts neither"
    assert any(said in line for line in remarks([CocoDataset(tmp_path, "train2017")]))


def test_more_objects_than_are_evaluated_are_said(tmp_path: Path) -> None:
    data = content()
    data["annotations"] += [
        annotation(1000 + n, 2, bbox=[n % 50, n // 50, 9, 9], segmentation=None) for n in range(99)
    ]
    said = "images have more than 100 objects"
    write(tmp_path, data)
    assert not any(said in line for line in remarks([CocoDataset(tmp_path, "train2017")]))
    data["annotations"].append(annotation(2000, 2, bbox=[40, 20, 15, 15], segmentation=None))
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    (line,) = [line for line in lines if said in line]
    # A split to train on is read by the same rule.
    assert f"1 of 4 {said}, up to 101; where they are evaluated, the others count as mis" in line


def test_classes_of_stuff_with_an_instance_are_said(tmp_path: Path) -> None:
    data = content()
    for place, thing in enumerate((1, 0)):
        data["categories"][place]["isthing"] = thing
    data["categories"].append({"id": 9, "name": "sky", "isthing": 0})
    write(tmp_path, data)
    (found,) = [found for found in only(tmp_path).odd if found.kind == "class of stuff"]
    assert found.text == "class 'cup' is of regions, not of objects ('isthing' 0)"
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any("class 'cup' is of regions" in line for line in lines)


@pytest.mark.parametrize("name", ["", " ", "\u200b"])
def test_a_class_without_a_name_is_said(tmp_path: Path, name: str) -> None:
    data = content()
    data["categories"][0]["name"] = name
    data["categories"][1]["name"] = "-"
    write(tmp_path, data)
    (found,) = [found for found in only(tmp_path).odd if found.kind == "class without a name"]
    assert found.text == f"class {name!a} has no name"


def test_a_list_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    """As where files were put together as text; Python keeps the last one alone."""
    write(tmp_path, content())
    path = tmp_path / "annotations" / "instances_train2017.json"
    text = path.read_text()
    path.write_text(f'{text[:-1]}, "annotations": []}}')
    with pytest.raises(InputError, match="has two lists 'annotations'"):
        CocoDataset(tmp_path, "train2017")
    # What annotations say of themselves is theirs.
    path.write_text(text.replace('"iscrowd": 0', '"iscrowd": 0, "images": 1'))
    assert len(CocoDataset(tmp_path, "train2017")) == 4


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([10, 5, 60, 70], "all 16 boxes end within 25% of"),
        ([40, 5, 160, 145], "all 16 boxes end within 50% of"),
        ([40, 5, 160, 155], ""),
    ],
)
def test_percentages_and_boxes_of_smaller_images_are_suspected(
    tmp_path: Path, box: list[int], said: str
) -> None:
    data = content(16)
    for image, a in zip(data["images"], data["annotations"], strict=True):
        image |= {"height": 300, "width": 400}
        a |= {"bbox": box, "segmentation": []}
    (tmp_path / "train2017").mkdir(parents=True)
    for image in data["images"]:
        picture(image["id"]).resize((400, 300)).save(tmp_path / "train2017" / image["file_name"])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert [said in line for line in lines if "boxes end within" in line] == [True] * bool(said)


@pytest.mark.parametrize(
    ("size", "ends", "said"),
    [
        ((1200, 1600), (990, 960), True),
        ((1200, 1600), (990, 900), False),
        ((1200, 1600), (1200, 960), False),
        # Of squares both ends are as far off the edge, whatever is in the middle.
        ((1200, 1200), (990, 960), False),
        ((1050, 1600), (990, 960), False),
    ],
)
def test_boxes_in_thousandths_or_of_stretched_squares_are_suspected(
    tmp_path: Path, size: tuple[int, int], ends: tuple[int, int], said: bool
) -> None:
    """As models of language and vision write them."""
    data = content(16)
    for image, one in zip(data["images"], data["annotations"], strict=True):
        image |= {"height": size[0], "width": size[1]}
        one |= {"bbox": [40, 30, ends[0] - 40, ends[1] - 30], "segmentation": []}
    (tmp_path / "images").mkdir()
    for image in data["images"]:
        (tmp_path / "images" / image["file_name"]).touch()
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = check(tmp_path / "a.json", decode=False)[0].odd
    texts = [f.text for f in found if f.kind == "boxes within a square"]
    assert ["all 16 boxes end within 1000 pixels in x and in y" in x for x in texts] == [
        True
    ] * said


def test_annotations_that_are_there_twice_are_found(tmp_path: Path) -> None:
    data = content()
    first = data["annotations"][0]
    data["annotations"] += [first | {"id": 7}, first | {"id": 8, "category_id": 8}]
    write(tmp_path, data)
    (found,) = only(tmp_path).findings
    assert (found.kind, found.annotation, found.values["other"]) == ("annotation twice", 7, 101)


def test_annotations_that_are_there_twice_but_for_rounding_are_found(tmp_path: Path) -> None:
    data = content()
    first = data["annotations"][0]
    x, y, w, h = first["bbox"]
    data["annotations"] += [
        first | {"id": 7, "bbox": [x + 0.5, y, w, h - 0.5]},
        first | {"id": 8, "bbox": [x + 0.5, y, w, h - 0.5], "category_id": 8},
        first | {"id": 9, "bbox": [x + 2, y, w - 2, h]},
    ]
    write(tmp_path, data)
    (found,) = only(tmp_path).findings
    assert (found.kind, found.annotation, found.values["other"]) == (
        *("annotation nearly twice", 7),
        101,
    )
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any("1 of: annotation nearly twice (annotations 7); both" in line for line in lines)


def test_boxes_that_begin_at_1_are_suspected(tmp_path: Path) -> None:
    data = content()
    for one in data["annotations"]:
        one["bbox"] = [1, 1, 29, 16]
        one["segmentation"] = [[1, 1, 30, 1, 30, 17, 1, 17]]
    write(tmp_path, data)
    assert "4 of 4 boxes begin at 1" in remarks([CocoDataset(tmp_path, "train2017")])[0]
    data["annotations"][0]["bbox"] = [0, 1, 30, 16]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    assert "begin at 1" not in " ".join(remarks([CocoDataset(tmp_path, "train2017")]))


@pytest.mark.parametrize(
    ("starts", "said"),
    [([-1] * 5 + [0] * 4, True), ([-2] + [-1] * 5, False), ([-1] * 5 + [0] * 5, False)],
)
def test_boxes_that_begin_at_minus_1_are_suspected(
    tmp_path: Path, starts: list[int], said: bool
) -> None:
    """As of VOC files from 0, from which a script took 1 as from those from 1."""
    data = content(len(starts))
    for one, start in zip(data["annotations"], starts, strict=True):
        one.update(bbox=[start, 4, 30, 16], segmentation=[])
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any("5 of 9 boxes begin at -1, fewer at 0" in line for line in lines) == said


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ((1, 1, 0, 0), "begin +1, +1 and end +1, +1 pixels"),
        ((0, -1, 0, 0), "begin +0, -1 and end +0, -1 pixels"),
        ((0, 0, -1, -1), "begin +0, +0 and end -1, -1 pixels"),
        ((5, 0, 0, 0), "begin +5, +0 and end +5, +0 pixels"),
        ((0, 0, 0, 0), ""),
        ((0.4, -0.4, 0, 0), ""),
        # Contours run through the middles of pixels.
        ((0, 0, 1, 1), ""),
    ],
)
def test_boxes_beside_their_masks_are_suspected(
    tmp_path: Path, moved: tuple[float, ...], said: str, runs: bool
) -> None:
    data = content(16)
    draw = np.random.default_rng(0)
    for number, one in enumerate(data["annotations"]):
        x, y, w, h = draw.integers([4, 4, 8, 8], [20, 12, 30, 20]).tolist()
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        one["segmentation"] = [corners]
        if runs:
            mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            mask[y : y + h, x : x + w] = 1
            lengths = np.diff(np.flatnonzero(np.diff(mask.T.ravel())) + 1, prepend=0).tolist()
            counts = [*lengths, HEIGHT * WIDTH - sum(lengths)]
            one["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
        # Some boxes are drawn by hand.
        loose = (-1, -2, 3, 3) if number % 4 == 0 else (0, 0, 0, 0)
        one["bbox"] = [v + m + n for v, m, n in zip((x, y, w, h), moved, loose, strict=True)]
        one["area"] = w * h
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    found = [finding.text for finding in only(tmp_path).odd]
    for texts in (lines, found):
        off = [text.split(" boxes ")[1] for text in texts if "off their masks" in text]
        assert [text.split(" (x")[0] for text in off] == [said] * bool(said)


@pytest.mark.parametrize(
    ("grown", "loose", "said"),
    [
        (3, 16, ["16 of 16 boxes are larger than their masks, 1.40 times"]),
        (-2, 12, ["12 of 16 boxes are smaller than their masks, 0.73 times"]),
        (3, 7, []),
        (1, 16, []),
    ],
)
def test_boxes_of_another_size_than_their_masks_are_suspected(
    tmp_path: Path, grown: int, loose: int, said: list[str]
) -> None:
    data = content(16)
    for number, one in enumerate(data["annotations"][:loose]):
        x, y, w, h = BOX
        aside = 2 * (number % 2)
        one["bbox"] = [x - grown + aside, y - grown, w + 2 * grown, h + 2 * grown]
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert [s for s in said if not any(s in line for line in lines)] == []
    found = [f.text for f in only(tmp_path).odd if "than their masks" in f.text]
    assert [text.split(" as long")[0] for text in found] == said


def test_files_whose_names_another_system_wrote_are_found(tmp_path: Path) -> None:
    data = content()
    names = ("bäum.png", "2.PNG", "3.png", "a.png")
    for image, name in zip(data["images"], names, strict=True):
        image["file_name"] = name
    folder = write(tmp_path, data)
    for old, new in (("bäum.png", "ba\u0308um.png"), ("2.PNG", "2.png"), ("a.png", "A.png")):
        (folder / old).rename(folder / new)
    # Which of two it would be is not known.
    (folder / "a.PNG").write_bytes(b"")
    found = [f for f in only(tmp_path).findings if f.image is not None]
    assert [(f.kind, f.image) for f in found] == [
        ("image file of another path", 1),
        ("image file of another path", 2),
        ("image missing", 4),
    ]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((0.9, 0.4, 1.0, None), ["3 of 4 annotations have a score, 2 of them under 1"]),
        ((97, 61, 88, 70), ["4 of 4 annotations have a score, 0 of them under 1"]),
        ((1, 1, 1.0, None), []),
    ],
)
def test_predictions_in_the_place_of_annotations_are_suspected(
    tmp_path: Path, scores: tuple[float | None, ...], said: list[str]
) -> None:
    data = content()
    for one, score in zip(data["annotations"], scores, strict=True):
        one["score"] = score
    write(tmp_path, data)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert [line.split(": ")[1] for line in lines] == said


def test_a_small_range_of_deep_images_is_said_and_can_be_scaled(tmp_path: Path) -> None:
    folder = write(tmp_path, content())
    values = np.linspace(0, 4000, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(values).save(folder / "2.png")
    line, *_ = remarks([CocoDataset(tmp_path, "train2017")])
    assert "values up to 4000 of 65535 in 1 16-bit images; scaled by 65535, which leaves" in line
    assert "0 to 16 of 255; data.deep_white=4095 scales by that" in line
    # Beside one that has all 16 bits.
    Image.fromarray(values * 16).save(folder / "1.png")
    line, *_ = remarks([CocoDataset(tmp_path, "train2017")])
    assert "values up to 4000 of 65535 in 1 of 2 16-bit images: have they fewer bits" in line
    Image.fromarray(values).save(folder / "1.png")
    scaled = CocoDataset(tmp_path, "train2017", deep_white=4095)
    np.testing.assert_allclose(scaled[1][0][0], values * (255 / 4095), atol=0.51)
    assert not any("values up to" in line for line in remarks([scaled]))
    # A single pixel that the sensor got wrong.
    values[3, 3] = 65535
    Image.fromarray(values).save(folder / "1.png")
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    few = "2 of: image without contrast but for a few pixels (images 1, 2)"
    assert any(few in line for line in lines)
    with pytest.raises(InputError, match=r"2\.png: pixels up to 4000; data\.deep_white=255 must"):
        CocoDataset(tmp_path, "train2017", deep_white=255)[1]


@pytest.mark.parametrize("around", [0, 36000, 65535])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_border_hides_no_small_part_of_16_bits(tmp_path: Path, around: int, rows: int) -> None:
    folder = write(tmp_path, content())
    values = np.linspace(33069, 36863, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    # More frequent than the border.
    values[rows : rows + 20] = 34500
    values[:rows] = around
    Image.fromarray(values.astype(np.uint16)).save(folder / "2.png")
    said = [found.kind for found in only(tmp_path).odd if found.kind.startswith("image without")]
    few = " but for a few pixels" * (around != 36000)
    assert said == [f"image without contrast{few}"]


def test_a_small_range_of_deep_colour_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, content())

    def put(name: str, values: np.ndarray) -> None:
        colours = np.stack([values, values // 2, values], axis=-1).astype(">u2")
        head = b"P6 %d %d 65535\n" % (WIDTH, HEIGHT)
        (folder / name).write_bytes(head + colours.tobytes())

    values = np.linspace(0, 4095, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    put("2.png", values)
    put("1.png", 4 * values)
    line, *_ = remarks([CocoDataset(tmp_path, "train2017")])
    assert "values up to 64 of 255 in the upper 8 bits of 2 of 2 16-bit colour images" in line
    put("1.png", 16 * values)
    line, *_ = remarks([CocoDataset(tmp_path, "train2017")])
    assert "values up to 16 of 255 in the upper 8 bits of 1 of 2 16-bit colour images" in line
    put("2.png", 16 * values)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert not any("values up to" in line for line in lines)
    # A scale bar.
    values[3:4, :20] = 65535
    put("2.png", values)
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    few = "1 of: image without contrast but for a few pixels (images 2)"
    assert any(few in line for line in lines)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_damaged_jpeg_is_said(tmp_path: Path, mode: str) -> None:
    folder = write(tmp_path, content())
    picture(2, mode).save(folder / "2.png", "JPEG", quality=95)
    sound = kinds(only(tmp_path).odd)
    assert not sound["damaged JPEG"]
    raw = bytearray((folder / "2.png").read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 600] = bytes(600)
    (folder / "2.png").write_bytes(raw)
    (found,) = [found for found in only(tmp_path).odd if found.kind == "damaged JPEG"]
    assert found.text.startswith("image 2 (2.png) is damaged: Corrupt JPEG data: ")
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any("1 of: damaged JPEG (images 2); what can be decoded of it" in x for x in lines)
    # Bytes behind the end are none of the image.
    picture(2).save(folder / "2.png", "JPEG", quality=95)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes() + b"more")
    assert only(tmp_path).odd == ()


def test_a_damaged_avif_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, content())
    picture(2).save(folder / "2.png", "AVIF")
    raw = bytearray((folder / "2.png").read_bytes())
    start = raw.index(b"mdat") + 4
    raw[start : start + 200] = b"\xff" * 200
    (folder / "2.png").write_bytes(raw)
    (found,) = only(tmp_path).errors
    assert found.kind == "image unreadable"
    assert "Failed to decode" in found.text


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0, 1, True), (200, 200, True), (90, 110, False)]
)
def test_an_image_without_contrast_is_said(tmp_path: Path, low: int, high: int, said: bool) -> None:
    """As of values from 0 to 1 that were written as bytes."""
    folder = write(tmp_path, content())
    values = np.full((HEIGHT, WIDTH, 3), low, dtype=np.uint8)
    values[: HEIGHT // 2] = high
    Image.fromarray(values).save(folder / "2.png")
    texts = [found.text for found in only(tmp_path).odd]
    assert [f"image 2 (2.png) has values of {low} to {high} of 255 alone" in t for t in texts] == [
        True
    ] * said


def test_a_small_part_of_16_bits_is_said_wherever_it_lies(tmp_path: Path) -> None:
    """As of thermal images in hundredths of a kelvin."""
    folder = write(tmp_path, content())
    values = np.linspace(28315, 31315, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    Image.fromarray(values.astype(np.uint16)).save(folder / "2.png")
    (said,) = (found.text for found in only(tmp_path).odd if "alone" in found.text)
    assert "has values of 110 to 122 of 255 alone" in said


def test_remarks_are_of_every_split_the_first_first(tmp_path: Path) -> None:
    folder = write(tmp_path, content())
    data = content()
    data["annotations"][0]["segmentation"] = [PAIRS]
    write(tmp_path, data, split="val2017", first=50)
    (tmp_path / "val2017" / "2.png").write_bytes((folder / "2.png").read_bytes())
    picture(3, "L").save(folder / "3.png")
    sets = [CocoDataset(tmp_path, split) for split in ("val2017", "train2017")]
    pairs, grey = [line for line in remarks(sets) if "two splits" not in line]
    assert "instances_val2017.json: 1 of: polygon of point pairs (annotations 101); read" in pairs
    assert "instances_train2017.json: 1 of: grey image (images 3); three equal channels" in grey
    assert any("1 of: image in two splits (images 2)" in line for line in remarks(sets))
    truncate(folder / "4.png")
    with pytest.raises(InputError, match=r"instances_train2017\.json: image 4 \(4\.png\) cannot"):
        remarks(sets)


def scene(number: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A smooth picture, as photographs are."""
    rng = np.random.default_rng(number)
    few = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return few.resize((width, height), Image.Resampling.BICUBIC)


def test_what_encoding_resizing_and_mirroring_leave_of_an_image_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, content(7))
    data = content(7)
    data["images"][2] |= {"height": 2 * HEIGHT, "width": 2 * WIDTH}
    data["images"][4] |= {"height": WIDTH, "width": HEIGHT}
    data["images"][0]["file_name"] = "1.jpg"
    other = write(tmp_path, data, split="val2017", first=50)
    for number in range(1, 8):
        scene(number).save(folder / f"{number}.png")
    scene(1).save(other / "1.jpg", quality=75)
    ImageOps.mirror(scene(2)).save(other / "2.png")
    scene(3, 2 * HEIGHT, 2 * WIDTH).save(other / "3.png")
    scene(5).transpose(Image.Transpose.ROTATE_90).save(other / "5.png")
    ImageOps.flip(scene(6)).save(other / "6.png")
    scene(7).transpose(Image.Transpose.ROTATE_180).save(other / "7.png")
    # Of one colour, as any night.
    Image.new("RGB", (WIDTH, HEIGHT), (5, 5, 5)).save(other / "4.png")
    Image.new("RGB", (WIDTH, HEIGHT), (6, 5, 5)).save(folder / "4.png")
    _, report = check(tmp_path)
    said = [f.text for f in report.odd if f.kind == "image alike in two splits"]
    assert [text.split(":")[0] for text in said] == [
        "image 1 (1.jpg) looks like 1.png of train2017",
        "image 2 (2.png) looks like 2.png of train2017, mirrored",
        "image 3 (3.png) looks like 3.png of train2017",
        "image 5 (5.png) looks like 5.png of train2017, turned",
        "image 6 (6.png) looks like 6.png of train2017, mirrored and turned",
        "image 7 (7.png) looks like 7.png of train2017, turned",
    ]
    sets = [CocoDataset(tmp_path, split) for split in ("val2017", "train2017")]
    lines = remarks(sets)
    assert any(
        "6 of: image alike in two splits (images 1, 2, 3, 5, 6, …)" in line for line in lines
    )


@pytest.mark.parametrize(("count", "said"), [(20, True), (21, False)])
def test_frames_of_a_video_are_said_where_they_are_many(
    tmp_path: Path, count: int, said: bool
) -> None:
    folder = write(tmp_path, content(count))
    for number in range(1, count + 1):
        scene(number).save(folder / f"{number}.png")
    scene(3).point(lambda value: value - 4).save(folder / "15.png")
    text = f"2 of {count} images look like another of the split"
    assert [text in f.text for f in only(tmp_path).odd if "look like" in f.text] == [True] * said
    lines = remarks([CocoDataset(tmp_path, "train2017")])
    assert any(text in line and "too narrow" in line for line in lines) == said


def test_copies_made_grey_or_put_between_bars_are_found(tmp_path: Path) -> None:
    folder = write(tmp_path, content(6))
    other = write(tmp_path, content(6), split="val2017", first=50)
    for number in range(1, 7):
        scene(number).save(folder / f"{number}.png")
        scene(number).save(other / f"{number}.png")

    def between_bars(image: Image.Image, left: int = WIDTH // 4) -> Image.Image:
        canvas = Image.new("RGB", (WIDTH, HEIGHT), (114, 114, 114))
        canvas.paste(image.resize((WIDTH // 2, HEIGHT)), (left, 0))
        return canvas

    scene(1).convert("L").save(other / "1.png")
    scene(2).convert("L").convert("RGB").save(folder / "2.png")
    between_bars(scene(3)).save(other / "3.png")
    between_bars(ImageOps.mirror(scene(4))).save(folder / "4.png")
    between_bars(scene(15)).save(other / "5.png")
    # In the corner of a canvas.
    between_bars(scene(6), left=0).save(other / "6.png")
    _, report = check(tmp_path)
    said = [f.text for f in report.odd if f.kind == "image alike in two splits"]
    assert [text.split(":")[0] for text in said] == [
        "image 1 (1.png) looks like 1.png of train2017",
        "image 2 (2.png) looks like 2.png of train2017",
        "image 3 (3.png) looks like 3.png of train2017",
        "image 4 (4.png) looks like 4.png of train2017, mirrored",
        "image 6 (6.png) looks like 6.png of train2017",
    ]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("cat_jpg.rf.0f3a1c.png", "cat_jpg.rf.77aa02.png", True),
        ("P0006__1__0___0.png", "P0006__1__824___-3.png", True),
        ("P0006__1.0__0___0.png", "P0007__1.0__0___0.png", False),
        ("cat_1.png", "cat_2.png", False),
    ],
)
def test_what_is_made_of_one_source_is_said_in_two_splits(
    tmp_path: Path, one: str, other: str, said: bool
) -> None:
    first, second = content(), content()
    first["images"][0]["file_name"], second["images"][2]["file_name"] = one, other
    write(tmp_path, first)
    write(tmp_path, second, split="val2017", first=50)
    text = f"image 3 ({other}) is made of the same image as {one} of train2017, by its name"
    _, report = check(tmp_path)
    assert [text in found.text for found in report.odd] == [True] * said
    sets = [CocoDataset(tmp_path, split) for split in ("val2017", "train2017")]
    lines = remarks(sets)
    assert ["1 of: source in two splits (images 1)" in line for line in lines] == [True] * said
    # A copy is said to be one.
    picture(53).save(tmp_path / "train2017" / one)
    assert kinds(check(tmp_path)[1].odd) == {"image in two splits": 1}


def test_files_in_both_of_large_splits_are_found_beyond_the_images_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.data.check._LOOKED_AT_WHOLE", 2)
    monkeypatch.setattr("bench.data.check._LOOKED_AT", 1)
    folder = write(tmp_path, content(6))
    other = write(tmp_path, content(6), split="val2017", first=50)
    for number in (1, 3, 6):
        (other / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    sets = [CocoDataset(tmp_path, split) for split in ("val2017", "train2017")]
    (line,) = [line for line in remarks(sets) if "in two splits" in line]
    assert "(pixels of 1 of 6 images): 3 of: image in two splits (images 1, 3, 6)" in line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["data", "check", *arguments, "--workers", "0"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_and_returns_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = content(30)
    root = tmp_path / "data"
    folder = write(root, data)
    code, out, _ = run(capsys, str(root))
    assert code == 0
    assert "all 30 boxes end within" in out
    assert "30 of 30 masks fill their boxes" in out
    assert out.endswith("no errors; 2 odd, but handled\n")
    data["annotations"] = [annotation(100 + n, n, category_id=5) for n in range(1, 31)]
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    picture(9, "L").save(folder / "7.png")
    code, out, _ = run(capsys, str(root))
    assert code == 1
    assert max(map(len, out.splitlines())) <= 120
    assert "annotation 120 (image 20) has the unknown category 5" in out
    assert "annotation 121 " not in out
    assert "and 10 more; --limit 0 lists all" in out
    assert "grey image" in out
    assert "three equal channels" in out
    code, out, _ = run(capsys, str(root), "--limit", "0")
    assert all(f"annotation {100 + n} (image {n}) has" in out for n in range(1, 31))
    code, out, _ = run(capsys, str(root), "--format", "json")
    read = json.loads(out)
    assert code == 1
    assert (read["errors"], read["odd"]) == (30, 3)
    first = read["splits"][0]["findings"][0]
    assert (first["error"], first["annotation"], first["image"]) == (True, 101, 1)


def test_the_command_without_a_folder_or_a_split(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "coco", content())
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "no data folder"),
        ([str(tmp_path)], "needed: annotations/instances_SPLIT.json and the images in SPLIT/"),
        ([str(tmp_path / "coco"), "--split", "val"], "no split 'val' in"),
        ([str(tmp_path / "coco"), "--format", "jsn"], "did you mean 'json'"),
    ):
        assert words in refusal(cli.main, "data", "check", *arguments)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert "$DETECTRON2_DATASETS is not set" in refusal(cli.main, "data", "check")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert cli.main(["data", "check", "--workers", "0"]) == 0


def test_a_folder_of_images_of_another_name_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, content())
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    code, out, _ = run(capsys, str(tmp_path))
    assert code == 1
    assert "for split 'train2017', where the images belong" in " ".join(out.split())
    assert "folders there: annotations, pictures" in " ".join(out.split())
