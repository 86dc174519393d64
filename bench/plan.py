"""What a suite would do, without doing it: steps, rates, memory and time."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench import runner
from bench.config import RunConfig, Suite, TrainConfig
from bench.data.coco import CocoDataset
from bench.errors import InputError
from bench.predict import predict
from bench.train import effective, learning_rate, scaling_note
from bench.workload import Workload

UNKNOWN = "-"
# Of COCO's train2017, the images with an instance that is no crowd.
_COCO_CLASSES, _COCO_IMAGES = 80, 117_266
_DAY, _HOUR, _MINUTE = 86400, 3600, 60


def table(suite: Suite, output: Path, *, measure_steps: int = 0) -> pd.DataFrame:
    """Return one row a run; a suite that needs COCO is planned for it, there or not.

    Args:
        output: where the runs' data is made, if it is generated.
        measure_steps: training steps that are timed, on one device here, for the time of a run;
            0 for none.
    """
    rows = [_row(config, suite, output, measure_steps) for config in suite.runs]
    return pd.DataFrame([{name: str(value) for name, value in row.items()} for row in rows])


def schedules(configs: Sequence[RunConfig]) -> list[str]:
    """The rate of every schedule in the runs, and what it was scaled from."""
    lines: dict[str, None] = {}
    for config in configs:
        recipe = effective(config.train, config.model.method)
        note = scaling_note(config.train)
        for line in [*([note] if note else []), _rates(recipe)]:
            lines[line] = None
    return list(lines)


def footnote(configs: Sequence[RunConfig], measure_steps: int) -> str:
    """Where memory and time come from, or how to get them."""
    if not measure_steps:
        return "memory is predicted; --measure-steps N times training steps and predicts the time"
    fabric = runner.single_fabric(configs[0])
    size = "x".join(map(str, configs[0].profile.image_size))
    return (
        f"memory is predicted; time: the median of {measure_steps} steps on {fabric.device} in"
        f" {fabric.strategy.precision.precision}, of the images of a part, of {size}, times parts"
        " and steps; without evaluation, waiting for data, or what processes send one another"
    )


def _row(config: RunConfig, suite: Suite, output: Path, measure_steps: int) -> dict[str, Any]:
    recipe = effective(config.train, config.model.method)
    parts = recipe.devices * recipe.accumulate
    dataset = _dataset(config, output, needed=measure_steps > 0)
    needs_coco = suite.needs is not None and config.data.path is None
    images = None
    if config.data.path is None:
        images = _COCO_IMAGES if needs_coco else config.data.generated.train_images
    if dataset is not None and not needs_coco:
        images = sum(dataset.instances(index) > 0 for index in range(len(dataset)))
    classes = _COCO_CLASSES if dataset is None or needs_coco else dataset.num_classes
    seconds = None
    if dataset is not None and measure_steps:
        seconds = _seconds(config, dataset, classes, recipe.batch_size // parts, measure_steps)
        seconds *= recipe.accumulate * recipe.steps
    epochs = UNKNOWN if not images else f"{recipe.steps * recipe.batch_size / images:.1f}"
    return {
        "row": config.row,
        "steps": recipe.steps,
        "epochs": epochs,
        "images a step": recipe.batch_size,
        "devices": recipe.devices,
        "parts": recipe.accumulate,
        "images a part": recipe.batch_size // parts,
        "clip": recipe.clip_norm,
        "memory": _memory(config, recipe.batch_size // parts, classes),
        "time": UNKNOWN if seconds is None else _duration(seconds),
    }


def _rates(recipe: TrainConfig) -> str:
    points = {0, min(recipe.warmup_steps, recipe.steps - 1), recipe.steps - 1}
    points |= {milestone for milestone in recipe.milestones if milestone < recipe.steps}
    if recipe.decay == "cosine":
        points |= {recipe.steps // 2}
    listed = ", ".join(f"{learning_rate(step, recipe):.3g} at {step}" for step in sorted(points))
    shape = "a cosine" if recipe.decay == "cosine" else f"times {recipe.gamma:g} at milestones"
    return (
        f"schedule {recipe.schedule}, {recipe.steps} steps: warm-up over {recipe.warmup_steps},"
        f" then {shape}; rate {listed}"
    )


def _dataset(config: RunConfig, output: Path, *, needed: bool) -> CocoDataset | None:
    """The training images, if they are there or have to be; generated ones are made if needed."""
    if config.data.path is None and not needed:
        return None
    try:
        return runner.open_split(config, runner.data_root(config, output), config.data.train_split)
    except InputError:
        if needed:
            raise
        return None


def _seconds(
    config: RunConfig, dataset: CocoDataset, classes: int, images: int, steps: int
) -> float:
    """Median time of a training step on one part of the images, of the profile's size."""
    fabric = runner.single_fabric(config)
    detector = runner.build_detector(config, classes)
    size = config.profile.image_size
    batch, targets = runner.profile_batch(dataset, (size[0], size[1]), images)
    workload = Workload(
        detector,
        fabric=fabric,
        config=config,
        images=batch,
        targets=targets,
    )
    # Run once before it is timed.
    call = workload.call("training")
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        call()
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _memory(config: RunConfig, images: int, num_classes: int) -> str:
    """The predicted peak of a training step on one device."""
    half = config.train.precision == "16-mixed"
    cuda = half or config.device.startswith("cuda") or torch.cuda.is_available()
    size = config.profile.image_size
    with torch.device("meta"):
        detector = runner.build_detector(config, num_classes)
    prediction = predict(
        detector,
        image_size=(size[0], size[1]),
        batch_size=images,
        mode="training",
        precision=config.train.precision,
        device="cuda" if cuda and config.device != "cpu" else "cpu",
    )
    return f"{prediction.total / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < _DAY else f"{seconds / _DAY:.1f} d"
