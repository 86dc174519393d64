"""What shifted windows do, derived by hand."""

import pytest
import torch

import attentions
from bench.model.backbone import ViL
from bench.model.weights import convert_classifier
from tests.attentions.test_oracles import tokens

LONG, WIDE = (3, 9), (9, 3)


def build(grid=(6, 9), *, num_global=0, **options):
    torch.manual_seed(0)
    module = attentions.build_for(
        "swin", grid=grid, dim=8, num_heads=2, num_global=num_global, **options
    )
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    return module.double().eval()


def seen(module, grid, token):
    """The tokens, by their number, that the output of one depends on."""
    x = tokens(module, grid, batch=1).requires_grad_()
    module(x, grid)[0, token].sum().backward()
    return set(x.grad[0].abs().sum(dim=-1).nonzero().flatten().tolist())


def cells(grid, rows, columns, num_global=0):
    """The numbers of the grid tokens in some rows and columns."""
    return {num_global + row * grid[1] + column for row in rows for column in columns}


@pytest.mark.parametrize("position", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("grid", "shift", "token", "rows", "columns"),
    [
        ((6, 9), 0, (4, 7), (3, 4, 5), (6, 7, 8)),
        # What hangs over the edge of the grid is never seen.
        ((5, 7), 0, (4, 6), (3, 4), (6,)),
        ((2, 2), 0, (1, 0), (0, 1), (0, 1)),
        # Shifted by one, the windows begin at 1, 4, 7; what is before and behind them is rolled
        # into one window and does not see each other.
        ((6, 9), 1, (0, 0), (0,), (0,)),
        ((6, 9), 1, (5, 8), (4, 5), (7, 8)),
        ((6, 9), 1, (0, 5), (0,), (4, 5, 6)),
        ((6, 9), 1, (2, 8), (1, 2, 3), (7, 8)),
        ((5, 7), 1, (4, 5), (4,), (4, 5, 6)),
        ((5, 7), 1, (0, 6), (0,), (4, 5, 6)),
        ((4, 4), 2, (0, 3), (0, 1), (2, 3)),
        # One window along a side: nothing is shifted along it.
        (LONG, 1, (0, 0), (0, 1, 2), (0,)),
        (WIDE, 1, (0, 2), (0,), (0, 1, 2)),
        ((2, 2), 2, (0, 0), (0, 1), (0, 1)),
    ],
)
def test_a_token_sees_its_window_exactly(grid, shift, token, rows, columns, position):
    module = build(grid, window=3, shift=shift, position=position)
    assert seen(module, grid, token[0] * grid[1] + token[1]) == cells(grid, rows, columns)


@pytest.mark.parametrize("shift", [0, 1])
def test_global_tokens_see_all_and_are_seen_by_all(shift):
    grid, every = (5, 7), set(range(2 + 5 * 7))
    module = build(grid, num_global=2, window=3, shift=shift, position="relative")
    assert seen(module, grid, 0) == seen(module, grid, 1) == every
    last = cells(grid, (3, 4) if shift == 0 else (4,), (6,) if shift == 0 else (4, 5, 6), 2)
    assert seen(module, grid, 2 + 4 * 7 + 6) == {0, 1} | last


def test_odd_blocks_of_a_stage_shift_by_half_a_window():
    arch = "l1,h1,d4,n1,f7,p4_l2,h1,d4,n3,f7_l3,h1,d4,n4,f4"
    vil = ViL(arch, attention="swin", image_size=32, num_classes=2)
    shifts = [place.module.shift for place in vil.attention_places()]
    assert shifts == [0, 0, 3, 0, 0, 2, 0, 2]
    for fixed in (0, 2):
        vil = ViL(arch, attention="swin", image_size=32, num_classes=2, shift=fixed)
        assert {place.module.shift for place in vil.attention_places()} == {fixed}


