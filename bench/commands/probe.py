"""`python -m bench probe`: small tasks that tell mechanisms apart in seconds."""

import argparse
import json
import sys

from bench.cli import SHARED, add, add_overrides, names, some_of

HELP = "train tiny models on four tasks that tell mechanisms apart, in seconds"
EPILOG = """\
examples:
  python -m bench probe --attention my_attention.py:Mine
  python -m bench probe --attention full,longformer --tasks bind,regions
  python -m bench probe --attention full seeds=[0,1,2,3,4]

bind asks for capacity, regions for detail, bindup for smooth content, majority for aggregation;
chance is 0.25. A probe is a profile of a mechanism; it does not predict COCO. The same command
continues what was stopped. `python run_all.py --suite probes` probes all mechanisms and rows.

"""
TASKS = ("bind", "regions", "bindup", "majority")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(
        parser,
        "attention",
        type=names,
        help=f"{SHARED['attention']['help'].replace(', rows such as', ' of configs/probes.yaml,')}",
    )
    add(
        parser,
        "rows",
        type=names,
        default=(),
        metavar="A,B",
        help="rows of configs/rows.yaml, families of them or all, as models of two stages",
    )
    add(
        parser,
        "tasks",
        type=some_of(TASKS),
        default=",".join(TASKS),
        metavar="A,B",
        help=f"some of {', '.join(TASKS)}, for mechanisms",
    )
    add(parser, "retry-failed")
    add(parser, "output", default="results/probes", help="folder of records and report")
    add(parser, "format", choices=("table", "json"))
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Probe, write the page of the folder, and print the table of what was asked for."""
    from bench.config.probes import build_recipe, plan
    from bench.run import probe
    from report import page, probes, tables

    recipe = build_recipe(options.overrides)
    subjects = plan(options.attention, options.tasks, recipe, rows=options.rows)
    records = probe.run(
        subjects,
        options.output,
        command=["python", "-m", "bench", *sys.argv[1:]],
        log=lambda line: print(line, file=sys.stderr, flush=True),
        retry_failed=options.retry_failed,
    )
    path = page.write_folder(options.output, title="Probes", probed=records)
    if options.format == "json":
        print(json.dumps([json.loads(one.to_json()) for one in records]))
    else:
        for table in probes.tables(records):
            print(tables.to_text(table.shown))
    print(f"report: {path} and {path.with_suffix('.html')}", file=sys.stderr)
    return int(any(one.status == "failed" for one in records))
