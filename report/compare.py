"""Two sets of records, row by row and figure by figure: what changed, and whether it is chance.

Records of classifiers hold how many images were right, not which: the interval of a difference of
top-1 or top-5 is that of two independent samples, from Wilson's limits of each.

Newcombe: Interval estimation for the difference between independent proportions, Statistics in
Medicine 17, 1998, 873-890, method 10. What seeds scatter enters each side's limits in the same way:
Zou, Donner: Construction of confidence limits about effect measures, Statistics in Medicine 27,
2008, 1693-1702.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from bench.errors import InputError
from bench.record import Record
from report import confidence, searches, seeds
from report.columns import (
    MISSING,
    Column,
    Table,
    Unit,
    memory_unit,
    number,
    reason,
    table,
    three_digits,
)
from report.load import KINDS, MODES, at, code, frame

SAME = "same"
# The range of fewer samples holds the median less often than an interval says.
_LEAST_SAMPLES = 6
_RESAMPLES = 2000
_ABOUT_MAP = "mAP is compared on the same draws of images (and of seeds, where rows have several)"
_ABOUT_SHARES = (
    "Top-1 and top-5 are compared as of two independent samples (Newcombe's interval, and what"
    " several seeds scatter), which is rather too wide, as the images are the same"
)
_ABOUT = (
    "A difference is B minus A. {accuracy}; latency by resampling its samples, which"
    " know nothing of what else the machine did that day."
    f" {confidence.SAME.capitalize()} means that the {seeds.LEVEL:.0%} interval holds 0."
)
_ONE_SEED = (
    "Rows of one seed: an interval of {accuracy} knows nothing of the training's seed, which moves"
    " a row that is trained anew."
)
# What records hold besides, and where.
_HELD = {
    "COCO's other figures": "evaluation.box.AP50",
    "further splits": "evaluation.also",
    "FLOPs as published": "flops.published",
    "time of training": "training.seconds",
    "latency of the layers": "latency.layers",
}

_UNITS = {
    "percent": Unit.PERCENT,
    "count": Unit.MEGA,
    "multiply-adds": Unit.GIGA,
    "s": Unit.MS,
}

_NAMES = {"top1": "top-1", "top5": "top-5"}

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Quantity:
    """A number that records have.

    Attributes:
        name: in sentences.
        column: of `report.load.frame`.
        unit: of the records.
        higher_is_better: or else lower.
        same: columns of the frame that say how it was made; compared where they are the same.
        sure: the interval of the difference of two records, or None where the number is exact.
    """

    name: str
    column: str
    unit: str
    higher_is_better: bool = False
    same: tuple[str, ...] = ()
    sure: Callable[[Record, Record], Interval] | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        lines: one a row and quantity, in the units of the records.
        failed: rows that are done in A and failed in B, with the reason.
        only: rows of A alone, and of B alone.
        notes: sentences on what was compared.
    """

    lines: tuple[dict[str, Any], ...]
    failed: tuple[tuple[str, str], ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]

    def regressions(self, limit: float) -> list[str]:
        """Say what is told apart as worse by more than `limit`, a share, and which rows failed."""
        found = [f"{row} failed in B: {why}" for row, why in self.failed]
        return found + [
            f"{said(line)}, more than {100 * limit:.4g}% worse"
            for line in self.lines
            if line["verdict"] == "worse" and abs(line["change"] or 0) > limit
        ]


def compare(a: Sequence[Record], b: Sequence[Record]) -> Comparison:
    """Compare the rows that both sets have; two single records whatever their rows.

    Raises:
        InputError: where they have no row in common.
    """
    ours, theirs = seeds.merged(a), seeds.merged(b)
    found = _pairs(ours, theirs)
    if not found:
        raise InputError(
            f"no row is in both: A has {_names(ours)}; B has {_names(theirs)} (rows of two detector"
            " libraries or methods are not the same)"
        )
    data = frame([one for pair in found for one in pair])
    data["machine"] = [
        str([one.environment.get(name) for name in ("cpu", "device")])
        for pair in found
        for one in pair
    ]
    label = _labels([*ours, *theirs])
    lines: list[dict[str, Any]] = []
    failed = []
    for place, pair in enumerate(found):
        one, other = pair
        row = " and ".join(dict.fromkeys((label(one), label(other))))
        if one.status == "done" and other.status == "failed":
            failed.append((row, reason(str((other.error or {}).get("kind")))))
        sides = data.iloc[2 * place], data.iloc[2 * place + 1]
        lines += [{"row": row} | _line(one_of, pair, sides) for one_of in _quantities(pair)]
    rows = [{_name(pair[side]) for pair in found} for side in (0, 1)]
    only = [
        tuple(dict.fromkeys(label(record) for record in side if _name(record) not in known))
        for side, known in zip((ours, theirs), rows, strict=True)
    ]
    return Comparison(tuple(lines), tuple(failed), (only[0], only[1]), tuple(_notes(found, lines)))


