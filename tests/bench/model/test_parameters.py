import csv
from pathlib import Path

import pytest
import torch

from bench.model import detectors
from bench.model.backbone import ViL

with (Path(__file__).parents[3] / "results" / "published.csv").open(newline="") as _table:
    ROWS = {row["row"]: row for row in csv.DictReader(_table)}
METHODS = {"Mask R-CNN": "mask_rcnn", "RetinaNet": "retinanet"}
# The published 45.1 is 45.16 cut off, as the row's note says.
NOTED = {"Partial global": 45.16}


def test_all_published_rows_are_here():
    assert len(ROWS) == 25
    assert set(NOTED) == {name for name, row in ROWS.items() if "45.16M" in row["note"]}


@pytest.mark.parametrize("name", ROWS)
def test_published_parameter_count(name):
    row = ROWS[name]
    # The zoo publishes the count of the twin with absolute positions.
    arch = row["arch"].replace("a0", "a1")
    with torch.device("meta"):
        vil = ViL(arch, attention=row["attention"])
        detector = detectors.build(vil, method=METHODS[row["method"]])
    millions = sum(parameter.numel() for parameter in detector.parameters()) / 1e6
    assert millions == pytest.approx(NOTED.get(name, float(row["params_m"])), abs=0.05)
