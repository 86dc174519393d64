"""Layers of a mechanism of the user, tried on the grids of a run before it begins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from lightning_fabric import Fabric

from bench.config.schema import CLASSIFIER, RunConfig
from bench.data import classes
from bench.data.images import NetworkSize
from bench.measure.workload import attention_of
from bench.model import build as models

# Tokens of the largest grid that is tried on a CPU, that of stage 3 of 800x1344.
_MOST_TOKENS = 50 * 84
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


def run_own(config: RunConfig, sizes: Sequence[tuple[int, int]], fabric: Fabric) -> None:
    """Run a layer of each stage with a mechanism of the user, for one image of each size.

    Of the first size forward and backward, as in training; of all as for evaluation. On a CPU large
    grids are not run.

    Args:
        sizes: of images, (rows, columns).
        fabric: of one device.

    Raises:
        RuntimeError: with what the mechanism raised.
    """
    if ":" not in config.model.attention:
        return
    on_cpu = fabric.device.type == "cpu"
    vil = models.build_backbone(config).to(fabric.device)
    vil.start_training_step(0)
    for size in sizes:
        profile = replace(config.profile, batch_size=1, image_size=size)
        trying = replace(config, profile=profile)
        for stage in vil.stages:
            layer, (tokens, grid) = attention_of(
                vil, trying, device=fabric.device, stage=stage.number
            )
            if ":" not in stage.attention or (on_cpu and math.prod(grid) > _MOST_TOKENS):
                continue
            try:
                if size == sizes[0]:
                    with fabric.autocast():
                        out = layer.train()(tokens.requires_grad_(), grid)
                    if out.requires_grad:
                        out.sum().backward()
                with fabric.autocast(), torch.no_grad():
                    layer.eval()(tokens, grid)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                place = f"stage {stage.number}, a grid of {grid[0]}x{grid[1]}"
                images = f"images of {size[0]}x{size[1]}"
                raise RuntimeError(f"{place}, as of {images}: {said}") from error
