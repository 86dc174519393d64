"""`python -m bench check`: whether a mechanism keeps the contract."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.cli import add, positive
from bench.commands._output import show
from bench.config.values import assigned
from bench.errors import InputError

if TYPE_CHECKING:
    from bench.conformance import Report
    from report.columns import Table

HELP = "run the conformance test on a mechanism, yours or the package's"
EPILOG = """\
examples:
  python -m bench check my_attention.py:MyAttention
  python -m bench check my_package.my_module:MyAttention --option window=5 share=true
  python -m bench check longformer performer
  python -m bench check all --format json

Each failure says what to change. Warnings do not count as failures.

"""
_STATUS = ("passed", "warning", "failed", "skipped")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "mechanisms",
        nargs="+",
        metavar="MECHANISM",
        help="a name or a row that has it, package.module:Class or file.py:Class; all for every one"
        " of the package",
    )
    add(
        parser,
        "option",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="options of the mechanism (default: each set of its examples)",
    )
    add(
        parser,
        "grid",
        default="6x8",
        help="rows and columns of the ordinary calls; odd grids are near it",
    )
    add(parser, "dim", type=positive, default=48, metavar="N", help="channels")
    add(parser, "num-heads", type=positive, default=3, metavar="N", help="heads")
    add(parser, "format")


def run(options: argparse.Namespace) -> int:
    """Check and print; 1 where a check failed."""
    if options.dim % options.num_heads:
        raise InputError(
            f"--dim {options.dim} must be a multiple of --num-heads {options.num_heads}"
        )
    if min(options.grid) < 2:
        raise InputError(
            f"--grid {options.grid[0]}x{options.grid[1]}: both sides must be 2 or more"
        )

    from bench import conformance
    from bench.config.suites import mechanisms

    chosen = mechanisms(options.mechanisms)
    try:
        values = assigned(options.option)
    except InputError as error:
        raise InputError(f"--option: {error}") from error
    reports = [
        conformance.check(
            name, own, grid=options.grid, dim=options.dim, num_heads=options.num_heads
        )
        for name, own in _with_options(chosen, values)
    ]
    lines = [{**dataclasses.asdict(report), "passed": report.passed} for report in reports]
    found = _one(reports[0]) if len(reports) == 1 else _many(reports)
    show(options.format, lines, found, text=[_summary(reports)])
    return 0 if all(report.passed for report in reports) else 1


def _with_options(
    chosen: Sequence[str], values: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Return each mechanism with those of the options that it knows; one must know each."""
    import attentions
    from attentions.contract import accepted_options
    from bench.errors import nearest

    try:
        known = {name: set(accepted_options(attentions.find(name))) for name in chosen}
    except ValueError as error:
        raise InputError(str(error)) from error
    decided = {"dim", "num_heads", "num_global"}
    for key in values:
        every = sorted(set().union(*known.values()) - decided)
        if key not in every:
            raise InputError(
                f"--option {key}: {', '.join(chosen)} has no such option{nearest(key, every)};"
                f" allowed: {', '.join(every) or 'none'}"
            )
    return [
        (name, {key: value for key, value in values.items() if key in known[name]})
        for name in chosen
    ]


def _one(report: "Report") -> list["Table"]:
    rows = [
        {"check": result.check, "result": result.status, "what": _what(result)}
        for result in report.results
    ]
    return [_table(f"Conformance of {report.mechanism}{_sets(report)}", rows)]


def _many(reports: Sequence["Report"]) -> list["Table"]:
    counts = [
        {
            "mechanism": report.mechanism,
            "options": str(len(report.options)),
            **{name: str(report.count(name)) for name in _STATUS},
        }
        for report in reports
    ]
    said = [
        {
            "mechanism": report.mechanism,
            "check": result.check,
            "result": result.status,
            "what": _what(result),
        }
        for report in reports
        for result in report.results
        if result.status in ("failed", "warning")
    ]
    found = [_table("Conformance: checks by result, over all sets of options", counts)]
    return [*found, _table("Failures and warnings", said)] if said else found


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> "Table":
    import pandas as pd

    from report.columns import Table

    shown = pd.DataFrame(rows, dtype=str)
    return Table("conformance", title, shown, shown)


def _summary(reports: Sequence["Report"]) -> str:
    if len(reports) == 1:
        (report,) = reports
        said = [f"{name} {report.count(name)}" for name in _STATUS]
        return ", ".join([*said, f"not run {report.not_run}"] if report.not_run else said)
    failed = [report.mechanism for report in reports if not report.passed]
    passed = f"{len(reports) - len(failed)} of {len(reports)} mechanisms pass"
    return f"{passed}: not {', '.join(failed)}" if failed else passed


def _what(result: Any) -> str:
    return f"{result.detail}\n→ {result.advice}" if result.advice else str(result.detail)


def _sets(report: "Report") -> str:
    if len(report.options) > 1:
        return f", {len(report.options)} sets of options"
    said = ", ".join(f"{key}={value}" for key, value in report.options[0].items())
    return f" with {said}" if said else ""
