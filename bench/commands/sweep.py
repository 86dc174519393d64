"""`python -m bench sweep`: cost against resolution."""

import argparse
import json
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.cli import (
    SHARED,
    ImageSize,
    add,
    add_overrides,
    add_precision,
    add_what,
    image_size,
    memory_budget,
    names,
    positive,
    precision,
    seconds,
    several,
)
from bench.commands._output import FORMATS, show
from bench.config.schema import MODES, SCOPES, SWEPT

if TYPE_CHECKING:
    from bench.record import Record

HELP = "measure FLOPs, memory and latency against resolution, and find where full attention loses"
EPILOG = """\
examples:
  python -m bench sweep --attention all --image-sizes 224:1024
  python -m bench sweep --attention full,longformer --image-sizes 256,512,768x1024
  python -m bench sweep --scope attention --image-sizes 224:4096:9 --what flops
  python -m bench sweep --backbone small --device cuda --precision bf16-mixed --batch-sizes 1,2,4
  python -m bench sweep --max-seconds 60 --memory-limit 8GB

Each point is written to DIR/records as soon as it is measured; the same command again measures
what is missing, and what ran out of a limit that is larger now. Sizes above one that ran out of
memory or time are skipped, and the page says so.

"""
_STEP = 32
_RATIO = math.sqrt(2)


def image_sizes(text: str) -> tuple[ImageSize, ...]:
    """`224:2048` -> squares in a geometric series of multiples of 32; `224,512x768` -> as given.

    A third number says how many sizes; without it, each has about twice the pixels of the one
    before.
    """
    if ":" not in text:
        return tuple(image_size(part) for part in names(text))
    parts = text.split(":")
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(numbers) != len(parts) or len(parts) not in (2, 3):
        raise ArgumentTypeError(
            f"{text!r} is not a series of image sizes; allowed: FIRST:LAST, FIRST:LAST:COUNT, A,B,…"
        )
    first, last = (_STEP * max(1, round(side / _STEP)) for side in numbers[:2])
    if not 0 < numbers[0] < numbers[1]:
        raise ArgumentTypeError(f"{text!r}: the first size must be positive and below the last")
    count = numbers[2] if len(numbers) == 3 else 1 + round(math.log(last / first, _RATIO))
    if count < 2:
        raise ArgumentTypeError(f"{text!r}: a series has at least two sizes")
    sides = [first * (last / first) ** (i / (count - 1)) for i in range(count)]
    rounded = dict.fromkeys(_STEP * round(side / _STEP) for side in sides)
    return tuple((side, side) for side in rounded)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(
        parser,
        "attention",
        help=f"{SHARED['attention']['help']}; all is every mechanism once",
    )
    add(
        parser,
        "image-sizes",
        type=image_sizes,
        default="224:1024",
        metavar="A:B",
        help="224:1024 is a geometric series of multiples of 32, 224:1024:9 one of 9 sizes,"
        " 256,512x768 a list",
    )
    add(
        parser,
        "batch-sizes",
        type=several(positive),
        default="1",
        metavar="A,B",
        help="images in a batch",
    )
    add(
        parser,
        "scope",
        choices=SCOPES,
        default="backbone",
        help="what is measured; attention is the first module of the backbone alone",
    )
    add(parser, "backbone", default="tiny")
    add(parser, "mode")
    add_what(parser, SWEPT)
    add_precision(parser)
    add(parser, "device")
    add(parser, "repeats", default=3)
    add(parser, "seconds", default="0.5")
    add(parser, "seed")
    add(
        parser,
        "memory-limit",
        type=memory_budget,
        metavar="16GB",
        help="memory of each point, on the CPU (default: nine tenths of what is free)",
    )
    add(
        parser,
        "max-seconds",
        type=seconds,
        default="600",
        metavar="S",
        help="seconds of each point; 0 for no limit",
    )
    add(parser, "output", default="results/sweep", help="folder of records and report")
    add(parser, "format", choices=FORMATS)
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Sweep, write the report and print its tables."""
    from rich.console import Console

    from bench.measure.sweep import Limits, plan, sweep
    from report.sweep import alike, write

    walks = plan(
        options.attention,
        sizes=options.image_sizes,
        batch_sizes=options.batch_sizes,
        modes=[mode for mode in MODES if mode in options.mode],
        scope=options.scope,
        what=[quantity for quantity in SWEPT if quantity in options.what],
        backbone=options.backbone,
        values={
            "device": options.device,
            "seed": options.seed,
            "train": {"precision": precision(options)},
            "profile": {"repeats": options.repeats, "seconds": options.seconds},
        },
        overrides=options.overrides,
    )
    points = sweep(
        walks,
        output=options.output,
        limits=Limits(memory=options.memory_limit, seconds=options.max_seconds or None),
        command=["python", "-m", "bench", *sys.argv[1:]],
        # Progress goes to stderr, so that JSON and CSV can be piped.
        console=Console(emoji=False, stderr=True),
    )
    page = write(alike(points, options.output), options.output)
    print_points(points, options.format)
    print(f"report: {page} and {page.with_suffix('.html')}", file=sys.stderr)
    broken = [point for point in points if (point.error or {}).get("kind") == "error"]
    return 1 if broken else 0


def print_points(points: "Sequence[Record]", form: str) -> None:
    """Print points in one of FORMATS; tables are of growth and crossovers, CSV of the points."""
    from report import sweep

    data = sweep.frame(points)
    shown = sweep.summaries(data) if form != "csv" else []
    if form in ("csv", "markdown"):
        shown.append(sweep.points(data))
    show(form, [json.loads(point.to_json()) for point in points], shown)
