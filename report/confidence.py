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
from report.load import frame
from report.tables import MISSING, Table

LEVEL = 0.95
# What the other rows are compared with: the first of these that is there.
REFERENCES = ("ViL", "full")
SAME = "indistinguishable"

_KINDS = ("box", "mask")
_LEAST = 2
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

Row = tuple[str, Record]
"""A record and its label."""


def intervals(records: Sequence[Record]) -> list[Table]:
    """Return the intervals of mAP, one table for each library; none where no record has any."""
    tables = []
    for rows, suffix in _libraries(records):
        raw = _intervals(rows)
        if raw["box_low"].isna().all():
            continue
        notes = (_ABOUT_INTERVALS.format(draws=_draws(rows)),)
        title = f"Intervals of mAP{suffix}"
        tables.append(Table(f"intervals{_slug(suffix)}", title, raw, _shown(raw), notes))
    return tables


def differences(records: Sequence[Record]) -> list[Table]:
    """Return the differences of mAP to one row, one table for each library with two such rows.

    That row is the first of `REFERENCES` that was evaluated, or else the first row. A row on other
    images, or with other draws, is not compared and says so.
    """
    tables = []
    for rows, suffix in _libraries(records):
        usable = [row for row in rows if _bootstrap(row[1])]
        if len(usable) < _LEAST:
            continue
        named = (row for name in REFERENCES for row in usable if row[1].row == name)
        label, reference = next(named, usable[0])
        raw = _differences([row for row in rows if row[1] is not reference], reference)
        tables.append(
            Table(
                f"differences{_slug(suffix)}",
                f"Differences of mAP to {label}{suffix}",
                raw,
                _differences_shown(raw),
                (_ABOUT_DIFFERENCES,),
            )
        )
    return tables


