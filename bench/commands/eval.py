"""`python -m bench eval`: the average precision of a checkpoint."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli import (
    add,
    add_files,
    add_overrides,
    add_precision,
    add_row,
    count,
    file_values,
    positive,
    precision,
    some_of,
)
from bench.commands._output import WIDTH
from bench.config.schema import LIBRARIES, METHODS, PRECISIONS
from bench.errors import InputError
from bench.files import write_whole

if TYPE_CHECKING:
    from bench.config.schema import RunConfig
    from bench.data.coco import CocoDataset
    from bench.record import Record

HELP = "evaluate a checkpoint: box and mask AP by the rules of COCO"
EPILOG = """\
examples:
  python -m bench eval --record results/quick/records/vil-….json
  python -m bench eval --weights model_final.pth --data /datasets/coco --library detectron2
  python -m bench eval --weights model_final.pth --data /datasets/coco --attention performer
  python -m bench eval --weights model_final.pth --arch l1,h3,d96,n1,s1,g1,p4,f7,a0_… --limit 100
  python -m bench eval --weights step-00000400-….pt --record out/records/vil-….json --data my_data
  torchrun --nproc-per-node 8 -m bench eval --weights model_final.pth --data /datasets/coco

A checkpoint is a file of torch.save: tensors by name, alone or under "model". All of them must fit
the detector, which --arch or --backbone and --attention describe, or --record: that of a run, with
its weights, data, split, batch size and precision where they are not given. No code that a file may
hold is run.

