"""Annotation files with anything wrong in them: one clear line, or read with every change said."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from bench.data.coco import CocoDataset
from bench.data.findings import Finding
from bench.errors import InputError
from tests import coco

HEIGHT, WIDTH = 24, 32


def square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    return mask


def content() -> dict[str, Any]:
    """Three images; polygons of one part and of two, both kinds of run lengths, a crowd."""
    runs = reference.encode(square(3, 3, 9))
    segmentations: list[Any] = [
        [[4, 4, 14, 4, 14, 14, 4, 14]],
        [[2.5, 2, 9, 2, 9, 8], [12, 12, 20, 12, 20, 20, 12, 20]],
        {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()},
        {"size": [HEIGHT, WIDTH], "counts": [50, 6, HEIGHT * WIDTH - 56]},
    ]
    found = [
        coco.annotation(10, 1, 3, [4, 4, 10, 10], segmentation=segmentations[0]),
        coco.annotation(11, 1, 9, [2.5, 2, 17.5, 18], area=84.5, segmentation=segmentations[1]),
        coco.annotation(12, 2, 9, [3, 3, 9, 9], segmentation=segmentations[2]),
        coco.annotation(13, 2, 3, [2, 2, 1, 6], iscrowd=1, segmentation=segmentations[3]),
    ]
    return coco.content({3: "a", 9: "b"}, dict.fromkeys((1, 2, 5), (HEIGHT, WIDTH)), found)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in the file."""
    found = [path] if path else []
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            found += places(value, (*path, key))
    return found


ODDITIES = (
    None, True, False, 0, 1, -1, 3, -7, 0.5, 12.0, 1e-9, -0.0, 5e-324, 1e9, -1e9, 2**31, 2**53 + 1,
    2**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), float("-inf"), "", "3", "12", " 7 ",
    "1e3", "x", "x\ny", "\u0663", "1.png", "../2.png", "a\0b", "n" * 300, [], {}, [[]], [1, 2],
    [[1, 2], [3, 4], [5, 9]], [[[1, 2], [13, 4], [5, 9]]], {"size": [1, 1], "counts": "0"},
    [2, 2, 9, 2, 9, 8], [[2, 2, 9, 9]],
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The content after one to three changes: dropped, retyped, doubled, reordered, nested."""
    data: dict[str, Any] = content()
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data)))
        parent: Any = data
        for key in path[:-1]:
            parent = parent[key]
        value = parent[path[-1]]
        change = draw(
            st.sampled_from(("set", "set", "drop", "text", "nest", "negate", "float", "move"))
        )
        if change == "set":
            parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODDITIES)))
        elif change == "drop":
            del parent[path[-1]]
        elif change == "text":
            parent[path[-1]] = str(value)
        elif change == "nest":
            parent[path[-1]] = draw(st.sampled_from(([value], {"value": value}, [[value]])))
        elif change == "negate" and number(value) and abs(value) < 2**53:
            parent[path[-1]] = draw(st.sampled_from((-value, 1e6 * value, value + 0.5, value - 3)))
        elif change == "float" and number(value) and abs(value) < 2**53:
            parent[path[-1]] = float(value)
        elif change == "move" and isinstance(parent, list):
            parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(value))
            if draw(st.booleans()):
                parent.reverse()
    return data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutated")
    shape = (HEIGHT, WIDTH, 3)
    coco.write(root, content(), lambda image: np.full(shape, image["id"], dtype=np.uint8))
    return root


def opened(root: Path, data: Any, **options: Any) -> CocoDataset | str:
    """The data set, or the one line that refuses it."""
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    try:
        return CocoDataset(root, "train2017", degenerate_boxes="drop", **options)
    except InputError as error:
        return str(error)


def plain(value: Any) -> Any:
    """What stands for a whole number: itself, a text of it, or it with a fraction of zero."""
    if isinstance(value, str) and value.strip().lstrip("+-").isascii():
        return int(value)
    return int(value) if isinstance(value, float) else value


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mask_of(segmentation: Any) -> np.ndarray:
    if isinstance(segmentation, list):
        parts = reference.frPyObjects(segmentation, HEIGHT, WIDTH)
        return reference.decode(reference.merge(parts))
    if isinstance(segmentation["counts"], list):
        segmentation = reference.frPyObjects(segmentation, HEIGHT, WIDTH)
    return reference.decode(segmentation)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@settings(max_examples=1500)
@given(data=mutated())
def test_a_mutated_file_is_refused_in_one_line_or_read_as_it_says(
    root: Path, data: dict[str, Any]
) -> None:
    dataset = opened(root, data)
    # Whoever collects all findings gets an error for what stops the other; never a traceback.
    found: list[Finding] = []
    opened(root, data, report=found.append)
    assert any(f.is_error for f in found) == isinstance(dataset, str)
    assert all("\n" not in f.text and len(f.text) < 800 for f in found)
    if isinstance(dataset, str):
        assert "\n" not in dataset
        assert len(dataset) < 800
        return
    left_out = {f.annotation for f in found if f.left_out and "polygon is" not in str(f.handled)}
    told: Counter[str] = dataset.tally.counts
    assert told == Counter(f.kind for f in found)
    assert len(dataset) == len(data["images"])
    assert dataset.num_annotations + len(left_out) == len(data["annotations"])
    about = {f.annotation for f in found if f.annotation is not None}
    given_ = {plain(raw["id"]): raw for raw in data["annotations"]}
    categories = sorted(plain(raw["id"]) for raw in data["categories"])
    for index in range(len(dataset)):
        entry, annotations = dataset.entry(index)
        try:
            _, target = dataset[index]
        except InputError:
            # The file is of another size than the list says.
            assert (entry["height"], entry["width"]) != (HEIGHT, WIDTH)
            continue
        for place, annotation in enumerate(annotations):
            raw = given_[annotation["id"]]
            assert plain(raw["image_id"]) == entry["id"]
            assert target["labels"][place] == categories.index(plain(raw["category_id"])) + 1
            assert target["iscrowd"][place] == int(raw.get("iscrowd") or 0)
            x, y, w, h = (float(value) for value in raw["bbox"])
            box = np.clip([x, y, x + w, y + h], 0, [WIDTH, HEIGHT] * 2)
            np.testing.assert_allclose(target["boxes"][place], box, rtol=1e-5, atol=1e-4)
            if raw.get("area") is not None:
                area = float(target["area"][place])
                np.testing.assert_allclose(area, float(raw["area"]), rtol=1e-6, atol=1e-30)
            if annotation["id"] not in about:
                mask = target["masks"][place].numpy()
                np.testing.assert_array_equal(mask, mask_of(raw["segmentation"]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_changes_nothing(root: Path, encoding: str) -> None:
    plain_ = opened(root, content())
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(content()), encoding=encoding)
    marked = CocoDataset(root, "train2017")
    assert isinstance(plain_, CocoDataset)
    assert marked.ground_truth() == plain_.ground_truth()


@pytest.mark.parametrize("annotation", [2, 3])
def test_a_size_of_run_lengths_may_have_a_fraction_of_zero(root: Path, annotation: int) -> None:
    data = content()
    plain_ = opened(root, data)
    data["annotations"][annotation]["segmentation"]["size"] = [float(HEIGHT), float(WIDTH)]
    dataset = opened(root, data)
    assert isinstance(plain_, CocoDataset)
    assert isinstance(dataset, CocoDataset)
    coco.assert_same(dataset, plain_)
