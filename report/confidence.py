"""How sure an average precision is, and whether two rows can be told apart.

The records hold the average precision of many draws of images (see `bootstrap.py`), and rows of
several seeds that of draws of seeds and images (`seeds.py`). Rows on the same images have the same
draws, so that a difference is worked out draw by draw, which leaves out what makes an image easy or
hard for both.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.record import Record
from report import seeds
from report.columns import Column, Table, Unit, decimals, joined, number, table
from report.load import KINDS, Library, at, per_library

# What the other rows are compared with: the first of these that is there.
REFERENCES = ("ViL", "full")
SAME = "indistinguishable"

_ABOUT_INTERVALS = (
    "An interval says how far mAP moves with the choice of test images, by bootstrap over images"
    " ({draws} draws). It knows nothing of the training's seed, which moves mAP too (--seeds 3"
    " measures by how much), and with few images of many classes it is somewhat too narrow."
)
_ABOUT_SEEDS = (
    "mAP is the mean over seeds, ± its standard deviation over them. An interval says how far it"
    " moves with the training's seed and the choice of test images: seeds are drawn, then images"
    " ({draws} draws, the same for all rows), and the part of the seeds is widened by Student's t,"
    " as a few scatter less than many would."
)
_ABOUT_ONCE = (
    "The interval of {rows}, trained with one seed, knows nothing of other seeds: it is too narrow"
    " beside those of several, and so is that of a difference from such a row."
)
_BY_CHANCE = (
    f" that are equal in truth, about one in {1 / (1 - seeds.LEVEL):.0f} is told apart by chance"
)
# Of weights, not of mechanisms.
_BY_SEED = ", and more where a row was trained with one seed, as trainings differ too"
_ABOUT_RANKS = (
    "A rank is one more than the number of rows that are told apart as better by box mAP, so that"
    f" rows that cannot be told apart share it; of pairs{_BY_CHANCE}"
)
_ABOUT_DIFFERENCES = (
    f"Differences are taken on the same draws for both rows. {SAME.capitalize()} means"
    f" that the {seeds.LEVEL:.0%} interval of the difference holds 0; of rows{_BY_CHANCE}"
)


@per_library
def intervals(library: Library) -> Table | None:
    """Return the intervals of mAP for each library; none where no record has any."""
    lines = library.data.assign(rank=pd.Series(ranks(library), dtype="Int64"))
    if lines["box_low"].isna().all():
        return None
    once = [bool(record.evaluation) and not seeds.of(record) for record in library.records]
    every_once = not any(map(seeds.of, library.records))
    columns = [
        Column("row", "row", "label"),
        Column("seeds", "seeds"),
        Column("rank", "rank", unit=Unit.ONE, format=decimals(0), optional=True),
    ]
    for kind in KINDS:
        columns += [
            Column(f"{kind}_AP", f"{kind} mAP {{}}", "", Unit.PERCENT, optional=True),
            Column(f"{kind}_sd", "± {}", "", Unit.PERCENT, optional=True),
            *_interval_columns(kind),
        ]
    draws = dict.fromkeys(
        str(draws["resamples"]) for draws in map(_bootstrap, library.records) if draws
    )
    about = [(_ABOUT_INTERVALS if every_once else _ABOUT_SEEDS).format(draws=", ".join(draws))]
    if any(once) and not every_once:
        about.append(_ABOUT_ONCE.format(rows=", ".join(library.data["label"][once])))
    about.append(f"{_ABOUT_RANKS}{_BY_SEED * any(once)}.")
    return table("intervals", "Intervals of mAP", lines, columns, about)


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
            Column(
                f"{kind}_difference", f"{kind} mAP {{}}", "", Unit.PERCENT, signed, optional=True
            ),
            *_interval_columns(kind, sign=True),
            Column(f"{kind}_verdict", f"{kind} verdict", optional=True),
        ]
    columns.append(Column("not_compared", "why not compared", optional=True))
    title = f"Differences of mAP to {label}"
    once = any(not seeds.of(record) for _, record in usable)
    about = f"{_ABOUT_DIFFERENCES}{_BY_SEED * once}."
    return table("differences", title, lines, columns, [about])


def apart(library: Library) -> NDArray[np.float64]:
    """Return for each pair of rows whether their box mAP is told apart.

    (N, N): 1 where that of the first row is higher, -1 where it is lower, 0 where the two cannot be
    told apart, NaN where they have no draws in common.
    """
    rows = library.records
    found = np.full((len(rows), len(rows)), np.nan)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, record in enumerate(rows):
        if _bootstrap(record).get("box_AP"):
            groups.setdefault(_drawn_from(record), []).append(place)
    for places in groups.values():
        drawn = np.array(
            [at(rows[place], "evaluation.bootstrap.box_AP") for place in places], dtype=np.float64
        )
        values = np.array([at(rows[place], "evaluation.box.AP") for place in places])
        # Draws without an object of any class have no mAP, for all rows alike.
        drawn = drawn[:, ~np.isnan(drawn).any(axis=0)]
        for own, place in enumerate(places):
            if drawn.shape[1]:
                found[place, places] = _signs(values[own] - values, drawn[own] - drawn)
    return found


def ranks(library: Library) -> list[int | None]:
    """Return the rank of each row by box mAP, from 1; rows that cannot be told apart share one.

    It is None for rows that were not evaluated as most were.
    """
    pairs = apart(library)
    compared = (~np.isnan(pairs)).sum(axis=1)
    return [
        1 + int((pairs[place] == -1).sum()) if 1 < count == compared.max() else None
        for place, count in enumerate(compared)
    ]


def _signs(differences: NDArray[np.float64], drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """The signs of differences, (N,), that their draws, (N, R), tell from nought; else 0."""
    tail = 50 * (1 - seeds.LEVEL)
    limits = np.percentile(drawn, [tail, 100 - tail], axis=1) - drawn.mean(axis=1) + differences
    signs: NDArray[np.float64] = (limits[0] > 0).astype(float) - (limits[1] < 0)
    return signs


def difference_interval(
    difference: float, ours: Sequence[float | None], theirs: Sequence[float | None]
) -> tuple[float, float] | None:
    """Return the interval of the difference of two rows, in percent.

    It is the percentile interval of the differences draw by draw, moved so that their mean is the
    difference itself, as the interval of one row is: draws raise average precision, and that of a
    good row more than that of a bad one.

    Args:
        difference: of the two rows on all images, in percent.
        ours: a figure of every draw, None where it is not defined.
        theirs: the same of the other row, of the same draws.

    Raises:
        ValueError: for another number of draws.
    """
    drawn = [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return seeds.interval(difference, drawn, least=-100)


def _interval_columns(kind: str, *, sign: bool = False) -> list[Column]:
    limits = f"{kind}_low", f"{kind}_high"
    values = joined(" to ", limits, Unit.PERCENT, number(1, sign=sign))
    return [
        *map(Column, limits),
        Column("", f"{kind} {seeds.LEVEL:.0%} interval", values, optional=True),
    ]


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
    if not _bootstrap(record):
        return "no draws recorded"
    ours, theirs = _drawn_from(record), _drawn_from(reference)
    if ours[:2] != theirs[:2]:
        return "other draws"
    return None if ours == theirs else "other images"


def same_draws(one: Record, other: Record) -> bool:
    """Whether two records have draws of the same images, made alike."""
    return _drawn_from(one) == _drawn_from(other)


def _drawn_from(record: Record) -> tuple[Any, ...]:
    """What rows have in common whose draws are the same: how they were drawn, and the images."""
    draws = [f"bootstrap.{name}" for name in ("seed", "resamples")]
    names = (*draws, "split", "images", "annotations_sha256")
    return tuple(at(record, f"evaluation.{name}") for name in names)


def _verdict(low: float | None, high: float | None) -> str | None:
    if low is None or high is None:
        return None
    if low <= 0 <= high:
        return SAME
    return "better" if low > 0 else "worse"


def _bootstrap(record: Record) -> dict[str, Any]:
    """The draws of a record, of more than one image."""
    several = at(record, "evaluation.images") != 1
    return dict((several and at(record, "evaluation.bootstrap")) or {})
