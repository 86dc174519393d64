"""Rows that no other row beats: none has at least their box AP, to a tenth, for no more cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from report.columns import Table, Unit, aligned, memory_unit
from report.load import Library, per_library
from report.tables import memory_column

_COLUMNS = ["cost", "row", "box_map_percent", "value", "beaten_by"]
_LEAST_ROWS = 2
_ABOUT = (
    "A row is beaten where another has at least its box mAP, to a tenth, for no more of that cost."
    " Differences within chance count too; see How sure mAP is. The table's CSV file says which row"
    " beats each of the others."
)


@dataclass(frozen=True)
class Cost:
    """What a row costs.

    Attributes:
        column: of `report.load.frame`.
        title: in tables.
        name: in sentences.
        unit: that suits the rows.
        label: in plots.
    """

    column: str
    title: str
    name: str
    unit: Unit
    label: str


def costs(data: pd.DataFrame) -> dict[str, Cost]:
    """Return FLOPs, memory and latency with the units that suit the rows of `data`."""
    memory, mode = memory_column(data)
    unit = memory_unit(data[memory])
    batch, batches = (
        f"batch of {', '.join(map(str, data[name].dropna().unique()))}"
        for name in ("memory_batch", "latency_batch")
    )
    peak = f"Peak memory, {mode} ({unit.symbol}, {batch})"
    return {
        "flops": Cost("flops", "FLOPs G", "FLOPs", Unit.GIGA, "FLOPs (G multiply-adds, one image)"),
        "memory": Cost(memory, f"memory {unit.symbol}, {mode}", "memory", unit, peak),
        "latency": Cost("latency", "latency ms", "latency", Unit.MS, f"Latency (ms, {batches})"),
    }


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

    Compared are the rows with both numbers that were measured and evaluated as most of them were;
    of a search the best row alone.

    Args:
        data: rows of one detector library, numbered from 0.
        cost: "flops", "latency" or "memory_training", for example; less is better.
    """
    # As tables show it: a difference that no reader sees should decide nothing.
    shown = data.assign(box_AP=data["box_AP"].astype("Float64").round(1))
    known = shown[_comparable(shown, cost)].sort_values([cost, "box_AP"], ascending=[True, False])
    ranked = [(int(i), ap, float(x)) for i, ap, x in known[["box_AP", cost]].itertuples()]
    return [Place(row, _beaten_by(ap, x, ranked)) for row, ap, x in ranked]


@per_library
def tables(library: Library) -> Table | None:
    """Return the rows that no other beats in each cost, for each library with two such rows."""
    data = library.data
    every = {cost: places(data, cost.column) for cost in costs(data).values()}
    found = {cost: rows if len(rows) >= _LEAST_ROWS else [] for cost, rows in every.items()}
    if not any(found.values()):
        return None
    raw = pd.DataFrame(
        {
            "cost": cost.column,
            "row": data.loc[place.row, "label"],
            "box_map_percent": data.loc[place.row, "box_AP"],
            "value": data.loc[place.row, cost.column],
            "beaten_by": None if place.beaten_by is None else data.loc[place.beaten_by, "label"],
        }
        for cost, rows in found.items()
        for place in rows
    )
    shown = pd.DataFrame(
        {
            "cost": cost.title,
            "not beaten, cheapest first (box mAP % at cost)": _front(
                raw[raw["cost"] == cost.column], cost.unit
            ),
        }
        for cost, rows in found.items()
        if rows
    )
    notes = (_ABOUT, *_left_out(data, found))
    return Table("fronts", "Rows that no other beats", raw, shown, notes)


def _front(part: pd.DataFrame, unit: Unit) -> str:
    values = aligned(part["value"].astype("Float64") / unit.size)
    return ", ".join(
        f"{row} ({ap:.1f} at {value})"
        for row, ap, value, other in zip(
            part["row"], part["box_map_percent"], values, part["beaten_by"], strict=True
        )
        if pd.isna(other)
    )


def _left_out(data: pd.DataFrame, found: dict[Cost, list[Place]]) -> list[str]:
    """Which rows each cost does not compare, in a sentence."""
    sentences: dict[str, list[str]] = {}
    worse = data.index[~data["best"].fillna(True).astype(bool)]
    for cost, rows in found.items():
        out = data.drop(index=[*(place.row for place in rows), *worse])["label"]
        if len(out):
            sentences.setdefault(", ".join(out), []).append(cost.name)
    searched = ["The best row of a search is compared, its other rows are not."]
    return searched * bool(len(worse)) + [
        f"Not compared in {', '.join(costs)}, as not measured or not as the others were: {rows}."
        for rows, costs in sentences.items()
    ]


def _comparable(data: pd.DataFrame, cost: str) -> pd.Series:
    known = data[[cost, "box_AP"]].notna().all(axis="columns") & data["best"].fillna(True)
    if cost == "flops":
        known &= data["flops_uncounted"].isna()
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
