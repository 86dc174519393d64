"""Run a suite: every row trained, evaluated and measured; then its tables and plots.

A row that has its record is not run again, so the same command continues what was stopped.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bench import record
from bench.cli import (
    Parser,
    add,
    add_files,
    add_overrides,
    file_values,
    image_size,
    names,
    positive,
)
from bench.config import search
from bench.config.probes import SUITE, build_recipe, suite_plan
from bench.config.schema import CLASSIFIER, RunConfig
from bench.config.suites import Reference, Suite, families, load_suite, reference_config, suites
from bench.data.generated import SPLITS
from bench.errors import InputError, choose
from bench.record import Record
from bench.system import logs, processes, slurm
from bench.system.interrupt import EXIT_CODE
from bench.system.locks import LockedError
from bench.system.progress import SuiteProgress
from report import answer, classifiers, load, page, probes, tables
from report import pictures as drawings

if TYPE_CHECKING:
    from bench.run.identity import Identity
    from bench.run.settled import Standing

LAUNCHERS = ("none", "local", "slurm")
COSTS = ("none", "counted", "measured")
_WIDTH = 120
# Settings of what --pretrain runs, such as pretrain.classify.epochs=100.
_PRETRAIN = "pretrain."


def parser() -> Parser:
    """The command line."""
    result = Parser(
        prog="run_all.py",
        description=__doc__,
        epilog=f"""\
suites: {", ".join((*suites(), SUITE))}
  quick     rows with a small backbone on generated images; minutes on a laptop
  ablation  the published ablation: ViL-Small, Mask R-CNN, 1x; needs --data with COCO and a GPU
  zoo       the published model zoo: ViL in four sizes, two methods, two schedules; needs the same
  probes    small tasks that tell mechanisms apart, in minutes on a laptop; of --rows, mechanisms
            are probed as such and other rows as models of two stages
  pretrain  classifiers by the recipe of DeiT, as `python -m bench pretrain` runs it; pretrain-quick
            on generated images

examples:
  python run_all.py
  python run_all.py --rows ViL,performer --seeds 3
  python run_all.py --rows published,linear
  python run_all.py --data my_data --rows ViL train.steps=200 model.method=retinanet
  python run_all.py --train export/train.json --val export/val.json --images export/images
  python run_all.py --rows my_attention.py:MyAttention
  python run_all.py --suite ablation --data /datasets/coco --device cuda
  python run_all.py --suite ablation --data /datasets/coco --method retinanet --schedule 3x
  python run_all.py --suite zoo --rows "ViL-Small RetinaNet 3x" --data /datasets/coco --init vil.pth
  python run_all.py --suite ablation --data /datasets/coco --pretrain /datasets/imagenet --devices 8
  python run_all.py --suite ablation --data /datasets/coco --devices 8
  torchrun --nproc-per-node 8 run_all.py --suite ablation --data /datasets/coco
  python run_all.py --suite ablation --data /datasets/coco --devices 8 --dry-run
  python run_all.py --suite ablation --data /datasets/coco --search drop_path=0.05,0.1,0.2
  python run_all.py --launcher local --jobs 2
  python run_all.py --suite probes
  python run_all.py --suite ablation --data /datasets/coco --devices 8 \\
      --launcher slurm --slurm slurm_partition=gpu,timeout_min=4320

The output folder then holds records/ (one JSON file a run), index.md and index.html (the report),
costs/ (records of what rows cost at full size, which are not counted again), tables/, plots/, logs/
(of each run a readable log, and a JSON line a step), weights/ (of each run what it trained, for
`python -m bench eval --record RECORD`), checkpoints/ of unfinished runs and, for generated data,
data/.

Ctrl-C or SIGTERM ends a run after the step in hand, with a checkpoint; twice ends it at once. The
same command continues. Two commands may share an output folder, but not a row at the same time.

