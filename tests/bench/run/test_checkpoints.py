"""Published names in and out: loading, and the conversion of classification checkpoints."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.errors import InputError
from bench.model.backbone import ViL
from bench.model.weights import (
    ACTIONS,
    DETECTOR_PREFIX,
    convert,
    convert_classifier,
    load_file,
    load_published,
    save_file,
)

GOLDENS = Path(__file__).parents[2] / "goldens"
ARCH = (
    "l1,h1,d8,n1,s1,g1,p4,f3,a1_l2,h2,d16,n1,s1,g1,p2,f3,a1"
    "_l3,h2,d16,n1,s1,g1,p2,f3,a1_l4,h4,d32,n1,s1,g0,p2,f3,a1"
)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("convert_*.npz")), ids=lambda path: path.stem)
def test_a_classifier_is_converted_as_published(path: Path) -> None:
    with np.load(path) as golden:
        meta = json.loads(str(golden["meta"]))
        arrays = {name: torch.from_numpy(golden[name]) for name in golden.files if name != "meta"}
    source = {n.removeprefix("source/"): a for n, a in arrays.items() if n.startswith("source/")}
    target = {n.removeprefix("target/"): a for n, a in arrays.items() if n.startswith("target/")}
    vil = ViL(
        meta["target_arch"],
        attention=meta["target_attention"],
        image_size=meta["target_image_size"],
        num_classes=10,
    )
    converted = convert_classifier({"net": source}, vil)
    assert set(converted) == set(target)
    for name, expected in target.items():
        torch.testing.assert_close(converted[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    # What is said of it adds up: one line for each tensor that is written or left out.
    said = convert(source, vil)
    written = [DETECTOR_PREFIX + step.target for step in said.steps if step.action != "left out"]
    assert sorted(written) == sorted(target)
    assert {step.source for step in said.steps} == {n.removeprefix("module.") for n in source}
    untouched = {DETECTOR_PREFIX + name for name in said.untouched}
    own = {DETECTOR_PREFIX + n for n in vil.state_dict() if "relative_position_index" not in n}
    assert untouched | set(target) == own
    assert not untouched & set(target)


def steps_of(source: dict[str, Any], vil: ViL) -> dict[str, tuple[str, str]]:
    return {
        step.target or step.source: (step.action, step.reason)
        for step in convert(source, vil).steps
    }


def test_a_conversion_says_what_happened_to_each_tensor() -> None:
    small = ARCH.replace("f3,a1", "f3,a0")
    full = ViL(small, attention="full", image_size=32, num_classes=10)
    steps = steps_of(full.state_dict(), ViL(small.replace("g1", "g4"), image_size=64))
    assert steps["layer1.0.cls_token"] == ("expanded", "")
    assert steps["layer1.0.proj.weight"] == ("copied", "")
    assert steps["layer1.1.attn.proj_global.weight"] == ("copied", "")
    for part in ("query", "kv", "query_global", "kv_global"):
        assert steps[f"layer1.1.attn.{part}.weight"] == ("split", "")
    table = "layer1.1.attn.local_relative_position_bias_table"
    assert steps[table] == ("resized", "")
    index = "layer1.1.attn.relative_position_index"
    assert steps[index] == ("left out", "every model makes its own")
    assert steps["layer1.1.attn.g2g_relative_position_bias"] == (
        "left out",
        "shape (1, 1, 1) does not fit (1, 4, 4)",
    )
    assert steps["head.weight"] == ("left out", "shape (10, 32) does not fit (1000, 32)")
    assert {action for action, _ in steps.values()} == set(ACTIONS)


def test_global_positions_are_passed_on_as_they_are_and_said() -> None:
    source = ViL(ARCH, image_size=64).state_dict()
    vil = ViL(ARCH.replace("g1", "g4"), image_size=64)
    action, reason = steps_of(source, vil)["layer1.0.cls_pos_embed"]
    assert action == "copied"
    assert "as published" in reason
    name = DETECTOR_PREFIX + "layer1.0.cls_pos_embed"
    assert convert_classifier(source, vil)[name].shape == (1, 1, 8)


def test_tables_that_cannot_be_resized_are_left_out() -> None:
    vil = ViL(ARCH.replace("a1", "a0"), image_size=64)
    table = "layer1.1.attn.local_relative_position_bias_table"
    strange = {table: torch.zeros(15, 1), "layer1.0.cls_token": torch.zeros(8)}
    steps = steps_of(strange, vil)
    assert steps[table] == ("left out", "shape (15, 1) does not fit (121, 1)")
    assert steps["layer1.0.cls_token"] == ("left out", "shape (8,) does not fit (1, 1, 8)")


def test_what_does_not_fit_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    vil = ViL(ARCH, image_size=64, num_classes=10)
    source = dict(vil.state_dict()) | {
        "head.weight": torch.zeros(7, 32),
        "layer9.0.proj.weight": torch.zeros(2),
    }
    converted = convert_classifier(source, vil)
    assert DETECTOR_PREFIX + "head.weight" not in converted
    assert "head.weight: shape (7, 32) does not fit (10, 32)" in caplog.text
    assert "layer9.0.proj.weight: the backbone has no such tensor" in caplog.text


@pytest.mark.parametrize("prefix", ["", DETECTOR_PREFIX])
def test_a_published_state_dict_loads(prefix: str) -> None:
    source, vil = (ViL(ARCH, image_size=64, num_classes=10) for _ in range(2))
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if prefix:
        state["roi_heads.box_head.fc1.weight"] = torch.zeros(3)
    load_published(vil, state)
    for name, tensor in source.state_dict().items():
        assert torch.equal(vil.state_dict()[name], tensor)


def test_a_state_dict_that_does_not_fit_lists_everything_and_loads_nothing() -> None:
    vil = ViL(ARCH, image_size=64, num_classes=10)
    before = {name: tensor.clone() for name, tensor in vil.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(7, 32)
    with pytest.raises(
        InputError, match=r"missing: norm\.bias; unexpected: extra; misshapen: "
    ) as e:
        load_published(vil, state)
    assert "head.weight (7, 32) instead of (10, 32)" in str(e.value)
    for name, tensor in before.items():
        assert torch.equal(vil.state_dict()[name], tensor)


class Code:
    """Pickled, it runs a command where it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


