"""Intervals of mAP and differences of rows, over made-up records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import record
from bench.record import Record
from bench.run.bootstrap import IOU_THRESHOLDS, Matches, average_precision, draws, interval
from report import answer, confidence, load, page, tables
from report.columns import MISSING
from tests.report.test_report import failed, make


def evaluated(row: str, box: list[float | None], number: int = 0, **changes: Any) -> Record:
    """A record of `row` with these draws; masks are two points lower."""
    known = [value for value in box if value is not None]
    low, middle, high = np.percentile(known, [2.5, 50, 97.5]).tolist()
    evaluation: dict[str, Any] = {
        "split": "val2017",
        "images": 100,
        "annotations_sha256": "abc",
        "unit": "percent",
        "box": {"AP": middle},
        "mask": {"AP": middle - 2},
        "box_interval": {"AP": [low, high], "level": 0.95, "resamples": len(box), "seed": 0},
        "mask_interval": {"AP": [low - 2, high - 2], "level": 0.95, "resamples": 5, "seed": 0},
        "bootstrap": {
            "seed": 0,
            "resamples": len(box),
            "unit": "percent",
            "box_AP": box,
            "mask_AP": [None if value is None else value - 2 for value in box],
        },
    }
    model = {"model": make(row).model | changes.pop("model", {})}
    return make(row, number, evaluation=evaluation | changes, **model)


def common(shift: float = 0.0, noise: float = 0.0, seed: int = 1) -> list[float | None]:
    """200 draws that rows have in common, moved by `shift`, and noise of the row's own."""
    images = np.random.default_rng(0).normal(30, 3, 200)
    own = np.random.default_rng(seed).normal(shift, noise, 200)
    return (images + own).tolist()


def test_a_row_without_draws_has_no_interval() -> None:
    records = [evaluated("ViL", common()), failed("full")]
    (table,) = confidence.intervals(records)
    assert table.shown.iloc[1].tolist() == ["full", "0", *[MISSING] * 4]
    assert "200 draws" in table.notes[0]


def test_records_without_draws_have_no_tables() -> None:
    records = [make("ViL"), make("full", 1), failed("performer")]
    assert confidence.intervals(records) == confidence.differences(records) == []
    assert confidence.differences([evaluated("ViL", common()), failed("full")]) == []


def test_rows_are_told_apart_draw_by_draw() -> None:
    records = [
        evaluated("performer", common(-1, 0.2)),
        evaluated("ViL", common()),
        evaluated("full", common(0.1, 0.4, seed=2)),
        evaluated("linformer", common(1, 0.2, seed=3)),
    ]
    (table,) = confidence.differences(records)
    assert table.title == "Differences of mAP to ViL"
    raw = table.raw.set_index("row")
    # Apart, each row's interval is over ten points wide, and holds all the others.
    verdicts = raw["box_verdict"].to_dict()
    assert verdicts == {"performer": "worse", "full": confidence.SAME, "linformer": "better"}
    assert raw["mask_verdict"].to_dict() == verdicts
    assert raw.loc["performer", "box_low"] == pytest.approx(-1 - 0.4, abs=0.15)
    assert raw.loc["performer", "box_high"] == pytest.approx(-1 + 0.4, abs=0.15)
    assert "why not compared" not in table.shown
    shown = table.shown.set_index("row")
    assert shown.loc["linformer", "box mAP %"].startswith("+")
    assert shown.loc["performer", "box 95% interval"].startswith("-")


def test_an_interval_that_touches_nought_tells_nothing_apart() -> None:
    draws = [float(value) for value in range(10, 110)]
    assert confidence.difference_interval(0, draws, draws) == (0, 0)
    (table,) = confidence.differences([evaluated("ViL", draws), evaluated("full", draws)])
    assert table.raw["box_verdict"].tolist() == [confidence.SAME]


def test_draws_that_are_not_defined_for_both_are_left_out() -> None:
    assert confidence.difference_interval(4, [5, None, 7], [1, 2, None]) == (4, 4)
    assert confidence.difference_interval(0, [None], [1]) is None
    with pytest.raises(ValueError, match="zip"):
        confidence.difference_interval(0, [1, 2], [1])