def test_two_blocks_join_what_one_keeps_apart():
    grid = (8, 8)
    blocks = [build(grid, window=4, block_index=index) for index in (0, 1)]
    x = tokens(blocks[0], grid, batch=1).requires_grad_()
    blocks[1](blocks[0](x, grid), grid)[0, 27].sum().backward()
    # Token (3, 3) ends its window of the first block; the second one's reaches over all four.
    assert (x.grad.abs().sum(dim=-1) > 0).all()
    assert len(seen(blocks[0], grid, 27)) == len(seen(blocks[1], grid, 27)) == 16


@pytest.mark.parametrize(
    ("grid", "options", "expected"),
    [
        ((6, 9), {"position": "absolute", "shift": 0}, [None]),
        ((6, 9), {"position": "relative", "shift": 0}, [(2, 9, 10)]),
        # Windows in the middle, at the right, at the bottom and in the corner.
        ((6, 9), {"position": "absolute", "shift": 1}, [None, *[(1, 9, 10)] * 3]),
        ((6, 9), {"position": "relative", "shift": 1}, [(2, 9, 10)] * 4),
        ((5, 9), {"position": "absolute", "shift": 0}, [None, (1, 9, 10)]),
    ],
)
def test_masks_are_few_and_take_no_gradient(monkeypatch, grid, options, expected):
    masks = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, attn_mask=None, **more):
        masks.append(attn_mask)
        return fused(*tensors, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    module = build(grid, num_global=1, window=3, **options)
    module(tokens(module, grid), grid)
    # One for windows that see alike, whatever the batch; then that of the global tokens.
    seen = [None if mask is None else tuple(mask.shape[1:]) for mask in masks[:-1]]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    for mask in masks:
        if mask is not None:
            assert not mask.requires_grad
            assert len(mask) == 1
            # As the fused kernels of GPUs want it, which would copy it otherwise.
            assert all(stride % 8 == 0 for stride in mask.stride()[:-1])


@pytest.mark.parametrize("shift", [0, 1])
def test_no_more_windows_go_to_a_kernel_than_it_takes(monkeypatch, shift):
    sizes = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *tensors, **more):
        sizes.append(len(query))
        return fused(query, *tensors, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr("attentions.windows.LARGEST_BATCH", 5)
    module = build((11, 13), window=2, shift=shift, position="relative", num_global=1)
    x = tokens(module, (11, 13), batch=3)
    few = module(x, (11, 13))
    assert max(sizes) <= 5
    monkeypatch.undo()
    torch.testing.assert_close(module(x, (11, 13)), few)


def test_dropout_has_the_gradient_of_what_it_kept():
    module = build((5, 4), window=3, shift=1, position="relative", num_global=1, attn_drop=0.4)
    module.train()

    def attend(x, *_):
        torch.manual_seed(0)
        return module(x, (5, 4))

    x = tokens(module, (5, 4), batch=1).requires_grad_()
    assert torch.autograd.gradcheck(attend, (x, *module.parameters()), fast_mode=True)


def test_cost_grows_with_the_grid_and_not_with_its_square():
    module = build((14, 14), window=7)
    small = module.multiply_adds((14, 14))
    # By hand: 4 windows of 49 queries and 49 keys, twice; four projections of 8 to 8 channels.
    assert small == 2 * 4 * 49 * 49 * 8 + 4 * 196 * 8 * 8
    assert module.multiply_adds((28, 28)) == 4 * small


def test_its_table_of_positions_is_resized_when_converted():
    arch = "l1,h1,d4,n1,f{0},a0,p4_l2,h1,d4,n2,f{0},a0_l3,h1,d4,f{0},a0"
    source, target = (
        ViL(arch.format(window), attention="swin", image_size=32, num_classes=2)
        for window in (3, 5)
    )
    converted = convert_classifier({"net": source.state_dict()}, target)
    name = "backbone.bottom_up.layer2.3.attn.local_relative_position_bias_table"
    before = source.state_dict()[name.removeprefix("backbone.bottom_up.")]
    assert (before.shape, converted[name].shape) == ((25, 1), (81, 1))
    # The centre of the image of differences, no difference, stays where it is.
    torch.testing.assert_close(converted[name][40], before[12])