def said(line: dict[str, Any]) -> str:
    """Return a line of a comparison as a sentence would have it."""
    unit = _unit(line)
    values = [f"{three_digits(line[side] / unit.size)} {unit.symbol}".strip() for side in "ab"]
    change = "" if line["change"] is None else f" ({100 * line['change']:+.1f}%)"
    return f"{line['row']}, {line['quantity']}: {values[0]} to {values[1]}{change}"


def shown(comparison: Comparison) -> Table:
    """Return the table of what was compared and is not the same in both."""
    lines = pd.DataFrame(comparison.lines)
    chosen = lines[lines["not_compared"].isna() & (lines["verdict"] != SAME)]
    texts = [_texts({str(k): v for k, v in line.items()}) for line in chosen.to_dict("records")]
    columns = [Column(name, name) for name in ("row", "figure", "A", "B", "B - A")]
    columns += [
        Column("interval", f"{seeds.LEVEL:.0%} interval"),
        Column("change", "change"),
        Column("verdict", "verdict"),
    ]
    data = pd.DataFrame(texts, columns=[column.name for column in columns])
    found = table("compare", "B against A", data, columns, comparison.notes)
    return Table(found.name, found.title, lines, found.shown, found.notes)


def _quantities(pair: tuple[Record, Record]) -> list[Quantity]:
    """What two records are compared in: accuracies of what they are, and costs."""
    latencies = dict(zip(MODES, ("latency", "latency_training"), strict=True))
    sorts = {_is_classifier(one) for one in pair}
    accuracies = [(f"{kind} mAP", f"{kind}_AP", partial(_accuracy, kind)) for kind in KINDS]
    shares = [(_NAMES[share], share, partial(_share, share)) for share in seeds.SHARES]
    return [
        *(
            Quantity(
                name, column, "percent", higher_is_better=True, same=("evaluated_as",), sure=sure
            )
            for name, column, sure in accuracies * (False in sorts) + shares * (True in sorts)
        ),
        Quantity("parameters", "parameters", "count"),
        Quantity("FLOPs", "flops", "multiply-adds", same=("flops_as",)),
        *(
            Quantity(f"memory, {mode}", f"memory_{mode}", "bytes", same=("machine", "memory_as"))
            for mode in MODES
        ),
        *(
            Quantity(
                f"latency, {mode}",
                column,
                "s",
                same=("machine", "latency_as"),
                sure=partial(_latency, mode),
            )
            for mode, column in latencies.items()
        ),
    ]


