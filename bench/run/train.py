"""The training loop: a detector, a data set and a schedule, on Lightning Fabric.

Everything random in step t is drawn from (seed, t) alone: the batch, its flips, and the state of
torch's generators. With the weights and the optimizer of a checkpoint, a resumed run therefore
continues bit by bit where it was stopped.

A step's images are split into `devices * accumulate` parts, each with a random state of its own,
and the step follows the mean of the parts' gradients. Two processes therefore do what one does in
two parts. Another number of parts is another run: the detectors' losses are means over what they
sample in a part (RoIs, positive RoIs, anchors), not over images, and images are padded to the
largest of their part. Only torchvision's RetinaNet has losses that are means over images.
"""

import functools
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bench import record
from bench.config.schema import DataConfig, TrainConfig
from bench.data.coco import CocoDataset
from bench.data.images import to_float
from bench.data.loader import Batch, Pace, clear_worker_errors, training_batches
from bench.errors import DivergedError, InputError, some
from bench.model import attributes
from bench.model.backbone import ViL
from bench.model.detectors import Detector
from bench.model.optimizer import (
    build_optimizer,
    compute_gradients,
    learning_rate,
    total_loss,
)
from bench.run.buffers import FollowingBuffers
from bench.run.checkpoints import Checkpoints
from bench.system.interrupt import StopRequest
from bench.system.logs import StepLog
from bench.system.seeding import in_one_order, seed_everything

resource: Any = None
# Windows has no such module.
with suppress(ImportError):
    resource = importlib.import_module("resource")

Progress = Callable[[int, float], None]

# Gradients still overflow at this scale of the loss: they are not numbers at any.
_LEAST_SCALE = 2.0**-20
_MOST_IDS = 16


