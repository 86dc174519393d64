"""Run a suite: every row trained, evaluated and measured; then its tables and plots.

A row that has its record is not run again, so the same command continues what was stopped.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import record
from bench.config import RunConfig, Suite, load_suite, suites
from bench.data.generated import SPLITS
from bench.errors import InputError
from bench.progress import SuiteProgress
from bench.record import Record
from report import load, page, tables

# Not worth trying again before something changes: the same command would end the same way.
_FINAL_ERRORS = ("error", "diverged", "out_of_memory")
_WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="run_all.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""\
suites: {", ".join(suites())}
  quick     every row with a small backbone on generated images; minutes on a laptop
  ablation  the published ablation: ViL-Small, Mask R-CNN, 1x; needs --data with COCO and a GPU

examples:
  python run_all.py
  python run_all.py --rows ViL,performer --seed 1
  python run_all.py --data my_data --rows ViL train.steps=200 model.method=retinanet
  python run_all.py --rows my_attention.py:MyAttention
  python run_all.py --suite ablation --data /datasets/coco --device cuda

The output folder then holds records/ (one JSON file a run), index.md and index.html (the report),
tables/, plots/, checkpoints/ of unfinished runs and, for generated data, data/.

exit code: 0 all rows done; 1 a row failed, the report says why; 2 wrong input; 130 interrupted""",
    )
    result.add_argument("--suite", default="quick", help="which suite (default: %(default)s)")
    result.add_argument(
        "--data",
        metavar="PATH",
        help=f"folder in COCO layout: annotations/instances_{SPLITS[0]}.json, {SPLITS[0]}/, and"
        f" {SPLITS[1]} alike (default: the suite's; quick generates its own)",
    )
    result.add_argument(
        "--output", metavar="DIR", type=Path, help="where everything goes (default: results/SUITE)"
    )
    result.add_argument(
        "--device", help="auto, cpu, cuda or cuda:N (default: auto, a GPU where there is one)"
    )
    result.add_argument("--seed", type=int, help="of everything random (default: 0)")
    result.add_argument(
        "--rows",
        metavar="A,B",
        help="rows of the suite, by name, or mechanisms of yours as package.module:Class or"
        " file.py:Class (default: all)",
    )
    result.add_argument(
        "--retry-failed", action="store_true", help="run again the rows whose record is a failure"
    )
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any configuration value, such as train.steps=100; see bench/config.py",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _quieten_libraries()
    # A preempted job is told by SIGTERM; it ends as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    console = Console()
    try:
        suite = load_suite(
            options.suite,
            rows=[row.strip() for row in options.rows.split(",")] if options.rows else (),
            data=options.data,
            seed=options.seed,
            device=options.device,
            overrides=options.overrides,
        )
        output = options.output or Path("results") / suite.name
        command = ["python", "run_all.py", *(sys.argv[1:] if arguments is None else arguments)]
        return run_suite(suite, output, console, command=command, retry_failed=options.retry_failed)
    except InputError as error:
        print(f"run_all.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def run_suite(
    suite: Suite,
    output: Path,
    console: Console,
    *,
    command: Sequence[str],
    retry_failed: bool = False,
) -> int:
    """Run what is missing of a suite, write the report and print its table."""
    _check_output(output)
    missing = [run for run in suite.runs if not _is_settled(run, output, retry_failed)]
    settled = len(suite.runs) - len(missing)
    console.print(
        f"suite {suite.name}: {len(missing)} of {len(suite.runs)} rows to run"
        + (f", {settled} have their record" if settled else ""),
        highlight=False,
    )
    # Imported here: torch takes seconds, which `--help` and wrong input should not cost.
    from bench import runner

    if missing:
        for line in runner.check_data(missing, output):
            console.print(f"note: {line}", highlight=False, soft_wrap=True)
    with SuiteProgress(len(missing), console=console) as progress:
        for config in missing:
            progress.row(config.row)
            result = runner.run(config, output=output, progress=progress.update, command=command)
            progress.finish_row(_outcome(result))
    return _report(suite, output)


def _report(suite: Suite, output: Path) -> int:
    keys = {record.key(config.as_dict()) for config in suite.runs}
    records = [entry for entry in load.load(output) if entry.key in keys]
    path = page.write(records, output, title=f"Suite {suite.name}")
    for table in tables.comparison(records):
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
    failures = sorted(folder.glob(f"{record.slug(config.row)}-{key[:10]}-failed-*.json"))
    kinds = {(record.read(path).error or {}).get("kind") for path in failures}
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


def _quieten_libraries() -> None:
    """Keep what libraries say of themselves out of the progress."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    sys.exit(main())
