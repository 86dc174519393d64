"""Latency of all rows of a suite, measured together after the last one has its record.

Rows that are timed days apart, or one while another trains, differ by more than their mechanisms.
One pass writes one file, `output/latency/{time}.json`, whose fields `results/README.md` explains;
records stay as they are.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.config.schema import MODES, RunConfig
from bench.config.suites import build_config
from bench.data.split import data_root
from bench.files import write_whole
from bench.measure import profile
from bench.measure.latency import UNIT
from bench.measure.profile import Progress
from bench.record import Record


def are_timed(records: Sequence[Record], output: Path) -> bool:
    """Return whether all runs that were to be measured have a latency of one session, or a failure.

    Of several seeds of a row one is measured, which stands for all.
    """
    timed = record.read_latencies(output / record.LATENCIES)
    sessions = {
        entry.row: section.get("session")
        for entry in records
        if (section := timed.get((entry.row, entry.key), entry.latency)) is not None
    }
    rows = {entry.row for entry in _wanted(records)}
    return rows <= sessions.keys() and len({sessions[row] for row in rows}) <= 1


def measure(
    records: Sequence[Record], output: Path, *, command: Sequence[str], progress: Progress
) -> Path:
    """Measure the rows of `records` in rounds, write what was found and return the file.

    Args:
        records: of runs that succeeded; those that were not to be measured are left out, and of
            each row all but the first.
        output: the folder of the suite.
        command: the command line, for the file.
        progress: receives the share that is done, and what is being done.

    Raises:
        InputError: where the file cannot be written, or the device is not there.
    """
    wanted = _wanted(records)
    configs = [_config(entry) for entry in wanted]
    found = profile.measure_latency(
        configs,
        roots=[data_root(config, output) for config in configs],
        needs=[entry.memory or {} for entry in wanted],
        progress=progress,
    )
    created = datetime.datetime.now(datetime.UTC)
    content = {
        "schema": record.SCHEMA,
        "created": created.isoformat(timespec="seconds"),
        "environment": record.environment(command=command, device=""),
        "rows": [
            {"row": entry.row, "key": entry.key, "latency": _section(one)}
            for entry, one in zip(wanted, found, strict=True)
        ],
    }
    path = output / record.LATENCIES / f"{created:%Y%m%dT%H%M%S}.json"
    write_whole(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def _wanted(records: Sequence[Record]) -> list[Record]:
    """The first record of each row that was to be measured."""
    wanted = {
        entry.row: entry
        for entry in reversed(records)
        if entry.status == "done" and (entry.config.get("profile") or {}).get("enabled")
    }
    return [entry for entry in records if wanted.get(entry.row) is entry]


def _config(entry: Record) -> RunConfig:
    config = build_config(entry.config)
    recipe = dataclasses.replace(config.train, devices=1, accumulate=1)
    return dataclasses.replace(config, train=recipe)


def _section(found: profile.Interleaved) -> dict[str, Any]:
    """The `latency` of a record; of a row that failed, why."""
    notes = list(found.notes)
    if found.error is not None:
        notes.append(f"not measured: {found.error['message']}")
    empty: dict[str, Any] = {"unit": UNIT, **dict.fromkeys(MODES), "notes": []}
    section = found.section or empty
    return section | {"notes": [*section["notes"], *notes]}
