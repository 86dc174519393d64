"""Plots of a sweep; `data` is the frame of `report.sweep.points`."""

import math
from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from report.load import PARTIAL
from report.plots import Look, Plot, looks, render
from report.sweep.fits import BASELINE, crossover_of, growth_of
from report.sweep.points import QUANTITIES, known, parts
from report.tables import memory_unit, reason

_AXES = {
    "flops": "FLOPs of one image (G multiply-adds)",
    "memory": "Peak memory ({unit})",
    "latency": "Latency ({unit}, median and quartiles)",
}
_FAILURES = {"out_of_memory": "X", "too_slow": "d", "error": "P"}
# Seconds from which on latencies are drawn in seconds.
_LONG = 10.0
# Of the height of the axes: the least distance of two labels.
_LABEL_GAP = 0.055


def draw(data: pd.DataFrame) -> list[Plot]:
    """Return a plot of each quantity, mode and batch size against the size of images."""
    style = looks(list(data["family"].unique()))
    return [
        render(
            f"{quantity}-{name}",
            f"{text[0].upper()}{text[1:]} against resolution, {title}",
            partial(against_resolution, part, style, quantity),
        )
        for name, title, part in parts(data)
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
    look, measured = style[part["family"].iloc[0]], known(part, quantity)
    if measured.empty:
        return None
    partial_row = str(part["row"].iloc[0]).startswith(PARTIAL)
    ax.plot(
        measured["side"],
        measured["cost"],
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
        low, high = (measured[name].astype(float) / size for name in ("latency_q1", "latency_q3"))
        ax.vlines(measured["side"], low, high, color=look.colour, linewidth=1.2, zorder=2)
    return float(measured["side"].iloc[-1]), float(measured["cost"].iloc[-1])


def _label(data: pd.DataFrame, part: pd.DataFrame, quantity: str) -> str:
    """Name, exponent and crossover of a row."""
    parts = [str(part["label"].iloc[0])]
    fitted = growth_of(part, quantity)
    if fitted is not None:
        parts[0] += f" $\\propto p^{{{fitted.exponent:.2f}}}$"
    crossed = crossover_of(data, part, quantity)
    if crossed and part["row"].iloc[0] != BASELINE:
        parts.append(str(crossed))
    return ", ".join(filter(None, parts))


def _draw_crossover(
    ax: Axes, data: pd.DataFrame, part: pd.DataFrame, style: dict[str, Look], quantity: str
) -> None:
    """A ring where the row's line crosses that of full attention for good."""
    crossed = crossover_of(data, part, quantity)
    if crossed is None or crossed.between is None:
        return
    costs = known(part, quantity).set_index("pixels")["cost"]
    low, high = (float(costs[pixels]) for pixels in crossed.between)
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
        measured, fitted = known(part, quantity), growth_of(part, quantity)
        missing = part[part[quantity].isna() & part["error"].isin(list(_FAILURES))]
        if fitted is None or missing.empty:
            continue
        colour = style[part["family"].iloc[0]].colour
        last = measured.iloc[-1]
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
