"""The generated data set: the same from the same arguments, and as varied as COCO."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from bench.data import generated
from bench.data.check import remarks
from bench.data.coco import CocoDataset
from bench.errors import InputError

# pycocotools' own, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COUNT = 120
FEW = {"train_images": 4, "val_images": 2}


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def annotations(root: Path, split: str = "train2017") -> list[dict[str, Any]]:
    text = (root / "annotations" / f"instances_{split}.json").read_text()
    return json.loads(text)["annotations"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated") / "many"
    return generated.generate(root, seed=0, train_images=COUNT, val_images=20)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first = generated.generate(tmp_path / "a", seed=3, **FEW)
    second = generated.generate(tmp_path / "b", seed=3, **FEW)
    assert digests(first) == digests(second)


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    first = digests(generated.generate(tmp_path / "a", seed=3, **FEW))
    second = digests(generated.generate(tmp_path / "b", seed=4, **FEW))
    images = [name for name in first if name.endswith(".jpg")]
    assert len(images) == 6
    assert all(first[name] != second[name] for name in images)


def test_splits_share_no_image(many: Path) -> None:
    found = digests(many)
    train = {digest for name, digest in found.items() if name.startswith("train2017")}
    val = {digest for name, digest in found.items() if name.startswith("val2017")}
    assert len(train) == COUNT
    assert len(val) == 20
    assert not train & val


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = digests(generated.generate(tmp_path / "a", seed=5, train_images=2, val_images=2))
    more = digests(generated.generate(tmp_path / "b", seed=5, train_images=5, val_images=3))
    assert all(more[name] == few[name] for name in few if name.endswith(".jpg"))


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    root = generated.generate(tmp_path / "a", **FEW)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert generated.generate(root, **FEW) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_other_arguments_replace_it(tmp_path: Path) -> None:
    root = generated.generate(tmp_path / "a", seed=0, **FEW)
    generated.generate(root, seed=1, **FEW)
    assert digests(root) == digests(generated.generate(tmp_path / "b", seed=1, **FEW))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make the `call`-th call of a function end as Ctrl-C or a kill would."""
    function, calls = getattr(owner, name), []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


def test_an_interrupted_run_leaves_nothing_and_is_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a"
    with monkeypatch.context() as patch:
        interrupt(patch, generated, "_draw", 4)
        with pytest.raises(KeyboardInterrupt):
            generated.generate(root, **FEW)
    assert not root.exists()
    generated.generate(root, **FEW)
    assert digests(root) == digests(generated.generate(tmp_path / "b", **FEW))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_replacement_stopped_between_two_names_is_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    root = generated.generate(tmp_path / "a", seed=0, **FEW)
    before = digests(root)
    with monkeypatch.context() as patch:
        interrupt(patch, Path, "replace", call)
        with pytest.raises(KeyboardInterrupt):
            generated.generate(root, seed=1, **FEW)
    # Never a part of a data set under its name.
    assert not root.exists() or digests(root) == before
    assert digests(generated.generate(root, seed=0, **FEW)) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["a"]


def test_a_replacement_stopped_while_deleting_has_the_new_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = generated.generate(tmp_path / "a", seed=0, **FEW)
    with monkeypatch.context() as patch:
        interrupt(patch, shutil, "rmtree", 3)
        with pytest.raises(KeyboardInterrupt):
            generated.generate(root, seed=1, **FEW)
    assert digests(root) == digests(generated.generate(tmp_path / "b", seed=1, **FEW))
    assert digests(generated.generate(root, seed=1, **FEW)) == digests(tmp_path / "b")


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    (root / "train2017" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"coco holds 'train2017', which is not generated data"):
        generated.generate(root, **FEW)
    assert (root / "train2017" / "mine.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["", "[1]", '{"mine": 1}', "\x00"])
def test_another_file_of_the_mark_s_name_is_no_mark(tmp_path: Path, text: str) -> None:
    root = tmp_path / "a"
    root.mkdir()
    (root / "generated.json").write_text(text)
    with pytest.raises(InputError, match=r"holds 'generated\.json', which is not generated data"):
        generated.generate(root, **FEW)
    assert (root / "generated.json").read_text() == text


def test_a_file_beside_the_data_keeps_it_from_being_replaced(tmp_path: Path) -> None:
    root = generated.generate(tmp_path / "a", seed=0, **FEW)
    (root / "notes.txt").write_text("mine")
    assert generated.generate(root, seed=0, **FEW) == root
    before = digests(root)
    with pytest.raises(InputError, match=r"holds 'notes\.txt', which is not generated data"):
        generated.generate(root, seed=1, **FEW)
    assert digests(root) == before


def test_a_file_in_the_folder_s_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    for root in (tmp_path / "a", tmp_path / "a" / "data"):
        with pytest.raises(InputError, match=r"cannot write generated data to .*: Not a directory"):
            generated.generate(root, **FEW)
    assert (tmp_path / "a").read_text() == "mine"


def test_an_empty_folder_and_the_working_folder_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    expected = digests(generated.generate(tmp_path / "b", **FEW))
    assert digests(generated.generate(tmp_path / "link", **FEW)) == expected
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    generated.generate(".", **FEW)
    assert digests(tmp_path / "c") == expected


def test_a_disk_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        generated.generate(tmp_path / "a", **FEW)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"train_images": 0}, "0 and 2 images"),
        ({"val_images": -1}, "4 and -1 images"),
        ({"image_size": (8, 160)}, "8x160"),
        ({"seed": -1}, "-1"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        generated.generate(tmp_path / "a", **FEW | wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(96, 64), (150, 201)])
