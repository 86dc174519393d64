"""Pictures of what rows find in a few images, and of what one query of each sees."""

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import image as pictures
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from bench.record import PICTURES, SCHEMA, Record, done_name
from report import seeds
from report.load import labels
from report.plots import WIDTH, Plot, render

# The gradient from which on a cell counts as seen, as a share of the largest.
LEAST = 1e-3
_COLUMNS = 3
_OUTER, _INNER = ("black", 2.4), ("white", 1.2)

log = logging.getLogger(__name__)


ABOUT = (
    "Grey images, the same for all rows, which are those of their first seed. First the objects and"
    " what each row finds in them, with a score of {least} or more and the number of its class."
    " Then the cells that one query (white square) of a row's first attention layer depends on: the"
    " gradient of its output, and the share of cells above a thousandth of the largest."
)


def load(records: Sequence[Record], directory: Path) -> dict[str, dict[str, Any]]:
    """Return the content of `pictures/` in an output folder, by label of its rows.

    Of a row with several seeds it is that of the first that has any: its pictures would fill pages.
    """
    rows = seeds.rows(records)
    names = labels([row[0] for row in rows])
    found: dict[str, dict[str, Any]] = {}
    for label, record in (
        (name, one) for name, row in zip(names, rows, strict=True) for one in row
    ):
        if label in found:
            continue
        path = directory / PICTURES / done_name(record.row, record.key)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("left out of the pictures: %s: %s", path, error)
            continue
        if content.get("schema") == SCHEMA and content.get("key") == record.key:
            found[label] = content
    return found


def blocks(rows: Mapping[str, Mapping[str, Any]]) -> list[str | Plot]:
    """Return both pictures and what they show; nothing without rows."""
    if not rows:
        return []
    return [
        ABOUT.format(least=next(iter(rows.values()))["least_score"]),
        render("predictions", "What rows find", lambda: predictions(rows)),
        render("sight", "What one query sees", lambda: sight(rows)),
    ]


def predictions(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the same images for each row: the objects (first line), then what it finds."""
    first = next(iter(rows.values()))["images"]
    lines = [("ground truth", None), *rows.items()]
    # An image is about three quarters as high as it is wide, and the names need an inch.
    height = 0.75 * (WIDTH - 1) / len(first) + 0.05
    figure = Figure(figsize=(WIDTH, height * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(first), squeeze=False)
    for line, (name, row) in zip(axes, lines, strict=True):
        for place, ax in enumerate(line):
            shown = first[place] if row is None else row["images"][place]
            _image(ax, first[place])
            for one in shown["truth"] if row is None else shown["found"]:
                _box(ax, one)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def sight(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw for each row the cells that one query of its first attention layer depends on."""
    columns = min(_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.45 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    drawn = None
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (name, row) in zip(axes.flat, rows.items(), strict=False):
        sees = row["sees"]
        values = np.array(sees["values"])
        height, width = _image(ax, row["images"][0]).shape[:2]
        drawn = ax.imshow(
            np.ma.masked_where(values < LEAST, values),
            cmap="cividis",
            # Linear, all but the query itself would be as dark as the least.
            norm=LogNorm(LEAST, 1),
            alpha=0.8,
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        row_of, column_of = sees["query"]
        cell = width / values.shape[1], height / values.shape[0]
        _outline(ax, values >= LEAST, cell)
        centre = (column_of + 0.5) * cell[0], (row_of + 0.5) * cell[1]
        ax.plot(*centre, marker="s", markersize=5, color="white", markeredgecolor="black")
        share = (values >= LEAST).mean()
        ax.set_title(f"{name}: {share:.0%}", loc="left")
    if drawn is not None:
        figure.colorbar(
            drawn,
            ax=axes,
            location="bottom",
            aspect=40,
            label="gradient / largest gradient",
            format="%g",
        )
    return figure


def _image(ax: Axes, shown: Mapping[str, Any]) -> Any:
    """Draw an image in grey, faint enough for what is drawn over it."""
    pixels = pictures.imread(io.BytesIO(base64.b64decode(shown["png"])), format="png")
    grey = pixels[..., :3].mean(axis=-1)
    ax.imshow(grey, cmap="gray", vmin=-0.3, vmax=1.2)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return grey


def _outline(ax: Axes, seen: NDArray[np.bool_], cell: tuple[float, float]) -> None:
    """Draw the border of the cells that are seen, which shades alone do not show in grey."""
    padded = np.pad(seen, 1)
    for axis, draw in ((0, ax.hlines), (1, ax.vlines)):
        rows, columns = np.nonzero(np.diff(padded, axis=axis))
        along, across = (rows, columns - 1) if axis == 0 else (columns, rows - 1)
        unit, other = cell[1 - axis], cell[axis]
        draw(along * unit, across * other, (across + 1) * other, colors="white", linewidth=0.8)


def _box(ax: Axes, one: Mapping[str, Any]) -> None:
    """Draw a box, legible on light and on dark, and its class."""
    left, top, right, bottom = one["box"]
    for colour, line in (_OUTER, _INNER):
        sides = right - left, bottom - top
        ax.add_patch(Rectangle((left, top), *sides, fill=False, edgecolor=colour, linewidth=line))
    ax.text(
        left + 1,
        top + 1,
        str(one["label"]),
        fontsize=7.5,
        color="white",
        va="top",
        bbox={"facecolor": "black", "pad": 0.6, "linewidth": 0},
    )
