"""The report of a sweep: cost against resolution, its growth, and where full attention loses."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.record import Record
from report import page
from report.load import PARTIAL, load
from report.page import Block, Code, PlotBlock, Section, TableBlock, Text
from report.plots import Look, Plot, looks, render
from report.scaling import Crossover, Growth, crossover, growth
from report.tables import MISSING, Table, memory_unit, reason

SUITE = "sweep"
BASELINE = "full"
MODES = ("inference", "training")
QUANTITIES = {
    "flops": "FLOPs",
    "memory": "memory",
    "latency": "latency",
}
_AXES = {
    "flops": "FLOPs of one image (G multiply-adds)",
    "memory": "Peak memory ({unit})",
    "latency": "Latency ({unit}, median and quartiles)",
}
_FAILURES = {"out_of_memory": "X", "too_slow": "d", "error": "P"}
_COLUMNS = ("row", "mode", "height", "width", "batch")
_WHOLE = ("height", "width", "batch", "flops", "memory")
_REAL = ("latency", "latency_q1", "latency_q3")
# Seconds from which on latencies are drawn in seconds.
_LONG = 10.0
# Of the height of the axes: the least distance of two labels.
_LABEL_GAP = 0.055


def alike(points: Sequence[Record], output: Path) -> list[Record]:
    """Return all points in `output` that were measured under the conditions of the first.

    They may be of other mechanisms, sizes, modes and batch sizes, from earlier commands.
    """
    wanted = _conditions(points[0])
    return [one for one in load(output) if one.suite == SUITE and _conditions(one) == wanted]


def _conditions(point: Record) -> tuple[Any, ...]:
    config = point.config
    return (
        config["sweep"]["scope"],
        *(point.model[name] for name in ("backbone", "method", "library")),
        config["train"]["precision"],
        point.environment["device"],
    )


def frame(points: Sequence[Record]) -> pd.DataFrame:
    """Return one line a point, the smallest first; each quantity from the newest record of it.

    FLOPs are multiply-adds, memory is in bytes, latency in seconds. `side` is the side of the
    square with as many pixels. `error` is what ended the newest record that measured anything.
    """
    newest = sorted(points, key=lambda point: (_measures(point), point.created), reverse=True)
    data = pd.DataFrame([_values(point) for point in newest])
    quantities = data.groupby(list(_COLUMNS), sort=False).first()
    # Of a quantity the newest that there is, of an error that of the newest record alone.
    errors = data.drop_duplicates(list(_COLUMNS)).set_index(list(_COLUMNS))
    quantities[["error", "message"]] = errors[["error", "message"]]
    table = quantities.reset_index()
    table = table.astype(dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_REAL, "Float64"))
    table["pixels"] = table["height"] * table["width"]
    table["side"] = table["pixels"].astype(float) ** 0.5
    places = {row: place for place, row in enumerate(dict.fromkeys(p.row for p in points))}
    table["place"] = table["row"].map(places)
    return table.sort_values(["mode", "batch", "place", "pixels"]).reset_index(drop=True)


def _measures(point: Record) -> bool:
    return set(point.config["sweep"]["what"]) != {"flops"}


def _values(point: Record) -> dict[str, Any]:
    mode = point.config["sweep"]["mode"]
    height, width = point.config["profile"]["image_size"]
    latency = point.latency or {}
    times = latency.get(mode) or {}
    family = str(point.model["attention"]).split("/")[0].strip()
    named = family.lower() in point.row.lower()
    return {
        "row": point.row,
        "label": point.row if named else f"{point.row} ({family})",
        "family": family,
        "mode": mode,
        "height": height,
        "width": width,
        "batch": point.config["profile"]["batch_size"],
        "flops": (point.flops or {}).get("total"),
        "memory": (point.memory or {}).get(mode),
        "latency": times.get("median"),
        "latency_q1": times.get("q1"),
        "latency_q3": times.get("q3"),
        "back_ends": ", ".join(latency.get("ran", {}).get("sdpa", {})) or None,
        "error": (point.error or {}).get("kind"),
        "message": (point.error or {}).get("message"),
    }


def write(points: Sequence[Record], directory: Path) -> Path:
    """Write the page of `points` into `directory` and return its `index.md`.

    Raises:
        InputError: if the folder cannot be written.
    """
    data = frame(points)
    drawn = draw(data)
    tables = _summaries(data)
    sections = [
        Section("Growth and crossover", tuple(map(TableBlock, tables))),
        Section("Cost against resolution", (Text(_LEGEND), *map(_picture, drawn))),
        Section("All points", (TableBlock(_points(data)),)),
        *_failures(data),
        Section("How the numbers were made", tuple(map(Text, _making(points)))),
        Section("Environment", (TableBlock(_environment(points)),)),
        Section("Run it again", (Text(_AGAIN), Code("\n".join(_commands(points))))),
    ]
    return page.publish(sections, drawn, directory, title=_title(points[0]))


_LEGEND = (
    "Lines are straight where cost grows as a power of the number of pixels, p. Beside each line"
    " stands that power, fitted to the larger sizes, and the size from which on it is below full"
    " attention; a ring marks where they cross. Dashed lines are rows with full attention in their"
    " later stages. A point that could not be measured stands where the growth before it would put"
    " it."
)
_AGAIN = "The same command again measures only what has no record yet."


def _picture(plot: Plot) -> Block:
    return Text(plot.skipped) if plot.skipped else PlotBlock(plot)


def _commands(points: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(point.environment.get("command")) for point in points))


def summaries(points: Sequence[Record]) -> list[Table]:
    """Return the growth and the crossover of each row, one table a mode and batch size."""
    return _summaries(frame(points))


def points(points: Sequence[Record]) -> Table:
    """Return every point as a line."""
    return _points(frame(points))


def _summaries(data: pd.DataFrame) -> list[Table]:
    return [_summary(part, name, title) for name, title, part in _parts(data)]


def _parts(data: pd.DataFrame) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """Name, title and lines of each mode and batch size."""
    several = data["batch"].nunique() > 1
    for mode in MODES:
        for batch in data["batch"].unique():
            part = data[(data["mode"] == mode) & (data["batch"] == batch)]
            if not part.empty:
                name = f"{mode}-batch-{batch}" if several else mode
                yield name, f"{mode}, batch of {batch}" if several else mode, part


def _summary(data: pd.DataFrame, name: str, title: str) -> Table:
    quantities = [quantity for quantity in QUANTITIES if data[quantity].notna().any()]
    lines, cells = [], []
    for row, part in data.groupby("row", sort=False):
        line: dict[str, Any] = {"row": row}
        cell = {"row": str(part["label"].iloc[0])}
        for quantity in quantities:
            fitted, crossed = _growth(part, quantity), _crossover(data, part, quantity)
            line |= _raw(quantity, fitted, crossed)
            cell[f"{QUANTITIES[quantity]} exponent"] = _exponent(fitted)
        for quantity in quantities:
            crossed = _crossover(data, part, quantity)
            text = str(crossed) if crossed and row != BASELINE else ""
            cell[f"{QUANTITIES[quantity]} below full"] = text or MISSING
        cell["measured up to"] = line["measured_up_to"] = _reach(part)
        lines.append(line)
        cells.append(cell)
    return Table(
        f"growth-{name}",
        f"Growth and crossover, {title}",
        pd.DataFrame(lines),
        pd.DataFrame(cells),
        _SUMMARY_NOTES if BASELINE in set(data["row"]) else (*_SUMMARY_NOTES[:1], _NO_BASELINE),
    )


_SUMMARY_NOTES = (
    "Exponents are of the number of pixels, fitted by least squares to the upper half of the sizes"
    " (at least three), with their standard error.",
    "Sizes are the sides of squares with as many pixels; between two measured sizes, crossovers are"
    " interpolated on logarithms.",
)
_NO_BASELINE = f"There are no crossovers without the row {BASELINE!r}."


def _known(part: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return part.dropna(subset=[quantity]).drop_duplicates("pixels")


def _growth(part: pd.DataFrame, quantity: str) -> Growth | None:
    known = _known(part, quantity)
    return growth(known["pixels"].astype(float).tolist(), known[quantity].astype(float).tolist())


def _crossover(data: pd.DataFrame, part: pd.DataFrame, quantity: str) -> Crossover | None:
    """Against full attention in the same mode; None without it."""
    full = data[data["row"] == BASELINE]
    if full.empty:
        return None
    both = _known(part, quantity).merge(_known(full, quantity), on="pixels", suffixes=("", "_full"))
    return crossover(
        both["pixels"].astype(float).tolist(),
        both[quantity].astype(float).tolist(),
        both[f"{quantity}_full"].astype(float).tolist(),
    )


def _raw(quantity: str, fitted: Growth | None, crossed: Crossover | None) -> dict[str, Any]:
    between = crossed.between if crossed and crossed.between else (None, None)
    return {
        f"{quantity}_exponent": fitted.exponent if fitted else None,
        f"{quantity}_exponent_error": fitted.error if fitted else None,
        f"{quantity}_r_squared": fitted.r_squared if fitted else None,
        f"{quantity}_fitted_sizes": fitted.count if fitted else None,
        f"{quantity}_crossover": crossed.kind if crossed else None,
        f"{quantity}_crossover_pixels": crossed.pixels if crossed else None,
        f"{quantity}_crossover_after_pixels": between[0],
        f"{quantity}_crossover_before_pixels": between[1],
    }


def _exponent(fitted: Growth | None) -> str:
    if fitted is None:
        return MISSING
    error = "" if fitted.error is None else f" ± {fitted.error:.2f}"
    return f"{fitted.exponent:.2f}{error}"


def _reach(part: pd.DataFrame) -> str:
    """The largest size that was measured, and why there is no larger one."""
    done = part[part["error"].isna()]
    largest = _size(done.iloc[-1]) if len(done) else "nothing"
    ends = part[part["error"].notna() & (part["error"] != "skipped")]
    return "; ".join(
        [largest, *(f"{_size(end)} {reason(end['error'])}" for _, end in ends.iterrows())]
    )


def _size(line: Any) -> str:
    height, width = line["height"], line["width"]
    return str(height) if height == width else f"{height}x{width}"


def _points(data: pd.DataFrame) -> Table:
    unit, size = memory_unit(data["memory"])
    raw = data[
        [
            *("row", "mode", "height", "width", "batch", "flops", "memory"),
            *("latency", "latency_q1", "latency_q3", "back_ends", "error", "message"),
        ]
    ].rename(
        columns={
            "flops": "flops_multiply_adds",
            "memory": "memory_bytes",
            "latency": "latency_median_s",
            "latency_q1": "latency_q1_s",
            "latency_q3": "latency_q3_s",
        }
    )
    times = [
        MISSING if pd.isna(middle) else f"{_short(middle * 1e3)} ± {_short(1e3 * (high - low))}"
        for middle, low, high in zip(*(data[name] for name in _REAL), strict=True)
    ]
    shown = pd.DataFrame(
        {
            "row": data["label"],
            "mode": data["mode"],
            "size": [_size(line) for line in data.to_dict("records")],
            "batch": data["batch"].astype(str),
            "FLOPs G": (data["flops"] / 1e9).map(_short),
            f"memory {unit}": (data["memory"] / size).map(_short),
            "latency ms (median ± IQR)": times,
            "SDPA": data["back_ends"].fillna(MISSING),
            "result": data["error"].map(reason, na_action="ignore").fillna("measured"),
        }
    )
    if data["batch"].nunique() == 1:
        shown = shown.drop(columns="batch")
    return Table("points", "All points", raw, shown)


def _short(value: Any) -> str:
    """Three digits, or all of a larger whole part."""
    if pd.isna(value):
        return MISSING
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _failures(data: pd.DataFrame) -> list[Section]:
    failed = data[data["error"].notna()]
    if failed.empty:
        return []
    shown = pd.DataFrame(
        {
            "row": failed["label"],
            "mode": failed["mode"],
            "size": [_size(line) for line in failed.to_dict("records")],
            "result": failed["error"].map(reason),
            "why": failed["message"],
        }
    )
    table = Table("not-measured", "Not measured", failed[["row", "mode", "error"]], shown)
    return [Section("Not measured", (TableBlock(table),))]


def _making(points: Sequence[Record]) -> list[str]:
    scope = points[0].config["sweep"]["scope"]
    kinds = dict.fromkeys(p.memory["kind"] for p in points if p.memory)
    samples = [len(p.latency[p.config["sweep"]["mode"]]["samples"]) for p in points if p.latency]
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
        re.split(r":| after | between ", note)[0]
        for p in points
        for note in (p.latency or {}).get("notes", ())
    )
    if doubts:
        listed = ", ".join(f"{name} ({count})" for name, count in doubts.most_common())
        sentences.append(f"Doubts about latencies, and of how many points: {listed}.")
    sentences.append(
        "A training step is forward, backward and optimiser; its loss is the sum of the means of"
        " all outputs."
    )
    notes = dict.fromkeys(
        f"{point.row}, {point.config['sweep']['mode']}: {note}."
        for point in points
        for note in point.notes
    )
    return [*sentences, *notes]


_SCOPES = {
    "backbone": "the backbone alone",
    "attention": "the first attention module of the backbone alone",
    "detector": "the whole detector",
}


def _environment(points: Sequence[Record]) -> Table:
    """Every fact with its values, each once."""
    facts: dict[str, dict[str, None]] = {}
    for point in points:
        environment = {k: v for k, v in point.environment.items() if k != "command"}
        for nested in ("packages", "limits"):
            environment |= environment.pop(nested, None) or {}
        for name, value in environment.items():
            facts.setdefault(name, {})[MISSING if value is None else str(value)] = None
    lines = [(name, "; ".join(values)) for name, values in facts.items()]
    times = sorted(point.created for point in points)
    table = pd.DataFrame([*lines, ("made", f"{times[0]} to {times[-1]}")])
    table.columns = pd.Index(["fact", "value"])
    return Table("environment", "Where it ran", table, table)


def _title(point: Record) -> str:
    config = point.config
    method = "" if point.model["method"] == "none" else f" in {point.model['method']}"
    scope = {"attention": ", attention alone"}.get(config["sweep"]["scope"], "")
    return (
        f"Cost against resolution: {point.model['backbone']}{method}{scope},"
        f" {config['train']['precision']}, {point.environment['device']}"
    )


def draw(data: pd.DataFrame) -> list[Plot]:
    """Return a plot of each quantity, mode and batch size against the size of images."""
    style = looks(list(data["family"].unique()))
    return [
        render(
            f"{quantity}-{name}",
            f"{text[0].upper()}{text[1:]} against resolution, {title}",
            partial(against_resolution, part, style, quantity),
        )
        for name, title, part in _parts(data)
        for quantity, text in QUANTITIES.items()
        if data[quantity].notna().any()
    ]


def against_resolution(data: pd.DataFrame, style: dict[str, Look], quantity: str) -> Figure | str:
    """Draw one quantity against the side of images, both on logarithms, a line a row."""
    if data[quantity].isna().all():
        return f"There is no {QUANTITIES[quantity]} of {data['mode'].iloc[0]}."
    unit, size = _unit(data, quantity)
    data = data.assign(cost=data[quantity].astype(float) / size)
    # The labels stand to the right of the axes.
    figure = Figure(figsize=(10, 5.2))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.66, top=0.95, bottom=0.11)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = []
    for row, part in data.groupby("row", sort=False):
        line = _draw_row(ax, part, style, quantity, size)
        if line is not None:
            ends.append((*line, _label(data, part, quantity), style[part["family"].iloc[0]].colour))
        if row != BASELINE:
            _draw_crossover(ax, data, part, style, quantity)
    _draw_failures(ax, data, style, quantity)
    sides = sorted(data["side"].unique())
    ax.set_xticks(sides, [f"{side:.0f}" for side in sides])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(sides[0] / 1.04, sides[-1] * 1.04)
    ax.set_xlabel("Side of a square image (pixels)")
    ax.set_ylabel(_AXES[quantity].format(unit=unit))
    # Places are known only once the limits of both axes are.
    figure.draw_without_rendering()
    _draw_labels(ax, ends)
    return figure


def _unit(data: pd.DataFrame, quantity: str) -> tuple[str, float]:
    if quantity == "memory":
        return memory_unit(data["memory"])
    slow = quantity == "latency" and data["latency"].max() >= _LONG
    return {"flops": ("G", 1e9), "latency": ("s", 1.0) if slow else ("ms", 1e-3)}[quantity]


def _draw_row(
    ax: Axes, part: pd.DataFrame, style: dict[str, Look], quantity: str, size: float
) -> tuple[float, float] | None:
    """Draw the line of a row, and return where it ends."""
    look, known = style[part["family"].iloc[0]], _known(part, quantity)
    if known.empty:
        return None
    partial_row = str(part["row"].iloc[0]).startswith(PARTIAL)
    ax.plot(
        known["side"],
        known["cost"],
        color=look.colour,
        marker=look.marker,
        markersize=5.5,
        markerfacecolor="white" if partial_row else look.colour,
        linewidth=2.4 if part["row"].iloc[0] == BASELINE else 1.4,
        linestyle="--" if partial_row else "-",
        # Where lines coincide, what is compared lies above what it is compared with.
        zorder=2.5 if part["row"].iloc[0] == BASELINE else 3,
    )
    if quantity == "latency":
        low, high = (known[name].astype(float) / size for name in ("latency_q1", "latency_q3"))
        ax.vlines(known["side"], low, high, color=look.colour, linewidth=1.2, zorder=2)
    return float(known["side"].iloc[-1]), float(known["cost"].iloc[-1])


def _label(data: pd.DataFrame, part: pd.DataFrame, quantity: str) -> str:
    """Name, exponent and crossover of a row."""
    parts = [str(part["label"].iloc[0])]
    fitted = _growth(part, quantity)
    if fitted is not None:
        parts[0] += f" $\\propto p^{{{fitted.exponent:.2f}}}$"
    crossed = _crossover(data, part, quantity)
    if crossed and part["row"].iloc[0] != BASELINE:
        parts.append(str(crossed))
    return ", ".join(filter(None, parts))


def _draw_crossover(
    ax: Axes, data: pd.DataFrame, part: pd.DataFrame, style: dict[str, Look], quantity: str
) -> None:
    """A ring where the row's line crosses that of full attention for good."""
    crossed = _crossover(data, part, quantity)
    if crossed is None or crossed.between is None:
        return
    known = _known(part, quantity).set_index("pixels")["cost"]
    low, high = (float(known[pixels]) for pixels in crossed.between)
    start, end = map(math.log, crossed.between)
    share = (math.log(crossed.pixels) - start) / (end - start)
    ax.plot(
        math.sqrt(crossed.pixels),
        low * (high / low) ** share,
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=style[part["family"].iloc[0]].colour,
        markeredgewidth=1.6,
        linestyle="none",
        zorder=4,
    )


