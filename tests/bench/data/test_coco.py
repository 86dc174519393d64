"""A COCO split: what is read, what is refused and in which words."""

import copy
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image
from pycocotools import coco as reference_coco
from pycocotools import mask as reference

from bench.config.suites import default_root
from bench.data import images
from bench.data.check import remarks
from bench.data.coco import CocoDataset, Packed
from bench.errors import InputError
from bench.run.evaluate import CocoEvaluator
from tests import coco

HEIGHT, WIDTH = 40, 60
TRIANGLE = [10.0, 5.0, 30.0, 5.0, 10.0, 25.0]


def box_mask(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y : y + height, x : x + width] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    run = reference.encode(np.asfortranarray(mask))
    return {"size": list(run["size"]), "counts": run["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    counts, last = [0], 0
    for value in mask.ravel(order="F").tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def content() -> dict[str, Any]:
    """Three images: two instances and a crowd; one instance; nothing. Gaps in the category ids."""
    found = [
        coco.annotation(1, 11, 90, [10.0, 5.0, 20.0, 20.0], area=200.0, segmentation=[TRIANGLE]),
        coco.annotation(2, 11, 7, [20, 10, 8, 6], segmentation=compressed(box_mask(20, 10, 8, 6))),
        coco.annotation(
            3, 11, 7, [40, 20, 10, 15], iscrowd=1,
            segmentation=uncompressed(box_mask(40, 20, 10, 15)),
        ),
        coco.annotation(4, 12, 7, [0, 0, 12, 12]),
    ]  # fmt: skip
    sizes = dict.fromkeys((11, 12, 13), (HEIGHT, WIDTH))
    return coco.content({90: "toothbrush", 7: "train"}, sizes, found)


def grey(image: dict[str, Any]) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), image["id"], dtype=np.uint8)


def write(root: Path, data: Any) -> Path:
    path = coco.write(root, content(), grey)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def dataset(root: Path, data: Any, **options: Any) -> CocoDataset:
    write(root, data)
    return CocoDataset(root, "train2017", **options)


