"""What to run: typed, frozen configuration, read from `configs/`.

A suite names a backbone, a recipe and rows; each row becomes one `RunConfig`, which holds every
value that the run depends on. Later sources win: defaults here, recipe, suite, row, command line.
"""

import importlib.resources
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import attentions
from attentions.contract import accepted_options
from bench.arch import StageSpec, parse, render
from bench.data.coco import default_root
from bench.data.images import DEEPEST
from bench.errors import InputError, choose, nearest
from bench.vocabulary import LIBRARIES, METHODS, PRECISIONS

DECAYS = ("steps", "cosine")
# What only labels a run, and the options that set what it says.
CHOSEN = {"suite": "--suite", "row": "--rows", "train.schedule": "--schedule"}
_GLOBALS = (1, 1, 1, 0)
_FEATURE = 7


@dataclass(frozen=True)
class DetectorConfig:
    """The detector around the backbone, as `bench.detectors.build` takes it; lengths in pixels."""

    fpn_channels: int = 256
    head_width: int = 1024
    mask_width: int = 256
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    rpn_proposals: list[int] = field(default_factory=lambda: [2000, 1000])
    rpn_proposals_test: list[int] = field(default_factory=lambda: [1000, 1000])
    rpn_batch: int = 256
    roi_batch: int = 512
    detections: int = 100
    score_threshold: float = 0.05


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, mechanism and detector.

    Attributes:
        backbone: its label, for the tables.
        arch: ARCH string.
        attention: mechanism of the stages with `s1`, or one for each stage, comma-separated.
        options: options of the mechanisms.
        drop_path: rate of the last block.
    """

    backbone: str = ""
    arch: str = ""
    attention: str = "longformer"
    options: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    norm_embed: bool = True
    method: str = "mask_rcnn"
    library: str = "torchvision"
    detector: DetectorConfig = field(default_factory=DetectorConfig)


@dataclass(frozen=True)
class GeneratedConfig:
    """The generated data set; image_size is (height, width)."""

    seed: int = 0
    train_images: int = 800
    val_images: int = 100
    image_size: list[int] = field(default_factory=lambda: [128, 160])


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are resized.

    Attributes:
        path: folder in COCO layout, or None for the generated data set.
        train_file, val_file: annotation files of the split to train on and of the others, wherever
            they are; None where `path` has them.
        images: folder of the images of all splits; None to look for them near the annotations.
        min_sizes: shortest edge; training draws one of several, evaluation takes the last.
        max_size: longest edge.
        fixed_size: every image becomes exactly this (height, width); None keeps the aspect ratio.
        workers: decoding processes.
        degenerate_boxes: "error", or "drop" to leave out boxes without area.
        deep_white: the value that is white in grey images of 16 bits, 4095 for 12 bits in 16.
    """

    path: str | None = None
    train_file: str | None = None
    val_file: str | None = None
    images: str | None = None
    generated: GeneratedConfig = field(default_factory=GeneratedConfig)
    train_split: str = "train2017"
    min_sizes: list[int] = field(default_factory=lambda: [800])
    max_size: int = 1333
    fixed_size: list[int] | None = None
    flip: bool = True
    workers: int = 0
    aspect_ratio_grouping: bool = False
    degenerate_boxes: str = "error"
    deep_white: int = 65535


