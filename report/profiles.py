"""Tables of what rows cost, from the records of `python -m bench profile`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.record import Record
from report.tables import METHODS, MISSING, Table, aligned, memory_unit, reason

MODES = ("inference", "training")
_MEGA, _GIGA = 1e6, 1e9
PREDICTED = "predicted from shapes, not measured"


def costs(records: Sequence[Record]) -> Table:
    """Return one line a row: parameters, FLOPs, measured and predicted memory, latency."""
    data = pd.DataFrame([_costs(record) for record in records])
    numbers = [name for name in data.columns if name not in _WORDS]
    data = data.astype(dict.fromkeys(numbers, "Float64"))
    modes = [mode for mode in MODES if _any(data, mode)]
    memory = [f"{what}_{mode}_bytes" for mode in modes for what in ("memory", "predicted")]
    unit, size = memory_unit(_all(data, memory))
    failed = data["status"] == "failed"
    why = " (failed: " + data["error"].map(reason, na_action="ignore") + ")"
    shown = pd.DataFrame(
        {
            "row": data["row"].mask(failed, data["row"] + why),
            "attention": data["attention"],
            "params M": aligned(data["parameters"] / _MEGA),
            "FLOPs G": aligned(data["flops"] / _GIGA),
        }
    )
    for mode in modes:
        if data[[f"memory_{mode}_bytes", f"predicted_{mode}_bytes"]].notna().any(axis=None):
            shown[f"{mode} {unit} (predicted)"] = _memory(data, mode, size)
        if data[f"latency_{mode}_s"].notna().any():
            shown[f"{mode} ms (median ± IQR)"] = _latency(data, mode)
    if (data["ran"] != "").any():
        shown["what ran"] = data["ran"].replace("", MISSING)
    return Table("costs", _title(records), data, shown, tuple(_notes(records)))


def parts(record: Record) -> Table | None:
    """Return one line for each part of a row's detector, or None without any."""
    names = list((record.parameters or record.flops or {}).get("by_part", {}))
    if not names:
        return None
    memory, latency = record.memory or {}, record.latency or {}
    columns: dict[str, Any] = {
        "parameters": _parts_of(record.parameters),
        "flops_multiply_adds": _parts_of(record.flops),
    }
    for mode in MODES:
        columns[f"memory_{mode}_bytes"] = memory.get("by_part", {}).get(mode, {})
        times = latency.get("by_part", {}).get(mode, {})
        columns[f"latency_{mode}_s"] = {name: part["median"] for name, part in times.items()}
    raw = pd.DataFrame({"part": names})
    for column, values in columns.items():
        raw[column] = pd.array([values.get(name) for name in names], dtype="Float64")
    unit, size = memory_unit(_all(raw, [f"memory_{mode}_bytes" for mode in MODES]))
    shown = pd.DataFrame(
        {
            "part": raw["part"],
            "params M": aligned(raw["parameters"] / _MEGA),
            "FLOPs G": aligned(raw["flops_multiply_adds"] / _GIGA),
        }
    )
    for mode in MODES:
        if raw[f"memory_{mode}_bytes"].notna().any():
            shown[f"{mode} memory {unit}"] = aligned(raw[f"memory_{mode}_bytes"] / size)
        if raw[f"latency_{mode}_s"].notna().any():
            shown[f"{mode} ms"] = aligned(raw[f"latency_{mode}_s"] * 1e3)
    notes = ("Memory of a part is its peak above what was there before it ran.",)
    return Table(f"parts-{record.row}", f"Parts of {record.row}", raw, shown, notes)