exit code: 0 all rows done; 1 a row failed, the report says why; 2 wrong input; 130 interrupted""",
    )
    add(result, "suite", default="quick", metavar="NAME", help="which suite")
    add(
        result,
        "data",
        metavar="PATH",
        help=f"folder in COCO layout: annotations/instances_{SPLITS[0]}.json, {SPLITS[0]}/, and"
        f" {SPLITS[1]} alike (default: the suite's; quick generates its own)",
    )
    add_files(result, "train", "val", "images")
    add(result, "output", help="where everything goes (default: results/SUITE)")
    add(
        result,
        "device",
        default=None,
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU where there is one)",
    )
    add(result, "seed", default=None, help="seed of everything random (default: 0)")
    add(
        result,
        "seeds",
        metavar="N",
        type=positive,
        help="run each row with N seeds, --seed and those after it, all rows of one seed before the"
        " next; the report then has their means (of other seeds: --search seed=3,5,8)",
    )
    add(
        result,
        "rows",
        metavar="A,B",
        type=names,
        default=(),
        help=f"rows of the suite, families of rows ({', '.join(families())}), all, or mechanisms of"
        " yours as package.module:Class or file.py:Class (default: the suite's default)",
    )
    add(result, "backbone", default=None, help="a backbone (default: the suite's)")
    add(
        result,
        "schedule",
        metavar="NAME",
        help="recipe of the training: 1x, 3x or quick (default: the suite's); of the zoo, the rows"
        " that have it",
    )
    add(result, "method", default=None, help="method of detection (default: the suite's), likewise")
    add(
        result,
        "retry-failed",
        action="store_true",
        help="run again the rows whose record is a failure",
    )
    add(
        result,
        "init",
        metavar="CHECKPOINT",
        help="start from the backbone of a classifier, or from a detector (default: from scratch);"
        " a folder of ROW.pth, or a pattern such as pretrained/{row}.pth, has one for each row",
    )
    add(
        result,
        "pretrain",
        metavar="DATA",
        help="first pretrain a classifier for each row that has none, on a folder of classes such"
        " as ImageNet, or on 'generated' images, and start the row from it; in OUTPUT/pretrain,"
        " with settings as pretrain.classify.epochs=100",
    )
    add(
        result,
        "init-partial",
        action="store_true",
        help="let rows of several mechanisms start from what fits of one file",
    )
    add(
        result,
        "no-weights",
        action="store_true",
        help="keep no weights of finished runs (default: in weights/)",
    )
    add(
        result,
        "no-pictures",
        action="store_true",
        help="draw nothing of what rows find in a few images and what a query of them sees",
    )
    add(
        result,
        "search",
        metavar="NAME=A,B",
        help="run each row with each value of a setting, such as drop_path=0.05,0.1,0.2, and say"
        " which is best",
    )
    processes = result.add_argument_group("processes and machines")
    add(
        processes,
        "devices",
        metavar="N",
        type=positive,
        help="devices of this machine that share each run, a process each; under torchrun or srun"
        " it is their number of processes (default: 1)",
    )
    add(
        processes,
        "launcher",
        choices=LAUNCHERS,
        default="none",
        help="none runs one row after the other; local runs --jobs of them side by side; slurm"
        " submits each as a job, which requeues and resumes when preempted",
    )
    add(processes, "jobs", metavar="N", type=positive, default=2, help="rows side by side")
    add(
        processes,
        "slurm",
        metavar="KEY=VALUE,…",
        help="parameters of submitit's executor, such as slurm_partition=gpu,timeout_min=4320",
    )
    costs = result.add_argument_group("costs at full size")
    add(
        costs,
        "costs",
        choices=COSTS,
        default="counted",
        help="counted: parameters, FLOPs and predicted memory of each row at --reference; measured:"
        " besides, latency and memory of its attention layers on this machine, in minutes",
    )
    add(
        costs,
        "reference",
        type=image_size,
        default="800x1344",
        metavar="HxW",
        help="size of the images; batch of 2, mixed precision on a GPU, and the quick suite's rows"
        " as ViL-Small with the published detector",
    )
    look = result.add_argument_group("looking")
    add(
        look,
        "dry-run",
        action="store_true",
        help="print what would run, its schedule, memory and time, and run nothing",
    )
    add(
        look,
        "measure-steps",
        metavar="N",
        type=positive,
        help="in a dry run, time N training steps of each row on one device here",
    )
    add(
        look,
        "tensorboard",
        action="store_true",
        help="write TensorBoard's events, to tensorboard/",
    )
    # Of a row that was started for a suite, which measures latency and writes its report itself.
    result.add_argument("--no-report", action="store_true", help=argparse.SUPPRESS)
    result.add_argument("--no-latency", action="store_true", help=argparse.SUPPRESS)
    add_overrides(result)
    return result


def main(arguments: Sequence[str] | None = None, prog: str = "run_all.py") -> int:
    """Run the command line and return its exit code; `prog` is what an error says failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = ["python", "run_all.py", *given]
    processes.end_with_parent()
    logs.tolerate_encoding()
    _set_up_logging()
    # A preempted job gets SIGTERM; it ends as an interrupted one does. Not by way of SIGINT,
    # which shells make processes in the background ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    first = True
    try:
        options = parser().parse(given)
        files = file_values(options)
        choose(options.suite, (*suites(), SUITE), "suite")
        if options.suite == SUITE:
            return _probe(options, command)
        if options.train or options.val:
            options.data = options.data or str(Path(options.train or options.val).parent)
        # As JSON, which YAML reads as it is; the rows of a launcher are given them so.
        options.overrides += [
            f"data.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in files.items()
        ]
        world = processes.world()
        first = world.is_first
        if options.tensorboard:
            logs.check_tensorboard()
        if options.pretrain is not None:
            code = _pretrain(options, world)
            if code is not None:
                return code
        plain = _load(options, world)
        suite, bases = _expanded(plain, options)
        output = options.output or Path("results") / suite.name
        if options.dry_run:
            return _dry_run(suite, output, options.retry_failed, options.measure_steps or 0)
        _check_needs(suite)
        costs = _costs(suite, bases, options)
        if options.launcher != "none":
            return _launch(suite, bases, output, options, command, costs)
        if suite.runs[0].train.devices > 1 and world.size == 1:
            return processes.spawn(processes.this_command(given), suite.runs[0].train.devices)
        return run_suite(
            suite,
            output,
            Console(quiet=not first),
            command=command,
            retry_failed=options.retry_failed,
            report=not options.no_report and first,
            tensorboard=options.tensorboard,
            keep_weights=not options.no_weights,
            latency=not options.no_latency,
            costs=costs,
            draw=not options.no_pictures,
        )
    except InputError as error:
        if first:
            print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_CODE


