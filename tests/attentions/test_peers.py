"""Mechanisms that others have too: same weights and input, same output and gradients."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from timm.models.efficientvit_mit import LiteMLA
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from timm.models.metaformer import Pooling
from timm.models.pvt_v2 import Attention as PooledAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.vision_transformer_sam import Attention, window_partition, window_unpartition
from timm.models.xcit import XCA
from torch import nn
from torchvision.models.maxvit import PartitionAttentionLayer
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

import attentions

GRIDS = [(6, 8), (9, 5), (1, 3)]
DIM, HEADS = 16, 2


class Peer(NamedTuple):
    """A mechanism here, and a function of the same weights that others define.

    Attributes:
        make: of the mechanism here, the function of x (B, rows, columns, C) and the tensors that
            it depends on, by their names here.
        num_global: tokens before the grid; where there are some, x is (B, N, C).
    """

    name: str
    grid: tuple[int, int]
    options: dict
    make: Callable
    num_global: int = 0


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


def swin(ours):
    w, s = ours.window, ours.shift
    names = {"local_relative_position_bias_table": "relative_position_bias_table"}
    make = functools.partial(ShiftedWindowAttention, DIM, [w, w], [s, s], num_heads=HEADS)
    return of_library(make, nn.Module.__call__, names)(ours)


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
    return of_library(lambda: theirs, lambda module, x: module(x) - x, names)(ours)


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


def of_library(make, call, names=None):
    """The peer that `make` builds, called by `call(module, x)`; `names` are its names for ours."""

    def peer(ours):
        theirs = make()
        load(theirs, ours, names)
        found, own = dict(theirs.named_parameters()), dict(ours.named_parameters())
        tensors = {name: found[(names or {}).get(name, name)] for name in own}
        return lambda x: call(theirs, x), tensors

    return peer


def on_tokens(module, x):
    return module(x.flatten(1, 2), x.shape[1:3]).view_as(x)


def on_image(module, x):
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pooling(ours):
    return lambda x: on_image(Pooling(ours.size), x), {}


def lite_mla(**settings):
    return LiteMLA(DIM, DIM, heads=HEADS, dim=DIM // HEADS, **settings)


def plain_mla(kernel=5):
    return lite_mla(norm_layer=None, use_bias=(False, True), scales=(kernel,))


def pvt_v2(**settings):
    return PooledAttention(DIM, HEADS, **settings)


LITE_MLA = {
    "qkv.weight": "qkv.conv.weight",
    "aggreg.0.weight": "aggreg.0.0.weight",
    "aggreg.1.weight": "aggreg.0.1.weight",
    "proj.weight": "proj.conv.weight",
    "proj.bias": "proj.conv.bias",
}


class Zero(nn.Module):
    """In the place of what is no part of the attention."""

    def forward(self, x):
        return torch.zeros_like(x)


def load(theirs, ours, names=None):
    """Give a peer the weights of ours, and its dtype; `names` are its names for ours."""
    own = {(names or {}).get(name, name): p for name, p in ours.named_parameters()}
    sizes = {name: p.shape for name, p in theirs.named_parameters()}
    state = {name: p.view(sizes.get(name, p.shape)) for name, p in own.items()}
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
    *(
        Peer("swin", grid, {"window": 3, "shift": shift, "position": "relative"}, swin)
        for grid in ((6, 9), (3, 3), (3, 9), (9, 3))
        for shift in (0, 1)
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
    *(
        Peer(name, grid, options, make, num_global)
        for grid in GRIDS
        for name, options, make, num_global in (
            ("pooling", {}, pooling, 0),
            ("pooling", {"size": 5}, pooling, 0),
            ("pvt_v2", {}, of_library(lambda: pvt_v2(linear_attn=True), on_tokens), 0),
            ("pvt_v2", {"linear": False, "size": 1}, of_library(pvt_v2, on_tokens), 0),
            ("lite_mla", {}, of_library(plain_mla, on_image, LITE_MLA), 0),
            ("lite_mla", {"kernel": 3}, of_library(lambda: plain_mla(3), on_image, LITE_MLA), 0),
            ("xca", {}, of_library(lambda: XCA(DIM, HEADS, qkv_bias=True), nn.Module.__call__), 2),
        )
    ),
    *(
        Peer(
            "pvt_v2",
            grid,
            {"linear": False, "size": 3},
            of_library(lambda: pvt_v2(sr_ratio=3), on_tokens),
        )
        for grid in ((6, 8), (9, 5), (3, 3))
    ),
]


def build(peer, dtype):
    torch.manual_seed(0)
    sizes = {"dim": DIM, "num_heads": HEADS, "num_global": peer.num_global}
    module = attentions.build_for(peer.name, **sizes, **{"grid": peer.grid} | peer.options)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.name}-{peer.grid}")
def test_equal_to_its_peer_in_output_and_all_gradients(peer, dtype, near, monkeypatch):
    if peer.name == "lite_mla":
        # Theirs makes float32 of half precision, and of float64.
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x.to(dtype))
    ours = build(peer, dtype)
    theirs, tensors = peer.make(ours)
    generator = torch.Generator().manual_seed(1)
    count = peer.num_global + peer.grid[0] * peer.grid[1]
    shape = (count,) if peer.num_global else peer.grid
    x = torch.randn(2, *shape, DIM, generator=generator, dtype=torch.float64).to(dtype)
    results, own = [], dict(ours.named_parameters())
    for call, inputs in (
        (lambda y: ours(y.view(2, count, DIM), peer.grid).view_as(y), own),
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
        image = torch.randn(2, 6, 7, DIM)
        torch.testing.assert_close(
            ours(image.flatten(1, 2), (6, 7)), on_image(peer, image).flatten(1, 2)
        )


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
    peer = plain_mla()
    with torch.no_grad():
        for name, value in ours.named_parameters():
            other = peer.get_parameter(LITE_MLA[name])
            other.copy_(value.uniform_(-0.5, 0.5).view_as(other))
    own = outcome(ours, lambda module, *place: module(*place), torch.float32, True)
    theirs = outcome(
        peer, lambda module, x, grid: on_image(module, x.unflatten(1, grid)).flatten(1, 2),
        torch.float32, True,
    )  # fmt: skip
    exact = outcome(ours, lambda module, *place: module(*place), torch.float64, False)
    assert (own - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()
