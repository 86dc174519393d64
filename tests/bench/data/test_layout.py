"""Exports as they come: where their files are, and how their numbers and names are written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.config.schema import RunConfig
from bench.config.suites import load_suite
from bench.data import split as inputs
from bench.data.check import check
from bench.data.coco import CocoDataset
from bench.data.fingerprint import fingerprint
from bench.data.generated import generate
from bench.data.layout import splits
from bench.errors import InputError
from tests.coco import assert_same

Files = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("source") / "set", train_images=3, val_images=2)


def content(source: Path, split: str) -> Files:
    loaded: Files = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
    return loaded


def named(data: Files, prefix: str) -> Files:
    images = [i | {"file_name": prefix + i["file_name"]} for i in data["images"]]
    return data | {"images": images}


def run_of(**data: str) -> RunConfig:
    overrides = [f"data.{name}={value}" for name, value in data.items()]
    overrides.append("evaluate.splits=[val2017]")
    return load_suite("quick", rows=["ViL"], overrides=overrides).runs[0]


def roboflow(source: Path, root: Path, folder: str = "") -> None:
    for split, name in (("train2017", "train"), ("val2017", "valid")):
        shutil.copytree(source / split, root / name / folder)
        (root / name / "_annotations.coco.json").write_text(json.dumps(content(source, split)))


@pytest.mark.parametrize("folder", ["", "images"])
def test_roboflow_s_tree_is_read_as_it_is(source: Path, tmp_path: Path, folder: str) -> None:
    roboflow(source, tmp_path, folder)
    if folder:
        # Others of the same names, farther away.
        shutil.copytree(source / "train2017", tmp_path / "images")
    assert splits(tmp_path) == ("train", "valid")
    for split, name in (("train2017", "train"), ("val2017", "valid")):
        found = CocoDataset(tmp_path, split)
        assert_same(found, CocoDataset(source, split))
        assert_same(CocoDataset(tmp_path, name), found)
        assert found.tally.lines("x") == [
            f"x: {split} is read from {name}/_annotations.coco.json; used as {split}"
        ]
    config = run_of(path=str(tmp_path))
    assert any("valid/" in line for line in inputs.check_data([config], tmp_path))


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [
        ("images", ""),
        ("images/default", ""),
        ("images", "images/"),
        ("images", "images\\"),
        ("images", "C:\\Users\\me\\images\\"),
        ("images", "/data/upload/7/"),
        ("default", "./"),
    ],
)
def test_cvat_and_label_studio_files_are_found(
    source: Path, tmp_path: Path, folder: str, prefix: str
) -> None:
    shutil.copytree(source / "val2017", tmp_path / folder)
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_default.json"
    path.write_text(json.dumps(named(content(source, "val2017"), prefix)))
    found = CocoDataset(tmp_path, "default")
    assert_same(found, CocoDataset(source, "val2017"))
    told = found.tally.counts["image file of another path"]
    assert told == (len(found) if prefix not in ("", "./") else 0) or "images" in prefix


def test_any_file_and_folder_can_be_named(source: Path, tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        shutil.copytree(source / split, tmp_path / "pictures" / split)
        data = named(content(source, split), f"{split}/")
        (tmp_path / f"{split}-export.json").write_text(json.dumps(data))
    files = {
        "train_file": str(tmp_path / "train2017-export.json"),
        "val_file": str(tmp_path / "val2017-export.json"),
    }
    config = run_of(**files, images=str(tmp_path / "pictures"))
    assert config.data.path == str(tmp_path)
    training, val = inputs.open_splits(config, inputs.data_root(config, tmp_path))
    assert_same(training, CocoDataset(source, "train2017"))
    assert_same(val, CocoDataset(source, "val2017"))
    assert any("val2017 is read from" in line for line in inputs.remarks(config, [training, val]))
    (report,) = check(Path(files["val_file"]), pictures=tmp_path / "pictures")
    assert (report.split, report.images, report.errors) == ("val2017-export", len(val), ())
    # FiftyOne's.
    shutil.copytree(source / "val2017", tmp_path / "export" / "data")
    labels = tmp_path / "export" / "labels.json"
    labels.write_text(json.dumps(content(source, "val2017")))
    assert_same(CocoDataset(labels.parent, "x", file=labels), val)
    with pytest.raises(InputError, match=r"no data folder .*nowhere"):
        CocoDataset(tmp_path, "x", file=Path(files["val_file"]), images=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.json: No such file"):
        CocoDataset(tmp_path, "x", file=tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val.json", "images/val2017"),
        ("annotations/val.json", "images/val"),
        ("annotations/valid.json", "images"),
        ("export/val.json", "export/val"),
    ],
)
def test_images_are_found_near_a_named_file(
    source: Path, tmp_path: Path, file: str, folder: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(json.dumps(content(source, "val2017")))
    shutil.copytree(source / "val2017", tmp_path / folder)
    # Of the same names, as of every split that is numbered from 1.
    shutil.copytree(source / "train2017", tmp_path / "images" / "train2017")
    (report,) = check(path)
    assert report.errors == ()
    found = CocoDataset(path.parent, path.stem, file=path)
    assert_same(found, CocoDataset(source, "val2017"))


@pytest.mark.parametrize("folder", ["images", "data", "val"])
def test_names_of_another_system_are_found_in_any_folder_near(
    source: Path, tmp_path: Path, folder: str
) -> None:
    shutil.copytree(source / "val2017", tmp_path / folder)
    data = content(source, "val2017")
    data["images"][0]["file_name"] = data["images"][0]["file_name"].upper()
    (tmp_path / "val.json").write_text(json.dumps(data))
    found = CocoDataset(tmp_path, "x", file=tmp_path / "val.json")
    assert_same(found, CocoDataset(source, "val2017"))
    # In a folder that exports put images in, a whole name is no other path.
    told = found.tally.counts["image file of another path"]
    assert told == (len(found) if folder == "val" else 1)


def test_images_may_have_an_address_in_place_of_a_name(source: Path, tmp_path: Path) -> None:
    """As in LVIS's own files."""
    shutil.copytree(source, tmp_path / "set")
    data = content(source, "val2017")
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    path = tmp_path / "set" / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(data))
    found = CocoDataset(tmp_path / "set", "val2017")
    assert_same(found, CocoDataset(source, "val2017"))
    before = fingerprint(found.place) or {}
    image = next((tmp_path / "set" / "val2017").iterdir())
    image.write_bytes(image.read_bytes() + b" ")
    after = fingerprint(found.place) or {}
    assert before["pixels"] != after["pixels"]


