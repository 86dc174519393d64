"""Classifiers: trained, resumed, shared among processes, evaluated, and taken by --init."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch import nn

import run_all
from bench.cli import main
from bench.config.suites import load_suite
from bench.data import classes
from bench.data.check import class_remarks
from bench.data.generated import CLASSES, generate
from bench.data.split import check_data
from bench.errors import InputError
from bench.model.backbone import ViL
from bench.model.classifier import build_classifier, build_optimizer, rates, recipe
from bench.model.weights import load_file, load_origin
from bench.run.pretrain import evaluate
from bench.run.runner import Options, run
from bench.system.devices import make_fabric

# Everything random that pretraining has, in four steps.
TINY = [
    "train.steps=4",
    "train.batch_size=8",
    "train.checkpoint_every=1",
    "train.warmup_steps=1",
    "model.drop_path=0.2",
    "classify.augment=rand-m9-mstd0.5-inc1",
    "classify.erasing=0.25",
    "classify.mixup=0.8",
    "classify.cutmix=1.0",
    "classify.average=0.5",
    "data.generated.train_images=24",
    "data.generated.val_images=12",
]


def tiny(row="performer", *overrides):
    suite = load_suite("pretrain-quick", rows=[row], device="cpu", overrides=[*TINY, *overrides])
    return suite.runs[0]


def command(output, *words):
    return ["pretrain", "--device", "cpu", "--output", str(output), *words]


def pretrain(output, *words):
    return main(command(output, *words))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A row that was pretrained without a break: its folder and its record."""
    output = tmp_path_factory.mktemp("done")
    return output, run(tiny(), output=output)


class Guesses(nn.Module):
    """Draws its scores in evaluation, from everything that draws."""

    def forward(self, images):
        found = torch.rand(len(images), len(CLASSES)).argsort() + random.random()
        return found * torch.from_numpy(np.random.rand(*found.shape))  # noqa: NPY002


def test_what_draws_in_evaluation_has_the_same_figures_each_time(done):
    (root,) = (done[0] / "data").iterdir()
    split, config = classes.ClassDataset(root, "val"), tiny()
    fabric = make_fabric(config)
    found = [evaluate(Guesses(), split, config, fabric, lambda *_: None) for _ in range(3)]
    assert len({one["top5"] for one in found}) == 1
    others = replace(config, seed=1), replace(config, seed=2)
    found += [evaluate(Guesses(), split, one, fabric, lambda *_: None) for one in others]
    assert len({one["top1"] + one["top5"] for one in found}) > 1


def test_repeated_augmentation_is_that_of_timm(done):
    (root,) = (done[0] / "data").iterdir()
    images, _ = classes.open_splits(root)
    seen = {}
    for world in (1, 2):
        shares = [
            classes.training_batches(
                images,
                tiny("performer", "classify.repeats=3"),
                steps=3,
                start_step=0,
                rank=rank,
                world_size=world,
            )
            for rank in range(world)
        ]
        # Of an epoch the pixels of each image, process by process.
        seen[world] = [
            (int(target["image_id"]), pixels)
            for parts in zip(*shares, strict=True)
            for batch, targets in parts
            for pixels, target in zip(batch, targets, strict=True)
        ]
    counts = Counter(index for index, _ in seen[1])
    theirs = RepeatAugSampler(images, num_replicas=1, rank=0, num_repeats=3, selected_round=0)
    assert sorted(counts.values()) == sorted(Counter(theirs).values()) == [3] * 8
    for (one, pixels), (other, same) in zip(*seen.values(), strict=True):
        assert one == other
        assert torch.equal(pixels, same)
    index = seen[1][0][0]
    first, second, third = (pixels for one, pixels in seen[1] if one == index)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_record_and_weights(done):
    output, record = done
    assert (record.status, record.model["method"]) == ("done", "classifier")
    assert record.training["steps"] == 4
    assert [name for _, name in record.training["classes"]] == sorted(CLASSES)
    found = record.evaluation
    low, high = found["top1_interval"]["top1"]
    assert 0 <= low <= found["top1"] <= high <= 100
    assert found["top1"] <= found["top5"]
    assert found["images"] == 12
    state = load_file(output / "performer.pth")
    assert state["head.weight"].shape == (18, 128)
    assert "24 images" in load_origin(output / "performer.pth")
    # The moving average is kept, not the newest weights.
    assert run(tiny(), output=output).created == record.created


