"""Blocks that are computed again in the backward pass, with the state of the first time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attentions.contract import Grid
from bench.model.attributes import LooseAttributes, loose_copies, swapped
from bench.system.seeding import drawing_from, global_state


def checkpointed(block: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
    """Return `block(tokens, grid)`, of which nothing but the input is kept.

    Buffers, such as running averages, plain attributes and random numbers are those of the first
    computation in the second one too, and are not updated twice but where it is compiled.
    """
    how: dict[str, Any] = {"use_reentrant": False}
    # A compiler traces no such contexts: the run says that buffers are updated twice then.
    if block.training and not torch.compiler.is_compiling():
        how["context_fn"] = partial(_contexts, block)
    result: Tensor = checkpoint(block, tokens, grid, **how)
    return result


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first computation and of the second."""
    before = [
        (part, {name: None if b is None else b.detach().clone() for name, b in own.items()})
        for part in block.modules()
        if (own := part._buffers)
    ]
    return nullcontext(), _with(before, loose_copies(block), drawing_from(global_state()))


@contextmanager
def _with(
    before: list[tuple[nn.Module, dict[str, Tensor | None]]],
    attributes: LooseAttributes,
    draws: AbstractContextManager[None],
) -> Iterator[None]:
    # Other tensors, not other values: what is kept for the gradient is not written to.
    now = [(part, dict(part._buffers)) for part, _ in before]
    for part, buffers in before:
        part._buffers.update(buffers)
    try:
        with draws, swapped(attributes):
            yield
    finally:
        for part, buffers in now:
            part._buffers.update(buffers)
