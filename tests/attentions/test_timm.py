"""Mechanisms that timm has too: same weights, same input, same output and gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.models.efficientvit_mit import LiteMLA
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


def lite_mla(**settings):
    return LiteMLA(DIM, DIM, heads=HEADS, dim=DIM // HEADS, **settings)


LITE_MLA = {
    "qkv.weight": "qkv.conv.weight",
    "aggreg.0.weight": "aggreg.0.0.weight",
    "aggreg.1.weight": "aggreg.0.1.weight",
    "proj.weight": "proj.conv.weight",
    "proj.bias": "proj.conv.bias",
}
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
    "lite_mla": Peer(
        "lite_mla",
        {},
        lambda: lite_mla(norm_layer=None, use_bias=(False, True)),
        on_image,
        LITE_MLA,
    ),
    "lite_mla, 3x3": Peer(
        "lite_mla",
        {"kernel": 3},
        lambda: lite_mla(norm_layer=None, use_bias=(False, True), scales=(3,)),
        on_image,
        LITE_MLA,
    ),
    "xca": Peer("xca", {}, lambda: XCA(DIM, HEADS, qkv_bias=True), on_tokens, num_global=2),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("case", PEERS)
def test_equals_the_library(case, grid, dtype, tolerance, monkeypatch):
    # LiteMLA makes float32 of half precision, and of float64.
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.to(dtype))
    known = PEERS[case]
    grid = (max(grid[0], known.least), max(grid[1], known.least))
    sizes = {"dim": DIM, "num_heads": HEADS, "num_global": known.num_global}
    ours = attentions.build(known.name, **sizes, **known.options).to(dtype)
    peer = known.make().to(dtype)
    own, theirs = dict(ours.named_parameters()), dict(peer.named_parameters())
    named = [known.names.get(name, name) for name in own]
    assert sorted(named) == sorted(theirs)
    pairs = {name: (own[name], theirs[other]) for name, other in zip(own, named, strict=True)}
    torch.manual_seed(1)
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
        allowed = tolerance * max(1.0, expected.detach().abs().max().item())
        apart = (actual - expected.view_as(actual)).detach().abs().max().item()
        assert apart <= allowed, f"{what} is off by {apart:.1e}"


def test_a_bias_is_the_batch_norm_of_lite_mla_when_evaluating():
    ours = attentions.build("lite_mla", dim=DIM, num_heads=HEADS, num_global=0)
    peer = lite_mla().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in (*peer.parameters(), *peer.proj.norm.buffers()):
            if value.is_floating_point():
                value.uniform_(0.1, 0.5)
        for name, value in ours.named_parameters():
            if name in LITE_MLA and name != "proj.bias":
                value.copy_(peer.get_parameter(LITE_MLA[name]).view_as(value))
        norm = peer.proj.norm
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        ours.proj.weight.mul_(gain[:, None])
        ours.proj.bias.copy_(norm.bias - gain * norm.running_mean)
        x = torch.randn(2, 42, DIM)
        torch.testing.assert_close(ours(x, (6, 7)), on_image(peer, x, (6, 7)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lite_mla_is_as_near_in_half_precision_as_the_library(grid):
    def outcome(module, call, dtype, half):
        x = tokens.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = call(module.to(dtype), x, grid)
        y.double().backward(torch.arange(y.numel(), dtype=torch.float64).cos().view_as(y))
        return torch.cat([y.detach().double().flatten(), x.grad.double().flatten()])

    torch.manual_seed(0)
    tokens = torch.randn(4, grid[0] * grid[1], DIM)
    ours = attentions.build("lite_mla", dim=DIM, num_heads=HEADS, num_global=0)
    peer = PEERS["lite_mla"].make()
    with torch.no_grad():
        for name, value in ours.named_parameters():
            other = peer.get_parameter(LITE_MLA[name])
            other.copy_(value.uniform_(-0.5, 0.5).view_as(other))
    own = outcome(ours, lambda module, *place: module(*place), torch.float32, True)
    theirs = outcome(peer, on_image, torch.float32, True)
    exact = outcome(ours, lambda module, *place: module(*place), torch.float64, False)
    assert (own - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()
