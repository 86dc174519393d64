"""What to run: typed, frozen configuration, read from `configs/`.

A suite names a backbone, a recipe and rows; each row becomes one `RunConfig`, which holds every
value that the run depends on. Later sources win: defaults here, recipe, suite, row, command line.
"""

import dataclasses
import importlib.resources
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attentions
from attentions.contract import accepted_options
from bench.config import schema
from bench.config.arch import StageSpec, parse, render
from bench.config.schema import CLASSIFIER, METHODS, RunConfig
from bench.config.values import assigned, flat, merged, nested, read, shown
from bench.errors import InputError, choose, nearest

DATASETS_VARIABLE = "DETECTRON2_DATASETS"
# What only labels a run, and the options that set what it says.
CHOSEN = {
    "suite": "--suite",
    "row": "--rows",
    "model.backbone": "--backbone",
    "train.schedule": "--schedule",
}
# How the names of settings begin that costs depend on, and those of costs at stated sizes.
SIZED = (
    *("seed", "device", "model", "data.path", "data.train_file", "data.images", "data.train_split"),
    *("data.degenerate_boxes", "data.deep_white", "train.precision", "train.clip_norm"),
    *("train.no_decay", "train.lr_multipliers", "profile.proposals", "profile.repeats"),
    "profile.seconds",
)
MEASURED = (
    *SIZED,
    *("data.min_sizes", "data.max_size", "data.fixed_size", "profile.image_size"),
    *("profile.batch_size", "profile.training"),
)
_SUITE_KEYS = (
    *("backbone", "recipe", "recipes", "rows", "default", "needs", "stages"),
    *("run", "row_run", "with_data"),
)
_ROW_KEYS = ("attention", "dense", "feature", "num_global", "family", "position", "options")
_GLOBALS = (1, 1, 1, 0)
_FEATURE = 7


@dataclass(frozen=True)
class Suite:
    """A named list of runs.

    Attributes:
        needs: the data set that it cannot do without, or None where it generates its own.
        more: rows of the suite that run only where they are named.
        backbone: of all rows; None where each has its own.
    """

    name: str
    runs: tuple[RunConfig, ...]
    needs: str | None = None
    more: tuple[str, ...] = ()
    backbone: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of its runs."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    def name_of(self, run: RunConfig) -> str:
        """Return what a run is called: its row, and its seed where there are several."""
        return f"{run.row} (seed {run.seed})" if len(self.seeds) > 1 else run.row