"""
FORMATS = ("table", "json")
_SPLIT = "val2017"
_USED = ("seed", "device", "model", "data", "train.precision", "evaluate")
_SHOWN = 5
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
    add(
        parser,
        "weights",
        type=Path,
        metavar="FILE",
        help="the checkpoint (default: what the run of --record kept)",
    )
    add(
        parser,
        "data",
        type=Path,
        metavar="DIR",
        setting="data.path",
        help="folder in COCO layout (default: that of --record, or $DETECTRON2_DATASETS/coco)",
    )
    add_files(parser, "val", "images")
    add(
        parser,
        "split",
        metavar="NAME",
        setting="evaluate.splits",
        said=lambda split: [split],
        help=f"split of the data (default: the first of --record, or {_SPLIT})",
    )
    model = parser.add_argument_group("the detector")
    add(
        model,
        "record",
        type=Path,
        metavar="FILE",
        help="record of a run, instead of all other options",
    )
    add(
        model,
        "library",
        choices=LIBRARIES,
        default="auto",
        setting="model.library",
        help="whose names the weights have; auto tells by the names",
    )
    add(
        model,
        "method",
        choices=("auto", *METHODS),
        default="auto",
        help="method of detection; auto tells by the names of the weights",
    )
    add(model, "backbone")
    add_row(model)
    add(model, "position")
    add(
        model,
        "arch",
        setting="model.arch",
        help="ARCH string, instead of backbone, row and position",
    )
    run = parser.add_argument_group("the run")
    add(
        run,
        "batch-size",
        default=None,
        setting="evaluate.batch_size",
        help="images in a batch of each process (default: that of --record, or 1)",
    )
    add(
        run,
        "workers",
        type=count,
        default=2,
        metavar="N",
        setting="data.workers",
        help="decoding processes",
    )
    add(run, "device")
    # Its default is known when the record is.
    add_precision(run, default=None)
    add(run, "limit", type=positive, metavar="N", help="the first N images alone")
    add(
        run,
        "format",
        choices=None,
        type=some_of(FORMATS),
        default=",".join(FORMATS),
        metavar="F",
        help="table, json or both",
    )
    add(run, "output", metavar="FILE", help="write the JSON there, with all draws")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print."""
    _check(options)

    from rich.console import Console

    from bench import record
    from bench.data.check import remarks
    from bench.data.split import open_split, undetected
    from bench.files import sha256
    from bench.model import weights
    from bench.model.build import build_detector, refusing
    from bench.model.weights import load_file
    from bench.run.evaluate import evaluate
    from bench.run.evaluate import remarks as evaluation_remarks
    from bench.run.identity import data_remarks, edited_since
    from bench.system.devices import make_fabric
    from bench.system.processes import world
    from bench.system.progress import Bar

    found = record.read(options.record) if options.record else None
    path, root = options.weights, options.data
    if found is not None:
        path = path or _kept(options.record, found)
        if not (options.val and options.images):
            root = root or _recorded_root(options.record, found)
    root = root or (Path(options.val).parent if options.val else _root())
    state = load_file(path)
    config = _config(options, found, weights.detector_kind(state), root)
    (name,) = config.evaluate.splits
    split = open_split(config, root, name)
    if options.limit:
        split.limit(options.limit)
    labels, notes = _labels(options.record, found, split)
    if found is not None and _kept_sha256(found) != sha256(path):
        notes.append(
            f"{path} is not what the run of {options.record} kept: AP is of these weights in that"
            " run's detector; names and shapes do not tell whether they are of its mechanism, nor"
            " whether its classes stand in the same order"
        )
    edited = edited_since(found) if found is not None else []
    if edited:
        notes.append(
            f"{', '.join(edited)} changed since the record {options.record} was made: AP is of its"
            " weights in the new code"
        )
    with refusing(config):
        detector = build_detector(config, split.num_classes)
    try:
        weights.load_detector(detector, state)
    except InputError as error:
        raise InputError(f"--weights {path}: {error}") from error
    fabric = make_fabric(config)
    model: Any = fabric.setup_module(detector)
    is_first = world().is_first
    console = Console(emoji=False, stderr=True, quiet=not is_first)
    with Bar(f"evaluating {split.split}", len(split), console=console) as bar:
        section = evaluate(
            model, split, config, fabric, lambda share, _doing: bar.update(share), labels=labels
        )
    if is_first:
        if found is not None:
            other = bool(options.data or options.val)
            notes += data_remarks(found, options.record, split, root, other=other)
        notes += [*undetected(config, [split]), *remarks([split]), *evaluation_remarks(section)]
        for note in notes:
            console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        result = _result(path, config, section, str(fabric.device)) | {"notes": notes}
        _print(options, result)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise InputError for what is wrong whatever the files hold."""
    if not (options.weights or options.record):
        raise InputError("no weights: name a checkpoint with --weights, or a run with --record")
    besides = [f"--{name}" for name in _DETECTOR if getattr(options, name) != _DETECTOR[name]]
    others = [word for word in options.overrides if not word.startswith("data.")]
    if options.record and (besides or others):
        given = ", ".join([*besides, *others])
        raise InputError(f"--record {options.record} says what the detector is; leave out {given}")
    if options.output and options.output.is_dir():
        raise InputError(f"--output {options.output} is a folder; name a file")


def _kept(path: Path, record: "Record") -> Path:
    """Return the weights that the run of a record kept, beside the folder of records."""
    from bench.files import sha256

    kept = (record.training or {}).get("weights")
    if kept is None:
        raise InputError(f"--record {path}: its run kept no weights; name some with --weights")
    file = path.resolve().parent.parent / kept["path"]
    if not file.is_file():
        raise InputError(f"--record {path}: its weights {file} are gone; name some with --weights")
    if sha256(file) != kept["sha256"]:
        raise InputError(
            f"--record {path}: {file} is not what its run wrote (another SHA-256); evaluate it all"
            " the same with --weights"
        )
    return file


def _kept_sha256(record: "Record") -> str | None:
    kept: str | None = ((record.training or {}).get("weights") or {}).get("sha256")
    return kept


def _labels(
    path: Path, record: "Record | None", split: "CocoDataset"
) -> tuple[list[int] | None, list[str]]:
    """For each label of the detector that of the data, and what is to be said of it."""
    trained = ((record and record.training) or {}).get("classes")
    if trained is None:
        names = ", ".join(name for _, name in split.categories[:_SHOWN])
        more = ", …" if split.num_classes > _SHOWN else ""
        return None, [
            "the classes that the weights were trained on are not known (they are in a run's"
            f" --record); taken for those of {split.annotation_file} by the order of ids:"
            f" {names}{more}"
        ]
    from bench.data.split import labels_by_name

    try:
        categories = tuple((id_, name) for id_, name in trained)
        return labels_by_name(categories, split.categories), []
    except InputError as error:
        raise InputError(f"{split.annotation_file} and --record {path}: {error}") from error


def _recorded_root(path: Path, record: "Record") -> Path:
    """Return the data of a record's run; generated data is made where it is missing."""
    from bench.config.suites import build_config
    from bench.data.split import data_root

    return data_root(build_config(record.config), path.resolve().parent.parent)


