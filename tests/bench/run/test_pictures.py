"""What one query sees, of mechanisms whose reach is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.errors import InputError
from bench.model.backbone import ViL
from bench.run import pictures
from tests.report.test_report import make

ARCH = "_".join(f"l{n},h2,d16,n1,s1,g1,p{4 if n == 1 else 2},f2" for n in (1, 2, 3, 4))


@pytest.mark.parametrize(("attention", "cells"), [("full", 16 * 16), ("longformer", 6 * 6)])
def test_a_query_sees_as_far_as_its_mechanism_reaches(attention: str, cells: int) -> None:
    torch.manual_seed(0)
    vil = ViL(ARCH, attention=attention, image_size=64)
    seen = pictures.saliency(vil, torch.rand(3, 64, 64), (7, 8))
    assert seen.shape == (16, 16)
    assert seen.max() == 1
    assert int((seen > 0).sum()) == cells
    assert seen[7, 8] > 0


def test_what_is_not_finite_is_said_and_not_drawn() -> None:
    vil = ViL(ARCH, attention="full", image_size=64)
    next(vil.attention_places()).module.proj.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="gradient of its first attention layer is not finite"):
        pictures.saliency(vil, torch.rand(3, 64, 64), (7, 8))


def test_weights_that_another_run_wrote_are_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vil.pth").write_bytes(b"other")
    one = make("ViL")
    kept = {"path": "weights/vil.pth", "sha256": "0" * 64}
    one = replace(one, training={**(one.training or {}), "weights": kept})
    (said,) = pictures.make([one], tmp_path)
    assert "is not what its run wrote" in said