def suites() -> tuple[str, ...]:
    """Return the names of the suites in `configs/suites`."""
    folder = importlib.resources.files("configs") / "suites"
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_suite(
    name: str,
    *,
    rows: Sequence[str] = (),
    backbone: str | None = None,
    schedule: str | None = None,
    method: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    searched: Mapping[str, Sequence[Any]] | None = None,
    whole: bool = True,
) -> Suite:
    """Read a suite and what the command line changes of it.

    Args:
        name: a file in `configs/suites`.
        rows: some of its rows, families of them, "all", or mechanisms of the user as
            `package.module:Class`; empty for the suite's default.
        backbone: one of `configs/backbones.yaml`, instead of the suite's.
        schedule: recipe of `configs/recipes.yaml`, or of the suite's own file, instead of the
            suite's; where the rows have schedules of their own, it chooses among them.
        method: "mask_rcnn" or "retinanet", likewise.
        data: folder in COCO layout, instead of the suite's data; without it, a suite that needs
            COCO takes `$DETECTRON2_DATASETS/coco` where that is a folder.
        seed: of everything random.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: `key=value`, for example `train.steps=100`.
        searched: values that a search will give settings, by dotted name; what has an effect with
            one of them has one.
        whole: whether these are all rows of a command: a setting has to change one of them.

    Raises:
        InputError: for an unknown suite, row or key, a value that is not allowed, or values that
            contradict each other.
    """
    choose(name, suites(), "suite")
    suite = _read(f"suites/{name}.yaml")
    _check_keys(suite, _SUITE_KEYS, f"suites/{name}.yaml")
    recipes, known_backbones = _read(suite.get("recipes", "recipes.yaml")), _read("backbones.yaml")
    if schedule is not None:
        choose(schedule, recipes, "schedule")
    if backbone is not None:
        choose(backbone, known_backbones, "backbone")
        if suite["rows"] != "all":
            raise InputError(
                f"--backbone {backbone}: each row of suite {name} has its own backbone"
            )
        suite |= {"backbone": backbone}
    table = _suite_rows(name, suite, schedule, method)
    _check_keys(suite.get("row_run", {}), table, f"suites/{name}.yaml at row_run")
    layers = [suite.get("run", {})]
    needs = suite.get("needs")
    named = {} if data is None else {"data": {"path": data}}
    if data is None and needs is not None:
        root = default_root()
        data = None if root is None else str(root)
    if data is not None:
        layers += [suite.get("with_data", {}), {"data": {"path": data}}]
    command_line = _overrides(overrides)
    plain: list[RunConfig] = []
    runs: list[RunConfig] = []
    chosen = _chosen(rows or suite.get("default", ["all"]), table)
    for row in chosen:
        found = _suite_row(row, table, name, suite)
        layer = _row_layer(found.stages, known_backbones[found.backbone])
        _check_mechanism(row, found.stages["attention"], command_line)
        top: dict[str, Any] = {"suite": name, "row": row, **named}
        top |= {key: v for key, v in (("seed", seed), ("device", device)) if v is not None}
        top |= {} if method is None else {"model": {"method": method}}
        recipe = recipes[found.recipe]
        said = merged([top, command_line], agree="")
        layers_of_row = [recipe, *layers, layer, found.settings, said]
        values = merged(layers_of_row)
        config = build_config(values)
        plain += [config, *_varied(values, searched)]
        runs.append(_with_fixed_size(with_costs_of_runs(config, layers_of_row)))
        check_sizes(runs[-1])
    if whole:
        check_effects(command_line, plain)
    _check_apart(runs, overrides)
    more = () if rows else tuple(row for row in table if row not in chosen)
    return Suite(name, tuple(runs), needs, more, suite.get("backbone"))


def check_needs(suite: Suite) -> None:
    """Fail where a suite needs a data set that was not found.

    Raises:
        InputError: then.
    """
    if suite.needs is not None and any(config.data.path is None for config in suite.runs):
        raise InputError(
            f"suite {suite.name} needs {suite.needs}: name its folder with --data, or set"
            " $DETECTRON2_DATASETS to the folder that holds coco/; `python -m bench data coco"
            " --root DIR` downloads it"
        )


