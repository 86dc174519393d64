"""Buffers that follow the data, such as running averages, where a step has several parts."""

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn


class FollowingBuffers:
    """Lets buffers end a step as the mean over its parts, whichever process these are in.

    Each part begins with the buffers that the step began with. Whole numbers, such as counts of
    steps, are those of the last part. Which buffers follow the data is seen in the first step that
    this is told of: those that its first part changes.

    Args:
        module: whose buffers.
        fabric: of the processes.
        parts: of a step, in each process.
    """

    def __init__(self, module: nn.Module, fabric: Fabric, parts: int) -> None:
        self._module, self._fabric, self._parts = module, fabric, parts
        # With one part there is no mean to take.
        self._names: set[str] | None = None if parts * fabric.world_size > 1 else set()
        self._before: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def begin(self, part: int) -> None:
        """To be called before the forward pass of a part, numbered from 0."""
        if part == 0:
            self._before = {name: own.detach().clone() for name, own in self._own().items()}
            self._sums = {}
        else:
            self._set(self._before)

    def end(self, part: int) -> None:
        """To be called after the forward pass of a part."""
        now = self._own()
        if self._names is None:
            found = {name for name, own in now.items() if not torch.equal(own, self._before[name])}
            self._names = self._fabric.broadcast(found)
            now = self._own()
        for name, own in now.items():
            if own.is_floating_point():
                self._sums[name] = own.double() + (self._sums[name] if part else 0)

    def average(self) -> None:
        """To be called after the last part of a step, in all processes."""
        if self._sums:
            flat = torch.cat([total.flatten() for total in self._sums.values()]) / self._parts
            mean = self._fabric.all_reduce(flat, reduce_op="mean")
            if not isinstance(mean, Tensor):
                raise TypeError(f"the mean of buffers is a {type(mean).__name__}")
            shares = mean.split([total.numel() for total in self._sums.values()])
            means = zip(self._sums.items(), shares, strict=True)
            self._set({name: share.view_as(total) for (name, total), share in means})

    def _own(self) -> dict[str, Tensor]:
        if self._names is not None and not self._names:
            return {}
        named = self._module.named_buffers()
        return {name: own for name, own in named if self._names is None or name in self._names}

    def _set(self, values: dict[str, Tensor]) -> None:
        own = self._own()
        with torch.no_grad():
            for name, value in values.items():
                if name in own:
                    own[name].copy_(value)