def refused(root: Path, data: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        dataset(root, data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(**changes: Any) -> dict[str, Any]:
    """The data with the first annotation changed; a value of None removes the key."""
    data = content()
    first = data["annotations"][0] | changes
    data["annotations"][0] = {k: v for k, v in first.items() if v is not None}
    return data


def test_reads_images_and_targets(tmp_path: Path) -> None:
    data = dataset(tmp_path, content())
    image, target = data[0]
    assert len(data) == 3
    assert data.ids == (11, 12, 13)
    assert data.categories == ((7, "train"), (90, "toothbrush"))
    assert data.num_classes == 2
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    assert int(target["image_id"]) == 11
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["boxes"].tolist() == [[10, 5, 30, 25], [20, 10, 28, 16], [40, 20, 50, 35]]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["area"].tolist() == [200, 48, 150]
    assert target["masks"].dtype == torch.uint8


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_are_those_of_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = content()
    shape = raw["annotations"][0] | {"image_id": 12, "bbox": [0, 0, WIDTH, HEIGHT]}
    kinds: list[Any] = []
    for points in range(3, 13):
        corners = rng.uniform(-6, 6, (points, 2)) + rng.uniform(0, 1, (points, 2)) * [WIDTH, HEIGHT]
        kinds += [[corners.round(2).ravel().tolist()], [corners.ravel().tolist(), TRIANGLE]]
        mask = (rng.random((HEIGHT, WIDTH)) < points / 20).astype(np.uint8)
        mask[0, 0] = points % 2
        kinds += [compressed(mask), uncompressed(mask)]
    raw["annotations"] = [
        shape | {"id": number, "segmentation": kind} for number, kind in enumerate(kinds, start=1)
    ]
    masks = dataset(tmp_path, raw)[1][1]["masks"].numpy()
    truth = reference_coco.COCO(tmp_path / "annotations" / "instances_train2017.json")
    assert len(masks) == len(kinds) == 40
    for number, mask in enumerate(masks, start=1):
        np.testing.assert_array_equal(mask, truth.annToMask(truth.anns[number]))


def test_a_box_without_a_segmentation_is_its_own_mask(tmp_path: Path) -> None:
    for absent in (None, [], {}):
        target = dataset(tmp_path, edited(segmentation=absent, bbox=[-5, 30, 25, 99]))[0][1]
        np.testing.assert_array_equal(target["masks"][0].numpy(), box_mask(0, 30, 20, 10))


def test_an_image_without_annotations_has_an_empty_target(tmp_path: Path) -> None:
    target = dataset(tmp_path, content())[2][1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert target["area"].shape == target["iscrowd"].shape == (0,)


def test_missing_optional_keys_have_defaults(tmp_path: Path) -> None:
    """The area is that of the mask, as in COCO; of the box where that is the mask."""
    target = dataset(tmp_path, edited(iscrowd=None, area=None))[0][1]
    assert target["iscrowd"][0] == 0
    assert target["area"][0] == target["masks"][0].sum() == pytest.approx(200, abs=25)
    runs = compressed(box_mask(10, 5, 7, 3))
    assert dataset(tmp_path, edited(area=None, segmentation=runs))[0][1]["area"][0] == 21
    assert dataset(tmp_path, edited(area=None, segmentation=None))[0][1]["area"][0] == 400


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    target = dataset(tmp_path, edited(bbox=[-5.0, 30.0, 200.0, 20.0]))[0][1]
    assert target["boxes"][0].tolist() == [0, 30, WIDTH, HEIGHT]


def test_ground_truth_is_what_the_evaluation_takes(tmp_path: Path) -> None:
    data = dataset(tmp_path, content())
    before = data[0][1]
    truth = COCO(data.ground_truth())
    assert sorted(truth.imgs) == [11, 12, 13]
    assert sorted(truth.anns) == [1, 2, 3, 4]
    assert sorted(truth.cats) == [7, 90]
    after = data[0][1]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("first_id", [0, 1, 500])
@pytest.mark.parametrize("segmented", [True, False])
def test_the_annotations_themselves_score_everything(
    tmp_path: Path, first_id: int, segmented: bool
) -> None:
    raw = content()
    for number, annotation in enumerate(raw["annotations"]):
        annotation["id"] = first_id + number
        if not segmented:
            del annotation["segmentation"]
    data = dataset(tmp_path, raw)
    evaluator = CocoEvaluator(data)
    for _, target in data:
        sure = target["iscrowd"] == 0
        found = {key: target[key][sure] for key in ("boxes", "labels")}
        found["scores"] = torch.ones(len(found["labels"]))
        found["masks"] = target["masks"][sure][:, None].float()
        evaluator.update([found], [target])
    figures = evaluator.compute()
    assert figures["box"]["AP"] == pytest.approx(100)
    # The crowd alone has a mask of its own.
    assert figures["mask"]["AP"] == (pytest.approx(100) if segmented else None)


@pytest.mark.parametrize("bad", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2]], ids=str)
def test_polygons_of_fewer_than_three_points_are_left_out(tmp_path: Path, bad: list[int]) -> None:
    """As detectron2 leaves them out, and an annotation that has no other."""
    plain = dataset(tmp_path, content())[0][1]
    data = dataset(tmp_path, edited(segmentation=[bad, TRIANGLE]))
    assert torch.equal(data[0][1]["masks"], plain["masks"])
    assert data.ground_truth()["annotations"][0]["segmentation"] == [TRIANGLE]
    assert sum("(annotations 1); the polygon is left out" in line for line in remarks([data])) == 1
    data = dataset(tmp_path, edited(segmentation=[bad]))
    assert data[0][1]["labels"].tolist() == [1, 1]
    assert [a["area"] for a in data.ground_truth()["annotations"]] == [48, 150, 144]
    assert any(
        "without a valid polygon (annotations 1); the annotation" in line
        for line in remarks([data])
    )


def test_fingerprint_follows_the_annotation_file(tmp_path: Path) -> None:
    first = dataset(tmp_path, content()).fingerprint
    assert dataset(tmp_path, content()).fingerprint == first
    assert dataset(tmp_path, edited(area=201.0)).fingerprint != first


@pytest.mark.parametrize(
    "box",
    [
        [10, 5, 0, 20],
        [10, 5, 20, 0],
        [10, 5, -3, 20],
        [10, 5, 3, -20],
        [99, 5, 10, 10],
        [-10, 5, 10, 10],
        [5, HEIGHT, 10, 10],
    ],
)
def test_a_box_without_area_is_refused_or_dropped(tmp_path: Path, box: list[float]) -> None:
    message = refused(tmp_path, edited(bbox=box))
    assert "annotation 1 " in message
    assert str(box) in message
    assert "degenerate_boxes=drop" in message
    data = dataset(tmp_path, edited(bbox=box), degenerate_boxes="drop")
    assert data[0][1]["labels"].tolist() == [1, 1]
    assert [a["area"] for a in data.ground_truth()["annotations"]] == [48, 150, 144]
    (line,) = [line for line in remarks([data]) if "annotation is left out" in line]
    assert "box without area in the image (annotations 1); the annotation is left out" in line


def test_an_image_whose_boxes_are_all_dropped_is_empty(tmp_path: Path) -> None:
    raw = content()
    raw["annotations"][3]["bbox"] = [0, 0, 0, 12]
    data = dataset(tmp_path, raw, degenerate_boxes="drop")
    assert data[1][1]["boxes"].shape == (0, 4)
    assert data.instances(1) == 0
    assert any("image without annotations (images 12, 13)" in line for line in remarks([data]))


def test_another_way_with_degenerate_boxes_is_refused(tmp_path: Path) -> None:
    assert "did you mean 'drop'" in refused(tmp_path, content(), degenerate_boxes="dropp")


def broken(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The data with the value at `path` replaced, or removed where it is None."""
    data = copy.deepcopy(content())
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


SIZE = [HEIGHT, WIDTH]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("images",), None, ["images"]),
        (("annotations",), None, ["annotations"]),
        (("categories",), None, ["categories"]),
        (("categories",), [], ["categories"]),
        (("images",), {"id": 1}, ["images"]),
        (("images", 1), 5, ["images[1]"]),
        (("images", 1, "height"), None, ["images[1]", "height"]),
        (("images", 1, "file_name"), None, ["images[1]", "file_name"]),
        (("categories", 0, "name"), None, ["categories[0]", "name"]),
        (("annotations", 2, "image_id"), None, ["annotations[2]", "image_id"]),
        (("annotations", 2, "bbox"), [float("nan"), 2, 3, 4], ["annotation 3"]),
        (("annotations", 2, "bbox"), [float("inf"), 2, 3, 4], ["annotation 3"]),
        (("annotations", 2, "bbox"), [10**400, 2, 3, 4], ["annotation 3"]),
        (("annotations", 2, "bbox"), "1\n2", ["annotations[2]", "bbox"]),
        (("annotations", 2, "bbox"), ["1\n2", 2, 3, 4], ["annotation 3"]),
        (("images", 1, "id"), 11, ["image 11 ", "twice"]),
        (("categories", 1, "id"), 90, ["categories id 90 ", "twice"]),
        (("images", 1, "id"), "12a", ["images[1]", "'12a'", "whole number"]),
        (("images", 1, "id"), 12.5, ["images[1]", "12.5", "whole number"]),
        (("images", 1, "id"), True, ["images[1]", "True", "whole number"]),
        (("images", 1, "height"), 10**9, ["image 12 ", "1000000000x60"]),
        (("images", 1, "id"), [12], ["images[1]", "[12]", "whole number"]),
        (("images", 1, "height"), "forty", ["images[1]", "'forty'"]),
        (("images", 1, "height"), 0, ["image 12 ", "0x60"]),
        (("images", 1, "file_name"), 12, ["images[1]", "12", "text"]),
        (("categories", 0, "id"), "cat", ["categories[0]", "'cat'"]),
        (("annotations", 2, "image_id"), {"id": 11}, ["annotations[2]", "image_id"]),
        (("annotations", 2, "category_id"), [7], ["annotations[2]", "category_id"]),
        (("annotations", 2, "iscrowd"), "no", ["annotation 3", "'no'"]),
        (("annotations", 2, "area"), float("nan"), ["annotation 3", "area nan"]),
        (("annotations", 2, "area"), 10**400, ["annotation 3", "area 1000"]),
        (("annotations", 2, "area"), "big", ["annotation 3", "area 'big'"]),
        (("annotations", 0, "segmentation"), [[float("nan"), *TRIANGLE[1:]]], ["nan"]),
        (("annotations", 0, "segmentation"), [[10**400, *TRIANGLE[1:]]], ["annotation 1"]),
        (("annotations", 0, "segmentation"), [TRIANGLE, [None]], ["annotation 1", "None"]),
        (("annotations", 0, "segmentation"), [None, TRIANGLE], ["annotation 1", "None"]),
        (
            ("annotations", 0, "segmentation"),
            [[1e9, *TRIANGLE[1:]]],
            ["annotation 1", "1000000000"],
        ),
        (("annotations", 2, "segmentation", "size"), SIZE[::-1], ["annotation 3", "[60, 40]"]),
        (("annotations", 2, "segmentation", "size"), None, ["annotation 3", "[40, 60]"]),
        (("annotations", 2, "segmentation", "counts"), 2400, ["annotation 3", "counts"]),
        (("annotations", 2, "segmentation", "counts"), None, ["annotation 3", "counts"]),
        (("annotations", 2, "segmentation"), "polygon", ["annotation 3"]),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_named(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, named: list[str]
) -> None:
    message = refused(tmp_path, broken(path, value))
    assert "instances_train2017.json" in message
    for part in named:
        assert part in message


@pytest.mark.parametrize("text", ["", "[" * 100_000, json.dumps(content())[:400]])
def test_truncated_json_is_named(tmp_path: Path, text: str) -> None:
    assert "instances_train2017.json is not valid JSON" in refused(tmp_path, text)


def test_malformed_json_names_the_line(tmp_path: Path) -> None:
    message = refused(tmp_path, '{"images": [\n  {"id": 1,,}\n]}')
    assert "instances_train2017.json is not valid JSON" in message
    assert "line 2 column" in message
    assert "a list, as files of detections are; annotations are" in refused(tmp_path, "[1, 2]")
    assert "holds no object" in refused(tmp_path, "7")
    lines = "\n".join(json.dumps(image) for image in content()["images"])
    assert "not lines of objects" in refused(tmp_path, lines)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    write(tmp_path, content()).write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(InputError, match=r"instances_train2017\.json is not valid JSON"):
        CocoDataset(tmp_path, "train2017")


def test_a_missing_split_names_those_there(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    path.with_name("instances_minitrain.json").write_text("{}")
    with pytest.raises(InputError, match=r"instances_val2017\.json .*: minitrain, train2017$"):
        CocoDataset(tmp_path, "val2017")


def test_a_folder_without_annotations_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances_val2017\.json .*: none$"):
        CocoDataset(tmp_path, "val2017")
    (tmp_path / "annotations" / "instances_val2017.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot read .*instances_val2017\.json: Is a directory"):
        CocoDataset(tmp_path, "val2017")


def test_run_lengths_and_sizes_as_whole_floats_are_read(tmp_path: Path) -> None:
    mask = box_mask(10, 5, 20, 20)
    plain = uncompressed(mask)
    floats = {name: [float(value) for value in values] for name, values in plain.items()}
    first, second = (
        dataset(tmp_path, edited(segmentation=one))[0][1]["masks"] for one in (plain, floats)
    )
    assert torch.equal(first, second)
    halves = {**plain, "counts": [count + 0.5 for count in plain["counts"]]}
    assert "counts" in refused(tmp_path, edited(segmentation=halves))


@pytest.mark.parametrize("counts", ["0", "zz", "S5a0g", "é", "", "o" * 40])
def test_a_malformed_compressed_mask_is_named(tmp_path: Path, counts: str) -> None:
    message = refused(tmp_path, broken(("annotations", 2, "segmentation", "counts"), counts))
    assert "instances_train2017.json: annotation 3 " in message
    assert "run-length mask" in message


def test_detectron2_s_variable_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert default_root() is None
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert default_root() is None
    write(tmp_path / "coco", content())
    assert default_root() == tmp_path / "coco"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", "~")
    assert default_root() == tmp_path / "coco"
    monkeypatch.setenv("DETECTRON2_DATASETS", "~nobody_of_this_name")
    assert default_root() is None


def test_packed_objects_come_out_as_they_went_in() -> None:
    objects: list[Any] = [{"a": [1.5, "b"]}, [], None, content()]
    packed = Packed(objects)
    assert list(packed) == objects
    assert packed[-1] == objects[-1]
    assert len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_what_one_reader_does_to_a_target_another_does_not_see(tmp_path: Path) -> None:
    data = dataset(tmp_path, content())
    entry, annotations = data.entry(0)
    entry.clear()
    annotations.clear()
    data.ground_truth()["annotations"].clear()
    assert len(data[0][1]["boxes"]) == 3


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    write(tmp_path, content())
    (tmp_path / "train2017" / "12.png").unlink()
    with pytest.raises(InputError, match=r"image 12 .*12\.png"):
        CocoDataset(tmp_path, "train2017")


def test_images_in_subfolders_are_found(tmp_path: Path) -> None:
    write(tmp_path, content())
    (tmp_path / "train2017" / "a").mkdir()
    (tmp_path / "train2017" / "12.png").rename(tmp_path / "train2017" / "a" / "12.png")
    data = dataset(tmp_path, broken(("images", 1, "file_name"), "a/12.png"))
    assert int(data[1][0][0, 0, 0]) == 12


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    data = dataset(tmp_path, content())
    path = tmp_path / "train2017" / "12.png"
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(InputError, match=r"12\.png") as caught:
        data[1]
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"12\.png"):
        remarks([data])


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, content())
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "train2017" / "12.png")
    with pytest.raises(InputError, match=rf"12\.png.*{HEIGHT + 1}x{WIDTH}.*{HEIGHT}x{WIDTH}"):
        data[1]


def test_an_image_too_large_to_be_one_is_named(tmp_path: Path) -> None:
    data = dataset(tmp_path, content())
    header = b"P6 100000 100000 255\n"
    (tmp_path / "train2017" / "12.png").write_bytes(header + bytes(300))
    with pytest.raises(InputError, match=r"cannot read image .*12\.png"):
        data[1]


def test_an_image_beyond_pillow_s_limit_is_read_where_the_list_says_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path, content())
    monkeypatch.setattr(images, "_MOST_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data[1][0].shape == (3, HEIGHT, WIDTH)
    Image.new("RGB", (2 * WIDTH, 2 * HEIGHT)).save(tmp_path / "train2017" / "12.png")
    with pytest.raises(InputError, match=r"cannot read image .*12\.png: .*exceeds limit"):
        data[1]


def put(root: Path, image: Image.Image, name: str, **options: Any) -> torch.Tensor:
    """The image as the data set reads it, from a file of this name; no warning may come of it."""
    write(root, content())
    image.save(root / "train2017" / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dataset(root, broken(("images", 1, "file_name"), name))[1][0]


def picture(mode: str) -> Image.Image:
    """Red on the left, white on the right; light grey for red in modes without colour."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, WIDTH // 2, HEIGHT))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("P", "odd.png"),
        ("P", "odd.gif"),
        ("RGBA", "odd.png"),
        ("CMYK", "odd.tif"),
        ("CMYK", "odd.jpg"),
        ("YCbCr", "odd.jpg"),
    ],
)
def test_other_modes_of_colour_become_rgb(tmp_path: Path, mode: str, name: str) -> None:
    pixels = put(tmp_path, picture(mode), name).int()
    assert pixels.shape == (3, HEIGHT, WIDTH)
    # JPEG's rounding, and its blocks across the edge, aside.
    expected = torch.from_numpy(np.asarray(picture("RGB"), dtype=np.int32)).permute(2, 0, 1)
    away = (pixels - expected).abs()[:, :, torch.arange(WIDTH).sub(WIDTH // 2).abs() > 12]
    assert int(away.max()) <= (6 if name.endswith("jpg") else 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_images_become_rgb(tmp_path: Path, mode: str) -> None:
    pixels = put(tmp_path, picture(mode), "odd.png")
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    assert int(pixels[:, :, -1].min()) == 255


@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_a_transparent_palette_is_read_without_its_transparency(
    tmp_path: Path, transparency: int | bytes
) -> None:
    pixels = put(tmp_path, picture("P"), "odd.png", transparency=transparency)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels[:, 0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
@pytest.mark.parametrize("top", [65535, 200])
def test_deep_grey_is_scaled(tmp_path: Path, name: str, top: int) -> None:
    """A dark image stays dark: the scale is the depth's, not the content's."""
    values = np.linspace(0, top, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    pixels = put(tmp_path, Image.fromarray(values), name)
    for channel in pixels.numpy():
        np.testing.assert_allclose(channel, values / 257.0, atol=0.5)


def test_deep_grey_whose_white_is_0_is_no_negative(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    white_is_zero = {262: 0}
    image = Image.fromarray(65535 - values)
    pixels = put(tmp_path, image, "negative.tif", tiffinfo=white_is_zero)
    np.testing.assert_allclose(pixels[0], values / 257.0, atol=0.5)


@pytest.mark.parametrize(
    "values", [np.full((HEIGHT, WIDTH), 0.5, np.float32), np.full((HEIGHT, WIDTH), -1, np.int32)]
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"cannot read image .*odd\.tif: .*8 or 16 bit"):
        put(tmp_path, Image.fromarray(values), "odd.tif")


@pytest.mark.parametrize("depth", [8, 16])
def test_deep_channels_in_planes_of_their_own_are_refused(tmp_path: Path, depth: int) -> None:
    """Pillow takes each byte of theirs for a pixel."""
    value, size = 255 if depth == 8 else 65535, HEIGHT * WIDTH * depth // 8
    header = 8 + 2 + 9 * 12 + 4
    more = header + 18
    tags = [
        *((256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (258, 3, 3, header), (259, 3, 1, 1)),
        *((262, 3, 1, 2), (273, 4, 3, header + 6), (277, 3, 1, 3), (279, 4, 3, more)),
        (284, 3, 1, 2),
    ]
    raw = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    raw += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    raw += struct.pack(
        "<3H3I3I", *[depth] * 3, *(more + 12 + size * c for c in range(3)), *[size] * 3
    )
    kind = np.uint8 if depth == 8 else np.uint16
    planes = [np.full((HEIGHT, WIDTH), value * on, kind).tobytes() for on in (1, 0, 1)]
    path = tmp_path / "planes.tif"
    path.write_bytes(raw + b"".join(planes))
    if depth == 8:
        assert images.read(path).pixels[:, 3, 5].tolist() == [255, 0, 255]
    else:
        with pytest.raises(InputError, match="16 bits a channel in planes of their own"):
            images.read(path)


def test_pixels_that_pillow_reads_as_other_values_are_refused(tmp_path: Path) -> None:
    signed = tmp_path / "signed.tif"
    pixels = Image.new("L", (WIDTH, HEIGHT), 255)
    pixels.save(signed, tiffinfo={339: 1})
    assert images.read(signed).pixels.max() == 255
    pixels.save(signed, tiffinfo={339: 2})
    with pytest.raises(InputError, match="signed pixels of 8 bits are not read"):
        images.read(signed)
    said = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": WIDTH, "NAXIS2": HEIGHT}
    header = "".join(f"{f'{key:<8}= {value:>20}':<80}" for key, value in said.items())
    sky = tmp_path / "sky.fits"
    sky.write_bytes(f"{header}{'END':<80}".ljust(2880).encode() + bytes(2880))
    with pytest.raises(InputError, match="FITS of more than 8 bits is not read"):
        images.read(sky)


@pytest.mark.parametrize("deep", [True, False])
def test_deep_colour_of_any_format_is_known(tmp_path: Path, deep: bool) -> None:
    values = np.full((HEIGHT, WIDTH, 3), 40, ">u2" if deep else np.uint8)
    (tmp_path / "a.ppm").write_bytes(
        b"P6 %d %d %d\n" % (WIDTH, HEIGHT, 65535 if deep else 255) + values.tobytes()
    )
    assert images.read(tmp_path / "a.ppm").cut == deep
    picture("RGB").save(tmp_path / "a.jp2")
    raw = bytearray((tmp_path / "a.jp2").read_bytes())
    raw[raw.index(b"ihdr") + 14] = 15 if deep else 7
    (tmp_path / "a.jp2").write_bytes(raw)
    assert images.read(tmp_path / "a.jp2").cut == deep


@pytest.mark.parametrize("name", ["turned.png", "turned.jpg", "turned.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    """The top of the scene is white and so is its left edge; the file holds it turned."""
    scene = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    scene[:8], scene[:, :16] = 255, 128
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.T,
        6: scene.T[::-1],
        7: scene.T[::-1, ::-1],
        8: scene.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    pixels = put(tmp_path, image, name, exif=exif)
    assert pixels.shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(pixels[0].int(), scene, atol=3 if name.endswith("jpg") else 0)


def test_malformed_exif_does_not_hide_the_pixels(tmp_path: Path) -> None:
    malformed = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff"
    image = picture("RGB")
    write(tmp_path, content())
    image.save(tmp_path / "train2017" / "odd.jpg", exif=malformed)
    data = dataset(tmp_path, broken(("images", 1, "file_name"), "odd.jpg"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert data[1][0].shape == (3, HEIGHT, WIDTH)


def test_the_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(InputError, match=r"turned\.jpg is 60x40 .*without its EXIF orientation"):
        put(tmp_path, picture("RGB"), "turned.jpg", exif=exif)


@pytest.mark.detectron2
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "P", "RGBA", "CMYK"])
def test_images_are_those_of_detectron2(tmp_path: Path, mode: str) -> None:
    from detectron2.data.detection_utils import read_image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    name = "odd.jpg" if mode == "CMYK" else "odd.png"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / name
        Image.fromarray(pixels).convert(mode).save(path, exif=exif)
        expected = read_image(str(path), format="RGB")
        assert torch.equal(images.read(path).pixels, torch.tensor(expected).permute(2, 0, 1))


def test_deep_images_are_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((WIDTH, HEIGHT), dtype=np.uint16)
    stored[:, :10] = 65535
    pixels = put(tmp_path, Image.fromarray(stored), "turned.png", exif=exif)
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert int(pixels[0, :10].min()) == 255
    assert int(pixels[0, 10:].max()) == 0
