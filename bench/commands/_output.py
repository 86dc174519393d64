"""What commands print and write: the same tables in every format."""

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import saying

if TYPE_CHECKING:
    from report.tables import Table

FORMATS = ("table", "json", "csv", "markdown")
WIDTH = 120


def show(
    form: str,
    lines: Sequence[Mapping[str, Any]],
    shown: "Sequence[Table]",
    *,
    text: Sequence[str] = (),
    output: Path | None = None,
) -> None:
    """Print tables in one of FORMATS, and write all of them below `output`.

    Args:
        form: "json" prints `lines` instead of tables.
        lines: plain values.
        shown: tables, with their notes.
        text: paragraphs for the terminal alone.
        output: folder, or None.

    Raises:
        InputError: where the folder cannot be written.
    """
    from report import tables

    writers: dict[str, Callable[[Any], str]] = {
        "table": lambda t: f"{t.title}\n\n{tables.to_text(t.shown, WIDTH)}",
        "markdown": lambda t: f"## {tables.in_markdown(t.title)}\n\n{tables.to_markdown(t.shown)}",
        "csv": lambda t: tables.to_csv(t.raw).rstrip(),
    }
    if form == "json":
        print(json.dumps(lines, indent=1))
    else:
        for table in shown:
            print(writers[form](table))
            for note in table.notes if form != "csv" else ():
                plain = form == "table"
                print(textwrap.fill(note, WIDTH) if plain else f"- {tables.in_markdown(note)}")
            if form != "csv" or table is not shown[-1]:
                print()
        if form == "table" and text:
            print("\n".join(text))
    if output is not None:
        from report import page

        with saying(f"--output {output}"):
            page.write_tables(shown, output)
        print(f"tables: {output}", file=sys.stderr)


def progress(found: Iterable[Any], name: Callable[[Any], str]) -> Iterator[Any]:
    """Pass through what is found, with the last name on stderr where that is a terminal."""
    from rich.console import Console

    console = Console(emoji=False, stderr=True)
    with console.status("counting") as status:
        for one in found:
            status.update(f"counted {name(one)}")
            yield one
