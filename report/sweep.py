"""The report of a sweep: its points as one frame, tables and a page."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record import Record
from report import page, provenance, sweep_plots
from report.columns import Column, Table, Unit, joined, memory_unit, reason, table, three_digits
from report.load import at, family, load, uncounted, unsummed
from report.page import Section
from report.scaling import BASELINE, QUANTITIES, Growth, crossover_of, growth_of, parts

SUITE = "sweep"

_POINT = ["row", "mode", "height", "width", "batch"]
_WHOLE = ("height", "width", "batch", "flops", "memory")
_LATENCIES = ("latency", "latency_q1", "latency_q3")
# What points of one page have in common.
_CONDITIONS = (
    "config.sweep.scope",
    "model.backbone",
    "model.method",
    "model.library",
    "config.train.precision",
    "environment.device",
    "environment.cpu",
    "environment.threads",
    "environment.allocator",
    "environment.packages.torch",
)


def of_the_newest(points: Sequence[Record]) -> list[Record]:
    """Return the points that were measured under the conditions of the newest."""
    wanted = _conditions(max(points, key=lambda point: point.created))
    return [one for one in points if _conditions(one) == wanted]


def alike(points: Sequence[Record], output: Path) -> list[Record]:
    """Return all points in `output` that were measured under the conditions of the first.

    They may be of other mechanisms, sizes, modes and batch sizes, from earlier commands, but of the
    same machine: a crossover between two machines says nothing of mechanisms.
    """
    wanted = _conditions(points[0])
    return [one for one in load(output) if one.suite == SUITE and _conditions(one) == wanted]


def _conditions(point: Record) -> list[Any]:
    return [at(point, path) for path in _CONDITIONS]


def frame(points: Sequence[Record]) -> pd.DataFrame:
    """Return one line a point, the smallest first; each quantity from the newest record of it.

    FLOPs are multiply-adds, memory is in bytes, latency in seconds. `side` is the side of the
    square with as many pixels. `error` is what ended the newest record that measured anything.
    """
    newest = sorted(points, key=lambda point: (_measures(point), point.created), reverse=True)
    data = pd.DataFrame([_values(point) for point in newest])
    quantities = data.groupby(_POINT, sort=False).first()
    # The newest value of each quantity, but the error of the newest record alone.
    errors = data.drop_duplicates(_POINT).set_index(_POINT)
    quantities[["error", "message"]] = errors[["error", "message"]]
    lines = quantities.reset_index()
    lines["flops_uncounted"] = lines["flops_uncounted"].replace("", None)
    lines = lines.astype(dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_LATENCIES, "Float64"))
    lines["latency_iqr"] = lines["latency_q3"] - lines["latency_q1"]
    lines["pixels"] = lines["height"] * lines["width"]
    lines["side"] = lines["pixels"].astype(float) ** 0.5
    places = {row: place for place, row in enumerate(dict.fromkeys(p.row for p in points))}
    lines["place"] = lines["row"].map(places)
    return lines.sort_values(["mode", "batch", "place", "pixels"]).reset_index(drop=True)


def _measures(point: Record) -> bool:
    return set(point.config["sweep"]["what"]) != {"flops"}


def _values(point: Record) -> dict[str, Any]:
    mode = point.config["sweep"]["mode"]
    height, width = point.config["profile"]["image_size"]
    mechanism = family(point)
    named = mechanism.lower() in point.row.lower()
    return {
        "row": point.row,
        "label": point.row if named else f"{point.row} ({mechanism})",
        "family": mechanism,
        "mode": mode,
        "height": height,
        "width": width,
        "size": str(height) if height == width else f"{height}x{width}",
        "batch": point.config["profile"]["batch_size"],
        "flops": at(point, "flops.total"),
        # Empty where nothing is lacking, so that a newer complete count stands above an older one.
        "flops_uncounted": uncounted(point) or (None if point.flops is None else ""),
        "flops_unsummed": unsummed(point.flops),
        "memory": at(point, f"memory.{mode}"),
        "latency": at(point, f"latency.{mode}.median"),
        "latency_q1": at(point, f"latency.{mode}.q1"),
        "latency_q3": at(point, f"latency.{mode}.q3"),
        "back_ends": ", ".join(at(point, "latency.ran.sdpa") or {}) or None,
        "error": at(point, "error.kind"),
        "message": at(point, "error.message"),
    }


def summaries(data: pd.DataFrame) -> list[Table]:
    """Return the growth and the crossover of each row, one table a mode and batch size."""
    return [_summary(part, name, title) for name, title, part in parts(data)]


def _summary(data: pd.DataFrame, name: str, title: str) -> Table:
    quantities = [quantity for quantity in QUANTITIES if data[quantity].notna().any()]
    rows = data.groupby("row", sort=False)
    lines = pd.DataFrame(_fits(data, part, quantities) for _, part in rows)
    columns = [Column("row"), Column("", "row", "label")]
    for quantity in quantities:
        title_of = f"{QUANTITIES[quantity]} exponent"
        columns += [Column(f"{quantity}_{field.name}") for field in fields(Growth)]
        aside = "flops_unsummed" if quantity == "flops" else ""
        columns.append(Column("", title_of, f"{quantity}_growth", aside=aside))
    for quantity in quantities:
        columns += [Column(f"{quantity}_crossover_{name}") for name in _CROSSOVER]
        columns.append(Column("", f"{QUANTITIES[quantity]} below full", f"{quantity}_below"))
    columns.append(Column("measured_up_to", "measured up to, px"))
    notes = [_ABOUT_EXPONENTS, _ABOUT_CROSSOVERS if BASELINE in rows.groups else _NO_BASELINE]
    return table(f"growth-{name}", f"Growth and crossover, {title}", lines, columns, notes)


# In the CSV file, and in `report.scaling.Crossover`.
_CROSSOVER = {"of": "kind"} | {n: n for n in ("pixels", "after_pixels", "before_pixels")}


def _fits(data: pd.DataFrame, part: pd.DataFrame, quantities: Sequence[str]) -> dict[str, Any]:
    """What is fitted to the points of one row."""
    row = part["row"].iloc[0]
    data, part = (_complete(lines) for lines in (data, part))
    line = {"row": row, "label": part["label"].iloc[0], "measured_up_to": _reach(part)}
    # Of the largest size.
    line["flops_unsummed"] = next(iter(part["flops_unsummed"].dropna()[::-1]), None)
    for quantity in quantities:
        fitted, crossed = growth_of(part, quantity), crossover_of(data, part, quantity)
        for field in fields(Growth):
            line[f"{quantity}_{field.name}"] = getattr(fitted, field.name, None)
        for name, attribute in _CROSSOVER.items():
            line[f"{quantity}_crossover_{name}"] = getattr(crossed, attribute, None)
        line[f"{quantity}_growth"] = str(fitted) if fitted else None
        below = str(crossed or "") if row != BASELINE else ""
        line[f"{quantity}_below"] = below or None
    return line


def _complete(data: pd.DataFrame) -> pd.DataFrame:
    """Leave out FLOPs of rows that lack operators: nothing follows from a part of them.

    Where those of some sizes alone do, the others are of another part of the curve than that of
    other rows.
    """
    lacks = data["flops_uncounted"].notna().groupby([data["label"], data["mode"]])
    return data.assign(flops=data["flops"].mask(lacks.transform("any")))


_ABOUT_EXPONENTS = (
    "Exponents are of the number of pixels, fitted by least squares to the upper half of the sizes"
    " (three or more where there are as many), with their standard error."
)
_ABOUT_CROSSOVERS = (
    "Sizes are the sides of squares with as many pixels; between two measured sizes, crossovers are"
    " interpolated on logarithms."
)
_NO_BASELINE = f"There are no crossovers without the row {BASELINE!r}."


def _reach(part: pd.DataFrame) -> str:
    """The largest size that was measured, and why there is no larger one."""
    done = part[part["error"].isna()]
    largest = done["size"].iloc[-1] if len(done) else "nothing"
    ends = part[part["error"].notna() & (part["error"] != "skipped")]
    why = ends["size"] + " " + ends["error"].map(reason)
    return "; ".join([largest, *why])


def points(data: pd.DataFrame) -> Table:
    """Return every point as a line."""
    unit = memory_unit(data["memory"])
    times = joined(" ± ", ("latency", "latency_iqr"), Unit.MS, three_digits)
    columns = [
        Column("row"),
        Column("", "row", "label"),
        Column("mode", "mode"),
        Column("height"),
        Column("width"),
        Column("", "size px", "size"),
        Column("batch", "batch" if data["batch"].nunique() > 1 else ""),
        Column(
            *("flops_multiply_adds", "FLOPs {}", "flops", Unit.GIGA, _three_digits),
            lacks="flops_uncounted",
        ),
        Column("flops_uncounted"),
        Column("memory_bytes", "memory {}", "memory", unit, _three_digits),
        Column("latency_median_s", values="latency"),
        Column("latency_q1_s", values="latency_q1"),
        Column("latency_q3_s", values="latency_q3"),
        Column("", "latency ms (median ± IQR)", times),
        Column("back_ends", "SDPA"),
        Column("error", "result", format=_result),
        Column("message", "why", optional=True),
    ]
    return table("points", "All points", data, columns)


def _three_digits(values: pd.Series) -> pd.Series:
    return values.map(three_digits)


def _result(errors: pd.Series) -> pd.Series:
    return errors.map(reason, na_action="ignore").fillna("measured")


def write(points_measured: Sequence[Record], directory: Path) -> Path:
    """Write the page of a sweep into `directory` and return its `index.md`.

    Raises:
        InputError: if the folder cannot be written.
    """
    data = frame(points_measured)
    plots = sweep_plots.draw(_complete(data))
    sections = [
        Section("Growth and crossover", summaries(data)),
        Section("Cost against resolution", [_LEGEND, *_not_drawn(data), *plots]),
        Section("All points", [points(data)]),
        Section("How the numbers were made", _making(points_measured)),
        Section("Environment", [provenance.environment(points_measured, name_rows=False)]),
        page.run_again(
            points_measured, "The same command again measures only what has no record yet."
        ),
    ]
    made = provenance.sentence(points_measured)
    return page.publish(sections, directory, title=_title(points_measured[0]), made=made)


def _not_drawn(data: pd.DataFrame) -> list[str]:
    """Which rows have no line of FLOPs, in a sentence."""
    rows = data.loc[data["flops_uncounted"].notna(), "label"].unique()
    return [f"FLOPs not drawn, as incomplete: {', '.join(rows)}."] * bool(len(rows))


_LEGEND = (
    "Lines are straight where cost grows as a power of the number of pixels, p. Beside each line"
    " stands that power, fitted to the larger sizes; a ring marks where it crosses full attention,"
    " with the size from which on it is below. Dashed lines are rows with full attention in their"
    " later stages. A point that could not be measured stands where the growth before it would put"
    " it."
)
_SCOPES = {
    "backbone": "the backbone alone",
    "attention": "the first attention module of the backbone alone",
    "detector": "the whole detector",
}


def _making(points_measured: Sequence[Record]) -> list[str]:
    scope = points_measured[0].config["sweep"]["scope"]
    kinds = dict.fromkeys(p.memory["kind"] for p in points_measured if p.memory)
    samples = [
        len(p.latency[p.config["sweep"]["mode"]]["samples"]) for p in points_measured if p.latency
    ]
    sentences = [
        f"Measured is {_SCOPES[scope]}, made anew for each size.",
        "FLOPs are multiply-adds of one image; those of a training step are counted from the"
        " operators of its forward and backward pass, without what fused kernels compute again.",
        "Memory is the peak of a batch, parameters and what was alive before included"
        f" ({', '.join(kinds) or 'not measured'}).",
    ]
    if samples:
        sentences.append(
            f"Latency is the median of {min(samples)} to {max(samples)} samples of a batch. Rows"
            " are measured one after the other, each in a process of its own."
        )
    # Without the numbers, which differ from point to point.
    doubts = Counter(
        re.split(r":| after | between ", note.removeprefix(f"{p.config['sweep']['mode']}: "))[0]
        for p in points_measured
        for note in at(p, "latency.notes") or ()
    )
    if doubts:
        listed = ", ".join(f"{name} ({count})" for name, count in doubts.most_common())
        sentences.append(f"Doubts about latencies, and of how many points: {listed}.")
    sentences.append(
        "A training step is forward, backward and optimizer; its loss is the sum of the means of"
        " all outputs."
    )
    # Of notes that differ in numbers alone, as those of counts do, the one of the largest size.
    alike: defaultdict[tuple[str, str, str], dict[tuple[int, int], str]] = defaultdict(dict)
    for point in points_measured:
        for note in point.notes:
            without_numbers = re.sub(r"[\d.,]+", "", note)
            found = alike[point.row, point.config["sweep"]["mode"], without_numbers]
            found[tuple(point.config["profile"]["image_size"])] = note
    for (row, mode, _), found in alike.items():
        height, width = max(found, key=math.prod)
        others = f" and {len(found) - 1} smaller" if len(found) > 1 else ""
        sentences.append(f"{row}, {mode}, {height}x{width}{others}: {found[height, width]}.")
    return sentences


def _title(point: Record) -> str:
    config = point.config
    method = "" if point.model["method"] == "none" else f" in {point.model['method']}"
    scope = {"attention": ", attention alone"}.get(config["sweep"]["scope"], "")
    return (
        f"Cost against resolution: {point.model['backbone']}{method}{scope},"
        f" {config['train']['precision']}, {point.environment['device']}"
    )
