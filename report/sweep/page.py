"""The page of a sweep."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.record import Record
from report import page
from report.page import Block, Code, PlotBlock, Section, TableBlock, Text
from report.plots import Plot
from report.sweep import tables
from report.sweep.plots import draw
from report.sweep.points import frame, size_text
from report.tables import MISSING, Table, reason


def write(points: Sequence[Record], directory: Path) -> Path:
    """Write the page of `points` into `directory` and return its `index.md`.

    Raises:
        InputError: if the folder cannot be written.
    """
    data = frame(points)
    drawn = draw(data)
    sections = [
        Section("Growth and crossover", tuple(map(TableBlock, tables.summaries(data)))),
        Section("Cost against resolution", (Text(_LEGEND), *map(_picture, drawn))),
        Section("All points", (TableBlock(tables.points(data)),)),
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


def _failures(data: pd.DataFrame) -> list[Section]:
    failed = data[data["error"].notna()]
    if failed.empty:
        return []
    shown = pd.DataFrame(
        {
            "row": failed["label"],
            "mode": failed["mode"],
            "size": [size_text(line) for line in failed.to_dict("records")],
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
