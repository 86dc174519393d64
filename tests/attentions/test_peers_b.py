"""Mechanisms whose definition is code that others wrote, with the same weights: windows."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

import attentions

DIM, HEADS = 16, 2


class Peer(NamedTuple):
    """A mechanism here, and a function of the same weights that others define.

    Attributes:
        make: of the mechanism here, the function of x (B, rows, columns, C) and the tensors that
            it depends on, by their names here.
    """

    name: str
    grid: tuple[int, int]
    options: dict
    make: Callable


def neighbourhoods(ours):
    """Each token's window one by one, as the papers define it."""

    def keys(query, side):
        k, d, s = ours.kernel, ours.dilation, ours.stride
        alike = list(range(query % d, side, d))
        leader = min(query // d // s * s + s // 2, len(alike) - 1)
        first = max(min(leader - k // 2, len(alike) - k), 0)
        return alike[first : first + k]

    def attend(x):
        batch, rows, columns, _ = x.shape
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in ours.qkv(x).chunk(3, dim=-1))
        out = []
        for i in range(rows):
            for j in range(columns):
                down, across = keys(i, rows), keys(j, columns)
                near = [y[:, down][:, :, across].flatten(1, 2) for y in (k, v)]
                scores = torch.einsum("bhm,bkhm->bhk", q[:, i, j], near[0]) * ours.scale
                if ours.position == "relative":
                    table = ours.local_relative_position_bias_table.T
                    table = table.unflatten(1, (2 * ours.kernel - 1,) * 2)
                    # In steps of the dilation.
                    apart = [
                        [(at - key) // ours.dilation + ours.kernel - 1 for key in seen]
                        for at, seen in ((i, down), (j, across))
                    ]
                    scores = scores + table[:, apart[0]][:, :, apart[1]].flatten(1)
                out.append(torch.einsum("bhk,bkhm->bhm", scores.softmax(-1), near[1]).flatten(1))
        return ours.proj(torch.stack(out, dim=1).view(batch, rows, columns, -1))

    return attend, dict(ours.named_parameters())


def swin_v2(ours):
    w, s = ours.window, ours.shift
    theirs = ShiftedWindowAttentionV2(DIM, [w, w], [s, s], num_heads=HEADS)
    load(theirs, ours)
    # Its offsets on the logarithmic scale, without the rounding to single precision.
    table = 8 * torch.arange(1 - w, w, dtype=torch.float64) / (w - 1)
    table = table.sign() * (table.abs() + 1).log2() / 3
    table = torch.stack(torch.meshgrid(table, table, indexing="ij"), dim=-1)[None]
    torch.testing.assert_close(theirs.relative_coords_table.double(), table)
    theirs.relative_coords_table = table.to(ours.logit_scale.dtype)
    return theirs, dict(theirs.named_parameters())


def load(theirs, ours, names=None):
    """Give a peer the weights of ours, and its dtype; `names` are its names for ours."""
    state = {(names or {}).get(name, name): p for name, p in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not {*missing} & {name for name, _ in theirs.named_parameters()}
    theirs.to(next(ours.parameters()).dtype).eval()


PEERS = [
    Peer("neighborhood", (7, 9), {"kernel": 3, "position": "relative"}, neighbourhoods),
    Peer("neighborhood", (5, 13), {"kernel": 5, "dilation": 2, "stride": 2}, neighbourhoods),
    Peer("neighborhood", (3, 8), {"kernel": 4, "position": "relative"}, neighbourhoods),
    Peer(
        "neighborhood",
        (11, 12),
        {"kernel": 5, "dilation": 2, "stride": 3, "position": "relative"},
        neighbourhoods,
    ),
    Peer("swin_v2", (8, 12), {"window": 4, "shift": 0}, swin_v2),
    Peer("swin_v2", (9, 6), {"window": 3, "shift": 1}, swin_v2),
]


def build(peer, dtype):
    torch.manual_seed(0)
    module = attentions.build_for(
        peer.name, grid=peer.grid, dim=DIM, num_heads=HEADS, num_global=0, **peer.options
    )
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.name}-{peer.grid}")
def test_equal_to_its_peer_in_output_and_all_gradients(peer, dtype, near):
    ours = build(peer, dtype)
    theirs, tensors = peer.make(ours)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *peer.grid, DIM, generator=generator, dtype=torch.float64).to(dtype)
    results, own = [], dict(ours.named_parameters())
    for call, inputs in (
        (lambda y: ours(y.flatten(1, 2), peer.grid).unflatten(1, peer.grid), own),
        (theirs, tensors),
    ):
        y = x.clone().requires_grad_()
        out = call(y)
        # Of the mean, so that gradients are about as large as outputs.
        loss = (out * out.detach().cos()).sum() / x[0].numel()
        gradients = torch.autograd.grad(loss, [y, *inputs.values()])
        results.append(dict(zip(["output", "input", *inputs], [out, *gradients], strict=True)))
    for name, value in results[1].items():
        found = results[0].pop(name)
        torch.testing.assert_close(found, value.view(found.shape), rtol=near, atol=near)
    assert not results[0]
