"""The training step in one place, the optimizer of a detector and the schedule of its rate.

A step is `compute_gradients` and then `optimizer.step()`, between which training looks at the norm;
what trains and what is measured both take it.
"""

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.config.schema import CLASSIFIER, RunConfig, TrainConfig
from bench.errors import InputError, choose, some

# The published ones, by method.
CLIP_NORMS = {"mask_rcnn": 0.5, "retinanet": 1.0, "classifier": 0.0}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_POSITIONS = ("cls_pos_embed", "x_pos_embed", "y_pos_embed", "relative_position_bias_table")
KINDS = ("norms", "biases", "tokens", "positions")


def effective(config: TrainConfig, method: str) -> TrainConfig:
    """Return the schedule as it is run: clipped as `method` is, and scaled to its batch.

    By the linear rule, half the images a step take half the rate and twice the steps.
    """
    clip_norm = CLIP_NORMS[method] if config.clip_norm is None else config.clip_norm
    if config.scale_from_batch is None:
        return replace(config, clip_norm=clip_norm)
    factor = config.batch_size / config.scale_from_batch
    return replace(
        config,
        clip_norm=clip_norm,
        scale_from_batch=None,
        lr=config.lr * factor,
        steps=max(1, round(config.steps / factor)),
        warmup_steps=round(config.warmup_steps / factor),
        milestones=tuple(round(milestone / factor) for milestone in config.milestones),
    )


def schedule_notes(run: RunConfig) -> list[str]:
    """Return what `effective` scales, and what of it has no effect; a line each."""
    config, how, notes = run.train, run.classify, []
    scaled = effective(config, run.model.method)
    if run.model.method == CLASSIFIER and how.epochs is not None:
        if how.warmup_epochs < how.epochs:
            return []
        return [
            f"training ends within its warm-up (classify.epochs={how.epochs:g},"
            f" classify.warmup_epochs={how.warmup_epochs:g}): the rate never reaches"
            f" train.lr={scaled.lr:g}"
        ]
    if config.scale_from_batch not in (None, config.batch_size):
        notes.append(
            f"recipe for {config.scale_from_batch} images a step scaled to {config.batch_size} by"
            f" the linear rule: rate {config.lr:g} to {scaled.lr:g}, steps {config.steps} to"
            f" {scaled.steps}, warm-up {config.warmup_steps} to {scaled.warmup_steps}, milestones"
            f" {list(config.milestones)} to {list(scaled.milestones)}"
        )
    late = [milestone for milestone in scaled.milestones if milestone >= scaled.steps]
    if scaled.decay == "cosine" and scaled.milestones:
        notes.append(f"train.milestones={list(scaled.milestones)} change nothing under a cosine")
    elif late:
        notes.append(
            f"training ends before train.milestones={late} (train.steps={scaled.steps}): the rate"
            " does not fall there"
        )
    if scaled.warmup_steps >= scaled.steps:
        # That of a classifier is timm's.
        last = f"ends at {learning_rate(scaled.steps - 1, scaled):.3g} and "
        notes.append(
            f"training ends within its warm-up (train.steps={scaled.steps},"
            f" train.warmup_steps={scaled.warmup_steps}): the rate"
            f" {last * (run.model.method != CLASSIFIER)}never reaches train.lr={scaled.lr:g}"
        )
    return notes


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


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters, in groups of one weight decay and one factor of the rate each.

    Raises:
        InputError: for a pattern that no parameter's name fits, or an unknown kind of parameter.
    """
    kinds = kinds_of(model)
    for pattern in [*config.no_decay, *config.lr_multipliers]:
        if pattern in config.no_decay and pattern.isalpha():
            choose(pattern, KINDS, "kind of parameter in train.no_decay")
        elif not fnmatch.filter(kinds, pattern):
            raise InputError(
                f"train: no parameter is called {pattern!r}; there are {some([*kinds], 3)}, *"
                " stands for any part of a name"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        exempt = any(
            pattern == kinds[name] or fnmatch.fnmatchcase(name, pattern)
            for pattern in config.no_decay
        )
        factor = next(
            (f for p, f in config.lr_multipliers.items() if fnmatch.fnmatchcase(name, p)), 1.0
        )
        decay = 0.0 if exempt else config.weight_decay
        groups.setdefault((decay, factor), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_factor": factor}
            for (decay, factor), parameters in groups.items()
        ],
        lr=config.lr,
        # On the CPU a third of the time of the loop over parameters, or less. Under a scaler of the
        # loss, Fabric does not clip gradients for a fused optimizer; on CUDA the default is fast.
        fused=(config.precision != "16-mixed" and all(map(_is_fused, model.parameters()))) or None,
    )


def _is_fused(parameter: nn.Parameter) -> bool:
    return parameter.device.type == "cpu" and parameter.is_floating_point()


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Return the names of all parameters, and of which of `KINDS` they are, or "weights"."""
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }

    def kind(name: str) -> str:
        last = name.rpartition(".")[2]
        if name in norms:
            return "norms"
        if last == "cls_token":
            return "tokens"
        if last.endswith(_POSITIONS):
            return "positions"
        return "biases" if last == "bias" else "weights"

    return {name: kind(name) for name, _ in model.named_parameters()}


def compute_gradients(
    model: Any,
    optimizer: Any,
    fabric: Fabric,
    parts: Sequence[Callable[[], Tensor]],
    *,
    clip_norm: float | None,
    after: Callable[[str], None] = lambda _phase: None,
) -> float:
    """Set the clipped mean gradient of the losses of `parts`, and return its norm before clipping.

    The gradients of the step before are gone before the forward pass begins.

    Args:
        model: as Fabric wrapped it.
        optimizer: as Fabric wrapped it, over the parameters of `model`.
        fabric: device and precision; it scales the loss where the precision needs it.
        parts: each returns the loss of a part of the step's images, with its graph.
        clip_norm: the largest norm of the gradient; 0 or None for no clipping.
        after: called with "forward" and "backward" at the end of these phases of a part.
    """
    optimizer.zero_grad(set_to_none=True)
    for number, loss in enumerate(parts, start=1):
        with fabric.no_backward_sync(model, enabled=number < len(parts)):
            value = loss() / len(parts)
            after("forward")
            fabric.backward(value)
            after("backward")
    norm = fabric.clip_gradients(
        model, optimizer, max_norm=clip_norm or math.inf, error_if_nonfinite=False
    )
    if norm is None:
        raise TypeError("clipping by a norm returned none")
    return float(norm)


def total_loss(outputs: Any) -> Tensor:
    """Return the sum of a detector's losses; of other outputs, the sum of their means."""
    leaves = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
    scalars = [leaf if leaf.dim() == 0 else leaf.mean().float() for leaf in leaves]
    return torch.stack(scalars).sum()