def _root() -> Path:
    from bench.config.suites import DATASETS_VARIABLE, default_root
    from bench.data.layout import LAYOUT

    root = default_root()
    if root is None:
        raise InputError(
            f"no data: name a folder with --data, or set {DATASETS_VARIABLE}; it holds {LAYOUT}"
        )
    return root


def _config(
    options: argparse.Namespace,
    record: "Record | None",
    kind: tuple[str, str] | None,
    root: Path,
) -> "RunConfig":
    """Return the configuration; `kind` is library and method by the names of the weights."""
    from bench.config.schema import RunConfig
    from bench.config.suites import build_config, profile_configs
    from bench.config.values import assigned
    from bench.system.processes import world

    recorded = build_config(record.config) if record else None
    evaluate = (recorded or RunConfig()).evaluate
    run: dict[str, Any] = {
        "device": options.device,
        "data": {"path": str(root), "workers": options.workers},
        "train": {
            "precision": _precision(options, recorded),
            "devices": world().size,
            "batch_size": world().size,
            "accumulate": 1,
        },
        "evaluate": {
            "splits": [options.split or evaluate.splits[0]],
            "batch_size": options.batch_size or (evaluate.batch_size if record else 1),
        },
    }
    if record:
        if options.data or options.val:
            # The files that the run was given are of other data.
            run["data"] |= dict.fromkeys(("train_file", "val_file", "images"))
        run["data"] |= file_values(options) | assigned(options.overrides).get("data", {})
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
    run["data"] |= {"degenerate_boxes": "drop", **file_values(options)}
    arch = [f"model.arch={options.arch}"] if options.arch else []
    (config,) = profile_configs(
        [options.attention],
        backbone=options.backbone,
        position=options.position,
        values=run,
        overrides=[*arch, *options.overrides],
        used=_USED,
    )
    if options.arch:
        config = replace(config, model=replace(config.model, backbone="ViL"))
    return config


def _precision(options: argparse.Namespace, recorded: "RunConfig | None") -> str:
    if options.amp:
        return precision(options)
    return str(options.precision or (recorded.train.precision if recorded else PRECISIONS[0]))


def _result(
    weights: Path, config: "RunConfig", section: dict[str, Any], device: str
) -> dict[str, Any]:
    """Return what the file holds."""
    from bench import record
    from bench.files import sha256
    from bench.model.build import model_section

    model = model_section(config)
    return {
        "weights": str(weights),
        "weights_sha256": sha256(weights),
        "model": {name: model[name] for name in _MODEL},
        "precision": config.train.precision,
        "evaluation": section,
        "config": config.as_dict(),
        "environment": record.environment(command=list(sys.argv), device=device),
    }


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
        write_whole(options.output, json.dumps(result, indent=1) + "\n")


def _print_table(model: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    import pandas as pd

    from report import tables
    from report.columns import number

    percent = number(2)
    kinds = [kind for kind in ("box", "mask") if section[kind]]
    lines = [
        {"%": kind, **{name: percent(value) for name, value in section[kind].items()}}
        for kind in kinds
    ]
    print(
        f"{section['split']}, {section['images']} images, {model['library']} {model['method']},"
        f" {model['attention']}\n"
    )
    print(tables.to_text(pd.DataFrame(lines), WIDTH))
    for kind in kinds:
        interval = section[f"{kind}_interval"]
        if interval:
            low, high = interval["AP"]
            print(
                f"{kind} AP {percent(section[kind]['AP'])}, {interval['level']:.0%} interval"
                f" {percent(low)} to {percent(high)} ({interval['resamples']} draws of the images)"
            )
    print()
