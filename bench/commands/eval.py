"""`python -m bench eval`: the average precision of a checkpoint."""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import InputError, choose
from bench.options import names, positive

if TYPE_CHECKING:
    from bench.config import RunConfig

HELP = "evaluate a checkpoint: box and mask AP by the rules of COCO"
EPILOG = """\
examples:
  python -m bench eval --weights model_final.pth --data /datasets/coco --library detectron2
  python -m bench eval --weights model_final.pth --data /datasets/coco --attention performer
  python -m bench eval --weights model_final.pth --arch l1,h3,d96,n1,s1,g1,p4,f7,a0_… --limit 100
  python -m bench eval --weights step-00000400-….pt --record out/records/vil-….json --data my_data
  torchrun --nproc-per-node 8 -m bench eval --weights model_final.pth --data /datasets/coco

A checkpoint is a file of torch.save: tensors by name, alone or under "model". All of them must fit
the detector, which --arch or --backbone and --attention describe, or --record: that of a run. No
code that a file may hold is run.

"""
FORMATS = ("table", "json")
POSITIONS = ("absolute", "relative")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
LIBRARIES = ("auto", "torchvision", "detectron2")
METHODS = ("auto", "mask_rcnn", "retinanet")
_WIDTH = 120
_MODEL = ("backbone", "method", "library", "library_version", "attention", "arch")
# What describes the detector where no record does, and its defaults.
_DETECTOR = {
    "library": "auto",
    "method": "auto",
    "backbone": "small",
    "attention": "ViL",
    "position": None,
    "arch": None,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE", help="the checkpoint"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder in COCO layout (default: $DETECTRON2_DATASETS/coco)",
    )
    parser.add_argument("--split", default="val2017", help="of the data (%(default)s)")
    model = parser.add_argument_group("the detector")
    model.add_argument(
        "--record", type=Path, metavar="FILE", help="that of a run, instead of all other options"
    )
    model.add_argument(
        "--library",
        default="auto",
        help="torchvision, detectron2 or auto: whose names the weights have",
    )
    model.add_argument(
        "--method", default="auto", help="mask_rcnn, retinanet or auto: by the weights' names"
    )
    model.add_argument("--backbone", default="small", help="of configs/backbones.yaml (small)")
    model.add_argument(
        "--attention",
        default="ViL",
        metavar="ROW",
        help="a row of configs/rows.yaml or a mechanism, yours too (ViL)",
    )
    model.add_argument(
        "--position", default=None, help="absolute (that of the rows) or relative, in all stages"
    )
    model.add_argument("--arch", help="ARCH string, instead of backbone, row and position")
    run = parser.add_argument_group("the run")
    run.add_argument("--batch-size", type=positive, default=1, help="images a process (1)")
    run.add_argument("--workers", type=int, default=2, help="decoding processes (2)")
    run.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    run.add_argument("--precision", default="32-true", help=", ".join(PRECISIONS))
    run.add_argument("--limit", type=positive, metavar="N", help="the first N images alone")
    run.add_argument(
        "--format", type=names, default=FORMATS, metavar="F", help="table,json (default: both)"
    )
    run.add_argument(
        "--output", type=Path, metavar="FILE", help="write the JSON there, with all draws"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of bench/config.py, for example data.min_sizes=[640]",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate and print."""
    _check(options)

    from rich.console import Console

    from bench.checkpoints import load_file
    from bench.data.bar import Bar
    from bench.data.coco import CocoDataset
    from bench.detectors import weights
    from bench.launch import world
    from bench.runner import build_detector, evaluate, make_fabric

    root = _root(options.data)
    state = load_file(options.weights)
    config = _config(options, weights.kind(state), root)
    split = CocoDataset(root, options.split, degenerate_boxes=config.data.degenerate_boxes)
    if options.limit:
        split.ids = split.ids[: options.limit]
    detector = build_detector(config, split.num_classes)
    try:
        weights.load(detector, state)
    except InputError as error:
        raise InputError(f"--weights {options.weights}: {error}") from error
    fabric = make_fabric(config)
    model: Any = fabric.setup_module(detector)
    is_first = world().is_first
    console = Console(stderr=True, quiet=not is_first)
    with Bar(f"evaluating {split.split}", len(split), console=console) as bar:
        shown = 0

        def progress(done: float, doing: str) -> None:
            del doing
            nonlocal shown
            bar.advance(round(done * len(split)) - shown)
            shown = round(done * len(split))

        section = evaluate(model, split, config, fabric, progress)
    if is_first:
        _print(options, _result(options, config, section, str(fabric.device)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise InputError for what can be told before anything is read."""
    for name in options.format:
        choose(name, FORMATS, "--format")
    if options.position is not None:
        choose(options.position, POSITIONS, "--position")
    choose(options.library, LIBRARIES, "--library")
    choose(options.method, METHODS, "--method")
    choose(options.precision, PRECISIONS, "--precision")
    if options.workers < 0:
        raise InputError(f"--workers {options.workers} must not be negative")
    if options.attention == "all":
        raise InputError("--attention all: a checkpoint is of one row; name it")
    besides = [f"--{name}" for name in _DETECTOR if getattr(options, name) != _DETECTOR[name]]
    if options.record and (besides or options.overrides):
        given = ", ".join([*besides, *options.overrides])
        raise InputError(f"--record {options.record} says what the detector is; leave out {given}")
    if options.arch and options.position:
        raise InputError("--arch says where positions are absolute (a1); leave out --position")
    if options.output and options.output.is_dir():
        raise InputError(f"--output {options.output} is a folder; name a file")


def _root(data: Path | None) -> Path:
    from bench.data.coco import DATASETS_VARIABLE, LAYOUT, default_root

    root = data or default_root()
    if root is None:
        raise InputError(
            f"no data: name a folder with --data, or set {DATASETS_VARIABLE}; it holds {LAYOUT}"
        )
    return root


def _config(options: argparse.Namespace, kind: tuple[str, str] | None, root: Path) -> "RunConfig":
    """The run's configuration; `kind` is library and method by the names of the weights."""
    from bench.config import build_config, profile_configs
    from bench.launch import world
    from bench.record import read

    run: dict[str, Any] = {
        "device": options.device,
        "data": {"path": str(root), "workers": options.workers},
        "train": {
            "precision": options.precision,
            "devices": world().size,
            "batch_size": world().size,
            "accumulate": 1,
        },
        "evaluate": {"splits": [options.split], "batch_size": options.batch_size},
    }
    if options.record:
        record = read(options.record)
        values = dict(record.config)
        run["model"] = {"library": record.model["library"]}
        return build_config(
            values | {k: {**values[k], **v} if k != "device" else v for k, v in run.items()}
        )
    library, method = kind or ("auto", "mask_rcnn")
    if options.library != "auto":
        library = options.library
    if options.method != "auto":
        method = options.method
    run["model"] = {"library": library, "method": method}
    run["data"]["degenerate_boxes"] = "drop"
    arch = [f"model.arch={options.arch}", "model.backbone=ViL"] if options.arch else []
    (config,) = profile_configs(
        [options.attention],
        backbone=options.backbone,
        values=run,
        overrides=[*arch, *options.overrides],
    )
    if options.position is None:
        return config
    switch = int(options.position == "absolute")
    switched = re.sub(r",a[01](?=_|$)", f",a{switch}", config.model.arch)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, arch=switched))


def _result(
    options: argparse.Namespace, config: "RunConfig", section: dict[str, Any], device: str
) -> dict[str, Any]:
    """What the file holds."""
    from bench import record
    from bench.runner import model_section

    model = model_section(config)
    return {
        "weights": str(options.weights),
        "weights_sha256": _sha256(options.weights),
        "model": {name: model[name] for name in _MODEL},
        "precision": options.precision,
        "evaluation": section,
        "config": config.as_dict(),
        "environment": record.environment(command=list(sys.argv), device=device),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _print(options: argparse.Namespace, result: dict[str, Any]) -> None:
    section = result["evaluation"]
    if "table" in options.format:
        _print_table(result["model"], section)
    if "json" in options.format:
        # The draws, the configuration and the environment are for the file.
        short = {k: v for k, v in result.items() if k not in ("config", "environment")}
        figures = {k: v for k, v in section.items() if k != "bootstrap"}
        print(json.dumps(short | {"evaluation": figures}))
    if options.output:
        _write(options.output, json.dumps(result, indent=1) + "\n")


def _print_table(model: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    import pandas as pd

    from report import tables

    kinds = [kind for kind in ("box", "mask") if section[kind]]
    lines = [
        {"%": kind, **{name: _number(value) for name, value in section[kind].items()}}
        for kind in kinds
    ]
    print(
        f"{section['split']}, {section['images']} images, {model['library']} {model['method']},"
        f" {model['attention']}\n"
    )
    print(tables.to_text(pd.DataFrame(lines), _WIDTH))
    for kind in kinds:
        interval = section[f"{kind}_interval"]
        if interval:
            low, high = interval["AP"]
            print(
                f"{kind} AP {_number(section[kind]['AP'])}, {interval['level']:.0%} interval"
                f" {_number(low)} to {_number(high)} ({interval['resamples']} draws of the images)"
            )
    print()


def _number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.2f}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write --output {path}: {error.strerror or error}") from error
