"""`python -m bench data`: check and download a data set."""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli import add, count, names
from bench.commands._output import WIDTH
from bench.config.schema import DEGENERATE_BOXES
from bench.config.suites import DATASETS_VARIABLE, named_root
from bench.errors import InputError
from bench.files import cores

if TYPE_CHECKING:
    from bench.data.check import SplitReport

HELP = "check a data set, or download COCO"
EPILOG = """\
examples:
  python -m bench data check my_data
  python -m bench data check /datasets/coco --split val2017 --format json
  python -m bench data check export/result.json --images export/images
  python -m bench data coco --root /datasets/coco

`python -m bench data COMMAND --help` explains a command. A data set is a folder in COCO layout:
annotations/instances_SPLIT.json and the images in SPLIT/, for example train2017; or Roboflow's,
SPLIT/_annotations.coco.json beside its images; or, to check it, any annotation file.

"""
_LIMIT = 20
_SHOWN = ("kind", "text", "handled", "image", "annotation", "left_out")


def _configure_check(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    _add_splits(parser)
    add(
        parser,
        "images",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: looked for near the annotations)",
    )
    add(parser, "no-images", action="store_true", help="read the annotations and masks only")
    add(
        parser,
        "degenerate-boxes",
        choices=DEGENERATE_BOXES,
        default="drop",
        help="what boxes without area are: left out, as in training by the published recipes, or"
        " errors",
    )
    add(
        parser,
        "workers",
        type=count,
        metavar="N",
        help="processes that decode (default: one a core)",
    )
    add(
        parser,
        "limit",
        type=count,
        default=_LIMIT,
        metavar="N",
        help="places to list of each kind; 0 lists all, as JSON always does",
    )
    add(parser, "format")


def _configure_coco(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "root",
        type=Path,
        metavar="DIR",
        help="where to put it (default: $DETECTRON2_DATASETS/coco)",
    )
    add(
        parser,
        "splits",
        type=names,
        default="train2017,val2017",
        metavar="A,B",
        help="splits whose images and annotations are downloaded",
    )
    add(
        parser,
        "base-url",
        default="http://images.cocodataset.org",
        metavar="URL",
        help="where it comes from; name a mirror here",
    )
    add(parser, "keep-archives", action="store_true", help="keep the zip files after extraction")


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="folder in COCO layout (default: $DETECTRON2_DATASETS/coco)",
    )


def _add_splits(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "split",
        nargs="+",
        default=(),
        metavar="NAME",
        help="splits to check (default: every annotations/instances_NAME.json)",
    )


def check(options: argparse.Namespace) -> int:
    """Check and print; 1 where there are errors."""
    root = _root(options.path)

    from bench.data import check as checks

    workers = cores() if options.workers is None else options.workers
    reports = checks.check(
        root,
        options.split,
        decode=not options.no_images,
        # One process beside this one would only cost the passing of messages.
        workers=0 if workers == 1 else workers,
        degenerate_boxes=options.degenerate_boxes,
        pictures=options.images,
    )
    if options.format == "json":
        print(_json(root, reports))
    else:
        _print(root, reports, options.limit)
    return 1 if any(report.errors for report in reports) else 0


def _root(path: Path | None) -> Path:
    root = named_root() if path is None else path
    if root is None:
        raise InputError(f"no folder was named, and ${DATASETS_VARIABLE} is not set")
    return root


def _json(root: Path, reports: Sequence["SplitReport"]) -> str:
    splits = [
        {
            "split": report.split,
            "images": report.images,
            "annotations": report.annotations,
            "categories": report.categories,
            "decoded": report.decoded,
            "findings": [
                {"error": found.is_error} | {name: getattr(found, name) for name in _SHOWN}
                for found in report.findings
            ],
        }
        for report in reports
    ]
    errors, odd = (sum(len(getattr(r, what)) for r in reports) for what in ("errors", "odd"))
    return json.dumps({"path": str(root), "errors": errors, "odd": odd, "splits": splits}, indent=1)


def _print(root: Path, reports: Sequence["SplitReport"], limit: int) -> None:
    import pandas as pd

    from bench.data.findings import by_kind
    from report import tables

    summary = [
        {
            "split": report.split,
            "images": str(report.images),
            "decoded": str(report.decoded),
            "annotations": str(report.annotations),
            "classes": str(len(report.categories)),
            "errors": str(len(report.errors)),
            "odd": str(len(report.odd)),
        }
        for report in reports
    ]
    print(f"{root}\n\n{tables.to_text(pd.DataFrame(summary), WIDTH)}")
    kinds = [
        {
            "split": report.split,
            "what": kind,
            "count": str(len(found)),
            "result": "error" if found[0].handled is None else found[0].handled,
        }
        for report in reports
        for kind, found in by_kind(report.findings).items()
    ]
    if kinds:
        print(tables.to_text(pd.DataFrame(kinds), WIDTH))
    for report in reports:
        for kind, found in by_kind(report.findings).items():
            print(f"{report.split}, {kind} ({'error' if found[0].is_error else 'handled'}):")
            _print_places([finding.text for finding in found], limit)
    errors = sum(len(report.errors) for report in reports)
    odd = sum(len(report.odd) for report in reports)
    print(
        f"{errors or 'no'} error{'' if errors == 1 else 's'}; {odd} odd, but handled"
        + ("; the data cannot be used before the errors are mended" if errors else "")
    )


def _print_places(texts: Sequence[str], limit: int) -> None:
    shown = texts[:limit] if limit else texts
    for text in shown:
        print(
            textwrap.fill(
                text,
                WIDTH,
                initial_indent="  ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    if len(shown) < len(texts):
        print(f"  and {len(texts) - len(shown)} more; --limit 0 lists all")
    print()


def coco(options: argparse.Namespace) -> int:
    """Download and say where it is."""
    from bench.data.download import download

    root = _root(options.root)
    download(root, options.splits, base_url=options.base_url, keep_archives=options.keep_archives)
    default = f"${DATASETS_VARIABLE}/coco"
    print(f"COCO is in {root}: --data {root}, or nothing where {default} is that folder")
    return 0


COMMANDS = {
    "check": argparse.Namespace(
        HELP="report everything wrong or odd in a data set",
        EXIT_CODES="exit code: 0 fine, or odd but handled; 1 errors found; 2 no such data",
        configure=_configure_check,
        run=check,
    ),
    "coco": argparse.Namespace(
        HELP="download COCO 2017, or what is missing of it",
        EXIT_CODES="exit code: 0 all is there; 1 the download failed; run it again to go on",
        configure=_configure_coco,
        run=coco,
    ),
}
