"""Plots of records, as PNG and SVG.

Colour and marker say the mechanism of a row, hollow says that its later stages have full attention.
"""

import functools
import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import matplotlib as mpl
import matplotlib.style
import pandas as pd
from adjustText import adjust_text
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from bench.record import Record
from report import confidence, front, seeds
from report.columns import AT_LEAST, Unit, aligned
from report.front import Cost, Place
from report.load import PARTIAL, Library, Named, at, family, per_library, published, timed_apart
from report.tables import marked

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too light on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666", "#56B4E9", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "p")
# Inches of every figure: text of 8 points then has 5.4 in a column of 85 mm; journals ask for 5.
WIDTH = 5.0
DPI = 200
SMOOTHING = 5
LEAST_AP = 1.0
FRONT = "#999999"

# Characters that fit across a figure, and most of them over a panel of costs.
_LINE, _TITLE = 76, 28
# Points around a mark that a label keeps free.
_CLEAR = 4
# Pixels of a page for an inch: larger than in print.
_PAGE = 144
# Costs further apart than this, largest over least, are drawn on a logarithm.
_WIDE = 5
# Fonts with more scripts than Matplotlib's own, where they are installed: of Linux, Windows, macOS.
_MORE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Hiragino Sans"),
)
_GLYPH = re.compile(r"Glyph (\d+) .* missing from")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "report",
    # A name with dollars is not a formula.
    "text.parse_math": False,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Plot(Named):
    """One plot, or why there is none; its title is also for those who cannot see it.

    Attributes:
        png: the picture, empty if skipped.
        svg: the same, scalable.
        skipped: a sentence, empty if there is a picture.
        width: of the picture, in the pixels of a web page.
        note: a sentence that belongs under it, or nothing.
    """

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

    def fill(self, row: str) -> str:
        """Return the colour inside the marks of a row."""
        return "white" if row.startswith(PARTIAL) else self.colour

    def mark(self, row: str) -> dict[str, Any]:
        """Return how Matplotlib draws the mark of a row."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": self.fill(row),
            "markeredgewidth": 1.6,
        }


Looks = dict[str, Look]


def looks(families: Sequence[str]) -> Looks:
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
    style = looks([family(record) for record in records])
    makers: list[Callable[[Library], Plot]] = [
        lambda library: render(
            "ranks", "Box mAP and rank of each row", lambda: ranks(library, style)
        ),
        *(partial(_draw_accuracy, name, style) for name in ("flops", "memory", "latency")),
        partial(_draw_costs, style),
        lambda library: render("loss", "Training loss over steps", lambda: losses(library, style)),
    ]
    return [plot for make in makers for plot in per_library(make)(records)]


def ranks(library: Library, style: Looks) -> Figure | str:
    """Draw box mAP of every row, the highest first, with its interval, its seeds and its rank."""
    data = library.data.assign(rank=pd.Series(confidence.ranks(library), dtype="Int64"))
    data = data.dropna(subset=["box_AP"]).sort_values("box_AP", ascending=False, kind="stable")
    if data.empty:
        return "No row has a box mAP, so there is no plot of them."
    figure = Figure(figsize=(WIDTH, 0.7 + 0.2 * len(data)), layout="constrained")
    ax = figure.subplots()
    for place, (index, row) in enumerate(data.iterrows()):
        look = style[row["family"]]
        if pd.notna(row["box_low"]):
            ax.hlines(place, row["box_low"], row["box_high"], colors=look.colour, linewidth=1.4)
        of_seeds = seeds.of(library.records[int(str(index))]).get("box_AP", [])
        ax.plot(of_seeds, [place] * len(of_seeds), "|", color=look.colour, markersize=7)
        ax.plot(row["box_AP"], place, **look.mark(row["row"]), markersize=5.5)
        if pd.notna(row["rank"]):
            ax.annotate(
                f"{row['rank']}",
                (1.01, place),
                xycoords=ax.get_yaxis_transform(),
                va="center",
            )
    ax.set_title("rank", loc="right")
    ax.set_yticks(range(len(data)), data["label"])
    ax.set_ylim(len(data) - 0.5, -0.5)
    ax.set_xlabel("Box mAP (%)")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    left, right = ax.get_xlim()
    if right - left < LEAST_AP:
        ax.set_xlim((left + right - LEAST_AP) / 2, (left + right + LEAST_AP) / 2)
    return figure


def _draw_accuracy(name: str, style: Looks, library: Library) -> Plot:
    library, others = _of_one_session(library)
    data, cost = library.data, front.costs(library.data)[name]
    others &= cost.name == "latency"
    missing = data[["box_AP", cost.column]].isna().any(axis="columns") & ~others
    if cost.column == "flops":
        missing |= data["flops_uncounted"].notna()
    rows = [row for row, out in zip(marked(data), missing, strict=True) if out]
    could = [data["label"][p.row] for p in front.places(library, cost.column) if p.could_be]
    notes = [f"Could be on the front or not (ringed): {', '.join(could)}."] * bool(could)
    notes += [f"Not drawn, as a number is missing or incomplete: {', '.join(rows)}."] * bool(rows)
    notes += _other_sessions(data, others)
    title = f"Box mAP against {cost.name}"
    plot = render(f"accuracy_{name}", title, lambda: accuracy(library, style, cost))
    return replace(plot, note=" ".join([*notes, *filter(None, [plot.note])]))


def _draw_costs(style: Looks, library: Library) -> Plot:
    library, others = _of_one_session(library)
    plot = render("cost", "Cost per row", lambda: costs(library.data, style))
    notes = _other_sessions(library.data, others)
    return replace(plot, note=" ".join([*notes, *filter(None, [plot.note])]))


def _of_one_session(library: Library) -> tuple[Library, pd.Series]:
    """The library with the latencies of most rows' session alone, and which rows lost theirs."""
    data, others = library.data, timed_apart(library.data)
    times = ["latency", "latency_q1", "latency_q3"]
    return replace(library, data=data.assign(**data[times].mask(others))), others


