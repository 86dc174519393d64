"""What `run_all.py` leaves and prints of a suite: the page, the main tables, and what failed."""

from collections.abc import Sequence
from pathlib import Path

from bench.record import Record
from report import answer, classifiers, load, page, pictures, probes, tables

WIDTH = 120


def write(
    records: Sequence[Record], output: Path, *, title: str, costs: Sequence[Record] = ()
) -> int:
    """Write the report of a suite, print its main tables, and return the exit code.

    Args:
        records: of the runs.
        output: the folder of the suite.
        title: of the page.
        costs: of the rows at full size.
    """
    if records and records[0].model["method"] == "classifier":
        shown, path = [classifiers.comparison(records)], output / "classifiers.md"
        text = f"# {shown[0].title}\n\n{tables.to_markdown(shown[0].shown)}"
        path.write_text(text, encoding="utf-8")
        where = str(path)
    else:
        probed, drawn = probes.load(output), pictures.load(records, output)
        path = page.write(records, output, title=title, costs=costs, probes=probed, drawn=drawn)
        for found in answer.first(records, costs, probes.profile(probed)):
            print(answer.to_text(found, WIDTH))
        shown = [*tables.comparison(records), *tables.searches(records)]
        where = _both(path)
    for table in shown:
        print(tables.to_text(table.shown, WIDTH))
    failed = [entry for entry in records if entry.status == "failed"]
    for label, entry in zip(load.labels(records), records, strict=True):
        if entry in failed:
            print(f"{label}: failed, {(entry.error or {}).get('message')}")
    if failed:
        print("Failed rows are run again with --retry-failed.")
    print(f"report: {where}")
    return 1 if failed else 0


def write_probes(records: Sequence[Record], output: Path, *, title: str) -> None:
    """Write the page of a folder that has probes, and print the tables of `records`."""
    path = page.write(load.load(output), output, title=title, probes=probes.load(output))
    for table in probes.tables(records):
        print(tables.to_text(table.shown, WIDTH))
    print(f"report: {_both(path)}")


def _both(path: Path) -> str:
    return f"{path} and {path.with_suffix('.html')}"