def test_a_split_that_is_not_there_names_those_that_are_and_how(source: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train_file=FILE.*there: train2017, val2017"):
        CocoDataset(source, "default")


def written_as(value: Any, write: Any) -> Any:
    keys = ("id", "image_id", "category_id", "height", "width", "iscrowd")
    if isinstance(value, dict):
        return {k: write(v) if k in keys else written_as(v, write) for k, v in value.items()}
    return [written_as(v, write) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("write", [str, float, lambda value: f" {value:05}"])
def test_whole_numbers_may_be_written_as_texts_or_fractions(
    source: Path, tmp_path: Path, write: Any
) -> None:
    shutil.copytree(source, tmp_path / "set")
    path = tmp_path / "set" / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(written_as(content(source, "val2017"), write)))
    found = CocoDataset(tmp_path / "set", "val2017")
    assert_same(found, CocoDataset(source, "val2017"))
    (line,) = [x for x in found.tally.lines("x") if "written as" in x]
    assert "taken as a whole number" in line


@pytest.mark.parametrize("shift", [-10, 1_700_000_000_000_000_000, 2**63, 2**70])
def test_ids_of_any_size_are_names(source: Path, tmp_path: Path, shift: int) -> None:
    shutil.copytree(source, tmp_path / "set")
    data = content(source, "val2017")
    for image in data["images"]:
        image["id"] += shift
    for annotation in data["annotations"]:
        annotation["image_id"] += shift
    path = tmp_path / "set" / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(data))
    found = CocoDataset(tmp_path / "set", "val2017")
    assert [id_ - shift for id_ in found.ids] == [1, 2]
    keys = [int(target["image_id"]) for _, target in found]
    assert keys == (list(found.ids) if shift < 2**62 else [1, 2])
    assert {i["id"] for i in found.ground_truth()["images"]} == set(keys)
    assert {a["image_id"] for a in found.ground_truth()["annotations"]} <= set(keys)


def test_the_first_images_alone(source: Path) -> None:
    found = CocoDataset(source, "train2017")
    found.limit(1)
    assert len(found) == len(found.ids) == len(list(found)) == 1
    assert len(found.ground_truth()["images"]) == 1
    assert found.num_annotations == len(found.entry(0)[1])
