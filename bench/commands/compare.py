"""`python -m bench compare`: two folders of records, or two records, and what changed."""

import argparse
import json
import math
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli import add
from bench.commands import _output
from bench.errors import InputError

if TYPE_CHECKING:
    from bench.record import Record
    from report.compare import Comparison

HELP = "compare two folders of records, or two records, row by row"
EPILOG = """\
examples:
  python -m bench compare results/quick results/mine
  python -m bench compare results/main results/mine --fail-over 5% --format markdown
  python -m bench compare results/quick/records/vil-….json results/quick/records/full-….json

Accuracy is compared on the same images: mAP in pairs of draws, top-1 and top-5 of classifiers as
shares; costs where they were counted or measured alike; latency and memory on the same machine
alone. A difference counts where its 95% interval leaves out 0.

"""
EXIT_CODES = """\
exit code: 0 compared; 1 with --fail-over, where a figure is worse by more or a row failed; 2 wrong
input, or no row in common; 130 interrupted"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    for name in ("A", "B"):
        what = "before" if name == "A" else "after"
        parser.add_argument(
            name.lower(), type=Path, metavar=name, help=f"output folder or record, {what}"
        )
    add(
        parser,
        "fail-over",
        type=percentage,
        metavar="PERCENT",
        help="exit code 1 where a figure of B is told apart as worse than A's by more, such as 5%%",
    )
    add(
        parser, "format", choices=("text", "markdown", "json"), default="text", help="of the output"
    )


def percentage(text: str) -> float:
    """`5%` -> 0.05."""
    value = math.nan
    if text.endswith("%"):
        with suppress(ValueError):
            value = float(text.removesuffix("%")) / 100
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a percentage of 0% or more; allowed: 5%, 0.5%")
    return value


def run(options: argparse.Namespace) -> int:
    """Compare and print."""
    from report import compare, tables

    found = compare.compare(_records(options.a), _records(options.b))
    limit = options.fail_over
    regressions = [] if limit is None else found.regressions(limit)
    if options.format == "json":
        result = {
            "a": str(options.a),
            "b": str(options.b),
            "only_in_a": found.only[0],
            "only_in_b": found.only[1],
            "fail_over": limit,
            "regressions": regressions,
            "failed_in_b": [row for row, _ in found.failed],
            "figures": found.lines,
        }
        print(json.dumps(result, indent=1))
    else:
        markdown = options.format == "markdown"
        for line in _summary(found, options, regressions):
            text = f"{tables.in_markdown(line)}\n"
            print(text if markdown else textwrap.fill(line, _output.WIDTH))
        table = compare.shown(found)
        if not len(table.shown):
            for note in table.notes:
                print(note if markdown else textwrap.fill(note, _output.WIDTH))
            return 1 if regressions else 0
        print()
        _output.show(options.format if markdown else "table", [], [table])
    return 1 if regressions else 0


def _summary(
    found: "Comparison", options: argparse.Namespace, regressions: Sequence[str]
) -> list[str]:
    """What matters, first."""
    count = [line["verdict"] for line in found.lines].count
    lines = [
        f"A is {options.a}, B is {options.b}; figures that are worse: {count('worse')},"
        f" better: {count('better')}, indistinguishable: {count('indistinguishable')},"
        f" the same: {count('same')}."
    ]
    if options.fail_over is not None:
        lines += [f"Regression: {one}." for one in regressions] or [
            f"No regression of more than {100 * options.fail_over:.4g}% in what was compared."
        ]
    elif found.failed:
        lines += [f"Failed in B: {row}, {why}." for row, why in found.failed]
    names = zip(("A", "B"), found.only, strict=True)
    return lines + [f"Only in {side}: {', '.join(rows)}." for side, rows in names if rows]


def _records(path: Path) -> "list[Record]":
    """The records of an output folder, or one.

    Raises:
        InputError: for a path without a record that can be read.
    """
    from report import load

    if path.is_file():
        return [load.load_one(path)]
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder nor a record; name an output folder")
    found = load.load(path, needed=True)
    if not found:
        raise InputError(f"no record in {path}")
    return found
