"""Every column of every table, on records whose numbers all differ, against columns.txt.

A unit that changes, a column that is swapped and a row that is dropped turn a case red.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.record import Record
from report import (
    answer,
    classifiers,
    compare,
    confidence,
    counts,
    probes,
    profiles,
    reference,
    sweep,
    tables,
)
from report.columns import (
    MISSING,
    Column,
    Table,
    Unit,
    aligned,
    memory_unit,
    number,
    table,
    three_digits,
)
from tests.records import changed
from tests.report.test_answer import cost
from tests.report.test_probes import entry
from tests.report.test_report import as_published, make
from tests.report.test_searches import tried
from tests.report.test_sweep import point


def quartiles(median: float) -> dict[str, Any]:
    return {"samples": [], "q1": median - 0.003, "median": median, "q3": median + 0.004}


def figures(first: float) -> dict[str, float]:
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    return {name: first + place for place, name in enumerate(names)}


def parts(inference: Any, training: Any) -> dict[str, Any]:
    return {"inference": {"fpn": inference}, "training": {"fpn": training}}


def drawn(box: list[float], mask: list[float]) -> dict[str, Any]:
    return {"seed": 0, "resamples": 3, "box_AP": box, "mask_AP": mask}


RECORD = changed(
    make("ViL"),
    {
        "parameters": {"total": 2_110_000, "by_part": {"fpn": 1_230_000}},
        "flops.total": 1_410_000_000,
        "flops.unsummed": 28_200_000,
        "flops.by_part": {"fpn": 130_000_000},
        "memory.inference": 117_000_000,
        "memory.training": 419_000_000,
        "memory.predicted": {
            "inference": {"total": 118_000_000},
            "training": {"total": 421_000_000},
        },
        "memory.by_part": parts(11_000_000, 12_000_000),
        "latency.inference": quartiles(0.151),
        "latency.training": quartiles(0.457),
        "latency.group": {"inference": "a", "training": "bc"},
        "latency.ran": {
            "inference": {"sdpa": {"flash": 3}, "dtypes": ["float32"], "compiled": True}
        },
        "latency.by_part": parts(quartiles(0.021), quartiles(0.022)),
        "training.seconds": 96.0,
        "training.losses": [],
        "evaluation": {
            "split": "val2017",
            "images": 100,
            "unit": "percent",
            "box": figures(20.01),
            "mask": figures(50.01),
            "box_interval": {"AP": [18.9, 21.3]},
            "mask_interval": {"AP": [48.8, 51.4]},
            "bootstrap": drawn([20.0, 21.0, 22.0], [50.0, 51.0, 52.0]),
            "also": [{"split": "train2017", "images": 33, "box": figures(70.01), "mask": None}],
        },
        "notes": ["a note"],
        "config.profile": {"image_size": [128, 160], "batch_size": 8},
    },
)
WORSE = make(
    "full",
    1,
    evaluation={
        **(RECORD.evaluation or {}),
        "box": figures(10.01),
        "mask": figures(40.01),
        "also": [],
        "bootstrap": drawn([10.0, 11.0, 12.0], [40.0, 41.0, 43.0]),
    },
)
RECORDS = [RECORD, WORSE]
PUBLISHED = replace(RECORD, model=as_published("ViL", 0).model)
SEARCH = [tried("ViL", 0.05, 20.03), tried("ViL", 0.1, 22.04)]
SWEEP = [point(row, side) for row in ("full", "ViL") for side in (224, 448)]

FIT = {
    "row": "ViL",
    "mode": "training",
    "vary": "batch_size",
    "largest": 7,
    "budget": 2_000_000_000,
    "prediction": {
        "total": 1_930_000_000,
        "batch_size": 7,
        "image_size": [128, 160],
        "precision": "32-true",
        "device": "cpu",
    },
    "beyond": {"total": 2_120_000_000},
}
AUDIT = {
    "unit": "multiply-adds",
    "name": "full",
    "options": {"position": "absolute"},
    "error": "",
    "passed": False,
    "declared": 1_010_000,
    "operators": 1_020_000,
    "fvcore": 1_030_000,
    "disagreement": 0.0196,
    "fvcore_alone_missed": 0.123,
    "torch_on_cpu_missed": 0.456,
    "uncounted": {"fvcore": {"aten::cdist": 2}},
    "failures": {},
    "notes": (),
    "unsummed": 20_400,
}
CONVENTION = {
    "row": "srformer/64",
    "library": "torchvision",
    "family": "srformer",
    "note": "a note",
    "published_parameters": 39_800_000,
    "parameters": 39_760_000,
    "published": 218_300_000_000,
    "recounted": 223_200_000_000,
    "actual": 255_400_000_000,
    "differences": [
        {"attention": "srformer", "published": 1e10, "actual": 4e10, "reason": "channels"}
    ],
}
SIZES = {
    "row": "ViL",
    "dataset": "val2017",
    "images": 5000,
    "family": "longformer",
    "fixed_size": None,
    "mean": 241_000_000_000,
    "deviation": 22_000_000_000,
    "minimum": 103_000_000_000,
    "maximum": 294_000_000_000,
    "one_size": 255_400_000_000,
    "padded_pixels": 0.0123,
    "uncounted": {"aten._fft_c2c": 5},
}

THROUGHPUT = changed(
    RECORD,
    {
        "latency.throughput": {
            "inference": {
                "ended": "the next batch is no faster",
                "best": 4,
                "batches": [
                    {
                        "batch_size": batch,
                        "images_per_second": 10.25 * batch,
                        **dict(zip(("q1", "median", "q3", "p90", "p95"), times, strict=True)),
                        "energy": {"joules": 12.5 * batch, "idle_watts": 31.5, "source": "a meter"},
                    }
                    for batch, times in (
                        (1, (0.091, 0.0925, 0.0935, 0.0945, 0.0955)),
                        (2, (0.1, 0.1, 0.1, 0.1, 0.1)),
                        (4, (0.191, 0.1925, 0.1935, 0.1945, 0.1955)),
                    )
                ],
            }
        },
    },
)
PERCENTILES = changed(RECORD, {"latency.inference.samples": [0.15 + 0.001 * k for k in range(21)]})
CLASSIFIER = replace(
    RECORD,
    evaluation={
        "split": "val",
        "box": {},
        "top1": 71.23,
        "top5": 90.12,
        "top1_interval": {"top1": [69.81, 72.64]},
        "image_size": [32, 48],
        "crop_share": 0.875,
    },
)
AFTER = changed(
    RECORD,
    {
        "flops.total": 2_820_000_000,
        "parameters": {"total": 1_266_000, "by_part": {}},
        "memory.training": 838_000_000,
        "latency.inference": {"samples": [0.302] * 6, "median": 0.302},
        "evaluation.box": figures(18.01),
        "evaluation.bootstrap": drawn([18.5, 19.0, 19.5], [50.0, 51.0, 52.0]),
    },
)
BEFORE = changed(RECORD, {"latency.inference.samples": [0.151] * 6})
# At full size: 10^9 times what `tests.report.test_answer.cost` says.
COSTS = [cost("ViL", 255, 4), cost("full", 1410, 7)]
SEEN = ("ViL", "srformer/64", "srformer/32", "global", "performer")


def probed(row: str, find: float, count: float) -> Record:
    one = entry(row, "row", {"find": find, "count": count})
    tasks = {
        name: {**task, "seconds": [1.5, 2.5, 3.5]} for name, task in one.probes["tasks"].items()
    }
    return replace(one, probes={**one.probes, "tasks": tasks})


PROBES = [
    probed(row, 0.9 - 0.1 * place, 0.5 + 0.11 * (place % 3)) for place, row in enumerate(SEEN)
]


def compared(quantity: str) -> Table:
    """The line of a quantity, of which there is one in both tables where it is not the same."""
    found = compare.shown(compare.compare([BEFORE], [AFTER]))
    raw = found.raw[found.raw["quantity"] == quantity]
    return replace(
        found,
        raw=raw[["quantity", *raw.columns.drop(["quantity", "key_a", "key_b"], errors="ignore")]],
        shown=found.shown[found.shown["figure"].str.startswith(quantity)],
    )


# What each table is made of, its rows, and the row that columns.txt is of.
CASES: dict[str, tuple[Callable[[], Table | None], list[str], int]] = {
    "comparison": (lambda: tables.comparison(RECORDS)[0], ["ViL", "full"], 0),
    "searches": (lambda: tables.searches(SEARCH)[0], ["ViL", "ViL"], 1),
    "figures": (lambda: tables.figures(RECORDS)[0], ["ViL", "ViL", "full", "full"], 1),
    "further splits": (lambda: tables.further_splits(RECORDS), ["ViL (torchvision)"], 0),
    "published": (lambda: tables.against_published([PUBLISHED]), ["ViL", "ViL"], 1),
    "details": (lambda: tables.details(RECORDS)[0], ["ViL", "full"], 0),
    "intervals": (lambda: confidence.intervals(RECORDS)[0], ["ViL", "full"], 0),
    "differences": (lambda: confidence.differences(RECORDS)[0], ["full"], 0),
    "profile": (lambda: profiles.costs(RECORDS), ["ViL", "full"], 0),
    "parts": (lambda: profiles.parts(RECORD), ["fpn"], 0),
    "fits": (lambda: profiles.fits([FIT]), ["ViL"], 0),
    "growth": (lambda: sweep.summaries(sweep.frame(SWEEP))[0], ["full", "ViL"], 1),
    "points": (lambda: sweep.points(sweep.frame(SWEEP)), ["full", "full", "ViL", "ViL"], 3),
    "audit": (lambda: counts.audit([AUDIT], title="Audit"), ["full"], 0),
    "conventions": (lambda: counts.conventions([CONVENTION]), ["srformer/64"], 0),
    "sizes": (lambda: counts.sizes([SIZES]), ["ViL"], 0),
    "answer": (lambda: answer.first(RECORDS, [])[0].table, ["ViL", "full"], 0),
    "answer at full size": (lambda: answer.first(RECORDS, COSTS)[0].table, ["ViL", "full"], 0),
    "reference": (lambda: reference.tables(RECORDS, COSTS)[0], ["ViL", "full"], 1),
    "latencies": (lambda: tables.latencies([PERCENTILES])[0], ["ViL"], 0),
    "throughput": (lambda: profiles.throughput([THROUGHPUT]), ["ViL", "ViL"], 1),
    "classifiers": (lambda: classifiers.comparison([CLASSIFIER])[0], ["ViL"], 0),
    "probes": (
        lambda: probes.tables(PROBES)[0],
        ["srformer/32", "srformer/64", "ViL", "performer", "global"],
        1,
    ),
    "agreement": (
        lambda: probes.tables(PROBES)[1],
        ["find", "count", "mean", "rule: Partial or ViL"],
        2,
    ),
    "compared mAP": (lambda: compared("box mAP"), ["box mAP"], 0),
    "compared FLOPs": (lambda: compared("FLOPs"), ["FLOPs"], 0),
    "compared parameters": (lambda: compared("parameters"), ["parameters"], 0),
    "compared memory": (lambda: compared("memory, training"), ["memory, training"], 0),
    "compared latency": (lambda: compared("latency, inference"), ["latency, inference"], 0),
}


def expected() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """By table: the cells of the CSV file and those that readers see."""
    lines = (Path(__file__).parent / "columns.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).strip()
    found = {}
    for section in text.split("\n\n"):
        name, *cells = section.splitlines()
        parts = [[part.strip() for part in cell.split("|")] for cell in cells]
        raw = {key: value for key, _, value in (part[0].partition(" ") for part in parts) if key}
        found[name] = raw, {part[1]: part[2] for part in parts if len(part) == 3}
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_table_has_these_rows_and_cells(name: str) -> None:
    build, rows, line = CASES[name]
    raw, shown = expected()[name]
    built = build()
    assert built is not None
    assert built.raw.iloc[:, 0].tolist() == rows
    assert len(built.shown) == len(rows)
    # The CSV file is read back, as its users read it.
    cells = pd.read_csv(io.StringIO(tables.to_csv(built.raw))).iloc[line]
    assert cells.index.tolist() == list(raw)
    for column, cell in cells.items():
        is_number = pd.api.types.is_number(cell) and not pd.isna(cell)
        said = raw[str(column)]
        wanted = pytest.approx(float(said), rel=1e-8) if is_number else said
        assert ("" if pd.isna(cell) else cell if is_number else str(cell)) == wanted, column
    assert built.shown.iloc[line].to_dict() == shown


def test_a_column_that_the_data_lack_or_have_no_value_of_is_left_out() -> None:
    data = pd.DataFrame({"known": [1.5, None], "empty": [None, None]})
    columns = [
        Column("known", "known {}", unit=Unit.GB),
        Column("empty", "empty", optional=True),
        Column("missing", "missing"),
    ]
    made = table("name", "Title", data, columns)
    assert list(made.raw.columns) == ["known", "empty"]
    assert made.shown.to_dict("list") == {"known GB": ["0.00", MISSING]}


def test_numbers_for_readers() -> None:
    assert [number(1)(x) for x in (1234.56, -0.04, None)] == ["1,234.6", "0.0", MISSING]
    assert [number(1, sign=True)(x) for x in (2, -2, 0.04)] == ["+2.0", "-2.0", "0.0"]
    assert [three_digits(x) for x in (1.234, 12.34, 123.4, 1234.0)] == [
        "1.23",
        "12.3",
        "123",
        "1,234",
    ]
    assert aligned(pd.Series([1.234, 100.0])).tolist() == ["1.2", "100.0"]


def test_memory_is_in_gigabytes_where_all_is_large_or_the_largest_very() -> None:
    small, large = pd.Series([9e8, 9e9, None]), pd.Series([1e10])
    assert memory_unit(small) is memory_unit(pd.Series([None])) is Unit.MB
    assert memory_unit(small, large) is memory_unit(pd.Series([2e9])) is Unit.GB


@pytest.mark.parametrize(
    ("total", "said"),
    [(1_230_000, None), (1_250_000, "20,000 more parameters"), (1_200_000, "30,000 parameters")],
)
def test_parameters_that_parts_do_not_sum_to_are_said(total: int, said: str | None) -> None:
    found = profiles.parts(changed(RECORD, {"parameters.total": total}))
    assert found is not None
    assert [note.startswith(str(said)) for note in found.notes if "parameters" in note] == (
        [True] if said else []
    )


@pytest.mark.parametrize(("seconds", "said"), [(0.1, False), (0.5, True)])
def test_phases_that_are_no_step_are_said(seconds: float, said: bool) -> None:
    phases = {name: {"median": seconds} for name in ("forward", "backward", "optimizer")}
    latency = {"latency.phases": phases, "latency.training": quartiles(0.3)}
    found = profiles.parts(changed(RECORD, latency))
    assert found is not None
    assert any("timed while the machine did something else" in n for n in found.notes) == said