@dataclass(frozen=True)
class TrainConfig:
    """Schedule: steps are optimiser steps, batch_size images a step, lr the peak rate.

    Attributes:
        batch_size: of all processes and accumulated parts together.
        devices: processes that share a step, one a GPU.
        accumulate: parts that each process does its share of a step in, one after the other. The
            result depends on `devices * accumulate` alone, not on how it is made up.
        scale_from_batch: images a step that lr, steps, warmup_steps and milestones are meant for;
            with another batch_size, lr is scaled by the ratio and the steps inversely.
        no_decay: what has no weight decay: "norms", "biases", "tokens", "positions" or patterns of
            parameter names such as "backbone.*".
        lr_multipliers: factors of the rate by pattern of parameter names; the first that fits.
        init: checkpoint that a new run starts from, of a classifier or a detector.
        clip_norm: of the gradient of the full model, 0 for no clipping, None for the published one
            of the method.
    """

    schedule: str = "1x"
    steps: int = 90000
    batch_size: int = 16
    devices: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    scale_from_batch: int | None = None
    weight_decay: float = 0.05
    no_decay: list[str] = field(default_factory=list)
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    init: str | None = None
    warmup_steps: int = 1000
    warmup_factor: float = 0.01
    decay: str = "steps"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    clip_norm: float | None = None
    precision: str = "32-true"
    checkpoint_every: int = 2500
    log_every: int = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """Splits to evaluate on; the first one fills the tables.

    Attributes:
        bootstrap: draws of images that the intervals of mAP come from; 0 for none.
    """

    splits: list[str] = field(default_factory=lambda: ["val2017"])
    batch_size: int = 4
    bootstrap: int = 1000


@dataclass(frozen=True)
class ProfileConfig:
    """What is measured: image_size is (height, width); seconds and repeats are the least."""

    enabled: bool = True
    image_size: list[int] = field(default_factory=lambda: [800, 1344])
    batch_size: int = 1
    proposals: int = 1000
    repeats: int = 10
    seconds: float = 1.0
    training: bool = True


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run depends on."""

    suite: str = ""
    row: str = ""
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, for the record."""
        return asdict(self)


@dataclass(frozen=True)
class Suite:
    """A named list of runs.

    Attributes:
        needs: the data set that it cannot do without, or None where it generates its own.
    """

    name: str
    runs: tuple[RunConfig, ...]
    needs: str | None = None


