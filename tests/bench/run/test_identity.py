"""What a run is: what trains again, what evaluates and measures anew, what goes on."""

import dataclasses
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import attentions
from bench import record
from bench.config.schema import RunConfig, leaves
from bench.config.sources import Width, import_anew, mechanism_sources, sources_of
from bench.config.suites import build_config, load_suite
from bench.data import fingerprint, layout
from bench.data.fingerprint import fingerprint_images
from bench.data.generated import generate
from bench.files import sha256
from bench.record import Record
from bench.run.identity import edited, edited_since, identify, replaced, survey
from bench.run.runner import Ending, ending
from tests.mechanisms import write
from tests.records import MODEL

# Another value of every setting: of what the weights depend on, of what is made of them, and of
# what is neither.
TRAINED: dict[str, Any] = {
    "seed": 1,
    "device": "cuda",
    "model.arch": "l1,h1,d32,n1,s1,g1,p4,f7,a0_l2,h2,d64,n2,s1,g1,p2,f7,a0",
    "model.dense": {3: (1,)},
    "model.attention": "full",
    "model.options": {"window": 5},
    "model.drop_path": 0.3,
    "model.compile": True,
    "model.channels_last": True,
    "model.checkpoint": True,
    "model.norm_embed": False,
    "model.method": "retinanet",
    "model.library": "detectron2",
    "model.detector.fpn_channels": 7,
    "model.detector.head_width": 7,
    "model.detector.mask_width": 7,
    "model.detector.anchor_sizes": [7],
    "model.detector.rpn_proposals": [7, 7],
    "model.detector.rpn_batch": 3,
    "model.detector.roi_batch": 3,
    "data.generated.seed": 1,
    "data.generated.train_images": 9,
    "data.generated.val_images": 9,
    "data.generated.image_size": [96, 96],
    "data.train_split": "val2017",
    "data.min_sizes": [640, 800],
    "data.max_size": 1000,
    "data.fixed_size": [96, 96],
    "data.flip": False,
    "data.aspect_ratio_grouping": True,
    "data.deep_white": 4095,
    "data.degenerate_boxes": "drop",
    "train.steps": 7,
    "train.batch_size": 28,
    "train.lr": 0.5,
    "train.scale_from_batch": 2,
    "train.weight_decay": 0.5,
    "train.no_decay": ["norms"],
    "train.lr_multipliers": {"backbone.*": 0.5},
    "train.warmup_steps": 3,
    "train.warmup_factor": 0.5,
    "train.decay": "steps",
    "train.milestones": [3],
    "train.gamma": 0.5,
    "train.clip_norm": 9.0,
    "train.precision": "bf16-mixed",
    # One part of a step more; the same number made up in another way is below.
    "train.devices": 2,
    "train.accumulate": 2,
}
MADE: dict[str, Any] = {
    "model.detector.rpn_proposals_test": [7, 7],
    "model.detector.detections": 7,
    "model.detector.score_threshold": 0.1,
    "evaluate.splits": ["train2017"],
    "evaluate.batch_size": 7,
    "evaluate.bootstrap": 7,
    "profile.enabled": False,
    "profile.image_size": [64, 64],
    "profile.batch_size": 7,
    "profile.proposals": 7,
    "profile.repeats": 7,
    "profile.seconds": 0.5,
    "profile.training": False,
}
NEITHER: dict[str, Any] = {
    "suite": "another",
    "row": "another",
    "model.backbone": "another",
    "train.schedule": "another",
    "data.workers": 2,
    "train.checkpoint_every": 3,
    "train.log_every": 3,
    # By their content alone, which tests below change.
    "data.path": None,
    "data.train_file": "a.json",
    "data.val_file": "b.json",
    "data.images": "c",
    "train.init": None,
}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_suite("quick", rows=["ViL"], device="cpu").runs[0]


