"""What focused linear attention does, derived by hand."""

import itertools

import pytest
import torch

import attentions
from attentions.focused_linear import focus

GRID = (6, 7)


def build(*, grid=GRID, num_global=2, dim=8, plain_values=False, **options):
    """A module in float64; with plain values, values and output are the input as it is."""
    torch.manual_seed(0)
    module = attentions.build_for(
        "focused_linear", grid=grid, dim=dim, num_heads=2, num_global=num_global, **options
    )
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    if plain_values:
        with torch.no_grad():
            module.qkv.weight[2 * dim :] = torch.eye(dim)
            module.qkv.bias[2 * dim :] = 0
            module.proj.weight.copy_(torch.eye(dim))
            module.proj.bias.zero_()
    return module.double().eval()


def tokens(grid=GRID, num_global=2, dim=8, batch=2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, num_global + grid[0] * grid[1], dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("x", "power", "expected"),
    [
        ((1.0, 2.0, -3.0), 1.0, (1.0, 2.0, 0.0)),
        # √5 / √(1 + 64) times the third powers 1, 8, 0.
        ((1.0, 2.0, -3.0), 3.0, (0.2773501, 2.2188008, 0.0)),
        ((0.0, 5.0, -1.0), 7.5, (0.0, 5.0, 0.0)),
        ((2.0, 2.0, 2.0), 4.0, (2.0, 2.0, 2.0)),
        ((-1.0, -2.0, -3.0), 3.0, (0.0, 0.0, 0.0)),
    ],
)
def test_focus_by_hand(x, power, expected):
    result = focus(torch.tensor(x, dtype=torch.float64), power)
    torch.testing.assert_close(result, torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


def test_focus_keeps_lengths_and_turns_towards_the_largest_channel():
    x = torch.randn(100, 8, dtype=torch.float64)
    largest = x.relu().amax(dim=-1)
    shares = []
    for power in (1.0, 2.0, 3.0, 6.0):
        result = focus(x, power)
        torch.testing.assert_close(result.norm(dim=-1), x.relu().norm(dim=-1), rtol=1e-4, atol=1e-4)
        shares.append((result.amax(dim=-1) / result.norm(dim=-1))[largest > 0.1])
    for less, more in itertools.pairwise(shares):
        assert (more >= less - 1e-9).all()
        assert more.mean() > less.mean()


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize(
    ("power", "expected"),
    [
        # Queries, keys and values (1, 2) and (2, 0): weights 5 and 2, and 2 and 4.
        (1.0, [(9 / 7, 10 / 7), (10 / 6, 4 / 6)]),
        # √5 / √65 (1, 8) and (2, 0): weights 5 and 2a, and 2a and 4, with a = √5 / √65 = 0.27735.
        (3.0, [(6.1094 / 5.5547, 10 / 5.5547), (8.5547 / 4.5547, 1.1094 / 4.5547)]),
    ],
)
def test_two_tokens_by_hand(power, expected, implementation):
    module = attentions.build(
        "focused_linear",
        dim=2,
        num_heads=1,
        num_global=0,
        power=power,
        kernel=0,
        implementation=implementation,
    )
    with torch.no_grad():
        module.qkv.weight.copy_(torch.eye(2).repeat(3, 1))
        module.qkv.bias.zero_()
        module.proj.weight.copy_(torch.eye(2))
        module.proj.bias.zero_()
    out = module(torch.tensor([[[1.0, 2.0], [2.0, 0.0]]]), (1, 2))
    torch.testing.assert_close(out[0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_weights_are_positive_and_sum_to_one(implementation):
    module = build(plain_values=True, kernel=0, implementation=implementation)
    constant = torch.arange(8.0, dtype=torch.float64)
    x = tokens()
    with torch.no_grad():
        # Values that are alike in all tokens come out as they are.
        module.qkv.weight[16:] = 0
        module.qkv.bias[16:] = constant
        torch.testing.assert_close(module(x, GRID), constant.expand_as(x))
    # Others come out between the smallest and the largest of them.
    module = build(plain_values=True, kernel=0, implementation=implementation)
    out = module(x, GRID)
    assert (out > x.amin(dim=1, keepdim=True)).all()
    assert (out < x.amax(dim=1, keepdim=True)).all()


def test_without_the_convolution_the_order_of_tokens_is_nothing():
    order = torch.randperm(2 + 6 * 7, generator=torch.Generator().manual_seed(0))
    x = tokens()
    plain, local = build(kernel=0), build(kernel=3)
    torch.testing.assert_close(plain(x[:, order], GRID), plain(x, GRID)[:, order])
    grid_alone = torch.cat([torch.arange(2), 2 + torch.arange(42).flip(0)])
    moved = (local(x[:, grid_alone], GRID) - local(x, GRID)[:, grid_alone]).abs()
    assert moved[:, 2:].amax(dim=-1).min() > 1e-3
    # Nor is the grid's shape, without it.
    torch.testing.assert_close(plain(x, (7, 6)), plain(x, GRID))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_convolution_is_of_the_grid_alone_and_as_wide_as_its_kernel(kernel):
    both, plain = build(kernel=kernel, plain_values=True), build(kernel=0, plain_values=True)
    plain.load_state_dict({k: v for k, v in both.state_dict().items() if "dwc" not in k})
    with torch.no_grad():
        both.dwc.bias.zero_()
    x = torch.zeros_like(tokens(batch=1))
    row, column = 3, 2
    x[0, 2 + row * 7 + column] = 1.0
    x[0, 0] = 5.0
    local = (both(x, GRID) - plain(x, GRID))[0]
    assert local[:2].abs().max() < 1e-12
    reached = (local[2:].abs().amax(dim=-1) > 1e-9).unflatten(0, GRID)
    expected = torch.zeros(GRID, dtype=torch.bool)
    reach = kernel // 2
    expected[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = (
        True
    )
    assert torch.equal(reached, expected)
    # The kernel is that of the head's channel: channel 1 and 5 of 2 heads of 4 have the same.
    torch.testing.assert_close(local[:, 1], local[:, 5])
    at = 2 + (row - reach) * 7 + column
    torch.testing.assert_close(local[at, 1], both.dwc.weight[1, 0, kernel - 1, reach].detach())


def test_cost_grows_with_the_number_of_tokens():
    module = build(num_global=0)
    small = module.multiply_adds((6, 7))
    # By hand, 42 tokens of 2 heads of 4: keys with values, queries with those and with the sum of
    # keys; a 5x5 kernel a channel; four projections of 8 to 8.
    assert small == 42 * (2 * (4 * 4 + 4 * 4 + 4) + 25 * 8 + 4 * 8 * 8)
    assert module.multiply_adds((12, 14)) == 4 * small


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_powers_neither_overflow_nor_vanish_in_half_precision(scale, half):
    module = build(power=6.0, dim=64).float()
    x = (scale * tokens(dim=64)).float().requires_grad_()
    exact = module(x, GRID)
    with torch.autocast("cpu", half):
        out = module(x, GRID)
    out.float().mean().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(value.isfinite().all() for value in [out, *gradients])
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_tokens_without_a_positive_channel_weigh_all_tokens_by_length():
    module = build(plain_values=True, kernel=0)
    with torch.no_grad():
        module.qkv.weight[:16] = 0
        module.qkv.bias[:16] = -1.0
    x = tokens().requires_grad_()
    out = module(x, GRID)
    # Every query and key is the same small vector: the mean of the values.
    torch.testing.assert_close(out, x.mean(dim=1, keepdim=True).expand_as(x))
    out.square().sum().backward()
    assert x.grad.isfinite().all()
