"""Initial weights of linear layers: the backbone's, unless a mechanism gave them its own."""

import hashlib
from collections import Counter
from collections.abc import Iterator
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

    def hold(self, mechanism: nn.Module) -> bool:
        """Whether all its linear layers are trained and as torch made them, each for itself.

        Where one is not, others may have been made to go with it. Without values they are.
        """
        layers = [part for part in mechanism.modules() if isinstance(part, nn.Linear)]
        own = {id(one): one for layer in layers for one in layer.parameters(recurse=False)}
        sizes = {one.numel() for one in own.values()}
        state = {id(one): one for one in (*mechanism.parameters(), *mechanism.buffers())}
        digests = {
            key: _digest(one)
            for key, one in state.items()
            if not one.is_meta and one.layout == torch.strided and one.numel() in sizes
        }
        times = Counter(digests.values())
        once = {digest for digest in self._digests if times[digest] == 1}
        # A weight that something else makes, as weight_norm does, is no parameter.
        return all("weight" in layer._parameters for layer in layers) and all(
            one.requires_grad and (one.is_meta or digests.get(key) in once)
            for key, one in own.items()
        )


def initialise_linear(layer: nn.Linear) -> None:
    """Draw weights from a normal distribution that is cut at two, and set biases to 0."""
    with torch.no_grad():
        nn.init.trunc_normal_(layer.weight, std=INIT_STD)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).digest()
