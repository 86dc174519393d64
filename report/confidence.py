"""How sure an average precision is, and whether two rows can be told apart.

The records hold the average precision of many draws of images (see `bootstrap.py`). Rows on
the same images have the same draws, so that a difference is worked out draw by draw, which leaves
out what makes an image easy or hard for both.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.record import Record
from report.columns import Column, Table, Unit, decimals, joined, number, table
from report.load import KINDS, Library, at, per_library

LEVEL = 0.95
# What the other rows are compared with: the first of these that is there.
REFERENCES = ("ViL", "full")
SAME = "indistinguishable"

_ABOUT_INTERVALS = (
    "An interval says how far mAP moves with the choice of test images, by bootstrap over images"
    " ({draws} draws). It knows nothing of the training's seed, which moves mAP too, and with few"
    " images of many classes it is somewhat too narrow."
)
_ABOUT_DIFFERENCES = (
    f"Differences are taken on the same draws of images for both rows. {SAME.capitalize()} means"
    f" that the {LEVEL:.0%} interval of the difference holds 0; of rows that are equal in truth,"
    f" about one in {1 / (1 - LEVEL):.0f} is told apart by chance."
)


@per_library
def intervals(library: Library) -> Table | None:
    """Return the intervals of mAP for each library; none where no record has any."""
    lines = library.data[["label"]].copy()
    for kind in KINDS:
        limits = [at(one, f"evaluation.{kind}_interval.AP") for one in library.records]
        lines[f"{kind}_AP"] = library.data[f"{kind}_AP"]
        lines[f"{kind}_low"] = [limit[0] if limit else None for limit in limits]
        lines[f"{kind}_high"] = [limit[1] if limit else None for limit in limits]
    if lines["box_low"].isna().all():
        return None
    columns = [Column("row", "row", "label")]
    for kind in KINDS:
        columns += [
            Column(f"{kind}_AP", f"{kind} mAP {{}}", "", Unit.PERCENT, optional=True),
            *_interval_columns(kind),
        ]
    draws = dict.fromkeys(
        str(draws["resamples"]) for draws in map(_bootstrap, library.records) if draws
    )
    note = _ABOUT_INTERVALS.format(draws=", ".join(draws))
    return table("intervals", "Intervals of mAP", lines, columns, [note])


@per_library
def differences(library: Library) -> Table | None:
    """Return the differences of mAP to one row, for each library with two rows that have draws.

    That row is the first of `REFERENCES` that was evaluated, or else the first row. A row on other
    images, or with other draws, is not compared and says so.
    """
    rows = list(zip(library.data["label"], library.records, strict=True))
    usable = [row for row in rows if _bootstrap(row[1])]
    if len(usable) < 2:
        return None
    named = (row for name in REFERENCES for row in usable if row[1].row == name)
    label, reference = next(named, usable[0])
    lines = pd.DataFrame(
        _difference(label, record, reference) for label, record in rows if record is not reference
    )
    columns = [Column("row", "row")]
    for kind in KINDS:
        signed = decimals(1, sign=True)
        columns += [
            Column(f"{kind}_difference", f"{kind} mAP", "", Unit.PERCENT, signed, optional=True),
            *_interval_columns(kind, sign=True),
            Column(f"{kind}_verdict", f"{kind} verdict", optional=True),
        ]
    columns.append(Column("not_compared", "why not compared", optional=True))
    title = f"Differences of mAP to {label}"
    return table("differences", title, lines, columns, [_ABOUT_DIFFERENCES])


def difference_interval(
    difference: float,
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    *,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Return the interval of the difference of two rows, in percent.

    It is the percentile interval of the differences draw by draw, moved so that their mean is the
    difference itself, as the interval of one row is (`bench.bootstrap.interval`): draws raise
    average precision, and that of a good row more than that of a bad one.

    Args:
        difference: of the two rows on all images, in percent.
        ours: a figure of every draw, None where it is not defined.
        theirs: the same of the other row, of the same draws.

    Raises:
        ValueError: for another number of draws.
    """
    drawn = [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not drawn:
        return None
    tail = 50 * (1 - level)
    limits = np.percentile(drawn, [tail, 100 - tail]) - np.mean(drawn) + difference
    low, high = np.clip(limits, -100, 100).tolist()
    return low, high


def _interval_columns(kind: str, *, sign: bool = False) -> list[Column]:
    limits = f"{kind}_low", f"{kind}_high"
    values = joined(" to ", limits, Unit.PERCENT, number(1, sign=sign))
    return [*map(Column, limits), Column("", f"{kind} {LEVEL:.0%} interval", values, optional=True)]


def _difference(label: str, record: Record, reference: Record) -> dict[str, Any]:
    """A line of the table of differences."""
    why_not = _why_not(record, reference)
    line: dict[str, Any] = {"row": label, "not_compared": why_not}
    for kind in KINDS:
        value, other = (at(one, f"evaluation.{kind}.AP") for one in (record, reference))
        ours, theirs = (at(one, f"evaluation.bootstrap.{kind}_AP") for one in (record, reference))
        limits = None
        if why_not is None and None not in (value, other, ours, theirs):
            limits = difference_interval(value - other, ours, theirs)
        low, high = limits or (None, None)
        line |= {
            f"{kind}_difference": value - other if limits else None,
            f"{kind}_low": low,
            f"{kind}_high": high,
            f"{kind}_verdict": _verdict(low, high),
        }
    return line


def _why_not(record: Record, reference: Record) -> str | None:
    """Why a record has no draws in common with the reference; None if it has."""
    if record.evaluation is None:
        return "not evaluated"
    ours, theirs = _bootstrap(record), _bootstrap(reference)
    if not ours:
        return "no draws recorded"
    if any(ours.get(name) != theirs.get(name) for name in ("seed", "resamples")):
        return "other draws"
    same = [f"evaluation.{name}" for name in ("split", "images", "annotations_sha256")]
    if any(at(record, path) != at(reference, path) for path in same):
        return "other images"
    return None


def _verdict(low: float | None, high: float | None) -> str | None:
    if low is None or high is None:
        return None
    if low <= 0 <= high:
        return SAME
    return "better" if low > 0 else "worse"


def _bootstrap(record: Record) -> dict[str, Any]:
    return dict(at(record, "evaluation.bootstrap") or {})