def _other_sessions(data: pd.DataFrame, others: pd.Series) -> list[str]:
    rows = ", ".join(data["label"][others])
    return [f"Latency not drawn, as of another session than most rows': {rows}."] * bool(rows)


def accuracy(library: Library, style: Looks, cost: Cost) -> Figure | str:
    """Draw box mAP with its interval against a cost, and the front of rows that are told apart.

    Args:
        library: the rows.
        style: see `looks`.
        cost: one of `report.front.costs`; a latency has its quartiles.
    """
    data, places = library.data, front.places(library, cost.column)
    ends = [f"{cost.column}{end}" for end in ("_q1", "_q3")]
    ends = ends if ends[0] in data.columns else [cost.column] * 2
    scaled = dict(zip(("x", "left", "right"), (cost.column, *ends), strict=True))
    data = data.assign(**{name: data[of] / cost.unit.size for name, of in scaled.items()})
    if cost.column == "flops":
        data = data[data["flops_uncounted"].isna()]
    data = data.dropna(subset=["x", "box_AP"]).astype(dict.fromkeys((*scaled, "box_AP"), float))
    if data.empty:
        return f"No row has both box mAP and {cost.name}, so there is no plot of them."
    data[["left", "right"]] = data[["left", "right"]].apply(lambda end: end.fillna(data["x"]))
    data = data.sort_values("box_AP", ascending=False, kind="stable")
    figure = Figure(figsize=(WIDTH, max(3.4, 0.7 + 0.16 * len(data))), layout="constrained")
    ax = figure.subplots()
    ax.margins(0.12)
    steps = _draw_front(ax, data, places)
    for place, row in enumerate(data.to_dict("records"), start=1):
        mark = {**style[row["family"]].mark(row["row"]), "linestyle": "none", "markersize": 6}
        ax.plot(row["x"], row["box_AP"], **mark, zorder=3, label=f"{place} {row['label']}")
    figure.legend(loc="outside right center", handletextpad=0.2, borderpad=0)
    colours = [style[family].colour for family in data["family"]]
    ax.hlines(data["box_AP"], data["left"], data["right"], colors=colours, linewidth=1.2, zorder=2)
    low, high = data["box_low"].astype(float), data["box_high"].astype(float)
    ax.vlines(data["x"], low, high, colors=colours, linewidth=1.2, alpha=0.45, zorder=2)
    if data["x"].max() > _WIDE * data["x"].min():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(cost.label)
    ax.set_ylabel("Box mAP (%)")
    bottom, top = ax.get_ylim()
    if top - bottom < LEAST_AP:
        # Drawn over the whole height, a difference within chance would look large.
        ax.set_ylim((bottom + top - LEAST_AP) / 2, (bottom + top + LEAST_AP) / 2)
    _label(figure, ax, data, steps)
    return figure


