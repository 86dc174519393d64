"""All numbers of records in one tidy table: a line for each record and figure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.record import Record
from report import probes
from report.load import at, size
from report.searches import flat

NAME = "results.parquet"
SECTIONS = ("parameters", "flops", "memory", "latency", "training", "evaluation")
# Of a record, what a line says besides its figure, value and unit.
_FACTS = {
    **{name: name for name in ("suite", "row", "key", "status", "created")},
    **{
        name: f"model.{name}"
        for name in ("backbone", "method", "library", "attention", "arch", "schedule")
    },
    "precision": "config.train.precision",
    "device": "environment.device",
    "cpu": "environment.cpu",
    "commit": "environment.commit",
}
# Conditions of a section, which are no figures of it.
_CONDITIONS = ("batch_size", "image_size", "threads", "rois", "proposals")
# Units of the fields of a section that are not in the section's own: by their last names, and what
# holds numbers of things.
_NUMBERS = [
    "images",
    "not_finite",
    "detections",
    "mask_rois",
    "targets",
    "level",
    "resamples",
    "seed",
    "crop_share",
    "layers",
    "best",
    "uncounted",
    "counts",
]
_UNITS = {"images_per_second": "1/s", "seconds": "s"}
_UNIT_OF = {"parameters": "1", "training": "1"}


def tidy(records: Sequence[Record]) -> pd.DataFrame:
    """Return one line for each record and figure, in the units of the records.

    A figure is a dotted name below its section, such as `box.AP` of `evaluation` or
    `inference.median` of `latency`. Lists, such as samples and draws, are in the records alone; of
    probes there is the mean accuracy of a task, of each of its levels and of each seed.
    """
    lines = [line for record in records for line in _lines(record)]
    columns = ["seed", *_FACTS, "image_size", "batch_size", "section", "figure", "value", "unit"]
    data = pd.DataFrame(lines, columns=columns)
    numbers = {"seed": "int64", "batch_size": "Int64", "value": "float64"}
    return data.astype({name: numbers.get(name, "str") for name in columns})


def parquet(records: Sequence[Record]) -> bytes:
    """Return `tidy` as a Parquet file."""
    found: bytes = tidy(records).to_parquet(index=False)
    return found


def _lines(record: Record) -> Iterator[dict[str, Any]]:
    facts = {name: at(record, path) for name, path in _FACTS.items()} | {"seed": record.seed}
    for figure, value in probes.figures(record).items():
        yield facts | {"section": "probes", "figure": figure, "value": value, "unit": "1"}
    for name in SECTIONS:
        section: Mapping[str, Any] = getattr(record, name) or {}
        unit = str(section.get("unit") or _UNIT_OF.get(name, ""))
        for figure, value in _figures(section):
            yield facts | {
                "image_size": size(section.get("image_size")),
                "batch_size": section.get("batch_size"),
                "section": name,
                "figure": figure,
                "value": value,
                "unit": _unit(figure, unit),
            }


def _unit(figure: str, usual: str) -> str:
    """The unit of a figure in a section whose figures usually have `usual`."""
    *above, last = figure.split(".")
    # Names of operators have dots too.
    if last in _NUMBERS or not {"uncounted", "counts"}.isdisjoint(above):
        return "1"
    return next((unit for end, unit in _UNITS.items() if last.endswith(end)), usual)


def _figures(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a section by dotted names."""
    for name, value in flat(section).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not {*_CONDITIONS} & {*name.split(".")}:
            yield name, float(value)
