import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.record import Record
from report import counts, load, page
from report.columns import MISSING
from tests.records import MODEL, plain

DIFFERENCE = {
    "attention": "longformer",
    "published": 10_000_000_000,
    "actual": 47_200_000_000,
    "reason": "the formula counts channels",
}
SMALL = {"attention": "full", "published": 100_050, "actual": 100_000, "reason": "biases"}


def make(row: str = "ViL", **changes: Any) -> Record:
    """A made-up record of a published row, with nothing but its FLOPs."""
    known = load.published().set_index("row").loc[row]
    flops = {
        "unit": "multiply-adds",
        "convention": "actual",
        "image_size": [800, 1344],
        "proposals": 1000,
        "total": 255_400_000_000,
        "uncounted": {},
        "published": {
            "convention": "published",
            "total": 218_200_000_000,
            "differences": [DIFFERENCE, SMALL],
        },
    }
    model = {**MODEL, "attention": known["attention"], "arch": known["arch"], "drop_path": 0.1}
    return plain(
        row=row,
        key=row.replace(" ", "").ljust(10, "0"),
        environment={"command": "python run_all.py"},
        model=model | changes.pop("model", {}),
        flops=flops | changes.pop("flops", {}),
        **changes,
    )


def test_a_published_row_shows_three_numbers_and_the_reason() -> None:
    table = counts.conventions(counts.published_lines([make()]))
    (line,) = table.shown.to_dict("records")
    assert line["published G"] == "218.3"
    assert line["recounted G"] == "218.2"
    assert line["actual G"] == "255.4"
    assert line["actual / published"] == "1.170"
    assert line["why"] == "a"
    text = " ".join(table.notes)
    assert "a, longformer: the formula counts channels." in text
    assert "multiply-adds" in text
    # What vanishes in the digits is not explained.
    assert "biases" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"flops": {"image_size": [128, 160]}},
        {"flops": {"proposals": 100}},
        {"flops": {"convention": "published"}},
        {"model": {"arch": "another"}},
        {"model": {"method": "retinanet"}},
    ],
)
def test_other_models_and_images_are_not_compared(changes: dict[str, Any]) -> None:
    assert counts.published_lines([make(**changes)]) == []


def test_the_schedule_does_not_matter() -> None:
    assert len(counts.published_lines([make(model={"schedule": "profile"})])) == 1


def test_a_record_without_the_recount_still_has_a_line() -> None:
    flops = {name: value for name, value in (make().flops or {}).items() if name != "published"}
    (line,) = counts.published_lines([dataclasses.replace(make(), flops=flops)])
    table = counts.conventions([line])
    assert table.shown["recounted G"].tolist() == [MISSING]
    assert table.shown["why"].tolist() == [MISSING]


def test_the_note_of_a_row_explains_what_is_not_reproduced() -> None:
    record = make("srformer/64", flops={"total": 223_100_000_000, "published": None})
    (line,) = counts.published_lines([record])
    table = counts.conventions([line | {"recounted": 223_140_000_000}])
    assert "a, srformer/64: 0.4 % unexplained" in " ".join(table.notes)
    assert counts.conventions([line | {"recounted": 224_100_000_000}]).shown["why"][0] == MISSING


def test_rows_share_letters_of_one_reason() -> None:
    other = {**DIFFERENCE, "attention": "global"}
    third = {**DIFFERENCE, "attention": "performer", "reason": "another"}
    lines = [
        {**counts.published_lines([make()])[0], "differences": [difference]}
        for difference in (DIFFERENCE, other, third)
    ]
    table = counts.conventions(lines)
    assert table.shown["why"].tolist() == ["a", "a", "b"]
    assert "a, longformer, global: the formula counts channels." in table.notes


def test_the_page_has_the_table(tmp_path: Path) -> None:
    text = page.write([make(), make("global")], tmp_path, title="Published").read_text()
    assert "FLOPs published, recounted and actual" in text
    assert (tmp_path / "tables" / "conventions.csv").exists()


def test_rows_name_their_libraries_where_there_are_two() -> None:
    records = [make(), make("global", model={"library": "detectron2"})]
    table = counts.conventions(counts.published_lines(records))
    assert table.shown["library"].tolist() == ["torchvision", "detectron2"]


def test_a_page_without_published_rows_has_neither(tmp_path: Path) -> None:
    text = page.write([make(model={"arch": "x"})], tmp_path, title="Other").read_text()
    assert "conventions" not in text
    assert "not comparable with published" in text


def audit_line(**changes: Any) -> dict[str, Any]:
    line = {
        "name": "full",
        "options": {"position": "absolute"},
        "error": "",
        "passed": True,
        "declared": 1_000_000,
        "operators": 1_000_000,
        "fvcore": 1_000_000,
        "disagreement": 0.0,
        "fvcore_alone_missed": -1e-5,
        "torch_on_cpu_missed": 0.956,
        "uncounted": {},
        "failures": {},
        "notes": (),
        "unsummed": 0,
    }
    return line | changes


def test_an_audit_marks_what_fails() -> None:
    lines = [
        audit_line(),
        audit_line(name="mine", options={}, passed=False, declared=1_020_000, disagreement=0.0196),
        audit_line(name="odd", passed=False, uncounted={"fvcore": {"aten::cdist": 2}}),
        audit_line(name="flex", declared=None, fvcore=None, failures={"fvcore": "RuntimeError: x"}),
        audit_line(name="gated", notes=("of values",), unsummed=20_000),
    ]
    table = counts.audit(lines, title="Audit")
    assert table.shown["counted"].tolist() == ["full", "mine !", "odd !", "flex", "gated"]
    assert table.shown["disagree %"].tolist() == ["0.0", "2.0", "0.0", "0.0", "0.0"]
    assert table.shown["torch on CPU misses %"][0] == "95.6"
    # No minus before nothing.
    assert table.shown["fvcore alone misses %"][0] == "0.0"
    assert table.shown["fvcore M"][3] == MISSING
    text = "\n".join(table.notes)
    assert "odd position=absolute: uncounted, fvcore: aten::cdist (2)" in text
    assert "flex position=absolute: fvcore counts nothing, RuntimeError: x" in text
    assert "gated position=absolute: of values" in text
    assert "gated position=absolute: not counted, as in no sum: 20,000 (2.0%) products" in text
    assert "2 of 5 do not agree" in text
    assert counts.audit(lines[:1], title="Audit").notes[-1].startswith("All 1 agree")


def test_a_histogram_of_text_is_in_proportion() -> None:
    line = {"row": "ViL", "histogram": [(1e9, 2e9, 100), (2e9, 3e9, 50), (3e9, 4e9, 0)]}
    text = counts.histogram(line)
    bars = [part.count("#") for part in text.splitlines()[1:]]
    assert bars == [40, 20, 0]
    assert "multiply-adds" in text
