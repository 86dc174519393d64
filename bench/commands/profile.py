"""`python -m bench profile`: what mechanisms cost."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli import (
    add,
    add_overrides,
    add_precision,
    add_what,
    memory_budget,
    on_gpu,
    precision,
)
from bench.commands._output import FORMATS, progress, show
from bench.config.schema import LIBRARIES, ON_DEMAND, QUANTITIES
from bench.errors import InputError

if TYPE_CHECKING:
    from bench.config.schema import RunConfig
    from bench.measure.sizes import SizesReport

HELP = "measure parameters, FLOPs, memory and latency of one mechanism or many"
EPILOG = """\
examples:
  python -m bench profile --attention longformer
  python -m bench profile --attention all --what parameters,flops
  python -m bench profile --attention ViL,performer,my_attention.py:Mine --image-size 512x512
  python -m bench profile --attention performer --amp --device cuda --batch-size 2
  python -m bench profile --attention ViL --memory-budget 24GB --fit batch-size
  python -m bench profile --attention ViL --what throughput --image-size 256x320
  python -m bench profile --attention ViL --sizes val2017
  python -m bench profile --attention ViL,full --search checkpoint=false,true

"""
FITS = ("image-size", "batch-size")
_MODEL = (
    *("attention", "backbone", "method", "library", "format"),
    *("precision", "amp", "device", "seed"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add(parser, "attention", "backbone", "method")
    add(
        parser,
        "library",
        choices=LIBRARIES,
        default="torchvision",
        setting="model.library",
        help="library of the detector",
    )
    add(parser, "image-size", default="800x1344", setting="profile.image_size")
    add(parser, "batch-size")
    add_precision(parser)
    add(parser, "device")
    add(parser, "mode", setting="profile.training", said=lambda modes: "training" in modes)
    add_what(parser, QUANTITIES, ON_DEMAND)
    add(parser, "repeats", default=10)
    add(parser, "seconds", default="1")
    add(parser, "seed")
    add(
        parser,
        "data",
        metavar="DIR",
        setting="data.path",
        help="images in COCO layout (default: generated)",
    )
    add(
        parser,
        "no-parts",
        action="store_true",
        help="measure whole detectors alone, not their parts",
    )
    add(
        parser,
        "memory-budget",
        type=memory_budget,
        metavar="24GB",
        help="find the largest square image or batch that is predicted to fit into it",
    )
    add(
        parser,
        "fit",
        choices=FITS,
        default="image-size",
        needs="memory-budget",
        help="which of them --memory-budget finds",
    )
    add(
        parser,
        "search",
        metavar="KEY=V1,V2",
        help="each row once for each value of a setting, such as checkpoint=false,true",
    )
    add(
        parser,
        "sizes",
        metavar="val2017",
        help="FLOPs of whole detectors over the true image sizes of a data set",
    )
    add(parser, "format", choices=FORMATS)
    add(parser, "output", help="write records and tables there too")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Profile and print."""
    if options.sizes is not None:
        _check_besides(options, "sizes", "output")
        return _over_sizes(options)
    by_default = "image_size" not in options.given
    configs, bases = _configs(options, options.attention, options.image_size, by_default)
    if options.memory_budget is not None:
        _check_besides(
            options, "memory_budget", *("fit", "image_size", "batch_size", "mode", "search")
        )
        return _fit(options, configs, bases)
    return _profile(options, configs)


def _check_besides(options: argparse.Namespace, option: str, *more: str) -> None:
    """Refuse options that one which does something else would ignore."""
    for name in options.given:
        if name not in (*_MODEL, option, *more):
            said = f"--{name} has no effect with --{option}"
            raise InputError(said.replace("_", "-"))


