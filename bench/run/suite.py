"""The runs of a suite, in this process or in processes of their own, and what all rows share.

After the last run comes what is made of all of them together: latency in rounds, pictures, costs at
full size. What has its record is not done again.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import record
from bench.config.schema import CLASSIFIER, RunConfig
from bench.config.suites import Suite, families
from bench.config.variants import Costs
from bench.data import split
from bench.errors import InputError, RowError
from bench.measure import reference
from bench.model.optimizer import schedule_notes
from bench.record import Record
from bench.run import identity, pictures, pretrain, runner, timing
from bench.run.identity import Standing
from bench.system import devices, processes, slurm
from bench.system.locks import LockedError
from bench.system.progress import SuiteProgress

# The folder of what jobs print.
_SLURM = "slurm"


def run(
    suite: Suite, output: Path, console: Console, options: runner.Options, *, retry_failed: bool
) -> tuple[list[Standing], int]:
    """Run what is missing of a suite, one row after the other, and return the exit code.

    All processes that share the runs call this; the first decides what is missing, and goes on
    alone.

    Raises:
        RowError: where no row can be built.
    """
    standings = devices.decide_in_first(
        suite.runs[0], lambda: survey(suite, output, console, retry_failed)
    )
    missing = [standing for standing in standings if standing.record is None]
    failed = any(standing.failed for standing in standings)
    unfit: list[RowError] = []
    with SuiteProgress(len(missing), console=console) as progress:
        options = replace(options, progress=progress.update)
        for standing in missing:
            row = suite.name_of(standing.config)
            progress.row(row)
            try:
                result = runner.run(
                    standing.config, output=output, identity=standing.identity, options=options
                )
            except LockedError as error:
                progress.finish_row(f"being run by {error.holder}; left to it")
                failed = True
                continue
            except RowError as error:
                unfit.append(error)
                if len(unfit) == len(missing):
                    raise
                if processes.world().is_first:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                progress.finish_row("failed")
                continue
            except runner.AbandonedError as error:
                if not error.recorded_before:
                    print(f"{row}: failed in one process: {error}", file=sys.stderr, flush=True)
                # The other processes hold what an orderly end would wait for.
                os._exit(processes.ABANDONED)
            progress.finish_row(_outcome(result))
            failed |= result.status == "failed"
    devices.close_group()
    if processes.world().is_first:
        processes.forget_world()
    return standings, 2 if unfit else int(failed)


Arguments = Callable[[RunConfig], Sequence[str]]
"""What `run_all.py` is given to run one run of a suite."""


def run_side_by_side(
    suite: Suite,
    output: Path,
    console: Console,
    arguments: Arguments,
    *,
    retry_failed: bool,
    count: int,
) -> tuple[list[Standing], int]:
    """Run what is missing of a suite, `count` rows at a time, and return the exit code."""
    number = suite.runs[0].train.devices
    standings = survey(suite, output, console, retry_failed, processes=number)
    jobs = _jobs(suite, standings, output, arguments)
    code = processes.run_local(
        jobs, count=count, devices=number, log=lambda line: print(line, flush=True)
    )
    return standings, code


def submit(
    suite: Suite,
    output: Path,
    console: Console,
    arguments: Arguments,
    *,
    retry_failed: bool,
    options: str | None,
) -> None:
    """Submit what is missing of a suite as jobs of Slurm; `options` is what --slurm says."""
    # The machine that submits jobs need not have their devices and data.
    number = suite.runs[0].train.devices
    standings = survey(suite, output, console, retry_failed, processes=number, check=False)
    jobs = _jobs(suite, standings, output, arguments)
    for job, handle in zip(jobs, ask_slurm(suite, output, jobs, options), strict=True):
        print(f"{job.row}: submitted as job {handle.job_id}")
    print(f"Their output is in {output / _SLURM}; when they are done, the same command without")
    print("--launcher writes the report.")


def ask_slurm(
    suite: Suite, output: Path, jobs: Sequence[processes.Job], options: str | None
) -> list[Any]:
    """Submit jobs and return their handles; without jobs, as in a dry run, look at `options`.

    Raises:
        InputError: for what --slurm says, or without a Slurm.
    """
    train = suite.runs[0].train
    return slurm.submit(
        jobs,
        folder=output / _SLURM,
        gpus=0 if suite.runs[0].device == "cpu" else train.devices,
        options=slurm.read_options(options),
    )


def _jobs(
    suite: Suite, standings: Sequence[Standing], output: Path, arguments: Arguments
) -> list[processes.Job]:
    jobs = []
    for standing in standings:
        if standing.record is None:
            name = suite.name_of(standing.config)
            command = processes.this_command(arguments(standing.config))
            log = output / "logs" / f"{record.slug(name)}.out"
            jobs.append(processes.Job(name, tuple(command), log))
    return jobs


def survey(
    suite: Suite,
    output: Path,
    console: Console,
    retry_failed: bool,
    *,
    processes: int | None = None,
    check: bool = True,
) -> list[Standing]:
    """Say which rows have their record, and check what the others need before they cost time.

    Args:
        processes: of each run, if they are not started yet.
        check: read the data of the rows that are to be run.
    """
    record.check_output(output, suite.name)
    # What could not be read after the last run is said before the first.
    record.read_latencies(output / record.LATENCIES)
    list(record.read_all((output / record.COSTS).rglob("*.json")))
    standings = identity.survey(suite.runs, output, retry_failed=retry_failed)
    missing = [standing for standing in standings if standing.record is None]
    failed, rows = sum(one.failed for one in standings), len({run.row for run in suite.runs})
    have = len(standings) - len(missing) - failed
    seeds = f" ({rows} rows, seeds {', '.join(map(str, suite.seeds))})"
    console.print(
        f"suite {suite.name}: {len(missing)} of {len(standings)} rows to run"
        + (f", {have} have their record" if have else "")
        + (f", {failed} with {identity.OF_FAILURE}" if failed else "")
        + (seeds if len(suite.seeds) > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )
    if suite.more:
        console.print(
            f"not among them: {len(suite.more)} more rows; --rows takes their names, all, or"
            f" {', '.join(families())}",
            highlight=False,
            soft_wrap=True,
        )
    check_free(missing, output)
    notes = [standing.note for standing in missing if standing.note]
    if suite.runs[0].model.method == CLASSIFIER:
        done = (one.record for one in standings if not one.failed)
        notes += pretrain.put_weights([entry for entry in done if entry is not None], output)
    notes += [note for standing in missing for note in schedule_notes(standing.config)]
    if missing and check:
        configs = [standing.config for standing in missing]
        notes += split.check_data(configs, output, processes=processes)
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return standings


def check_free(standings: Sequence[Standing], output: Path) -> None:
    """Stop before anything has cost time where another command does one of the runs."""
    for standing in standings:
        try:
            with runner.claimed(standing.identity, output):
                pass
        except LockedError as error:
            raise InputError(
                f"row {standing.config.row} is being run in {output} by {error.holder}; wait for"
                " it, or name another --output"
            ) from error


def say_left_out(
    suite: Suite, standings: Sequence[Standing], shown: Sequence[Record], console: Console
) -> None:
    """Say which runs are not among the records of a page.

    A process of a launcher may have begun after a file was edited, and its record is of that.
    """
    out = [
        suite.name_of(standing.config)
        for standing in standings
        if not identity.chosen([standing.identity], shown)
    ]
    if out:
        said = f"not on the page: {', '.join(out)}, without a record of the files that this command"
        console.print(
            f"note: {said} began with; the same command goes on",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def measure_latency(
    records: Sequence[Record], output: Path, console: Console, *, command: Sequence[str]
) -> None:
    """Measure the latency of all rows together, where they have none yet of one session."""
    if timing.are_timed(records, output):
        return
    console.print("measuring latency of all rows, in rounds", highlight=False)
    with console.status("") as status:
        timing.measure(
            records,
            output,
            command=command,
            progress=lambda share, doing: status.update(f"{share:.0%} {doing}"),
        )


def make_pictures(records: Sequence[Record], output: Path, console: Console) -> None:
    """Let rows find what is in a few images, those that have kept weights and did not yet."""
    with console.status("") as status:
        for line in pictures.make(
            records, output, progress=lambda row: status.update(f"pictures of {row}")
        ):
            console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)


def count_costs(
    costs: Costs, output: Path, console: Console, *, command: Sequence[str]
) -> list[Record]:
    """Count what rows cost at full size, where that has no record yet."""
    if not costs.configs:
        return []
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


def _outcome(result: Record) -> str:
    if result.error is not None:
        return f"failed, {result.error['message']}"
    evaluation = result.evaluation or {}
    box, done = evaluation.get("box") or {}, "done"
    if "top1" in evaluation:
        done = f"done, top-1 {evaluation['top1']:.1f} %"
    elif box.get("AP") is not None:
        done = f"done, box mAP {box['AP']:.1f}"
    count = evaluation.get("not_finite")
    return f"{done}, {count} of {evaluation['images']} images not finite" if count else done
