"""`python -m bench report`: records to tables, plots and pages."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli import add
from bench.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.record import Record

HELP = "make tables, plots and pages of a folder of records, or of several, or of a sweep"
EPILOG = """\
examples:
  python -m bench report results/quick
  python -m bench report run_on_a run_on_b --output both

"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folders")
    add(
        parser,
        "output",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: the first DIR)",
    )
    add(parser, "title", default="Report", help="heading of the page")


def run(options: argparse.Namespace) -> int:
    """Write the report and print its table."""
    from report import load, page, pictures, probes, reference

    folders, records = load.load_all(options.folders, sweep_alone=True)
    if any("sweep" in one.config for one in records):
        return _report_sweep(records, options.output or folders[0])
    probed = [entry for folder in folders for entry in probes.load(folder)]
    if not records and not probed:
        raise InputError(f"no record in {', '.join(map(str, folders))}")
    costs = [entry for folder in folders for entry in reference.load(folder)]
    output = options.output or folders[0]
    drawn: dict[str, dict[str, Any]] = {}
    for folder in folders:
        drawn |= pictures.load(records, folder)
    path = page.write(records, output, title=options.title, costs=costs, probes=probed, drawn=drawn)
    page.show(records, costs, probed)
    print(f"report: {path} and {path.with_suffix('.html')}")
    return 0


def _report_sweep(points: "Sequence[Record]", output: Path) -> int:
    """Write the page of a sweep, of the points that were measured under the newest's conditions."""
    from bench.commands.sweep import FORMATS, print_points
    from report import sweep

    own = sweep.of_the_newest(points)
    if len(own) < len(points):
        left = len(points) - len(own)
        print(f"note: {left} of {len(points)} points, made under other conditions, are left out")
    path = sweep.write(own, output)
    print_points(own, FORMATS[0])
    print(f"report: {path} and {path.with_suffix('.html')}")
    return 0
