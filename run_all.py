"""Run a suite: every row trained, evaluated and measured; then its tables and plots.

A row that has its record is not run again, so the same command continues what was stopped.
"""

import argparse
import dataclasses
import functools
import gc
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.system.interrupt import EXIT_CODE, SIGNALS, ending_at_once, raised_where_it_arrives

with ending_at_once():
    from rich.console import Console

    from bench.cli import (
        Parser,
        add,
        add_files,
        add_overrides,
        as_arguments,
        file_values,
        image_size,
        names,
        positive,
    )
    from bench.config import variants
    from bench.config.probes import SUITE, build_recipe, suite_plan
    from bench.config.schema import RunConfig
    from bench.config.suites import Reference, Suite, check_needs, families, load_suite, suites
    from bench.config.values import assigned, merged
    from bench.data.generated import SPLITS
    from bench.errors import InputError, choose
    from bench.record import Record, check_output, code_at_start, slug
    from bench.system import logs, processes

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
        setting="data.path",
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
    add(result, "retry-failed")
    add(
        result,
        "init",
        metavar="CHECKPOINT",
        setting="train.init",
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
        needs="init",
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
    add(processes, "devices", "launcher", "jobs", "slurm")
    full_size = result.add_argument_group("costs at full size")
    add(
        full_size,
        "costs",
        choices=variants.COSTS,
        default="counted",
        help="counted: parameters, FLOPs and predicted memory of each row at --reference; measured:"
        " besides, latency and memory of its attention layers on this machine, in minutes",
    )
    add(
        full_size,
        "reference",
        type=image_size,
        needs="costs=counted|measured",
        default="800x1344",
        metavar="HxW",
        help="size of the images; batch of 2, mixed precision on a GPU, and the quick suite's rows"
        " as ViL-Small with the published detector",
    )
    look = result.add_argument_group("looking")
    add(look, "dry-run", "measure-steps", "tensorboard")
    # Of a row that was started for a suite, which measures latency and writes its report itself.
    result.add_argument("--no-report", action="store_true", help=argparse.SUPPRESS)
    result.add_argument("--no-latency", action="store_true", help=argparse.SUPPRESS)
    add_overrides(result)
    return result


def main(arguments: Sequence[str] | None = None, prog: str = "run_all.py") -> int:
    """Run the command line and return its exit code; `prog` is what an error says failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    processes.end_with_parent()
    logs.tolerate_encoding()
    _set_up_logging()
    first = True
    try:
        options = parser().parse(given)
        choose(options.suite, (*suites(), SUITE), "suite")
        code_at_start()
        # A preempted job gets SIGTERM; it ends as an interrupted one does. Not by way of SIGINT,
        # which shells make processes in the background ignore.
        with raised_where_it_arrives(*SIGNALS):
            if options.suite == SUITE:
                return _probe(options, _command(given))
            world = processes.world()
            first = world.is_first
            code = _run(options, given, world)
            if sys.stdout is not None:
                # None where it was closed before.
                sys.stdout.flush()
            return code
    except InputError as error:
        if first:
            print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        return logs.refused(prog, error)


def _run(options: argparse.Namespace, given: Sequence[str], world: processes.World) -> int:
    """Suite, runs, records, report."""
    _read_files(options)
    if options.tensorboard:
        logs.check_tensorboard()
    if options.pretrain is not None:
        code = _pretrain(options, world)
        if code is not None:
            return code
    suite, bases = variants.expanded(
        _load(options, world),
        text=options.search,
        seed=options.seed,
        seeds=options.seeds,
        settings=[*options.overrides, *_said(options)],
    )
    output = options.output or Path("results") / suite.name
    if options.dry_run:
        if options.launcher == "slurm":
            # Imported here, as below.
            from bench.run import suite as rows

            rows.ask_slurm(suite, output, (), options.slurm)
        return _dry_run(suite, output, options.retry_failed, options.measure_steps or 0)
    check_needs(suite)
    full_size = variants.costs_of(suite, bases, Reference(options.reference), options.costs)
    if options.launcher == "none" and world.size == 1 and suite.runs[0].train.devices > 1:
        return processes.spawn(processes.this_command(given), suite.runs[0].train.devices)

    # Imported here: torch takes seconds, which `--help` and wrong input should not cost, and the
    # report's libraries some more, which a row does not need.
    from bench.run import identity, runner
    from bench.run import suite as rows

    console = Console(emoji=False, quiet=not world.is_first)
    where = suite, output, console
    retry, command = options.retry_failed, _command(given)
    row = functools.partial(_row_arguments, bases, output, options)
    if options.launcher == "slurm":
        rows.submit(*where, row, retry_failed=retry, options=options.slurm)
        return 0
    if options.launcher == "local":
        standings, code = rows.run_side_by_side(*where, row, retry_failed=retry, count=options.jobs)
    else:
        how = runner.Options(
            command=command,
            tensorboard=options.tensorboard,
            keep_weights=not options.no_weights,
            latency=False,
        )
        standings, code = rows.run(*where, how, retry_failed=retry)
    # With 2 the rows that can be built are done; all others were interrupted or given up.
    if code not in (0, 1, 2) or not world.is_first:
        return code

    def records() -> list[Record]:
        from report import load

        return identity.chosen([standing.identity for standing in standings], load.load(output))

    late = identity.edited(standings)
    if late:
        # What is measured from here on imports them anew.
        said = f"{', '.join(late)} changed while the rows ran: neither latency, pictures nor costs"
        console.print(f"note: {said} are made; the same command goes on", highlight=False)
        options.no_latency = options.no_pictures = True
    if not options.no_latency:
        rows.measure_latency(records(), output, console, command=command)
    if options.no_report:
        return code
    if not options.no_pictures:
        rows.make_pictures(records(), output, console)
    found = [] if late else rows.count_costs(full_size, output, console, command=command)
    shown = records()
    rows.say_left_out(suite, standings, shown, console)
    from report import page

    return max(code, page.write_suite(shown, output, title=f"Suite {suite.name}", costs=found))


def _command(given: Sequence[str]) -> list[str]:
    return ["python", "run_all.py", *given]


def _read_files(options: argparse.Namespace) -> None:
    """Let --train, --val and --images be settings."""
    if options.train or options.val:
        options.data = options.data or str(Path(options.train or options.val).parent)
    # The rows of a launcher are given them so.
    for name, value in file_values(options).items():
        _add(options.overrides, f"data.{name}", value)


def _add(settings: list[str], name: str, value: Any) -> None:
    """Let what an option says be a setting too, which no other of the command line contradicts."""
    # As JSON, which YAML reads as it is.
    word = f"{name}={json.dumps(value, ensure_ascii=False)}"
    merged([assigned(settings), assigned([word])], agree="")
    settings.append(word)


def _probe(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the suite of probes, whose tasks and models are its own."""
    for name in options.given:
        if name not in ("suite", "output", "rows", "retry_failed", "no_report"):
            raise InputError(
                f"--{name.replace('_', '-')} says nothing to suite {SUITE}, whose tasks and models"
                " are its own; it takes --rows, --output, --retry-failed and settings such as"
                " seeds=[0,1]"
            )
    recipe = build_recipe(options.overrides)
    output = options.output or Path("results") / SUITE
    # Imported here, as in `_run`.
    from bench.run import probe

    records = probe.run(
        suite_plan(options.rows, probe.TASK_NAMES, recipe),
        output,
        command=command,
        log=lambda line: print(line, flush=True),
        retry_failed=options.retry_failed,
    )
    if not options.no_report:
        from report import page

        page.write_probes(records, output, title=f"Suite {SUITE}")
    return int(any(one.status == "failed" for one in records))


def _load(options: argparse.Namespace, world: processes.World) -> Suite:
    overrides = list(options.overrides)
    devices = options.devices or (world.size if world.size > 1 else None)
    if devices is not None:
        _add(overrides, "train.devices", devices)
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
        searched=variants.values_of(options.search),
        # A row of a launcher is one of those that its command has checked.
        whole=not options.no_report,
    )
    if options.init is not None:
        _add(overrides, "train.init", options.init)
    init = options.init or assigned(overrides).get("train", {}).get("init")
    return suite if init is None else variants.started(suite, init, options.init_partial)


