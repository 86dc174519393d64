"""Where numbers come from, in a sentence that a table can carry wherever it goes."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.record import Record

_COMMIT_LETTERS = 10


def sentence(records: Sequence[Record]) -> str:
    """Return the date, libraries, machine, precision, seed and commit of `records`.

    What differs between them is listed; which record has which is in the records.
    """
    facts = [
        f"Measured {_dates(records)} with {_list(map(_library, records))}",
        f"on {_list(map(_machine, records))}",
        f"precision {_list(map(_precision, records))}",
        f"seed {_list(record.seed for record in records)}",
        f"commit {_list(map(_commit, records))}",
    ]
    return "; ".join(facts) + "."


def _dates(records: Sequence[Record]) -> str:
    days = sorted({record.created[:10] for record in records})
    return days[0] if len(days) == 1 else f"from {days[0]} to {days[-1]}"


def _library(record: Record) -> str:
    torch = (record.environment.get("packages") or {}).get("torch")
    names = [(record.model["library"], record.model.get("library_version")), ("torch", torch)]
    return " and ".join(f"{name} {version}" for name, version in names if version)


def _machine(record: Record) -> str:
    environment = record.environment
    device, cpu = environment.get("device"), environment.get("cpu")
    cores = f"{cpu}, {environment.get('cores')} cores"
    return cores if device in (None, "cpu") else f"{device} ({cores})"


def _precision(record: Record) -> Any:
    return (record.config.get("train") or {}).get("precision", "unknown")


def _commit(record: Record) -> str:
    commit = record.environment.get("commit")
    if commit is None:
        return "unknown"
    changed = " with changes" if record.environment.get("dirty") else ""
    return f"{commit[:_COMMIT_LETTERS]}{changed}"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))
