"""Where numbers come from: in a sentence that a table can carry, and as tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.record import Record
from report.columns import MISSING, Column, Table, table
from report.load import at, code, labels
from report.searches import flat


def sentence(records: Sequence[Record]) -> str:
    """Return the date, libraries, machine, precision, seed and commit of `records`.

    What differs between them is listed; which record has which is in the records.
    """
    facts = [
        f"Measured {_dates(records)} with {listed(map(_library, records))}",
        f"on {listed(map(machine, records))}",
        f"precision {listed(map(_precision, records))}",
        f"seed {listed(seed for record in records for seed in _seeds(record))}",
        f"commit {listed(map(_commit, records))}",
    ]
    return "; ".join(facts) + "."


def _seeds(record: Record) -> Sequence[int]:
    """The seeds of a record; one of probes is of several."""
    seeds: Sequence[int] = at(record, "config.recipe.seeds") or [record.seed]
    return seeds


def _dates(records: Sequence[Record]) -> str:
    days = sorted({record.created[:10] for record in records})
    return days[0] if len(days) == 1 else f"from {days[0]} to {days[-1]}"


def _library(record: Record) -> str:
    torch = (record.environment.get("packages") or {}).get("torch")
    names = [(record.model["library"], record.model.get("library_version")), ("torch", torch)]
    return " and ".join(
        f"{name} {version}" for name, version in names if version and name != "none"
    )


def machine(record: Record) -> str:
    """Return the GPU and the CPU that a record was made on."""
    environment = record.environment
    device, cpu = environment.get("device"), environment.get("cpu")
    cores = f"{cpu}, {environment.get('cores')} cores"
    return cores if device in (None, "cpu") else f"{device} ({cores})"


def _precision(record: Record) -> Any:
    return (record.config.get("train") or {}).get("precision", "unknown")


def _commit(record: Record) -> str:
    return code(record) or "unknown"


def environment(records: Sequence[Record], *, name_rows: bool = True) -> Table:
    """Return every fact of where `records` were made, with its values.

    Args:
        records: of the table.
        name_rows: whether to say which rows have which value, where there are several.
    """
    facts = [{k: v for k, v in one.environment.items() if k != "command"} for one in records]
    lines = []
    for fact, values in _values(records, facts).items():
        texts = [
            f"{value} ({', '.join(rows)})" if name_rows and len(values) > 1 else value
            for value, rows in values.items()
        ]
        lines.append((fact.removeprefix("packages."), "; ".join(texts)))
    times = sorted(record.created for record in records)
    lines.append(("records made", f"{times[0]} to {times[-1]}"))
    lines.append(("seed", listed(record.seed for record in records)))
    return _plain("environment", "Where it ran", lines, ["fact", "value"])


def differences(records: Sequence[Record]) -> Table | None:
    """Return where the configurations differ: setting, value and the rows that have it."""
    configs = [{k: v for k, v in record.config.items() if k != "row"} for record in records]
    lines = [
        (setting, value, ", ".join(rows))
        for setting, values in _values(records, configs).items()
        if len(values) > 1
        for value, rows in values.items()
    ]
    names = ["setting", "value", "rows"]
    return _plain("configuration", "Settings that differ", lines, names) if lines else None


def _values(
    records: Sequence[Record], facts: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, list[str]]]:
    """By dotted name of a fact and by value: the rows that have it."""
    flats = [flat(one) for one in facts]
    found: dict[str, dict[str, list[str]]] = {
        name: {} for name in dict.fromkeys(name for one in flats for name in one)
    }
    for label, one in zip(labels(records), flats, strict=True):
        for name, values in found.items():
            values.setdefault(said(one.get(name)), []).append(label)
    return found


def _plain(name: str, title: str, lines: Sequence[Sequence[str]], names: Sequence[str]) -> Table:
    data = pd.DataFrame(lines, columns=list(names))
    return table(name, title, data, [Column(column, column) for column in names])


def said(value: Any) -> str:
    """Return any value of a record as a person would read it."""
    if value is None or value in ({}, []):
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=list)


def listed(values: Iterable[Any]) -> str:
    """Return the distinct values, in order."""
    return ", ".join(dict.fromkeys(map(str, values))) or MISSING