def test_epochs_decide_the_steps(tmp_path):
    words = [word for word in TINY if "steps" not in word]
    words += ["classify.epochs=1", "train.log_every=3"]
    suite = load_suite("pretrain-quick", rows=["identity"], device="cpu", overrides=words)
    record = run(suite.runs[0], output=tmp_path)
    assert record.training["steps"] == 24 // 8
    (log,) = (tmp_path / "logs").glob("*.log")
    assert "step 3 of 3:" in log.read_text()


def test_resumed_run_is_the_same_bit_by_bit(done, tmp_path):
    def stop(_share, doing):
        if "step 2 of" in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(), output=tmp_path, options=Options(progress=stop))
    record = run(tiny(), output=tmp_path)
    assert record.training["resumed"] == 1
    assert record.training["losses"] == done[1].training["losses"]
    expected = load_file(done[0] / "performer.pth")
    resumed = load_file(tmp_path / "performer.pth")
    assert all(resumed[name].equal(tensor) for name, tensor in expected.items())
    assert record.evaluation["top1"] == done[1].evaluation["top1"]


@pytest.mark.slow
def test_two_processes_do_what_one_does_in_two_parts(tmp_path):
    words = ["--attention", "performer", *TINY]
    assert pretrain(tmp_path / "parts", *words, "train.accumulate=2") == 0
    assert pretrain(tmp_path / "processes", *words, "--devices", "2") == 0
    one, two = (load_file(tmp_path / name / "performer.pth") for name in ("parts", "processes"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    records = [
        json.loads(next((tmp_path / name / "records").glob("*.json")).read_text())["evaluation"]
        for name in ("parts", "processes")
    ]
    assert records[0]["top5"] == records[1]["top5"]


def test_published_files_evaluate(done, tmp_path, capsys, refusal):
    output, record = done
    state = load_file(output / "performer.pth")
    file = tmp_path / "published.pth"
    torch.save({"net": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
    data = next((output / "data").glob("classes-*"))
    words = ["--eval", "--weights", str(file), "--attention", "performer", "--backbone", "quick"]
    words += ["--data", str(data), "--image-size", "64"]
    assert pretrain(tmp_path, *words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["evaluation"]
    assert (found["top1"], found["top5"]) == (
        record.evaluation["top1"],
        record.evaluation["top5"],
    )
    error = refusal(main, *command(tmp_path, *words[:-1], "96"), begun=True)
    assert "does not fit the classifier of 18 classes" in error


def test_the_file_of_a_row_is_of_the_run_that_was_asked_for(tmp_path, capsys):
    def weights(*more):
        assert pretrain(tmp_path, "--attention", "performer", *TINY, *more) == 0
        return (tmp_path / "performer.pth").read_bytes()

    first = weights()
    assert weights("train.lr=2e-3") != first
    # It has its record.
    assert weights() == first
    for file in (tmp_path / "weights").iterdir():
        file.unlink()
    weights("train.lr=2e-3")
    assert "may be of another run of performer" in " ".join(capsys.readouterr().out.split())


def test_options_of_the_run_are_those_of_its_weights(done, tmp_path, capsys):
    output, _ = done
    data = next((output / "data").glob("classes-*"))
    words = ["--eval", "--backbone", "quick", "--data", str(data), "--attention", "performer"]
    content = torch.load(output / "performer.pth", weights_only=True)
    content["settings"]["model.options"] = {"num_features": 16}
    content["settings"]["mechanism"] = dict.fromkeys(content["settings"]["mechanism"], "0")
    torch.save(content, tmp_path / "own.pth")
    # Features are a buffer, of another shape now.
    code = main(command(tmp_path, *words, "--weights", str(tmp_path / "own.pth")))
    assert code == 2
    assert "does not fit the classifier" in capsys.readouterr().err
    content["settings"] |= {"model.options": {}, "model.attention": "global"}
    torch.save(content, tmp_path / "own.pth")
    assert pretrain(tmp_path, *words, "--weights", str(tmp_path / "own.pth")) == 0
    notes = json.loads(capsys.readouterr().out.splitlines()[-1])["notes"]
    assert any("own run had model.attention=global (here performer)" in one for one in notes)
    assert any("changed since the weights were trained" in one for one in notes)


def test_classes_are_matched_by_name(done, tmp_path, capsys, refusal):
    output, record = done
    data = shutil.copytree(next((output / "data").glob("classes-*")), tmp_path / "data")
    weights = output / "performer.pth"
    words = ["--eval", "--attention", "performer", "--backbone", "quick", "--data", str(data)]
    words += ["--image-size", "64"]
    folders = sorted(one for one in (data / "val").iterdir() if [*one.iterdir()])
    shutil.rmtree(folders[0])
    torch.save({"net": load_file(weights)}, tmp_path / "net.pth")
    assert pretrain(tmp_path, *words, "--weights", str(tmp_path / "net.pth")) == 0
    by_order = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "was trained on are not known; taken for those of" in by_order["notes"][0]
    # The file that a run leaves has their names: no images to train on are needed.
    shutil.rmtree(data / "train")
    assert pretrain(tmp_path, *words, "--weights", str(weights)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "not known" not in str(found["notes"])
    assert found["evaluation"]["top1"] == by_order["evaluation"]["top1"]
    assert found["evaluation"]["images"] < record.evaluation["images"]
    folders[1].rename(data / "val" / "kuerbis")
    error = refusal(main, *command(tmp_path, *words, "--weights", str(weights)), begun=True)
    assert "no such class among those" in error
    assert "kuerbis" in error


def test_weights_are_evaluated_at_the_size_and_crop_of_their_run(done, tmp_path, capsys):
    """Or at those that are given; the line and the JSON say which."""
    output, record = done
    data = next((output / "data").glob("classes-*"))
    torch.save({"net": load_file(output / "performer.pth")}, tmp_path / "net.pth")
    words = ["--eval", "--attention", "performer", "--backbone", "quick", "--data", str(data)]
    seen = ("image_size", "crop_share")
    for weights, options, how, own in (
        (output / "performer.pth", [], "64x64, crop share 1; data.fixed_size and", 2),
        (output / "performer.pth", ["--image-size", "64"], "share 1; classify.crop_share of", 1),
        (output / "performer.pth", ["classify.crop_share=0.5"], "share 0.5; data.fixed_size of", 1),
        (output / "performer.pth", ["--schedule", "pretrain-quick"], "at 64x64, crop share 1\n", 0),
        (tmp_path / "net.pth", ["--image-size", "64"], "at 64x64, crop share 0.875\n", 0),
    ):
        assert pretrain(tmp_path, *words, "--weights", str(weights), *options) == 0
        out = capsys.readouterr().out
        assert how in out
        assert ("of the weights' own run" in out) == (own > 0)
        found = json.loads(out.splitlines()[-1])["evaluation"]
        same = [found[name] for name in seen] == [record.evaluation[name] for name in seen]
        assert same == ("share 1" in how)
        assert not same or found["top1"] == record.evaluation["top1"]


def test_evaluation_says_which_images_are_trained_on_too(done, tmp_path, capsys):
    output, _ = done
    data = shutil.copytree(next((output / "data").glob("classes-*")), tmp_path / "data")
    copied = next((data / "val").glob("*/*"))
    own = next((data / "train" / copied.parent.name).glob("*"))
    shutil.copy(own, copied)
    words = ["--eval", "--attention", "performer", "--backbone", "quick", "--data", str(data)]
    words += ["--weights", str(output / "performer.pth"), "data.workers=0"]
    assert pretrain(tmp_path, *words) == 0
    notes = json.loads(capsys.readouterr().out.splitlines()[-1])["notes"]
    (note,) = (note for note in notes if str(own) in note)
    assert str(copied) in note
    # An image of train that cannot be read is none of the evaluation's concern.
    own.write_bytes(b"none")
    assert pretrain(tmp_path, *words) == 0
    assert note not in json.loads(capsys.readouterr().out.splitlines()[-1])["notes"]


def test_suite_starts_from_what_it_pretrained(tmp_path, capsys):
    words = ["--rows", "performer", "--device", "cpu", "--output", str(tmp_path)]
    words += ["data.generated.train_images=8", "data.generated.val_images=4", "train.steps=2"]
    words += ["train.checkpoint_every=2", "profile.enabled=false", "evaluate.bootstrap=0"]
    words += ["--costs", "none", "--no-pictures"]
    words += ["--pretrain", "generated", *(f"pretrain.{setting}" for setting in TINY)]
    assert run_all.main([*words, "--dry-run"]) == 0
    assert "classifier" in capsys.readouterr().out
    assert run_all.main(words) == 0
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["model"]["pretrain"].startswith("generated images, 18 classes")
    (note,) = (note for note in record["notes"] if note.startswith("initialised from"))
    assert "start anew" not in note
    assert "generated images, 18 classes" in (tmp_path / "index.md").read_text()
    capsys.readouterr()
    assert run_all.main(words) == 0
    assert capsys.readouterr().out.count("0 of 1 rows to run") == 2


def test_recipe_is_that_of_deit():
    (config,) = load_suite("pretrain", rows=["performer"], data="somewhere").runs
    train = recipe(config, 1_281_167)
    assert (train.batch_size, train.lr, train.weight_decay) == (1024, 1e-3, 0.05)
    assert train.steps == round(300 * 1_281_167 / 1024)
    rate = rates(config, train)
    assert rate(0) == pytest.approx(1e-6)
    assert rate(train.warmup_steps) == pytest.approx(1e-3, rel=1e-3)
    assert rate(train.steps // 2) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-2)
    how = config.classify
    assert (how.mixup, how.cutmix, how.smoothing, how.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (how.augment, config.model.drop_path) == ("rand-m9-mstd0.5-inc1", 0.1)
    optimizer = build_optimizer(build_classifier(tiny(), 6), train)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    config = tiny()
    root = generate(
        tmp_path / "data", train_images=24, val_images=6, image_size=(64, 64), classes=True
    )
    train, val = classes.open_splits(root)
    assert sorted(label for _, label in val.samples) == list(range(6, 12))
    whole = list(classes.training_batches(train, config, steps=3, start_step=0))
    torch.manual_seed(9)
    (images, targets), _ = classes.training_batches(train, config, steps=3, start_step=1)
    assert all(a.equal(b) for a, b in zip(images, whole[1][0], strict=True))
    assert [int(t["label"]) for t in targets] == [int(t["label"]) for t in whole[1][1]]
    # Reading leaves the random state alone.
    assert torch.rand(1).equal(torch.rand(1, generator=torch.Generator().manual_seed(9)))
    file = sorted((root / "train").rglob("*.jpg"))[0]
    file.write_bytes(b"none")
    with pytest.raises(InputError, match=file.name):
        list(classes.training_batches(train, config, steps=3, start_step=0))


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def test_shards_that_were_joined_and_samples_of_two_images(tmp_path):
    one = [("0.png", png("red")), ("0.jpg", png("blue")), ("0.cls", b"0")]
    two = [("0.cls", b"1"), ("0.png", png("green"))]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shard(tmp_path / split / "a.tar", [*one, *two])
    found = classes.ClassDataset(tmp_path, "val")
    colours = [found.read(index)[0].getpixel((0, 0)) for index in range(len(found))]
    # The image that stands first among the kinds, whatever the order in the file.
    assert colours == [(0, 0, 255), (0, 128, 0)]
    assert [label for _, label in found.samples] == [0, 1]
    assert any("0.png is beside another image" in line for line in class_remarks([found], 255))
    joined = (tmp_path / "val" / "a.tar").read_bytes()
    (tmp_path / "val" / "a.tar").write_bytes(joined + joined)
    with pytest.raises(InputError, match=r"a.tar: more lies behind its end; join archives"):
        classes.ClassDataset(tmp_path, "val")


def test_an_average_that_is_mostly_of_the_start_is_said(tmp_path):
    for average, said in ((0.2, 0), (0.999, 1)):
        overrides = [*(one for one in TINY if "average" not in one), f"classify.average={average}"]
        suite = load_suite("pretrain-quick", rows=["identity"], device="cpu", overrides=overrides)
        notes = run(suite.runs[0], output=tmp_path / str(average)).notes
        assert sum("100% of the moving average" in note for note in notes) == said
        assert sum("of the moving average" in note for note in notes) == said


def test_what_a_classifier_calls_is_compiled(monkeypatch):
    """Not the forward pass of the backbone alone, which a classifier does not call."""
    compiled = []

    def note(function):
        compiled.append(function)
        return lambda vil, x: function(vil, x) + 1

    monkeypatch.setattr(torch, "compile", note)
    images = [torch.zeros(3, 64, 64)]
    config = tiny("identity", "model.compile=true")
    eager = replace(config, model=replace(config.model, compile=False))
    plain, other = (build_classifier(one, 3).eval() for one in (eager, config))
    assert ViL.classify in compiled
    with torch.no_grad():
        torch.testing.assert_close(other(images), plain(images) + 1)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_an_odd_number_of_images_cannot_be_mixed_in_pairs(name):
    def load(mixup, cutmix):
        overrides = [f"classify.mixup={mixup}", f"classify.cutmix={cutmix}"]
        overrides += ["train.batch_size=6", "train.accumulate=2"]
        return load_suite("pretrain-quick", rows=["full"], device="cpu", overrides=overrides)

    load(0, 0)
    with pytest.raises(
        InputError, match=rf"classify\.{name}=0\.5 mixes .* a part of a step has 3;"
    ):
        load(*(0.5 * (name == one) for one in ("mixup", "cutmix")))


def test_shards_beside_folders_and_the_folder_of_a_split_are_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(png("red" if split == "train" else "blue"))
    shard(tmp_path / "train" / "0.tar", [("0.png", png("red")), ("0.cls", b"0")])
    train, val = classes.open_splits(tmp_path)
    lines = class_remarks([train, val], 255)
    [line] = [line for line in lines if "0.tar" in line]
    assert line == f"{tmp_path / 'train'}: 0.tar is a shard beside folders of classes; left out"
    [line] = [line for line in lines if "read from" in line]
    assert line == f"{tmp_path / 'test'}: val is read from {tmp_path / 'test'}; used as val"


def test_labels_of_shards_that_count_from_one(tmp_path):
    for split, labels in (("train", (1, 2, 4)), ("val", (1, 2))):
        (tmp_path / split).mkdir()
        images = [(f"{number}.png", png("red")) for number in labels]
        numbers = [(f"{number}.cls", str(number).encode()) for number in labels]
        shard(tmp_path / split / "a.tar", images + numbers)
    train, val = classes.open_splits(tmp_path)
    number = "class number without an image"
    [line] = [line for line in class_remarks([train], 255) if number in line]
    assert f"2 of: {number} (0, 3)" in line
    assert not any(number in line for line in class_remarks([val], 255))


@pytest.fixture
def shards(tmp_path):
    """The same images in folders and in shards, two a split."""
    folders = generate(
        tmp_path / "folders", train_images=18, val_images=12, image_size=(64, 64), classes=True
    )
    for split in classes.open_splits(folders):
        files = [
            (f"images/{i:04}.{kind}", content)
            for i, ((path, *_), label) in enumerate(split.samples)
            for kind, content in (("cls", b"%d\n" % label), ("jpg", Path(path).read_bytes()))
        ]
        folder = tmp_path / "shards" / split.split
        folder.mkdir(parents=True)
        shard(folder / "set-0000.tar", files[:14])
        shard(folder / "set-0001.tar", [*files[14:], ("images/0000.json", b"{}")])
    return folders, tmp_path / "shards"


def test_shards_give_what_folders_give(shards):
    config = tiny("performer", "data.workers=1")
    found = []
    for root in shards:
        train, val = classes.open_splits(root)
        batches = [
            *classes.training_batches(train, config, steps=3, start_step=1),
            *classes.evaluation_batches(val, config),
        ]
        found.append([(images, [int(t["label"]) for t in targets]) for images, targets in batches])
    folders, shard_batches = found
    assert len(folders) == len(shard_batches) == 3
    for (images, labels), (others, same) in zip(folders, shard_batches, strict=True):
        assert labels == same
        assert all(a.equal(b) for a, b in zip(images, others, strict=True))


def test_shards_evaluate_as_folders(done, shards, capsys):
    said = []
    for root in shards:
        where = ["--data", str(root), "--backbone", "quick", "--attention", "performer"]
        sizes = ["data.fixed_size=[64,64]", "data.workers=0"]
        weights = ["--eval", "--weights", str(done[0] / "performer.pth")]
        assert pretrain(done[0], *weights, *where, *sizes) == 0
        said.append(capsys.readouterr().out.splitlines()[0])
    assert said[0] == said[1]
    assert "12 images of 18 classes" in said[0]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("a.jpg", b"x")], "a must be there as one of jpg, jpeg, png, webp, and as cls"),
        ([("a.cls", b"0")], "a must be there"),
        ([("a.txt", b"0")], "an image must be there"),
        ([("a.jpg", b"x"), ("a.cls", b"dog")], "'dog' in a cls file must be the number"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "'-1' in a cls file"),
        ([("a.jpg", b"x"), ("a.cls", b"18")], "no such class in train: 18"),
        (None, "cannot read shard"),
    ],
)
def test_wrong_shards_are_one_line(files, said, shards):
    file = shards[1] / "val" / "set-0000.tar"
    if files is None:
        file.write_bytes(file.read_bytes()[:3000])
    else:
        shard(file, files)
        (shards[1] / "val" / "set-0001.tar").unlink()
    with pytest.raises(InputError, match=said) as caught:
        classes.open_splits(shards[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere", "train.precision=32-true"], "--data nowhere: no folder"),
        (["--eval"], "--weights"),
        (["--weights", "a.pth"], "--eval"),
        (["--eval", "--weights", "nowhere.pth", *TINY], "nowhere.pth: no such file"),
        (["--schedule", "deitt", "--data", "."], "did you mean 'deit'"),
        (["profile.enabled=true"], "profile.enabled"),
        (["data.fixed_size=null"], "data.fixed_size"),
        (["classify.mixup=-1"], "classify.mixup"),
        (["--data", ".", "train.steps=4"], "train.steps=4 has no effect where classify.epochs"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, refusal):
    error = refusal(main, *command(tmp_path, *words), begun=True)
    assert said in error
    assert error.startswith("python -m bench pretrain: error: ")


def test_images_are_read_as_for_detection(tmp_path):
    """Deep ones scaled, not cut off at 255, and upright; what cannot be is one line."""
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(values).save(folder / "0.png")
    Image.fromarray((values // 257).astype(np.uint8)).save(folder / "1.png", exif=exif)
    # Of a kind that timm's reader passes over.
    Image.fromarray(values.astype(np.float32)).save(folder / "2.tif")
    found = classes.ClassDataset(tmp_path, "train")
    deep, turned = (np.asarray(found.read(index)[0])[..., 0] for index in range(2))
    np.testing.assert_allclose(deep, values / 257, atol=0.51)
    np.testing.assert_array_equal(turned, np.rot90(values // 257, -1))
    white = np.asarray(found.read(0, 47000)[0])[..., 0]
    np.testing.assert_allclose(white, values * (255 / 47000), atol=0.51)
    with pytest.raises(InputError, match=r"2\.tif: the range of floating-point pixels"):
        found.read(2)


def test_what_is_odd_in_images_is_said(tmp_path):
    rng = np.random.default_rng(0)
    for split, low in (("train", 0), ("val", 1)):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                deep = rng.integers(low, 4096, (8, 8)).astype(np.uint16)
                Image.fromarray(deep).save(folder / f"{index}.png")
    copied = (tmp_path / "train" / "a" / "0.png").read_bytes()
    (tmp_path / "val" / "b" / "9.png").write_bytes(copied)
    for name in ("a/1.HEIC", "a/2.HEIC", "c/1.HEIC", ".hidden/1.png", "a/.DS_Store", "list.txt"):
        (tmp_path / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "val" / name).touch()
    splits = classes.open_splits(tmp_path)
    said = class_remarks(splits, 65535)
    small = [line for line in said if "data.deep_white=4095 scales by that" in line]
    assert [
        str(tmp_path / split) in line for split, line in zip(("train", "val"), small, strict=True)
    ]
    (twice,) = (line for line in said if "9.png" in line and "pixels" in line)
    assert str(tmp_path / "train" / "a" / "0.png") in twice
    assert not any("deep_white" in line for line in class_remarks(splits, 4095))
    left = [line.partition("val: ")[2] for line in said if "left out" in line]
    assert left == [
        "c has no image; left out",
        "2 of: file of a class that is no image (a/1.HEIC, a/2.HEIC); left out",
    ]
    # They are said before anything is trained, as of detection.
    given = {"data": str(tmp_path), "overrides": ["train.precision=32-true"]}
    (config,) = load_suite("pretrain", rows=["performer"], device="cpu", **given).runs
    assert check_data([config, config], tmp_path) == said


def test_hidden_files_are_no_images_and_folders_within_no_classes(tmp_path):
    """Jupyter and macOS leave copies; timm's reader takes the innermost folder for the class."""
    picture = Image.new("RGB", (8, 8))
    for place in ("a/1.png", "b/2.png", ".ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/1.png"):
        (tmp_path / "train" / place).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "train" / place)
    (tmp_path / "train" / "a" / "._1.png").write_bytes(b"attributes")
    found = classes.ClassDataset(tmp_path, "train")
    assert found.classes == ("a", "b")
    assert [(Path(place[0]).name, label) for place, label in found.samples] == [
        ("1.png", 0), ("2.png", 1),
    ]  # fmt: skip
    (tmp_path / "train" / "a" / "more").mkdir()
    picture.save(tmp_path / "train" / "a" / "more" / "3.png")
    with pytest.raises(InputError, match=r"a folder for each class, not in a.more"):
        classes.ClassDataset(tmp_path, "train")


@pytest.mark.parametrize("seed", [2, 3])
def test_classes_have_one_order_in_any_process(tmp_path, seed):
    names = [f"{zeros}{number}" for zeros in ("", "0", "00") for number in (1, 2)]
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    code = "import sys; from bench.data.classes import ClassDataset, Path; "
    code += "print(*ClassDataset(Path(sys.argv[1]), 'train').classes)"
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=os.environ | {"PYTHONHASHSEED": str(seed)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert out.split() == ["001", "01", "1", "002", "02", "2"]


def test_validation_of_other_classes_is_refused(tmp_path):
    root = generate(
        tmp_path / "data", train_images=18, val_images=18, image_size=(64, 64), classes=True
    )
    (root / "val" / "star-small").rename(root / "val" / "moon")
    with pytest.raises(InputError, match="moon"):
        classes.open_splits(root)
    shutil.rmtree(root / "val")
    with pytest.raises(InputError, match="val, validation"):
        classes.open_splits(root)
