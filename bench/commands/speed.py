"""`python -m bench speed`: mechanisms at two commits, in turns, as ratios."""

import argparse
import json
import sys
from typing import Any

from bench.cli import add, positive, repeats, several, some_of
from bench.commands._output import WIDTH, progress
from bench.config.schema import MODES, POSITIONS
from bench.errors import InputError
from bench.files import check_writable

HELP = "compare the speed and memory of mechanisms at two commits, in turns in one run"
EPILOG = """\
examples:
  python -m bench speed --base e514c85
  python -m bench speed --base HEAD~1 --attention longformer,swin --stages 1,2 --mode training

Outputs and gradients of both commits are compared first, with the same weights; where they differ
there is no ratio, and the exit code is 1.

"""
_FORMATS = ("table", "json", "markdown")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(parser, "base", required=True, metavar="COMMIT", help="what to compare with")
    add(parser, "attention")
    add(parser, "backbone")
    add(parser, "image-size", default="800x1344")
    add(
        parser,
        "stages",
        type=several(positive),
        default="1,2,3,4",
        metavar="1,2",
        help="stage shapes",
    )
    add(
        parser,
        "position",
        type=some_of(POSITIONS),
        default="relative,absolute",
        metavar="P",
        help="of each mechanism those that it has",
    )
    add(parser, "mode", default=",".join(MODES))
    add(parser, "batch-size")
    add(parser, "repeats", type=repeats, default=9, metavar="N", help="rounds at least")
    add(parser, "seconds", default=1.0)
    add(parser, "seed")
    add(parser, "format", choices=_FORMATS, default="table", help="what is printed")
    add(parser, "output", help="folder for speed.json, with raw samples, and speed.md")


def run(options: argparse.Namespace) -> int:
    """Compare and print; 1 where a case could not be compared."""
    if options.output is not None:
        check_writable(options.output)

    import pandas as pd
    import torch

    from bench import record
    from bench.files import write_whole
    from bench.measure import latency, speed
    from report import tables

    base = speed.commit_of(options.base)
    chosen = list(
        speed.cases(
            options.attention,
            backbone=options.backbone,
            image_size=options.image_size,
            stages=options.stages,
            positions=options.position,
            modes=options.mode,
        )
    )
    if not chosen:
        raise InputError("no case: no mechanism has the positions asked for")
    effort = latency.Effort(min_repeats=options.repeats, min_seconds=options.seconds)
    found = list(
        progress(
            speed.compare(
                chosen, base, effort=effort, batch_size=options.batch_size, seed=options.seed
            ),
            lambda one: f"{one.case.mechanism}, stage {one.case.stage}, {one.case.mode}",
        )
    )
    shown = pd.DataFrame([_shown(one.line()) for one in found]).fillna("")
    text = {
        "table": lambda: tables.to_text(shown, WIDTH),
        "markdown": lambda: tables.to_markdown(shown),
        "json": lambda: json.dumps([one.line() for one in found], indent=1),
    }
    print(text[options.format]())
    if options.output is not None:
        command = ["python", "-m", "bench", *sys.argv[1:]]
        place = record.environment(command=command, device="cpu")
        content = {
            "base": base,
            "environment": place | {"threads": torch.get_num_threads()},
            "batch_size": options.batch_size,
            "cases": [
                one.line()
                | {"seconds": one.seconds, "core_seconds": one.core_seconds, "peaks": one.peaks}
                for one in found
            ],
        }
        write_whole(options.output / "speed.json", json.dumps(content, indent=1) + "\n")
        write_whole(options.output / "speed.md", tables.to_markdown(shown) + "\n")
    return 1 if any(one.reason for one in found) else 0


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """A line as people read it: milliseconds, megabytes and ratios."""
    place = ("mechanism", "stage", "grid", "position", "mode")
    shown = {name: str(line[name]) for name in place}
    if line["not_compared"]:
        return shown | {"speed-up": line["not_compared"]}
    bounds = {}
    for name, said in (
        ("bound", "the bound"),
        ("bound_with_linear", "the bound with linear layers as timed"),
    ):
        known = f"{name}_s" in line
        bounds[f"{said} (ms)"] = f"{1e3 * line[f'{name}_s']:.1f}" if known else ""
        bounds[f"times {said}"] = f"{line[f'times_{name}']:.1f}" if known else ""
    return shown | {
        "base (ms)": f"{1e3 * line['base_s']:.1f}",
        "now (ms)": f"{1e3 * line['now_s']:.1f}",
        "speed-up": f"{line['speedup']:.2f} ({line['low']:.2f} to {line['high']:.2f})",
        **bounds,
        "base (MB)": f"{line['base_bytes'] / 1e6:.0f}",
        "now (MB)": f"{line['now_bytes'] / 1e6:.0f}",
        "memory": f"{line['memory_ratio']:.2f}",
    }