def _said(options: argparse.Namespace) -> list[str]:
    """The options that are settings, as such."""
    paths = {"data": "data.path", "method": "model.method", "init": "train.init"}
    given = {name: getattr(options, name) for name in (*paths, "device")}
    return [f"{paths.get(k, k)}={value}" for k, value in given.items() if value is not None]


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
    files = [output / f"{slug(run.row)}.pth" for run in suite.runs]
    # Processes of one run find what the command that started them made.
    if world.size == 1:
        generated = options.pretrain == "generated"
        arguments = ["--suite", "pretrain-quick" if generated else "pretrain"]
        arguments += ["--rows", ",".join(run.row for run in suite.runs), "--output", str(output)]
        arguments += ["--backbone", suite.backbone, "--jobs", str(options.jobs)]
        arguments += [] if generated else ["--data", options.pretrain]
        arguments += as_arguments(
            options,
            *("device", "seed", "devices", "launcher", "slurm", "measure-steps"),
            *("retry-failed", "tensorboard", "dry-run"),
        )
        code = main([*arguments, *(word.removeprefix(_PRETRAIN) for word in own)])
        if code or (options.launcher == "slurm" and not all(file.is_file() for file in files)):
            return code
    if all(file.is_file() for file in files) or not options.dry_run:
        options.init = str(output / "{row}.pth")
    return None


