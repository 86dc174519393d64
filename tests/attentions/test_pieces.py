"""What is worked through piece by piece, and recomputed in the backward pass."""

import pytest
import torch

import attentions
from attentions import pieces
from tests.attentions.test_oracles import assert_near, pair, run, tokens
from tests.attentions.test_recompute import OPTIONS

GRID = (9, 7)
RECOMPUTING = [
    ("agent", {"agents": 3}),
    ("biformer", {"topk": 2, "regions": 3}),
    ("mila", {"gate": True}),
    ("rala", {"kernel": 3}),
    ("ss2d", {"state": 2, "expand": 2}),
    ("performer", {"num_features": 7}),
    ("focused_linear", {"power": 2.5, "kernel": 3}),
    ("focused_linear", {"power": 3.0, "kernel": 0}),
    ("linformer", {"num_features": 5}),
    ("global", {}),
    ("srformer", {"reduction": 2}),
    ("swin", {"window": 3, "shift": 1, "position": "relative"}),
    ("swin", {"window": 2, "shift": 1, "position": "absolute"}),
]
recomputing = pytest.mark.parametrize(("name", "options"), RECOMPUTING)


@recomputing
@pytest.mark.parametrize("limit", [1, 1500, 6000, 2**40])
def test_pieces_of_any_size_give_the_same(monkeypatch, name, options, limit):
    monkeypatch.setitem(pieces.LARGEST_PIECE, "cpu", limit)
    fast, oracle = pair(name, options, grid=GRID, num_global=2)
    x = tokens(fast, GRID, 3, 0)
    assert_near(run(fast, x, GRID), run(oracle, x, GRID), 1e-9)


@pytest.mark.parametrize(("name", "options"), RECOMPUTING + OPTIONS)
def test_differentiating_twice_is_refused(name, options):
    fast, _ = pair(name, options, grid=GRID, num_global=1)
    x = tokens(fast, GRID, 1).requires_grad_()
    (grad,) = torch.autograd.grad(fast(x, GRID).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        grad.sum().backward()


SAVING = [
    ("agent", {"agents": 2}),
    ("biformer", {"topk": 2}),
    ("mila", {"gate": False}),
    ("performer", {"num_features": 256}),
    ("focused_linear", {}),
    ("global", {}),
    ("linformer", {}),
    ("srformer", {"reduction": 2}),
    ("swin", {"shift": 3, "position": "absolute"}),
]


@pytest.mark.parametrize(("dim", "heads"), [(96, 3), (384, 6)])
@pytest.mark.parametrize(("name", "options"), SAVING)
def test_no_more_is_saved_of_a_token_than_by_fused_full_attention(name, options, dim, heads):
    # What does not grow with the tokens, sums over them and weights in half precision, drops out.
    grids = ((14, 14), (28, 14))
    saved, fused = (
        [saved_bytes(which, more, dim=dim, heads=heads, grid=grid) for grid in grids]
        for which, more in ((name, options), ("full", {}))
    )
    assert saved[1] - saved[0] <= fused[1] - fused[0]


def saved_bytes(name, options, *, dim, heads, grid):
    """Bytes kept for the backward pass under autocast, parameters left out."""
    module = attentions.build_for(
        name, grid=grid, dim=dim, num_heads=heads, num_global=8, **options
    )
    x = torch.randn(2, 8 + grid[0] * grid[1], dim, requires_grad=True)
    parameters = {value.untyped_storage().data_ptr() for value in module.state_dict().values()}
    kept = {}

    def keep(value):
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        torch.autocast("cpu", torch.bfloat16),
    ):
        module(x, grid)
    return sum(v.untyped_storage().nbytes() for key, v in kept.items() if key not in parameters)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_reduction_has_the_right_gradient_however_it_lies_in_memory(batch):
    module, _ = pair("srformer", {"reduction": 2}, grid=(6, 4), num_global=1, num_heads=1)
    x = tokens(module, (6, 4), batch, 0).requires_grad_()
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2)):
        inverse = torch.tensor(order).argsort().tolist()

        def reduced(x, order=order, inverse=inverse):
            # The gradient that comes in lies in memory in another order of dimensions.
            return module.reduce(x, (6, 4)).permute(order).contiguous().permute(inverse)

        assert torch.autograd.gradcheck(reduced, x)