def test_a_difference_lies_in_its_interval_as_a_value_does_in_its_own() -> None:
    """A good detector against an untrained one, on 100 images of 80 classes.

    Draws repeat some images, which raises the average precision of the good one by more than its
    interval is wide; the other has 0 in every draw, so that nothing cancels.
    """
    random = np.random.default_rng(0)
    categories = []
    for _ in range(80):
        objects = np.bincount(random.integers(0, 100, 3), minlength=100)
        (images,) = np.nonzero(objects)
        found = random.random((len(IOU_THRESHOLDS), len(images))) < 0.5
        categories.append(Matches(images, found, np.zeros_like(found), objects))
    (value,) = 100 * average_precision(categories, np.ones((1, 100), dtype=np.int32))
    drawn = (100 * average_precision(categories, draws(100, 400, seed=0))).tolist()
    assert not np.percentile(drawn, 2.5) <= value <= np.percentile(drawn, 97.5)
    nothing: list[float | None] = [0.0] * len(drawn)
    single = interval(value, drawn)
    assert single is not None
    assert single[0] < value < single[1]
    assert confidence.difference_interval(value, drawn, nothing) == pytest.approx(single)


@pytest.mark.parametrize(
    ("rows", "reference"),
    [
        (["performer", "full", "ViL"], "ViL"),
        (["performer", "full"], "full"),
        (["performer", "linformer"], "performer"),
    ],
)
def test_the_reference_is_vil_or_full_or_the_first(rows: list[str], reference: str) -> None:
    (table,) = confidence.differences([evaluated(row, common(), n) for n, row in enumerate(rows)])
    assert table.title == f"Differences of mAP to {reference}"
    assert table.raw["row"].tolist() == [row for row in rows if row != reference]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (evaluated("full", common(), annotations_sha256=None), "other images"),
        (evaluated("full", common()[:100]), "other draws"),
        (make("full"), "no draws recorded"),
        (failed("full"), "not evaluated"),
    ],
)
def test_rows_on_other_images_are_not_compared(record: Record, why: str) -> None:
    records = [evaluated("ViL", common()), evaluated("global", common(1), 1), record]
    (table,) = confidence.differences(records)
    shown = table.shown.set_index("row")
    assert shown.loc["full", "why not compared"] == why
    assert shown.loc["full", "box verdict"] == MISSING
    assert shown.loc["global", "why not compared"] == MISSING


def test_a_detector_without_masks_has_no_columns_for_them() -> None:
    nothing = {"mask": None, "mask_interval": None}
    records = []
    for row in ("ViL", "full"):
        record = evaluated(row, common(), **nothing)
        record.evaluation["bootstrap"]["mask_AP"] = None  # type: ignore[index]
        records.append(record)
    for table in [*confidence.intervals(records), *confidence.differences(records)]:
        assert not any("mask" in name for name in table.shown.columns)


def test_the_page_says_how_sure_map_is(tmp_path: Any) -> None:
    records = [evaluated("ViL", common()), evaluated("full", common(0.1, 1), 1)]
    text = page.write(records, tmp_path, title="Suite").read_text(encoding="utf-8")
    assert "## How sure mAP is" in text
    assert "Differences of mAP to ViL" in text
    assert confidence.SAME in text
    assert (tmp_path / "tables" / "differences.csv").is_file()
    plain = page.write([make("ViL")], tmp_path, title="Suite").read_text(encoding="utf-8")
    assert "How sure mAP is" not in plain


def test_rows_on_other_images_share_no_table() -> None:
    """The annotations were mended between the two; neither has the higher mAP of both."""
    rows = [evaluated("ViL", common()), evaluated("full", common(3), annotations_sha256="other")]
    crashed = failed("performer")
    found = tables.comparison([*rows, evaluated("swin", common(1)), crashed])
    assert [one.raw["row"].tolist() for one in found] == [["ViL", "swin", "performer"], ["full"]]
    assert len({one.name for one in found}) == 2
    assert "(other)" in found[1].title
    said = [one.sentences[0] for one in answer.first(rows, [])]
    assert [sentence.partition(" has the highest box mAP")[0] for sentence in said] == [
        "ViL",
        "full",
    ]


def test_images_are_told_apart_by_their_pixels(tmp_path: Path) -> None:
    """Annotations alone do not say what was evaluated on."""
    for row, pixels in (("ViL", "a" * 64), ("full", "b" * 64)):
        one = evaluated(row, common())
        own = {name: {"pixels": pixels} for name in ("val2017", "train2017")}
        place = {**one.environment, "inputs": {"data": own}}
        record.write(replace(one, environment=place), tmp_path / "records")
    records = load.load(tmp_path)
    assert not confidence.same_draws(*records)
    assert len(answer.first(records, [])) == 2
    # Of those that were evaluated alike, the answer says so.
    config = {**records[0].config, "data": {"train_split": "train2017"}}
    alike = [replace(one, evaluation=records[0].evaluation, config=config) for one in records]
    (found,) = answer.first(alike, [])
    assert "the rows with the same training data, which differs" in found.sentences[-1]
