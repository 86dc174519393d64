"""`python -m bench audit`: three counts of FLOPs beside each other, and where they differ."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.cli import SHARED, add, positive
from bench.commands._output import FORMATS, progress, show
from bench.errors import InputError
from bench.files import check_writable

if TYPE_CHECKING:
    from bench.config.schema import RunConfig
    from bench.measure.sizes import SizesReport

HELP = "count FLOPs in three independent ways, and fail where they disagree"
EPILOG = """\
Each mechanism is counted with each of its example options: in closed form, from the operators that
run, and by fvcore with handles for what it lacks; beside them, what fvcore and torch's counter miss
as they come. All counts are multiply-adds of one image.

examples:
  python -m bench audit
  python -m bench audit --attention longformer,my_attention.py:Mine --grid 25x42
  python -m bench audit --attention ViL,performer --image-size 256x320
  python -m bench audit --published
  python -m bench audit --attention ViL,swin --sizes val2017 --output sizes

With --image-size, whole detectors are counted instead. fvcore has to run what it counts, so keep
images small; grids beyond 8192 tokens are counted without it. --published and --sizes run nothing.

"""
_GRID = (50, 84)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(
        parser,
        "attention",
        help=f"{SHARED['attention']['help']}; rows with --image-size or --sizes alone",
    )
    add(
        parser, "grid", help="tokens that a mechanism is counted on (default: {}x{})".format(*_GRID)
    )
    what = parser.add_mutually_exclusive_group()
    add(what, "image-size", help="count whole detectors on images of this size")
    add(
        what,
        "published",
        action="store_true",
        help="the 25 published rows: as published, counted again the same way, and as they are",
    )
    add(what, "sizes")
    add(parser, "backbone", "method")
    add(parser, "proposals", type=positive, default=1000, metavar="N", help="boxes in the box head")
    add(parser, "format", choices=FORMATS)
    add(parser, "output", help="write tables and plots there too")


def run(options: argparse.Namespace) -> int:
    """Count, compare and print."""
    whole = options.image_size or options.published or options.sizes
    if options.grid and whole:
        raise InputError(
            "--grid is for mechanisms alone: it excludes --image-size, --published and --sizes"
        )
    if options.published and options.attention != ("all",):
        raise InputError("--published counts all published rows; leave --attention out")
    if options.output is not None:
        check_writable(options.output)
    if options.published:
        return _published(options)
    return _sizes(options) if options.sizes else _audit(options)


def _audit(options: argparse.Namespace) -> int:
    import attentions
    from bench.measure import audit
    from report import counts

    if options.image_size:
        size = options.image_size
        found = audit.audit_rows(
            options.attention,
            backbone=options.backbone,
            method=options.method,
            image_size=size,
            proposals=options.proposals,
        )
        title = (
            f"Audit of detectors, {options.backbone}, {options.method}, image {size[0]}x{size[1]},"
            f" {options.proposals} proposals, mask head included; multiply-adds"
        )
    else:
        size = options.grid or _GRID
        chosen = [
            name
            for given in options.attention
            for name in (attentions.names() if given == "all" else [given])
        ]
        found = audit.audit_mechanisms(list(dict.fromkeys(chosen)), size)
        title = (
            f"Audit of mechanisms, grid {size[0]}x{size[1]}, {audit.DIM} channels,"
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
        values = {name: getattr(counted, name) for name in ("unit", "uncounted", "failures")}
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
        **values,
    }


_COUNTS = ("declared", "operators", "fvcore", "disagreement")
_ALONE = ("fvcore_alone", "torch_on_cpu")


def _published(options: argparse.Namespace) -> int:
    from bench.measure import published
    from report import counts

    done = list(progress(published.recount(), lambda row: row.row))
    lines = [
        dataclasses.asdict(row) | {"family": row.differences[0].attention, "library": "torchvision"}
        for row in done
    ]
    table, plot = counts.conventions(lines), counts.conventions_plot(lines)
    show(options.format, lines, [table], drawn=[plot], output=options.output)
    return 0 if all(row.reproduced for row in done) else 1


def _sizes(options: argparse.Namespace) -> int:
    from bench.config.suites import profile_configs

    values = {"model": {"method": options.method}, "profile": {"proposals": options.proposals}}
    return show_sizes(
        options, profile_configs(options.attention, backbone=options.backbone, values=values)
    )


def show_sizes(options: argparse.Namespace, configs: "Sequence[RunConfig]") -> int:
    """Print what rows cost over the image sizes of the data set `options.sizes`.

    Raises:
        InputError: for an unknown data set.
    """
    from bench.measure import sizes
    from bench.measure.costs import build_on_meta
    from report import counts

    sizes.image_sizes(options.sizes)

    def count(config: "RunConfig") -> dict[str, Any]:
        proposals = config.profile.proposals
        report = sizes.count_over(build_on_meta(config), options.sizes, proposals=proposals)
        return _sizes_line(config, report)

    lines = list(progress(map(count, configs), lambda line: line["row"]))
    varying = [line for line in lines if not line["fixed_size"]]
    show(
        options.format,
        lines,
        [counts.sizes(lines)],
        drawn=[counts.sizes_plot(varying)] if varying else [],
        text=[counts.histogram(line) for line in varying],
        output=options.output,
    )
    return 0


def _sizes_line(config: "RunConfig", report: "SizesReport") -> dict[str, Any]:
    return {
        **dataclasses.asdict(report),
        "row": config.row,
        "family": config.model.attention.partition(",")[0],
        "images": report.images,
        "mean": report.mean,
        "deviation": report.deviation,
        "minimum": report.minimum,
        "maximum": report.maximum,
        "histogram": report.histogram(),
    }