@dataclass
class TrainingLog:
    """What happened while training; kept in the checkpoints.

    Attributes:
        steps: optimizer steps done.
        seconds: time in the loop, of all processes that resumed one another.
        losses: mean losses of the steps since the entry before.
        resumed: how often the run was taken up again.
        skipped: steps without an update, as gradients overflowed in half precision.
        data_seconds: time of `seconds` that the loop waited for data.
        loader_seconds: time that the loader needs for the same data at full speed.
        places: where and with what its steps were done, each once; numbers round otherwise in each.
        plain: plain attributes of mechanisms of users that it changed, which no state dict holds.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    resumed: int = 0
    skipped: int = 0
    data_seconds: float = 0.0
    loader_seconds: float = 0.0
    places: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)

    def as_record(self, batch_size: int) -> dict[str, Any]:
        """The `training` section of a record."""
        images = self.steps * batch_size
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "batch_size": batch_size,
            "images_per_second": images / self.seconds if self.seconds else None,
            "loader_images_per_second": images / self.loader_seconds
            if self.loader_seconds
            else None,
            "losses": self.losses,
            "resumed": self.resumed,
            "skipped": self.skipped,
        }


def _place() -> str:
    """Where and with what this process trains."""
    here = record.environment(command="", device="")
    changed = " with changes" if here["dirty"] else ""
    return (
        f"{torch.get_num_threads()} threads of {here['cpu']}, torch {torch.__version__}, commit"
        f" {str(here['commit'])[:10]}{changed}"
    )


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """The seed of the global generators for a part of a step, independent of its neighbours'."""
    state = np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def train(
    detector: nn.Module,
    dataset: CocoDataset,
    *,
    fabric: Fabric,
    config: TrainConfig,
    data: DataConfig,
    seed: int,
    checkpoints: Checkpoints,
    progress: Progress,
    step_log: StepLog | None = None,
    before_saving: Callable[[], object] | None = None,
) -> tuple[nn.Module, TrainingLog]:
    """Train `detector`, from its newest checkpoint if there is one.

    Ctrl-C or SIGTERM ends it after the step in hand, which leaves a checkpoint; a second one ends
    the process at once.

    Args:
        config: the schedule; see `effective`.
        progress: called after each step with the steps done and the loss.
        step_log: gets an entry for every step.
        before_saving: called by all processes before a checkpoint is written; what it raises ends
            the training.

    Returns:
        The detector as Fabric wrapped it, and the log.

    Raises:
        DivergedError: for a loss or gradient that is not finite, naming the step and the images;
            weights and checkpoints stay as they were before the step.
        DataWorkerError: where a process that reads data died.
        InputError: for data that cannot be read, a checkpoint that does not fit the detector, or
            one that cannot be written.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    optimizer = build_optimizer(detector, config)

    def set_rate(step: int) -> float:
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        return rate

    def batches(start_step: int, pace: Pace) -> Iterator[Batch]:
        return training_batches(
            dataset,
            batch_size=config.batch_size,
            seed=seed,
            start_step=start_step,
            steps=config.steps,
            num_workers=data.workers,
            flip=data.flip,
            **_needs(detector),
            aspect_ratio_grouping=data.aspect_ratio_grouping,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            pace=pace,
        )

    return train_task(
        detector,
        Task(optimizer, set_rate, batches, dataset.fingerprint),
        fabric=fabric,
        config=config,
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
        step_log=step_log,
        before_saving=before_saving,
    )


@dataclass(frozen=True)
class Task:
    """What the loop does not know of what it trains.

    Attributes:
        optimizer: of the model's parameters.
        set_rate: gives the optimizer the rate of a step, counted from 0, and returns it.
        batches: of the steps from one on, this process's share; a pace receives their time.
        fingerprint: of the data, which a checkpoint must have been trained on.
    """

    optimizer: torch.optim.Optimizer
    set_rate: Callable[[int], float]
    batches: Callable[[int, Pace], Iterator[Batch]]
    fingerprint: str


def train_task(
    module: nn.Module,
    task: Task,
    *,
    fabric: Fabric,
    config: TrainConfig,
    seed: int,
    checkpoints: Checkpoints,
    progress: Progress,
    step_log: StepLog | None = None,
    before_saving: Callable[[], object] | None = None,
) -> tuple[nn.Module, TrainingLog]:
    """Train `module`, which is called as `module(images, targets)` and returns losses by name.

    If it has a method `after_step`, that is called after each update. For all else, see `train`.
    """
    model, optimizer = fabric.setup(module, task.optimizer)
    training = _Training(module, model, optimizer, fabric, config, seed, task.set_rate)
    state = checkpoints.latest({"annotations": task.fingerprint})
    if state is not None:
        training.load(state)
    _check_same(fabric, training.log.steps, module)
    if training.log.steps < config.steps and (place := _place()) not in training.log.places:
        training.log.places.append(place)
    if step_log is not None:
        step_log.begin(training.log.steps)
    model.train()
    pace = Pace()
    saved = training.log.steps
    with (
        StopRequest(quiet=not fabric.is_global_zero) as request,
        clear_worker_errors(),
        in_one_order(fabric.device),
    ):
        for images, targets in task.batches(training.log.steps, pace):
            entry, stop = training.step(images, targets, pace=pace.reset(), stop=request.requested)
            step = training.log.steps
            last = step == config.steps
            if step_log is not None:
                step_log.write(entry)
            if (step % config.checkpoint_every == 0 or last or stop) and step > saved:
                if before_saving is not None:
                    before_saving()
                if fabric.is_global_zero:
                    checkpoints.save({**training.state(), "annotations": task.fingerprint}, step)
                saved = step
            progress(step, entry["total"])
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step}")
    if request.requested:
        # During the last step, after which no other one asks.
        raise KeyboardInterrupt(f"stopped after step {training.log.steps}")
    # What is measured later is of the same size whether or not this process did the last step.
    optimizer.zero_grad(set_to_none=True)
    own = [
        f"{place.name}."
        for vil in training.backbones
        for place in vil.attention_places()
        if ":" in place.attention
    ]
    others = attributes.plain(training.changed())
    training.log.plain = [n for n in others if any(name in n for name in own)]
    return model, training.log


def _needs(detector: nn.Module) -> dict[str, Any]:
    """What a detector needs of the data, in the sizes it needs; another module gets all of it."""
    if not isinstance(detector, Detector):
        return {}
    return {
        "masks": detector.method == "mask_rcnn",
        "network_size": detector.settings.network_size,
    }


class _Training:
    """What changes from step to step: weights, optimizer, scaler, log."""

    def __init__(
        self,
        detector: nn.Module,
        model: Any,
        optimizer: Any,
        fabric: Fabric,
        config: TrainConfig,
        seed: int,
        set_rate: Callable[[int], float],
    ) -> None:
        self._set_rate = set_rate
        self._after_step: Callable[[], None] = getattr(detector, "after_step", lambda: None)
        self.detector, self.model, self.optimizer = detector, model, optimizer
        self.fabric, self.config, self.seed = fabric, config, seed
        self.log = TrainingLog()
        # Losses since the last entry of the log, so that a resumed run averages the same steps.
        self.window: list[dict[str, float]] = []
        self._start = time.perf_counter()
        self._running: tuple[str, ...] = getattr(detector, "running", ())
        self._buffers = FollowingBuffers(detector, fabric, config.accumulate)
        self._attributes = attributes.attributes(detector)
        self.backbones = [module for module in detector.modules() if isinstance(module, ViL)]
        self._scaler = getattr(fabric.strategy.precision, "scaler", None)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain values and tensors."""
        return {
            "model": self.detector.state_dict(),
            "running": self._numbers(),
            "plain": self.changed(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "log": vars(self.log),
            "window": self.window,
        }

    def changed(self) -> dict[str, Any]:
        """Plain attributes that are others now than before training."""
        return attributes.changed(self._attributes, attributes.attributes(self.detector))

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            InputError: where it is of another detector.
        """
        try:
            self.detector.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the checkpoint of step {state['log']['steps']} does not fit the detector, whose"
                f" code changed since; remove the row's checkpoints to start anew:"
                f" {' '.join(str(error).split())}"
            ) from error
        self._set_numbers(state["running"])
        attributes.restore(self.detector, state.get("plain", {}))
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.log = TrainingLog(**state["log"])
        self.window = state["window"]
        self._start = time.perf_counter() - self.log.seconds
        if self.log.steps < self.config.steps:
            self.log.resumed += 1

    def step(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        *,
        pace: Pace,
        stop: bool,
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step on this process's images.

        Args:
            pace: of these images.
            stop: whether this process was asked to stop.

        Returns:
            What is logged of the step, and whether any process was asked to stop.
        """
        config, log, step = self.config, self.log, self.log.steps
        begun = time.perf_counter()
        rate = self._set_rate(step)
        parts: list[dict[str, Tensor]] = []
        norm = compute_gradients(
            self.model,
            self.optimizer,
            self.fabric,
            [
                functools.partial(self._part, own, number, parts)
                for number, own in enumerate(self._split(images, targets))
            ],
            clip_norm=config.clip_norm,
        )
        means, stop = self._mean(parts, stop)
        if not math.isfinite(means["total"]):
            self._diverged("loss", means["total"], parts, targets)
        if not math.isfinite(norm):
            if self._scaler is None or self._scaler.get_scale() < _LEAST_SCALE:
                self._diverged("gradient's norm", norm, parts, targets)
            log.skipped += 1
        self.optimizer.step()
        self._buffers.average()
        self._after_step()
        log.steps = step + 1
        log.seconds = time.perf_counter() - self._start
        log.data_seconds += pace.waited
        log.loader_seconds += pace.reading
        self.window.append(means)
        if log.steps % config.log_every == 0 or log.steps == config.steps:
            log.losses.append(_mean(self.window, step=log.steps, lr=rate))
            self.window = []
        took = time.perf_counter() - begun + pace.waited
        return {
            "step": log.steps,
            "lr": rate,
            **means,
            "gradient_norm": norm,
            "images_per_second": config.batch_size / took,
            "step_seconds": took,
            "data_seconds": pace.waited,
            # Each process reads its share of the images, all at the same time.
            "loader_images_per_second": config.batch_size / pace.reading,
            **_peak_memory(self.fabric.device),
            **({} if self._scaler is None else {"loss_scale": self._scaler.get_scale()}),
        }, stop

    def _split(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[Sequence[Tensor], Sequence[Mapping[str, Tensor]]]]:
        size = len(images) // self.config.accumulate
        for start in range(0, len(images), size):
            yield images[start : start + size], targets[start : start + size]

    def _part(
        self,
        batch: tuple[Sequence[Tensor], Sequence[Mapping[str, Tensor]]],
        number: int,
        parts: list[dict[str, Tensor]],
    ) -> Tensor:
        """Return the loss of a part of the step, and add its losses to `parts`."""
        step, accumulate, device = self.log.steps, self.config.accumulate, self.fabric.device
        images = [to_float(image.to(device, non_blocking=True)) for image in batch[0]]
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for target in batch[1]
        ]
        if number == 0:
            seed_everything(step_seed(self.seed, step))
            for backbone in self.backbones:
                backbone.start_training_step(step)
            self._before = self._numbers()
        # Each part begins where the step began, whichever process it is in.
        self._set_numbers(self._before)
        self._buffers.begin(number)
        place = self.fabric.global_rank * accumulate + number
        seed_everything(step_seed(self.seed, step, place))
        losses = self.model(images, targets)
        self._buffers.end(number)
        total = total_loss(losses)
        detached = {name: loss.detach() for name, loss in losses.items()}
        numbers = {
            f"_{n}": torch.tensor(v, dtype=torch.float64) for n, v in self._numbers().items()
        }
        parts.append({"total": total.detach(), **detached, **numbers})
        return total

    def _mean(
        self, parts: Sequence[Mapping[str, Tensor]], stop: bool
    ) -> tuple[dict[str, float], bool]:
        """Losses over the parts of all processes, and whether any was asked to stop."""
        names = list(parts[0])
        device = self.fabric.device
        rows = [torch.stack([p[n].double().to(device) for n in names]) for p in parts]
        asked = torch.tensor([float(stop)], dtype=torch.float64, device=device)
        values = torch.cat([torch.stack(rows).mean(dim=0), asked])
        averaged: Any = self.fabric.all_reduce(values, reduce_op="mean")
        reduced: list[float] = averaged.tolist()
        means = dict(zip(names, reduced, strict=False))
        self._set_numbers({name: means.pop(f"_{name}") for name in self._numbers()})
        return means, reduced[-1] > 0

    def _diverged(
        self,
        what: str,
        value: float,
        parts: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Say on which images, of all processes.

        Raises:
            DivergedError: always.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = len(targets) // len(parts)
        ids = [int(target["image_id"]) for target in targets]
        finite = [bool(part["total"].isfinite()) for part in parts]
        bad = [id_ for place, id_ in enumerate(ids) if not finite[place // size]]
        pairs: list[Any] = [(bad, ids)]
        if self.fabric.world_size > 1:
            pairs = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(pairs, (bad, ids))
        named = [i for bad, _ in pairs for i in bad] or [i for _, ids in pairs for i in ids]
        raise DivergedError(
            f"the {what} was {value} at step {self.log.steps} on images"
            f" {some([*map(str, named)], _MOST_IDS)}; the newest checkpoint stays"
        )

    def _numbers(self) -> dict[str, float]:
        return {name: float(getattr(self.detector, name)) for name in self._running}

    def _set_numbers(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            setattr(self.detector, name, value)


def _peak_memory(device: torch.device) -> dict[str, float]:
    """The most so far: of the device's allocator, on the CPU of the process; nothing on Windows."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
    if resource is None:
        return {}
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _check_same(fabric: Fabric, step: int, module: nn.Module) -> None:
    """Raise InputError where the processes found different checkpoints, or built other models."""
    if fabric.world_size == 1:
        return
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(
        found, (step, [name for name, _ in module.named_parameters()])
    )
    steps, models = zip(*found, strict=True)
    # Gradients are averaged by the order of parameters alone.
    apart = next((names for names in zip(*models, strict=False) if len({*names}) > 1), None)
    if apart is not None:
        raise InputError(
            f"the processes have different parameters in one place, {', '.join(sorted({*apart}))}:"
            " a mechanism makes them in an order that differs from process to process, as that of"
            " a set of texts does unless PYTHONHASHSEED is set"
        )
    if len({*steps}) > 1:
        raise InputError(
            f"the processes see checkpoints of different steps, {sorted(set(steps))}; --output must"
            " be a folder that all machines share"
        )


def _mean(window: Sequence[Mapping[str, float]], *, step: int, lr: float) -> dict[str, float]:
    means = {name: sum(entry[name] for entry in window) / len(window) for name in window[0]}
    return {"step": step, "lr": lr, **means}