TENSORS = {"a": torch.arange(3.0), "b": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"model": TENSORS, "optimizer": {"state": {}}, "iteration": 3},
        {"net": TENSORS, "epoch": 299},
        {"state_dict": TENSORS},
    ],
    ids=["alone", "model", "net", "state_dict"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_found_in_its_file(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_never_run(tmp_path: Path, zipped: bool) -> None:
    path, ran = tmp_path / "checkpoint.pth", tmp_path / "ran"
    content = {"net": TENSORS, "extra": Code(f"touch {ran}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"checkpoint\.pth: holds more .*posix\.system") as caught:
        load_file(path)
    assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_a_bare_pickle_is_never_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "checkpoint.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Code(f"touch {ran}")))
    with pytest.raises(InputError, match=r"checkpoint\.pkl: is damaged, or no checkpoint"):
        load_file(path)
    assert not ran.exists()


def test_objects_of_classes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"net": TENSORS, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(InputError, match=r"argparse\.Namespace.*save the state dict alone"):
        load_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged, or no checkpoint"),
        (b"hello, world\n", "is damaged, or no checkpoint"),
        (bytes(range(256)), "is damaged, or no checkpoint"),
        (b"PK\x03\x04 cut off", "is damaged, or no checkpoint"),
        ({"epoch": 3, "weights": TENSORS}, "no tensors are epoch, weights"),
        ({"model": {**TENSORS, "step": 3}}, "no tensors are step"),
        ({str(i): i for i in range(9)}, "no tensors are 0, 1, 2, 3, 4 and 4 more"),
        ({}, "it holds nothing"),
        ({"model": {}}, "it holds model"),
        (torch.zeros(2), "it holds one Tensor"),
    ],
)
def test_a_file_without_a_state_dict_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"a": torch.zeros(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="is damaged"):
        load_file(path)
    for absent in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            load_file(absent)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "det.pth"
    save_file(TENSORS, path)
    assert load_file(path).keys() == TENSORS.keys()
    assert list(path.parent.iterdir()) == [path]
    before = path.read_bytes()

    def fail(_state: object, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"cannot write .*det\.pth: the disk is full"):
        save_file({}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
