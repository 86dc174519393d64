"""`python -m bench sweep`: cost against resolution."""

import argparse
import math
import sys
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.commands._output import FORMATS, WIDTH
from bench.errors import InputError, choose
from bench.options import ImageSize, image_size, memory_budget, names, positive, seconds

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
SCOPES = ("backbone", "attention", "detector")
MODES = ("inference", "training")
QUANTITIES = ("flops", "memory", "latency")
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
            f"{text!r} is no series of image sizes; allowed: FIRST:LAST, FIRST:LAST:COUNT or A,B,…"
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


def _positives(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in names(text))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--attention",
        type=names,
        default=("all",),
        metavar="A,B",
        help="mechanisms, rows such as 'Partial ViL', or mechanisms of yours as"
        " package.module:Class or file.py:Class (default: all mechanisms, each once)",
    )
    parser.add_argument(
        "--image-sizes",
        type=image_sizes,
        default="224:1024",
        metavar="A:B",
        help="224:1024 (default) is a geometric series of multiples of 32, 224:1024:9 one of 9"
        " sizes, 256,512x768 a list",
    )
    parser.add_argument(
        "--batch-sizes", type=_positives, default=(1,), metavar="A,B", help="images in a batch (1)"
    )
    parser.add_argument(
        "--scope",
        default="backbone",
        help="backbone (default), attention (the first module of it alone) or detector",
    )
    parser.add_argument(
        "--backbone", default="tiny", help="of configs/backbones.yaml (default: tiny)"
    )
    parser.add_argument(
        "--mode", type=names, default=MODES, metavar="M", help="inference,training (both)"
    )
    parser.add_argument(
        "--what",
        type=names,
        default=QUANTITIES,
        metavar="Q",
        help=f"some of {','.join(QUANTITIES)} (default: all)",
    )
    parser.add_argument(
        "--precision", default="32-true", help="32-true (default), bf16-mixed or 16-mixed"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=positive, default=3, help="fewest samples (3)")
    parser.add_argument("--seconds", type=seconds, default=0.5, help="they add up to (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (0)")
    parser.add_argument(
        "--memory-limit",
        type=memory_budget,
        metavar="16GB",
        help="of each point, on the CPU (default: nine tenths of what is free)",
    )
    parser.add_argument(
        "--max-seconds", type=seconds, default=600.0, help="of each point (600); 0 for no limit"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/sweep"),
        metavar="DIR",
        help="of records and report (results/sweep)",
    )
    parser.add_argument("--format", default="table", help=", ".join(FORMATS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of bench/config.py")


def run(options: argparse.Namespace) -> int:
    """Sweep, write the report and print its tables."""
    for what, chosen, allowed in (
        ("--format", [options.format], FORMATS),
        ("--scope", [options.scope], SCOPES),
        ("--mode", options.mode, MODES),
        ("--what", options.what, QUANTITIES),
    ):
        for value in chosen:
            choose(value, allowed, what)
    if options.repeats < 2:
        raise InputError(f"--repeats {options.repeats} must be at least 2")

    from rich.console import Console

    from bench import sweep
    from report import sweep as report

    walks = sweep.plan(
        options.attention,
        sizes=options.image_sizes,
        batch_sizes=options.batch_sizes,
        modes=[mode for mode in MODES if mode in options.mode],
        scope=options.scope,
        what=[quantity for quantity in QUANTITIES if quantity in options.what],
        backbone=options.backbone,
        values={
            "device": options.device,
            "seed": options.seed,
            "train": {"precision": options.precision},
            "profile": {"repeats": options.repeats, "seconds": options.seconds},
        },
        overrides=options.overrides,
    )
    points = sweep.sweep(
        walks,
        output=options.output,
        limits=sweep.Limits(memory=options.memory_limit, seconds=options.max_seconds or None),
        command=["python", "-m", "bench", *sys.argv[1:]],
        # Progress goes to stderr, so that JSON and CSV can be piped.
        console=Console(stderr=True),
    )
    page = report.write(report.alike(points, options.output), options.output)
    PRINT[options.format](points)
    print(f"report: {page} and {page.with_suffix('.html')}", file=sys.stderr)
    broken = [point for point in points if (point.error or {}).get("kind") == "error"]
    return 1 if broken else 0


def _table(points: Sequence[Any]) -> None:
    from report import sweep, tables

    for table in sweep.summaries(points):
        print(f"{table.title}\n\n{tables.to_text(table.shown, WIDTH)}")
        print("\n".join((*(textwrap.fill(note, WIDTH) for note in table.notes), "")))


def _markdown(points: Sequence[Any]) -> None:
    from report import sweep, tables

    for table in (*sweep.summaries(points), sweep.points(points)):
        print(f"## {table.title}\n\n{tables.to_markdown(table.shown)}")
        print("\n".join((*table.notes, "")))


def _csv(points: Sequence[Any]) -> None:
    from report import sweep, tables

    print(tables.to_csv(sweep.points(points).raw), end="")


def _json(points: Sequence[Any]) -> None:
    print("[" + ",\n".join(point.to_json().strip() for point in points) + "]")


PRINT: dict[str, Callable[[Sequence[Any]], None]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
}