def costs(data: pd.DataFrame, style: Looks) -> Figure | str:
    """Draw parameters, FLOPs, memory and latency of every row as bars, one panel each."""
    parameters = Cost("parameters", "", "parameters", Unit.MEGA, "Parameters (M)")
    known = (parameters, *front.costs(data).values())
    panels = [cost for cost in known if data[cost.column].notna().any()]
    if not panels:
        return "No row has a cost yet, so there is no plot of costs."
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, lines * (0.6 + 0.2 * len(data))), layout="constrained")
    axes = figure.subplots(lines, 2, sharey=True, squeeze=False)
    if len(panels) % 2:
        axes[-1, 1].set_visible(False)
    places, names = range(len(data)), marked(data)
    title = max(_TITLE // 2, min(_TITLE, (_LINE - max(map(len, names))) // 2))
    for ax, cost in zip(axes.flat, panels, strict=False):
        values = data[cost.column].astype("Float64") / cost.unit.size
        lengths = values.astype(float)
        bars = ax.barh(places, lengths, height=0.68, linewidth=1.2)
        for bar, row, mechanism in zip(bars, data["row"], data["family"], strict=True):
            bar.set_facecolor(style[mechanism].fill(row))
            bar.set_edgecolor(style[mechanism].colour)
        ends = lengths.fillna(0.0)
        if cost.name == "latency":
            ends = _draw_quartiles(ax, data)
        top = max(float(ends.max()), 1e-12)
        texts = aligned(values)
        if cost.column == "flops":
            texts = texts.mask(data["flops_uncounted"].notna(), f"{AT_LEAST} " + texts)
        for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
            ax.text(end + 0.03 * top, place, text, va="center")
        ax.set_xlim(0, 1.35 * top)
        ax.set_title(textwrap.fill(cost.label, title), loc="left")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(places, names)
    axes[0, 0].invert_yaxis()
    return figure


def losses(library: Library, style: Looks) -> Figure | str:
    """Draw the training loss of every row, raw and smoothed, one panel a row with shared axes."""
    rows = zip(marked(library.data), library.records, strict=True)
    drawn = [
        (name, one, found) for name, one in rows if (found := _losses(one)).notna().any(axis=None)
    ]
    if not drawn:
        return "No row has been trained, so there is no plot of losses."
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax, (name, record, series) in zip(axes.flat, drawn, strict=False):
        colour = style[family(record)].colour
        ax.plot(series.index, series, color=colour, alpha=0.3, linewidth=0.9)
        window = max(SMOOTHING, len(series) // 20)
        smooth = series.mean(axis=1).rolling(window, center=True, min_periods=1).mean()
        # A line of one point is not seen.
        marker = "o" if len(series) == 1 else ""
        ax.plot(series.index, smooth, color=colour, linewidth=1.6, marker=marker, markersize=4)
        ax.set_title(name, loc="left")
    for ax in axes.flat[len(drawn) :]:
        ax.set_visible(False)
        # The panel above is then the lowest of its column and needs the numbers.
    for column in range(columns):
        shown = [ax for ax in axes[:, column] if ax.get_visible()]
        shown[-1].tick_params(labelbottom=True)
    axes[0, 0].set_ylim(bottom=0)
    figure.supxlabel("Step", fontsize=8)
    figure.supylabel("Training loss", fontsize=8)
    return figure


def _draw_front(ax: Axes, data: pd.DataFrame, places: Sequence[Place]) -> list[tuple[float, float]]:
    """Draw the front as a line of steps, ring the rows that could be on it, return its corners."""
    rows = [place.row for place in places if place.on_front]
    could = data.loc[[place.row for place in places if place.could_be]]
    ax.scatter(could["x"], could["box_AP"], s=110, facecolors="none", edgecolors=FRONT, zorder=1)
    points = [(float(x), float(y)) for x, y in data.loc[rows, ["x", "box_AP"]].to_numpy()]
    corners = [(after[0], before[1]) for before, after in itertools.pairwise(points)]
    steps = [point for pair in itertools.zip_longest(points, corners) for point in pair if point]
    if steps:
        ax.plot(*zip(*steps, strict=True), color=FRONT, linewidth=1.4, zorder=1)
    about = ["Grey line: rows told apart from all that cost no more"] * (len(points) > 1)
    about += ["Ringed: could be on the front"] * (len(could) > 0)
    ax.set_title("\n".join(about), loc="right", color="#555555")
    return steps


def _label(
    figure: Figure, ax: Axes, data: pd.DataFrame, steps: Sequence[tuple[float, float]]
) -> None:
    """Write each point's number in the legend beside it, where it covers no mark or line.

    A name is too long to be nearer to its own mark than to the others.
    """
    figure.draw_without_rendering()
    # Frozen, so that what was measured stays where it is.
    figure.set_layout_engine("none")
    points = data.to_dict("records")
    spans = [[(row["left"], row["box_AP"]), (row["right"], row["box_AP"])] for row in points]
    marks = [_around(ax, span, _CLEAR) for span in spans]
    lines = [_around(ax, corners, 1) for corners in itertools.pairwise(steps)]
    adjust_text(
        [
            # The margin above the highest mark has room for a number.
            ax.text(row["x"], mark.y1, f"{place}", va="bottom", ha="center")
            for place, (row, mark) in enumerate(zip(points, marks, strict=True), start=1)
        ],
        target_x=data["x"].to_numpy(),
        target_y=data["box_AP"].to_numpy(),
        objects=[*marks, *lines],
        avoid_self=False,
        force_explode=(0.5, 1.0),
        force_text=(0.2, 0.4),
        # Two lines that cross are easier to read than two numbers in one place.
        prevent_crossings=False,
        ax=ax,
        # Not the default limit of time, which would draw other pictures on a slower machine.
        iter_lim=300,
        min_arrow_len=8,
        arrowprops={"arrowstyle": "-", "color": "#666666", "lw": 0.6, "shrinkB": 2},
    )


def _around(ax: Axes, corners: Sequence[tuple[float, float]], points: float) -> Bbox:
    """The box around two places, and some points more, in the units of the axes."""
    low, high = sorted(ax.transData.transform(corners).tolist())
    box = Bbox([low, high]).padded(points * ax.figure.dpi / 72)
    return Bbox(ax.transData.inverted().transform(box.get_points()))


def _losses(record: Record) -> pd.DataFrame:
    """The total loss by step, a column a seed; numbers that were not finite are missing."""
    trainings = at(record, "training.by_seed") or [record.training or {}]
    return pd.DataFrame(
        {
            place: pd.Series(
                {entry["step"]: entry.get("total") for entry in training.get("losses", [])},
                dtype=float,
            )
            for place, training in enumerate(trainings)
        }
    )


def _draw_quartiles(ax: Axes, data: pd.DataFrame) -> pd.Series:
    """Draw the quartiles of latency, and return where each row's bar and quartiles end (ms)."""
    times = data[["latency", "latency_q1", "latency_q3"]].astype(float) / Unit.MS.size
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


@functools.cache
def _fonts() -> list[str]:
    there = font_manager.get_font_names()
    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in there)]


def render(name: str, title: str, make: Callable[[], Figure | str]) -> Plot:
    """Return the plot that `make` draws, or its sentence where there is nothing to draw."""
    with (
        # A user's own settings may need LaTeX, or look otherwise.
        mpl.style.context(["default", _STYLE | {"font.family": _fonts()}]),
        warnings.catch_warnings(record=True) as caught,
    ):
        figure = make()
        if isinstance(figure, str):
            return Plot(name, title, b"", "", figure)
        png, svg = io.BytesIO(), io.StringIO()
        # No date and no version: the same records give the same bytes.
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    missing = [_GLYPH.match(str(one.message)) for one in caught]
    letters = "".join(dict.fromkeys(chr(int(found[1])) for found in missing if found))
    note = f"Drawn as boxes, as no font here has them: {letters}." if letters else ""
    width = round(_PAGE * figure.get_figwidth())
    return Plot(name, title, png.getvalue(), svg.getvalue(), "", width, note)
