"""What a suite would do, without doing it: steps, rates, memory and time."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from bench.config.schema import CLASSIFIER, RunConfig, TrainConfig
from bench.config.suites import Suite
from bench.data import classes
from bench.data import split as inputs
from bench.data.classes import ClassDataset
from bench.data.coco import CocoDataset
from bench.data.generated import SPLITS, data_root
from bench.errors import InputError, choose
from bench.measure.predict import NotPredictedError, predict
from bench.measure.workload import COCO_CLASSES, Workload
from bench.model import build as models
from bench.model import classifier, detectors
from bench.model.detectors.rois import Counts
from bench.model.optimizer import build_optimizer, effective, learning_rate, schedule_notes
from bench.run.trial import run_own, sizes_of
from bench.system import devices

UNKNOWN = "-"
# Of COCO's train2017, the images with an instance that is not a crowd.
_COCO_IMAGES = 117_266
_DAY, _HOUR, _MINUTE = 86400, 3600, 60


@dataclass(frozen=True)
class Planned:
    """One run, as it would be.

    Attributes:
        config: of the run.
        recipe: its schedule as it is run, clipped and scaled.
        library: of its detector, the one that "auto" stands for here.
        data: what it trains on.
        images: of its training data with an instance, or None if that is not known.
        most_objects: of an image of these, or None likewise.
        memory: predicted peak of a training step on one device, in bytes, or why there is none.
        on_gpu: whether memory is that of a GPU.
        seconds: of its training steps, or None if none was timed.
        seeds: that it would be run with.
        remarks: what is odd but usable in its data, as the run would say it.
    """

    config: RunConfig
    recipe: TrainConfig
    library: str
    data: str
    images: int | None
    memory: float | str
    on_gpu: bool
    seconds: float | None
    seeds: tuple[int, ...]
    remarks: tuple[str, ...] = ()
    most_objects: int | None = None

    @property
    def images_of_a_part(self) -> int:
        """Images that a device takes at once."""
        return self.recipe.batch_size // (self.recipe.devices * self.recipe.accumulate)


def plan(
    suite: Suite,
    output: Path,
    *,
    measure_steps: int,
    progress: Callable[[str], object],
) -> tuple[list[Planned], list[str]]:
    """Return what every row would be, and why rows would fail.

    A suite that needs COCO is planned for it, there or not.

    Args:
        suite: with the runs.
        output: where the runs' data is made, if it is generated.
        measure_steps: training steps that are timed, on one device here, for the time of a run;
            0 for none.
        progress: called with each row before it is planned, which takes seconds.

    Raises:
        InputError: for data that the runs would refuse.
    """
    # Runs share their data, and reading COCO's annotations takes long.
    opened: dict[str, tuple[Sequence[CocoDataset | ClassDataset], list[str]]] = {}
    planned: list[Planned] = []
    failures: dict[str, None] = {}
    first: dict[str, RunConfig] = {}
    for run in suite.runs:
        first.setdefault(run.row, run)
    for config in first.values():
        progress(config.row)
        name = repr((config.data, config.evaluate.splits))
        if name not in opened:
            opened[name] = _splits(config, output, needed=measure_steps > 0)
        splits, remarks = opened[name]
        dataset = splits[0] if splits else None
        try:
            with models.refusing(config):
                own = _run_own(config, splits)
                found = _plan(config, suite, dataset, measure_steps)
        except InputError as error:
            failures[str(error)] = None
            continue
        planned.append(replace(found, remarks=(*remarks, *own)))
    return planned, list(failures)


def table(planned: Sequence[Planned]) -> pd.DataFrame:
    """Return one row of text a planned row."""
    several = len({seed for run in planned for seed in run.seeds}) > 1
    return pd.DataFrame(
        {
            "row": run.config.row,
            **({"seeds": ", ".join(map(str, run.seeds))} if several else {}),
            "method": run.config.model.method,
            "schedule": run.recipe.schedule,
            "drop path": f"{run.config.model.drop_path:g}",
            "steps": str(run.recipe.steps),
            "epochs": _epochs(run),
            "clip norm": f"{run.recipe.clip_norm:g}",
            "memory GB": UNKNOWN if isinstance(run.memory, str) else f"{run.memory / 1e9:.2f}",
            "time": UNKNOWN if run.seconds is None else duration(run.seconds),
        }
        for run in planned
    )


def lines(planned: Sequence[Planned], measure_steps: int) -> list[str]:
    """What holds for many runs: data, start, schedules, and where memory and time come from."""
    found = [
        *_each(planned, _step),
        *_each(planned, lambda run: f"data: {run.data}"),
        *_each([run for run in planned if not _classifies(run)], _start),
        *_each(planned, lambda run: f"library: {run.library}, precision {run.recipe.precision}"),
    ]
    for run in planned:
        said = [*schedule_notes(run.config), _rates(run)]
        found += [line for line in said if line not in found]
    found += _each(planned, _about_memory)
    found += dict.fromkeys(f"note: {remark}" for run in planned for remark in run.remarks)
    found += [
        f"note: {run.config.row}: {run.memory}" for run in planned if isinstance(run.memory, str)
    ]
    if not measure_steps:
        return [*found, "time: --measure-steps N times training steps and predicts it"]
    found += _each(planned, lambda run: _about_time(run, measure_steps))
    total = sum((run.seconds or 0.0) * len(run.seeds) for run in planned)
    return [*found, f"time of all rows, one after the other: {duration(total)}"]


def duration(seconds: float) -> str:
    """Return a time as a person would say it: `40 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < _DAY else f"{seconds / _DAY:.1f} d"


def _each(planned: Sequence[Planned], describe: Callable[[Planned], str]) -> list[str]:
    """The descriptions of runs, with the rows where it is not the same for all."""
    rows: dict[str, list[str]] = {}
    for run in planned:
        rows.setdefault(describe(run), []).append(run.config.row)
    same = len(rows) == 1
    return [text if same else f"{text} ({', '.join(names)})" for text, names in rows.items()]


def _step(run: Planned) -> str:
    recipe = run.recipe
    return (
        f"a step: {_many(recipe.batch_size, 'image')} on {_many(recipe.devices, 'device')}, each"
        f" with {_many(recipe.accumulate, 'part')} of {_many(run.images_of_a_part, 'image')}"
    )


def _start(run: Planned) -> str:
    if run.recipe.init is not None:
        return f"start: {run.recipe.init}"
    return "start: no pretrained weights; --init takes a classifier's, as published rows did"


def _about_memory(run: Planned) -> str:
    place = "GPU" if run.on_gpu else "CPU"
    said = f"memory: predicted peak of a training step on one {place}, {_batch(run)}"
    if _classifies(run):
        return said
    said += f" with {Counts.targets} objects each"
    if (run.most_objects or 0) > Counts.targets:
        said += f"; an image of the data has up to {run.most_objects}, which need more"
    return said


def _about_time(run: Planned, measure_steps: int) -> str:
    fabric = devices.single_fabric(run.config)
    precision = fabric.strategy.precision.precision
    return (
        f"time: of training alone, on {_many(run.recipe.devices, 'device')} as fast as"
        f" {fabric.device} here: the median of {measure_steps} steps in {precision},"
        f" {_batch(run)}, times parts and steps; without evaluation, waiting for data, or what"
        " processes send one another"
    )


def _batch(run: Planned) -> str:
    config = run.config
    sides = classes.image_size(config) if _classifies(run) else config.profile.image_size
    size = "x".join(map(str, sides))
    return f"{_many(run.images_of_a_part, 'image')} of {size}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _epochs(run: Planned) -> str:
    if not run.images:
        return UNKNOWN
    return f"{run.recipe.steps * run.recipe.batch_size / run.images:.1f}"


def _plan(
    config: RunConfig,
    suite: Suite,
    dataset: CocoDataset | ClassDataset | None,
    measure_steps: int,
) -> Planned:
    if config.model.method == CLASSIFIER:
        return _plan_classifier(config, dataset, measure_steps)
    if isinstance(dataset, ClassDataset):
        raise TypeError(f"{config.row} is a detector")
    recipe = effective(config.train, config.model.method)
    part = recipe.batch_size // (recipe.devices * recipe.accumulate)
    coco = suite.needs is not None and config.data.path is None
    classes = COCO_CLASSES if dataset is None or coco else dataset.num_classes
    seconds = None
    if dataset is not None and measure_steps:
        seconds = _seconds(config, dataset, classes, part, measure_steps)
        seconds *= recipe.accumulate * recipe.steps
    on_gpu = _on_gpu(config)
    data, images = _data(config, dataset, suite.needs if coco else None)
    return Planned(
        config=config,
        recipe=recipe,
        library=detectors.resolve_library(config.model.library),
        data=data,
        images=images,
        memory=_memory(config, part, classes, "cuda" if on_gpu else "cpu"),
        on_gpu=on_gpu,
        seconds=seconds,
        seeds=tuple(run.seed for run in suite.runs if run.row == config.row),
        most_objects=None if dataset is None else max(map(dataset.instances, range(len(dataset)))),
    )


def _plan_classifier(config: RunConfig, dataset: Any, measure_steps: int) -> Planned:
    made = config.data.generated.train_images
    images = made if dataset is None else len(dataset)
    recipe = classifier.recipe(config, images)
    part = recipe.batch_size // (recipe.devices * recipe.accumulate)
    on_gpu = _on_gpu(config)
    size = classes.image_size(config)
    vil = models.build_backbone(config)
    seconds = None
    if measure_steps:
        call = _classifier_step(config, size, part)
        seconds = _median(call, measure_steps, devices.single_fabric(config).device)
        seconds *= recipe.accumulate * recipe.steps
    where = "generated" if config.data.path is None else config.data.path
    return Planned(
        config=config,
        recipe=recipe,
        library="timm",
        data=f"{where}, {images} images",
        images=images,
        memory=_predicted(vil, config, part, size, "cuda" if on_gpu else "cpu"),
        on_gpu=on_gpu,
        seconds=seconds,
        seeds=(config.seed,),
    )


def _classifier_step(config: RunConfig, size: tuple[int, int], images: int) -> Callable[[], object]:
    """Return a training step on random images of 1000 classes."""
    fabric = devices.single_fabric(config)
    batch = list(torch.randn(images, 3, *size))
    targets = [{"label": torch.tensor(index % 1000)} for index in range(images)]
    module = classifier.build_classifier(config, 1000)
    workload = Workload(module, (batch,), fabric=fabric, config=config, targets=targets)
    return workload.call("training")


def _data(
    config: RunConfig, dataset: CocoDataset | None, needs: str | None
) -> tuple[str, int | None]:
    """What a run trains on, and how many of its images have an instance."""
    split, images = config.data.train_split, None
    if needs is not None:
        return f"{needs}, {split}, {_COCO_IMAGES} images with an instance", _COCO_IMAGES
    if dataset is not None:
        images = sum(dataset.instances(index) > 0 for index in range(len(dataset)))
    found = "" if images is None else f", {images} of them with an instance"
    if config.data.path is None:
        made = config.data.generated.train_images
        return f"generated, {made} images{found}", made if images is None else images
    if dataset is None:
        return f"{config.data.path}, {split}, which is not there", None
    return f"{config.data.path}, {split}, {len(dataset)} images{found}", images


def _classifies(run: Planned) -> bool:
    return run.config.model.method == CLASSIFIER


def _rates(run: Planned) -> str:
    recipe = run.recipe
    rate: Callable[[int], float] = functools.partial(learning_rate, config=recipe)
    if _classifies(run):
        rate = classifier.rates(run.config, recipe)
    points = {0, min(recipe.warmup_steps, recipe.steps - 1), recipe.steps - 1}
    points |= {milestone for milestone in recipe.milestones if milestone < recipe.steps}
    if recipe.decay == "cosine":
        points |= {recipe.steps // 2}
    listed = ", ".join(f"{rate(step):.3g} at {step}" for step in sorted(points))
    shape = "a cosine" if recipe.decay == "cosine" else f"times {recipe.gamma:g} at milestones"
    return (
        f"schedule {recipe.schedule}: {recipe.steps} steps, warm-up over {recipe.warmup_steps},"
        f" then {shape}; rate by step: {listed}"
    )


def _splits(
    config: RunConfig, output: Path, *, needed: bool
) -> tuple[Sequence[CocoDataset | ClassDataset], list[str]]:
    """The images to train and evaluate on, if they are there or have to be, and what is odd.

    Generated ones are made if needed.

    Raises:
        InputError: for data that is there and that the run would refuse.
    """
    path = config.data.path
    if path is None and config.model.method != CLASSIFIER:
        for split in (config.data.train_split, *config.evaluate.splits):
            choose(split, SPLITS, "split of generated data:")
    if not needed and (path is None or not Path(path).exists()):
        return [], []
    if config.model.method == CLASSIFIER:
        return classes.open_splits(data_root(config, output)), []
    splits = inputs.open_splits(config, data_root(config, output))
    return splits, inputs.remarks(config, splits)


def _seconds(
    config: RunConfig, dataset: CocoDataset, classes: int, images: int, steps: int
) -> float:
    """Median time of a training step on one part of the images, of the profile's size."""
    fabric = devices.single_fabric(config)
    detector = models.build_detector(config, classes)
    size = config.profile.image_size
    batch, targets = inputs.profile_batch(dataset, (size[0], size[1]), images)
    workload = Workload(
        detector,
        (batch,),
        fabric=fabric,
        config=config,
        targets=targets,
    )
    # Run once before it is timed.
    return _median(workload.call("training"), steps, fabric.device)


def _median(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the median time of calls, in seconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _on_gpu(config: RunConfig) -> bool:
    """Whether the run is for a GPU: half precision is for no other device."""
    if config.device == "cpu":
        return False
    half = config.train.precision == "16-mixed"
    return half or config.device.startswith("cuda") or torch.cuda.is_available()


def _run_own(config: RunConfig, splits: Sequence[Any]) -> list[str]:
    """Try a mechanism of the user, unless it is for a GPU that is not here, and say what is odd.

    Raises:
        InputError: with what the mechanism raised.
    """
    fabric = devices.single_fabric(config)
    if fabric.device.type == "cpu" and _on_gpu(config):
        return []
    try:
        sizes = sizes_of(config, splits)
        if not sizes or (config.profile.enabled and config.model.method != CLASSIFIER):
            sizes.append(config.profile.image_size)
        return run_own(config, sizes, fabric)
    except (RuntimeError, FloatingPointError) as error:
        raise InputError(f"row {config.row!r}: {error}") from error


def _memory(config: RunConfig, images: int, num_classes: int, device: str) -> float | str:
    """The predicted peak of a training step on one device, in bytes, or why there is none."""
    size = config.profile.image_size
    detector = models.on_meta(models.build_detector, config, num_classes)
    # These have the errors that the run would have.
    build_optimizer(detector, config.train)
    if config.train.init is not None:
        models.fitting(detector, Path(config.train.init))
    return _predicted(detector, config, images, (size[0], size[1]), device)


def _predicted(
    module: nn.Module, config: RunConfig, images: int, size: tuple[int, int], device: str
) -> float | str:
    train = config.train
    try:
        prediction = predict(
            module,
            image_size=size,
            batch_size=images,
            mode="training",
            precision=train.precision,
            device=device,
            # Several processes keep the memory of gradients too, as that of what they exchange.
            parts=train.accumulate if train.devices == 1 else max(2, train.accumulate),
        )
    except NotPredictedError as error:
        return f"memory not predicted: {error}"
    average = config.model.method == CLASSIFIER and bool(config.classify.average)
    copied = sum(tensor.nbytes for tensor in module.state_dict().values()) if average else 0
    return float(prediction.total + copied)
