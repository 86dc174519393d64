"""The page of pretrained classifiers: its tables and its plot."""

from collections.abc import Sequence

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
        *(Column(name, name) for name in ("row", "backbone")),
        Column("top1_percent", "top-1 {}", unit=Unit.PERCENT),
        Column("top1_interval", "95 % interval of top-1"),
        Column("top5_percent", "top-5 {}", unit=Unit.PERCENT),
        Column("parameters", "params {}", unit=Unit.MEGA),
        Column("flops_multiply_adds", "FLOPs {}", "flops", Unit.GIGA),
        Column("steps", "steps", unit=Unit.ONE, format=decimals(0)),
        Column("train_seconds", "training {}", unit=Unit.MINUTES),
        Column("status", "status"),
        Column("key"),
    ]
    limits = [at(one, "evaluation.top1_interval.top1") for one in records]
    data = frame(records).assign(
        top1_percent=[at(one, "evaluation.top1") for one in records],
        top1_interval=[pair and " to ".join(map(number(1), pair)) for pair in limits],
        top5_percent=[at(one, "evaluation.top5") for one in records],
    )
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
