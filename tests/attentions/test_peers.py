"""Mechanisms whose definition is code that others wrote, with the same weights: windows."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.vision_transformer_sam import Attention, window_partition, window_unpartition
from torch import nn
from torchvision.models.maxvit import PartitionAttentionLayer
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


def maxvit_of_torchvision(ours):
    heads = {"in_channels": DIM, "head_dim": DIM // HEADS}
    theirs = PartitionAttentionLayer(
        **heads,
        partition_size=ours.window,
        partition_type=ours.partition,
        grid_size=(8, 8) if ours.partition == "grid" else (8, 12),
        mlp_ratio=1,
        activation_layer=nn.GELU,
        norm_layer=nn.Identity,
        attention_dropout=0.0,
        mlp_dropout=0.0,
        p_stochastic_dropout=0.0,
    )
    theirs.mlp_layer = Zero()
    theirs.to(ours.qkv.weight.dtype)
    own = dict(ours.named_parameters())
    # Its scale is C ** -0.5 instead of M ** -0.5.
    larger = torch.ones(3 * DIM, dtype=ours.qkv.weight.dtype)
    larger[:DIM] = HEADS**0.5
    layer = "attn_layer.1."

    def attend(x):
        state = {
            f"{layer}to_qkv.weight": own["qkv.weight"] * larger[:, None],
            f"{layer}to_qkv.bias": own["qkv.bias"] * larger,
            f"{layer}merge.weight": own["proj.weight"],
            f"{layer}merge.bias": own["proj.bias"],
            f"{layer}relative_position_bias_table": own["local_relative_position_bias_table"],
        }
        image = x.permute(0, 3, 1, 2)
        # Without the sum that it is a part of there.
        out = torch.func.functional_call(theirs, state, (image,)) - image
        return out.permute(0, 2, 3, 1)

    return attend, own


def maxvit_of_timm(ours):
    config = MaxxVitTransformerCfg(
        dim_head=DIM // HEADS,
        head_first=False,
        window_size=(ours.window,) * 2,
        grid_size=(ours.window,) * 2,
        rel_pos_type="bias",
    )
    kind = "block" if ours.partition == "window" else "grid"
    theirs = PartitionAttentionCl(DIM, kind, config)
    theirs.norm1, theirs.norm2, theirs.mlp = nn.Identity(), nn.Identity(), Zero()
    table = "local_relative_position_bias_table"
    names = {table: "attn.rel_pos.relative_position_bias_table"}
    names |= {
        f"{layer}.{part}": f"attn.{layer}.{part}"
        for layer in ("qkv", "proj")
        for part in ("weight", "bias")
    }
    load(theirs, ours, names)
    found = dict(theirs.named_parameters())
    return lambda x: theirs(x) - x, {own: found[name] for own, name in names.items()}


def twins(ours):
    own = dict(ours.named_parameters())
    if ours.scope == "local":
        theirs = LocallyGroupedAttn(DIM, HEADS, ws=ours.window)
    else:
        theirs = GlobalSubSampleAttn(DIM, HEADS, sr_ratio=ours.reduction)
    theirs.to(ours.qkv.weight.dtype)
    state = dict(own)

    def attend(x):
        if ours.scope == "global":
            for part in ("weight", "bias"):
                both = own[f"qkv.{part}"].split((DIM, 2 * DIM))
                state[f"q.{part}"], state[f"kv.{part}"] = both
                state.pop(f"qkv.{part}", None)
        arguments = (x.flatten(1, 2), x.shape[1:3])
        return torch.func.functional_call(theirs, state, arguments, strict=True).view_as(x)

    return attend, own


def vitdet(ours):
    sides = [(len(table) + 1) // 2 for table in (ours.rel_pos_h, ours.rel_pos_w)]
    theirs = Attention(DIM, HEADS, use_rel_pos=True, input_size=sides)
    load(theirs, ours)

    def attend(x):
        if ours.full:
            return theirs(x)
        windows, padded = window_partition(x, ours.window)
        return window_unpartition(theirs(windows), ours.window, x.shape[1:3], padded)

    return attend, dict(theirs.named_parameters())


class Zero(nn.Module):
    """In the place of what is no part of the attention."""

    def forward(self, x):
        return torch.zeros_like(x)


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
    *(
        Peer("maxvit", grid, {"window": 4, "partition": kind, "position": "relative"}, make)
        for grid, kind, make in (
            ((8, 12), "window", maxvit_of_torchvision),
            ((8, 8), "grid", maxvit_of_torchvision),
            ((8, 12), "window", maxvit_of_timm),
            ((12, 8), "grid", maxvit_of_timm),
        )
    ),
    Peer("twins", (6, 9), {"window": 3, "scope": "local"}, twins),
    Peer("twins", (7, 9), {"reduction": 2, "scope": "global"}, twins),
    Peer("twins", (4, 5), {"reduction": 1, "scope": "global"}, twins),
    Peer("vitdet", (6, 9), {"window": 3, "full": False, "position": "relative"}, vitdet),
    Peer("vitdet", (5, 6), {"full": True, "position": "relative"}, vitdet),
    # Its tables, made for another grid, are resized.
    Peer("vitdet", (7, 4), {"full": True, "position": "relative", "grid": (5, 6)}, vitdet),
]


def build(peer, dtype):
    torch.manual_seed(0)
    module = attentions.build_for(
        peer.name, dim=DIM, num_heads=HEADS, num_global=0, **{"grid": peer.grid} | peer.options
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
