"""Rows that no other beats, in tables and plots."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from bench.record import Record
from report import answer, front, load, page, plots, tables
from report.columns import MISSING
from tests.records import changed
from tests.report.test_report import drawn, failed, make
from tests.report.test_searches import tried


def point(row: str, box_ap: float, flops: int, **changes: Any) -> Record:
    """A record with a box mAP (%) and multiply-adds; its other costs are those of all such rows."""
    record = changed(make(row), {"evaluation.box.AP": box_ap, "flops.total": flops})
    return replace(record, **changes)


def names(records: list[Record], cost: str = "flops") -> list[tuple[str, str | None]]:
    data = load.frame(records)
    return [
        (data["row"][place.row], None if place.beaten_by is None else data["row"][place.beaten_by])
        for place in front.places(load.Library(records, data), cost)
    ]


def test_a_row_is_beaten_by_one_that_is_no_worse_and_no_dearer() -> None:
    records = [
        point("dear", 30.0, 5_000),
        point("cheap", 10.0, 1_000),
        point("good", 20.0, 2_000),
        point("worse", 15.0, 3_000),
        point("dearer", 20.0, 4_000),
        point("as dear", 19.0, 2_000),
    ]
    assert names(records) == [
        ("cheap", None),
        ("good", None),
        ("as dear", "good"),
        ("worse", "good"),
        ("dearer", "good"),
        ("dear", None),
    ]


def test_equal_rows_do_not_beat_each_other_and_what_no_table_shows_decides_nothing() -> None:
    same = [point("one", 20.0, 1_000), point("other", 20.0, 1_000)]
    assert names(same) == [("one", None), ("other", None)]
    assert names([point("cheap", 20.01, 1_000), point("dear", 20.04, 2_000)]) == [
        ("cheap", None),
        ("dear", "cheap"),
    ]


def test_rows_measured_otherwise_are_not_compared_and_are_named() -> None:
    other_batch = changed(make("swin"), {"latency.batch_size": 1})
    other_images = changed(make("full"), {"evaluation.images": 7})
    records = [make("ViL"), make("global", 1), make("performer", 2), other_batch, other_images]
    assert {row for row, _ in names(records, "latency")} == {"ViL", "global", "performer"}
    assert {row for row, _ in names(records)} == {"ViL", "global", "performer", "swin"}
    (table,) = front.tables([*records, failed("linformer")])
    said = " ".join(table.notes)
    assert "compared in FLOPs, memory, as" in said
    assert "were: swin, full, linformer." in said


def test_another_machine_has_other_latencies() -> None:
    elsewhere = changed(make("full"), {"environment.cpu": "Another processor"})
    records = [make("ViL"), make("global", 1), elsewhere]
    assert {row for row, _ in names(records, "latency")} == {"ViL", "global"}
    assert len(names(records, "memory_training")) == 3


def test_latencies_of_another_session_are_not_compared() -> None:
    rows = [("ViL", "today"), ("full", "today"), ("global", "before")]
    records = [changed(make(row), {"latency.session": session}) for row, session in rows]
    assert {row for row, _ in names(records, "latency")} == {"ViL", "full"}
    assert len(names(records, "memory_training")) == 3
    said = " ".join(page._counting(records))
    assert "taken in 2 sessions, those of one alone are compared" in said
    assert "sessions" not in " ".join(page._counting(records[:2]))


def test_latencies_of_another_session_are_named_in_tables_and_in_no_plot() -> None:
    rows = [("ViL", "today"), ("full", "today"), ("global", "before")]
    records = [changed(make(row), {"latency.session": session}) for row, session in rows]
    found = {plot.name: plot for plot in plots.draw(records)}
    for name in ("accuracy_latency", "cost"):
        assert (
            "Latency not drawn, as of another session than most rows': global." in found[name].note
        )
    assert "Latency" not in found["accuracy_flops"].note
    (first,), (compared,) = answer.first(records, []), tables.comparison(records)
    for table in (first.table, compared):
        said = "Times of another session than most rows', not to be compared: global."
        assert said in table.notes


def test_of_a_search_its_best_row_is_compared() -> None:
    records = [tried("ViL", 0.05, 20.0), tried("ViL", 0.1, 22.0), make("global")]
    assert {row for row, _ in names(records)} == {"ViL (drop_path=0.1)", "global"}


def test_the_table_lists_the_front_and_its_raw_form_what_beats_the_others() -> None:
    records = [
        point("cheap", 10.0, 1_000_000_000),
        point("good", 20.0, 2_000_000_000),
        point("worse", 15.0, 3_000_000_000),
    ]
    (table,) = front.tables(records)
    line = table.shown.iloc[0].tolist()
    assert line == ["FLOPs G", "cheap (10.0 at 1.00), good (20.0 at 2.00)", MISSING]
    raw = table.raw[table.raw["cost"] == "flops"]
    assert raw["beaten_by"].isna().tolist() == [True, True, False]
    assert raw["beaten_by"].tolist()[2] == "good"


def test_there_is_no_table_of_fewer_than_two_rows() -> None:
    assert front.tables([make("ViL"), failed("full")]) == []


def test_plots_mark_the_front_as_steps_beside_the_labels() -> None:
    records = [
        point("cheap", 10.0, 1_000_000_000),
        point("good", 20.0, 2_000_000_000),
        point("worse", 15.0, 3_000_000_000),
    ]
    ax = drawn(records)
    (line,) = (line for line in ax.lines if line.get_color() == plots.FRONT)
    assert np.asarray(line.get_xydata()).tolist() == [[1, 10], [2, 10], [2, 20]]
    corners = ax.transData.transform(line.get_xydata())
    for text in ax.texts:
        box = text.get_window_extent()
        assert not any(box.count_contains([spot]) for spot in _between(corners))


def _between(corners: np.ndarray) -> list[np.ndarray]:
    pairs = itertools.pairwise(corners)
    return [a + (b - a) * share for a, b in pairs for share in np.linspace(0, 1, 50)]
