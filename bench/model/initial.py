"""Initial weights of linear layers: the backbone's, unless a mechanism gave them its own."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

INIT_STD = 0.02


class Defaults:
    """The weights that torch gave linear layers as they were made, and copies of them have too."""

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

    def has(self, parameter: Tensor) -> bool:
        """Whether it is trained and as torch made it; without values it is."""
        if not parameter.requires_grad:
            return False
        return parameter.is_meta or _digest(parameter) in self._digests


def initialise_linear(layer: nn.Linear, defaults: Defaults | None = None) -> None:
    """Draw weights from a normal distribution that is cut at two, and set biases to 0.

    Args:
        layer: a layer, which is changed.
        defaults: what torch gave the layers of a mechanism: others stay as its constructor made
            them. None for a layer of the backbone.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    with torch.no_grad():
        if weight is not None and (defaults is None or defaults.has(weight)):
            nn.init.trunc_normal_(weight, std=INIT_STD)
        if bias is not None and (defaults is None or defaults.has(bias)):
            nn.init.zeros_(bias)


def _digest(parameter: Tensor) -> bytes:
    values = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).digest()
