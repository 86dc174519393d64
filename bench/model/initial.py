"""Initial weights of linear layers: the backbone's, unless a mechanism gave them its own."""

import hashlib
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

INIT_STD = 0.02


class Defaults:
    """The weights that torch gave linear layers as they were made."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what layers get that are made within."""
        kind: Any = nn.Linear
        usual = kind.reset_parameters

        def reset(layer: nn.Linear) -> None:
            usual(layer)
            own = layer.parameters(recurse=False)
            self._digests.update(_digest(one) for one in own if not one.is_meta)

        kind.reset_parameters = reset
        try:
            yield
        finally:
            kind.reset_parameters = usual

    def of(self, mechanism: nn.Module) -> set[nn.Parameter]:
        """Its parameters that are trained and as torch made them, without values all of them.

        What stands in it twice, as a copy or a buffer, is left out: the constructor made it equal.
        """
        own = [*mechanism.parameters()]
        sizes = {parameter.numel() for parameter in own}
        buffers = (one for one in mechanism.buffers() if one.numel() in sizes)
        state = [one for one in (*own, *buffers) if one.layout == torch.strided]
        digests = {id(one): _digest(one) for one in state if not one.is_meta}
        times = Counter(digests.values())
        once = {digest for digest in self._digests if times[digest] == 1}
        trained = (parameter for parameter in own if parameter.requires_grad)
        return {one for one in trained if one.is_meta or digests.get(id(one)) in once}


def initialise_linear(layer: nn.Linear, only: Container[nn.Parameter] | None = None) -> None:
    """Draw weights from a normal distribution that is cut at two, and set biases to 0.

    Args:
        layer: a layer, which is changed.
        only: parameters that are, where others stay as a mechanism's constructor made them.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    with torch.no_grad():
        if weight is not None and (only is None or weight in only):
            nn.init.trunc_normal_(weight, std=INIT_STD)
        if bias is not None and (only is None or bias in only):
            nn.init.zeros_(bias)


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).digest()
