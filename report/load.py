"""Records from a folder, and as a data frame with one row a record."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import InputError
from bench.record import Record, read
from report import searches

RESULTS = Path(__file__).resolve().parent.parent / "results"
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
PARTIAL = "Partial "

log = logging.getLogger(__name__)

# fmt: off
_TEXT = (
    "row", "base", "label", "suite", "key", "status", "error_kind", "error", "created", "backbone",
    "method", "library", "library_version", "attention", "family", "arch", "schedule",
    "flops_convention", "memory_kind", "memory_device", "memory_precision", "latency_device",
    "latency_precision", "split", "device", "precision", "commit", "init", "notes",
    "flops_as", "memory_as", "latency_as", "evaluated_as",
)
_WHOLE = (
    "seed", "parameters", "flops", "memory_inference", "memory_training", "memory_batch",
    "latency_batch", "steps", "batch_size", "images", "resumed",
)
_REAL = (
    "drop_path", "latency", "latency_q1", "latency_q3", "latency_training", "latency_training_q1",
    "latency_training_q3", "train_seconds", "steps_per_second", "images_per_second",
    *(f"{kind}_{figure}" for kind in ("box", "mask") for figure in FIGURES),
)
# fmt: on


def load(directory: Path) -> list[Record]:
    """Read the records in `directory/records`, or in `directory` itself if it has no such folder.

    Of the records of one run (same row and configuration) the newest success is returned, or,
    without one, the newest failure. A file that holds no record is reported with a warning and left
    out. The rows come in the order of the published ablation, the others after it by name, each
    mechanism before its partial form, so that the order does not depend on which run ended first.
    """
    folder = directory / "records" if (directory / "records").is_dir() else directory
    newest: dict[tuple[str, str], Record] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = read(path)
        except InputError as error:
            log.warning("left out of the report: %s", error)
            continue
        other = newest.get((record.row, record.key))
        if other is None or _rank(record) > _rank(other):
            newest[record.row, record.key] = record
    return ordered(newest.values())


def ordered(records: Iterable[Record]) -> list[Record]:
    """Return `records` in the order of the tables; see `load`."""
    known = published()["row"].tolist()
    place = {row: number for number, row in enumerate(known)}

    def position(record: Record) -> tuple[Any, ...]:
        row = searches.base(record)
        name = row.removeprefix(PARTIAL)
        return (
            place.get(row, len(place)),
            name.lower(),
            row.startswith(PARTIAL),
            record.row,
            record.suite,
            record.seed,
            record.key,
        )

    return sorted(records, key=position)


def published() -> pd.DataFrame:
    """Return the published rows, `results/published.csv`."""
    return pd.read_csv(RESULTS / "published.csv")


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row a record, in the order given, with the units of the records.

    Parameters and FLOPs (multiply-adds) are counts, memory is in bytes, times are in seconds,
    average precision in percent. What a record lacks is missing. `base` is the row's name without
    the value of a search; `label` is the whole, with the first letters of the key where several
    records have that name. `family` is the mechanism of its first stage, by which plots choose
    colours. `best` marks the best of a search. `*_as` say how a number was made: rows are compared
    where they are the same.
    """
    table = pd.DataFrame([_values(record) for record in records], columns=[*_TEXT, *_WHOLE, *_REAL])
    table = table.astype(
        dict.fromkeys(_TEXT, "string")
        | dict.fromkeys(_WHOLE, "Int64")
        | dict.fromkeys(_REAL, "Float64")
    )
    table["best"] = _best(records)
    twice = table["row"].duplicated(keep=False)
    table["label"] = table["row"].mask(twice, table["row"] + " #" + table["key"].str[:6])
    return table


def _best(records: Sequence[Record]) -> pd.Series:
    """Which rows are the best of their search, missing for those that are of none."""
    marks: dict[int, bool] = {}
    for search in searches.find(records):
        best = search.best
        for _, record in search.tried:
            marks[id(record)] = best is not None and best[1] is record
    return pd.Series([marks.get(id(record)) for record in records], dtype="boolean")


def _rank(record: Record) -> tuple[bool, str]:
    return record.status == "done", record.created


def _values(record: Record) -> dict[str, Any]:
    """The columns of one record."""
    model, error = record.model, record.error or {}
    flops, memory, latency = record.flops or {}, record.memory or {}, record.latency or {}
    training, evaluation = record.training or {}, record.evaluation or {}
    inference, step = latency.get("inference") or {}, latency.get("training") or {}
    recipe = record.config.get("train") or {}
    place = {"cpu": record.environment.get("cpu"), "machine": record.environment.get("device")}
    steps, seconds = training.get("steps"), training.get("seconds")
    return {
        "row": record.row,
        "base": searches.base(record),
        "suite": record.suite,
        "key": record.key,
        "status": record.status,
        "error_kind": error.get("kind"),
        "error": error.get("message"),
        "created": record.created,
        "seed": record.seed,
        **{name: model.get(name) for name in ("backbone", "method", "library", "library_version")},
        **{name: model.get(name) for name in ("attention", "arch", "schedule", "drop_path")},
        "family": str(model["attention"]).split("/")[0].strip(),
        "parameters": (record.parameters or {}).get("total"),
        "flops": flops.get("total"),
        "flops_convention": flops.get("convention"),
        "memory_inference": memory.get("inference"),
        "memory_training": memory.get("training"),
        "memory_batch": memory.get("batch_size"),
        **{f"memory_{name}": memory.get(name) for name in ("kind", "device", "precision")},
        **{f"latency_{name}": latency.get(name) for name in ("device", "precision")},
        "latency_batch": latency.get("batch_size"),
        "latency": inference.get("median"),
        "latency_q1": inference.get("q1"),
        "latency_q3": inference.get("q3"),
        "latency_training": step.get("median"),
        "latency_training_q1": step.get("q1"),
        "latency_training_q3": step.get("q3"),
        "steps": steps,
        "batch_size": training.get("batch_size"),
        "train_seconds": seconds,
        "steps_per_second": steps / seconds if steps and seconds else None,
        "images_per_second": training.get("images_per_second"),
        "resumed": training.get("resumed"),
        "split": evaluation.get("split"),
        "images": evaluation.get("images"),
        **{
            f"{kind}_{figure}": (evaluation.get(kind) or {}).get(figure)
            for kind in ("box", "mask")
            for figure in FIGURES
        },
        "device": record.environment.get("device"),
        **{name: recipe.get(name) for name in ("precision", "init")},
        "commit": record.environment.get("commit"),
        "notes": "; ".join(record.notes),
        "flops_as": _said(flops, "convention", "image_size", "proposals"),
        "memory_as": _said(memory, *_CONDITIONS, "kind"),
        "latency_as": _said({**latency, **place}, *_CONDITIONS, "threads", *place),
        "evaluated_as": _said(evaluation, "split", "images", "annotations_sha256"),
    }


_CONDITIONS = ("device", "batch_size", "image_size", "precision")


def _said(section: Mapping[str, Any], *names: str) -> str:
    """What numbers have to share to be compared, as text that is equal where they do."""
    return ", ".join(f"{name} {section.get(name)}" for name in names)
