"""Plots of records, as PNG and SVG.

Colour and marker say the mechanism of a row, hollow says that its later stages have full attention.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox

from bench.record import Record
from report import front
from report.load import PARTIAL, frame, published
from report.tables import aligned, memory_column, memory_unit, reason

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too light on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666", "#56B4E9", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "p")
DPI = 150
SMOOTHING = 5
LEAST_AP = 1.0

# Where a label may stand, in points from its point: nearer first, to the right first.
NEAR = 16
OFFSETS = [
    (right * distance, up * distance)
    for distance in (9, NEAR, 26, 38, 52)
    for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]

FRONT = "#BBBBBB"
Point = tuple[float, float]

_HORIZONTAL = {0.0: "left", 0.5: "center", 1.0: "right"}
_VERTICAL = {0.0: "bottom", 0.5: "center", 1.0: "top"}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "report",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Plot:
    """One plot, or why there is none.

    Attributes:
        name: for file names.
        title: what it shows; also the text for those who cannot see it.
        png: the picture, empty if skipped.
        svg: the same, scalable.
        skipped: a sentence, empty if there is a picture.
        width: of the picture, in the pixels of a web page.
        note: a sentence that belongs under it, or nothing.
    """

    name: str
    title: str
    png: bytes
    svg: str
    skipped: str
    width: int = 0
    note: str = ""


@dataclass(frozen=True)
class Look:
    """Colour and marker of a mechanism."""

    colour: str
    marker: str


def looks(families: Sequence[str]) -> dict[str, Look]:
    """Return how each mechanism is drawn: the published ones first, then the others by name.

    Colours and markers repeat with different periods, so that 72 mechanisms can be told apart.
    """
    known = list(dict.fromkeys(published()["attention"].sort_values()))
    names = known + sorted(set(families) - set(known))
    return {
        name: Look(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
        for place, name in enumerate(names)
    }


def draw(records: Sequence[Record]) -> list[Plot]:
    """Return all plots of `records`; those of different detector libraries are drawn apart."""
    data = frame(records)
    style = looks(list(data["family"].unique()))
    libraries = list(data["library"].unique())
    plots = []
    for library in libraries:
        chosen = (data["library"] == library).to_numpy()
        part = data[chosen].reset_index(drop=True)
        losses = [_losses(r) for r, keep in zip(records, chosen, strict=True) if keep]
        several = len(libraries) > 1
        name, title = (f"-{library}", f", {library}") if several else ("", "")
        memory, _ = memory_column(part)
        drawings: tuple[tuple[str, str, Callable[[], Figure | str], str], ...] = (
            (
                "accuracy_flops",
                "Box AP against FLOPs",
                partial(accuracy_flops, part, style),
                _not_drawn(part, "flops"),
            ),
            (
                "accuracy_memory",
                "Box AP against memory",
                partial(accuracy_memory, part, style),
                _not_drawn(part, memory),
            ),
            (
                "accuracy_latency",
                "Box AP against latency",
                partial(accuracy_latency, part, style),
                _not_drawn(part, "latency"),
            ),
            ("cost", "Cost per row", partial(cost, part, style), ""),
            ("loss", "Training loss over steps", partial(loss, part, losses, style), ""),
        )
        plots += [
            replace(render(stem + name, text + title, make), note=note)
            for stem, text, make, note in drawings
        ]
    return plots


def _not_drawn(data: pd.DataFrame, cost: str) -> str:
    """Which rows have no place in a plot of box AP against a cost, in a sentence."""
    missing = data[["box_AP", cost]].isna().any(axis="columns")
    rows = [name for name, out in zip(_names(data), missing, strict=True) if out]
    return f"Not drawn, as a number is missing: {', '.join(rows)}." if rows else ""


def accuracy_flops(data: pd.DataFrame, style: dict[str, Look]) -> Figure | str:
    """Draw box AP against FLOPs, one point a row."""
    data = data.assign(x=data["flops"] / 1e9)
    return _scatter(data, style, "FLOPs (G multiply-adds, one image)", "FLOPs", cost="flops")


def accuracy_memory(data: pd.DataFrame, style: dict[str, Look]) -> Figure | str:
    """Draw box AP against peak memory, of training where it was measured."""
    column, mode = memory_column(data)
    unit, size = memory_unit(data[column])
    label = f"Peak memory, {mode} ({unit}, batch of {_batches(data, 'memory_batch')})"
    return _scatter(data.assign(x=data[column] / size), style, label, "memory", cost=column)


def accuracy_latency(data: pd.DataFrame, style: dict[str, Look]) -> Figure | str:
    """Draw box AP against the median latency of inference, with its quartiles."""
    scaled = {"x": "latency", "low": "latency_q1", "high": "latency_q3"}
    data = data.assign(**{name: data[column] * 1e3 for name, column in scaled.items()})
    unit = f"Latency (ms, batch of {_batches(data, 'latency_batch')}; median and quartiles)"
    return _scatter(data, style, unit, "latency", cost="latency")


def _batches(data: pd.DataFrame, column: str) -> str:
    return ", ".join(str(size) for size in data[column].dropna().unique())


def cost(data: pd.DataFrame, style: dict[str, Look]) -> Figure | str:
    """Draw parameters, FLOPs, memory and latency of every row as bars, one panel each."""
    memory, mode = memory_column(data)
    unit, size = memory_unit(data[memory])
    panels = {
        "Parameters (M)": data["parameters"] / 1e6,
        "FLOPs (G multiply-adds)": data["flops"] / 1e9,
        f"Peak memory, {mode} ({unit})": data[memory] / size,
        f"Latency (ms, batch of {_batches(data, 'latency_batch')})": data["latency"] * 1e3,
    }
    if all(values.isna().all() for values in panels.values()):
        return "No row has a cost yet, so there is no plot of costs."
    figure = Figure(figsize=(11, 1.1 + 0.3 * len(data)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    places = range(len(data))
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        lengths = values.astype("float64")
        bars = ax.barh(places, lengths, height=0.68)
        for bar, row, family in zip(bars, data["row"], data["family"], strict=True):
            _paint(bar, style[family].colour, hollow=row.startswith(PARTIAL))
        ends = lengths.fillna(0.0)
        if title.startswith("Latency"):
            ends = _quartile_bars(ax, data)
        top = max(float(ends.max()), 1e-12)
        for place, (text, end) in enumerate(zip(aligned(values), ends, strict=True)):
            ax.text(end + 0.03 * top, place, text, va="center", fontsize=8)
        ax.set_xlim(0, 1.28 * top)
        ax.set_title(title, fontsize=9, loc="left")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(places, _names(data))
    axes[0].invert_yaxis()
    return figure


def loss(data: pd.DataFrame, losses: Sequence[pd.Series], style: dict[str, Look]) -> Figure | str:
    """Draw the training loss of every row, raw and smoothed, one panel a row with shared axes.

    Args:
        data: rows of `frame`.
        losses: the total loss by step, one series for each row of `data`.
        style: see `looks`.
    """
    drawn = [(i, series) for i, series in enumerate(losses) if series.notna().any()]
    if not drawn:
        return "No row has been trained, so there is no plot of losses."
    columns = min(4, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(max(2.6 * columns, 4.5), 0.5 + 1.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    names, families = _names(data), data["family"].tolist()
    for ax, (i, series) in zip(axes.flat, drawn, strict=False):
        colour = style[families[i]].colour
        ax.plot(series.index, series, color=colour, alpha=0.3, linewidth=0.9)
        window = max(SMOOTHING, len(series) // 20)
        smooth = series.rolling(window, center=True, min_periods=1).mean()
        ax.plot(series.index, smooth, color=colour, linewidth=1.6)
        ax.set_title(names[i], fontsize=9, loc="left")
    for ax in axes.flat[len(drawn) :]:
        ax.set_visible(False)
        # The panel above is then the lowest of its column and needs the numbers.
    for column in range(columns):
        shown = [ax for ax in axes[:, column] if ax.get_visible()]
        shown[-1].tick_params(labelbottom=True)
    axes[0, 0].set_ylim(bottom=0)
    figure.supxlabel("Step", fontsize=9)
    figure.supylabel("Training loss", fontsize=9)
    return figure


def _scatter(
    data: pd.DataFrame, style: dict[str, Look], unit: str, what: str, *, cost: str
) -> Figure | str:
    data = data.dropna(subset=["x", "box_AP"])
    if data.empty:
        return f"No row has both box AP and {what}, so there is no plot of them."
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    ax.margins(0.12)
    steps = _draw_front(ax, data, cost)
    for row in data.to_dict("records"):
        look = style[row["family"]]
        ax.plot(
            row["x"],
            row["box_AP"],
            marker=look.marker,
            markersize=8,
            color=look.colour,
            markerfacecolor="white" if row["row"].startswith(PARTIAL) else look.colour,
            markeredgewidth=1.6,
            linestyle="none",
            zorder=3,
        )
    ends = data[["x", "x"]] if "low" not in data.columns else data[["low", "high"]]
    left, right = (ends.iloc[:, side].fillna(data["x"]).astype(float) for side in (0, 1))
    colours = [style[family].colour for family in data["family"]]
    ax.hlines(data["box_AP"].astype(float), left, right, colors=colours, linewidth=1.2, zorder=2)
    if data["x"].max() > 20 * data["x"].min():
        ax.set_xscale("log")
    ax.set_xlabel(unit)
    ax.set_ylabel("Box AP (%)")
    low, high = ax.get_ylim()
    if high - low < LEAST_AP:
        # Drawn over the whole height, a difference within chance would look large.
        ax.set_ylim((low + high - LEAST_AP) / 2, (low + high + LEAST_AP) / 2)
    _label(figure, ax, data.assign(left=left, right=right, colour=colours), steps)
    return figure


def _draw_front(ax: Axes, data: pd.DataFrame, cost: str) -> list[Point]:
    """Draw the highest box AP that each cost buys, as a line of steps, and return its corners."""
    rows = [place.row for place in front.places(data, cost) if place.beaten_by is None]
    points = [(float(x), float(y)) for x, y in data.loc[rows, ["x", "box_AP"]].to_numpy()]
    corners = [(after[0], before[1]) for before, after in itertools.pairwise(points)]
    steps = [point for pair in itertools.zip_longest(points, corners) for point in pair if point]
    ax.plot(*zip(*steps, strict=True), color=FRONT, linewidth=1.4, zorder=1)
    if len(points) > 1:
        about = "Grey line: rows that no other beats"
        ax.set_title(about, fontsize=8, loc="right", color="#777777")
    return steps


def _label(figure: Figure, ax: Axes, data: pd.DataFrame, steps: Sequence[Point]) -> None:
    """Write each point's name beside it, at the nearest place that covers nothing yet."""
    figure.draw_without_rendering()
    # Frozen, so that what was measured stays where it is.
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    frame_box = ax.get_window_extent()
    taken = []
    points = data.to_dict("records")
    for point in points:
        ends = [(point["left"], point["box_AP"]), (point["right"], point["box_AP"])]
        low, high = ax.transData.transform(ends)
        taken.append(Bbox([low - 6 * pixel, high + 6 * pixel]))
    for corners in itertools.pairwise(steps):
        low, high = sorted(ax.transData.transform(corners).tolist())
        taken.append(Bbox([low, high]).padded(pixel))
    for point in points:
        text = ax.text(0, 0, point["label"], fontsize=8)
        size = text.get_window_extent()
        text.remove()
        x, y = ax.transData.transform((point["x"], point["box_AP"]))
        best, least, chosen = OFFSETS[0], float("inf"), frame_box
        for offset in OFFSETS:
            place = Bbox.from_bounds(
                x + offset[0] * pixel - size.width * _before(offset[0]),
                y + offset[1] * pixel - size.height * _before(offset[1]),
                size.width,
                size.height,
            )
            covered = sum(_overlap(place, other) for other in taken)
            outside = size.width * size.height - _overlap(place, frame_box)
            if covered + outside < least - 1e-6:
                best, least, chosen = offset, covered + outside, place
            if least <= 1e-6:
                break
        taken.append(chosen)
        line = {"arrowstyle": "-", "color": point["colour"], "lw": 0.6, "shrinkB": 5}
        ax.annotate(
            point["label"],
            (point["x"], point["box_AP"]),
            xytext=best,
            textcoords="offset points",
            ha=_HORIZONTAL[_before(best[0])],
            va=_VERTICAL[_before(best[1])],
            fontsize=8,
            arrowprops=line if max(map(abs, best)) > NEAR else None,
        )


