"""Rows of a search, found and marked from records alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import record as store
from bench.record import Record
from report import load, page, searches, tables
from report.columns import MISSING
from tests.records import changed
from tests.report.test_report import failed, make


def tried(row: str, value: float, box_ap: float | None, **changes: Any) -> Record:
    """A record of `row` with a drop path, as a search names it; without box mAP it failed."""
    config = {
        "row": f"{row} (drop_path={value})",
        "seed": 0,
        "model": {"drop_path": value, "arch": row},
        **changes,
    }
    record = failed(config["row"])
    if box_ap is not None:
        record = changed(make(config["row"]), {"evaluation.box.AP": box_ap})
    return replace(record, config=config, key=store.key(config))


def test_the_best_value_is_found_and_marked() -> None:
    records = [
        tried("ViL", 0.05, 20.0),
        tried("ViL", 0.1, 22.0),
        tried("ViL", 0.2, None),
        tried("full", 0.05, 9.0),
        tried("full", 0.1, 9.0),
        make("global"),
    ]
    first, second = searches.find(records)
    assert (first.row, first.setting) == ("ViL", "drop_path")
    assert first.best == ("0.1", records[1])
    # Of equal ones the first.
    assert second.best == ("0.05", records[3])
    (table,) = tables.comparison(records)
    marked = [row for row in table.shown["row"] if row.endswith(tables.BEST)]
    assert marked == ["ViL (drop_path=0.1), best", "full (drop_path=0.05), best"]
    best = table.raw["search_best"]
    assert best.isna().tolist() == [False] * 5 + [True]
    (shown,) = tables.searches(records)
    assert shown.shown.head(3).values.tolist() == [
        ["ViL", "drop_path", "0.05", "20.0", "", "done"],
        ["ViL", "drop_path", "0.1", "22.0", "best", "done"],
        ["ViL", "drop_path", "0.2", MISSING, "", "failed"],
    ]
    assert len(shown.raw) == 5


def test_values_under_other_settings_are_another_search() -> None:
    here = [tried("ViL", 0.05, 20.0), tried("ViL", 0.1, 22.0)]
    there = [tried("ViL", 0.05, 30.0, seed=1), tried("ViL", 0.1, 29.0, seed=1)]
    found = searches.find([*here, *there])
    assert [search.best[1] for search in found if search.best] == [here[1], there[0]]


def test_one_value_is_no_search_nor_is_a_name_with_brackets() -> None:
    assert searches.find([tried("ViL", 0.05, 20.0), make("ViL")]) == []
    assert searches.base(make("ViL-Medium (D) RetinaNet 1x")) == "ViL-Medium (D) RetinaNet 1x"
    # Called so, but no setting of its configuration is.
    assert searches.base(make("mine (depth=3)")) == "mine (depth=3)"
    assert searches.base(tried("ViL-Medium (D)", 0.1, 1.0)) == "ViL-Medium (D)"


def test_nothing_is_best_where_all_failed() -> None:
    records = [tried("ViL", 0.05, None), tried("ViL", 0.1, None)]
    (search,) = searches.find(records)
    assert search.best is None
    (table,) = tables.searches(records)
    assert table.raw["best"].tolist() == [False, False]


def test_nothing_is_best_of_values_on_other_images() -> None:
    records = [tried("ViL", 0.05, 20.0), tried("ViL", 0.1, 22.0)]
    other = {**(records[1].evaluation or {}), "annotations_sha256": "other"}
    (search,) = searches.find([records[0], replace(records[1], evaluation=other)])
    assert search.best is None


def test_rows_of_a_search_stand_where_their_row_does() -> None:
    rows = [make("Partial ViL"), tried("ViL", 0.1, 1.0), make("zzz"), make("performer")]
    names = [record.row for record in load.ordered(rows)]
    assert names == ["performer", "ViL (drop_path=0.1)", "Partial ViL", "zzz"]


def test_the_page_has_the_search(tmp_path: Path) -> None:
    records = [tried("ViL", 0.05, 20.0), tried("ViL", 0.1, 22.0)]
    text = page.write(records, tmp_path, title="Suite").read_text()
    assert "## Searched settings" in text
    assert "ViL (drop_path=0.1), best" in text
    plain = page.write([make("ViL")], tmp_path / "plain", title="Suite").read_text()
    assert "Searched" not in plain
