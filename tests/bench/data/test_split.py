"""What a run is given: data that is checked before it costs time, and images to measure on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record
from bench.config.schema import RunConfig
from bench.config.suites import load_suite
from bench.data import split as inputs
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.errors import InputError
from bench.run import runner
from bench.run.identity import identify


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data") / "set", train_images=2, val_images=8)


def run_of(*overrides: str) -> RunConfig:
    return load_suite("quick", rows=["ViL"], overrides=overrides).runs[0]


def test_profile_images_have_the_size_asked_for_and_their_boxes_fit(root: Path) -> None:
    images, targets = inputs.profile_batch(CocoDataset(root, "val2017"), (96, 192), 3)
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (3, 96, 192)
        assert target["masks"].shape[1:] == (96, 192)
        assert len(target["boxes"]) > 0
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - box).abs().max() < 3


def relisted(root: Path, place: Path, categories: Callable[[list], list]) -> RunConfig:
    """A run on a copy of the data whose val2017 lists other categories."""
    shutil.copytree(root, place)
    path = place / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = categories(content["categories"])
    known = {category["id"] for category in content["categories"]}
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]
    path.write_text(json.dumps(content))
    return run_of(f"data.path={place}", "train.steps=1")


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        (lambda old: old[1:], "only train2017 has 1 'disc'; both"),
        (lambda old: [*old, {"id": 9, "name": "ring"}], "only val2017 has 9 'ring'; both"),
        (
            lambda old: [{"id": 1, "name": "ring"}, *old[1:]],
            "only train2017 has 1 'disc'; only val2017 has 1 'ring'; both",
        ),
        (lambda old: [c | {"id": c["id"] + 10} for c in old], "5 'cross' and 1 more; only val2017"),
    ],
)
def test_splits_of_other_categories_are_one_clear_line(
    root: Path, tmp_path: Path, categories: Callable[[list], list], said: str
) -> None:
    config = relisted(root, tmp_path / "data", categories)
    with pytest.raises(InputError) as caught:
        inputs.check_data([config], tmp_path)
    assert f"{tmp_path / 'data'}: the categories of val2017 are not those of train2017: " in str(
        caught.value
    )
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("split", "section", "said"),
    [
        ("train2017", "annotations", "no image has an instance to train on"),
        ("val2017", "annotations", "no image has an instance to evaluate with"),
        ("val2017", "images", "no image has an instance to evaluate with"),
    ],
)
def test_a_split_without_an_instance_is_refused_before_anything_runs(
    root: Path, tmp_path: Path, split: str, section: str, said: str
) -> None:
    config = relisted(root, tmp_path / "data", lambda old: old)
    path = tmp_path / "data" / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": [], section: []}))
    with pytest.raises(InputError, match=rf"instances_{split}\.json: {said}"):
        inputs.check_data([config], tmp_path)


def test_the_order_of_categories_and_what_else_is_said_of_them_may_differ(
    root: Path, tmp_path: Path
) -> None:
    config = relisted(
        root, tmp_path / "data", lambda old: [c | {"supercategory": "x"} for c in reversed(old)]
    )
    inputs.check_data([config], tmp_path)


def test_training_on_the_images_of_the_tables_is_said(root: Path, tmp_path: Path) -> None:
    config = relisted(root, tmp_path / "data", lambda old: old)
    same = replace(config, data=replace(config.data, train_split="val2017"))
    said = [inputs.check_data([one], tmp_path)[:1] for one in (config, same)]
    assert ["is trained on and fills the tables" in line for (line,) in said] == [False, True]


def test_training_on_generated_images_of_the_tables_is_said(root: Path) -> None:
    config = run_of("evaluate.splits=[train2017]")
    lines = inputs.remarks(config, inputs.open_splits(config, root))
    said = "train2017 is trained on and fills the tables: its mAP says nothing of other images"
    assert lines == [said]
    config = run_of()
    assert inputs.remarks(config, inputs.open_splits(config, root)) == []


def test_more_objects_than_detections_are_said(root: Path, tmp_path: Path) -> None:
    config = relisted(root, tmp_path / "data", lambda old: old)
    split = CocoDataset(tmp_path / "data", "val2017")
    most = max(split.instances(index) for index in range(len(split)))
    detector = config.model.detector
    few, enough = (
        replace(config, model=replace(config.model, detector=replace(detector, detections=n)))
        for n in (most - 1, most)
    )
    said = f"objects (model.detector.detections), up to {most}; the others count as missed"
    for one, times in ((few, 1), (enough, 0)):
        lines = inputs.check_data([one], tmp_path)
        assert [f"more than {most - 1} {said}" in line for line in lines].count(True) == times
        assert len(inputs.undetected(one, [split])) == times


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ({"min_sizes": (8,), "max_size": 12}, "data.min_sizes=[8] data.max_size=12"),
        ({"fixed_size": (8, 8)}, "data.fixed_size=[8, 8]"),
        ({"min_sizes": (8, 192)}, ""),
    ],
)
def test_objects_of_few_pixels_are_said(root: Path, sizes: dict[str, Any], given: str) -> None:
    config = run_of()
    config = replace(config, data=replace(config.data, **sizes))
    lines = inputs.undetected(config, [CocoDataset(root, "val2017")])
    said = f"objects have less than 4 pixels a side at {given}, the median"
    assert [said in line for line in lines] == [True] * bool(given)


def test_classes_that_are_evaluated_and_never_trained_on_are_said(
    root: Path, tmp_path: Path
) -> None:
    config = relisted(root, tmp_path / "data", lambda old: [*old, {"id": 7, "name": "ring"}])
    for split, ids in (("train2017", [1]), ("val2017", [1, 2])):
        path = tmp_path / "data" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": id_, "name": f"class {id_}"} for id_ in (1, 2, 3)]
        for place, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = ids[place % len(ids)]
        path.write_text(json.dumps(content))
    lines = inputs.check_data([config], tmp_path)
    (line,) = [line for line in lines if "never trained on" in line]
    assert "instances_val2017.json: classes of which train2017 has no instance" in line
    assert ": 'class 2'; never" in line


def test_a_run_compares_the_categories_too(root: Path, tmp_path: Path) -> None:
    config = relisted(root, tmp_path / "data", lambda old: old[1:])
    with pytest.raises(InputError, match="only train2017 has 1 'disc'"):
        runner.run(config, output=tmp_path / "out")


@pytest.mark.parametrize("when", ["before", "while it trains", "while it is evaluated"])
def test_no_record_is_of_files_that_were_put_in_the_place_of_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    shutil.copytree(root, tmp_path / "data")
    config = run_of(
        f"data.path={tmp_path / 'data'}", "train.steps=1", "train.batch_size=1",
        "evaluate.splits=[val2017]", "evaluate.bootstrap=0", "profile.enabled=false",
    )  # fmt: skip
    split = "val2017" if when == "while it is evaluated" else "train2017"
    annotations = tmp_path / "data" / "annotations" / f"instances_{split}.json"
    identity, before = identify(config), annotations.read_bytes()

    def put(*_: Any) -> None:
        annotations.write_bytes(before + b"\n")

    def put_first(name: str) -> None:
        usual = getattr(runner.Run, name)
        monkeypatch.setattr(runner.Run, name, lambda *given: (put(), usual(*given))[1])

    if when == "before":
        put()
    else:
        put_first("fit" if split == "train2017" else "score")
    output = tmp_path / "out"
    with pytest.raises(InputError, match=f"changed while the command ran: data {split}; give it"):
        runner.run(config, output=output, identity=identity)
    (entry,) = record.read_all(output.glob("records/*.json"))
    assert entry.status == "failed"
    # Weights of other images are not kept under the name of these.
    assert any(output.rglob("*.pth")) == (split == "val2017")
    assert not any(output.rglob("step-*.pt")) or split == "val2017"
    monkeypatch.undo()
    annotations.write_bytes(before)
    assert runner.run(config, output=output, identity=identity).status == "done"


def test_no_checkpoint_is_of_files_that_were_replaced_for_a_while(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "data")
    config = run_of(
        f"data.path={tmp_path / 'data'}", "train.steps=3", "train.batch_size=1",
        "train.checkpoint_every=1", "evaluate.splits=[val2017]", "evaluate.bootstrap=0",
        "profile.enabled=false",
    )  # fmt: skip
    annotations = tmp_path / "data" / "annotations" / "instances_train2017.json"
    before = annotations.read_bytes()

    def put(_: float, doing: str) -> None:
        if "step 1 of" in doing:
            annotations.write_bytes(before + b"\n")

    output = tmp_path / "out"
    with pytest.raises(InputError, match="changed while the command ran: data train2017"):
        runner.run(config, output=output, options=runner.Options(progress=put))
    assert [path.name[:13] for path in output.rglob("step-*.pt")] == ["step-00000001"]
    annotations.write_bytes(before)
    again = runner.run(config, output=output)
    undisturbed = runner.run(config, output=tmp_path / "other")
    assert (again.training or {})["resumed"] == 1
    assert (again.training or {})["losses"] == (undisturbed.training or {})["losses"]


def test_a_record_says_what_was_misread_and_of_which_classes_it_is(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "data")
    for split in ("train2017", "val2017"):
        path = tmp_path / "data" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[1, 2, 3, 4]]
        for annotation in content["annotations"][:1]:
            annotation["segmentation"] = []
        path.write_text(json.dumps(content))
    config = run_of(
        f"data.path={tmp_path / 'data'}", "train.steps=1", "train.batch_size=1",
        "evaluate.splits=[val2017]", "evaluate.bootstrap=0", "profile.enabled=false",
    )  # fmt: skip
    result = runner.run(config, output=tmp_path / "out")
    left_out = [note for note in result.notes if "annotation without a valid polygon" in note]
    assert ["val2017" in note for note in left_out] == [True, False]
    assert result.training is not None
    assert result.training["classes"][0] == [1, "disc"]
    assert result.evaluation is not None
    assert result.evaluation["not_finite"] == 0
    assert result.evaluation["mask"]["AP"] is None
    assert any("no annotation has a segmentation" in note for note in result.notes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["device=cuda:99"], "cuda:99"),
        (["device=cpu", "train.precision=16-mixed"], "16-mixed needs a GPU"),
        (["data.train_split=train1999"], "train1999"),
    ],
)
def test_a_mistake_found_before_any_row_is_an_input_error(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    small = "data.generated={seed: 0, train_images: 2, val_images: 1, image_size: [128, 160]}"
    with pytest.raises(InputError, match=said):
        inputs.check_data([run_of(*overrides, small)], tmp_path)
