import csv
import functools
import importlib.resources
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import attentions
import configs
from attentions import registry
from attentions.contract import Attention
from bench.config.arch import parse
from bench.config.schema import ProfileConfig, RunConfig, build, leaves, without_effect
from bench.config.suites import (
    build_config,
    families,
    load_suite,
    profile_configs,
    resize_notes,
    suites,
)
from bench.config.values import assigned
from bench.errors import InputError
from bench.model.backbone import ViL
from bench.model.build import build_backbone

FOLDER = Path(configs.__file__).parent
with (FOLDER.parent / "results" / "published.csv").open(newline="") as _table:
    EVERY = list(csv.DictReader(_table))
PUBLISHED = {row["row"]: row for row in EVERY if row["table"] == "ablation"}
ZOO = {row["row"]: row for row in EVERY if row["table"] == "zoo"}
METHODS = {"mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}
USERS = """
from torch import nn


class Mean(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1, gain=1.0):
        super().__init__()
"""


def read(path):
    return yaml.safe_load((FOLDER / path).read_text(encoding="utf-8"))


def load(*overrides, suite="quick", rows=("ViL",), **more):
    return load_suite(suite, rows=rows, overrides=overrides, **more).runs


def refuse(*overrides, **more):
    """The message of an InputError, which is one line."""
    with pytest.raises(InputError) as caught:
        load(*overrides, **more)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@functools.cache
def whole(suite):
    """All runs of a suite, by row."""
    return {run.row: run for run in load_suite(suite, rows=["all"]).runs}


def test_suites():
    assert set(suites()) == {"ablation", "pretrain", "pretrain-quick", "quick", "zoo"}
    for suite in suites():
        assert load_suite(suite).name == suite
        for run in whole(suite).values():
            assert run.suite == suite
            assert build_config(run.as_dict()) == run
            # As records keep it.
            assert build_config(json.loads(json.dumps(run.as_dict()))) == run


@pytest.mark.parametrize("suite", ["quick", "ablation"])
def test_rows_of_a_suite_of_all(suite):
    rows = list(whole(suite))
    assert rows[:9] == list(PUBLISHED)
    mechanisms = {run.model.attention for run in whole(suite).values()}
    assert mechanisms == set(attentions.names())


@pytest.mark.parametrize("backbone", ["tiny", "quick"])
def test_other_rows_build_in_every_backbone(backbone):
    others = [row for row in whole("quick") if row not in (*PUBLISHED, "full")]
    for run in profile_configs(others, backbone=backbone):
        if run.data.fixed_size is not None:
            continue
        with torch.device("meta"):
            vil = ViL(run.model.arch, attention=run.model.attention, image_size=(47, 96))
            maps = vil(torch.zeros(1, 3, 47, 96))
        assert [tuple(value.shape[2:]) for value in maps.values()] == [
            (12, 24),
            (6, 12),
            (3, 6),
            (2, 3),
        ]
        dense = [stage.attention == "full" for stage in vil.stages]
        assert dense == [False, False, *([run.row.startswith("Partial ")] * 2)]
        least = getattr(attentions.find(run.model.attention), "least_globals", 0)
        if not least and run.row not in families()["null"]:
            assert [stage.num_global for stage in vil.stages] == [1, 1, 1, 0]


class NeedsGlobals(Attention):
    """Stands for a mechanism that somebody adds."""

    least_globals = 2
    arch_option = "num_features"

    def __init__(self, *, num_features: int = 96, **common) -> None:
        super().__init__(**common)


def test_automatic_rows_have_the_global_tokens_and_the_parameter_of_the_mechanism(monkeypatch):
    monkeypatch.setitem(registry._CLASSES, "needy", NeedsGlobals)
    everywhere, partial = (
        parse(run.model.arch, "needy") for run in load(rows=["needy", "Partial needy"])
    )
    assert [stage.num_global for stage in everywhere] == [2, 2, 2, 2]
    assert [stage.feature for stage in everywhere] == [96] * 4
    # Full attention needs none.
    assert [stage.num_global for stage in partial] == [2, 2, 1, 0]
    assert [stage.attention for stage in partial] == ["needy", "needy", "full", "full"]
    (run,) = profile_configs(["needy"], backbone="tiny")
    assert run.model.arch.count("g2,") == run.model.arch.count("f96,") == 4


def test_the_suites_have_the_published_rows_in_their_order():
    assert list(whole("ablation"))[: len(PUBLISHED)] == list(PUBLISHED)
    assert list(whole("zoo")) == list(ZOO)
    assert (len(PUBLISHED), len(ZOO)) == (9, 16)


@pytest.mark.parametrize("published", EVERY, ids=lambda published: published["row"])
def test_suites_are_as_published(published):
    run = whole(published["table"])[published["row"]]
    for name in ("arch", "attention", "backbone"):
        assert getattr(run.model, name) == published[name]
    assert run.model.drop_path == float(published["drop_path"])
    assert METHODS[run.model.method] == published["method"]
    assert (run.model.library, run.train.schedule) == ("auto", published["schedule"])
    recipe, values = read("recipes.yaml")[published["schedule"]], run.as_dict()
    assert recipe["train"].items() <= values["train"].items()
    assert recipe["data"].items() <= values["data"].items()


def test_rows_are_chosen_by_name_by_family_or_by_the_default_of_the_suite():
    published = families()["published"]
    assert len(published) == 9
    default = load_suite("quick")
    assert [run.row for run in default.runs][:11] == [*published, "full", "swin"]
    assert {"linformer", "Partial swin"} <= set(default.more)
    assert set(whole("quick")) == {run.row for run in default.runs} | set(default.more)
    chosen = load_suite("quick", rows=["full", "linear", "performer"])
    assert [run.row for run in chosen.runs] == ["full", *families()["linear"]]
    assert chosen.more == ()
    assert "published" in refuse(rows=["publised"])
    assert [c.row for c in profile_configs(["published"])] == list(published)


def test_every_row_of_the_table_has_a_family():
    rows = {row for group in families().values() for row in group}
    assert [row for row in whole("quick") if row not in rows] == ["full"]


@pytest.mark.parametrize(
    ("backbone", "dense"),
    [
        ("quick", {3: (1,)}),
        ("small", {3: (0, 4), 4: (0,)}),
        ("base", {2: (2, 6), 3: (2, 6, 10, 14, 18, 22)}),
    ],
)
def test_every_fourth_block_of_mixed_rows_is_dense(backbone, dense):
    mixed, plain = profile_configs(["Mixed ViL", "ViL"], backbone=backbone)
    assert mixed.model.dense == dense
    assert (mixed.model.arch, plain.model.dense) == (plain.model.arch, {})


def test_a_key_twice_or_unknown_in_a_file_of_configs_is_named(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "configs")
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path / "configs")
    quick, rows = (tmp_path / "configs" / name for name in ("suites/quick.yaml", "rows.yaml"))
    before = quick.read_text()
    quick.write_text(before + "recipe: 1x\n")
    assert "'configs/suites/quick.yaml': 'recipe' is given twice, near line" in refuse()
    quick.write_text(before + "row_runs: {ViL: {seed: 1}}\n")
    assert "key in configs/suites/quick.yaml: 'row_runs' (did you mean 'row_run'?)" in refuse()
    quick.write_text(before + "row_run: {Vil: {seed: 1}}\n")
    assert "at row_run: 'Vil' (did you mean 'ViL'?)" in refuse()
    quick.write_text(before)
    rows.write_text(rows.read_text() + "mine: {attention: swin, positon: relative}\n")
    assert "rows.yaml at mine: 'positon' (did you mean 'position'?)" in refuse()


