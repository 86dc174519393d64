"""Tables of what rows cost, from the records of `python -m bench profile`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from bench.record import Record, slug
from report.columns import (
    METHODS,
    MISSING,
    Column,
    Table,
    Unit,
    aligned,
    decimals,
    joined,
    memory_unit,
    of_flops,
    table,
)
from report.load import MODES, at, frame
from report.tables import marked

PREDICTED = "predicted from shapes, not measured"
# Phases that add up to more or less of a step than this were timed under another load.
_BUSIER = 1.25
_MEMORY = [f"{what}_{mode}" for what in ("memory", "predicted") for mode in MODES]
_LATENCY = {"inference": "latency", "training": "latency_training"}


def costs(records: Sequence[Record]) -> Table:
    """Return one line a row: parameters, FLOPs, measured and predicted memory, latency."""
    data = frame(records)
    sessions = data["latency_session"].nunique()
    if sessions > 1:
        data[[f"group_{mode}" for mode in MODES]] = None
    unit = memory_unit(*(data[name] for name in _MEMORY))
    columns = [
        Column("row"),
        Column("", "row", marked),
        Column("attention", "attention"),
        Column("parameters", "params {}", unit=Unit.MEGA),
        *of_flops(name="flops"),
    ]
    for mode in MODES:
        latency = _LATENCY[mode]
        columns += [
            Column(f"memory_{mode}_bytes", values=f"memory_{mode}"),
            Column(f"predicted_{mode}_bytes", values=f"predicted_{mode}"),
            Column(
                "",
                f"{mode} memory {unit.symbol} (predicted)",
                partial(_memory, mode=mode, unit=unit),
                optional=True,
            ),
            Column(f"latency_{mode}_s", values=latency),
            Column(f"latency_{mode}_q1_s", values=f"{latency}_q1"),
            Column(f"latency_{mode}_q3_s", values=f"{latency}_q3"),
            Column(f"group_{mode}"),
            Column("", f"{mode} ms (median ± IQR)", partial(_latencies, mode=mode), optional=True),
        ]
    columns += [
        Column("ran", "what ran", lambda _: map(_ran, records), optional=True),
        Column("status"),
        Column("error", values="error_kind"),
    ]
    return table("costs", _title(records[0]), data, columns, _notes(records, sessions))


def parts(record: Record) -> Table | None:
    """Return one line for each part of a row's detector, or None without any."""
    names = list((record.parameters or record.flops or {}).get("by_part", {}))
    if not names:
        return None
    sources = {"parameters": "parameters.by_part", "flops_multiply_adds": "flops.by_part"}
    sources |= {f"memory_{mode}_bytes": f"memory.by_part.{mode}" for mode in MODES}
    sources |= {f"latency_{mode}_s": f"latency.by_part.{mode}" for mode in MODES}
    values = {column: at(record, path) or {} for column, path in sources.items()}
    data = pd.DataFrame(
        {"part": name} | {column: _median(of.get(name)) for column, of in values.items()}
        for name in names
    ).astype(dict.fromkeys(sources, "Float64"))
    unit = memory_unit(*(data[f"memory_{mode}_bytes"] for mode in MODES))
    columns = [
        Column("part", "part"),
        Column("parameters", "params {}", unit=Unit.MEGA),
        Column("flops_multiply_adds", "FLOPs {}", unit=Unit.GIGA),
    ]
    for mode in MODES:
        columns += [
            Column(f"memory_{mode}_bytes", f"{mode} memory {{}}", unit=unit, optional=True),
            Column(f"latency_{mode}_s", f"{mode} {{}}", unit=Unit.MS, optional=True),
        ]
    measured = data[[f"memory_{mode}_bytes" for mode in MODES]].notna().any(axis=None)
    notes = ["Memory of a part is its peak above what was there before it ran."] * bool(measured)
    left = (at(record, "parameters.total") or 0) - int(data["parameters"].sum())
    if left > 0:
        notes.append(
            f"{left:,} more parameters are in no part: the classification head and its norm, which"
            " a detector has under the published names and never uses."
        )
    elif left < 0:
        notes.append(f"{-left:,} parameters stand in two parts, which share them.")
    if phases := at(record, "latency.phases"):
        said = ", ".join(f"{name} {1e3 * of['median']:.1f} ms" for name, of in phases.items())
        notes.append(f"A training step by its phases: {said} (clipping is the optimizer's).")
        step, total = at(record, "latency.training"), sum(of["median"] for of in phases.values())
        if step and not step["q1"] / _BUSIER <= total <= step["q3"] * _BUSIER:
            notes.append(
                f"These are {total / step['median']:.2g} times the step: they, or it, were timed"
                " while the machine did something else; their shares alone can be compared."
            )
    return table(f"parts-{slug(record.row)}", f"Parts of {record.row}", data, columns, notes)


