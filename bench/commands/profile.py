"""`python -m bench profile`: what mechanisms cost."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.commands._output import FORMATS, show, write
from bench.errors import InputError, choose
from bench.options import image_size, memory_budget, names, positive, seconds

HELP = "measure parameters, FLOPs, memory and latency of one mechanism or many"
EPILOG = """\
examples:
  python -m bench profile --attention longformer
  python -m bench profile --attention all --what parameters,flops
  python -m bench profile --attention ViL,performer,my_attention.py:Mine --image-size 512x512
  python -m bench profile --attention performer --amp --device cuda --batch-size 2
  python -m bench profile --attention ViL --memory-budget 24GB --fit batch-size
  python -m bench profile --attention ViL --sizes val2017

"""
QUANTITIES = ("parameters", "flops", "memory", "latency")
MODES = ("inference", "training")
FITS = ("image-size", "batch-size")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--attention",
        type=names,
        default=("all",),
        metavar="A,B",
        help="mechanisms, rows such as 'Partial ViL', or mechanisms of yours as"
        " package.module:Class or file.py:Class (default: all)",
    )
    parser.add_argument("--backbone", default="small", help="of configs/backbones.yaml (small)")
    parser.add_argument("--method", default="mask_rcnn", help="mask_rcnn (default) or retinanet")
    parser.add_argument(
        "--library", default="torchvision", help="torchvision (default), detectron2 or auto"
    )
    parser.add_argument(
        "--image-size", type=image_size, default=(800, 1344), metavar="HxW", help="(800x1344)"
    )
    parser.add_argument("--batch-size", type=positive, default=1, help="images (1)")
    parser.add_argument("--precision", help="32-true (default), bf16-mixed or 16-mixed")
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision: 16-mixed on a GPU, else bf16-mixed"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
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
    parser.add_argument("--repeats", type=positive, default=10, help="fewest samples (10)")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="they add up to (1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (0)")
    parser.add_argument("--data", metavar="PATH", help="images in COCO layout (default: generated)")
    parser.add_argument(
        "--no-parts", action="store_true", help="measure whole detectors alone, not their parts"
    )
    parser.add_argument(
        "--memory-budget",
        type=memory_budget,
        metavar="24GB",
        help="find the largest square image or batch that is predicted to train within it",
    )
    parser.add_argument("--fit", default="image-size", help="image-size (default) or batch-size")
    parser.add_argument(
        "--sizes", metavar="val2017", help="FLOPs over the true image sizes of a data set"
    )
    parser.add_argument("--format", default="table", help=", ".join(FORMATS))
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write records and tables there too"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of bench/config.py")


def run(options: argparse.Namespace) -> int:
    """Profile and print."""
    choose(options.format, FORMATS, "--format")
    choose(options.fit, FITS, "--fit")
    for mode in options.mode:
        choose(mode, MODES, "--mode")
    for quantity in options.what:
        choose(quantity, QUANTITIES, "--what")
    if options.sizes is not None:
        return _over_sizes(options)
    configs = _configs(options)
    if options.memory_budget is not None:
        return _fit(options, configs)
    return _profile(options, configs)


def _configs(options: argparse.Namespace) -> tuple[Any, ...]:
    from bench.config import profile_configs

    return profile_configs(options.attention, image_size=options.image_size, **_given(options))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of every row, for `profile_configs`."""
    if options.amp and options.precision:
        raise InputError(f"--amp and --precision {options.precision} exclude each other")
    precision = options.precision or "32-true"
    if options.amp:
        precision = "16-mixed" if _on_gpu(options.device) else "bf16-mixed"
    values = {
        "device": options.device,
        "seed": options.seed,
        "model": {"method": options.method, "library": options.library},
        "data": {"path": options.data},
        "train": {"precision": precision},
        "profile": {
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "seconds": options.seconds,
            "training": "training" in options.mode,
        },
    }
    return {"backbone": options.backbone, "values": values, "overrides": options.overrides}


def _on_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _profile(options: argparse.Namespace, configs: Sequence[Any]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from bench import profiler, record
    from bench.runner import make_fabric
    from report import load, page, profiles

    if options.output is not None:
        _check_new(options.output / "records", configs)
    make_fabric(configs[0])
    # Progress goes to stderr, so that JSON and CSV can be piped.
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        records = profiler.profile(
            configs,
            modes=options.mode,
            quantities=options.what,
            by_part=not options.no_parts,
            progress=lambda done, doing: bar.update(task, completed=done, description=doing),
            command=["python", "-m", "bench", *sys.argv[1:]],
        )
    if options.output is not None:
        for entry in records:
            record.write(entry, options.output / "records")
        page.write(load.load(options.output), options.output, title="Profile")
    parts = [table for table in map(profiles.parts, records) if table is not None]
    tables_shown = [profiles.costs(records), *(parts if len(records) == 1 else [])]
    lines = [json.loads(entry.to_json()) for entry in records]
    show(options.format, lines, tables_shown)
    if options.output is not None:
        write(options.output / "tables", [tables_shown[0], *parts])
    return 1 if any(entry.error for entry in records) else 0


def _check_new(folder: Path, configs: Sequence[Any]) -> None:
    """Fail before measuring where a record of the same profile is there already."""
    from bench import record

    for config in configs:
        target = folder / record.done_name(config.row, record.key(config.as_dict()))
        if target.exists():
            raise InputError(
                f"--output {folder.parent}: {target.name} is there already, and a record is never"
                " overwritten; name another folder"
            )


def _fit(options: argparse.Namespace, configs: Sequence[Any]) -> int:
    """The largest image or batch of each row within the budget."""
    from bench import detectors, predict
    from bench.config import profile_configs
    from bench.profiler import build_on_meta
    from report import profiles

    vary = options.fit.replace("-", "_")
    lines = []
    for config in configs:

        def build(size: tuple[int, int], row: str = config.row) -> detectors.Detector:
            (resized,) = profile_configs([row], image_size=size, **_given(options))
            return build_on_meta(resized)

        for mode in options.mode:
            found = predict.fit(
                build,
                budget_bytes=options.memory_budget,
                vary=vary,
                image_size=options.image_size,
                batch_size=options.batch_size,
                mode=mode,
                precision=config.train.precision,
                device="cuda" if _on_gpu(options.device) else options.device.partition(":")[0],
                proposals=config.profile.proposals,
            )
            lines.append({"row": config.row, "mode": mode, **dataclasses.asdict(found)})
    show(options.format, lines, [profiles.fits(lines)])
    return 0


def _over_sizes(options: argparse.Namespace) -> int:
    """FLOPs over the image sizes of a data set."""
    from bench.commands.audit import show_sizes
    from bench.config import profile_configs

    # Positions for the largest image of the data set, whatever size is profiled otherwise.
    return show_sizes(options, profile_configs(options.attention, **_given(options)))