def test_another_image_size(tmp_path: Path, size: tuple[int, int]) -> None:
    root = generated.generate(tmp_path / "a", image_size=size, train_images=12, val_images=1)
    data = CocoDataset(root, "train2017")
    assert {data.size(index) for index in range(12)} == {size}
    assert all(image.shape == (3, *size) for image, _ in data)
    assert_consistent(data, range(12))


def test_classes_are_shapes_by_the_longer_side_of_their_boxes(tmp_path: Path) -> None:
    root = generated.generate(
        tmp_path / "a", train_images=90, val_images=18, image_size=(64, 96), classes=True
    )
    for number, name in enumerate(generated.CLASSES):
        files = sorted((root / "train" / name).iterdir())
        assert [int(file.stem) for file in files] == list(range(number + 1, 91, 18))
        low, high = generated.SIDES[number % 3 : number % 3 + 2]
        for file in files:
            pixels = np.asarray(Image.open(file), dtype=float)
            # Objects are saturated, backgrounds greyish; JPEG spreads colours by two pixels.
            rows, columns = np.nonzero(np.ptp(pixels, axis=2) > 64)
            longer = 1 + max(np.ptp(rows), np.ptp(columns))
            assert 64 * low - 3 <= longer <= 64 * high + 3, file


def test_it_is_read_as_coco_without_a_real_warning(many: Path) -> None:
    for split in ("train2017", "val2017"):
        data = CocoDataset(many, split)
        assert [name for _, name in data.categories] == list(generated.SHAPES)
        # Crowds, and images with them only or nothing, are wanted; nothing else is odd.
        wanted = ("image with", "annotations are crowds")
        assert [x for x in remarks([data]) if not any(words in x for words in wanted)] == []


def test_all_sizes_classes_crowds_and_empty_images_occur(many: Path) -> None:
    found = annotations(many)
    areas = np.array([a["area"] for a in found if not a["iscrowd"]])
    small, large = areas < 32**2, areas >= 96**2
    assert small.mean() > 0.1
    assert large.sum() >= 1
    assert (~small & ~large).mean() > 0.3
    assert {a["category_id"] for a in found} == set(range(1, len(generated.SHAPES) + 1))
    crowds = {a["image_id"] for a in found if a["iscrowd"]}
    assert 2 <= len(crowds) < COUNT // 5
    with_any = {a["image_id"] for a in found}
    assert 0 < COUNT - len(with_any) < COUNT // 10
    assert all("counts" in a["segmentation"] for a in found if a["iscrowd"])
    polygons = [isinstance(a["segmentation"], list) for a in found if not a["iscrowd"]]
    assert np.mean(polygons) > 0.9


def test_some_objects_are_hidden_in_part(many: Path) -> None:
    data = CocoDataset(many, "train2017")
    overlapping = 0
    for index in range(60):
        boxes = data[index][1]["boxes"].numpy()
        for i in range(len(boxes)):
            for j in range(i):
                low, high = np.maximum(boxes[i], boxes[j])[:2], np.minimum(boxes[i], boxes[j])[2:]
                overlapping += bool((high > low).all())
    assert overlapping > 20


def assert_consistent(data: CocoDataset, indices: range) -> None:
    for index in indices:
        target = data[index][1]
        for box, area, mask in zip(target["boxes"], target["area"], target["masks"], strict=True):
            assert int(mask.sum()) == int(area) > 0
            x, y, width, height = reference.toBbox(reference.encode(np.asfortranarray(mask)))
            np.testing.assert_allclose(box, [x, y, x + width, y + height], atol=1.0)


def test_boxes_and_areas_are_those_of_the_masks(many: Path) -> None:
    assert_consistent(CocoDataset(many, "train2017"), range(COUNT))


def test_masks_hold_what_is_drawn_and_visible() -> None:
    holes = 0
    for index in range(COUNT):
        _, objects = generated._draw(np.random.default_rng([0, 0, index]), (128, 160))
        union = np.zeros((128, 160))
        for item in objects:
            annotation = generated._annotation(item)
            segmentation = annotation["segmentation"]
            holes += isinstance(segmentation, dict) and not item.crowd
            runs = reference.frPyObjects(segmentation, 128, 160)
            mask = reference.decode(reference.merge(runs) if isinstance(runs, list) else runs)
            visible = item.alpha > 0.5
            assert (mask != visible).sum() <= max(4, 0.1 * visible.sum())
            union += mask
        # Where an object lies on another, the mask of the one below leaves it out, edges aside.
        assert (union > 1).sum() <= 0.1 * max(union.sum(), 1)
    assert holes >= 1