def test_dense_blocks_by_stage(monkeypatch):
    table = {"mine": {"attention": "swin", "dense": {3: [3, 7]}}}
    monkeypatch.setattr("bench.config.suites._rows", lambda: table)
    (config,) = profile_configs(["mine"], backbone="small")
    assert config.model.dense == {3: (3, 7)}
    with pytest.raises(InputError, match="block 3 of stage 3 is not one of its blocks 0 to 1"):
        profile_configs(["mine"], backbone="quick")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{3: [99]}", "dense: block 99 of stage 3 is not one of its blocks 0 to 1"),
        ("{5: [0]}", "dense: stage 5 is not one of the stages 1 to 4"),
        ("{3: 1}", "model.dense.3=1 must be a list, such as [1]"),
        ("[3]", "model.dense=[3] must be a group of values"),
    ],
)
def test_wrong_dense_blocks_are_named(given, message):
    assert message in refuse(f"model.dense={given}", rows=["ViL"])


def test_schedule_and_method_change_a_suite_of_all_rows():
    (run,) = load(suite="ablation", rows=["Partial performer"], schedule="3x", method="retinanet")
    assert (run.train.steps, run.train.schedule, run.model.method) == (270000, "3x", "retinanet")
    assert len(run.data.min_sizes) == 6
    assert run.model.drop_path == 0.05
    (plain,) = load(suite="ablation", rows=["Partial performer"])
    assert (plain.train.steps, plain.model.method) == (90000, "mask_rcnn")