def throughput(records: Sequence[Record]) -> Table | None:
    """Return images a second at batch 1 and at the best batch of each row; None without any."""
    lines = [
        {"row": record.row, "mode": mode, **one, "ended": found["ended"], **_energy(one)}
        for record in records
        for mode, found in (at(record, "latency.throughput") or {}).items()
        for one in found["batches"]
        if one["batch_size"] in (1, found["best"])
    ]
    if not lines:
        return None
    times = ("median", "q1", "q3", "p90", "p95")
    columns = [
        *(Column(name, name) for name in ("row", "mode")),
        Column("batch_size", "batch", unit=Unit.ONE, format=decimals(0)),
        Column("images_per_second", "images/s", unit=Unit.ONE),
        *(Column(f"{name}_s", f"{name} {{}}", name, Unit.MS, decimals(1)) for name in times),
        Column("joules_per_image", "J/image", unit=Unit.ONE, optional=True),
        Column("idle_watts"),
        Column("ended"),
    ]
    notes = [
        "Of each row batch 1 and the batch with the most images/s; larger ones do not fit or gain"
        " little. p90: nine of ten calls take no longer."
    ]
    why = {line["why"] for line in lines if line["why"]}
    notes += [f"Energy is not available: {reason}." for reason in sorted(why)]
    sources = {line["source"] for line in lines if line["source"]}
    notes += [f"Energy: {source}, idle taken off." for source in sorted(sources)]
    return table("throughput", "Images a second", pd.DataFrame(lines), columns, notes)


def _energy(one: Mapping[str, Any]) -> dict[str, Any]:
    """Energy of an image, or why there is none."""
    spent = one["energy"]
    joules = spent.get("joules")
    return {
        "joules_per_image": None if joules is None else joules / one["batch_size"],
        "idle_watts": spent.get("idle_watts"),
        "source": spent.get("source"),
        "why": spent.get("not_available"),
    }


