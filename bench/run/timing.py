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
from bench.config.schema import RunConfig
from bench.config.suites import build_config
from bench.data.split import data_root
from bench.files import write_whole
from bench.measure.profile import Interleaved, measure_latency
from bench.record import Record


def untimed(records: Sequence[Record], output: Path) -> list[Record]:
    """Return the records of runs that were to be measured and have no latency, nor tried to."""
    timed = record.read_latencies(output / record.LATENCIES)
    return [
        entry
        for entry in records
        if _wanted(entry) and entry.latency is None and (entry.row, entry.key) not in timed
    ]


def measure(records: Sequence[Record], output: Path, *, command: Sequence[str]) -> Path:
    """Measure the rows of `records` in rounds, write what was found and return the file.

    Args:
        records: of runs that succeeded; those that were not to be measured are left out.
        output: the folder of the suite.
        command: the command line, for the file.

    Raises:
        InputError: where the file cannot be written, or the device is not there.
    """
    wanted = [entry for entry in records if _wanted(entry)]
    configs = [_config(entry) for entry in wanted]
    rows = measure_latency(
        configs,
        roots=[data_root(config, output) for config in configs],
        needs=[entry.memory or {} for entry in wanted],
    )
    created = datetime.datetime.now(datetime.UTC)
    found = {
        "schema": record.SCHEMA,
        "created": created.isoformat(timespec="seconds"),
        "environment": record.environment(command=command, device=""),
        "rows": [
            {"row": entry.row, "key": entry.key, "latency": _section(row)}
            for entry, row in zip(wanted, rows, strict=True)
        ],
    }
    path = output / record.LATENCIES / f"{created:%Y%m%dT%H%M%S}.json"
    write_whole(path, json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def _wanted(entry: Record) -> bool:
    return entry.status == "done" and bool((entry.config.get("profile") or {}).get("enabled"))


def _config(entry: Record) -> RunConfig:
    config = build_config(entry.config)
    recipe = dataclasses.replace(config.train, devices=1, accumulate=1)
    return dataclasses.replace(config, train=recipe)


def _section(row: Interleaved) -> dict[str, Any]:
    """The `latency` of a record; of a row that failed, why."""
    notes = list(row.notes)
    if row.error is not None:
        notes.append(f"not measured: {row.error['message']}")
    empty: dict[str, Any] = {"unit": "s", "inference": None, "training": None, "notes": []}
    section = row.section or empty
    return section | {"notes": [*section["notes"], *notes]}
