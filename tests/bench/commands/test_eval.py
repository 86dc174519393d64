"""`python -m bench eval`, from the command line to the figures."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps

from bench import cli, record
from bench.config.suites import build_config
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.data.images import to_float
from bench.data.split import labels_by_name
from bench.errors import InputError
from bench.model import weights
from bench.model.build import build_detector, model_section
from bench.run.bootstrap import LEVEL
from bench.run.checkpoints import Checkpoints
from bench.run.evaluate import CocoEvaluator
from bench.run.identity import identify
from tests import coco, mechanisms

ARCH = (
    "l1,h1,d8,n1,s1,g1,p4,f3,a1_l2,h2,d16,n1,s1,g1,p2,f3,a1_"
    "l3,h2,d16,n1,s1,g1,p2,f3,a1_l4,h4,d32,n1,s1,g0,p2,f3,a1"
)
DETECTOR = {
    "fpn_channels": 16,
    "head_width": 32,
    "mask_width": 16,
    "anchor_sizes": [8, 16, 32, 64, 96],
    "rpn_proposals": [200, 50],
    "rpn_proposals_test": [50, 20],
    "rpn_batch": 64,
    "roi_batch": 32,
    "detections": 10,
    "score_threshold": 0.0,
}
SIZES = {"min_sizes": [96], "max_size": 120}


def overrides(method="mask_rcnn"):
    """The settings of the detector, of those of Mask R-CNN where it is one."""
    theirs = () if method == "mask_rcnn" else ("head_", "mask_", "rpn_", "roi_")
    return [
        *(f"model.detector.{k}={v}" for k, v in DETECTOR.items() if not k.startswith(theirs)),
        *(f"data.{name}={value}" for name, value in SIZES.items()),
    ]


OVERRIDES = overrides()
CLASSES = 6
# Shared with the projection of the other tokens, unless share_weights is false.
GLOBAL = "backbone.bottom_up.layer1.1.attn.proj_global.weight"
detectron2 = pytest.param("detectron2", marks=pytest.mark.detectron2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "set", train_images=1, val_images=4)


def config_of(method="mask_rcnn", library="torchvision"):
    model = {"arch": ARCH, "method": method, "library": library, "detector": DETECTOR}
    return build_config({"row": "ViL", "model": model, "data": SIZES})


def detector_of(**options):
    torch.manual_seed(0)
    return build_detector(config_of(**options), CLASSES)


@pytest.fixture
def saved(tmp_path):
    """A function that writes the weights of a detector and returns the file."""

    def save(wrap=lambda state: {"model": state}, **options):
        path = tmp_path / "model_final.pth"
        torch.save(wrap(detector_of(**options).state_dict()), path)
        return path

    return save


def run(capsys, *arguments):
    code = cli.main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def evaluate(capsys, path, data, *arguments, method="mask_rcnn"):
    """The JSON that the command prints."""
    code, out, err = run(
        capsys, "--weights", path, "--data", data, "--arch", ARCH, "--format", "json",
        "--workers", 0, *arguments, *overrides(method),
    )  # fmt: skip
    assert code == 0, err
    return json.loads(out)


def by_hand(data, *, images=4, **options):
    """The figures of the same detector, without the command."""
    detector, split = detector_of(**options).eval(), CocoDataset(data, "val2017")
    evaluator = CocoEvaluator(split)
    for index in range(images):
        image, target = split[index]
        with torch.no_grad():
            evaluator.update(detector([to_float(image)]), [target])
    return evaluator.compute()


@pytest.mark.parametrize("library", ["torchvision", detectron2])
@pytest.mark.parametrize("method", ["mask_rcnn", "retinanet"])
def test_the_figures_are_those_of_the_detector_whose_names_the_weights_have(
    capsys, saved, data, method, library
):
    path = saved(method=method, library=library)
    result = evaluate(capsys, path, data, method=method)
    expected = by_hand(data, method=method, library=library)
    found = result["evaluation"]
    for name in ("box", "mask"):
        assert found[name] == pytest.approx(expected[name])
    assert found["box"]["AP"] < 2
    assert (found["mask"] is None) == (method == "retinanet")
    assert (found["split"], found["images"], found["unit"]) == ("val2017", 4, "percent")
    assert (result["model"]["library"], result["model"]["method"]) == (library, method)
    assert result["model"]["arch"] == ARCH
    assert len(result["weights_sha256"]) == 64


def test_a_detector_that_learnt_its_image_has_a_high_average_precision(capsys, tmp_path):
    pixels = np.full((48, 72, 3), 60, dtype=np.uint8)
    pixels[10:34, 20:50] = 220
    box = coco.annotation(1, 1, 4, [20, 10, 30, 24])
    coco.write(
        tmp_path, coco.content({4: "box"}, {1: (48, 72)}, [box]), lambda _: pixels, "val2017"
    )
    image, target = CocoDataset(tmp_path, "val2017")[0]
    torch.manual_seed(0)
    detector = build_detector(config_of(), 1)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(detector([to_float(image)], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    torch.save(detector.state_dict(), tmp_path / "learnt.pth")
    found = evaluate(capsys, tmp_path / "learnt.pth", tmp_path)["evaluation"]
    assert found["box"]["AP50"] == found["mask"]["AP50"] == pytest.approx(100)
    # Of one image nothing is known of others.
    assert found["box_interval"] is None


@pytest.mark.parametrize("method", ["mask_rcnn", "retinanet"])
def test_the_table_has_the_twelve_figures_and_the_interval(capsys, saved, data, method):
    code, out, err = run(
        capsys, "--weights", saved(method=method), "--data", data, "--arch", ARCH, "--workers", 0,
        *overrides(method),
    )  # fmt: skip
    assert code == 0
    table, _, rest = out.partition("{")
    header, _, *lines = table.splitlines()[2:]
    assert header.split() == [
        "%", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
    ]  # fmt: skip
    kinds = ["box", "mask"] if method == "mask_rcnn" else ["box"]
    assert [line.split()[0] for line in lines[: lines.index("")]] == kinds
    assert table.count(f"{LEVEL:.0%} interval") == len(kinds)
    assert max(map(len, table.splitlines())) <= 120
    assert "bootstrap" not in json.loads("{" + rest)["evaluation"]
    assert "Warning" not in err


def test_the_file_holds_all_draws(capsys, saved, data, tmp_path):
    output = tmp_path / "new" / "result.json"
    evaluate(capsys, saved(), data, "--output", output)
    result = json.loads(output.read_text())
    assert len(result["evaluation"]["bootstrap"]["box_AP"]) == 1000
    assert build_config(result["config"]).model.arch == ARCH
    assert [path.name for path in output.parent.iterdir()] == ["result.json"]


def test_the_first_images_alone(capsys, saved, data):
    result = evaluate(capsys, saved(), data, "--limit", 2, "--batch-size", 2)
    assert result["evaluation"]["images"] == 2
    assert result["evaluation"]["box"] == pytest.approx(by_hand(data, images=2)["box"])


def test_weights_of_a_model_in_parallel_are_its_own(capsys, saved, data, tmp_path):
    state = torch.load(saved(), weights_only=True)["model"]
    expected = by_hand(data, images=2)["box"]
    for before in ("module.", "module._orig_mod.", "model."):
        parallel = tmp_path / "parallel.pth"
        torch.save({"state_dict": {f"{before}{name}": state[name] for name in state}}, parallel)
        figures = evaluate(capsys, parallel, data, "--limit", 2)["evaluation"]["box"]
        assert figures == pytest.approx(expected)
    tensors = tmp_path / "tensors.safetensors"
    safetensors.torch.save_file(own_storages(state), tensors)
    figures = evaluate(capsys, tensors, data, "--limit", 2)["evaluation"]["box"]
    assert figures == pytest.approx(expected)
    tensors.write_bytes(tensors.read_bytes()[:100])
    code, _, err = run(capsys, "--weights", tensors, "--data", data)
    assert code == 2
    assert "is damaged, or no file of safetensors" in err


def own_storages(state):
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def test_weights_with_masks_and_counters_are_evaluated(capsys, data, tmp_path):
    row = mechanisms.write(
        tmp_path / "mine.py", imports="import itertools", does="x = x * self.mask + 0 * self.count"
    )
    source = (tmp_path / "mine.py").read_text()
    more = (
        "        self.register_buffer('mask', torch.ones(dim, dtype=torch.bool))\n"
        "        self.register_buffer('count', torch.zeros(1, dtype=torch.int32))\n"
    )
    head, tail = source.split("    def forward", 1)
    (tmp_path / "mine.py").write_text(f"{head.rstrip()}\n{more}\n    def forward{tail}")
    config = config_of()
    config = replace(config, model=replace(config.model, attention=row))
    path = tmp_path / "mine.pth"
    torch.save({"model": build_detector(config, CLASSES).state_dict()}, path)
    assert (
        "AP" in evaluate(capsys, path, data, "--attention", row, "--limit", 1)["evaluation"]["box"]
    )


def test_the_checkpoint_of_a_run_with_its_record(capsys, data, tmp_path):
    config = config_of()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save({"model": detector_of().state_dict(), "optimizer": {"state": {}}}, 40)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    made = record.of_run(config, key="abc", environment={}, model=model_section(config))
    written = record.write(made, tmp_path)
    arguments = ["--weights", path, "--record", written, "--data", data, "--workers", 0]
    code, out, _ = run(capsys, *arguments, "--format", "json")
    assert code == 0
    assert json.loads(out)["evaluation"]["box"] == pytest.approx(by_hand(data)["box"])
    # full and swin, for example, have weights of the same names and shapes.
    (note,) = (one for one in json.loads(out)["notes"] if one.startswith(str(path)))
    assert f"is not what the run of {written} kept" in note
    # Settings of the data are none of the detector.
    path = data / "annotations" / "instances_val2017.json"
    content = path.read_text()
    edited = json.loads(content)
    edited["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(edited))
    code, _, err = run(capsys, *arguments)
    assert (code, "data.degenerate_boxes=drop leaves such boxes out" in err) == (2, True)
    code, out, _ = run(capsys, *arguments, "data.degenerate_boxes=drop", "--format", "json")
    assert any("box without area" in one for one in json.loads(out)["notes"])
    path.write_text(content)
    code, _, err = run(capsys, *arguments, "--attention", "full", "seed=1")
    assert code == 2
    assert "leave out --attention, seed=1" in err


def test_images_trained_on_and_annotations_that_changed_are_said(capsys, data, saved, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    weights_ = saved()
    evaluation = evaluate(capsys, weights_, root)["evaluation"]
    model = {"arch": ARCH, "detector": DETECTOR}
    config = build_config({"row": "ViL", "model": model, "data": SIZES | {"path": str(root)}})
    sections = {"model": model_section(config), "evaluation": evaluation}
    environment = {"inputs": identify(config).inputs}
    made = record.of_run(config, key="a", environment=environment, **sections)
    written = record.write(made, tmp_path)

    def notes(*more):
        arguments = ["--weights", weights_, "--record", written, "--workers", 0]
        code, out, err = run(capsys, *arguments, *more, "--format", "json")
        assert code == 0, err
        found = json.loads(out)["notes"]
        return [any(words in x for x in found) for words in ("was evaluated on", "trained on: AP")]

    assert notes() == [False, False]
    assert notes("--split", "train2017") == [False, True]
    image = next((root / "val2017").iterdir())
    kept = image.read_bytes()
    with Image.open(image) as opened:
        ImageOps.mirror(opened).save(image)
    assert notes() == [True, False]
    image.write_bytes(kept)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../train2017/" + next((root / "train2017").iterdir()).name
    path.write_text(json.dumps(content))
    assert notes() == [True, True]
    # Where files are named, the record's data is not needed.
    moved = shutil.move(root, tmp_path / "moved")
    files = ["--val", moved / path.relative_to(root), "--images", moved / "val2017"]
    assert notes(*files) == [False, False]


def test_classes_are_matched_by_name_or_refused():
    trained = ((1, "red"), (2, "blue"))
    assert labels_by_name(trained, ((1, "red"), (2, "blue"))) is None
    assert labels_by_name(trained, ((5, "blue"), (7, "red"))) == [2, 1]
    assert labels_by_name(trained, ((5, "red"), (7, "blue"))) == [1, 2]
    for own in (((1, "cat"), (2, "dog")), ((1, "red"),), ((1, "red"), (2, "red")), ()):
        with pytest.raises(InputError, match="trained on 1 'red', 2 'blue'; the data has"):
            labels_by_name(trained, own)


def broken_detector(place, method="mask_rcnn"):
    detector = detector_of(method=method)
    parts = {
        "backbone": lambda: (
            detector.vil.layer1.patch_embed.proj.weight
            if hasattr(detector.vil.layer1, "patch_embed")
            else next(detector.vil.parameters())
        ),
        "box head": lambda: detector.roi_heads.box_predictor.cls_score.weight,
        "rpn": lambda: detector.rpn.head.bbox_pred.weight,
        "retinanet head": lambda: detector.head.classification_head.cls_logits.weight,
    }
    with torch.no_grad():
        parts[place]().fill_(float("nan"))
    return detector


@pytest.mark.parametrize(
    ("place", "method"),
    [
        ("backbone", "mask_rcnn"),
        ("box head", "mask_rcnn"),
        ("rpn", "mask_rcnn"),
        ("retinanet head", "retinanet"),
    ],
)
def test_images_of_values_that_are_not_finite_are_counted(capsys, data, tmp_path, place, method):
    path = tmp_path / "broken.pth"
    torch.save(broken_detector(place, method).state_dict(), path)
    result = evaluate(capsys, path, data, "--batch-size", 3, method=method)
    assert result["evaluation"]["not_finite"] == 4
    *_, spoilt, few = result["notes"]
    assert "val2017: 4 of 4 images gave values that are not finite" in spoilt
    assert few.endswith("intervals of mAP, and rows told apart by it, of 4 images say little")


def test_one_image_of_values_that_are_not_finite_is_counted_alone(capsys, saved, data, monkeypatch):
    read = CocoDataset.read

    def spoilt(dataset, index, **options):
        image, target = read(dataset, index, **options)
        return (torch.full(image.shape, float("nan")) if index == 2 else image), target

    monkeypatch.setattr(CocoDataset, "read", spoilt)
    result = evaluate(capsys, saved(), data, "--batch-size", 4)
    assert result["evaluation"]["not_finite"] == 1


def without(*names):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(names)}


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            without("roi_heads.mask_predictor.conv5_mask"),
            "the backbone fits, .* 2 missing: roi_heads.mask_predictor.conv5_mask.weight, roi_head",
        ),
        (lambda state: state | {"extra": torch.zeros(1)}, "1 unexpected: extra"),
        (
            lambda state: state | {"backbone.bottom_up.norm.bias": torch.zeros(3)},
            r"the backbone is another one .*1 misshapen: .*norm.bias \(3,\) instead of \(32,\)",
        ),
        (without("backbone.fpn", "rpn", "roi_heads"), "they are of a backbone alone"),
        (lambda _: {"something": torch.zeros(1)}, "they are of no detector"),
        (lambda _: {"model": {}}, "no state dict in it"),
        (
            lambda own: {"model": own, "model_ema": {f"module.{name}": own[name] for name in own}},
            "several state dicts of the same names, model, model_ema",
        ),
        (
            lambda own: {"model": own, "ema": {"shadow": dict([*own.items()][9:])}},
            "several state dicts of the same names, model, ema.shadow",
        ),
        (
            lambda own: own | {GLOBAL: own[GLOBAL] + 1},
            rf"was built; 1 shared here \(share_weights\), but different in the file: {GLOBAL}$",
        ),
        (
            lambda own: {n: t.to(torch.float8_e5m2) for n, t in own.items()},
            "float8_e5m2; dense floats",
        ),
        (lambda own: {name: own[name].to("meta") for name in own}, "has no values; dense"),
        (
            lambda own: {name: own[name].to(torch.int8) for name in own},
            r"of other numbers: .* torch\.int8 instead of torch\.float32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(refusal, saved, data, wrap, message):
    given = ["--weights", saved(wrap), "--data", data, "--arch", ARCH, *OVERRIDES]
    assert re.search(message, refusal(cli.main, "eval", *given))


def test_weights_that_do_not_fit_change_nothing():
    detector = detector_of()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(InputError, match="1 unexpected: extra"):
        weights.load_detector(detector, other | {"extra": torch.zeros(1)})
    assert all(torch.equal(tensor, before[n]) for n, tensor in detector.state_dict().items())
    weights.load_detector(detector, other)
    assert all(torch.equal(tensor, other[n]) for n, tensor in detector.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "yaml"], "--format: unknown value 'yaml'"),
        (["--attention", "all"], "--attention: 'all' is many rows"),
        (["--arch", ARCH, "--position", "relative"], "leave out --position"),
        (["--split", "test"], "splits there: train2017, val2017"),
        (["--data", "/nowhere"], "no data folder /nowhere"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth: no such file"),
        (["--output", "/"], "--output / is a folder"),
        (["--record", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--method", "retinanet"], "they are of a torchvision mask_rcnn"),
    ],
)
def test_wrong_input_is_one_line(refusal, saved, data, arguments, message):
    err = refusal(cli.main, "eval", "--weights", saved(), "--data", data, *arguments)
    assert message in err
    assert err.startswith("python -m bench eval: error: ")


def test_without_data_both_ways_to_name_it_are_said(refusal, saved, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    err = refusal(cli.main, "eval", "--weights", saved())
    assert "--data" in err
    assert "DETECTRON2_DATASETS" in err


def test_an_output_that_cannot_be_written_is_one_line(capsys, saved, data, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(
        capsys, "--weights", saved(), "--data", data, "--arch", ARCH, "--workers", 0,
        "--output", tmp_path / "file" / "result.json", *OVERRIDES,
    )  # fmt: skip
    assert code == 2
    assert f"cannot write {tmp_path}" in err
