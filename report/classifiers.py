"""The page of pretrained classifiers: its tables and its plot."""

from collections.abc import Sequence

import pandas as pd

from bench.record import Record
from report.columns import Column, Table, Unit, decimals, number, table
from report.load import Library, at, family, frame, size
from report.plots import Plot, looks, losses, render
from report.provenance import listed


def are(records: Sequence[Record]) -> bool:
    """Whether records are of classifiers."""
    return bool(records) and records[0].model["method"] == "classifier"


def loss(records: Sequence[Record]) -> list[Plot]:
    """Return the plot of training losses; nothing where there are none."""
    library = Library(list(records), frame(records))
    style = looks([family(record) for record in records])
    found = render("loss", "Training loss over steps", lambda: losses(library, style))
    return [] if found.skipped else [found]


def comparison(records: Sequence[Record]) -> Table:
    """Return accuracy and cost of each classifier, a line a row."""
    columns = [
        Column("row", "row"),
        Column("backbone", "backbone"),
        Column("top1_percent", "top-1 {}", unit=Unit.PERCENT),
        Column("top1_interval", "95 % interval of top-1"),
        Column("top5_percent", "top-5 {}", unit=Unit.PERCENT),
        Column("parameters", "params {}", unit=Unit.MEGA),
        Column("flops_multiply_adds", "FLOPs {}", unit=Unit.GIGA),
        Column("steps", "steps", unit=Unit.ONE, format=decimals(0)),
        Column("train_seconds", "training {}", unit=Unit.MINUTES),
        Column("status", "status"),
        Column("key"),
    ]
    data = pd.DataFrame([_line(entry) for entry in records])
    return table("classifiers", "Pretrained classifiers", data, columns, [_about(records)])


def _about(records: Sequence[Record]) -> str:
    done = [one for one in records if one.evaluation]
    images, split = (
        listed(at(one, f"evaluation.{name}") for one in done) for name in ("images", "split")
    )
    folders = listed(at(one, "config.data.path") or "generated" for one in records)
    sizes = listed(size(at(one, "flops.image_size")) for one in records if one.flops)
    return (
        f"Top-1 and top-5 are of {images} images of {split} ({folders}), with Wilson's interval;"
        f" FLOPs are multiply-adds of one image of {sizes}."
    )


def _line(entry: Record) -> dict[str, object]:
    found, training = entry.evaluation or {}, entry.training or {}
    interval = (found.get("top1_interval") or {}).get("top1")
    return {
        "row": entry.row,
        "backbone": entry.model["backbone"],
        "top1_percent": found.get("top1"),
        "top1_interval": interval and " to ".join(number(1)(limit) for limit in interval),
        "top5_percent": found.get("top5"),
        "parameters": (entry.parameters or {}).get("total"),
        "flops_multiply_adds": (entry.flops or {}).get("total"),
        "steps": training.get("steps"),
        "train_seconds": training.get("seconds"),
        "status": entry.status,
        "key": entry.key,
    }
