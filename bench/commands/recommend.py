"""`python -m bench recommend`: the best rows under limits of cost."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli import add, memory_budget, multiply_adds
from bench.commands._output import FORMATS, show
from bench.config.schema import MODES, PRECISIONS
from bench.errors import InputError

if TYPE_CHECKING:
    from bench.record import Record

log = logging.getLogger(__name__)

HELP = "say which rows are best under limits of memory and FLOPs, at any image size"
EPILOG = """\
examples:
  python -m bench recommend results/quick --max-memory 16GB --image-size 1024x1024
  python -m bench recommend results/quick --max-flops 250G --mode inference --batch-size 1

Costs at that size are counted and predicted, for one GPU; accuracy is that of the records.

"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folders")
    add(parser, "max-memory", metavar="16GB", help="most memory of a device at its peak")
    add(parser, "max-flops", metavar="250G", help="most multiply-adds of one image")
    add(parser, "image-size", default="800x1344")
    add(parser, "batch-size", default=2, help="images of a device")
    add(parser, "mode", choices=MODES, default="training", help="of memory")
    add(parser, "precision", choices=PRECISIONS, default="16-mixed", help="of memory")
    add(parser, "format", choices=FORMATS)


def run(options: argparse.Namespace) -> int:
    """Count what is not known, and print."""
    from report import probes, recommend

    limits = _limits(options)
    folders, records = _records(options.folders)
    costs = _costs(records, folders[0], options)
    sees = probes.profile([one for folder in folders for one in probes.load(folder)])
    found = recommend.recommend(records, costs, limits, mode=options.mode, sees=sees)
    shown = [
        replace(one.table, title=one.title, notes=(*one.sentences, *one.table.notes))
        for one in found
    ]
    lines: list[dict[str, Any]] = [
        {"title": one.title, "sentences": list(one.sentences), "rows": _plain(one.table.raw)}
        for one in found
    ]
    show(options.format, lines, shown)
    return 0


def _limits(options: argparse.Namespace) -> list[Any]:
    from report.columns import Unit
    from report.recommend import Limit

    given = {
        "max-memory": (options.max_memory, memory_budget, f"memory_{options.mode}", Unit.GB),
        "max-flops": (options.max_flops, multiply_adds, "flops", Unit.GIGA),
    }
    found = []
    for name, (text, read, column, unit) in given.items():
        if text is None:
            continue
        try:
            found.append(Limit(f"--{name} {text}", column, read(text), unit))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--{name}: {error}") from error
    return found


def _records(given: Sequence[Path]) -> "tuple[list[Path], list[Record]]":
    """Read records, none of which may be left out: the best row might be among them."""
    from bench import record
    from report import load, seeds

    folders, records = load.load_all(given)
    for folder in folders:
        place = folder / record.RECORDS if (folder / record.RECORDS).is_dir() else folder
        for path in place.glob("*.json"):
            record.read(path)
    found = seeds.merged(records)
    if not found:
        raise InputError(f"no record in {', '.join(map(str, folders))}")
    return folders, [one for one in found if one.evaluation is not None] or found


def _costs(
    records: "Sequence[Record]", folder: Path, options: argparse.Namespace
) -> "list[Record]":
    """Count the rows of records at the size that is asked about."""
    from bench.config.sources import OURS
    from bench.config.suites import Reference, build_config, reference_config
    from bench.measure import reference
    from bench.record import COSTS, key
    from bench.run.identity import edited_since
    from report import searches

    for one in records:
        edited = edited_since(one)
        said = f"{', '.join(edited)} changed since the record of {one.row} was made"
        if any(not name.endswith(OURS) for name in edited):
            raise InputError(
                f"{said}: costs would be of another mechanism than its mAP; run it again"
            )
        if edited:
            # Of another version of this package, perhaps, which need not compute otherwise.
            log.warning("%s: its costs are of the new, its mAP is of the old", said)
    place = Reference(options.image_size, options.batch_size, options.precision)
    configs = {
        key(config.as_dict()): config
        for one in records
        for config in [reference_config(build_config(one.config), searches.base(one), place)]
    }
    kept = folder / COSTS if os.access(folder, os.W_OK) else None
    command = ["python", "-m", "bench", *sys.argv[1:]]
    return reference.count(list(configs.values()), kept, command=command, into="recommend")


def _plain(raw: Any) -> list[dict[str, Any]]:
    """Rows of a table as JSON has them."""
    return [
        {name: None if value != value or value is None else value for name, value in row.items()}
        for row in raw.astype(object).where(raw.notna(), None).to_dict("records")
    ]
