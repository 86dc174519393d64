"""The published rows of `results/published.csv`, counted again, and why counts differ.

Each row has three numbers of multiply-adds: as published, counted again in the published
convention, and what actually runs. A mechanism says itself why its two counts differ
(`published_note`).
"""

import csv
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measure import flops
from bench.model import detectors
from bench.model.backbone import ViL
from bench.model.detectors import Detector

RESULTS = Path(__file__).resolve().parents[2] / "results"
METHODS = {"Mask R-CNN": "mask_rcnn", "RetinaNet": "retinanet"}
# What the published numbers are of: one image, padded, and the proposals in the box head.
IMAGE_SIZE, PROPOSALS = (800, 1344), 1000
# All but one of the rows agree within 0.2 %; its note says how far it is off.
TOLERANCE = 5e-3
_GIGA, _MEGA = 1e9, 1e6


@dataclass(frozen=True)
class Difference:
    """Why the two counts of a mechanism differ; multiply-adds of all its modules in a detector.

    Attributes:
        attention: the mechanism.
        published: by the formula of the published table.
        actual: what runs.
        reason: in one sentence; empty where the mechanism gives none.
    """

    attention: str
    published: int
    actual: int
    reason: str


@dataclass(frozen=True)
class Recount:
    """A published row and its counts.

    Attributes:
        row: its name.
        method: "mask_rcnn" or "retinanet".
        published_parameters: of the whole detector.
        parameters: the same, counted.
        published: multiply-adds, as published.
        recounted: the same, counted in the published convention, with the ARCH string that the
            publication counted.
        actual: multiply-adds that run, with the ARCH string of the row.
        differences: of its mechanisms.
        note: of the row.
        counted_arch: the ARCH string that was counted for publication, where it is another.
    """

    row: str
    method: str
    published_parameters: float
    parameters: int
    published: float
    recounted: int
    actual: int
    differences: tuple[Difference, ...]
    note: str
    counted_arch: str
    unit: str = flops.UNIT

    @property
    def reproduced(self) -> bool:
        """Whether counting again gives what was published."""
        return abs(self.recounted / self.published - 1) <= TOLERANCE


def section(
    detector: Detector, *, image_size: tuple[int, int], proposals: int
) -> dict[str, Any] | None:
    """Return the count of a detector in the published convention, for its record.

    None where one of its mechanisms has no published formula.
    """
    found = differences(detector.vil, image_size)
    if found is None:
        return None
    report = flops.count_flops(
        detector, image_size=image_size, proposals=proposals, convention="published"
    )
    return {
        "convention": report.convention,
        "total": report.total,
        "differences": [dataclasses.asdict(difference) for difference in found],
    }


def differences(vil: ViL, image_size: tuple[int, int]) -> tuple[Difference, ...] | None:
    """Both counts of each mechanism in closed form; None where one of them has no published one."""
    found: dict[str, Difference] = {}
    for place in vil.attention_places():
        grid, module = place.grid(image_size), place.module
        published, actual = (
            getattr(module, name, lambda _: None)(grid)
            for name in ("published_multiply_adds", "multiply_adds")
        )
        if published is None or actual is None:
            return None
        name = place.attention
        one = found.get(name, Difference(name, 0, 0, getattr(module, "published_note", "")))
        found[name] = dataclasses.replace(
            one, published=one.published + published, actual=one.actual + actual
        )
    return tuple(found.values())


def recount() -> Iterator[Recount]:
    """Count every published row, in the order of the table."""
    for row in _rows():
        method, attention, arch = METHODS[row["method"]], row["attention"], row["arch"]
        parameters, actual, _, found = _count(method, attention, arch)
        _, _, recounted, _ = _count(method, attention, row["counted_arch"] or arch)
        yield Recount(
            row=row["row"],
            method=method,
            published_parameters=float(row["params_m"]) * _MEGA,
            parameters=parameters,
            published=float(row["flops_g"]) * _GIGA,
            recounted=recounted,
            actual=actual,
            differences=found,
            note=row["note"],
            counted_arch=row["counted_arch"],
        )


def _rows() -> list[dict[str, str]]:
    with (RESULTS / "published.csv").open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


@functools.cache
def _count(method: str, attention: str, arch: str) -> tuple[int, int, int, tuple[Difference, ...]]:
    """Parameters, actual count, published count and differences; rows of two schedules share it."""
    # The zoo published the twins with absolute positions: other parameters, the same multiply-adds.
    with torch.device("meta"):
        vil = ViL(arch.replace("a0", "a1"), attention=attention)
        detector = detectors.build(vil, method=method)
    actual, published = (
        flops.count_flops(
            detector, image_size=IMAGE_SIZE, proposals=PROPOSALS, convention=convention
        )
        for convention in ("actual", "published")
    )
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return parameters, actual.total, published.total, differences(vil, IMAGE_SIZE) or ()
