"""`python -m bench pretrain`: classifiers to start detectors from, trained or evaluated."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli import PROG, add, add_overrides, as_arguments, names
from bench.errors import InputError, some

if TYPE_CHECKING:
    from bench.config.schema import RunConfig
    from bench.data.classes import ClassDataset

HELP = "pretrain the backbone of rows as classifiers, by the recipe of DeiT, or evaluate one"
EPILOG = """\
examples:
  python -m bench pretrain
  python -m bench pretrain --data /datasets/imagenet --attention performer --backbone small
  python -m bench pretrain --data /datasets/imagenet --attention ViL,swin --devices 8 --dry-run
  python -m bench pretrain --data /datasets/imagenet --attention all --devices 8 \\
      --launcher slurm --slurm slurm_partition=gpu,timeout_min=4320
  python -m bench pretrain --data my_images classify.epochs=30 data.fixed_size=[192,192]
  python -m bench pretrain --eval --weights vil.pth --data /datasets/imagenet --position relative
  python run_all.py --suite ablation --data /datasets/coco --init 'results/pretrain/{row}.pth'

Data are folders of classes, train/CLASS/IMAGE and val/CLASS/IMAGE, or WebDataset's shards,
train/*.tar and val/*.tar; without --data the quick
backbone is pretrained on generated images. It is a suite as run_all.py runs it: rows that have a
record are not run again, and the same command continues what was stopped. --init takes what it
leaves, OUTPUT/ROW.pth.

"""
_ROW = "ViL"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(
        parser,
        "data",
        metavar="DIR",
        help="classes, in folders or shards (default: generated images)",
    )
    add(
        parser,
        "attention",
        type=names,
        default=_ROW,
        help="rows of configs/rows.yaml, families, all, or mechanisms of yours",
    )
    add(
        parser,
        "backbone",
        default=None,
        help="a backbone (default: small, of generated images quick)",
    )
    add(parser, "schedule", metavar="NAME", help="recipe of configs/pretrain.yaml")
    add(parser, "output", help="where everything goes (default: results/pretrain)")
    add(parser, "device", default=None)
    add(parser, "seed", default=None)
    add(parser, "devices", "launcher", "jobs", "slurm")
    add(parser, "dry-run", "measure-steps", "retry-failed", "tensorboard")
    one = parser.add_argument_group("evaluation of a checkpoint")
    add(one, "eval", action="store_true", help="evaluate --weights on val, and train nothing")
    add(
        one,
        "weights",
        type=Path,
        metavar="FILE",
        needs="eval",
        help="a classifier of ours or a published one",
    )
    add(one, "position", needs="eval", setting="model.arch")
    add(
        one,
        "image-size",
        needs="eval",
        setting="data.fixed_size",
        help="of the images (default: that of the weights' own run, or the recipe's)",
    )
    add(
        one,
        "batch-size",
        default=None,
        needs="eval",
        setting="evaluate.batch_size",
        help="images in a batch (default: 64)",
    )
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Pretrain, or evaluate."""
    if options.eval:
        return _evaluate(options)

    import run_all

    suite = "pretrain-quick" if options.data is None else "pretrain"
    arguments = ["--suite", suite, "--rows", ",".join(options.attention)]
    arguments += ["--output", str(options.output or Path("results") / "pretrain")]
    arguments += as_arguments(
        options,
        *("data", "backbone", "schedule", "device", "seed", "devices", "launcher", "jobs"),
        *("slurm", "measure-steps", "dry-run", "retry-failed", "tensorboard"),
    )
    return run_all.main([*arguments, *options.overrides], prog=f"{PROG} pretrain")


def _evaluate(options: argparse.Namespace) -> int:
    """Print top-1 and top-5 of a checkpoint."""
    if options.weights is None:
        raise InputError("--eval needs --weights, a checkpoint of a classifier")
    if len(options.attention) != 1:
        raise InputError(f"--attention {','.join(options.attention)}: a checkpoint is of one row")

    from rich.console import Console

    from bench.config.suites import load_suite, profile_configs
    from bench.data.generated import data_root
    from bench.model.build import refusing, weights_notes
    from bench.model.classifier import build_classifier
    from bench.model.weights import load_classes, load_classifier, load_file, load_settings
    from bench.run.evaluate import remarks
    from bench.run.pretrain import MECHANISM, evaluate
    from bench.system.devices import make_fabric
    from bench.system.progress import Bar

    suite, backbone = ("pretrain", "small") if options.data else ("pretrain-quick", "quick")
    backbone = options.backbone or backbone
    overrides = [*options.overrides]
    if not any(word.startswith("train.precision=") for word in overrides):
        overrides.append("train.precision=32-true")
    if options.batch_size:
        overrides.append(f"evaluate.batch_size={options.batch_size}")
    if options.image_size:
        overrides.append(f"data.fixed_size={list(options.image_size)}")
    if options.position:
        (named,) = profile_configs(options.attention, backbone=backbone, position=options.position)
        overrides.append(f"model.arch={named.model.arch}")
    settings = load_settings(options.weights)
    own = {} if options.schedule else _own(settings, overrides)
    overrides += [f"{name}={json.dumps(value)}" for name, value in own.items()]
    (config,) = load_suite(
        suite,
        rows=options.attention,
        backbone=backbone,
        schedule=options.schedule,
        data=options.data,
        device=options.device,
        overrides=overrides,
    ).runs
    root = data_root(config, options.output or Path("results") / "pretrain")
    trained = load_classes(options.weights)
    split, notes = _split(root, trained, str(options.weights))
    notes += weights_notes(config, settings)
    notes += _edited(config, settings.get(MECHANISM) or {})
    with refusing(config):
        module = build_classifier(config, len(split.classes))
    load_classifier(module.vil, load_file(options.weights), str(options.weights))
    fabric = make_fabric(config)
    console = Console(emoji=False, stderr=True)
    with Bar("evaluating", len(split), console=console) as bar:
        section = evaluate(
            fabric.setup_module(module), split, config, fabric, lambda share, _: bar.update(share)
        )
    notes += _remarks(root, split, config.data.deep_white) if options.data else []
    notes += remarks(section)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    low, high = section["top1_interval"]["top1"]
    size = "x".join(map(str, section["image_size"]))
    of_weights = f"; {' and '.join(own)} of the weights' own run" if own else ""
    print(
        f"{section['images']} images of {len(split.classes)} classes: top-1 {section['top1']:.2f} %"
        f" (95 % interval {low:.2f} to {high:.2f}), top-5 {section['top5']:.2f} %;"
        f" at {size}, crop share {section['crop_share']:g}{of_weights}"
    )
    result = {"weights": str(options.weights), "evaluation": section, "notes": notes}
    print(json.dumps(result))
    return 0


def _own(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Size, crop and options that weights had in their own run, those not given."""
    from bench.run.pretrain import CROP, SIZE

    given = {word.partition("=")[0] for word in overrides}
    own = {name: settings[name] for name in (SIZE, CROP) if name in settings.keys() - given}
    found = {f"model.options.{name}": v for name, v in settings.get("model.options", {}).items()}
    return own | {name: value for name, value in found.items() if name not in given}


def _edited(config: "RunConfig", before: Mapping[str, str]) -> list[str]:
    """Say which files of a mechanism are not what the weights were trained with."""
    from bench.config.sources import sources_of

    now = {source.name: source.sha256 for source in sources_of(config.model)}
    changed = sorted(name for name in before if name in now and before[name] != now[name])
    return [f"{', '.join(changed)} changed since the weights were trained"] if changed else []


def _remarks(root: Path, split: "ClassDataset", white: int) -> list[str]:
    """What is odd in the images evaluated on; those that the data set trains on too, among it.

    Images to train on need not be there, nor be readable: nothing else is done with them.
    """
    from bench.data.check import class_remarks
    from bench.data.classes import TRAIN, ClassDataset

    try:
        found = class_remarks([ClassDataset(root, TRAIN), split], white)
    except InputError:
        return class_remarks([split], white)
    return [line for line in found if line.startswith(str(split.folder))]


def _split(
    root: Path, trained: tuple[str, ...] | None, weights: str
) -> "tuple[ClassDataset, list[str]]":
    """Open the images to evaluate on, with the classes of the weights, by their names."""
    from bench.data import classes

    if trained is None:
        _, split = classes.open_splits(root)
        note = (
            f"the classes that {weights} was trained on are not known; taken for those of"
            f" {split.folder} by the order of their names: {some(split.classes)}"
        )
        return split, [note]
    own = classes.ClassDataset(root, classes.VAL)
    numbers = tuple(map(str, range(len(trained))))
    if own.classes == numbers[: len(own.classes)] and trained != numbers:
        note = f"{own.folder} has numbers of classes, taken for the order of {some(trained)}"
        return classes.ClassDataset(root, classes.VAL, numbers), [note]
    unknown = [name for name in own.classes if name not in trained]
    if unknown:
        raise InputError(
            f"{own.folder}: no such class among those that {weights} was trained on:"
            f" {some(unknown)}; they are matched by name ({some(trained)})"
        )
    return classes.ClassDataset(root, classes.VAL, trained), []