def _configs(
    options: argparse.Namespace,
    names: Sequence[str],
    size: tuple[int, int],
    by_default: bool = False,
) -> tuple[Sequence["RunConfig"], dict[str, str]]:
    """Return the configurations of rows, and the name of each without the value of a search."""
    from bench.config import variants
    from bench.config.suites import Suite, profile_configs

    searched = variants.values_of(options.search)
    configs = profile_configs(
        names, image_size=size, is_default=by_default, searched=searched, **_given(options)
    )
    suite, bases = variants.expanded(
        Suite("profile", tuple(configs)),
        text=options.search,
        seed=None,
        seeds=None,
        settings=options.overrides + [f"profile.image_size={list(size)}"] * (not by_default),
    )
    return suite.runs, bases


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say of every row, for `profile_configs`."""
    values = {
        "device": options.device,
        "seed": options.seed,
        "model": {"method": options.method, "library": options.library},
        "data": {"path": options.data},
        "train": {"precision": precision(options)},
        "profile": {
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "seconds": options.seconds,
            "training": "training" in options.mode,
        },
    }
    from bench.config.suites import MEASURED

    return {
        "backbone": options.backbone,
        "values": values,
        "overrides": options.overrides,
        "used": MEASURED,
    }


def _profile(options: argparse.Namespace, configs: Sequence[Any]) -> int:
    from bench import record
    from bench.measure import profile as profiler
    from bench.system.devices import make_fabric
    from bench.system.progress import Bar
    from report import load, page, profiles

    make_fabric(configs[0])
    if options.output is not None:
        record.check_output(options.output, configs[0].suite)
        _check_new(options.output / record.RECORDS, configs)
    with Bar("profiling", 100, unit=" %") as bar:
        records = profiler.profile(
            configs,
            modes=options.mode,
            quantities=options.what,
            by_part=not options.no_parts,
            progress=bar.update,
            command=["python", "-m", "bench", *sys.argv[1:]],
        )
    errors = [entry.error for entry in records]
    if all(error and error["kind"] == "input" for error in errors):
        raise InputError((errors[0] or {})["message"])
    if options.output is not None:
        for entry in records:
            record.write(entry, options.output / record.RECORDS)
    parts = [table for table in map(profiles.parts, records) if table is not None]
    rates = profiles.throughput(records)
    costs = [profiles.costs(records), *([rates] if rates else [])]
    lines = [json.loads(entry.to_json()) for entry in records]
    show(options.format, lines, costs + (parts if len(records) == 1 else []))
    if options.output is not None:
        found = load.load(options.output)
        path = page.write(found, options.output, title="Profile", profiled=costs + parts)
        print(f"report: {path} and {path.with_suffix('.html')}", file=sys.stderr)
    return 1 if any(errors) else 0


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


def _fit(options: argparse.Namespace, configs: Sequence["RunConfig"], bases: dict[str, str]) -> int:
    """Find the largest image or batch of each row within the budget."""
    from bench.measure import predict
    from bench.measure.costs import build_on_meta
    from bench.model import detectors
    from bench.model.build import refusing
    from report import profiles

    vary = options.fit.replace("-", "_")
    lines = []
    for config in configs:
        # One that is not here may be asked about; "auto" is what is here.
        named = config.device.partition(":")[0].replace("auto", "cpu")
        device = "cuda" if on_gpu(config.device) else named

        def build(size: tuple[int, int], row: str = config.row) -> detectors.Detector:
            resized, _ = _configs(options, [bases[row]], size)
            own = next(one for one in resized if one.row == row)
            with refusing(own):
                return build_on_meta(own)

        for mode in options.mode:
            found = predict.fit(
                build,
                budget_bytes=options.memory_budget,
                vary=vary,
                image_size=config.profile.image_size,
                batch_size=config.profile.batch_size,
                mode=mode,
                precision=config.train.precision,
                device=device,
                proposals=config.profile.proposals,
            )
            lines.append({"row": config.row, "mode": mode, **dataclasses.asdict(found)})
    show(options.format, lines, [profiles.fits(lines)])
    return 0


def _over_sizes(options: argparse.Namespace) -> int:
    """Count FLOPs over the image sizes of a data set.

    Raises:
        InputError: for an unknown data set.
    """
    from bench.config.suites import SIZED, profile_configs
    from bench.measure import sizes
    from bench.measure.costs import build_on_meta
    from bench.model.build import refusing
    from report import counts

    sizes.image_sizes(options.sizes)
    # Positions for the largest image of the data set, whatever size is profiled otherwise.
    given = _given(options) | {"used": SIZED}
    configs = profile_configs(options.attention, **given)

    def count(config: "RunConfig") -> dict[str, Any]:
        proposals = config.profile.proposals
        with refusing(config):
            detector = build_on_meta(config)
        report = sizes.count_over(detector, options.sizes, proposals=proposals)
        return _sizes_line(config, report)

    lines = list(progress(map(count, configs), lambda line: line["row"]))
    show(
        options.format,
        lines,
        [counts.sizes(lines)],
        text=[counts.histogram(line) for line in lines if not line["fixed_size"]],
        output=options.output,
    )
    return 0


def _sizes_line(config: "RunConfig", report: "SizesReport") -> dict[str, Any]:
    return {
        **dataclasses.asdict(report),
        "row": config.row,
        "family": config.model.attention.partition(",")[0],
        "images": report.images,
        "mean": report.mean,
        "deviation": report.deviation,
        "minimum": report.minimum,
        "maximum": report.maximum,
        "histogram": report.histogram(),
    }
