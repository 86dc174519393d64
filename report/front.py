"""Rows that no other row beats: none has a higher box mAP, told apart, for no more cost."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from report import confidence
from report.columns import MISSING, Table, Unit, aligned, memory_unit
from report.load import Library, per_library, timed_apart
from report.tables import memory_column

_LEAST_ROWS = 2
_ABOUT = (
    "A row is on the front where its box mAP is told apart as higher than that of every row that"
    " costs no more, and beaten where that of a row that costs no more is told apart as higher; of"
    " the others the data cannot say. The table's CSV file says which row beats each of the others."
)
_ABOUT_ROUNDED = (
    "Rows without draws of images are compared by box mAP to a tenth, differences within chance"
    " too."
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
    """Return FLOPs, memory and latency with the units that suit the rows of `data`.

    Their titles say the size of the images where it is not the same for all three.
    """
    memory, mode = memory_column(data)
    unit = memory_unit(data[memory])
    batch, batches = (
        f"batch of {', '.join(map(str, data[name].dropna().unique()))}"
        for name in ("memory_batch", "latency_batch")
    )
    sizes = [data[f"{name}_size"].dropna().unique() for name in ("flops", "memory", "latency")]
    differ = len({name for found in sizes for name in found}) > 1
    images, of, on = (f" at {', '.join(found)}" * (differ and len(found) > 0) for found in sizes)
    kind = ", predicted" * bool((data["memory_kind"] == "predicted").any())
    counted = f"FLOPs (G multiply-adds, one image{images})"
    peak = f"Peak memory, {mode}{kind} ({unit.symbol}, {batch}{of})"
    return {
        "flops": Cost("flops", f"FLOPs G{images}", "FLOPs", Unit.GIGA, counted),
        "memory": Cost(memory, f"memory {unit.symbol}, {mode}{kind}{of}", "memory", unit, peak),
        "latency": Cost(
            "latency", f"latency ms{on}", "latency", Unit.MS, f"Latency (ms, {batches}{on})"
        ),
    }


@dataclass(frozen=True)
class Place:
    """Where a row stands against the others in one cost.

    Attributes:
        row: its place in the frame.
        beaten_by: the place of the cheapest row that surely beats it, or None.
        on_front: whether it is told apart as better than every row that costs no more. A row that
            is neither beaten nor this could be on the front.
    """

    row: int
    beaten_by: int | None
    on_front: bool

    @property
    def could_be(self) -> bool:
        """Whether the data cannot say if the row is on the front."""
        return self.beaten_by is None and not self.on_front


def places(library: Library, cost: str) -> list[Place]:
    """Return where each row that can be compared stands, cheapest first.

    Compared are the rows with both numbers that were measured and evaluated as most of them were;
    of a search the best row alone. Without draws of images a row is told apart by its box mAP to a
    tenth, as tables show it: a difference that no reader sees should decide nothing.

    Args:
        library: the rows.
        cost: "flops", "latency" or "memory_training", for example; less is better.
    """
    shown = library.data.assign(box_AP=library.data["box_AP"].astype("Float64").round(1))
    known = shown[_comparable(shown, cost)].sort_values([cost, "box_AP"], ascending=[True, False])
    ranked = [(int(i), ap, float(x)) for i, ap, x in known[["box_AP", cost]].itertuples()]
    pairs = confidence.apart(library)
    found = []
    for row, ap, x in ranked:
        beaten_by, on_front = None, True
        for other, its_ap, its_x in ranked:
            if other == row or its_x > x:
                continue
            sign = pairs[row, other]
            if np.isnan(sign):
                worse = its_ap >= ap and (its_ap, its_x) != (ap, x)
                sign = -1 if worse else 1
            on_front &= bool(sign == 1)
            if sign == -1 and beaten_by is None:
                beaten_by = other
        found.append(Place(row, beaten_by, on_front))
    return found


@per_library
def tables(library: Library) -> Table | None:
    """Return the rows that no other beats in each cost, for each library with two such rows."""
    data = library.data
    every = {cost: places(library, cost.column) for cost in costs(data).values()}
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
            "on_front": place.on_front,
        }
        for cost, rows in found.items()
        for place in rows
    )
    shown = pd.DataFrame(
        {
            "cost": cost.title,
            "on the front, cheapest first (box mAP % at cost)": _named(part, cost.unit, sure=True),
            "could be on it": _named(part, cost.unit, sure=False),
        }
        for cost, rows in found.items()
        if rows
        for part in [raw[raw["cost"] == cost.column]]
    )
    compared = [place.row for rows in found.values() for place in rows]
    rounded = [_ABOUT_ROUNDED] * bool(data.loc[compared, "box_low"].isna().any())
    notes = (_ABOUT, *rounded, *_left_out(data, found))
    return Table("fronts", "Rows that no other beats", raw, shown, notes)


def _named(part: pd.DataFrame, unit: Unit, *, sure: bool) -> str:
    """The rows on the front, or those that could be, in words."""
    values = aligned(part["value"].astype("Float64") / unit.size)
    chosen = part["on_front"] if sure else part["beaten_by"].isna() & ~part["on_front"]
    named = part.assign(value=values)[chosen]
    return (
        ", ".join(
            f"{row} ({ap:.1f} at {value})"
            for row, ap, value in named[["row", "box_map_percent", "value"]].itertuples(index=False)
        )
        or MISSING
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
        f"Not compared in {', '.join(costs)}, as these or mAP were not measured, or not as the"
        f" others' were: {rows}."
        for rows, costs in sentences.items()
    ]


def _comparable(data: pd.DataFrame, cost: str) -> pd.Series:
    known = data[[cost, "box_AP"]].notna().all(axis="columns") & data["best"].fillna(True)
    if cost == "flops":
        known &= data["flops_uncounted"].isna()
    conditions = data["evaluated_as"].str.cat(data[f"{cost.partition('_')[0]}_as"], sep="; ")
    if cost == "latency":
        known &= ~timed_apart(data)
    usual = conditions[known].mode()
    return known & conditions.isin(usual.head(1))
