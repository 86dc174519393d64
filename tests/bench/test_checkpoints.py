"""Published names in and out: loading, and the conversion of classification checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.backbone import ViL
from bench.checkpoints import DETECTOR_PREFIX, convert_classifier, load_published

GOLDENS = Path(__file__).parents[1] / "goldens"
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
        ValueError, match=r"missing: norm\.bias; unexpected: extra; misshapen: "
    ) as e:
        load_published(vil, state)
    assert "head.weight (7, 32) instead of (10, 32)" in str(e.value)
    for name, tensor in before.items():
        assert torch.equal(vil.state_dict()[name], tensor)