def _probe(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the suite of probes, whose tasks and models are its own."""
    usual = vars(parser().parse([]))
    for name in ("suite", "output", "rows", "overrides", "retry_failed", "no_report"):
        del usual[name]
    for name, value in usual.items():
        if getattr(options, name) != value:
            raise InputError(
                f"--{name.replace('_', '-')} says nothing to suite {SUITE}, whose tasks and models"
                " are its own; it takes --rows, --output, --retry-failed and settings such as"
                " seeds=[0,1]"
            )
    recipe = build_recipe(options.overrides)
    output = options.output or Path("results") / SUITE
    _check_output(output)
    # Imported here, as in `run_suite`.
    from bench.run import probe

    records = probe.run(
        suite_plan(options.rows, probe.TASK_NAMES, recipe),
        output,
        command=command,
        say=lambda line: print(line, flush=True),
        retry_failed=options.retry_failed,
    )
    if not options.no_report:
        title = f"Suite {SUITE}"
        path = page.write(load.load(output), output, title=title, probes=probes.load(output))
        for table in probes.tables(records):
            print(tables.to_text(table.shown, _WIDTH))
        print(f"report: {path} and {path.with_suffix('.html')}")
    return int(any(one.status == "failed" for one in records))


def _load(options: argparse.Namespace, world: processes.World) -> Suite:
    overrides = list(options.overrides)
    devices = options.devices or (world.size if world.size > 1 else None)
    if devices is not None:
        overrides.append(f"train.devices={devices}")
    suite = load_suite(
        options.suite,
        rows=options.rows,
        backbone=options.backbone,
        schedule=options.schedule,
        method=options.method,
        data=options.data,
        seed=options.seed,
        device=options.device,
        overrides=overrides,
    )
    return suite if options.init is None else _started(suite, options.init, options.init_partial)


def _expanded(plain: Suite, options: argparse.Namespace) -> tuple[Suite, dict[str, str]]:
    """Return the suite with the values of --search and the seeds, and which row each row is of."""
    searched = search.parse(options.search) if options.search else None
    of_seeds = searched is not None and searched.path == search.SEED
    for option in ("seed", "seeds"):
        if of_seeds and getattr(options, option) is not None:
            raise InputError(
                f"--search {options.search} and --{option} {getattr(options, option)} both say"
                " which seeds are run; leave one of them out"
            )
    suite, bases = plain, {config.row: config.row for config in plain.runs}
    if searched is not None:
        suite = search.expand(plain, searched)
        bases = {searched.row(row, value): row for row in bases for value in searched.values}
    if options.seeds is not None:
        first = plain.runs[0].seed
        suite = search.expand(
            suite, search.Search(search.SEED, tuple(range(first, first + options.seeds)))
        )
    return suite, bases


@dataclass(frozen=True)
class Costs:
    """What is to be known of the costs of rows at full size.

    Attributes:
        configs: of the rows, at that size.
        measured: whether attention layers are measured besides.
    """

    configs: tuple[RunConfig, ...] = ()
    measured: bool = False


def _costs(suite: Suite, bases: Mapping[str, str], options: argparse.Namespace) -> Costs:
    """What --costs and --reference ask for; the values of a search share theirs where they can."""
    if options.costs == "none" or suite.runs[0].model.method == CLASSIFIER:
        return Costs()
    reference = Reference(image_size=options.reference)
    found: list[RunConfig] = []
    for base in dict.fromkeys(bases.values()):
        runs = [run for run in suite.runs if bases[run.row] == base]
        same = [reference_config(run, base, reference) for run in runs]
        own = {run.row: reference_config(run, run.row, reference) for run in runs}
        found += same[:1] if all(one == same[0] for one in same) else own.values()
    return Costs(tuple(found), options.costs == "measured")


def _pretrain(options: argparse.Namespace, world: processes.World) -> int | None:
    """Pretrain what the rows of a suite start from, and name it as their --init.

    Returns:
        The exit code where this is all that the command does, else None.
    """
    if options.init is not None:
        raise InputError("--pretrain makes what rows start from, and --init names it; give one")
    own = [word for word in options.overrides if word.startswith(_PRETRAIN)]
    options.overrides = [word for word in options.overrides if word not in own]
    suite = load_suite(options.suite, rows=options.rows, backbone=options.backbone)
    if suite.backbone is None:
        raise InputError(f"--pretrain: the rows of suite {suite.name} have several backbones")
    output = (options.output or Path("results") / suite.name) / "pretrain"
    files = [output / f"{record.slug(run.row)}.pth" for run in suite.runs]
    # Processes of one run find what the command that started them made.
    if world.size == 1:
        generated = options.pretrain == "generated"
        arguments = ["--suite", "pretrain-quick" if generated else "pretrain"]
        arguments += ["--rows", ",".join(run.row for run in suite.runs), "--output", str(output)]
        arguments += ["--backbone", suite.backbone, "--jobs", str(options.jobs)]
        arguments += [] if generated else ["--data", options.pretrain]
        for name in ("device", "seed", "devices", "launcher", "slurm", "measure_steps"):
            value = getattr(options, name)
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        for name in ("retry_failed", "tensorboard", "dry_run"):
            if getattr(options, name):
                arguments.append(f"--{name.replace('_', '-')}")
        code = main([*arguments, *(word.removeprefix(_PRETRAIN) for word in own)])
        if code or (options.launcher == "slurm" and not all(file.is_file() for file in files)):
            return code
    if all(file.is_file() for file in files) or not options.dry_run:
        options.init = str(output / "{row}.pth")
    return None


def _started(suite: Suite, init: str, partial: bool) -> Suite:
    """Give each row the checkpoint that it starts from.

    Args:
        init: a file for all rows, a folder of `ROW.pth`, or a pattern with `{row}`.
        partial: let rows of several mechanisms take what fits of one file.
    """
    pattern = str(Path(init) / "{row}.pth") if Path(init).is_dir() else init
    models = (run.model for run in suite.runs)
    several = len({(model.attention, model.arch, str(model.dense)) for model in models}) > 1
    if "{row}" not in pattern and several and not partial:
        raise InputError(
            f"--init {init} is one file for rows of several mechanisms, each of which would take"
            " what fits of it: name a folder of ROW.pth, or a pattern such as"
            " pretrained/{row}.pth, for one each; --init-partial allows it"
        )
    runs = []
    for run in suite.runs:
        names = dict.fromkeys((run.row, record.slug(run.row)))
        places = list(dict.fromkeys(pattern.replace("{row}", name) for name in names))
        found = next((place for place in places if Path(place).is_file()), None)
        if found is None:
            raise InputError(f"--init {init}: row {run.row}: no such file {' or '.join(places)}")
        runs.append(dataclasses.replace(run, train=dataclasses.replace(run.train, init=found)))
    return dataclasses.replace(suite, runs=tuple(runs))


def _check_needs(suite: Suite) -> None:
    if suite.needs is not None and any(config.data.path is None for config in suite.runs):
        raise InputError(
            f"suite {suite.name} needs {suite.needs}: name its folder with --data, or set"
            " $DETECTRON2_DATASETS to the folder that holds coco/; `python -m bench data coco"
            " --root DIR` downloads it"
        )


def _dry_run(suite: Suite, output: Path, retry_failed: bool, measure_steps: int) -> int:
    # Imported here, as in `run_suite`.
    from bench.run import plan, settled

    if measure_steps:
        _check_output(output)
    print(f"suite {suite.name}: what would run, to {output}", flush=True)
    standings = settled.survey(suite.runs, output, retry_failed=retry_failed)
    for standing in standings:
        if standing.record is not None or standing.note:
            print(standing.note or f"{suite.name_of(standing.config)} has its record")
    missing = tuple(standing.config for standing in standings if standing.record is None)
    if not missing:
        return 0
    suite = dataclasses.replace(suite, runs=missing)
    with Console(stderr=True).status("planning") as status:
        planned = plan.plan(
            suite,
            output,
            measure_steps=measure_steps,
            tell=lambda row: status.update(f"planning {row}"),
        )
    print(tables.to_text(plan.table(planned), _WIDTH))
    for line in plan.lines(planned, measure_steps):
        print(textwrap.fill(line, _WIDTH, subsequent_indent="  "))
    return 0


def _launch(
    suite: Suite,
    bases: Mapping[str, str],
    output: Path,
    options: argparse.Namespace,
    command: Sequence[str],
    costs: Costs,
) -> int:
    """Run the missing rows as processes of their own.

    Args:
        bases: the name of each row without the value of a search.
    """
    devices, local = suite.runs[0].train.devices, options.launcher == "local"
    console = Console()
    # The machine that submits jobs need not have their devices and data.
    standings = _survey(
        suite, output, console, options.retry_failed, processes=devices, check=local
    )
    jobs = []
    for standing in standings:
        if standing.record is None:
            base, name = bases[standing.config.row], suite.name_of(standing.config)
            arguments = _row_arguments(standing.config, base, output, options)
            log = output / "logs" / f"{record.slug(name)}.out"
            jobs.append(processes.Job(name, tuple(processes.this_command(arguments)), log))
    if not local:
        gpus = 0 if suite.runs[0].device == "cpu" else devices
        folder, parameters = output / "slurm", slurm.read_options(options.slurm)
        handles = slurm.submit(jobs, folder=folder, gpus=gpus, options=parameters)
        for job, handle in zip(jobs, handles, strict=True):
            print(f"{job.row}: submitted as job {handle.job_id}")
        print(f"Their output is in {folder}; when they are done, the same command without")
        print("--launcher writes the report.")
        return 0
    code = processes.run_local(
        jobs, count=options.jobs, devices=devices, say=lambda line: print(line, flush=True)
    )
    if code not in (0, 1):
        return code
    identities = [standing.identity for standing in standings]
    _measure_latency(identities, output, console, command=command)
    if not options.no_pictures:
        _make_pictures(identities, output, console)
    found = _count_costs(costs, output, console, command=command)
    return _report(suite, output, identities, found)


def _row_arguments(
    config: RunConfig, base: str, output: Path, options: argparse.Namespace
) -> list[str]:
    """The command line of one row of a suite, as a person would type it."""
    arguments = ["--suite", options.suite, "--rows", base, "--output", str(output), "--no-report"]
    arguments += ["--seed", str(config.seed)]
    for name in ("backbone", "schedule", "method", "data", "device", "devices", "init"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name}", str(value)]
    if config.row != base:
        arguments += ["--search", config.row.removeprefix(f"{base} (").removesuffix(")")]
    if options.launcher == "local":
        arguments.append("--no-latency")
    for name in ("retry_failed", "tensorboard", "no_weights", "init_partial"):
        if getattr(options, name):
            arguments.append(f"--{name.replace('_', '-')}")
    return [*arguments, *(word for word in options.overrides if not word.startswith("seed="))]


def run_suite(
    suite: Suite,
    output: Path,
    console: Console,
    *,
    command: Sequence[str],
    retry_failed: bool = False,
    report: bool = True,
    tensorboard: bool = False,
    keep_weights: bool = True,
    latency: bool = True,
    costs: Costs = Costs(),
    draw: bool = True,
) -> int:
    """Run what is missing of a suite, write the report and print its table.

    All processes that share the runs call this; the first decides what is missing.
    """
    # Imported here: torch takes seconds, which `--help` and wrong input should not cost.
    from bench.run import runner
    from bench.system import devices

    how = runner.Options(
        command=command, tensorboard=tensorboard, keep_weights=keep_weights, latency=False
    )
    standings = devices.decide_in_first(
        suite.runs[0], lambda: _survey(suite, output, console, retry_failed)
    )
    missing = [standing for standing in standings if standing.record is None]
    failed = any(s.record is not None and s.record.status == "failed" for s in standings)
    with SuiteProgress(len(missing), console=console) as progress:
        how = dataclasses.replace(how, progress=progress.update)
        for standing in missing:
            row = suite.name_of(standing.config)
            progress.row(row)
            try:
                result = runner.run(
                    standing.config, output=output, identity=standing.identity, options=how
                )
            except LockedError as error:
                progress.finish_row(f"being run by {error.holder}; left to it")
                failed = True
                continue
            except runner.AbandonedError as error:
                if not error.recorded_before:
                    print(f"{row}: failed in one process: {error}", file=sys.stderr, flush=True)
                # The other processes hold what an orderly end would wait for.
                os._exit(processes.ABANDONED)
            progress.finish_row(_outcome(result))
            failed |= result.status == "failed"
    devices.close_group()
    if not processes.world().is_first:
        return int(failed)
    processes.forget_world()
    identities = [standing.identity for standing in standings]
    if latency:
        _measure_latency(identities, output, console, command=command)
    if not report:
        return int(failed)
    if draw:
        _make_pictures(identities, output, console)
    found = _count_costs(costs, output, console, command=command)
    return max(_report(suite, output, identities, found), int(failed))


def _survey(
    suite: Suite,
    output: Path,
    console: Console,
    retry_failed: bool,
    *,
    processes: int | None = None,
    check: bool = True,
) -> list["Standing"]:
    """Say which rows have their record, and check what the others need before they cost time.

    Args:
        processes: of each run, if they are not started yet.
        check: read the data of the rows that are to be run.
    """
    from bench.data import split as inputs
    from bench.run import settled

    _check_output(output)
    standings = settled.survey(suite.runs, output, retry_failed=retry_failed)
    missing = [standing for standing in standings if standing.record is None]
    have, rows = len(standings) - len(missing), len({run.row for run in suite.runs})
    seeds = f" ({rows} rows, seeds {', '.join(map(str, suite.seeds))})"
    console.print(
        f"suite {suite.name}: {len(missing)} of {len(standings)} rows to run"
        + (f", {have} have their record" if have else "")
        + (seeds if len(suite.seeds) > 1 else ""),
        highlight=False,
    )
    if suite.more:
        console.print(
            f"not among them: {len(suite.more)} more rows; --rows takes their names, all, or"
            f" {', '.join(families())}",
            highlight=False,
            soft_wrap=True,
        )
    _check_free(missing, output)
    notes = list(dict.fromkeys(standing.note for standing in missing if standing.note))
    if missing and check:
        configs = [standing.config for standing in missing]
        notes += inputs.check_data(configs, output, processes=processes)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return standings


def _check_free(standings: Sequence["Standing"], output: Path) -> None:
    """Stop before anything has cost time where another command does one of the runs."""
    from bench.run import runner

    for standing in standings:
        try:
            with runner.claimed(standing.identity, output):
                pass
        except LockedError as error:
            raise InputError(
                f"row {standing.config.row} is being run in {output} by {error.holder}; wait for"
                " it, or name another --output"
            ) from error


def _measure_latency(
    identities: Sequence["Identity"], output: Path, console: Console, *, command: Sequence[str]
) -> None:
    """Measure the latency of all rows together, where one has none yet."""
    from bench.run import settled, timing

    records = settled.chosen(identities, load.load(output))
    if not timing.untimed(records, output):
        return
    console.print("measuring latency of all rows, in rounds", highlight=False)
    with console.status("") as status:
        timing.measure(
            records,
            output,
            command=command,
            progress=lambda share, doing: status.update(f"{share:.0%} {doing}"),
        )


def _make_pictures(identities: Sequence["Identity"], output: Path, console: Console) -> None:
    """Let rows find what is in a few images, those that have kept weights and did not yet."""
    from bench.run import pictures, settled

    records = settled.chosen(identities, load.load(output))
    with console.status("") as status:
        for line in pictures.make(
            records, output, tell=lambda row: status.update(f"pictures of {row}")
        ):
            console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)


def _count_costs(
    costs: Costs, output: Path, console: Console, *, command: Sequence[str]
) -> list[Record]:
    """Count what rows cost at full size, where that has no record yet."""
    if not costs.configs:
        return []
    from bench.measure import reference

    folder, configs = output / record.COSTS, costs.configs
    size = "x".join(map(str, configs[0].profile.image_size))
    console.print(f"costs of {len(configs)} rows at {size}", highlight=False)
    with console.status("") as status:
        found = reference.count(
            configs, folder, command=command, progress=lambda row: status.update(f"counted {row}")
        )
        if costs.measured:
            found += reference.measure_layers(
                configs,
                folder,
                command=command,
                progress=lambda share, doing: status.update(f"{share:.0%} {doing}"),
            )
    return found


def _report(
    suite: Suite, output: Path, identities: Sequence["Identity"], costs: Sequence[Record]
) -> int:
    from bench.run import settled

    records = settled.chosen(identities, load.load(output))
    if suite.runs[0].model.method == CLASSIFIER:
        found, path = classifiers.comparison(records), output / "classifiers.md"
        where = str(path)
        path.write_text(f"# {found.title}\n\n{tables.to_markdown(found.shown)}", encoding="utf-8")
        print(tables.to_text(found.shown, _WIDTH))
    else:
        where = _page(suite, records, output, costs)
    failed = [entry for entry in records if entry.status == "failed"]
    for label, entry in zip(load.labels(records), records, strict=True):
        if entry in failed:
            print(f"{label}: failed, {(entry.error or {}).get('message')}")
    if failed:
        print("Failed rows are run again with --retry-failed.")
    print(f"report: {where}")
    return 1 if failed else 0


def _page(suite: Suite, records: Sequence[Record], output: Path, costs: Sequence[Record]) -> str:
    """Write the page, print the main tables, and return where it is."""
    title, probed = f"Suite {suite.name}", probes.load(output)
    drawn = drawings.load(records, output)
    path = page.write(records, output, title=title, costs=costs, probes=probed, drawn=drawn)
    for found in answer.first(records, costs, probes.profile(probed)):
        print(answer.to_text(found, _WIDTH))
    for table in [*tables.comparison(records), *tables.searches(records)]:
        print(tables.to_text(table.shown, _WIDTH))
    return f"{path} and {path.with_suffix('.html')}"


def _check_output(output: Path) -> None:
    """Fail now, not after the first row, where the output cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be written: {error.strerror}; name another folder"
        ) from error


def _outcome(result: Record) -> str:
    if result.error is not None:
        return f"failed, {result.error['message']}"
    evaluation = result.evaluation or {}
    if "top1" in evaluation:
        return f"done, top-1 {evaluation['top1']:.1f} %"
    box = evaluation.get("box") or {}
    return f"done, box AP {box['AP']:.1f}" if box.get("AP") is not None else "done"


def _set_up_logging() -> None:
    """Warnings to the terminal; what libraries say of themselves, not."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    sys.exit(main())
