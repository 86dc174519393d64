"""`python -m bench audit`: three counts of FLOPs beside each other, and where they differ."""

import argparse
import dataclasses
from typing import Any

from bench.cli import SHARED, add
from bench.commands._output import FORMATS, progress, show
from bench.errors import InputError
from bench.files import check_writable

HELP = "count FLOPs in three independent ways, and fail where they disagree"
EPILOG = """\
Each mechanism is counted with each of its example options: in closed form, from the operators that
run, and by fvcore with handles for what it lacks; beside them, what fvcore and torch's counter miss
as they come. All counts are multiply-adds of one image.

examples:
  python -m bench audit
  python -m bench audit --attention longformer,my_attention.py:Mine --grid 25x42
  python -m bench audit --published

fvcore has to run what it counts; grids beyond 8192 tokens are counted without it. --published runs
nothing.

"""
_GRID = (50, 84)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(
        parser,
        "attention",
        help=f"{SHARED['attention']['help']}; of rows, their mechanisms",
    )
    what = parser.add_mutually_exclusive_group()
    add(what, "grid", help="tokens that a mechanism is counted on (default: {}x{})".format(*_GRID))
    add(
        what,
        "published",
        action="store_true",
        help="the 25 published rows: as published, counted again the same way, and as they are",
    )
    add(parser, "format", choices=FORMATS)
    add(parser, "output", help="write tables there too")


def run(options: argparse.Namespace) -> int:
    """Count, compare and print."""
    if options.published and options.attention != ("all",):
        raise InputError("--published counts all published rows; leave --attention out")
    if options.output is not None:
        check_writable(options.output)
    return _published(options) if options.published else _audit(options)


def _audit(options: argparse.Namespace) -> int:
    from bench.config.suites import mechanisms
    from bench.measure import audit
    from report import counts

    rows, columns = size = options.grid or _GRID
    found = audit.audit_mechanisms(mechanisms(options.attention), size)
    title = (
        f"Audit of mechanisms, grid {rows}x{columns}, {audit.DIM} channels,"
        f" {audit.NUM_HEADS} heads, {audit.NUM_GLOBAL} global tokens; multiply-adds"
    )
    done = list(progress(found, lambda line: line.name))
    failed = [line for line in done if line.error]
    if len(failed) == len(done):
        raise InputError(f"{failed[0].name}: {failed[0].error}")
    lines = [_audit_line(line) for line in done]
    show(options.format, lines, [counts.audit(lines, title=title)], output=options.output)
    return 0 if all(line.passed for line in done) else 1


def _audit_line(line: Any) -> dict[str, Any]:
    counted, values = line.counts, dict[str, Any]()
    if counted is not None:
        values = {name: getattr(counted, name) for name in _ABOUT}
        values |= {name: getattr(counted, name) for name in _COUNTS}
        values |= {f"{name}_missed": counted.missed(getattr(counted, name)) for name in _ALONE}
    return {
        "name": line.name,
        "options": dict(line.options),
        "error": line.error,
        "passed": line.passed,
        **dict.fromkeys((*_COUNTS, *(f"{name}_missed" for name in _ALONE))),
        "uncounted": {},
        "failures": {},
        "notes": (),
        "unsummed": 0,
        **values,
    }


_COUNTS = ("declared", "operators", "fvcore", "disagreement")
_ABOUT = ("unit", "uncounted", "failures", "notes", "unsummed")
_ALONE = ("fvcore_alone", "torch_on_cpu")


def _published(options: argparse.Namespace) -> int:
    from bench.measure import published
    from report import counts

    done = list(progress(published.recount(), lambda row: row.row))
    lines = [
        dataclasses.asdict(row) | {"family": row.differences[0].attention, "library": "torchvision"}
        for row in done
    ]
    show(options.format, lines, [counts.conventions(lines)], output=options.output)
    return 0 if all(row.reproduced for row in done) else 1