def profile_configs(
    names: Sequence[str],
    *,
    backbone: str = "small",
    position: str | None = None,
    image_size: tuple[int, int] | None = None,
    is_default: bool = False,
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    used: Sequence[str] = ("",),
    searched: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[RunConfig, ...]:
    """Return a configuration for each name, to be measured and not trained.

    Args:
        names: rows of `configs/rows.yaml`, mechanisms (the first row that has it in all stages), or
            mechanisms of the user; families of rows; "all" for every row.
        backbone: one of `configs/backbones.yaml`.
        position: "absolute" or "relative" in all stages; None for that of the row.
        image_size: (height, width) of every image in pixels, which the detector takes as it is.
        is_default: whether nobody named `image_size`, so that data.fixed_size may stand for it.
        values: nested values besides, such as {"model": {"method": "retinanet"}}.
        overrides: `key=value`.
        used: how the names of settings begin that overrides may be of.
        searched: as in `load_suite`.

    Raises:
        InputError: for an unknown name, backbone or key, a value that is not allowed, or sizes that
            contradict each other.
    """
    known_backbones = _read("backbones.yaml")
    choose(backbone, known_backbones, "backbone")
    table = _rows()
    first = {spec["attention"]: row for row, spec in reversed(table.items()) if "dense" not in spec}
    rows = [first.get(name, name) for name in _chosen(names, table)]
    if not all(row in table or ":" in row for row in rows):
        wrong = next(row for row in rows if row not in table and ":" not in row)
        known = [*attentions.names(), *(row for row in table if row not in attentions.names())]
        raise InputError(
            f"unknown attention {wrong!r}{nearest(wrong, known)}; allowed: {', '.join(known)},"
            f" {', '.join(families())}, all, or a mechanism of yours as package.module:Class or"
            " file.py:Class"
        )
    size: dict[str, Any] = {}
    if image_size is not None:
        size = {
            "data": {"min_sizes": [min(image_size)], "max_size": max(image_size)},
            "profile": {"image_size": list(image_size)},
        }
    command_line = _overrides(overrides)
    if position is not None and "model.arch" in flat(command_line):
        raise InputError("model.arch says where positions are absolute (a1); leave out --position")
    plain, varied, sized = [], [], []
    for row in dict.fromkeys(rows):
        spec = table.get(row, {"attention": row}) | ({"position": position} if position else {})
        layer = _row_layer(spec, known_backbones[backbone])
        _check_mechanism(row, spec["attention"], command_line)
        top = {"suite": "profile", "row": row}
        layers = [values or {}, layer, top, command_line]
        whole = merged([size, *layers])
        plain.append(build_config(whole))
        varied += _varied(whole, searched)
        said = layers if is_default else [*layers, size]
        sized.append(with_costs_of_runs(plain[-1], said))
    for name, value in flat(command_line).items():
        if not name.startswith(tuple(used)):
            raise InputError(
                f"{name}={shown(value)} has no effect in this command; those that have begin with"
                f" {', '.join(used)}"
            )
    check_effects(command_line, [*plain, *varied])
    configs = tuple(_with_fixed_size(config, image_size) for config in sized)
    for config in configs if image_size is not None else ():
        check_sizes(config)
    _check_apart(configs, overrides)
    return configs


@dataclass(frozen=True)
class Reference:
    """What rows are counted at, whatever they were trained at: by default as published.

    Attributes:
        image_size: (height, width) of every image in pixels.
        batch_size: images of a device.
        precision: one of `bench.config.schema.PRECISIONS`.
        device: "cuda" or "cpu"; it need not be here.
    """

    image_size: tuple[int, int] = (800, 1344)
    batch_size: int = 2
    precision: str = "16-mixed"
    device: str = "cuda"


def reference_config(run: RunConfig, row: str, reference: Reference) -> RunConfig:
    """Return a run's model at the size of a reference, to be counted and not trained.

    A backbone that another stands for (`reference` in backbones.yaml) keeps what its stages do, and
    has the other's heads, widths and depths; the detector is the published one. What the run is
    trained on and how does not matter.

    Args:
        run: of a suite.
        row: what it is called, without the value of a search.
        reference: the size.

    Raises:
        InputError: where the model cannot have that size.
    """
    known = {spec["label"]: spec for spec in _read("backbones.yaml").values()}
    own, model = known.get(run.model.backbone, {}), replace(run.model, drop_path=0.0)
    if "reference" in own:
        full = _read("backbones.yaml")[own["reference"]]
        stages = (
            replace(stage, **{name: size[name] for name in ("heads", "dim", "blocks", "patch")})
            for stage, size in zip(_stages(run), full["stages"], strict=False)
        )
        arch = _render(tuple(stages), model.attention)
        # Blocks that the row counts through the whole depth are others in another depth.
        of_row = _rows().get(run.row.partition(" (")[0], {}).get("dense", ())
        _, dense = _dense(of_row, full["stages"]) if model.dense else ((), {})
        model = replace(
            model,
            backbone=full["label"],
            arch=arch,
            dense={stage: tuple(blocks) for stage, blocks in dense.items()},
            detector=schema.DetectorConfig(),
        )
    size = reference.image_size
    config = RunConfig(
        suite="costs",
        row=row,
        device=reference.device,
        model=model,
        data=schema.DataConfig(min_sizes=(min(size),), max_size=max(size)),
        train=schema.TrainConfig(precision=reference.precision),
        profile=schema.ProfileConfig(image_size=size, batch_size=reference.batch_size),
    )
    return _with_fixed_size(config, size)


def mechanisms(names: Iterable[str]) -> list[str]:
    """Return the mechanisms that are named, or that stand in rows that are named; "all" for all."""
    table, own = _rows(), attentions.names()
    every = [one for name in names for one in (own if name == "all" else (name,))]
    known = {row: str(spec["attention"]) for row, spec in table.items() if row not in own}
    return list(dict.fromkeys(known.get(name, name) for name in every))


def row_stages() -> dict[str, Mapping[str, Any]]:
    """Return what stands in the stages of each row, as `configs/rows.yaml` says it."""
    return _rows()


def families() -> dict[str, tuple[str, ...]]:
    """Return the rows of each family of `configs/rows.yaml`."""
    table = _rows()
    found = dict.fromkeys(name for spec in table.values() for name in spec.get("family", []))
    return {
        name: tuple(row for row, spec in table.items() if name in spec.get("family", []))
        for name in found
    }


def backbones() -> tuple[str, ...]:
    """Return the names of the backbones in `configs/backbones.yaml`."""
    return tuple(_read("backbones.yaml"))


def named_root() -> Path | None:
    """Return `$DETECTRON2_DATASETS/coco`, where detectron2 looks for COCO, or None."""
    value = os.environ.get(DATASETS_VARIABLE)
    # Path.expanduser raises where there is no such user or home.
    return Path(os.path.expanduser(value)) / "coco" if value else None  # noqa: PTH111


def default_root() -> Path | None:
    """Return `named_root` where it is a folder, or None."""
    root = named_root()
    return root if root is not None and root.is_dir() else None


def check_effects(given: Mapping[str, Any], runs: Sequence[RunConfig], row: str = "") -> None:
    """Refuse a setting that is given and changes nothing in any of some runs.

    Args:
        given: nested values, as a person said them; what asks for nothing (null, false, 0 or an
            empty list) need not change anything.
        runs: with these values.
        row: the one that they are of, where others have theirs.

    Raises:
        InputError: for the first such setting.
    """
    for name, value in flat(given).items():
        idle = [schema.without_effect(run, name) for run in runs]
        if value and all(idle):
            of_row = f"in row {row}, " if row else ""
            raise InputError(f"{name}={shown(value)} has no effect {of_row}{idle[0]}")


def _varied(
    values: Mapping[str, Any], searched: Mapping[str, Sequence[Any]] | None
) -> list[RunConfig]:
    """Return the configurations of `values` with each that a search will give a setting."""
    return [
        build_config(merged([values, nested(name, value)]))
        for name, each in (searched or {}).items()
        for value in each
    ]


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Return the `RunConfig` of nested plain values, such as those of a record.

    Raises:
        InputError: for an unknown key, a value that is not allowed, or values that do not go
            together.
    """
    config = schema.build(RunConfig, values)
    named = config.data.train_file or config.data.val_file
    if config.data.path is None and named is not None:
        # What is not generated has a folder.
        config = replace(config, data=replace(config.data, path=str(Path(named).parent)))
    train = config.train
    if train.batch_size % (train.devices * train.accumulate):
        raise InputError(
            f"train.batch_size={train.batch_size} must be a multiple of train.devices="
            f"{train.devices} times train.accumulate={train.accumulate}"
        )
    if config.model.method == CLASSIFIER:
        if config.data.fixed_size is None:
            raise InputError(
                "data.fixed_size: a classifier needs the (height, width) of its images"
            )
        part = train.batch_size // (train.devices * train.accumulate)
        mixing = {"mixup": config.classify.mixup, "cutmix": config.classify.cutmix}
        for name, value in mixing.items():
            if value and part % 2:
                raise InputError(
                    f"classify.{name}={value} mixes images in pairs, and a part of a step has"
                    f" {part}; train.batch_size={train.batch_size} must be an even multiple of"
                    f" train.devices={train.devices} times train.accumulate={train.accumulate}, or"
                    " classify.mixup and classify.cutmix 0"
                )
        if config.profile.enabled:
            raise InputError(
                "profile.enabled=True: a classifier is not measured; `python -m bench profile`"
                " measures its backbone"
            )
    _stages(config)
    return config


def _read(path: str) -> dict[str, Any]:
    text = (importlib.resources.files("configs") / path).read_text(encoding="utf-8")
    content = read(text, f"configs/{path}")
    if not isinstance(content, dict):
        raise InputError(f"configs/{path} is not a mapping")
    return content


def _check_keys(values: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    for key in values:
        choose(str(key), allowed, f"key in configs/{where}:")


def _rows() -> dict[str, Any]:
    """Return those of rows.yaml, then one and a partial one for every other mechanism."""
    table = _read("rows.yaml")
    for row, spec in table.items():
        _check_keys(spec, _ROW_KEYS, f"rows.yaml at {row}")
    named = {spec["attention"] for spec in table.values()}
    for mechanism in attentions.names():
        if mechanism not in named:
            table[mechanism] = {"attention": mechanism}
            table[f"Partial {mechanism}"] = {"attention": mechanism, "dense": [3, 4]}
    return table


@dataclass(frozen=True)
class _SuiteRow:
    """A row of a suite: what stands in the stages of which backbone, its recipe, its settings."""

    stages: Mapping[str, Any]
    backbone: str
    recipe: str
    settings: Mapping[str, Any]


def _suite_rows(
    name: str, suite: Mapping[str, Any], schedule: str | None, method: str | None
) -> dict[str, _SuiteRow]:
    """Return the rows of a suite that have a schedule and a method or can be given them."""
    asked = {"schedule": schedule, "method": method}
    if method is not None:
        choose(method, METHODS, "method")
    if suite["rows"] == "all":
        recipe, own = schedule or suite["recipe"], suite.get("row_run", {})
        return {
            row: _SuiteRow(stages, suite["backbone"], recipe, own.get(row, {}))
            for row, stages in _rows().items()
        }
    rows = {
        row: _SuiteRow(
            suite["stages"],
            entry["backbone"],
            entry["recipe"],
            {"model": {key: entry[key] for key in ("method", "drop_path")}},
        )
        for row, entry in suite["rows"].items()
        if schedule in (None, entry["recipe"]) and method in (None, entry["method"])
    }
    if not rows:
        given = " and ".join(f"{k} {v}" for k, v in asked.items() if v is not None)
        raise InputError(
            f"no row of suite {name} has {given}; its rows: {', '.join(suite['rows'])}"
        )
    return rows


def _chosen(names: Iterable[str], table: Iterable[str]) -> tuple[str, ...]:
    """Return the rows that names of rows, names of families and "all" stand for, each once."""
    groups = {"all": tuple(table)} | {
        family: tuple(row for row in rows if row in table) for family, rows in families().items()
    }
    return tuple(dict.fromkeys(row for name in names for row in groups.get(name) or (name,)))


def _suite_row(
    row: str, table: Mapping[str, _SuiteRow], name: str, suite: Mapping[str, Any]
) -> _SuiteRow:
    """Return a row by its name, or of a mechanism of the user where the suite takes one."""
    if row in table:
        return table[row]
    takes_mechanisms = suite["rows"] == "all"
    if takes_mechanisms and ":" in row:
        recipe = next(iter(table.values())).recipe
        return _SuiteRow({"attention": row}, suite["backbone"], recipe, {})
    more = (
        f", all, a family ({', '.join(families())}), or a mechanism of yours as"
        " package.module:Class or file.py:Class"
    )
    raise InputError(
        f"unknown row {row!r} of suite {name}{nearest(row, table)}; allowed:"
        f" {', '.join(table)}{more if takes_mechanisms else ''}"
    )


def _row_layer(spec: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model settings of a row in a backbone."""
    dense, blocks = _dense(spec.get("dense", []), backbone["stages"])
    count = len(backbone["stages"])
    feature, least = _needs(spec["attention"])
    features = spec.get("feature", [feature] * count)
    num_global = spec.get("num_global") or [
        few if number in dense else max(few, least)
        for number, few in enumerate(_GLOBALS[:count], start=1)
    ]
    stages = [
        StageSpec(
            number=number,
            heads=stage["heads"],
            dim=stage["dim"],
            blocks=stage["blocks"],
            attention="full" if number in dense else spec["attention"],
            num_global=num_global[number - 1],
            patch=stage["patch"],
            feature=features[number - 1],
            absolute=spec.get("position", "absolute") == "absolute",
        )
        for number, stage in enumerate(backbone["stages"], start=1)
    ]
    arch = _render(stages, spec["attention"])
    model = {"backbone": backbone["label"], "arch": arch, "attention": spec["attention"]}
    model |= {"dense": blocks} if blocks else {}
    if "options" in spec:
        model["options"] = spec["options"]
    return {"model": model}


def _dense(
    dense: Sequence[int] | Mapping[Any, Any], stages: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[int], Mapping[int, Sequence[int]]]:
    """Return the stages with full attention, and single blocks of other stages, by stage."""
    if not isinstance(dense, Mapping):
        return dense, {}
    if "every" not in dense:
        return (), dense
    blocks = [(n, i) for n, stage in enumerate(stages, start=1) for i in range(stage["blocks"])]
    chosen = blocks[dense["every"] - 1 :: dense["every"]]
    return (), {number: [i for n, i in chosen if n == number] for number, _ in chosen}


def _render(stages: Sequence[StageSpec], attention: str) -> str:
    arch = render(stages)
    # `s` tells the chosen mechanism from full attention; here they are the same.
    return arch.replace(",s0,", ",s1,") if attention == "full" else arch


def _needs(mechanism: str) -> tuple[int, int]:
    """Return what `f` in an ARCH string is by default, and the least number of global tokens."""
    try:
        factory = attentions.find(mechanism)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    parameter = accepted_options(factory).get(getattr(factory, "arch_option", None) or "")
    own = None if parameter is None else parameter.default
    feature = own if type(own) is int and own > 0 else _FEATURE
    return feature, getattr(factory, "least_globals", 0)


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    values = assigned(given)
    for name, value in flat(values).items():
        if name in CHOSEN:
            raise InputError(f"'{name}={shown(value)}': {name} is chosen by {CHOSEN[name]}")
    return values


def _check_mechanism(row: str, own: str, given: Mapping[str, Any]) -> None:
    """Refuse a mechanism under whose row another one would stand."""
    said = flat(given).get("model.attention")
    if said is not None and own not in str(said).split(","):
        raise InputError(f"model.attention={said}: row {row} is of {own}; name another row instead")


def _check_apart(runs: Sequence[RunConfig], overrides: Sequence[str]) -> None:
    """Refuse settings that make one of two rows, whose names would then say what they are not."""
    rows: dict[str, str] = {}
    for run in runs if overrides else ():
        other = rows.setdefault(repr(replace(run, row="")), run.row)
        if other != run.row:
            raise InputError(
                f"rows {other} and {run.row} are the same with {' '.join(overrides)}; name one"
            )


def _stages(config: RunConfig) -> tuple[StageSpec, ...]:
    """Return the stages of a model whose mechanisms know each of its options."""
    model = config.model
    try:
        stages = parse(model.arch, model.attention, model.dense)
        names = {name for stage in stages for name in stage.mechanisms}
        known = {option for name in names for option in attentions.options(name)}
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    for option in model.options:
        if option not in known:
            raise InputError(
                f"model.options.{option}: no attention of row {config.row!r} has such an option"
                f"{nearest(option, known)}; allowed: {', '.join(sorted(known))}"
            )
    return stages


def made_for_one_size(config: RunConfig) -> str | None:
    """Return the mechanism of a row that works for one image size only, if there is one."""
    mechanisms = (stage.attention for stage in _stages(config))
    return next(
        (one for one in mechanisms if getattr(attentions.find(one), "fixed_size", False)), None
    )


def resize_notes(config: RunConfig) -> list[str]:
    """Return a note where images of a row are resized to another size than its costs are of.

    All are to one size where data.fixed_size says so, for the sake of its mechanism or not.
    """
    size = config.profile.image_size
    if config.data.fixed_size is None:
        stages, data = _stages(config), config.data
        scale = min(data.min_sizes[-1] / min(size), data.max_size / max(size))
        taken = [_padded(round(scale * side), stages) for side in size]
        if taken == [_padded(side, stages) for side in size]:
            return []
        return [
            f"costs are of images of {size[0]}x{size[1]}, which are evaluated as"
            f" {taken[0]}x{taken[1]} by data.min_sizes and data.max_size;"
            f" profile.image_size={taken} has costs of that"
        ]
    only = "works for one sequence length: " if made_for_one_size(config) else ""
    return [f"{only}every image is resized to {'x'.join(map(str, config.data.fixed_size))}"]


def with_costs_of_runs(config: RunConfig, layers: Sequence[Mapping[str, Any]]) -> RunConfig:
    """Let the costs of a row be of the size that data.fixed_size makes of its images.

    A size of the profile that is said with it or after it stays, for `check_sizes` to compare.

    Args:
        config: of the row.
        layers: nested values that it was made of, the later ones over those before.
    """
    fixed = config.data.fixed_size
    if fixed is None or config.model.method == CLASSIFIER:
        return config
    said = {name: place for place, layer in enumerate(layers) for name in flat(layer)}
    if said.get("profile.image_size", -1) >= said.get("data.fixed_size", -1):
        return config
    stages = _stages(config)
    size = _padded(fixed[0], stages), _padded(fixed[1], stages)
    return replace(config, profile=replace(config.profile, image_size=size))


def _with_fixed_size(config: RunConfig, image_size: tuple[int, int] | None = None) -> RunConfig:
    """Give a fixed image size to a row whose mechanism works for one size only.

    It is `image_size` (height, width) or else the size of evaluation, rounded up to the stride.
    """
    if config.data.fixed_size is not None or made_for_one_size(config) is None:
        return config
    stages = _stages(config)
    height, width = image_size or (config.data.min_sizes[-1], config.data.max_size)
    size = _padded(height, stages), _padded(width, stages)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, fixed_size=size),
        profile=dataclasses.replace(config.profile, image_size=size),
    )


