"""Layers of a mechanism of the user, tried on the grids of a run before it begins."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from attentions.reads import deterministic
from bench.config.schema import CLASSIFIER, RunConfig
from bench.data import classes
from bench.data.images import NetworkSize
from bench.errors import some
from bench.measure.workload import attention_of
from bench.model import build as models
from bench.model.attributes import attributes, own_losses, restore
from bench.system.seeding import seed_everything

# Tokens of the largest grid that is tried on a CPU, that of stage 3 of 800x1344.
_MOST_TOKENS = 50 * 84
# Of outputs that are the same but for rounding.
_TOLERANCE = 1e-3
_SIDES: tuple[Callable[[tuple[int, int]], int], ...] = (math.prod, itemgetter(0), itemgetter(1))


def sizes_of(config: RunConfig, splits: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the sizes (rows, columns) that a backbone gets with most and fewest of each.

    Args:
        splits: the one to train on and, after it, those to evaluate on; none where they are not
            there.
    """
    if config.model.method == CLASSIFIER:
        return [classes.image_size(config)]
    data = config.data
    network = NetworkSize(data.min_sizes, data.max_size, data.fixed_size)
    found: set[tuple[int, int]] = set()
    for split in splits:
        stored: set[tuple[int, int]] = {split.size(index) for index in range(len(split))}
        places = range(len(data.min_sizes)) if split is splits[0] else [-1]
        found |= {network.of(*size, place) for size in stored for place in places}
    extremes = [pick(sorted(found), key=key) for pick in (max, min) for key in _SIDES if found]
    return list(dict.fromkeys(extremes))


def run_own(config: RunConfig, sizes: Sequence[tuple[int, int]], fabric: Fabric) -> list[str]:
    """Run a layer of each stage with a mechanism of the user, for images of each size.

    Of the first size forward and backward, as in training; of all as for evaluation. On a CPU large
    grids are not run. There are two images, or one where the run has no more at a time.

    Args:
        sizes: of images, (rows, columns).
        fabric: of one device.

    Returns:
        What a reader of the row should know.

    Raises:
        RuntimeError: with what the mechanism raised, or for an output that is no tensor like its
            input.
        FloatingPointError: for an output in training that is not finite, as its loss will be.
    """
    if ":" not in config.model.attention:
        return []
    losses: dict[str, None] = {}
    keeps = False
    train, on_cpu = config.train, fabric.device.type == "cpu"
    trained = min(2, train.batch_size // (train.devices * train.accumulate))
    evaluated = min(2, config.evaluate.batch_size)
    vil, twin, spare = (models.build_backbone(config).to(fabric.device) for _ in range(3))
    for one in (vil, twin, spare):
        one.start_training_step(0)
    for size in sizes:
        trying = replace(config, profile=replace(config.profile, batch_size=2, image_size=size))
        for stage in vil.stages:
            layer, (tokens, grid) = attention_of(
                vil, trying, device=fabric.device, stage=stage.number
            )
            if ":" not in stage.attention or (on_cpu and math.prod(grid) > _MOST_TOKENS):
                continue
            finite = True
            try:
                other, _ = attention_of(spare, trying, device=fabric.device, stage=stage.number)
                _require_written(other, tokens[:trained], grid, fabric, training=size == sizes[0])
                if size == sizes[0]:
                    with fabric.autocast():
                        out = _called(layer.train(), tokens[:trained].requires_grad_(), grid)
                    losses |= dict.fromkeys(own_losses(layer))
                    finite = bool(out.isfinite().all())
                    if out.requires_grad:
                        out.sum().backward()
                    other, _ = attention_of(twin, trying, device=fabric.device, stage=stage.number)
                    with fabric.autocast(), torch.no_grad():
                        keeps |= _keeps(layer, other.train(), tokens[:trained].detach(), grid)
                with fabric.autocast(), torch.no_grad():
                    _called(layer.eval(), tokens[:evaluated].detach(), grid)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                raise RuntimeError(f"{_place(stage.number, grid, size)}: {said}") from error
            if not finite:
                place = _place(stage.number, grid, size)
                raise FloatingPointError(f"{place}: its output in training is not finite")
    found = []
    if losses:
        said = f"{config.row} keeps {some(list(losses))}, with a gradient"
        found.append(f"{said}: training adds no loss of a mechanism to its own")
    if keeps:
        found.append(
            f"{config.row} keeps from call to call what no checkpoint holds, as in an object, its"
            " class or a global: a stopped run goes on otherwise, and with model.checkpoint it may"
            " move twice a step; register_buffer keeps it"
        )
    return found


def _keeps(layer: nn.Module, twin: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a layer that was called goes on otherwise than one that gets what is kept of it."""
    with suppress(Exception):
        twin.load_state_dict(layer.state_dict())
        restore(twin, attributes(layer))
        seed_everything(0)
        expected = layer(tokens, grid).float()
        seed_everything(0)
        found = twin(tokens, grid).float()
        return not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return False


def _require_written(
    layer: nn.Module, tokens: Tensor, grid: tuple[int, int], fabric: Fabric, *, training: bool
) -> None:
    """Refuse results that hold what was in memory by chance, as that of `torch.empty`.

    Raises:
        ValueError: for an output or a gradient that is finite, but not where such memory is NaN.
    """

    def is_finite() -> bool:
        seed_everything(0)
        inputs = tokens.detach().clone().requires_grad_(training)
        with fabric.autocast(), torch.set_grad_enabled(training):
            out = layer.train(training)(inputs, grid)
        if not isinstance(out, Tensor):
            return True
        if out.requires_grad:
            out.sum().backward()
        found = [out, inputs.grad, *(parameter.grad for parameter in layer.parameters())]
        return all(bool(value.isfinite().all()) for value in found if value is not None)

    usual = is_finite()
    with deterministic(True, fills=True):
        written = is_finite()
    if usual and not written:
        raise ValueError(
            "its output or a gradient holds memory that nothing wrote, as torch.empty leaves it"
        )


def _place(stage: int, grid: tuple[int, int], size: tuple[int, int]) -> str:
    sides = "a grid of {}x{}, as of images of {}x{}".format(*grid, *size)
    return f"stage {stage}, {sides}"


def _called(layer: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The output, which is added to the input."""
    out = layer(tokens, grid)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns {type(out).__name__}, not a tensor")
    total = tokens.detach() + out
    if total.shape != tokens.shape or total.dtype != tokens.dtype:
        raise ValueError(
            f"it returns {tuple(out.shape)} of {out.dtype} for {tuple(tokens.shape)} of"
            f" {tokens.dtype}"
        )
    return out
