"""What a sweep measures at one size: a backbone, one attention module of it, or a detector.

Made by `make` from a configuration, on its device, or on the meta device to be counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.config.schema import RunConfig
from bench.measure import flops, operators
from bench.model.backbone import AttentionPlace, ViL
from bench.model.build import build_backbone
from bench.model.optimizer import optimizer
from bench.system.devices import make_fabric

_META = torch.device("meta")


class Subject:
    """A module with its input, in inference and as a training step.

    The loss of a training step is the sum of the means of all outputs: gradients reach every layer
    that runs, and no head adds to the cost.

    Args:
        module: the module.
        inputs: what it is called with, on the device of `config`.
        config: precision, device, and learning rate of the optimiser.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], config: RunConfig) -> None:
        self.module = module
        self.inputs = inputs
        self.fabric = make_fabric(config)
        self.model: Any = self.fabric.setup_module(module)
        self.optimiser: Any = self.fabric.setup_optimizers(optimizer(module, config.train))

    def call(self, mode: str) -> Callable[[], None]:
        """The call to be measured; it sets "inference" or "training" on the module."""
        self.model.train(mode == "training")
        return self._step if mode == "training" else self._infer

    def live(self, mode: str) -> list[object]:
        """What is alive before the call, for `bench.measure.memory.peak`."""
        alive: list[object] = [self.module, self.inputs]
        return [*alive, self.optimiser.state] if mode == "training" else alive

    def _infer(self) -> None:
        with torch.no_grad():
            self.model(*self.inputs)

    def _step(self) -> None:
        loss = mean_loss(self.model(*self.inputs))
        self.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.optimiser.step()


def mean_loss(outputs: Any) -> Tensor:
    """The sum of the means of all tensors in `outputs`."""
    parts = [leaf.float().mean() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.stack(parts).sum()


def make(scope: str, config: RunConfig) -> Any:
    """Build what `config` says on its device: something with `call(mode)` and `live(mode)`."""
    return _MAKERS[scope](config)


def count(scope: str, config: RunConfig, mode: str) -> dict[str, Any] | None:
    """The `flops` section of a record: multiply-adds of one image.

    A training step is counted from its operators, forward and backward, on the meta device: what a
    fused backward pass computes again to save memory is not in it. None where it cannot be counted:
    the training of a detector depends on the image.
    """
    size = _size(config)
    report = {"unit": flops.UNIT, "convention": "actual", "image_size": list(size), "mode": mode}
    if scope == "detector":
        return None if mode == "training" else report | _count_detector(config)
    with _META:
        vil = build_backbone(config)
        if scope == "backbone":
            module: nn.Module = vil
            inputs: tuple[Any, ...] = (torch.empty(1, 3, *size),)
        else:
            place = _first(vil)
            grid = place.grid(size)
            tokens = torch.empty(1, _length(place, grid), place.stage.dim)
            tokens.requires_grad_(mode == "training")
            module, inputs = place.module, (tokens, grid)
    module.train(mode == "training")
    counted = (
        operators.count_operators(lambda: mean_loss(module(*inputs)).backward())
        if mode == "training"
        else operators.count_call(module, inputs)
    )
    return report | {"total": counted.total, "uncounted": dict(counted.uncounted)}


def _count_detector(config: RunConfig) -> dict[str, Any]:
    # Building on meta needs all of the profiler, which a sweep of backbones does not.
    from bench.measure.profile import build_on_meta

    counted = flops.count(
        build_on_meta(config), image_size=_size(config), proposals=config.profile.proposals
    )
    return {"total": counted.total, "uncounted": dict(counted.uncounted)}


def _backbone(config: RunConfig) -> Subject:
    device = make_fabric(config).device
    vil = build_backbone(config)
    images = torch.randn(config.profile.batch_size, 3, *_size(config), device=device)
    return Subject(vil, (images,), config)


def _attention(config: RunConfig) -> Subject:
    """The first attention module, with tokens that need gradients, as inside of a backbone."""
    device = make_fabric(config).device
    place = _first(build_backbone(config))
    grid = place.grid(_size(config))
    shape = (config.profile.batch_size, _length(place, grid), place.stage.dim)
    tokens = torch.randn(shape, device=device, requires_grad=True)
    return Subject(place.module, (tokens, grid), config)


def _detector(config: RunConfig) -> Any:
    from bench.measure.profile import Bench

    return Bench(config).workload


def _first(vil: ViL) -> AttentionPlace:
    return next(vil.attention_places())


def _length(place: AttentionPlace, grid: tuple[int, int]) -> int:
    return place.stage.num_global + grid[0] * grid[1]


def _size(config: RunConfig) -> tuple[int, int]:
    height, width = config.profile.image_size
    return height, width


_MAKERS: dict[str, Callable[[RunConfig], Any]] = {
    "backbone": _backbone,
    "attention": _attention,
    "detector": _detector,
}
