"""The same rows with several values of one setting, and which value came out best."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from bench.config import RunConfig, Suite, build_config, leaves
from bench.errors import InputError, nearest
from bench.record import Record, key


@dataclass(frozen=True)
class Search:
    """A setting and the values that are tried.

    Attributes:
        path: the setting, such as "model.drop_path".
        values: as they are in the configuration.
    """

    path: str
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The setting as rows are called by it."""
        return self.path.rpartition(".")[2]

    def row(self, row: str, value: Any) -> str:
        """The name of a row with a value."""
        return f"{row} ({self.name}={value})"


def parse(text: str) -> Search:
    """`drop_path=0.05,0.1` -> the search of model.drop_path over both.

    Raises:
        InputError: for an unknown setting, one name of several settings, or no values.
    """
    name, _, listed = text.partition("=")
    known = [path for path in leaves() if path not in ("suite", "row")]
    found = [path for path in known if name in (path, path.rpartition(".")[2])]
    if len(found) != 1:
        which = f"; it is one of {', '.join(found)}" if found else nearest(name, known)
        raise InputError(f"--search {text}: {name!r} is no setting{which}")
    try:
        values = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError:
        values = []
    if not values:
        raise InputError(
            f"--search {text}: no values; allowed: NAME=VALUE,VALUE, for example"
            " drop_path=0.05,0.1,0.2"
        )
    return Search(found[0], tuple(dict.fromkeys(values)))


def expand(suite: Suite, search: Search) -> Suite:
    """Return the suite with each row once for each value.

    Raises:
        InputError: for a value that the setting cannot have.
    """
    runs = [_with(config, search, value) for config in suite.runs for value in search.values]
    return replace(suite, runs=tuple(runs))


def outcomes(suite: Suite, search: Search, records: Sequence[Record]) -> list[str]:
    """A line for each row of `suite`: the best value by box AP, and all."""
    by_key = {entry.key: entry for entry in records}
    lines = []
    for config in suite.runs:
        found = {
            value: _box_ap(by_key.get(key(_with(config, search, value).as_dict())))
            for value in search.values
        }
        known = {value: ap for value, ap in found.items() if ap is not None}
        every = ", ".join(
            f"{value}: {'failed' if ap is None else f'{ap:.1f}'}" for value, ap in found.items()
        )
        best = "none came to an end"
        if known:
            value = max(known, key=lambda v: known[v])
            best = f"best {search.name}={value}, box AP {known[value]:.1f}"
        lines.append(f"{config.row}: {best} (all: {every})")
    return lines


def _with(config: RunConfig, search: Search, value: Any) -> RunConfig:
    values = config.as_dict()
    *groups, last = search.path.split(".")
    node = values
    for group in groups:
        node = node[group]
    node[last] = value
    values["row"] = search.row(config.row, value)
    return build_config(values)


def _box_ap(entry: Record | None) -> float | None:
    box = ((entry and entry.evaluation) or {}).get("box") or {}
    ap: float | None = box.get("AP")
    return ap