def _padded(side: int, stages: Sequence[StageSpec]) -> int:
    """Return a side of an image, rounded up to the stride of a backbone."""
    stride = math.prod(stage.patch for stage in stages)
    return math.ceil(side / stride) * stride


def check_sizes(config: RunConfig) -> None:
    """Check that images are as large as their resize says, and that the profile is of such images.

    Raises:
        InputError: where they cannot be.
    """
    data, profile = config.data, config.profile
    if data.fixed_size is None and max(data.min_sizes) > data.max_size:
        raise InputError(
            f"data.min_sizes={list(data.min_sizes)} must not be above data.max_size={data.max_size}"
        )
    if config.model.method == CLASSIFIER:
        return
    stages = _stages(config)
    size = f"profile.image_size={list(profile.image_size)}"
    if data.fixed_size is not None:
        pairs = zip(profile.image_size, data.fixed_size, strict=True)
        # FLOPs are counted at one of them, memory and latency are measured at the other.
        if any(_padded(a, stages) != _padded(b, stages) for a, b in pairs):
            raise InputError(
                f"{size} must be the size that all images of row {config.row} are resized to,"
                f" data.fixed_size={list(data.fixed_size)}; leave one of them out"
            )
    # FLOPs are counted where nothing is measured, too.
    elif max(profile.image_size) > _padded(data.max_size, stages):
        raise InputError(
            f"{size} must not be larger than the images that row {config.row} is made for,"
            f" data.max_size={data.max_size}; change one of them"
        )
