"""Every mechanism at the stage shapes of ViL-Small: forward and training, fast and reference.

`pytest tests/benchmarks --benchmark-enable --benchmark-json=out.json` times them at 800x1344;
without `--benchmark-enable`, as in the tests, each runs once on a small image.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from performer_pytorch import SelfAttention
from timm.models import pvt_v2
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torchvision.models.swin_transformer import ShiftedWindowAttention

import attentions
from bench.measure import speed, speed_worker

# The oracles hold scores of all pairs of tokens: 67,201 squared at the first stage.
MOST_TOKENS = 5000
SMALL = (64, 96)


def timed(benchmark, case, layer, call, x):
    """Time inference or a training step; return the output, which is finite."""
    benchmark.group = f"{case.mechanism}, stage {case.stage}, {case.position}, {case.mode}"

    def infer():
        with torch.no_grad():
            return call(x)

    def train():
        layer.zero_grad(set_to_none=True)
        y = call(x.requires_grad_())
        y.backward(torch.ones_like(y))
        return y

    y = benchmark(train if case.mode == "training" else infer)
    assert y.isfinite().all()
    return y


def cases():
    for case in speed.cases(attentions.names(), positions=("absolute", "relative")):
        for implementation in ("fast", "reference"):
            label = f"{case.mechanism}-{case.stage}-{case.position}-{case.mode}-{implementation}"
            yield pytest.param(case, implementation, id=label)


@pytest.mark.parametrize(("case", "implementation"), list(cases()))
def test_call(benchmark, case, implementation):
    spec = dict(case.spec)
    if benchmark.disabled:
        shrunk = speed.cases([case.mechanism], image_size=SMALL, positions=[case.position])
        spec = next(dict(c.spec) for c in shrunk if c.stage == case.stage)
    rows, columns = spec["grid"]
    tokens = spec["num_global"] + rows * columns
    if implementation == "reference" and tokens > MOST_TOKENS:
        pytest.skip(f"the reference holds scores of {tokens:,} tokens squared")
    if min(rows, columns) < spec.get("reduction", 1):
        pytest.skip(f"grid {rows}x{columns} is smaller than the reduction")
    torch.manual_seed(0)
    module = attentions.build_for(**spec, implementation=implementation)
    x = torch.randn(1, tokens, spec["dim"])
    y = timed(benchmark, case, module, lambda x: module(x, (rows, columns)), x)
    assert y.shape == x.shape


class Library(NamedTuple):
    """What other packages offer in the place of a mechanism of ours, at the same shapes.

    Attributes:
        make: of dim, heads, grid, tokens and our options, a function of x (B, N, C), and what it
            trains; global tokens are left out where the package knows none.
    """

    mechanism: str
    make: Callable
    modes: tuple[str, ...] = ("inference", "training")
    largest: int | None = None


def torchvision_swin(dim, heads, grid, options):
    layer = ShiftedWindowAttention(dim, [options["window"]] * 2, [0, 0], heads)
    return layer, lambda x: layer(x[:, -grid[0] * grid[1] :].unflatten(1, grid))


def timm_pvt(dim, heads, grid, options):
    layer = pvt_v2.Attention(dim, heads, sr_ratio=options["reduction"])
    return layer, lambda x: layer(x[:, -grid[0] * grid[1] :], grid)


def performer_package(dim, heads, _grid, options):
    layer = SelfAttention(
        dim, heads=heads, dim_head=dim // heads, nb_features=options["num_features"], qkv_bias=True
    )
    return layer, layer


def neighbourhood(grid, window):
    """Whether a token sees another, by their numbers, for FlexAttention and as a mask."""

    def seen(_batch, _head, query, key):
        down = query // grid[1] // window - key // grid[1] // window
        across = query % grid[1] // window - key % grid[1] // window
        return (down.abs() <= 1) & (across.abs() <= 1)

    return seen


def masked_sdpa(dim, heads, grid, options):
    layer, cells = nn.Linear(dim, 4 * dim), torch.arange(grid[0] * grid[1])
    mask = neighbourhood(grid, options["window"])(0, 0, cells[:, None], cells)

    def attend(x):
        q, k, v, _ = (
            layer(x[:, -len(cells) :]).unflatten(2, (4, heads, -1)).transpose(1, 3).unbind(2)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return nn.functional.linear(y.transpose(1, 2).flatten(2), layer.weight[-dim:])

    return layer, attend


def flex(dim, heads, grid, options):
    layer, cells = nn.Linear(dim, 4 * dim), grid[0] * grid[1]
    seen = neighbourhood(grid, options["window"])
    mask = create_block_mask(seen, None, None, cells, cells, device="cpu")
    attention = torch.compile(flex_attention, dynamic=False)

    def attend(x):
        q, k, v, _ = layer(x[:, -cells:]).unflatten(2, (4, heads, -1)).transpose(1, 3).unbind(2)
        y = attention(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask)
        return nn.functional.linear(y.transpose(1, 2).flatten(2), layer.weight[-dim:])

    return layer, attend


LIBRARIES = {
    "torchvision's Swin": Library("swin", torchvision_swin),
    "timm's PVT": Library("srformer/64", timm_pvt),
    "performer-pytorch": Library("performer", performer_package),
    "masked SDPA": Library("ViL", masked_sdpa, largest=20_000),
    "FlexAttention": Library("ViL", flex, ("inference",), largest=20_000),
}


def library_cases():
    for name, library in LIBRARIES.items():
        for case in speed.cases([library.mechanism], positions=["absolute"], modes=library.modes):
            yield pytest.param(case, library, id=f"{name}-{case.stage}-{case.mode}")


@pytest.mark.parametrize(("case", "library"), list(library_cases()))
def test_libraries(benchmark, case, library):
    spec = dict(case.spec)
    if benchmark.disabled:
        shrunk = speed.cases([case.mechanism], image_size=(128, 192), positions=["absolute"])
        spec = next(dict(c.spec) for c in shrunk if c.stage == case.stage)
    grid = spec["grid"]
    if library.largest and grid[0] * grid[1] > library.largest:
        pytest.skip(f"a mask of {grid[0] * grid[1]:,} tokens squared")
    if library.make is flex and benchmark.disabled:
        pytest.skip("compiling takes longer than all else")
    if min(grid) < spec.get("reduction", 1):
        pytest.skip(f"grid {grid[0]}x{grid[1]} is smaller than the reduction")
    torch.manual_seed(0)
    layer, call = library.make(spec["dim"], spec["num_heads"], grid, spec)
    x = torch.randn(1, spec["num_global"] + grid[0] * grid[1], spec["dim"])
    y = timed(benchmark, case, layer, call, x)
    assert y.numel() in (x.numel(), x[:, spec["num_global"] :].numel())


@pytest.mark.slow
def test_full_attention_with_relative_positions_trains_within_2_gb_at_stage_1(tmp_path):
    (case,) = speed.cases(["full"], stages=[1], positions=["relative"], modes=["training"])
    weights = str(tmp_path / "weights.pth")
    worker = speed_worker.Case(dict(case.spec), case.mode, 1, 0, weights, save=True)
    assert worker.peak() < 2e9