def fits(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the largest sizes within a memory budget, one line for each row and mode.

    Args:
        lines: of `bench.measure.predict.Fit` as plain values, with `row` and `mode`.
    """
    raw = pd.DataFrame(
        {
            "row": line["row"],
            "mode": line["mode"],
            "varied": line["vary"],
            "largest": line["largest"],
            "predicted_bytes": line["prediction"]["total"],
            "next_bytes": (line["beyond"] or {}).get("total"),
            "batch_size": line["prediction"]["batch_size"],
            "height": line["prediction"]["image_size"][0],
            "width": line["prediction"]["image_size"][1],
            "precision": line["prediction"]["precision"],
            "device": line["prediction"]["device"],
        }
        for line in lines
    )
    gigabytes = raw["predicted_bytes"] / _GIGA
    beyond = raw["next_bytes"].astype("Float64") / _GIGA
    shown = pd.DataFrame(
        {
            "row": raw["row"],
            "mode": raw["mode"],
            "largest image": raw["height"].astype(str) + "x" + raw["width"].astype(str),
            "batch": raw["batch_size"].astype(str),
            "precision": raw["precision"],
            "device": raw["device"],
            "predicted GB": aligned(gigabytes),
            "next size GB": aligned(beyond),
        }
    )
    budget = lines[0]["budget"] / _GIGA
    notes = (f"Memory is {PREDICTED}; leave room for the allocator and other processes.",)
    return Table("fits", f"Largest that fits {budget:,.2f} GB", raw, shown, notes)


_WORDS = ("row", "attention", "status", "error", "group_inference", "group_training", "ran")


def _costs(record: Record) -> dict[str, Any]:
    memory, latency = record.memory or {}, record.latency or {}
    line: dict[str, Any] = {
        "row": record.row,
        "attention": record.model["attention"],
        "parameters": (record.parameters or {}).get("total"),
        "flops": (record.flops or {}).get("total"),
    }
    for mode in MODES:
        times = latency.get(mode) or {}
        line |= {
            f"memory_{mode}_bytes": memory.get(mode),
            f"predicted_{mode}_bytes": memory.get("predicted", {}).get(mode, {}).get("total"),
            f"latency_{mode}_s": times.get("median"),
            f"latency_{mode}_q1_s": times.get("q1"),
            f"latency_{mode}_q3_s": times.get("q3"),
            f"group_{mode}": latency.get("group", {}).get(mode),
        }
    line |= {"ran": _ran(latency.get("ran") or memory.get("ran") or {})}
    return line | {"status": record.status, "error": (record.error or {}).get("kind")}


def _ran(modes: Mapping[str, Any]) -> str:
    """Back ends of fused attention and dtypes of products, of all modes: `flash; float32`."""
    back_ends = dict.fromkeys(name for ran in modes.values() for name in ran["sdpa"])
    dtypes = dict.fromkeys(dtype for ran in modes.values() for dtype in ran["dtypes"])
    compiled = any(ran["compiled"] for ran in modes.values())
    parts_ran = [", ".join(back_ends), ", ".join(dtypes), "compiled" * compiled]
    return "; ".join(filter(None, parts_ran))


def _all(data: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The values of several columns in one."""
    return pd.concat([data[name] for name in columns] or [pd.Series(dtype="Float64")])


def _any(data: pd.DataFrame, mode: str) -> bool:
    names = (f"memory_{mode}_bytes", f"predicted_{mode}_bytes", f"latency_{mode}_s")
    return bool(data[list(names)].notna().any().any())


def _memory(data: pd.DataFrame, mode: str, size: float) -> list[str]:
    """Measured and, in brackets, predicted."""
    measured = aligned(data[f"memory_{mode}_bytes"] / size)
    predicted = aligned(data[f"predicted_{mode}_bytes"] / size)
    return [
        f"{one} ({other})" if other != MISSING else one
        for one, other in zip(measured, predicted, strict=True)
    ]


def _latency(data: pd.DataFrame, mode: str) -> list[str]:
    """Median and spread; rows with a letter in common cannot be told apart."""
    cells = []
    for line in data.to_dict("records"):
        middle = line[f"latency_{mode}_s"]
        if pd.isna(middle):
            cells.append(MISSING)
            continue
        spread = line[f"latency_{mode}_q3_s"] - line[f"latency_{mode}_q1_s"]
        group = line[f"group_{mode}"]
        cells.append(f"{middle * 1e3:,.1f} ± {spread * 1e3:,.1f}" + (f" {group}" if group else ""))
    return cells


def _parts_of(section: Mapping[str, Any] | None) -> Mapping[str, Any]:
    parts_of: Mapping[str, Any] = (section or {}).get("by_part", {})
    return parts_of


def _title(records: Sequence[Record]) -> str:
    first = records[0]
    profile = first.config["profile"]
    size = "x".join(map(str, profile["image_size"]))
    method = METHODS.get(first.model["method"], first.model["method"])
    return (
        f"{first.model['backbone']}, {method} ({first.model['library']}), image {size},"
        f" batch {profile['batch_size']}, {first.config['train']['precision']},"
        f" {first.environment['device']}"
    )


def _rois(record: Record) -> str | None:
    """What the heads of a row ran on, or None where they have no RoIs or nothing was measured."""
    rois = (record.memory or record.latency or {}).get("rois")
    if not rois:
        return None
    return (
        f"Memory and latency are of {rois['proposals']} proposals and {rois['detections']}"
        f" detections an image, in training of {rois['rois']} RoIs, {rois['mask_rois']} of them"
        " with an object."
    )


def _notes(records: Sequence[Record]) -> list[str]:
    notes = ["FLOPs are multiply-adds of one image, without the mask head."]
    kinds = {(record.memory or {}).get("kind") for record in records}
    kinds -= {None, "", "not measured"}
    if kinds:
        names = ", ".join(sorted(map(str, kinds)))
        notes.append(f"Peak memory is of a batch, measured as {names}.")
    if any((record.memory or {}).get("predicted") for record in records):
        notes.append(f"Predicted memory is {PREDICTED}.")
    notes += sorted({line for record in records if (line := _rois(record))})
    if any((record.latency or {}).get("group") for record in records):
        notes.append("Latencies with a letter in common cannot be told apart.")
    for record in records:
        own = [*record.notes, *(record.latency or {}).get("notes", [])]
        notes += [f"{record.row}: {note}" for note in own]
        if record.error is not None:
            notes.append(f"{record.row}: failed, {record.error['message']}")
    return notes