def fits(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the largest sizes within a memory budget, one line for each row and mode.

    Args:
        lines: of `bench.measure.predict.Fit` as plain values, with `row` and `mode`.
    """
    data = pd.DataFrame(
        {
            **{name: line[name] for name in ("row", "mode", "vary", "largest")},
            **{name: line["prediction"][name] for name in ("batch_size", "precision", "device")},
            "height": line["prediction"]["image_size"][0],
            "width": line["prediction"]["image_size"][1],
            "predicted": line["prediction"]["total"],
            "next": (line["beyond"] or {}).get("total"),
        }
        for line in lines
    )
    columns = [
        Column("row", "row"),
        Column("mode", "mode"),
        Column("varied", values="vary"),
        Column("largest"),
        Column(
            "", "largest image", lambda d: d["height"].astype(str) + "x" + d["width"].astype(str)
        ),
        Column("batch_size", "batch"),
        Column("height"),
        Column("width"),
        Column("precision", "precision"),
        Column("device", "device"),
        Column("predicted_bytes", "predicted {}", "predicted", Unit.GB),
        Column("next_bytes", "next size {}", "next", Unit.GB),
    ]
    note = f"Memory is {PREDICTED}; leave room for the allocator and other processes."
    budget = lines[0]["budget"] / Unit.GB.size
    return table("fits", f"Largest that fits {budget:,.2f} GB", data, columns, [note])


def _median(value: Any) -> Any:
    """The median of a part's latency, or the part's other number as it is."""
    return value["median"] if isinstance(value, Mapping) else value


def _memory(data: pd.DataFrame, mode: str, unit: Unit) -> Iterable[str | None]:
    """Measured and, in brackets, predicted memory."""
    pairs = data[[f"memory_{mode}", f"predicted_{mode}"]]
    measured, predicted = (aligned(values / unit.size) for _, values in pairs.items())
    for one, other, missing in zip(measured, predicted, pairs.isna().all(axis=1), strict=True):
        yield None if missing else one if other == MISSING else f"{one} ({other})"


def _latencies(data: pd.DataFrame, mode: str) -> Iterable[str | None]:
    """Median and spread, with the letters of the rows that cannot be told apart."""
    name = _LATENCY[mode]
    times = joined(" ± ", (name, f"{name}_iqr"), Unit.MS)(data)
    for time, letters in zip(times, data[f"group_{mode}"].fillna(""), strict=True):
        yield time and f"{time} {letters}".strip()


def _ran(record: Record) -> str | None:
    """Back ends of fused attention and dtypes of products, of all modes: `flash; float32`."""
    modes = (at(record, "latency.ran") or at(record, "memory.ran") or {}).values()
    back_ends = dict.fromkeys(name for ran in modes for name in ran["sdpa"])
    dtypes = dict.fromkeys(dtype for ran in modes for dtype in ran["dtypes"])
    compiled = any(ran["compiled"] for ran in modes)
    facts = [", ".join(back_ends), ", ".join(dtypes), "compiled" * compiled]
    return "; ".join(filter(None, facts)) or None


def _title(first: Record) -> str:
    profile = first.config["profile"]
    size = "x".join(map(str, profile["image_size"]))
    method = METHODS.get(first.model["method"], first.model["method"])
    return (
        f"{first.model['backbone']}, {method} ({first.model['library']}), image {size},"
        f" batch {profile['batch_size']}, {first.config['train']['precision']},"
        f" {first.environment['device']}"
    )


def _rois(record: Record) -> str | None:
    """What the heads of a row ran on, or None where nothing was measured or of that is stated."""
    rois = (record.memory or record.latency or {}).get("rois")
    if not rois:
        return None
    stated = []
    if "proposals" in rois:
        stated = [
            f"of {rois['proposals']} proposals and {rois['detections']} detections an image",
            f"in training of {rois['rois']} RoIs, {rois['mask_rois']} of them with an object",
        ]
    if "targets" in rois:
        stated.append(f"of {rois['targets']} objects an image to train on")
    return f"Memory and latency are {', '.join(stated)}."


def _notes(records: Sequence[Record], sessions: int) -> list[str]:
    masked = any(record.model["method"] == "mask_rcnn" for record in records)
    notes = [f"FLOPs are multiply-adds of one image{', without the mask head' * masked}."]
    kinds = {at(record, "memory.kind") for record in records} - {None, "", "not measured"}
    if kinds:
        notes.append(f"Peak memory is of a batch, measured as {', '.join(sorted(kinds))}.")
    if any(at(record, "memory.predicted") for record in records):
        notes.append(f"Predicted memory is {PREDICTED}.")
    notes += sorted({line for record in records if (line := _rois(record))})
    if sessions > 1:
        notes.append(f"Latencies were taken in {sessions} sessions; they are not compared.")
    elif any(at(record, "latency.group") for record in records):
        notes.append("Latencies with a letter in common cannot be told apart.")
    for record in records:
        own = [*record.notes, *(at(record, "latency.notes") or [])]
        notes += [f"{record.row}: {note}" for note in own]
        if record.error is not None:
            notes.append(f"{record.row}: failed, {record.error['message']}")
    return notes