def _draw_failures(ax: Axes, data: pd.DataFrame, style: dict[str, Look], quantity: str) -> None:
    """A mark for what could not be measured, where the growth before it would put it."""
    kinds: dict[str, None] = {}
    for _, part in data.groupby("row", sort=False):
        known, fitted = _known(part, quantity), _growth(part, quantity)
        missing = part[part[quantity].isna() & part["error"].isin(list(_FAILURES))]
        if fitted is None or missing.empty:
            continue
        colour = style[part["family"].iloc[0]].colour
        last = known.iloc[-1]
        for _, line in missing.iterrows():
            cost = float(last["cost"]) * (line["pixels"] / last["pixels"]) ** fitted.exponent
            ax.plot(
                [last["side"], line["side"]],
                [last["cost"], cost],
                color=colour,
                linestyle=":",
                linewidth=1.2,
                zorder=2,
            )
            ax.plot(
                line["side"],
                cost,
                marker=_FAILURES[line["error"]],
                color=colour,
                markersize=9,
                markeredgecolor="black",
                linestyle="none",
                zorder=4,
            )
            kinds[line["error"]] = None
    marks = [
        Line2D(
            [],
            [],
            marker=_FAILURES[kind],
            color="#999999",
            markeredgecolor="black",
            markersize=8,
            linestyle="none",
            label=reason(kind),
        )
        for kind in kinds
    ]
    if marks:
        ax.legend(handles=marks, loc="upper left")


def _draw_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's label beside the axes, at its height or as near as the others allow."""
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [
        ax.transAxes.inverted().transform(ax.transData.transform(end[:2]))[1] for end in ordered
    ]
    line = {"arrowstyle": "-", "lw": 0.9, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    for (x, y, text, colour), height in zip(ordered, spread(heights, _LABEL_GAP), strict=True):
        ax.annotate(
            text,
            (x, y),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color="#222222",
            arrowprops=line | {"color": colour},
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move rising heights apart by at least `gap`, and into 0 to 1, as little as that takes.

    With `i gap` taken from the i-th, that is to find the nearest numbers that do not fall: runs
    that fall become their mean.
    """
    runs: list[tuple[float, int]] = []
    for place, height in enumerate(heights):
        runs.append((height - place * gap, 1))
        while len(runs) > 1 and runs[-2][0] >= runs[-1][0]:
            (first, many), (second, few) = runs[-2:]
            runs[-2:] = [((first * many + second * few) / (many + few), many + few)]
    level = [mean for mean, count in runs for _ in range(count)]
    highest = max(0.0, 1.0 - (len(level) - 1) * gap)
    return [min(max(one, 0.0), highest) + place * gap for place, one in enumerate(level)]
