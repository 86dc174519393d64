"""What the suite `probes` runs: mechanisms and rows, each with settings in proportion."""

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from pydantic import dataclasses as checked

import attentions
from bench.config.schema import Fraction, Positive, PositiveNumber, Seed, Share, build
from bench.config.suites import families, load_suite, row_stages
from bench.config.values import assigned, read
from bench.errors import InputError, nearest

SUITE = "probes"
MECHANISM, ROW = "mechanism", "row"
DIM = 32
# Rows have a stage like that of a mechanism, and one of the half side.
_STAGES = ((DIM, 1), (2 * DIM, 2))
_GLOBALS = 1


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{list(seeds)} must be different numbers")
    return seeds


@checked.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """How every model of a probe is trained and evaluated.

    Attributes:
        seeds: each trains a model of its own.
        batch_size: images a step.
        steps: share of the steps of each task; less is for trying out.
        lr: peak rate of mechanisms; a tenth of the steps warms up, a cosine falls to `last_lr` of
            it.
        row_lr: the same of rows.
        row_steps: steps of rows, for each of mechanisms.
        images: evaluation images of each level.
    """

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_different)] = (0, 1, 2)
    batch_size: Positive = 8
    steps: PositiveNumber = 1.0
    lr: PositiveNumber = 1.1e-2
    row_lr: PositiveNumber = 4e-3
    row_steps: PositiveNumber = 1.4
    last_lr: Share = 0.05
    warm_up: Share = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    weight_decay: Share = 0.01
    clip_norm: PositiveNumber = 1.0
    images: Positive = 64


@dataclass(frozen=True)
class StageConfig:
    """One stage of a probe's model.

    Attributes:
        attention: the mechanism of its blocks.
        dim: channels.
        blocks: pairs of an attention and an MLP.
        num_global: learned global tokens.
        options: of the mechanism.
    """

    attention: str
    dim: int = DIM
    blocks: int = 2
    num_global: int = _GLOBALS
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is probed.

    Attributes:
        name: of the mechanism or row.
        kind: MECHANISM or ROW.
        stages: of its model.
        tasks: names of `bench.data.symbols.TASKS`.
        recipe: how it is trained.
    """

    name: str
    kind: str
    stages: tuple[StageConfig, ...]
    tasks: tuple[str, ...]
    recipe: Recipe

    def values(self) -> dict[str, Any]:
        """The whole configuration, for the record."""
        return asdict(self)


def build_recipe(overrides: Sequence[str]) -> Recipe:
    """Return the recipe with `key=value` of the command line, such as `seeds=[0,1]`.

    Raises:
        InputError: for an unknown key or a value that is not allowed.
    """
    values = assigned(overrides)
    seeds = values.get("seeds", [])
    return build(Recipe, values | ({} if isinstance(seeds, list) else {"seeds": [seeds]}))


def mechanisms() -> tuple[str, ...]:
    """Return every mechanism, and every variant of `configs/probes.yaml`."""
    return (*attentions.names(), *_declared()["variants"])


def plan(
    names: Sequence[str], tasks: Sequence[str], recipe: Recipe, *, rows: Sequence[str] = ()
) -> tuple[Subject, ...]:
    """Return what to probe.

    Args:
        names: mechanisms, variants of them, "all", or mechanisms of the user as
            `package.module:Class` or `file.py:Class`.
        tasks: of the mechanisms.
        recipe: of all.
        rows: rows of `configs/rows.yaml`, families of them, or "all".

    Raises:
        InputError: for an unknown name, or a mechanism that cannot be had.
    """
    found = [one for name in names for one in (mechanisms() if name == "all" else (name,))]
    subjects = [_mechanism(name, tuple(tasks), recipe) for name in dict.fromkeys(found)]
    of_rows = tuple(_declared()["tasks_of_rows"])
    return (*subjects, *(_row(name, of_rows, recipe) for name in _rows(rows)))


def suite_plan(names: Sequence[str], tasks: Sequence[str], recipe: Recipe) -> tuple[Subject, ...]:
    """Return what the suite probes.

    Args:
        names: as --rows has them; what is the name of a mechanism and of a row is both. Without
            any, all mechanisms and the rows that the quick suite runs.
        tasks: of the mechanisms.
        recipe: of all.

    Raises:
        InputError: as `plan`.
    """
    if not names:
        rows = [run.row for run in load_suite("quick").runs]
        return plan(["all"], tasks, recipe, rows=rows)
    known = (*mechanisms(), "all")
    of_rows = [name for name in names if ":" not in name and name not in mechanisms()]
    both = [name for name in names if name in mechanisms() and name in row_stages()]
    return plan(
        [name for name in names if name in known or ":" in name],
        tasks,
        recipe,
        rows=[name for name in names if name in (*of_rows, *both)],
    )


def _mechanism(name: str, tasks: tuple[str, ...], recipe: Recipe) -> Subject:
    settings = dict(_declared()["variants"].get(name, {}))
    attention = settings.pop("attention", name)
    try:
        attentions.find(attention)
    except ValueError as error:
        raise InputError(str(error)) from error
    return Subject(name, MECHANISM, (_stage(attention, settings),), tasks, recipe)


def _rows(names: Sequence[str]) -> list[str]:
    groups = {**families(), "all": tuple(row_stages())}
    found = [row for name in names for row in groups.get(name) or (name,)]
    for row in found:
        if row not in groups["all"]:
            raise InputError(
                f"unknown row {row!r}{nearest(row, groups['all'])}; allowed:"
                f" {', '.join([*groups['all'], *groups])}"
            )
    return list(dict.fromkeys(found))


def _row(name: str, tasks: tuple[str, ...], recipe: Recipe) -> Subject:
    spec = row_stages()[name]
    own = _declared()["rows"].get(name, {})
    second = "full" if 3 in spec.get("dense", ()) else spec["attention"]
    stages = [
        _stage(attention, own if attention == spec["attention"] else {}, dim, blocks)
        for attention, (dim, blocks) in zip((spec["attention"], second), _STAGES, strict=True)
    ]
    return Subject(name, ROW, tuple(stages), tasks, recipe)


def _stage(attention: str, own: Mapping[str, Any], dim: int = DIM, blocks: int = 2) -> StageConfig:
    options = {**_declared()["mechanisms"].get(attention, {}), **own}
    least = getattr(attentions.find(attention), "least_globals", 0)
    num_global = options.pop("num_global", max(_GLOBALS, least))
    return StageConfig(attention, dim, blocks, num_global, options)


def _declared() -> dict[str, Any]:
    text = (importlib.resources.files("configs") / "probes.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = read(text)
    return content
