"""Plots of a sweep; `data` is the frame of `report.sweep`."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from report.columns import Unit, memory_unit, reason
from report.load import PARTIAL
from report.plots import WIDTH, Looks, Plot, looks, render
from report.scaling import BASELINE, QUANTITIES, crossover_of, growth_of, known, parts

_AXES = {
    "flops": "FLOPs of one image ({} multiply-adds)",
    "memory": "Peak memory ({})",
    "latency": "Latency ({}, median and quartiles)",
}
_FAILURES = {"out_of_memory": "X", "too_slow": "d", "error": "P"}
# Seconds from which on latencies are drawn in seconds.
_LONG = 10.0


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


def against_resolution(data: pd.DataFrame, style: Looks, quantity: str) -> Figure | str:
    """Draw one quantity against the side of images, both on logarithms, a line a row."""
    if data[quantity].isna().all():
        return f"There is no {QUANTITIES[quantity]} of {data['mode'].iloc[0]}."
    unit = _unit(data, quantity)
    data = data.assign(cost=data[quantity].astype(float) / unit.size)
    # The labels stand to the right of the axes.
    height = max(3.4, 0.6 + 0.15 * data["row"].nunique())
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.15, right=0.56, top=1 - 0.15 / height, bottom=0.5 / height)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = []
    for row, part in data.groupby("row", sort=False):
        line = _draw_row(ax, part, style, quantity, unit)
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
    ax.set_ylabel(_AXES[quantity].format(unit.symbol))
    # Places are known only once the limits of both axes are.
    figure.draw_without_rendering()
    _draw_labels(ax, ends)
    return figure


def _unit(data: pd.DataFrame, quantity: str) -> Unit:
    slow = bool((data["latency"] >= _LONG).any())
    units = {
        "memory": memory_unit(data["memory"]),
        "latency": Unit.SECONDS if slow else Unit.MS,
    }
    return units.get(quantity, Unit.GIGA)


def _draw_row(
    ax: Axes, part: pd.DataFrame, style: Looks, quantity: str, unit: Unit
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
        markersize=4,
        markerfacecolor="white" if partial_row else look.colour,
        linewidth=2.2 if part["row"].iloc[0] == BASELINE else 1.1,
        linestyle="--" if partial_row else "-",
        # Where lines coincide, what is compared lies above what it is compared with.
        zorder=2.5 if part["row"].iloc[0] == BASELINE else 3,
    )
    if quantity == "latency":
        low, high = (
            measured[name].astype(float) / unit.size for name in ("latency_q1", "latency_q3")
        )
        ax.vlines(measured["side"], low, high, color=look.colour, linewidth=1.2, zorder=2)
    return float(measured["side"].iloc[-1]), float(measured["cost"].iloc[-1])


def _label(data: pd.DataFrame, part: pd.DataFrame, quantity: str) -> str:
    """Name and exponent of a row, and where it crosses full attention, with formulas."""
    parts = [str(part["label"].iloc[0]).replace("$", r"\$")]
    fitted = growth_of(part, quantity)
    if fitted is not None:
        parts[0] += f" $\\propto p^{{{fitted.exponent:.2f}}}$"
    crossed = crossover_of(data, part, quantity)
    if crossed and crossed.after_pixels is not None:
        parts.append(str(crossed))
    return ", ".join(parts)


def _draw_crossover(
    ax: Axes, data: pd.DataFrame, part: pd.DataFrame, style: Looks, quantity: str
) -> None:
    """Draw a ring where the line of a row crosses that of full attention for good."""
    crossed = crossover_of(data, part, quantity)
    if crossed is None or crossed.after_pixels is None:
        return
    measured = known(part, quantity)
    x, y = (np.log(measured[name].astype(float)) for name in ("pixels", "cost"))
    ax.plot(
        math.sqrt(crossed.pixels),
        np.exp(np.interp(math.log(crossed.pixels), x, y)),
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=style[part["family"].iloc[0]].colour,
        markeredgewidth=1.2,
        zorder=4,
    )


def _draw_failures(ax: Axes, data: pd.DataFrame, style: Looks, quantity: str) -> None:
    """Mark what could not be measured where the growth before it would put it."""
    kinds = set()
    for _, part in data.groupby("row", sort=False):
        measured, fitted = known(part, quantity), growth_of(part, quantity)
        missing = part[part[quantity].isna() & part["error"].isin(list(_FAILURES))]
        if fitted is None or missing.empty:
            continue
        colour, last = style[part["family"].iloc[0]].colour, measured.iloc[-1]
        for _, line in missing.iterrows():
            cost = float(last["cost"]) * (line["pixels"] / last["pixels"]) ** fitted.exponent
            ends = [last["side"], line["side"]], [last["cost"], cost]
            ax.plot(*ends, color=colour, linestyle=":", linewidth=1.2, zorder=2)
            ax.plot(
                line["side"],
                cost,
                _FAILURES[line["error"]],
                color=colour,
                markeredgecolor="black",
                markersize=7,
                zorder=4,
            )
            kinds.add(line["error"])
    for kind in filter(kinds.__contains__, _FAILURES):
        ax.plot(
            [],
            [],
            _FAILURES[kind],
            color="#999999",
            markeredgecolor="black",
            label=reason(kind),
        )
    if kinds:
        ax.legend(loc="upper left")


def _draw_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's label beside the axes, at its height or as near as the others allow."""
    beside = ax.get_xlim()[1] * 1.05
    ends = sorted(ends, key=lambda end: end[1])
    texts = [
        ax.text(beside, y, f" {text}", va="center", color="#222222", parse_math=True)
        for _, y, text, _ in ends
    ]
    high = max((text.get_window_extent().height for text in texts), default=0.0)
    places = ax.transData.transform(np.array([(x, y) for x, y, _, _ in ends]).reshape(-1, 2))
    wanted: list[float] = places[:, 1].tolist()
    ax.autoscale(enable=False)
    for text, (x, y, _, colour), to in zip(
        texts, ends, _spread(wanted, high, ax.bbox.y0, ax.bbox.y1), strict=True
    ):
        height = ax.transData.inverted().transform((0, to))[1]
        text.set_y(height)
        ax.plot([x * 1.01, beside], [y, height], color=colour, linewidth=0.9, clip_on=False)


def _spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Move rising places as little as leaves `apart` between them, and inside where they fit."""
    steps = apart * np.arange(len(wanted))
    level = np.asarray(wanted, dtype=float) - steps
    # Halfway between where all moves go up and where all go down.
    up = np.maximum.accumulate(level)
    down = np.minimum.accumulate(level[::-1])[::-1]
    room = max(high - low - steps[-1], 0.0) if len(steps) else 0.0
    found: list[float] = (np.clip((up + down) / 2, low, low + room) + steps).tolist()
    return found
