"""The points of a sweep as one table."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record import Record
from report.load import load

SUITE = "sweep"
MODES = ("inference", "training")
QUANTITIES = {
    "flops": "FLOPs",
    "memory": "memory",
    "latency": "latency",
}
_COLUMNS = ("row", "mode", "height", "width", "batch")
_WHOLE = ("height", "width", "batch", "flops", "memory")
LATENCIES = ("latency", "latency_q1", "latency_q3")


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
    table = table.astype(dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(LATENCIES, "Float64"))
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


def parts(data: pd.DataFrame) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """Name, title and lines of each mode and batch size."""
    several = data["batch"].nunique() > 1
    for mode in MODES:
        for batch in data["batch"].unique():
            part = data[(data["mode"] == mode) & (data["batch"] == batch)]
            if not part.empty:
                name = f"{mode}-batch-{batch}" if several else mode
                yield name, f"{mode}, batch of {batch}" if several else mode, part


def known(part: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The lines of a row that have a quantity, one a size."""
    return part.dropna(subset=[quantity]).drop_duplicates("pixels")


def size_text(line: Any) -> str:
    """`512x768` of a line, or the side of a square."""
    height, width = line["height"], line["width"]
    return str(height) if height == width else f"{height}x{width}"