def suites() -> tuple[str, ...]:
    """Names of the suites in `configs/suites`."""
    folder = importlib.resources.files("configs") / "suites"
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_suite(
    name: str,
    *,
    rows: Sequence[str] = (),
    schedule: str | None = None,
    method: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> Suite:
    """Read a suite and what the command line changes of it.

    Args:
        name: a file in `configs/suites`.
        rows: some of its rows, or mechanisms of the user as `package.module:Class`; empty for all.
        schedule: recipe of `configs/recipes.yaml`, instead of the suite's; where the rows have
            schedules of their own, it chooses among them.
        method: "mask_rcnn" or "retinanet", likewise.
        data: folder in COCO layout, instead of the suite's data; without it, a suite that needs
            COCO takes `$DETECTRON2_DATASETS/coco` where that is a folder.
        seed: of everything random.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: `key=value`, for example `train.steps=100`.

    Raises:
        InputError: for an unknown suite, row, key or a value of the wrong type.
    """
    choose(name, suites(), "suite")
    suite = _read(f"suites/{name}.yaml")
    table = _suite_rows(name, suite, schedule, method)
    layers = [suite.get("run", {})]
    needs = suite.get("needs")
    if data is None and needs is not None:
        root = default_root()
        data = None if root is None else str(root)
    if data is not None:
        layers += [suite.get("with_data", {}), {"data": {"path": data}}]
    command_line = _dotlist(overrides)
    recipes, known_backbones = _read("recipes.yaml"), _read("backbones.yaml")
    runs = []
    for row in dict.fromkeys(rows or table):
        found = _suite_row(row, table, name, suite)
        layer = _row_layer(found.stages, known_backbones[found.backbone])
        top: dict[str, Any] = {"suite": name, "row": row}
        top |= {key: v for key, v in (("seed", seed), ("device", device)) if v is not None}
        top |= {} if method is None else {"model": {"method": method}}
        recipe = recipes[found.recipe]
        config = _merge([recipe, *layers, layer, found.settings, top, command_line])
        runs.append(_validated(_fixed(config)))
    return Suite(name, tuple(runs), needs)


def profile_configs(
    names: Sequence[str],
    *,
    backbone: str = "small",
    image_size: tuple[int, int] | None = None,
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[RunConfig, ...]:
    """Return a configuration for each name, to be measured and not trained.

    Args:
        names: rows of `configs/rows.yaml`, mechanisms (the first row that has it in all stages), or
            mechanisms of the user; "all" for every row.
        backbone: one of `configs/backbones.yaml`.
        image_size: (height, width) of every image in pixels, which the detector takes as it is.
        values: nested values besides, such as {"model": {"method": "retinanet"}}.
        overrides: `key=value`.

    Raises:
        InputError: for an unknown name, backbone or key, or a value of the wrong type.
    """
    known_backbones = _read("backbones.yaml")
    choose(backbone, known_backbones, "backbone")
    table = _rows()
    first = {spec["attention"]: row for row, spec in reversed(table.items()) if "dense" not in spec}
    rows = [row for name in names for row in (table if name == "all" else [first.get(name, name)])]
    if not all(row in table or ":" in row for row in rows):
        wrong = next(row for row in rows if row not in table and ":" not in row)
        known = [*attentions.names(), *(row for row in table if row not in attentions.names())]
        raise InputError(
            f"unknown attention {wrong!r}{nearest(wrong, known)}; allowed: {', '.join(known)},"
            " all, or a mechanism of yours as package.module:Class or file.py:Class"
        )
    size: dict[str, Any] = {}
    if image_size is not None:
        size = {
            "data": {"min_sizes": [min(image_size)], "max_size": max(image_size)},
            "profile": {"image_size": list(image_size)},
        }
    command_line = _dotlist(overrides)
    configs = []
    for row in dict.fromkeys(rows):
        layer = _row_layer(table.get(row, {"attention": row}), known_backbones[backbone])
        top = {"suite": "profile", "row": row}
        config = _merge([size, values or {}, layer, top, command_line])
        configs.append(_validated(_fixed(config, image_size)))
    return tuple(configs)


def backbones() -> tuple[str, ...]:
    """Names of the backbones in `configs/backbones.yaml`."""
    return tuple(_read("backbones.yaml"))


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Return the `RunConfig` of nested plain values, such as those of a record.

    Raises:
        InputError: for an unknown key or a value of the wrong type.
    """
    return _validated(_merge([dict(values)]))


def _read(path: str) -> dict[str, Any]:
    text = (importlib.resources.files("configs") / path).read_text(encoding="utf-8")
    container = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(container, dict):
        raise InputError(f"configs/{path} holds no mapping")
    return {str(key): value for key, value in container.items()}


def _rows() -> dict[str, Any]:
    """All rows: those of rows.yaml, then one and a partial one for every other mechanism."""
    table = _read("rows.yaml")
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
    """The rows of a suite, by name, that have a schedule and a method or can be given them."""
    asked = {"schedule": schedule, "method": method}
    if schedule is not None:
        choose(schedule, _read("recipes.yaml"), "schedule")
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


def _suite_row(
    row: str, table: Mapping[str, _SuiteRow], name: str, suite: Mapping[str, Any]
) -> _SuiteRow:
    """A row by its name, or made of a mechanism of the user where the suite has a place for it."""
    if row in table:
        return table[row]
    takes_mechanisms = suite["rows"] == "all"
    if takes_mechanisms and ":" in row:
        recipe = next(iter(table.values())).recipe
        return _SuiteRow({"attention": row}, suite["backbone"], recipe, {})
    more = ", or a mechanism of yours as package.module:Class or file.py:Class"
    raise InputError(
        f"unknown row {row!r} of suite {name}{nearest(row, table)}; allowed:"
        f" {', '.join(table)}{more if takes_mechanisms else ''}"
    )


def _row_layer(spec: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The model settings of a row in a backbone."""
    dense = spec.get("dense", [])
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
    arch = render(stages)
    if spec["attention"] == "full":
        # `s` tells the chosen mechanism from full attention; here they are the same.
        arch = arch.replace(",s0,", ",s1,")
    model = {"backbone": backbone["label"], "arch": arch, "attention": spec["attention"]}
    if "options" in spec:
        model["options"] = spec["options"]
    return {"model": model}


def _needs(mechanism: str) -> tuple[int, int]:
    """What `f` in an ARCH string says of a mechanism by default, and its least global tokens."""
    try:
        factory = attentions.find(mechanism)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    parameter = accepted_options(factory).get(getattr(factory, "arch_option", None) or "")
    own = None if parameter is None else parameter.default
    feature = own if type(own) is int and own > 0 else _FEATURE
    return feature, getattr(factory, "least_globals", 0)


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if not re.fullmatch(r"[\w.]+=.*", override, flags=re.DOTALL):
            raise InputError(f"{override!r} is no key=value, for example train.steps=100")
        name = override.partition("=")[0]
        if name in CHOSEN:
            raise InputError(f"{override!r}: {name} is chosen by {CHOSEN[name]}")
    try:
        values = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError) as error:
        raise InputError(f"cannot read {' '.join(overrides)!r}: {_one_line(error)}") from error
    _check_keys(OmegaConf.to_container(values), RunConfig(), "the command line")
    return values


def _check_keys(values: Any, node: Any, source: str, prefix: str = "") -> None:
    """Raise InputError for keys that `node`, a part of the configuration, does not have."""
    known = [f.name for f in fields(node)]
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in known:
            while isinstance(value, Mapping) and value:
                inner, value = next(iter(value.items()))
                path = f"{path}.{inner}"
            raise InputError(
                f"unknown configuration key {path!r} in {source}{_nearest_key(path)};"
                f" allowed at {prefix[:-1] or 'the top level'}: {', '.join(known)}"
            )
        part = getattr(node, key)
        if is_dataclass(part):
            if not isinstance(value, Mapping):
                names = ", ".join(f.name for f in fields(part))
                raise InputError(f"{path}={value!r} in {source}: it is a group of values, {names}")
            _check_keys(value, part, source, f"{path}.")
        elif isinstance(value, Mapping) and not isinstance(part, dict):
            keys = ", ".join(map(str, value)) or "nothing in it"
            raise InputError(f"{path} in {source} is one value, not a group with {keys}")


def _leaves(node: Any, prefix: str = "") -> list[str]:
    """Dotted names of all values in a part of the configuration."""
    names = []
    for f in fields(node):
        part, path = getattr(node, f.name), f"{prefix}{f.name}"
        names += _leaves(part, f"{path}.") if is_dataclass(part) else [path]
    return names


def leaves() -> tuple[str, ...]:
    """Dotted names of all values of a run's configuration."""
    return tuple(_leaves(RunConfig()))


def _nearest_key(key: str) -> str:
    """The nearest value by name, one that ends alike if there is any."""
    names = _leaves(RunConfig())
    alike = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    only = f" (did you mean {alike[0]!r}?)" if len(alike) == 1 else ""
    return nearest(key, alike) or only or nearest(key, names)


def _merge(layers: Sequence[Mapping[str, Any] | DictConfig]) -> RunConfig:
    for layer in layers:
        if not isinstance(layer, DictConfig):
            _check_keys(layer, RunConfig(), "a configuration file")
    try:
        # Frozen dataclasses make read-only nodes; the merge is ours and makes a new configuration.
        schema = OmegaConf.structured(RunConfig)
        OmegaConf.set_readonly(schema, False)
        _writable(schema)
        merged = OmegaConf.merge(schema, *layers)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise InputError(f"{key}: {_one_line(error)}") from error
    if not isinstance(config, RunConfig):
        raise InputError(f"configuration of the wrong type {type(config)}")
    return config


def _writable(node: DictConfig) -> None:
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            OmegaConf.set_readonly(child, False)
            _writable(child)


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _mechanisms(config: RunConfig) -> tuple[StageSpec, ...]:
    names = config.model.attention.split(",")
    try:
        stages = parse(config.model.arch, names[0] if len(names) == 1 else names)
        known = {option for stage in stages for option in attentions.options(stage.attention)}
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    for option in config.model.options:
        if option not in known:
            raise InputError(
                f"model.options.{option}: no attention of row {config.row!r} has such an option"
                f"{nearest(option, known)}; allowed: {', '.join(sorted(known))}"
            )
    return stages


def _fixed(config: RunConfig, image_size: tuple[int, int] | None = None) -> RunConfig:
    """Give a fixed image size to a row whose mechanism works for one size only.

    It is `image_size` (height, width) or else the size of evaluation, rounded up to the stride.
    """
    stages = _mechanisms(config)
    needs = any(getattr(attentions.find(s.attention), "fixed_size", False) for s in stages)
    if not needs or config.data.fixed_size is not None:
        return config
    stride = math.prod(stage.patch for stage in stages)
    size = image_size or (config.data.min_sizes[-1], config.data.max_size)
    values = config.as_dict()
    values["data"]["fixed_size"] = [math.ceil(side / stride) * stride for side in size]
    values["profile"]["image_size"] = values["data"]["fixed_size"]
    return _merge([values])


def _validated(config: RunConfig) -> RunConfig:
    choose(config.model.method, METHODS, "model.method")
    choose(config.model.library, LIBRARIES, "model.library")
    choose(config.train.precision, PRECISIONS, "train.precision")
    choose(config.train.decay, DECAYS, "train.decay")
    choose(config.data.degenerate_boxes, ("error", "drop"), "data.degenerate_boxes")
    positive = {
        "train.steps": config.train.steps,
        "train.batch_size": config.train.batch_size,
        "train.devices": config.train.devices,
        "train.accumulate": config.train.accumulate,
        "train.scale_from_batch": config.train.scale_from_batch or 1,
        "train.checkpoint_every": config.train.checkpoint_every,
        "train.log_every": config.train.log_every,
        "train.lr": config.train.lr,
        "evaluate.batch_size": config.evaluate.batch_size,
        "profile.batch_size": config.profile.batch_size,
        "profile.repeats": config.profile.repeats,
        "profile.proposals": config.profile.proposals,
        "data.max_size": config.data.max_size,
        "data.min_sizes": min(config.data.min_sizes, default=1),
        "data.generated.train_images": config.data.generated.train_images,
        "data.generated.val_images": config.data.generated.val_images,
    }
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise InputError(f"{key}={value} must be positive and finite")
    not_negative = {
        "seed": config.seed,
        "train.warmup_steps": config.train.warmup_steps,
        "train.weight_decay": config.train.weight_decay,
        "train.clip_norm": config.train.clip_norm or 0,
        "data.workers": config.data.workers,
        "evaluate.bootstrap": config.evaluate.bootstrap,
        **{f"train.lr_multipliers.{k}": v for k, v in config.train.lr_multipliers.items()},
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{key}={value} must not be negative, nor infinite")
    parts = config.train.devices * config.train.accumulate
    if config.train.batch_size % parts:
        raise InputError(
            f"train.batch_size={config.train.batch_size} must be a multiple of train.devices="
            f"{config.train.devices} times train.accumulate={config.train.accumulate}"
        )
    pairs = {"data.min_sizes": config.data.min_sizes, "evaluate.splits": config.evaluate.splits}
    for key, values in pairs.items():
        if not values:
            raise InputError(f"{key} is empty; at least one value is needed")
    sizes = {
        "data.fixed_size": config.data.fixed_size,
        "profile.image_size": config.profile.image_size,
        "data.generated.image_size": config.data.generated.image_size,
    }
    for key, size in sizes.items():
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise InputError(f"{key}={size} is no (height, width) of positive numbers")
    if not 0 <= config.model.drop_path < 1:
        raise InputError(f"model.drop_path={config.model.drop_path} is outside [0, 1)")
    if not 1 <= config.data.deep_white <= DEEPEST:
        raise InputError(f"data.deep_white={config.data.deep_white} must be from 1 to {DEEPEST}")
    _mechanisms(config)
    named = config.data.train_file or config.data.val_file
    if config.data.path is None and named is not None:
        # What is not generated has a folder.
        return replace(config, data=replace(config.data, path=str(Path(named).parent)))
    return config