def difference_interval(
    ours: Sequence[float | None], theirs: Sequence[float | None], *, level: float = LEVEL
) -> tuple[float, float] | None:
    """Return the percentile interval of the difference of two rows, draw by draw.

    Args:
        ours: a figure of every draw, None where it is not defined.
        theirs: the same of the other row, of the same draws.

    Raises:
        ValueError: for another number of draws.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    tail = 50 * (1 - level)
    low, high = np.percentile([a - b for a, b in pairs], [tail, 100 - tail])
    return float(low), float(high)


def _intervals(rows: Sequence[Row]) -> pd.DataFrame:
    lines = []
    for label, record in rows:
        line: dict[str, Any] = {"row": label}
        evaluation = record.evaluation or {}
        for kind in _KINDS:
            found = evaluation.get(f"{kind}_interval") or {}
            low, high = found.get("AP") or (None, None)
            value = (evaluation.get(kind) or {}).get("AP")
            line |= {f"{kind}_AP": value, f"{kind}_low": low, f"{kind}_high": high}
        lines.append(line)
    raw = pd.DataFrame(lines)
    return raw.astype({name: "Float64" for name in raw.columns if name != "row"})


def _shown(raw: pd.DataFrame) -> pd.DataFrame:
    shown: dict[str, Any] = {"row": raw["row"]}
    for kind in _KINDS:
        if raw[f"{kind}_AP"].notna().any():
            shown[f"{kind} mAP %"] = raw[f"{kind}_AP"].map(_number)
            shown[f"{kind} {LEVEL:.0%} interval"] = _ranges(raw, kind, signed=False)
    return pd.DataFrame(shown)


def _differences(rows: Sequence[Row], reference: Record) -> pd.DataFrame:
    lines = []
    for label, record in rows:
        line: dict[str, Any] = {"row": label, "not_compared": _why_not(record, reference)}
        for kind in _KINDS:
            line |= _difference(record, reference, kind) if not line["not_compared"] else {}
        lines.append(line)
    columns = ["row", "not_compared"]
    numbers = [f"{kind}_{part}" for kind in _KINDS for part in ("difference", "low", "high")]
    raw = pd.DataFrame(lines, columns=[*columns, *numbers])
    raw = raw.astype(dict.fromkeys(numbers, "Float64"))
    for kind in _KINDS:
        raw[f"{kind}_verdict"] = [
            _verdict(low, high)
            for low, high in zip(raw[f"{kind}_low"], raw[f"{kind}_high"], strict=True)
        ]
    return raw


def _difference(record: Record, reference: Record, kind: str) -> dict[str, float]:
    ours, theirs = _bootstrap(record), _bootstrap(reference)
    value = ((record.evaluation or {}).get(kind) or {}).get("AP")
    other = ((reference.evaluation or {}).get(kind) or {}).get("AP")
    draws, others = ours.get(f"{kind}_AP"), theirs.get(f"{kind}_AP")
    if value is None or other is None or draws is None or others is None:
        return {}
    limits = difference_interval(draws, others)
    if limits is None:
        return {}
    low, high = limits
    return {f"{kind}_difference": value - other, f"{kind}_low": low, f"{kind}_high": high}


def _differences_shown(raw: pd.DataFrame) -> pd.DataFrame:
    shown: dict[str, Any] = {"row": raw["row"]}
    for kind in _KINDS:
        if raw[f"{kind}_difference"].notna().any():
            shown[f"{kind} mAP"] = raw[f"{kind}_difference"].map(_signed)
            shown[f"{kind} {LEVEL:.0%} interval"] = _ranges(raw, kind, signed=True)
            shown[f"{kind} verdict"] = raw[f"{kind}_verdict"]
    if (raw["not_compared"] != "").any():
        shown["why not compared"] = raw["not_compared"].replace("", MISSING)
    return pd.DataFrame(shown)


def _why_not(record: Record, reference: Record) -> str:
    """Why a record has no draws in common with the reference; nothing if it has."""
    if record.evaluation is None:
        return "not evaluated"
    ours, theirs = _bootstrap(record), _bootstrap(reference)
    if not ours:
        return "no draws recorded"
    if any(ours.get(name) != theirs.get(name) for name in ("seed", "resamples")):
        return "other draws"
    same = ("split", "images", "annotations_sha256")
    base = reference.evaluation or {}
    if any(record.evaluation.get(name) != base.get(name) for name in same):
        return "other images"
    return ""


def _verdict(low: Any, high: Any) -> str:
    if pd.isna(low) or pd.isna(high):
        return MISSING
    if low <= 0 <= high:
        return SAME
    return "better" if low > 0 else "worse"


def _bootstrap(record: Record) -> dict[str, Any]:
    return dict((record.evaluation or {}).get("bootstrap") or {})


def _draws(rows: Sequence[Row]) -> str:
    found = [str(_bootstrap(record)["resamples"]) for _, record in rows if _bootstrap(record)]
    return ", ".join(dict.fromkeys(found))


def _libraries(records: Sequence[Record]) -> list[tuple[list[Row], str]]:
    """The rows of each library, and what the titles of its tables end in."""
    rows = [
        (str(label), record) for label, record in zip(frame(records)["label"], records, strict=True)
    ]
    libraries = list(dict.fromkeys(str(record.model["library"]) for record in records))
    return [
        (
            [row for row in rows if row[1].model["library"] == library],
            f", {library}" if len(libraries) > 1 else "",
        )
        for library in libraries
    ]


def _ranges(raw: pd.DataFrame, kind: str, *, signed: bool) -> list[str]:
    say = _signed if signed else _number
    return [
        MISSING if pd.isna(low) else f"{say(low)} to {say(high)}"
        for low, high in zip(raw[f"{kind}_low"], raw[f"{kind}_high"], strict=True)
    ]


def _number(value: Any) -> str:
    return MISSING if pd.isna(value) else f"{value:.1f}"


def _signed(value: Any) -> str:
    # What rounds to nothing is nothing: no sign before it.
    return MISSING if pd.isna(value) else f"{value:+.1f}" if round(value, 1) else "0.0"


def _slug(suffix: str) -> str:
    return suffix.replace(", ", "-")
