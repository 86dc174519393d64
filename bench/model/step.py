"""The training step, in one place: what trains and what is measured both take it.

It is `compute_gradients` and then `optimizer.step()`, between which training looks at the norm.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils._pytree import tree_leaves


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
