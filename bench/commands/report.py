"""`python -m bench report`: records to tables, plots and pages."""

import argparse
from pathlib import Path
from typing import Any

from bench.cli import add
from bench.errors import InputError

HELP = "make tables, plots and pages of a folder of records, or of several"
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

    folders, records = load.load_all(options.folders)
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
