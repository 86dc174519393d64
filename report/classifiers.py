"""The page of pretrained classifiers: its tables and its plot."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from bench.record import Record
from report import tables
from report.columns import MISSING, Column, Table, Unit, decimals, number, of_flops, table
from report.load import TEXT, Library, at, family, on_same_images, size, trained_apart
from report.plots import Plot, looks, losses, render
from report.provenance import listed


def are(records: Sequence[Record]) -> bool:
    """Whether records are of classifiers."""
    return bool(records) and records[0].model["method"] == "classifier"


def loss(records: Sequence[Record]) -> list[Plot]:
    """Return the plots of training losses, one a set of images; nothing where there are none."""
    style = looks([family(record) for record in records])

    def build(library: Library) -> Plot | None:
        found = render("loss", "Training loss over steps", lambda: losses(library, style))
        return None if found.skipped else found

    return on_same_images(build, records)


def comparison(records: Sequence[Record]) -> list[Table]:
    """Return accuracy and cost of classifiers, a line a row, a table for each set of images."""
    return on_same_images(_comparison, records)


def to_text(found: Table) -> str:
    """Return a table for a terminal, with its title, which names the images, and its notes."""
    notes = [textwrap.fill(note, tables.WIDTH) for note in found.notes]
    return "\n".join([found.title, "", tables.to_text(found.shown), *notes, ""])


def _comparison(library: Library) -> Table:
    records = library.records
    columns = [
        Column("row", "row", "label"),
        Column("backbone", "backbone"),
        Column("top1_percent", "top-1 {}", unit=Unit.PERCENT),
        Column("top1_interval", "95 % interval of top-1"),
        Column("top5_percent", "top-5 {}", unit=Unit.PERCENT),
        Column("evaluated_at", "evaluated at", optional=True),
        Column("parameters", "params {}", unit=Unit.MEGA),
        *of_flops(),
        Column("steps", "steps", unit=Unit.ONE, format=decimals(0)),
        Column("train_seconds", "training {}", unit=Unit.MINUTES),
        Column("status", "status"),
        Column("notes", "notes", optional=True),
        Column("key"),
    ]
    limits = [at(one, "evaluation.top1_interval.top1") for one in records]
    data = library.data.assign(
        top1_percent=[at(one, "evaluation.top1") for one in records],
        top1_interval=[pair and " to ".join(map(number(1), pair)) for pair in limits],
        top5_percent=[at(one, "evaluation.top5") for one in records],
        evaluated_at=pd.Series(map(_evaluated_at, records), index=library.data.index, dtype=TEXT),
    )
    return table("classifiers", "Pretrained classifiers", data, columns, _about(records))


def _evaluated_at(record: Record) -> str | None:
    """The size of the images that a classifier was evaluated on, and what of them it saw."""
    crop = at(record, "evaluation.crop_share")
    shape = size(at(record, "evaluation.image_size"))
    return None if crop is None or shape is None else f"{shape}, crop share {crop:g}"


def _about(records: Sequence[Record]) -> list[str]:
    done = [one for one in records if one.evaluation]
    images, split = (
        listed(at(one, f"evaluation.{name}") for one in done) for name in ("images", "split")
    )
    folders = listed(at(one, "config.data.path") or "generated" for one in records)
    sizes = listed(size(at(one, "flops.image_size")) for one in records if one.flops)
    counts = listed(len(names) for one in done if (names := at(one, "training.classes")))
    of_classes = f" of {counts} classes" if counts != MISSING else ""
    said = (
        f"Top-1 and top-5 are of {images} images of {split} ({folders}){of_classes}, with Wilson's"
        f" interval; FLOPs are multiply-adds of one image of {sizes}."
    )
    return [said, *(f"Not measured here: {what}." for what in trained_apart(done))]
