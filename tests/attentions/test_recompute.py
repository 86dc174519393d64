"""What is worked through piece by piece, and recomputed in the backward pass."""

import pytest
import torch

import attentions
from attentions import pieces
from tests.attentions.test_oracles import assert_near, pair, run, tokens

GRID = (9, 7)
RECOMPUTING = [
    ("performer", {"num_features": 7}),
    ("focused_linear", {"power": 2.5, "kernel": 3}),
    ("focused_linear", {"power": 3.0, "kernel": 0}),
]
recomputing = pytest.mark.parametrize(("name", "options"), RECOMPUTING)


@recomputing
@pytest.mark.parametrize("limit", [1, 1500, 6000, 2**40])
def test_pieces_of_any_size_give_the_same(monkeypatch, name, options, limit):
    monkeypatch.setattr(pieces, "CPU_BYTES", limit)
    fast, oracle = pair(name, options, grid=GRID, num_global=2)
    x = tokens(fast, GRID, 3, 0)
    assert_near(run(fast, x, GRID), run(oracle, x, GRID), 1e-9)


@recomputing
def test_differentiating_twice_is_refused(name, options):
    fast, _ = pair(name, options, grid=GRID, num_global=1)
    x = tokens(fast, GRID, 1, 0).requires_grad_()
    (grad,) = torch.autograd.grad(fast(x, GRID).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# The places of ViL-Small for an image of 100x168, and the rows' parameters there.
SAVING = [
    ("performer", {"num_features": 256}),
    ("focused_linear", {}),
]


@pytest.mark.parametrize(("dim", "heads", "grid"), [(96, 3, (25, 42)), (384, 6, (6, 10))])
@pytest.mark.parametrize(("name", "options"), SAVING)
def test_no_more_is_saved_than_by_fused_full_attention(name, options, dim, heads, grid):
    least = saved_bytes("full", {}, dim=dim, heads=heads, grid=grid)
    # Sums over all tokens do not grow with their number.
    sums = 4 * 2 * heads * options.get("num_features", 64) * (dim // heads + 2)
    assert saved_bytes(name, options, dim=dim, heads=heads, grid=grid) <= least + sums


def saved_bytes(name, options, *, dim, heads, grid):
    """Bytes kept for the backward pass under autocast, parameters left out."""
    module = attentions.build_for(
        name, grid=grid, dim=dim, num_heads=heads, **{"num_global": 1} | options
    )
    x = torch.randn(2, module.num_global + grid[0] * grid[1], dim)
    known = {value.untyped_storage().data_ptr() for value in module.state_dict().values()}
    kept = {}

    def keep(value):
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        torch.autocast("cpu", torch.bfloat16),
    ):
        module(x, grid)
    # Full attention has fewer tokens where others have more global ones.
    share = x.shape[1] / (1 + grid[0] * grid[1])
    total = sum(v.untyped_storage().nbytes() for key, v in kept.items() if key not in known)
    return total / share
