"""What rows cost at full size, beside what they were trained at; from records of costs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record import COSTS, Record
from report import searches
from report.columns import METHODS, Column, Table, Unit, memory_unit, of_flops, table
from report.load import MODES, Library, at, calls, load_newest, ordered, per_library, size
from report.provenance import listed, machine

KIND = "predicted"
# Predictions of memory closer than this say nothing of which is less: tests allow as much between
# them and what is measured.
ALIKE = 0.1
_TIMES = ("median", "q1", "q3")
_LAYERS = dict(zip(_TIMES, ("layers", "layers_q1", "layers_q3"), strict=True))
_PRECISIONS = {"16-mixed": "mixed precision (fp16)", "bf16-mixed": "mixed precision (bf16)"}


def load(directory: Path) -> list[Record]:
    """Read the costs in `directory/costs`, those of the newest size."""
    found = load_newest(directory / COSTS)
    last = _size(max(found, key=lambda one: one.created)) if found else None
    return ordered(record for record in found if _size(record) == last)


@dataclass(frozen=True)
class Conditions:
    """What costs at full size are of.

    Attributes:
        image_size: height and width, in words.
        batch_size: images of a device.
        sentence: all of it, in words.
        layers: where and how attention layers were measured, in sentences; or nothing.
    """

    image_size: str
    batch_size: int
    sentence: str
    layers: str


def conditions(costs: Sequence[Record]) -> Conditions | None:
    """Return what costs are of; None without any."""
    counted = [record for record in costs if not _measured(record)]
    if not counted:
        return None
    first = counted[0]
    profile, train = first.config["profile"], first.config["train"]
    names = {
        name: listed(at(one, f"model.{name}") for one in counted)
        for name in ("backbone", "library")
    }
    methods = [at(one, "model.method") for one in counted]
    image, batch = size(profile["image_size"]) or "", int(profile["batch_size"])
    side = round(math.prod(profile["image_size"]) ** 0.5)
    square = size([side, side])
    alike = "" if image == square else f" (as many pixels as {square})"
    precision = _PRECISIONS.get(train["precision"], "full precision")
    device = "GPU" if str(first.config["device"]).startswith("cuda") else "CPU"
    return Conditions(
        image,
        batch,
        f"{names['backbone']}, {listed(METHODS.get(method, method) for method in methods)}"
        f" ({names['library']}), images of {image}{alike}, batch {batch},"
        f" {precision} on one {device}{_computed_again(counted)}",
        _of_layers([record for record in costs if _measured(record)]),
    )


def _computed_again(counted: Sequence[Record]) -> str:
    """Which rows keep no activations of blocks, as a clause of where their costs are of."""
    again = [record.row for record in counted if at(record, "config.model.checkpoint")]
    rows = "" if len(again) == len(counted) else f" of {listed(again)}"
    return f", blocks{rows} computed again in the backward pass" if again else ""


def _of_layers(measured: Sequence[Record]) -> str:
    """Where attention layers were measured, and what makes their times uncertain."""
    if not measured:
        return ""
    where, precisions, batches = (
        listed(map(machine, measured)),
        *(
            listed(at(one, path) for one in measured)
            for path in ("latency.precision", "latency.batch_size")
        ),
    )
    notes = [note.split(": ")[2] for one in measured for note in at(one, "latency.notes") or ()]
    kinds = listed(note.partition(" after ")[0] for note in notes)
    doubts = f" Some of the times are uncertain ({kinds}); see the records." if notes else ""
    return (
        f"Attention layers were measured on {where} (inference, precision {precisions}, batch"
        f" {batches}): their time is the median of one layer of each stage, times its layers, their"
        f" memory the largest peak of one layer.{doubts}"
    )


def at_reference(records: Sequence[Record], costs: Sequence[Record]) -> list[Record]:
    """Return `records` with the costs of their rows at full size in the place of their own.

    Memory is what was predicted. `latency` stays as it was; where attention layers were measured,
    its `layers` has the times of all those of a backbone together, and that of memory the largest
    peak of one. A row that has no such costs has none, and its notes say why.
    """
    newest = sorted(costs, key=lambda one: one.created, reverse=True)

    def find(record: Record, *, measured: bool) -> Record | None:
        for name in (record.row, searches.base(record)):
            for cost in newest:
                known = cost.row == name and _measured(cost) == measured
                if known and _model(cost, record) == _model(record, cost):
                    return cost
        return None

    return [
        _with(record, find(record, measured=False), find(record, measured=True))
        for record in records
    ]


def _model(record: Record, other: Record) -> list[Any]:
    """What two records of one model have in common, though one be of a larger backbone."""
    found: list[Any] = [record.model["method"]]
    model, its = (one.config.get("model") for one in (record, other))
    if not (model and its):
        return found
    found += [model.get(name) for name in ("attention", "options")]
    found.append(bool(model.get("checkpoint")))
    if record.model["backbone"] == other.model["backbone"]:
        found.append(model.get("detector"))
    # Heads, widths, depths and patches are those of the backbone.
    return [*found, re.sub(r"\b[hdnp]\d+,?", "", str(model.get("arch")))]


def _with(record: Record, counted: Record | None, layers: Record | None) -> Record:
    if counted is None:
        return replace(record, parameters=None, flops=None, memory=None, notes=["not counted"])
    totals = {mode: at(counted, f"memory.predicted.{mode}.total") for mode in MODES}
    why = [f"not counted: {counted.error['message']}"] if counted.error else []
    latency: Mapping[str, Any] | None = record.latency
    largest = None
    stages = at(layers, f"latency.by_part.{MODES[0]}") if layers else None
    if layers and stages and len(stages) == str(counted.model["arch"]).count("_") + 1:
        every = {n: sum(one["layers"] * one[n] for one in stages.values()) for n in _TIMES}
        every["session"] = at(layers, "latency.session")
        latency = {**(latency or {"unit": "s", "inference": None}), "layers": every}
        peaks = (at(layers, f"memory.by_part.{MODES[0]}") or {}).values()
        largest = max((peak for peak in peaks if peak is not None), default=None)
    own = {name: at(record, f"flops.{name}") for name in ("total", "image_size", "uncounted")}
    return replace(
        record,
        parameters=counted.parameters,
        flops=counted.flops and {**counted.flops, "trained": own},
        memory=counted.memory and {**counted.memory, **totals, "kind": KIND, "layers": largest},
        latency=latency,
        notes=[*counted.notes, *why, *(layers.notes if layers else ())],
    )


def tables(records: Sequence[Record], costs: Sequence[Record]) -> list[Table]:
    """Return what rows cost at full size, with their cost in the comparison beside it."""
    about = conditions(costs)
    if about is None:
        return []
    build = per_library(partial(_table, about=about))
    return build(at_reference(records, costs))


def _table(library: Library, about: Conditions) -> Table:
    records = library.records
    data = library.data.assign(
        trained=pd.Series([at(one, "flops.trained.total") for one in records], dtype="Float64")
    )
    sizes = dict.fromkeys(size(at(one, "flops.trained.image_size")) for one in records)
    trained = " or ".join(filter(None, sizes))
    columns = [
        Column("row", "row", "label"),
        Column("parameters", "params {} (counted)", unit=Unit.MEGA),
        Column("flops_published", "FLOPs {} as published ones are counted", unit=Unit.GIGA),
        *of_flops("FLOPs {} (counted)"),
        *(
            Column(
                f"memory_{mode}_bytes", f"{mode} memory {{}} (predicted)", f"memory_{mode}", Unit.GB
            )
            for mode in MODES
        ),
        *(Column(f"attention_layers_{end}_s", values=name) for end, name in _LAYERS.items()),
        Column("", "attention layers {} (measured)", "layers", Unit.MS, optional=True),
        Column(
            "attention_layer_largest_bytes",
            "largest attention layer {} (measured)",
            "layers_memory",
            memory_unit(data["layers_memory"]),
            optional=True,
        ),
    ]
    if trained and trained != about.image_size:
        heading = f"FLOPs {{}} at {trained}, as in the comparison"
        lacks = "trained_uncounted"
        data[lacks] = [calls(at(one, "flops.trained.uncounted") or {}) for one in records]
        columns.append(Column("flops_as_trained", heading, "trained", Unit.GIGA, lacks=lacks))
    notes = [
        f"{about.sentence}. Parameters and FLOPs (multiply-adds of one image, without the mask"
        " head) are counted, memory is predicted from shapes: no model was trained or run at this"
        " size.",
        *(
            f"{row}: {note}."
            for row, note in zip(data["label"], data["notes"], strict=True)
            if not pd.isna(note)
        ),
    ]
    if data["layers"].notna().any():
        notes.append(about.layers)
    return table("reference_costs", f"Costs at {about.image_size}", data, columns, notes)


def _measured(record: Record) -> bool:
    return "layers" in record.config


def _size(record: Record) -> list[Any]:
    return [at(record, f"config.profile.{name}") for name in ("image_size", "batch_size")]
