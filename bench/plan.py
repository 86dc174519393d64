"""What a suite would do, without doing it: steps, rates, memory and time."""

import importlib
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench import runner
from bench.config import RunConfig, TrainConfig
from bench.data.coco import CocoDataset
from bench.errors import InputError
from bench.train import effective, learning_rate, scaling_note
from bench.workload import Workload

UNKNOWN = "-"
_GIB = 2**30
_DAY, _HOUR, _MINUTE = 86400, 3600, 60


def table(configs: Sequence[RunConfig], output: Path, *, measure_steps: int = 0) -> pd.DataFrame:
    """Return one row a run.

    Args:
        output: where the runs' data is made, if it is generated.
        measure_steps: training steps that are timed, on one device here, for the time of a run;
            0 for none.
    """
    rows = [_row(config, output, measure_steps) for config in configs]
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


def _row(config: RunConfig, output: Path, measure_steps: int) -> dict[str, Any]:
    recipe = effective(config.train, config.model.method)
    parts = recipe.devices * recipe.accumulate
    dataset = _dataset(config, output, needed=measure_steps > 0)
    images = config.data.generated.train_images if config.data.path is None else None
    if dataset is not None:
        images = sum(dataset.instances(index) > 0 for index in range(len(dataset)))
    seconds = None
    if dataset is not None and measure_steps:
        seconds = _seconds(config, dataset, recipe.batch_size // parts, measure_steps)
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
        "memory": _memory(config, recipe.batch_size // parts),
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


def _seconds(config: RunConfig, dataset: CocoDataset, images: int, steps: int) -> float:
    """Median time of a training step on one part of the images, of the profile's size."""
    fabric = runner.single_fabric(config)
    detector = runner.build_detector(config, dataset.num_classes)
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


def _memory(config: RunConfig, images: int) -> str:
    with suppress(ImportError):
        predict = importlib.import_module("bench.predict")
        return f"{predict.training_bytes(config, batch_size=images) / _GIB:.1f} GiB"
    return UNKNOWN


def _duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < _DAY else f"{seconds / _DAY:.1f} d"