def _pairs(a: Sequence[Record], b: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The records that are compared: of a row with the same settings, or else its newest."""
    a, b = _latest(a), _latest(b)
    if len(a) == len(b) == 1:
        return [(a[0], b[0])]
    found: list[tuple[Record, Record]] = []
    for name in dict.fromkeys(map(_name, a)):
        ours = [record for record in a if _name(record) == name]
        theirs = [record for record in b if _name(record) == name]
        if not theirs:
            continue
        same = [(x, y) for x in ours for y in theirs if seeds.alike(x) == seeds.alike(y)]
        newest = [
            max(side, key=lambda one: (one.status == "done", one.created))
            for side in (ours, theirs)
        ]
        found += same or [(newest[0], newest[1])]
    return found


def _latest(records: Sequence[Record]) -> list[Record]:
    """The newest of each run, which was run again where its data or mechanism changed."""
    found: dict[str, Record] = {}
    for record in sorted(records, key=lambda one: (one.status == "done", one.created)):
        found[json.dumps(record.config, sort_keys=True)] = record
    return [record for record in records if any(record is one for one in found.values())]


def _name(record: Record) -> tuple[str, ...]:
    return record.row, record.model["library"], record.model["method"]


def _labels(records: Iterable[Record]) -> Callable[[Record], str]:
    """Return what names a row, with library and method where it is there with several."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for record in records:
        kinds.setdefault(record.row, set()).add(_name(record)[1:])

    def label(record: Record) -> str:
        of = f" ({', '.join(_name(record)[1:])})" * (len(kinds[record.row]) > 1)
        return f"{record.row}{of}"

    return label


def _names(records: Iterable[Record]) -> str:
    return ", ".join(dict.fromkeys(record.row for record in records))


def _line(
    quantity: Quantity, records: tuple[Record, Record], sides: tuple[pd.Series, pd.Series]
) -> dict[str, Any]:
    a, b = (_number(side[quantity.column]) for side in sides)
    why = _why_not(quantity, sides)
    line: dict[str, Any] = {
        "quantity": quantity.name,
        "unit": quantity.unit,
        "a": a,
        "b": b,
        **dict.fromkeys(("difference", "low", "high", "change", "verdict")),
        "not_compared": why,
    }
    if why is not None or a is None or b is None:
        return line
    limits = quantity.sure(*records) if quantity.sure is not None else (b - a, b - a)
    line |= {"difference": b - a, "change": (b - a) / a if a else None}
    if limits is not None:
        low, high = limits
        better = low > 0 if quantity.higher_is_better else high < 0
        line |= {"low": low, "high": high} if quantity.sure is not None else {}
        if low <= 0 <= high:
            line["verdict"] = SAME if low == high else confidence.SAME
        else:
            line["verdict"] = "better" if better else "worse"
    return line


def _number(value: Any) -> float | int | None:
    """A number of a frame as JSON has it."""
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() else float(value)


def _unit(line: dict[str, Any]) -> Unit:
    """The unit that a line has for readers."""
    if line["unit"] == "bytes":
        return memory_unit(pd.Series([line["a"], line["b"]], dtype=float))
    return _UNITS[line["unit"]]


def _why_not(quantity: Quantity, sides: tuple[pd.Series, pd.Series]) -> str | None:
    if any(pd.isna(side[quantity.column]) for side in sides):
        return "not measured"
    if quantity.column == "flops" and any(pd.notna(side["flops_uncounted"]) for side in sides):
        return "operators without a formula"
    if quantity.column == "flops" and 0 < abs(sides[0]["flops"] - sides[1]["flops"]) <= max(
        0 if pd.isna(side["unsummed"]) else side["unsummed"] for side in sides
    ):
        return "fewer than the products in no sum"
    other = [name for name in quantity.same if sides[0][name] != sides[1][name]]
    reasons = {"machine": "another machine", "evaluated_as": "other images"}
    return reasons.get(other[0], "measured otherwise") if other else None


def _accuracy(kind: str, a: Record, b: Record) -> Interval:
    """The interval of a difference of mAP; other draws of the same images are not paired."""
    values = [at(one, f"evaluation.{kind}.AP") for one in (b, a)]
    drawn = [at(one, f"evaluation.bootstrap.{kind}_AP") for one in (b, a)]
    if not all(drawn):
        return None
    if not confidence.same_draws(a, b):
        random = np.random.default_rng(0)
        drawn = [random.choice(np.array(one, dtype=float), _RESAMPLES).tolist() for one in drawn]
    return confidence.difference_interval(values[0] - values[1], *drawn)


def _is_classifier(record: Record) -> bool:
    return bool(record.model["method"] == "classifier")


def _share(figure: str, a: Record, b: Record) -> Interval:
    """The interval of a difference of shares of images, in percent."""
    (ours, ours_below, ours_above), (theirs, theirs_below, theirs_above) = (
        _reach(figure, one) for one in (a, b)
    )
    low = theirs - ours - math.hypot(theirs_below, ours_above)
    high = theirs - ours + math.hypot(theirs_above, ours_below)
    return max(100 * low, -100.0), min(100 * high, 100.0)


def _reach(figure: str, record: Record) -> tuple[float, float, float]:
    """A share, and how far its interval reaches below and above it."""
    share, images = at(record, f"evaluation.{figure}") / 100, at(record, "evaluation.images")
    upper = (1 + seeds.LEVEL) / 2
    z = stats.norm.ppf(upper)
    shrunk = 1 + z**2 / images
    middle = (share + z**2 / (2 * images)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    by_seed = seeds.of(record).get(figure) or ()
    scatter, count = 0.0, len(by_seed)
    if count > 1:
        spread = statistics.stdev(by_seed) / 100
        scatter = stats.t.ppf(upper, count - 1) * spread / math.sqrt(count)
    below, above = share - (middle - half), middle + half - share
    return share, math.hypot(below, scatter), math.hypot(above, scatter)


def _latency(mode: str, a: Record, b: Record) -> Interval:
    """The interval of a difference of medians, by resampling both; None for too few samples."""
    found = [at(one, f"latency.{mode}.samples") or () for one in (a, b)]
    if min(map(len, found)) < _LEAST_SAMPLES:
        return None
    random = np.random.default_rng(0)
    medians: list[NDArray[np.float64]] = [
        np.median(random.choice(np.array(one), (_RESAMPLES, len(one))), axis=1) for one in found
    ]
    tail = 50 * (1 - seeds.LEVEL)
    low, high = np.percentile(medians[1] - medians[0], [tail, 100 - tail]).tolist()
    return low, high


def _texts(line: dict[str, Any]) -> dict[str, str]:
    """The cells of a line, for readers."""
    unit = _unit(line)
    percent = unit is Unit.PERCENT

    def cell(name: str, *, sign: bool = False) -> str:
        value = line[name]
        if pd.isna(value):
            return MISSING
        if percent or sign:
            scale = max(abs(line["a"]), abs(line["b"])) / unit.size
            digits = 1 if percent else 0 if scale >= 100 else 1 if scale >= 10 else 2
            return number(digits, sign=sign)(value / unit.size)
        return three_digits(value / unit.size)

    limits = [cell(name, sign=True) for name in ("low", "high")]
    return {
        "row": line["row"],
        "figure": f"{line['quantity']} {unit.symbol}".strip(),
        "A": cell("a"),
        "B": cell("b"),
        "B - A": cell("difference", sign=True),
        "interval": MISSING if MISSING in limits else " to ".join(limits),
        "change": MISSING if pd.isna(line["change"]) else f"{100 * line['change']:+.1f}%",
        "verdict": "no interval" if pd.isna(line["verdict"]) else line["verdict"],
    }


def _notes(
    pairs: Sequence[tuple[Record, Record]], lines: Sequence[dict[str, Any]]
) -> Iterable[str]:
    every = [one for pair in pairs for one in pair]
    sorts = {_is_classifier(one) for one in every}
    about = [_ABOUT_MAP] * (False in sorts) + [_ABOUT_SHARES] * (True in sorts)
    yield _ABOUT.format(accuracy="; ".join(about))
    if any(one.evaluation and not seeds.of(one) for one in every):
        names = ["mAP"] * (False in sorts) + ["top-1"] * (True in sorts)
        yield _ONE_SEED.format(accuracy=" or ".join(names))
    odd = [
        f"{side}, {one.row} ({count:g} of {at(one, 'evaluation.images')} images)"
        for pair in pairs
        for side, one in zip("AB", pair, strict=True)
        if (count := at(one, "evaluation.not_finite") or 0)
    ]
    if odd:
        yield f"Gave values that are not finite: {', '.join(odd)}."
    same = [line for line in lines if line["verdict"] == SAME]
    if same:
        yield f"The same in A and B: {_listed(same, len(pairs))}."
    for why in dict.fromkeys(line["not_compared"] for line in lines if line["not_compared"]):
        of_why = [line for line in lines if line["not_compared"] == why]
        yield f"Not compared, {why}: {_listed(of_why, len(pairs))}."
    held = [
        name
        for name, path in _HELD.items()
        if any(all(at(one, path) for one in pair) for pair in pairs)
    ]
    if held:
        yield f"Not compared, though both have it: {'; '.join(held)}."
    for name, differ in (("Settings", _settings), ("Commits of this package", _codes)):
        changed: dict[str, list[str]] = {}
        for one, other in pairs:
            changed.setdefault("; ".join(differ(one, other)), []).append(one.row)
        for what, rows in changed.items():
            which = "" if len(rows) == len(pairs) else f" of {', '.join(rows)}"
            if what:
                yield f"{name}{which} that differ (A, B): {what}."


def _listed(lines: Sequence[dict[str, Any]], every: int) -> str:
    """`FLOPs; memory, training (ViL, full)`: quantities, and their rows where not all have them."""
    rows: dict[str, list[str]] = {}
    for line in lines:
        rows.setdefault(line["quantity"], []).append(line["row"])
    return "; ".join(
        name if len(of_name) == every else f"{name} ({', '.join(of_name)})"
        for name, of_name in rows.items()
    )


def _codes(a: Record, b: Record) -> Iterable[str]:
    """The commits that two records were made with, where both are known and differ."""
    ours, theirs = code(a), code(b)
    if ours and theirs and ours != theirs:
        yield f"{ours}, {theirs}"


def _settings(a: Record, b: Record) -> Iterable[str]:
    """The settings that two records differ in; one that a version does not know is passed over."""
    ours, theirs = searches.flat(a.config), searches.flat(b.config)
    for name, value in ours.items():
        labels = ("suite", "row", "seed", "data.path")
        if name in theirs and theirs[name] != value and name not in labels:
            yield f"{name} ({value}, {theirs[name]})"
