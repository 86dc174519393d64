"""Which rows belong to one search of a setting, and which is best; from records alone."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.record import Record

# A search calls its rows by what they are and the value that they have of the setting.
_NAME = re.compile(r"(.+) \((\w+)=(.+)\)", flags=re.DOTALL)
_LEAST = 2


@dataclass(frozen=True)
class Search:
    """Rows that differ in one setting.

    Attributes:
        row: their name without the value.
        setting: its name.
        tried: each value, as the row's name has it, and its record.
    """

    row: str
    setting: str
    tried: tuple[tuple[str, Record], ...]

    @property
    def best(self) -> tuple[str, Record] | None:
        """The value with the highest box mAP, the first of equal ones; None without any.

        Values that were evaluated on other images have no best.
        """
        known = [one for one in self.tried if box_ap(one[1]) is not None]
        if len({images(record) for _, record in known}) > 1:
            return None
        return max(known, key=lambda one: box_ap(one[1]) or 0.0) if known else None


def find(records: Sequence[Record]) -> list[Search]:
    """Return the searches with at least two values, in the order of `records`."""
    found: dict[str, tuple[str, str, list[tuple[str, Record]]]] = {}
    for record in records:
        name = split(record)
        if name is not None and name[1] != "seed":
            row, setting, value = name
            alike = json.dumps([row, setting, _others(record, setting)], sort_keys=True)
            found.setdefault(alike, (row, setting, []))[2].append((value, record))
    return [
        Search(row, setting, tuple(tried))
        for row, setting, tried in found.values()
        if len(tried) >= _LEAST
    ]


def split(record: Record) -> tuple[str, str, str] | None:
    """Return row, setting and value of a record whose row was searched, or None for any other."""
    name = _NAME.fullmatch(record.row)
    if name is None or name[2] not in map(_last, flat(record.config)):
        return None
    return name[1], name[2], name[3]


def base(record: Record) -> str:
    """Return the row's name, without the value of a search."""
    name = split(record)
    return record.row if name is None else name[0]


def box_ap(record: Record) -> float | None:
    """Return the box mAP of a record, in percent, or None where it has none."""
    box = (record.evaluation or {}).get("box") or {}
    value: float | None = box.get("AP")
    return value


def images(record: Record) -> tuple[Any, Any]:
    """Return what tells the images that a record was evaluated on from others."""
    evaluation = record.evaluation or {}
    return evaluation.get("split"), evaluation.get("annotations_sha256")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted names; a mapping without entries is a value itself."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _others(record: Record, setting: str) -> dict[str, Any]:
    """The configuration besides the row's name and the setting."""
    return {k: v for k, v in flat(record.config).items() if _last(k) not in ("row", setting)}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
