"""Run a suite: every row trained, evaluated and measured; then its tables and plots.

A row that has its record is not run again, so the same command continues what was stopped.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import record
from bench.cli import Parser, add, add_overrides, names, positive
from bench.config import search
from bench.config.schema import RunConfig
from bench.config.suites import Suite, load_suite, suites
from bench.data.generated import SPLITS
from bench.errors import InputError
from bench.record import Record
from bench.system import logs
from bench.system import processes as launch
from bench.system import slurm as jobs
from bench.system.interrupt import EXIT_CODE
from bench.system.locks import HeldError
from bench.system.progress import SuiteProgress
from report import load, page, tables

LAUNCHERS = ("none", "local", "slurm")
# Not worth trying again before something changes: the same command would end the same way.
_FINAL_ERRORS = ("error", "diverged", "out_of_memory")
_WIDTH = 120


def parser() -> Parser:
    """The command line."""
    result = Parser(
        prog="run_all.py",
        description=__doc__,
        epilog=f"""\
suites: {", ".join(suites())}
  quick     every row with a small backbone on generated images; minutes on a laptop
  ablation  the published ablation: ViL-Small, Mask R-CNN, 1x; needs --data with COCO and a GPU
  zoo       the published model zoo: ViL in four sizes, two methods, two schedules; needs the same

examples:
  python run_all.py
  python run_all.py --rows ViL,performer --seed 1
  python run_all.py --data my_data --rows ViL train.steps=200 model.method=retinanet
  python run_all.py --rows my_attention.py:MyAttention
  python run_all.py --suite ablation --data /datasets/coco --device cuda
  python run_all.py --suite ablation --data /datasets/coco --method retinanet --schedule 3x
  python run_all.py --suite zoo --rows "ViL-Small RetinaNet 3x" --data /datasets/coco --init vil.pth
  python run_all.py --suite ablation --data /datasets/coco --devices 8
  torchrun --nproc-per-node 8 run_all.py --suite ablation --data /datasets/coco
  python run_all.py --suite ablation --data /datasets/coco --devices 8 --dry-run
  python run_all.py --suite ablation --data /datasets/coco --search drop_path=0.05,0.1,0.2
  python run_all.py --launcher local --jobs 2
  python run_all.py --suite ablation --data /datasets/coco --devices 8 \\
      --launcher slurm --slurm slurm_partition=gpu,timeout_min=4320

