"""What the command line makes of a suite: searches and seeds, starts (`--init`), full-size costs.

A search has the same rows with several values of one setting; `report/searches.py` says which is
best. The seed is not searched for: rows keep their names, and `report/seeds.py` takes their mean.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.config.schema import CLASSIFIER, RunConfig, leaves
from bench.config.suites import (
    CHOSEN,
    Reference,
    Suite,
    build_config,
    check_effects,
    check_sizes,
    reference_config,
    with_costs_of_runs,
)
from bench.config.values import assigned, nested, read
from bench.errors import InputError, nearest
from bench.record import slug

SEED = "seed"
_OPTIONS = "model.options."
COSTS = ("none", "counted", "measured")


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
        """Return the last part of the path, which rows are called by."""
        return self.path.rpartition(".")[2]

    def row(self, row: str, value: Any) -> str:
        """Return the name of a row with a value; seeds share it."""
        return row if self.path == SEED else f"{row} ({self.name}={value})"


def parse(text: str) -> Search:
    """`drop_path=0.05,0.1` -> the search of model.drop_path over both.

    Raises:
        InputError: for an unknown setting, one name of several settings, or no values.
    """
    name, _, listed = text.partition("=")
    known = [path for path in leaves() if path not in CHOSEN]
    named = [path for path in known if path.rpartition(".")[2] == name]
    # Options are the mechanisms' own: which has it is known with the rows.
    of_mechanism = name.startswith(_OPTIONS) and name.removeprefix(_OPTIONS).isidentifier()
    found = [name] if name in known or of_mechanism else named
    if len(found) != 1:
        which = f"; it is one of {', '.join(found)}" if found else nearest(name, known)
        raise InputError(f"--search {text}: {name!r} is not a setting{which}")
    values = _values(listed)
    if not values:
        raise InputError(
            f"--search {text}: no values; allowed: NAME=VALUE,VALUE, for example"
            " drop_path=0.05,0.1,0.2"
        )
    default = None if of_mechanism else operator.attrgetter(found[0])(RunConfig())
    if isinstance(default, float):
        # 0 and 0.0 are one run, of one name.
        values = [float(value) if type(value) is int else value for value in values]
    once = [value for place, value in enumerate(values) if value not in values[:place]]
    return Search(found[0], tuple(once))


def values_of(text: str | None) -> dict[str, tuple[Any, ...]]:
    """Return the values that --search gives a setting, by its dotted name; none without it.

    Raises:
        InputError: as `parse` does.
    """
    search = parse(text) if text else None
    return {} if search is None else {search.path: search.values}


def value_of(config: RunConfig, path: str) -> Any:
    """Return what a configuration has for the setting of a search."""
    if path.startswith(_OPTIONS):
        return config.model.options[path.removeprefix(_OPTIONS)]
    return operator.attrgetter(path)(config)


def expand(suite: Suite, search: Search, settings: Sequence[str] = ()) -> Suite:
    """Return the suite with each of its rows once for each value.

    All rows of a seed come before those of the next, so that a suite that is stopped has whole
    seeds.

    Args:
        suite: the rows.
        search: the values.
        settings: what the command line says besides, `key=value`.

    Raises:
        InputError: for a value that the setting cannot have.
    """
    pairs = [(config, value) for config in suite.runs for value in search.values]
    if search.path == SEED:
        pairs = [(config, value) for value in search.values for config in suite.runs]
    # Others may be paths, which are not written as YAML.
    said = assigned(word for word in settings if word.startswith("profile"))
    return replace(suite, runs=tuple(_with(config, search, value, said) for config, value in pairs))


def expanded(
    plain: Suite,
    *,
    text: str | None,
    seed: int | None,
    seeds: int | None,
    settings: Sequence[str] = (),
) -> tuple[Suite, dict[str, str]]:
    """Return the suite with the values of a search and several seeds, and the row each row is of.

    Args:
        plain: the suite without them.
        text: what --search says, as `parse` takes it.
        seed: what --seed says.
        seeds: how many are run, the suite's own and those after it.
        settings: overrides on the command line, `key=value`.

    Raises:
        InputError: where --search names what one of the others does too.
    """
    searched = parse(text) if text else None
    for setting in settings:
        if searched is not None and f"{searched.path}.".startswith(f"{setting.split('=')[0]}."):
            raise InputError(f"--search {text} and {setting} set the same; leave one of them out")
    for option, given in (("seed", seed), ("seeds", seeds)):
        if searched is not None and searched.path == SEED and given is not None:
            raise InputError(
                f"--search {text} and --{option} {given} both say which seeds are run; leave one"
                " of them out"
            )
    suite, bases = plain, {config.row: config.row for config in plain.runs}
    if searched is not None:
        suite = expand(plain, searched, settings)
        bases = {searched.row(row, value): row for row in bases for value in searched.values}
        for row in dict.fromkeys(bases.values()):
            # Else it would have several rows of one and the same run.
            own = [run for run in suite.runs if bases[run.row] == row]
            check_effects(nested(searched.path, list(searched.values)), own, row)
    if seeds is not None:
        first = plain.runs[0].seed
        suite = expand(suite, Search(SEED, tuple(range(first, first + seeds))))
    return suite, bases


def started(suite: Suite, init: str, partial: bool) -> Suite:
    """Return the suite with the checkpoint that each row starts from.

    Args:
        init: a file for all rows, a folder of `ROW.pth`, or a pattern with `{row}`.
        partial: let rows of several mechanisms take what fits of one file.

    Raises:
        InputError: for a file that is not there, or one file for rows of several mechanisms.
    """
    pattern = str(Path(init) / "{row}.pth") if Path(init).is_dir() else init
    models = (run.model for run in suite.runs)
    several = len({(model.attention, model.arch, str(model.dense)) for model in models}) > 1
    if "{row}" not in pattern and several and not partial:
        raise InputError(
            f"--init {init} is one file for rows of several mechanisms, each of which would take"
            " what fits of it: name a folder of ROW.pth, or a pattern such as"
            " pretrained/{row}.pth, for one each; --init-partial allows it"
        )
    runs = []
    for run in suite.runs:
        names = dict.fromkeys((run.row, slug(run.row)))
        places = list(dict.fromkeys(pattern.replace("{row}", name) for name in names))
        found = next((place for place in places if Path(place).is_file()), None)
        if found is None:
            raise InputError(f"--init {init}: row {run.row}: no such file {' or '.join(places)}")
        runs.append(replace(run, train=replace(run.train, init=found)))
    return replace(suite, runs=tuple(runs))


@dataclass(frozen=True)
class Costs:
    """What is to be known of the costs of rows at full size.

    Attributes:
        configs: of the rows, at that size.
        measured: whether attention layers are measured besides.
    """

    configs: tuple[RunConfig, ...] = ()
    measured: bool = False


def costs_of(suite: Suite, bases: Mapping[str, str], reference: Reference, costs: str) -> Costs:
    """Return what is to be known; the values of a search share theirs where they can.

    Args:
        bases: the name of each row without the value of a search.
        reference: the size.
        costs: one of `COSTS`.
    """
    if costs == "none" or suite.runs[0].model.method == CLASSIFIER:
        return Costs()
    found: list[RunConfig] = []
    for base in dict.fromkeys(bases.values()):
        runs = [run for run in suite.runs if bases[run.row] == base]
        same = [reference_config(run, base, reference) for run in runs]
        own = {run.row: reference_config(run, run.row, reference) for run in runs}
        found += same[:1] if all(one == same[0] for one in same) else own.values()
    return Costs(tuple(found), costs == "measured")


def _values(listed: str) -> list[Any]:
    """Read the values of a list as overrides are read; malformed text has none."""
    try:
        values = read(f"[{listed}]")
    except InputError:
        return []
    return values if isinstance(values, list) else []


def _with(config: RunConfig, search: Search, value: Any, said: Mapping[str, Any]) -> RunConfig:
    values = config.as_dict()
    *groups, last = search.path.split(".")
    node = values
    for group in groups:
        node = node[group]
    node[last] = value
    values["row"] = search.row(config.row, value)
    found = build_config(values)
    if search.path == "data.fixed_size":
        found = with_costs_of_runs(found, [nested(search.path, value), said])
    check_sizes(found)
    return found
