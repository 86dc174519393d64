"""The training loop: a detector, a data set and a schedule, on Lightning Fabric.

Everything random in step t is drawn from (seed, t) alone: the batch, its flips, and the state of
torch's generators. With the weights and the optimiser of a checkpoint, a resumed run therefore
continues bit by bit where it was stopped.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from bench.checkpoints import Checkpoints
from bench.config import DataConfig, TrainConfig
from bench.data.coco import CocoDataset
from bench.data.loader import training_batches

Progress = Callable[[int, float], None]


class DivergedError(RuntimeError):
    """The loss was no finite number."""


@dataclass
class TrainingLog:
    """What happened while training; kept in the checkpoints.

    Attributes:
        steps: optimiser steps done.
        seconds: time in the loop, of all processes that resumed one another.
        losses: mean losses of the steps since the entry before.
        resumed: how often the run was taken up again.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    resumed: int = 0

    def as_record(self, batch_size: int) -> dict[str, Any]:
        """The `training` section of a record."""
        rate = self.steps * batch_size / self.seconds if self.seconds else None
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "batch_size": batch_size,
            "images_per_second": rate,
            "losses": self.losses,
            "resumed": self.resumed,
        }


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then steps or a cosine.

    Warm-up rises from `warmup_factor` of the rate over `warmup_steps`; "steps" multiplies by
    `gamma` at every milestone; "cosine" falls to 0 at the last step.
    """
    warm = 1.0
    if step < config.warmup_steps:
        done = step / config.warmup_steps
        warm = config.warmup_factor * (1 - done) + done
    if config.decay == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    else:
        decay = config.gamma ** sum(step >= milestone for milestone in config.milestones)
    return config.lr * warm * decay


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generators for a step, independent of its neighbours'."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


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
) -> tuple[nn.Module, TrainingLog]:
    """Train `detector`, from its newest checkpoint if there is one.

    Args:
        progress: called after each step with the steps done and the loss.

    Returns:
        The detector as Fabric wrapped it, and the log.

    Raises:
        DivergedError: for a loss that is not finite, naming the step and the images; the newest
            checkpoint stays.
        InputError: for data that cannot be read, or a checkpoint that cannot be written.
    """
    model, optimiser = fabric.setup(detector, optimizer(detector, config))
    log = TrainingLog()
    state = checkpoints.latest()
    if state is not None:
        detector.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
        log = TrainingLog(**state["log"])
        if log.steps < config.steps:
            log.resumed += 1
    model.train()
    start = time.perf_counter() - log.seconds
    window: list[dict[str, Tensor]] = [] if state is None else state["window"]
    batches = training_batches(
        dataset,
        batch_size=config.batch_size,
        seed=seed,
        start_step=log.steps,
        steps=config.steps,
        num_workers=data.workers,
        flip=data.flip,
        aspect_ratio_grouping=data.aspect_ratio_grouping,
    )
    for images, targets in batches:
        step = log.steps
        rate = learning_rate(step, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(seed, step))
        losses = model(
            [to_float(image.to(fabric.device)) for image in images],
            [{key: value.to(fabric.device) for key, value in t.items()} for t in targets],
        )
        total = torch.stack(list(losses.values())).sum()
        value = float(total.detach())
        if not math.isfinite(value):
            ids = ", ".join(str(int(target["image_id"])) for target in targets)
            raise DivergedError(
                f"the loss was {value} at step {step} on images {ids}; the newest checkpoint stays"
            )
        optimiser.zero_grad(set_to_none=True)
        fabric.backward(total)
        if config.clip_norm:
            fabric.clip_gradients(
                model, optimiser, max_norm=config.clip_norm, error_if_nonfinite=False
            )
        optimiser.step()
        window.append({"total": total.detach()} | {k: v.detach() for k, v in losses.items()})
        log.steps = step + 1
        log.seconds = time.perf_counter() - start
        last = log.steps == config.steps
        if log.steps % config.log_every == 0 or last:
            log.losses.append(_mean(window, step=log.steps, lr=rate))
            window = []
        if log.steps % config.checkpoint_every == 0 or last:
            checkpoints.save(_state(detector, optimiser, fabric, log, window), log.steps)
        progress(log.steps, value)
    return model, log


def to_float(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> float32 in 0 to 1."""
    return image.float() / 255


def _state(
    detector: nn.Module,
    optimiser: torch.optim.Optimizer,
    fabric: Fabric,
    log: TrainingLog,
    window: list[dict[str, Tensor]],
) -> dict[str, Any]:
    return {
        "model": detector.state_dict(),
        "optimizer": optimiser.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "log": vars(log),
        # Losses since the last log entry, so that a resumed run averages the same steps.
        "window": window,
    }


def _mean(window: list[dict[str, Tensor]], *, step: int, lr: float) -> dict[str, float]:
    means = {
        name: float(torch.stack([entry[name].float().cpu() for entry in window]).mean())
        for name in window[0]
    }
    return {"step": step, "lr": lr, **means}
