"""`python -m bench convert`: from a classification checkpoint to the start of a detector."""

import argparse
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli import add, add_overrides, add_row
from bench.commands._output import WIDTH
from bench.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from bench.config.schema import RunConfig
    from bench.model.weights import Conversion, Step

HELP = "convert a classification checkpoint for the training of a detector"
EPILOG = """\
examples:
  python -m bench convert --source cls.pth --output det.pth --backbone small
  python -m bench convert --source cls.pth --output det.pth --backbone tiny --position relative
  python -m bench convert --source cls.pth --output det.pth --attention "Partial global"

Global tokens are expanded, position tables resized, and qkv split where the backbone keeps queries
apart; --format json says what became of each tensor. The file holds {"model": tensors by their
published names}. The source is read without running any code that it may hold.

"""
_MANY_KINDS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(
        parser, "source", type=Path, required=True, metavar="FILE", help="classification checkpoint"
    )
    add(parser, "output", required=True, metavar="FILE", help="where the result goes")
    add(parser, "backbone")
    add_row(parser)
    add(parser, "position")
    add(
        parser,
        "image-size",
        setting="data.max_size",
        help="of the images to come (default: 1333x1333)",
    )
    add(parser, "force", action="store_true", help="overwrite the output")
    add(parser, "format")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Convert, write and print."""
    _check_output(options.source, options.output, force=options.force)

    from bench.measure.costs import build_on_meta
    from bench.model.build import refusing
    from bench.model.weights import convert, load_file, save_file

    config = _config(options)
    source = load_file(options.source)
    with refusing(config):
        vil = build_on_meta(config).vil
    conversion = convert(source, vil)
    if not any(_is_of_a_stage(step) for step in conversion.steps):
        raise InputError(
            f"--source {options.source}: no tensor of it fits a stage of --backbone"
            f" {options.backbone} with --attention {options.attention}"
            f"{_first_misfit(conversion.steps)}"
        )
    save_file(conversion.tensors, options.output)
    if options.format == "json":
        print(_json(conversion, config))
    else:
        _print(conversion, config, options)
    return 0


def _check_output(source: Path, output: Path, *, force: bool) -> None:
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"--output {output} is the source itself; name another file")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; name a file")
    if output.exists() and not force:
        raise InputError(f"--output {output} is there already; --force overwrites it")


def _config(options: argparse.Namespace) -> "RunConfig":
    from bench.config.suites import profile_configs

    (config,) = profile_configs(
        [options.attention],
        backbone=options.backbone,
        position=options.position,
        image_size=options.image_size,
        overrides=options.overrides,
        used=("model", "data.max_size", "data.fixed_size"),
    )
    return config


def _is_of_a_stage(step: "Step") -> bool:
    """Return whether a tensor found its place in a stage, where nothing fits by chance."""
    return (
        step.action != "left out"
        and step.target.startswith("layer")
        and not step.target.endswith("cls_pos_embed")
    )


def _first_misfit(steps: Sequence["Step"]) -> str:
    found = next((step for step in steps if step.action == "left out" and step.target), None)
    return f"; for example, {found.source}: {found.reason}" if found else ""


def _print(conversion: "Conversion", config: "RunConfig", options: argparse.Namespace) -> None:
    from bench.model.weights import ACTIONS
    from report import tables

    model = config.model
    print(f"{options.source} → {options.output}, for {model.backbone} with {config.row}\n")
    print(tables.to_text(_table(conversion.steps), WIDTH))
    counts = ", ".join(f"{conversion.count(action)} {action}" for action in ACTIONS)
    print(f"{len(conversion.tensors)} tensors written: {counts}")
    if conversion.untouched:
        total = len(conversion.untouched) + len(conversion.tensors)
        said = (
            f"{len(conversion.untouched)} of {total} tensors of the backbone get nothing and start"
            f" at random: {_counted(conversion.untouched)}"
        )
        print(textwrap.fill(said, WIDTH, break_long_words=False))


def _counted(names: Sequence[str]) -> str:
    """Return names with their number by their kind, or by their stage where there are many."""
    kinds = Counter(map(_kind, names))
    if len(kinds) > _MANY_KINDS:
        kinds = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())


def _table(steps: Sequence["Step"]) -> "pd.DataFrame":
    """Return a line for the plain copies of a stage, and for each kind of what was changed."""
    import pandas as pd

    lines = []
    for step in steps:
        plain = step.action == "copied" and not step.reason
        lines.append(
            {
                "tensor": step.source.partition(".")[0] + ".…" if plain else _kind(step.source),
                "result": step.action,
                "place": "same" if plain else _kind(step.target),
                "count": step.source,
                "from": "" if plain else _shape(step.source_shape),
                "to": "" if plain else _shape(step.target_shape),
                # Its shapes are in the columns before.
                "why": "does not fit" if step.action == "left out" and step.target else step.reason,
            }
        )
    by_kind = pd.DataFrame(lines).groupby(["tensor", "result", "from", "why"], sort=False)
    merged = by_kind.agg({"place": _joined, "count": "nunique", "to": _listed}).reset_index()
    merged.loc[merged["place"] == merged["tensor"], "place"] = "same"
    return merged[list(lines[0])].astype(str)


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _joined(names: Iterable[str]) -> str:
    """Join names that differ in one part: a.query.weight, a.kv.weight -> a.{query,kv}.weight."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    parts = [list(dict.fromkeys(column)) for column in columns]
    return ".".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)


def _kind(name: str) -> str:
    """Leave out the number of a block: layer3.5.norm.bias -> layer3.*.norm.bias."""
    return re.sub(r"^(layer\d+)\.[1-9]\d*\.", r"\1.*.", name)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "one"


def _json(conversion: "Conversion", config: "RunConfig") -> str:
    import dataclasses
    import json

    from bench.model.weights import ACTIONS

    return json.dumps(
        {
            "arch": config.model.arch,
            "attention": config.model.attention,
            "counts": {action: conversion.count(action) for action in ACTIONS},
            "steps": [dataclasses.asdict(step) for step in conversion.steps],
            "untouched": conversion.untouched,
        },
        indent=1,
    )