def _dry_run(suite: Suite, output: Path, retry_failed: bool, measure_steps: int) -> int:
    # Imported here, as in `_run`.
    from bench.run import identity, plan
    from report import tables

    check_output(output, suite.name, make=measure_steps > 0)
    print(f"suite {suite.name}: what would run, to {output}", flush=True)
    standings = identity.survey(suite.runs, output, retry_failed=retry_failed)
    for standing in standings:
        if standing.record is not None or standing.note:
            what = identity.OF_FAILURE if standing.failed else "its record"
            print(standing.note or f"{suite.name_of(standing.config)} has {what}")
    missing = tuple(standing.config for standing in standings if standing.record is None)
    if not missing:
        return 0
    suite = dataclasses.replace(suite, runs=missing)
    with Console(emoji=False, stderr=True).status("planning") as status:
        planned, failures = plan.plan(
            suite,
            output,
            measure_steps=measure_steps,
            progress=lambda row: status.update(f"planning {row}"),
        )
    if planned:
        print(tables.to_text(plan.table(planned)))
    for line in plan.lines(planned, measure_steps) if planned else ():
        print(textwrap.fill(line, tables.WIDTH, subsequent_indent="  "))
    if failures:
        raise InputError("; ".join(failures))
    return 0


def _row_arguments(
    bases: Mapping[str, str], output: Path, options: argparse.Namespace, config: RunConfig
) -> list[str]:
    """The command line of one run of a suite, as a person would type it.

    Args:
        bases: the name of each row without the value of a search.
    """
    base = bases[config.row]
    arguments = ["--suite", options.suite, "--rows", base, "--output", str(output), "--no-report"]
    arguments += ["--seed", str(config.seed)]
    # Rows of this machine are timed together.
    arguments += ["--no-latency"] if options.launcher == "local" else []
    arguments += as_arguments(
        options,
        *("backbone", "schedule", "method", "data", "device", "devices", "init"),
        *("retry-failed", "tensorboard", "no-weights", "init-partial"),
    )
    if config.row != base:
        (path,) = variants.values_of(options.search)
        value = json.dumps(variants.value_of(config, path), ensure_ascii=False)
        arguments += ["--search", f"{path}={value}"]
    return [*arguments, *(word for word in options.overrides if not word.startswith("seed="))]


def _set_up_logging() -> None:
    """Warnings to the terminal; what libraries say of themselves, not."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    code = main()
    # What libraries hold would be collected for seconds.
    gc.freeze()
    sys.exit(code)