def _before(shift: float) -> float:
    """The share of a label that lies before its anchor, if it stands `shift` away."""
    if shift == 0:
        return 0.5
    return 0.0 if shift > 0 else 1.0


def _overlap(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height


def _losses(record: Record) -> pd.Series:
    """The total loss by step; numbers that were not finite are missing."""
    entries = (record.training or {}).get("losses") or []
    values = {entry["step"]: entry.get("total") for entry in entries}
    return pd.Series(values, dtype=float)


def _names(data: pd.DataFrame) -> list[str]:
    return [
        label if pd.isna(kind) else f"{label} ({reason(kind)})"
        for label, kind in zip(data["label"], data["error_kind"], strict=True)
    ]


def _quartile_bars(ax: Axes, data: pd.DataFrame) -> pd.Series:
    """Draw the quartiles of latency, and return where each row's bar and quartiles end (ms)."""
    times = data[["latency", "latency_q1", "latency_q3"]].astype(float) * 1e3
    there = times.dropna()
    ax.errorbar(
        there["latency"],
        there.index,
        xerr=[there["latency"] - there["latency_q1"], there["latency_q3"] - there["latency"]],
        fmt="none",
        ecolor="#222222",
        elinewidth=1,
        capsize=2.5,
    )
    return times.max(axis="columns").fillna(0.0)


def _paint(bar: Patch, colour: str, *, hollow: bool) -> None:
    bar.set_facecolor("white" if hollow else colour)
    bar.set_edgecolor(colour)
    bar.set_linewidth(1.4)


def render(name: str, title: str, make: Callable[[], Figure | str]) -> Plot:
    """Return the plot that `make` draws, or its sentence where there is nothing to draw."""
    with mpl.rc_context(_STYLE):
        figure = make()
        if isinstance(figure, str):
            return Plot(name, title, b"", "", figure)
        png, svg = io.BytesIO(), io.StringIO()
        # No date and no version: the same records give the same bytes.
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    width = round(96 * figure.get_figwidth())
    return Plot(name, title, png.getvalue(), svg.getvalue(), "", width)
