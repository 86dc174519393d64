"""Which rows no other row beats: none has at least their box AP, to a tenth, for no more cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bench.record import Record
from report.tables import Table, aligned, by_library, memory_column, memory_unit

_GIGA = 1e9
_COLUMNS = ["cost", "row", "box_map_percent", "value", "beaten_by"]
_LEAST_ROWS = 2
_ABOUT = (
    "A row is beaten where another has at least its box mAP, to a tenth, for no more of that cost."
    " Differences within chance count too; see How sure mAP is. The table's CSV file says which row"
    " beats each of the others."
)


@dataclass(frozen=True)
class Place:
    """Where a row stands against the others in one cost.

    Attributes:
        row: its place in the frame.
        beaten_by: the place of the cheapest row that beats it, or None if it is on the front.
    """

    row: int
    beaten_by: int | None


def places(data: pd.DataFrame, cost: str) -> list[Place]:
    """Return where each row of `report.load.frame` that can be compared stands, cheapest first.

    Args:
        data: rows of one detector library, numbered from 0.
        cost: "flops", "latency" or "memory_training", for example; less is better.

    Compared are the rows with both numbers that were measured and evaluated as most of them were;
    of a search only its best row.
    """
    # As tables show it: a difference that no reader sees should decide nothing.
    shown = data.assign(box_AP=data["box_AP"].astype("Float64").round(1))
    known = shown[_comparable(shown, cost)].sort_values([cost, "box_AP"], ascending=[True, False])
    ranked = [(int(i), ap, float(x)) for i, ap, x in known[["box_AP", cost]].itertuples()]
    return [Place(row, _beaten_by(ap, x, ranked)) for row, ap, x in ranked]


def tables(records: Sequence[Record]) -> list[Table]:
    """Return the rows that no other beats in each cost, one table for each library.

    There is none for a library without two rows that can be compared.
    """
    return [table for table in by_library(records, _table) if not table.raw.empty]


def _table(data: pd.DataFrame, suffix: str) -> Table:
    memory, mode = memory_column(data)
    unit, size = memory_unit(data[memory])
    costs = {
        "flops": ("FLOPs G", 1 / _GIGA),
        memory: (f"memory {unit}, {mode}", 1 / size),
        "latency": ("latency ms", 1e3),
    }
    every = {cost: places(data, cost) for cost in costs}
    found = {cost: rows if len(rows) >= _LEAST_ROWS else [] for cost, rows in every.items()}
    raw = pd.DataFrame(
        {
            "cost": cost,
            "row": data.loc[place.row, "label"],
            "box_map_percent": data.loc[place.row, "box_AP"],
            "value": data.loc[place.row, cost],
            "beaten_by": None if place.beaten_by is None else data.loc[place.beaten_by, "label"],
        }
        for cost, rows in found.items()
        for place in rows
    )
    raw = raw.reindex(columns=_COLUMNS)
    shown = pd.DataFrame(
        {
            "cost": name,
            "not beaten, cheapest first (box mAP % at cost)": _front(part, scale),
        }
        for cost, (name, scale) in costs.items()
        for part in [raw[raw["cost"] == cost]]
        if found[cost]
    )
    notes = [_ABOUT, *_left_out(data, found)]
    return Table(
        f"fronts{suffix.replace(', ', '-')}",
        f"Rows that no other beats{suffix}",
        raw,
        shown,
        tuple(notes),
    )


def _front(part: pd.DataFrame, scale: float) -> str:
    values = aligned(part["value"].astype("Float64") * scale)
    return ", ".join(
        f"{row} ({ap:.1f} at {value})"
        for row, ap, value, other in zip(
            part["row"], part["box_map_percent"], values, part["beaten_by"], strict=True
        )
        if pd.isna(other)
    )


def _left_out(data: pd.DataFrame, found: dict[str, list[Place]]) -> list[str]:
    """Which rows each cost does not compare, in a sentence."""
    sentences: dict[str, list[str]] = {}
    worse = data.index[~data["best"].fillna(True).astype(bool)]
    for cost, rows in found.items():
        out = data.drop(index=[*(place.row for place in rows), *worse])["label"]
        if len(out):
            what = "FLOPs" if cost == "flops" else cost.partition("_")[0]
            sentences.setdefault(", ".join(out), []).append(what)
    searched = ["Of a search its best row is compared alone."] if len(worse) else []
    return searched + [
        f"Not compared in {', '.join(costs)}, as not measured or not as the others were: {rows}."
        for rows, costs in sentences.items()
    ]


def _comparable(data: pd.DataFrame, cost: str) -> pd.Series:
    known = data[[cost, "box_AP"]].notna().all(axis="columns") & data["best"].fillna(True)
    conditions = data["evaluated_as"].str.cat(data[f"{cost.partition('_')[0]}_as"], sep="; ")
    usual = conditions[known].mode()
    return known & conditions.isin(usual.head(1))


def _beaten_by(ap: float, cost: float, ranked: Sequence[tuple[int, float, float]]) -> int | None:
    better = (
        row
        for row, its_ap, its_cost in ranked
        if its_ap >= ap and its_cost <= cost and (its_ap, its_cost) != (ap, cost)
    )
    return next(better, None)
