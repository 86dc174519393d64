"""The first screen of README.md, from the records that are kept with the code: `make readme`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.errors import InputError
from report import answer, load, plots, probes, provenance, reference, seeds, tables

BEGIN = "<!-- made by `make readme` from the records in {folder}; do not edit -->"
END = "<!-- end of what `make readme` makes -->"
_MADE = re.compile(r"<!-- made by `make readme`.*?-->\n.*?" + re.escape(END), re.DOTALL)


def screen(folder: Path, picture: Path) -> tuple[str, bytes]:
    """Return the Markdown of the first screen, and its picture as PNG.

    Args:
        folder: an output folder of `run_all.py`.
        picture: where the picture will be, from the README.

    Raises:
        InputError: where the folder has no records that were evaluated.
    """
    records, costs = load.load(folder), reference.load(folder)
    found = answer.first(records, costs, probes.profile(probes.load(folder))) if records else []
    rows = seeds.merged(records)
    drawn = plots.draw(reference.at_reference(rows, costs) if costs else rows)
    plot = next((one for one in drawn if one.name == "accuracy_flops" and one.png), None)
    if not found or plot is None:
        raise InputError(f"{folder} holds no record of a row that was evaluated")
    parts = [
        BEGIN.format(folder=folder.as_posix()),
        " ".join(found[0].sentences),
        f"![{plot.title}]({picture.as_posix()})",
        tables.to_markdown(found[0].table.shown).strip(),
        *found[0].table.notes,
        provenance.sentence(records),
        END,
    ]
    return "\n\n".join(parts), plot.png


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the first screen into a README, and its picture beside it."""
    parser = argparse.ArgumentParser(prog="python -m report.readme", description=__doc__)
    parser.add_argument("folder", type=Path, help="an output folder of run_all.py")
    parser.add_argument("readme", type=Path, nargs="?", default=Path("README.md"))
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/answer.png"))
    options = parser.parse_args(arguments)
    try:
        made, png = screen(options.folder, options.picture)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    text = options.readme.read_text(encoding="utf-8")
    if not _MADE.search(text):
        print(f"{parser.prog}: error: {options.readme} has no place for it", file=sys.stderr)
        return 2
    options.readme.write_text(_MADE.sub(lambda _: made, text), encoding="utf-8")
    (options.readme.parent / options.picture).write_bytes(png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
