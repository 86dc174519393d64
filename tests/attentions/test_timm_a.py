"""Mechanisms that timm has too: same weights, same input, same output and gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.models.metaformer import Pooling
from timm.models.pvt_v2 import Attention as PooledAttention
from timm.models.xcit import XCA
from torch import nn

import attentions

GRIDS = [(6, 8), (9, 5), (1, 3)]
DIM, HEADS = 24, 3


@dataclass(frozen=True)
class Peer:
    """A class of timm's that a mechanism equals.

    Attributes:
        make: its module.
        call: its result for x (B, N, dim) and the grid.
        names: what it calls each of our parameters, which may differ in shape.
        num_global: tokens before the grid.
        least: side of the smallest grid.
    """

    name: str
    options: dict[str, Any]
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, torch.Tensor, tuple[int, int]], torch.Tensor]
    names: dict[str, str] = field(default_factory=dict)
    num_global: int = 0
    least: int = 1


def on_tokens(module, x, _grid):
    """Call what takes tokens alone."""
    return module(x)


def on_grid(module, x, grid):
    """Call what takes tokens and their grid."""
    return module(x, grid)


def on_image(module, x, grid):
    """Call what takes and returns (B, C, rows, columns)."""
    return module(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


PEERS = {
    "pooling": Peer("pooling", {}, Pooling, on_image),
    "pooling, 5x5": Peer("pooling", {"size": 5}, lambda: Pooling(5), on_image),
    "pvt_v2, linear": Peer(
        "pvt_v2",
        {},
        lambda: PooledAttention(DIM, HEADS, linear_attn=True),
        on_grid,
    ),
    "pvt_v2, convolutional": Peer(
        "pvt_v2",
        {"linear": False, "size": 3},
        lambda: PooledAttention(DIM, HEADS, sr_ratio=3),
        on_grid,
        least=3,
    ),
    "pvt_v2, nothing reduced": Peer(
        "pvt_v2", {"linear": False, "size": 1}, lambda: PooledAttention(DIM, HEADS), on_grid
    ),
    "xca": Peer("xca", {}, lambda: XCA(DIM, HEADS, qkv_bias=True), on_tokens, num_global=2),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("case", PEERS)
def test_equals_the_library(case, grid, dtype, tolerance):
    known = PEERS[case]
    grid = (max(grid[0], known.least), max(grid[1], known.least))
    sizes = {"dim": DIM, "num_heads": HEADS, "num_global": known.num_global}
    ours = attentions.build(known.name, **sizes, **known.options).to(dtype)
    peer = known.make().to(dtype)
    own, theirs = dict(ours.named_parameters()), dict(peer.named_parameters())
    named = [known.names.get(name, name) for name in own]
    assert sorted(named) == sorted(theirs)
    pairs = {name: (own[name], theirs[other]) for name, other in zip(own, named, strict=True)}
    torch.manual_seed(0)
    with torch.no_grad():
        for one, other in pairs.values():
            one.uniform_(-0.5, 0.5)
            other.copy_(one.view_as(other))
    x = torch.randn(2, known.num_global + grid[0] * grid[1], DIM, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [ours(inputs[0], grid), known.call(peer, inputs[1], grid)]
    for result in results:
        result.backward(torch.arange(result.numel(), dtype=dtype).cos().view_as(result))
    compared = {"output": results, "input": [value.grad for value in inputs]}
    compared |= {name: [one.grad, other.grad] for name, (one, other) in pairs.items()}
    for what, (actual, expected) in compared.items():
        allowed = tolerance * max(1.0, float(expected.detach().abs().max()))
        apart = float((actual - expected.view_as(actual)).detach().abs().max())
        assert apart <= allowed, f"{what} is off by {apart:.1e}"