The output folder then holds records/ (one JSON file a run), index.md and index.html (the report),
tables/, plots/, logs/ (of each run a readable log, and a JSON line a step), weights/ (of each run
what it trained, for `python -m bench eval --record RECORD`), checkpoints/ of unfinished runs and,
for generated data, data/.

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
    add(result, "output", help="where everything goes (default: results/SUITE)")
    add(
        result,
        "device",
        default=None,
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU where there is one)",
    )
    add(result, "seed", default=None, help="of everything random (default: 0)")
    add(
        result,
        "rows",
        metavar="A,B",
        type=names,
        default=(),
        help="rows of the suite, by name, or mechanisms of yours as package.module:Class or"
        " file.py:Class (default: all)",
    )
    add(
        result,
        "schedule",
        metavar="NAME",
        help="recipe of the training: 1x, 3x or quick (default: the suite's); of the zoo, the rows"
        " that have it",
    )
    add(result, "method", default=None, help="of detection (default: the suite's), likewise")
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
        help="start from the backbone of a classifier, or from a detector (default: from scratch)",
    )
    add(
        result,
        "no-weights",
        action="store_true",
        help="keep no weights of finished runs (default: in weights/)",
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
    # Of a row that was started for a suite, which writes its report itself.
    result.add_argument("--no-report", action="store_true", help=argparse.SUPPRESS)
    add_overrides(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    launch.end_with_parent()
    _set_up_logging()
    # A preempted job is told by SIGTERM; it ends as an interrupted one does. Not by way of SIGINT,
    # which shells make processes in the background ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    first = True
    try:
        options = parser().parse(given)
        world = launch.world()
        first = world.is_first
        if options.tensorboard:
            logs.check_tensorboard()
        searched = search.parse(options.search) if options.search else None
        plain = _load(options, world)
        suite = plain if searched is None else search.expand(plain, searched)
        output = options.output or Path("results") / suite.name
        if options.dry_run:
            return _dry_run(suite, output, options.measure_steps or 0)
        _check_needs(suite)
        if options.launcher != "none":
            return _launch(suite, plain, searched, output, options)
        if suite.runs[0].train.devices > 1 and world.size == 1:
            return launch.spawn(launch.this_command(given), suite.runs[0].train.devices)
        return run_suite(
            suite,
            output,
            Console(quiet=not first),
            command=["python", "run_all.py", *given],
            retry_failed=options.retry_failed,
            report=not options.no_report and first,
            tensorboard=options.tensorboard,
            keep_weights=not options.no_weights,
        )
    except InputError as error:
        if first:
            print(f"run_all.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_CODE


def _load(options: argparse.Namespace, world: launch.World) -> Suite:
    overrides = list(options.overrides)
    devices = options.devices or (world.size if world.size > 1 else None)
    if devices is not None:
        overrides.append(f"train.devices={devices}")
    if options.init is not None:
        overrides.append(f"train.init={options.init}")
    return load_suite(
        options.suite,
        rows=options.rows,
        schedule=options.schedule,
        method=options.method,
        data=options.data,
        seed=options.seed,
        device=options.device,
        overrides=overrides,
    )


def _check_needs(suite: Suite) -> None:
    if suite.needs is not None and any(config.data.path is None for config in suite.runs):
        raise InputError(
            f"suite {suite.name} needs {suite.needs}: name its folder with --data, or set"
            " $DETECTRON2_DATASETS to the folder that holds coco/; `python -m bench data coco"
            " --root DIR` downloads it"
        )


def _dry_run(suite: Suite, output: Path, measure_steps: int) -> int:
    # Imported here, as in `run_suite`.
    from bench.run import plan

    if measure_steps:
        _check_output(output)
    print(f"suite {suite.name}: what would run, to {output}", flush=True)
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
    plain: Suite,
    searched: search.Search | None,
    output: Path,
    options: argparse.Namespace,
) -> int:
    """Run the missing rows as processes of their own."""
    _check_output(output)
    bases = {config.row: config.row for config in plain.runs}
    if searched is not None:
        bases = {
            searched.row(config.row, value): config.row
            for config in plain.runs
            for value in searched.values
        }
    missing = [run for run in suite.runs if not _is_settled(run, output, options.retry_failed)]
    print(f"suite {suite.name}: {len(missing)} of {len(suite.runs)} rows to run")
    _check_free(missing, output)
    found = []
    for config in missing:
        command = launch.this_command(_row_arguments(config, bases[config.row], output, options))
        log = output / "logs" / f"{record.slug(config.row)}.out"
        found.append(jobs.Job(config.row, tuple(command), log))
    devices = suite.runs[0].train.devices
    if options.launcher == "slurm":
        handles = jobs.submit(
            found,
            folder=output / "slurm",
            devices=devices,
            options=jobs.slurm_options(options.slurm),
        )
        for job, handle in zip(found, handles, strict=True):
            print(f"{job.row}: submitted as job {handle.job_id}")
        print(
            f"Their output is in {output / 'slurm'}; when they are done, the same command without"
        )
        print("--launcher writes the report.")
        return 0
    # Generated data is made once, before the rows ask for it.
    from bench.data import split as inputs

    for line in inputs.check_data(missing, output, processes=devices) if missing else ():
        print(f"note: {line}")
    code = jobs.run_local(
        found, count=options.jobs, devices=devices, say=lambda line: print(line, flush=True)
    )
    if code in (0, 1):
        return _report(suite, output)
    return code


def _row_arguments(
    config: RunConfig, base: str, output: Path, options: argparse.Namespace
) -> list[str]:
    """The command line of one row of a suite, as a person would type it."""
    arguments = ["--suite", options.suite, "--rows", base, "--output", str(output), "--no-report"]
    for name in ("schedule", "method", "data", "device", "seed", "devices", "init"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name}", str(value)]
    if config.row != base:
        arguments += ["--search", config.row.removeprefix(f"{base} (").removesuffix(")")]
    for name in ("retry_failed", "tensorboard", "no_weights"):
        if getattr(options, name):
            arguments.append(f"--{name.replace('_', '-')}")
    return [*arguments, *options.overrides]


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
) -> int:
    """Run what is missing of a suite, write the report and print its table.

    All processes that share the runs call this; the first decides what is missing.
    """
    # Imported here: torch takes seconds, which `--help` and wrong input should not cost.
    from bench.data import split as inputs
    from bench.run import runner
    from bench.system import devices

    def prepare() -> list[bool]:
        _check_output(output)
        settled = [_is_settled(run, output, retry_failed) for run in suite.runs]
        missing = [run for run, done in zip(suite.runs, settled, strict=True) if not done]
        console.print(
            f"suite {suite.name}: {len(missing)} of {len(suite.runs)} rows to run"
            + (f", {sum(settled)} have their record" if any(settled) else ""),
            highlight=False,
        )
        if missing:
            _check_free(missing, output)
            for line in inputs.check_data(missing, output):
                console.print(f"note: {line}", highlight=False, soft_wrap=True)
        return settled

    settled = devices.agree(suite.runs[0], prepare)
    missing = [run for run, done in zip(suite.runs, settled, strict=True) if not done]
    failed = False
    with SuiteProgress(len(missing), console=console) as progress:
        for config in missing:
            progress.row(config.row)
            try:
                result = runner.run(
                    config,
                    output=output,
                    progress=progress.update,
                    command=command,
                    tensorboard=tensorboard,
                    keep_weights=keep_weights,
                )
            except HeldError as error:
                progress.finish_row(f"being run by {error.holder}; left to it")
                failed = True
                continue
            except runner.AbandonedError as error:
                print(f"{config.row}: failed in one process: {error}", file=sys.stderr, flush=True)
                # The other processes hold what an orderly end would wait for.
                os._exit(launch.ABANDONED)
            progress.finish_row(_outcome(result))
            failed |= result.status == "failed"
    devices.leave()
    return max(_report(suite, output) if report else 0, int(failed))


def _check_free(runs: Sequence[RunConfig], output: Path) -> None:
    """Stop before anything has cost time where another command does one of the runs."""
    # Imported here, as in `run_suite`.
    from bench.run import runner

    for config in runs:
        try:
            with runner.claimed(config, output):
                pass
        except HeldError as error:
            raise InputError(
                f"row {config.row} is being run in {output} by {error.holder}; wait for it, or name"
                " another --output"
            ) from error


def _report(suite: Suite, output: Path) -> int:
    keys = {record.key(config.as_dict()) for config in suite.runs}
    records = [entry for entry in load.load(output) if entry.key in keys]
    path = page.write(records, output, title=f"Suite {suite.name}")
    for table in [*tables.comparison(records), *tables.searches(records)]:
        print(tables.to_text(table.shown, _WIDTH))
    failed = [entry for entry in records if entry.status == "failed"]
    for entry in failed:
        print(f"{entry.row}: failed, {(entry.error or {}).get('message')}")
    if failed:
        print("Failed rows are run again with --retry-failed.")
    print(f"report: {path} and {path.with_suffix('.html')}")
    return 1 if failed else 0


def _is_settled(config: RunConfig, output: Path, retry_failed: bool) -> bool:
    """Whether a run has a record that the same command would only repeat."""
    key = record.key(config.as_dict())
    folder = output / "records"
    if (folder / record.done_name(config.row, key)).exists():
        return True
    paths = folder.glob(f"{record.slug(config.row)}-{key[:10]}-failed-*.json")
    failures = [record.read(path) for path in sorted(paths)]
    # Processes that are started anew, as the row failed in one of them, go on with the next row.
    since = launch.started_first()
    if since is not None and any(entry.created >= since for entry in failures):
        return True
    kinds = {(entry.error or {}).get("kind") for entry in failures}
    return bool(kinds & set(_FINAL_ERRORS)) and not retry_failed


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
    box = (result.evaluation or {}).get("box") or {}
    return f"done, box AP {box['AP']:.1f}" if box.get("AP") is not None else "done"


def _set_up_logging() -> None:
    """Warnings to the terminal; what libraries say of themselves, not."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    sys.exit(main())