def test_schedule_and_method_choose_among_rows_that_have_their_own():
    chosen = [run.row for run in load(suite="zoo", rows=(), schedule="3x", method="retinanet")]
    assert chosen == [row for row in ZOO if "RetinaNet 3x" in row]
    assert len(chosen) == 4


def test_the_published_recipe():
    (run,) = load(suite="ablation")
    train = run.train
    assert (train.steps, train.milestones, train.gamma) == (90000, (60000, 80000), 0.1)
    assert (train.batch_size, train.lr, train.weight_decay) == (16, 1e-4, 0.05)
    assert (train.warmup_steps, train.warmup_factor) == (1000, 0.01)
    # That of the method.
    assert train.clip_norm is None
    assert (run.data.min_sizes, run.data.max_size) == ((800,), 1333)
    recipe = read("recipes.yaml")["3x"]
    assert (recipe["train"]["steps"], recipe["train"]["milestones"]) == (270000, [180000, 240000])
    assert recipe["data"]["min_sizes"] == [640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize("suite", ["ablation", "quick", "zoo"])
def test_every_row_builds_a_backbone(suite):
    for run in whole(suite).values():
        with torch.device("meta"):
            vil = build_backbone(run)
            height, width = run.data.fixed_size or (run.data.min_sizes[-1], run.data.max_size)
            vil(torch.zeros(1, 3, height, width))


def test_rows_that_work_for_one_size_only_have_a_fixed_one():
    for suite, size in (("quick", (128, 160)), ("ablation", (800, 1344))):
        for run in whole(suite).values():
            fixed = "linformer" in run.row
            assert run.data.fixed_size == (size if fixed else None)
            assert run.profile.image_size == size
    sizes = ["data.fixed_size=[64,96]", "profile.image_size=[64,96]"]
    (run,) = load(*sizes, rows=["linformer"])
    assert run.data.fixed_size == (64, 96)
    (run,) = load("data.min_sizes=[100]", "data.max_size=170", rows=["linformer"])
    assert run.data.fixed_size == run.profile.image_size == (128, 192)


@pytest.mark.parametrize("row", ["ViL", "linformer"])
def test_costs_are_of_the_size_that_images_are_resized_to(row):
    (run,) = load("data.fixed_size=[500,640]", rows=[row])
    assert (run.data.fixed_size, run.profile.image_size) == ((500, 640), (512, 640))
    # As large, once padded.
    (run,) = load("data.fixed_size=[100,100]", "profile.image_size=[100,128]", rows=[row])
    assert run.profile.image_size == (100, 128)
    (run,) = load("data.fixed_size=null", rows=["ViL"])
    assert run.profile.image_size == (128, 160)
    (run,) = load(suite="pretrain-quick", rows=["ViL"])
    assert run.profile.image_size == ProfileConfig().image_size


def test_a_profile_is_of_the_size_that_images_are_resized_to():
    fixed, size = ["data.fixed_size=[500,640]"], (128, 160)
    (run,) = profile_configs(["identity"], image_size=size, is_default=True, overrides=fixed)
    assert run.profile.image_size == (512, 640)
    with pytest.raises(
        InputError, match=r"image_size=\[128, 160\] must be the size .*\[500, 640\]"
    ):
        profile_configs(["identity"], image_size=size, overrides=fixed)


def test_a_mechanism_is_not_said_to_work_for_one_size_that_works_for_any():
    notes = [
        resize_notes(load("data.fixed_size=[64,96]", rows=[row])[0])
        for row in ("identity", "linformer")
    ]
    said = "every image is resized to 64x96"
    assert notes == [[said], [f"works for one sequence length: {said}"]]
    assert resize_notes(load()[0]) == []


def test_later_sources_win(tmp_path):
    recipe = read("recipes.yaml")["quick"]
    suite = read("suites/quick.yaml")
    (run,) = load()
    assert (run.train.steps, run.train.lr) == (recipe["train"]["steps"], recipe["train"]["lr"])
    assert run.model.detector.fpn_channels == suite["run"]["model"]["detector"]["fpn_channels"]
    assert (run.data.path, run.seed, run.device) == (None, 0, "auto")

    own_data = suite["with_data"]
    (run,) = load(data=str(tmp_path), seed=7, device="cpu")
    assert (run.data.path, run.seed, run.device) == (str(tmp_path), 7, "cpu")
    assert list(run.data.min_sizes) == own_data["data"]["min_sizes"] != recipe["data"]["min_sizes"]

    (run,) = load("train.steps=9", "data.min_sizes=[32, 64]", data=str(tmp_path))
    assert (run.train.steps, run.data.min_sizes) == (9, (32, 64))
    assert (run.data.max_size, run.train.lr) == (
        own_data["data"]["max_size"],
        recipe["train"]["lr"],
    )
    assert "seed is given twice, as 7 and 8" in refuse("seed=8", seed=7)


@pytest.mark.parametrize(
    ("override", "is_read"),
    [
        ("train.lr=1e-3", lambda run: run.train.lr == 1e-3),
        ("train.lr=1", lambda run: run.train.lr == 1.0),
        ("data.flip=no", lambda run: run.data.flip is False),
        ("data.path=2020-01-02", lambda run: run.data.path == "2020-01-02"),
        ("data.path=007", lambda run: run.data.path == "007"),
        ("data.path=17", lambda run: run.data.path == "17"),
        ("data.path=null", lambda run: run.data.path is None),
        ("data.path=/some where/a=b", lambda run: run.data.path == "/some where/a=b"),
        ("train.precision=bf16-mixed", lambda run: run.train.precision == "bf16-mixed"),
        ("model.options.window=5", lambda run: run.model.options == {"window": 5}),
        ("train.lr_multipliers={a.*: 1}", lambda run: run.train.lr_multipliers == {"a.*": 1.0}),
        ("train={steps: 3, lr: 0.1}", lambda run: (run.train.steps, run.train.lr) == (3, 0.1)),
        ("evaluate.splits=[a,b]", lambda run: run.evaluate.splits == ("a", "b")),
        (
            "model.attention='longformer,full,full,full'",
            lambda run: (
                parse(run.model.arch, run.model.attention.split(","))[1].attention == "full"
            ),
        ),
    ],
)
def test_overrides(override, is_read):
    (run,) = load(override)
    assert is_read(run)


def test_rows_are_chosen_in_the_order_given_and_once():
    chosen = load(rows=["Partial ViL", "ViL", "Partial ViL"])
    assert [run.row for run in chosen] == ["Partial ViL", "ViL"]


def test_a_mechanism_of_the_user_is_a_row(tmp_path):
    (tmp_path / "users.py").write_text(USERS)
    name = f"{tmp_path}/users.py:Mean"
    (run,) = load("model.options.gain=2.0", rows=[name])
    assert (run.row, run.model.attention, run.model.options) == (name, name, {"gain": 2.0})
    assert {stage.attention for stage in parse(run.model.arch, name)} == {name}
    assert [stage.num_global for stage in parse(run.model.arch, name)] == [1, 1, 1, 0]
    needy = USERS.replace("    def", "    least_globals = 3\n    arch_option = 'gain'\n\n    def")
    (tmp_path / "needy.py").write_text(needy.replace("gain=1.0", "gain=4"))
    (run,) = load(rows=[f"{tmp_path}/needy.py:Mean"])
    stages = parse(run.model.arch, name)
    assert [(stage.num_global, stage.feature) for stage in stages] == [(3, 4)] * 4


def test_what_a_mechanism_prints_is_no_output_of_a_command(tmp_path, capsys):
    talks = USERS.replace("        super", "        print('built')\n        super", 1)
    (tmp_path / "talks.py").write_text(f"print('imported')\n{talks}")
    load(rows=[f"{tmp_path}/talks.py:Mean"])
    attentions.build(f"{tmp_path}/talks.py:Mean", dim=8, num_heads=1)
    said = capsys.readouterr()
    assert said.out == ""
    assert {"imported", "built"} <= set(said.err.split())


# What is given, and parts of the one line that refuses it.
WRONG = {
    "nonsense": ["'nonsense'", "key=value"],
    "=3": ["'=3'", "key=value"],
    "train.stpes=3": ["key 'train.stpes' (did you mean 'train.steps'?)", "at train: schedule"],
    "trian.steps=3": ["'trian.steps' (did you mean 'train.steps'?)", "top level: suite, row"],
    "lr=3": ["'lr' (did you mean 'train.lr'?)"],
    "train={stpes: 3}": ["'train.stpes' (did you mean 'train.steps'?)"],
    "train.steps.x=3": ["train.steps={'x': 3} must be one value"],
    "train=3": ["train=3 must be a group of values, schedule, steps"],
    "model=null": ["model=None must be a group of values"],
    "train.steps=many": ["train.steps='many' must be a valid integer"],
    "train.steps=1.5": ["train.steps=1.5 must be a valid integer"],
    "train.steps=true": ["train.steps=True must be a valid integer"],
    "train.steps=0100": ["train.steps='0100' must be a valid integer"],
    "train.steps=": ["'train.steps=' has no value; null stands for none"],
    "data.path=a #b": ["cannot read 'data.path=a #b': # begins a comment"],
    "device=cpu:0": ["device: unknown value 'cpu:N'"],
    "train.steps=[": ["cannot read 'train.steps=['"],
    "train.steps=0": ["train.steps=0 must be greater than 0"],
    "profile.repeats=1": ["profile.repeats=1 must be greater than or equal to 2"],
    "train.lr=1e999": ["train.lr=inf must be"],
    "train.lr=.nan": ["train.lr=nan must be"],
    "train.warmup_steps=-1": ["train.warmup_steps=-1 must be greater than or equal to 0"],
    "train.lr_multipliers={a: -1}": ["train.lr_multipliers.a=-1 must be"],
    "train.precision=16": ["train.precision: unknown value '16'; allowed: 32-true, 16-mixed"],
    "data.flip=maybe": ["data.flip='maybe' must be a valid boolean"],
    "data.min_sizes=96": ["data.min_sizes=96 must be a list, such as [96]"],
    "data.min_sizes=[]": ["data.min_sizes=[] must have at least 1 item"],
    "data.min_sizes=[64,-1]": ["data.min_sizes.1=-1 must be greater than 0"],
    "data.fixed_size=[1]": ["data.fixed_size=[1] has too few values"],
    "data.fixed_size=[1,2,3]": ["data.fixed_size=[1, 2, 3] must have at most 2"],
    "data.degenerate_boxes=keep": ["data.degenerate_boxes: unknown value 'keep'", "error, drop"],
    "seed=9223372036854775808": ["must be less than 9223372036854775808"],
    "model.drop_path=1": ["model.drop_path=1 must be less than 1"],
    "model.method=maskrcnn": ["model.method", "(did you mean 'mask_rcnn'?); allowed: mask_rcnn,"],
    "model.options=3": ["model.options=3 must be"],
    "train={steps: 3, steps: 4}": ["cannot read", "'steps' is given twice"],
}
CONTRADICTIONS = {
    "train.batch_size=3 train.devices=2": ["train.batch_size=3 must be a multiple"],
    "data.min_sizes=[96,192] data.max_size=160": ["min_sizes=[96, 192] must not be above", "160"],
    "data.min_sizes=[96] data.max_size=120": ["profile.image_size=[128, 160]", "data.max_size=120"],
    "data.max_size=128 profile.enabled=false": ["profile.image_size=[128, 160]"],
    "data.fixed_size=[64,96] profile.image_size=[64,64]": [
        "profile.image_size=[64, 64]",
        "data.fixed_size=[64, 96]",
    ],
    # Smaller than all images, which memory and latency would be of all the same.
    "data.fixed_size=[512,640] profile.image_size=[128,160]": ["data.fixed_size=[512, 640]"],
    "model.attention=longfromer": ["row ViL is of longformer; name another row"],
    "model.attention=longformer,full,ful,full": ["'ful' (did you mean 'full'?)", "srformer"],
    "model.attention=longformer,full": ["2 mechanisms", "4 stages"],
    "model.arch=l1_l2,q3_l3": ["ARCH", "character 7", ">>>q3<<<"],
    "model.options.windw=3": ["model.options.windw", "'ViL'", "'window'", "padding"],
    "model.options.dim=3": ["model.options.dim", "'ViL'"],
    "row=other": ["'row=other'", "--rows"],
    "suite=other": ["'suite=other'", "--suite"],
    "train.schedule=3x": ["'train.schedule=3x'", "--schedule"],
    'model={"backbone":tiny}': ["'model.backbone=tiny'", "--backbone"],
    "train.steps=3 train.steps=4": ["train.steps is given twice, as 3 and 4"],
    "train=3 train.steps=4": ["train is given twice, as 3 and {'steps': 4}"],
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_values_are_refused_by_one_clear_line(word):
    with pytest.raises(InputError) as caught:
        build(RunConfig, assigned([word]))
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in WRONG[word] if part not in message] == [], message


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused_by_one_clear_line(words):
    message = refuse(*words.split())
    assert [part for part in CONTRADICTIONS[words] if part not in message] == [], message


# Settings that are given, and what is said of the last of them, which changes nothing.
IDLE = {
    "train.gamma=0.5": "where train.decay is cosine, only where it is steps",
    "train.milestones=[3]": "where train.decay is cosine, only where it is steps",
    "train.decay=steps train.gamma=0.5": "where train.milestones is []",
    "train.warmup_steps=0 train.warmup_factor=0.1": "where train.warmup_steps is 0",
    "train.weight_decay=0 train.no_decay=[norms]": "where train.weight_decay is 0.0",
    "classify.mixup=0.8": "where model.method is mask_rcnn, only where it is classifier",
    "model.method=retinanet model.detector.roi_batch=64": "only where it is mask_rcnn",
    "model.method=retinanet profile.proposals=50": "only where it is mask_rcnn",
    "data.path=a data.generated.seed=3": "where data.path is a, only where it is null",
    "data.images=pictures": "where data.path is null",
    "data.fixed_size=[128,160] data.max_size=200": "is [128, 160], only where it is null",
}


@pytest.mark.parametrize("words", IDLE)
def test_a_setting_that_changes_nothing_is_refused(words):
    message = refuse(*words.split())
    assert f"{words.split()[-1].partition('=')[0]}=" in message.partition(" has no effect ")[0]
    assert message.endswith(IDLE[words])


@pytest.mark.parametrize(
    "words",
    [
        "train.decay=steps train.milestones=[3] train.gamma=0.5",
        "train.decay=cosine train.milestones=[]",
        "model.method=retinanet model.detector.fpn_channels=32",
        "classify.mixup=0",
        "data.generated.seed=3",
        "data.fixed_size=[128,160]",
        "profile.enabled=false profile.batch_size=2",
    ],
)
def test_a_setting_that_changes_something_or_asks_for_nothing_is_taken(words):
    assert load(*words.split())


def test_a_setting_has_to_change_one_of_several_rows(tmp_path):
    sizes = ["data.min_sizes=[100]", "data.max_size=170"]
    assert load(*sizes, rows=["linformer"])
    zoo = ["ViL-Tiny RetinaNet 1x", "ViL-Tiny Mask R-CNN 1x"]
    roi_batch, path = "model.detector.roi_batch=64", str(tmp_path)
    assert load(roi_batch, suite="zoo", rows=zoo, data=path)
    assert "no effect" in refuse(roi_batch, suite="zoo", rows=zoo[:1], data=path)
    assert load("data.deep_white=4095", suite="pretrain")


def test_a_setting_may_change_what_is_searched():
    milestones = "train.milestones=[3]"
    assert load(milestones, searched={"train.decay": ("cosine", "steps")})
    assert "no effect" in refuse(milestones, searched={"train.lr": (1e-3, 2e-3)})


def test_what_settings_need_is_a_setting():
    config = RunConfig()
    assert [name for name in leaves() if without_effect(config, name)][:2]


def test_settings_that_make_one_of_two_rows_are_refused():
    (whole,) = load()
    said = refuse(f"model.arch={whole.model.arch}", rows=["ViL", "Partial ViL"])
    assert said.startswith("rows ViL and Partial ViL are the same with model.arch=")


def test_sizes_count_where_something_is_measured():
    profile_configs(["ViL"], overrides=["data.min_sizes=[96]", "data.max_size=120"])
    with pytest.raises(InputError, match=r"profile.image_size=\[128, 160\]"):
        profile_configs(["ViL"], image_size=(128, 160), overrides=["data.max_size=128"])


# What of a suite is asked for, and parts of the one line that refuses it.
REFUSED = [
    ({"suite": "quik"}, ["suite 'quik' (did you mean 'quick'?); allowed: ablation, pretrain"]),
    (
        {"rows": ["partial vil"]},
        ["'partial vil' of suite quick (did you mean 'Partial ViL'"],
    ),
    ({"rows": ["no_such.py:Mean"]}, ["no_such.py:Mean"]),
    ({"schedule": "2x"}, ["unknown schedule '2x'; allowed: 1x, 3x, quick"]),
    ({"method": "retina"}, ["unknown method 'retina' (did you mean 'retinanet'?)"]),
    ({"suite": "zoo", "rows": (), "schedule": "quick"}, ["no row of suite zoo has schedule quick"]),
    ({"suite": "zoo", "rows": ["ViL-Tiny RetinaNet 1x"], "schedule": "3x"}, ["unknown row 'ViL-T"]),
    ({"suite": "zoo", "rows": ["users.py:Mean"]}, ["unknown row 'users.py:Mean'"]),
]


@pytest.mark.parametrize(("asked", "parts"), REFUSED)
def test_what_a_suite_has_not_is_one_clear_line(asked, parts):
    message = refuse(**asked)
    assert [part for part in parts if part not in message] == [], message


def test_a_suite_that_needs_coco_finds_it_by_detectron2s_convention(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert load_suite("ablation", rows=["ViL"]).runs[0].data.path is None
    (tmp_path / "coco").mkdir()
    suite = load_suite("ablation", rows=["ViL"])
    assert suite.runs[0].data.path == str(tmp_path / "coco")
    assert load_suite("quick", rows=["ViL"]).runs[0].data.path is None
    own = load_suite("ablation", rows=["ViL"], data=str(tmp_path / "mine"))
    assert own.runs[0].data.path == str(tmp_path / "mine")