def with_(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with other values, by dotted name with `__` for dots."""
    for name, value in changes.items():
        *path, last = name.split("__")
        nodes = [config]
        for part in path:
            nodes.append(getattr(nodes[-1], part))
        node = dataclasses.replace(nodes.pop(), **{last: value})
        for part in reversed(path):
            node = dataclasses.replace(nodes.pop(), **{part: node})
        config = node
    return config


def test_every_setting_is_of_the_weights_of_what_is_made_of_them_or_of_neither(
    config: RunConfig,
) -> None:
    # Those of classifiers do not belong to a detector; test_pretrain.py has them.
    known = [name for name in leaves() if not name.startswith("classify.")]
    assert sorted([*TRAINED, *MADE, *NEITHER]) == sorted(known)
    before = identify(config)
    for name, value in (TRAINED | MADE | NEITHER).items():
        after = identify(with_(config, **{name.replace(".", "__"): value}))
        apart = after.weights_key != before.weights_key, after.key != before.key
        expected = (name in TRAINED, name not in NEITHER)
        assert apart == expected, name


def test_devices_and_parts_count_as_their_product(config: RunConfig) -> None:
    keys = {
        identify(with_(config, train__devices=devices, train__accumulate=parts)).key
        for devices, parts in ((4, 1), (2, 2), (1, 4))
    }
    assert len(keys) == 1


def a_record(run: RunConfig, **changes: Any) -> Record:
    identity = identify(run)
    values = {"key": identity.key, "created": "2030-01-01T00:00:00+00:00",
              "environment": {"inputs": identity.inputs}, "model": MODEL}  # fmt: skip
    return record.of_run(run, **(values | changes))


def mechanism(folder: Path, text: str = "") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "helper.py").write_text("WIDTH = 1\n")
    (folder / "unrelated.py").write_text("")
    return write(folder / "mine.py", imports=f"{text}\nif False:\n    from helper import WIDTH")


def test_a_mechanism_is_its_file_and_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    name = mechanism(tmp_path)
    before = {source.name: source.sha256 for source in mechanism_sources(f"{name},{name}")}
    assert list(before) == ["helper.py", "mine.py"]
    (tmp_path / "helper.py").write_text("WIDTH = 16\n")
    after = {source.name: source.sha256 for source in mechanism_sources(name)}
    assert [name for name in after if after[name] != before[name]] == ["helper.py"]


def test_what_was_edited_is_imported_anew_by_the_next_run(tmp_path: Path) -> None:
    """In a notebook, whose process has imported what was in the files before."""
    helper = tmp_path / "helper_of_a_notebook.py"
    helper.write_text("WIDTH = 1\n")
    name = write(tmp_path / "mine.py", imports=f"import {helper.stem}")
    # What other tests have edited.
    attentions.forget_edited()
    found = attentions.find(name)
    attentions.forget_edited()
    assert attentions.find(name) is found
    helper.write_text("WIDTH = 16\n")
    os.utime(helper, (1, 1))
    attentions.forget_edited()
    assert attentions.find(name) is not found
    assert sys.modules[helper.stem].__dict__["WIDTH"] == 16
    assert [source.name for source in mechanism_sources(name)] == [helper.name, "mine.py"]


LATE = {
    "a file": ('GAIN = json.loads((HERE / "gain.json").read_text())', "gain.json"),
    "a variable": ('GAIN = float(os.environ.get("GAIN_OF_TESTS", 1))', ""),
    "a module that is imported late": ("", "late_of_tests.py"),
}


@pytest.mark.parametrize("what", LATE)
def test_what_else_was_edited_is_read_anew_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, config: RunConfig
) -> None:
    text, file = LATE[what]
    imports = f"import json, pathlib\nHERE = pathlib.Path(__file__).parent\n{text}"
    late = "import late_of_tests\nself.seen = late_of_tests.GAIN"
    name = write(tmp_path / "mine.py", late if not text else "self.seen = GAIN", imports=imports)
    config = with_(config, model__attention=name)

    def edit(gain: int) -> None:
        if file:
            (tmp_path / file).write_text(f"GAIN = {gain}\n" if file.endswith(".py") else str(gain))
            os.utime(tmp_path / file, (gain, gain))
        else:
            monkeypatch.setenv("GAIN_OF_TESTS", str(gain))

    def seen() -> Any:
        module: Any = attentions.build_for(name, grid=(2, 2), dim=8, num_heads=1)
        module(torch.zeros(1, 5, 8), (2, 2))
        return module.seen

    for gain in (1, 3):
        edit(gain)
        import_anew(config.model)
        assert seen() == gain


def test_a_file_that_a_mechanism_reads_is_not_replaced_while_it_runs(
    tmp_path: Path, config: RunConfig
) -> None:
    (tmp_path / "gain.json").write_text("1")
    does = 'pathlib.Path(__file__).with_name("gain.json").read_text()'
    name = write(tmp_path / "mine.py", does, imports="import pathlib")
    config = with_(config, model__attention=name)
    identity = identify(config)
    # Code that is edited is imported already, and the suite says so.
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "\n")
    assert replaced(identity, config, of_training=True) == []
    (tmp_path / "gain.json").write_text("3")
    assert replaced(identity, config, of_training=True) == ["gain.json"]


def test_a_file_imports_from_beside_it_and_from_where_it_says(tmp_path: Path) -> None:
    """Neither `run_all.py` nor the tests have the folder of the mechanism on their path."""
    text = (
        "import importlib, sys\nfrom pathlib import Path\n"
        "sys.path.append(str(Path(__file__).parent / 'lib'))\n"
        "import beside_of_tests, lib_of_tests\nimportlib.import_module('named_of_tests')\n"
        "SETTINGS = Path(__file__).with_name('settings.json').read_text() + '\\0'\n"
    )
    name = mechanism(tmp_path, text)
    (tmp_path / "lib").mkdir()
    for file in ("beside_of_tests", "lib/lib_of_tests", "named_of_tests"):
        (tmp_path / f"{file}.py").write_text("")
    (tmp_path / "settings.json").write_text("{}")
    attentions.find(name)
    found = [source.name for source in mechanism_sources(name)]
    assert found == [
        *("beside_of_tests.py", "helper.py", "lib/lib_of_tests.py", "mine.py", "named_of_tests.py"),
        "settings.json",
    ]
    # One process would give the second mechanism the module of the first.
    other = mechanism(tmp_path / "other", "import beside_of_tests")
    (tmp_path / "other" / "beside_of_tests.py").write_text("")
    with pytest.raises(ValueError, match="have one name"):
        attentions.find(other)


def test_files_are_found_by_the_parts_of_their_paths(tmp_path: Path) -> None:
    text = (
        "from pathlib import Path\n"
        "FOLDER, WEIGHTS = Path(__file__).parent / 'settings', Path('{}/kept/weights.pt')\n"
        "READ = [*(FOLDER / 'deep').glob('*.json'), FOLDER / 'one.yaml', Path('/proc/cpuinfo')]\n"
    )
    for file in ("code/settings/deep/a.json", "code/settings/one.yaml", "kept/weights.pt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    (tmp_path / "code" / "settings" / "other.yaml").write_text("1")
    name = mechanism(tmp_path / "code", text.format(tmp_path))
    assert [source.name for source in mechanism_sources(name)] == [
        *("helper.py", "mine.py", "settings/deep/a.json", "settings/one.yaml"),
        "../kept/weights.pt",
    ]


def test_environment_variables_that_a_mechanism_reads_belong_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import os\nMODE = os.environ.get('TESTS_MODE')\n"
        "OWN = {k: v for k, v in os.environ.items() if k.startswith('TESTS_OWN_')}\n"
        "RANK = os.getenv('RANK', os.environ['HOME'])\n"
    )
    name = mechanism(tmp_path, text)
    (tmp_path / "unread.py").write_text("NAME = 'TESTS_UNREAD'\n")
    monkeypatch.setenv("RANK", "0")
    found = []
    for values in (
        {},
        {"MODE": "a"},
        {"MODE": "b"},
        {"MODE": "b", "OWN_WIDTH": "1", "UNREAD": "1"},
    ):
        for key, value in values.items():
            monkeypatch.setenv(f"TESTS_{key}", value)
        sources = {source.name: source.sha256 for source in mechanism_sources(name)}
        found.append({key: value for key, value in sources.items() if key.startswith("$")})
    assert [list(one) for one in found] == [
        *([], ["$TESTS_MODE"], ["$TESTS_MODE"]),
        ["$TESTS_MODE", "$TESTS_OWN_WIDTH"],
    ]
    assert found[1] != found[2]


def test_modules_of_a_package_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pack_of_tests"
    (package / "inner").mkdir(parents=True)
    files = {
        "__init__.py": "", "core.py": "import torch, json, importlib\nfrom .inner import part\n"
        "importlib.import_module('.late', __package__)\n", "late.py": "",
        "inner/__init__.py": "from .. import other as o\n", "inner/part.py": "", "other.py": "",
        "aside.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {source.name for source in mechanism_sources("pack_of_tests.core:X")}
    assert found == {
        *("__init__.py", "core.py", "inner/__init__.py", "inner/part.py", "late.py", "other.py")
    }


def test_an_edited_mechanism_is_run_again_and_says_so(tmp_path: Path) -> None:
    config = load_suite("quick", rows=[mechanism(tmp_path / "code")]).runs[0]
    output = tmp_path / "out"
    record.write(a_record(config), output / "records")
    (standing,) = survey([config], output, retry_failed=False)
    assert standing.record is not None
    (tmp_path / "code" / "helper.py").write_text("WIDTH = 16\n")
    (standing,) = survey([config], output, retry_failed=False)
    assert standing.record is None
    assert "is run again: helper.py changed since its record was made" in standing.note
    assert identify(config).weights_key != identify(config, inputs={}).weights_key


def test_data_and_checkpoints_count_by_their_content(tmp_path: Path, config: RunConfig) -> None:
    root = generate(tmp_path / "data", train_images=2, val_images=2, image_size=(64, 64))
    init = tmp_path / "init.pth"
    init.write_bytes(b"one")
    config = with_(config, data__path=str(root), train__init=str(init))
    before, entry = identify(config), a_record(config)
    assert before.changed(entry) == []

    moved = root.rename(tmp_path / "elsewhere")
    other = with_(config, data__path=str(moved))
    assert identify(other).key == before.key
    # Not there, it cannot have changed: a report needs no data. A place that was mistyped is none.
    assert identify(config).changed(entry) == []
    mistyped = identify(with_(config, data__path=f"{root}x"))
    assert mistyped.changed(entry) == ["data train2017", "data val2017"]
    assert mistyped.changed(entry, weights_only=True) == ["data train2017"]

    init.write_bytes(b"two")
    assert identify(other).changed(entry) == ["the checkpoint of --init"]
    init.write_bytes(b"one")

    annotations = moved / "annotations" / "instances_val2017.json"
    values = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(values | {"info": "mended"}))
    after = identify(other)
    assert after.changed(entry) == ["data val2017"]
    assert after.changed(entry, weights_only=True) == []
    assert after.weights_key == before.weights_key

    # What lies beside the images, such as results, is none of the data.
    (moved / "train2017" / "one.jpg").write_bytes(b"more")
    assert identify(other).weights_key == before.weights_key

    # An edit that leaves the size in bytes and the time of change as they were.
    name = json.loads((moved / "annotations" / "instances_train2017.json").read_text())["images"][0]
    image = moved / "train2017" / name["file_name"]
    state, content = image.stat(), image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identify(other).changed(entry) == ["data train2017", "data val2017"]
    assert identify(other).weights_key != before.weights_key
    image.unlink()
    assert identify(other).changed(entry) == ["data train2017", "data val2017"]
    image.write_bytes(content)
    assert identify(other).weights_key == before.weights_key


def test_images_are_read_again_where_they_changed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = generate(tmp_path / "data", train_images=3, val_images=2, image_size=(64, 64))
    place, read = layout.find(root, "train2017"), []
    images = [path for path in place.folder.iterdir() if path.suffix == ".jpg"]
    for image in images:
        os.utime(image, (1, 1))
    monkeypatch.setattr(fingerprint, "sha256", lambda path: read.append(path) or sha256(path))
    monkeypatch.setattr(fingerprint, "_CLOCK", -60)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = fingerprint.fingerprint(place)
    assert sorted(read) == sorted(images)
    assert fingerprint.fingerprint(place) == before
    assert len(read) == 3
    os.utime(images[0])
    assert fingerprint.fingerprint(place) == before
    assert read[3:] == [images[0]]
    # Without a cache all are read each time.
    monkeypatch.setenv("XDG_CACHE_HOME", str(images[0]))
    assert fingerprint.fingerprint(place) == before
    assert len(read) == 7


def test_records_of_before_hashes_were_kept_are_compared_by_what_they_hold(
    tmp_path: Path, config: RunConfig
) -> None:
    root = generate(tmp_path / "data", train_images=2, val_images=2, image_size=(64, 64))
    init = tmp_path / "init.pth"
    init.write_bytes(b"one")
    config = with_(config, data__path=str(root), train__init=str(init))
    inputs = identify(config).inputs
    values = config.as_dict()
    old = a_record(
        config,
        key=record.key(values),
        config=values,
        environment={},
        evaluation={"split": "val2017", "box": None,
                    "annotations_sha256": inputs["data"]["val2017"]["annotations"]},
        notes=[f"initialised from init.pth (sha256 {inputs['init'][:16]}): 3 tensors"],
    )  # fmt: skip
    assert identify(config).changed(old) == []
    assert identify(with_(config, train__steps=7)).changed(old) is None
    init.write_bytes(b"two")
    (root / "annotations" / "instances_val2017.json").write_text("{}")
    assert identify(config).changed(old) == ["data val2017", "the checkpoint of --init"]

    own = load_suite("quick", rows=[mechanism(tmp_path / "code")]).runs[0]
    old = a_record(own, environment={}, created="2020-01-01T00:00:00+00:00")
    for path in (tmp_path / "code").iterdir():
        os.utime(path, (0, 0))
    assert identify(own).changed(old) == []
    os.utime(tmp_path / "code" / "helper.py")
    assert identify(own).changed(old) == ["helper.py"]


def test_a_record_of_another_version_of_the_settings_is_none_of_this_run(
    config: RunConfig,
) -> None:
    values = config.as_dict() | {"a setting of tomorrow": 1}
    assert identify(config).changed(a_record(config, config=values)) is None
    assert identify(build_config(config.as_dict())).changed(a_record(config)) == []


@pytest.mark.parametrize(
    ("error", "case", "expected"),
    [
        # kind, (first, alone, recorded, weights safe), (writes, removes, raises)
        (None, (True, False, False, True), (True, True, "")),
        (None, (True, False, False, False), (True, False, "")),
        (None, (False, False, False, True), (False, False, "")),
        ("error", (True, False, False, True), (True, False, "")),
        ("input", (True, False, False, True), (True, False, "error")),
        ("input", (False, False, False, True), (False, False, "error")),
        ("interrupted", (True, False, False, True), (True, False, "error")),
        # Alone, whichever it is, it writes, and ends the others: they would wait for ever.
        ("input", (False, True, False, True), (True, False, "abandoned")),
        ("error", (False, True, False, True), (True, False, "abandoned")),
        # The first, left by the one that failed and wrote, has nothing to add.
        ("error", (True, True, True, True), (False, False, "abandoned")),
    ],
)
def test_how_a_process_ends_its_part_of_a_run(
    error: str | None, case: tuple[bool, ...], expected: tuple[bool, bool, str]
) -> None:
    names = ("first", "alone", "recorded", "weights_safe")
    assert ending(error, **dict(zip(names, case, strict=True))) == Ending(*expected)


def test_a_link_to_nothing_is_an_image_without_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    link = tmp_path / "a.jpg"
    link.symlink_to(tmp_path / "gone.jpg")
    missing = fingerprint_images(tmp_path / "a.json", {"a.jpg": link})
    (tmp_path / "gone.jpg").write_bytes(b"here")
    assert fingerprint_images(tmp_path / "a.json", {"a.jpg": link}) != missing


def test_linked_folders_of_images_are_of_what_they_link_to(tmp_path: Path) -> None:
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "cat.png").write_text(place)
    split = tmp_path / "train"
    split.mkdir()
    (split / "cats").symlink_to(tmp_path / "first")
    (split / "again").symlink_to(split)
    assert list(fingerprint.files_of(split)) == ["cats/cat.png"]
    before = fingerprint_images(split, fingerprint.files_of(split))
    (split / "cats").unlink()
    (split / "cats").symlink_to(tmp_path / "second")
    assert fingerprint_images(split, fingerprint.files_of(split)) != before


def test_versions_of_installed_packages_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import json, numpy, torch, yaml\nfrom timm.layers import Mlp\nimport absent_of_tests\n"
    name = mechanism(tmp_path, text)
    before = {source.name: source.sha256 for source in mechanism_sources(name)}
    assert [*before][2:] == ["package PyYAML", "package timm"]
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version(name) + "1" * (name == "timm"))
    after = {source.name: source.sha256 for source in mechanism_sources(name)}
    assert [key for key in after if after[key] != before[key]] == ["package timm"]
    of_timm = [source.name for source in mechanism_sources("timm.layers.attention:Attention")]
    assert of_timm[-1] == "package timm"


# What a mechanism does, the file of its folder that it reads so, and whether that is a module.
READS = {
    "by a module's name in a variable": (
        "import importlib\nNAME = 'wide_of_tests'\nimportlib.import_module(NAME)",
        "wide_of_tests.py",
    ),
    "by its own name": (
        "from pathlib import Path\nPath(__file__).with_suffix('.json').read_text()",
        "mine.json",
    ),
    "by a name put together": (
        "import os\nN = 'small'\n"
        "open(os.path.join(os.path.dirname(__file__), 'c', f'{N}_v{2}.yaml'))",
        "c/small_v2.yaml",
    ),
    "from the folder above": (
        "from pathlib import Path\nROOT = Path(__file__).resolve().parents[1]\n"
        "(ROOT / 'settings_of_tests' / 'a.json').read_text()",
        "../settings_of_tests/a.json",
    ),
    "by a variable": ("import os\nopen(os.environ['SETTINGS_OF_TESTS'])", "../named.yaml"),
}


@pytest.mark.parametrize("how", READS)
def test_what_a_mechanism_opens_counts(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, file = READS[how]
    place = tmp_path / "own" / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("# 1")
    monkeypatch.setenv("SETTINGS_OF_TESTS", str(place))
    name = mechanism(tmp_path / "own", text)
    before = {source.name: source.sha256 for source in mechanism_sources(name)}
    place.write_text("# 2")
    after = {source.name: source.sha256 for source in mechanism_sources(name)}
    assert [key for key in after if after[key] != before.get(key)] == [file]


def test_a_variable_that_is_read_by_a_name_put_together_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = mechanism(tmp_path, "from os import environ as env\nenv.get('WIDTH_OF_' + 'TESTS')")
    monkeypatch.setenv("WIDTH_OF_TESTS", "1")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = [source.name for source in mechanism_sources(name)]
    assert found == ["helper.py", "mine.py", "$WIDTH_OF_TESTS"]
    # A small one was built.
    assert torch.equal(torch.get_rng_state(), state)


def test_what_another_mechanism_loads_from_beside_it_is_none_of_its_files(tmp_path: Path) -> None:
    one = write(tmp_path / "one.py")
    before = [source.name for source in mechanism_sources(one)]
    (tmp_path / "help_of_two.py").write_text("")
    two = write(tmp_path / "two.py", imports="import help_of_two")
    attentions.find(two)
    assert [source.name for source in mechanism_sources(two)] == ["help_of_two.py", "two.py"]
    assert [source.name for source in mechanism_sources(one)] == before == ["one.py"]


def test_modules_whose_names_are_put_together_are_of_those_that_import_them(tmp_path: Path) -> None:
    (tmp_path / "chosen_in_tests.py").write_text("WIDTH = 1\n")
    (tmp_path / "chooses_in_tests.py").write_text(
        "import importlib\nimportlib.import_module('chosen' + '_in_tests')\n"
    )
    through = "import chooses_in_tests"
    of_row = {
        "first": [through, "chooses_in_tests.py", "chosen_in_tests.py"],
        "plain": ["import json"],
        # It is loaded by now.
        "later": [through, "chooses_in_tests.py", "chosen_in_tests.py"],
        "own": ["__import__('chosen_' + 'in_tests')", "chosen_in_tests.py"],
    }
    rows = {row: write(tmp_path / f"{row}.py", imports=text) for row, (text, *_) in of_row.items()}
    for name in rows.values():
        attentions.find(name)
    for row, (_, *expected) in of_row.items():
        found = [source.name for source in mechanism_sources(rows[row])]
        assert found == sorted([*expected, f"{row}.py"])


def test_files_that_native_code_opens_by_names_put_together_count(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "w-16.safetensors")
    (tmp_path / "kernel.so").write_text("no library")
    text = """
import ctypes, pathlib
from safetensors.torch import load_file
from safetensors import safe_open
HERE, WIDTH = pathlib.Path(__file__).parent, 4 * 4
load_file(HERE / f"w-{WIDTH}.safetensors")
try:
    ctypes.CDLL(str(HERE / ("ker" + "nel.so")))
except OSError:
    pass
"""
    name = write(tmp_path / "mine.py", imports=text)
    found = {source.name for source in mechanism_sources(name)}
    assert {"kernel.so", "mine.py", "w-16.safetensors"} <= found


def test_files_of_a_first_call_count(tmp_path: Path) -> None:
    for width in (16, 32):
        (tmp_path / f"table-{width}.json").write_text("2")
        (tmp_path / f"step-{width}.json").write_text("2")
    (tmp_path / "mine.py").write_text("""
import json, pathlib
from torch import nn

HERE = pathlib.Path(__file__).parent

class X(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.dim, self.gain = dim, None

    def forward(self, x, grid):
        if self.gain is None:
            kind = "step" if self.training else "table"
            self.gain = json.loads((HERE / f"{kind}-{self.dim}.json").read_text())
        if not self.training:
            self.gain = None
        return x * (self.gain or 1)
""")
    widths = {Width(width, 2, 1) for width in (16, 32)}
    found = mechanism_sources(f"{tmp_path}/mine.py:X", widths=widths)
    assert [source.name for source in found] == [
        *("mine.py", "step-16.json", "step-32.json", "table-16.json", "table-32.json")
    ]


def test_packages_that_lie_beside_a_mechanism_are_their_versions(tmp_path: Path) -> None:
    deps = tmp_path / "deps"
    (deps / "pack_beside").mkdir(parents=True)
    (deps / "pack_beside" / "__init__.py").write_text("")
    info = deps / "pack_beside-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pack-beside\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("pack_beside\n")
    (info / "RECORD").write_text("pack_beside/__init__.py,,\n")
    text = f"import sys\nsys.path.append({str(deps)!r})\nimport pack_beside"
    name = write(tmp_path / "mine.py", imports=text)
    found = {source.name: source.sha256 for source in mechanism_sources(name)}
    assert list(found) == ["mine.py", "package pack-beside"]


def test_a_mechanism_of_the_package_is_its_files(tmp_path: Path) -> None:
    (run,) = load_suite("quick", rows=["swin"], device="cpu").runs
    names = [source.name for source in mechanism_sources("swin")]
    assert {f"attentions/{name}.py of this package" for name in ("swin", "windows")} <= {*names}
    assert "attentions/longformer.py of this package" not in names
    own = write(tmp_path / "mine.py", imports="from attentions.swin import Swin")
    assert [source.name for source in mechanism_sources(own)] == ["mine.py", *names]
    assert sources_of(dataclasses.replace(run.model, dense={1: (0,)}))
    assert survey([run], tmp_path, retry_failed=False)[0].note == ""

    entry = a_record(run)
    assert identify(run).changed(entry) == edited_since(entry) == []
    of_then = dict(entry.environment["inputs"]["mechanism"])
    inputs = {**entry.environment["inputs"], "mechanism": of_then}
    edited_one = dataclasses.replace(entry, environment={"inputs": inputs})
    of_then["attentions/swin.py of this package"] = "another"
    record.write(edited_one, tmp_path / "records")
    (standing,) = survey([run], tmp_path, retry_failed=False)
    assert standing.record is None
    assert "run again: attentions/swin.py of this package changed since" in standing.note
    # A version that did not look at them.
    older = dataclasses.replace(entry, environment={"inputs": {**inputs, "mechanism": {}}})
    assert identify(run).changed(older) == []


def test_a_mechanism_that_is_edited_is_found(tmp_path: Path) -> None:
    name = mechanism(tmp_path)
    suite = load_suite("quick", rows=[name], device="cpu")
    standings = survey(suite.runs, tmp_path / "out", retry_failed=False)
    entry = a_record(suite.runs[0])
    assert edited(standings) == edited_since(entry) == []
    (tmp_path / "helper.py").write_text("WIDTH = 2\n")
    assert edited(standings) == edited_since(entry) == ["helper.py"]
