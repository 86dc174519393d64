import contextlib
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attentions

EXAMPLES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name in attentions.names()
    for options in getattr(attentions.find(name), "examples", ({},))
]
positions = st.sampled_from(["absolute", "relative"])
LONGFORMER = st.fixed_dictionaries(
    {
        "window": st.sampled_from([1, 2, 5]),
        "position": positions,
        "padding": st.sampled_from(["zero", "exact", "cyclic"]),
        "neighbours": st.sampled_from(["all", "self", "random"]),
        "share_weights": st.booleans(),
    }
)
SWIN = st.sampled_from([(1, 0), (2, 1), (3, 2), (5, 0), (5, 1), (5, 4)]).flatmap(
    lambda size: st.fixed_dictionaries(
        {"window": st.just(size[0]), "shift": st.just(size[1]), "position": positions}
    )
)
LINEAR = st.fixed_dictionaries(
    {"power": st.sampled_from([1.0, 3.0, 5.5]), "kernel": st.sampled_from([0, 1, 3, 7])}
)
# It divides by the weights' sum, which rounding alone makes of a small query: in half precision it
# is compared with the library, in test_peers.
ILL_CONDITIONED = ("lite_mla",)
every_example = pytest.mark.parametrize(("name", "options"), EXAMPLES)
sides = st.integers(1, 9)
grids = st.tuples(sides, sides)
globals_ = st.sampled_from([0, 1, 3])
batches = st.sampled_from([1, 3])
seeds = st.integers(0, 2**16)


def pair(name, options, *, grid, num_global, num_heads=2, spread=0.7, seed=0, dtype=torch.float64):
    """The fast form and the oracle of a mechanism, with the same random parameters."""
    least = getattr(attentions.find(name), "least_globals", 0)
    torch.manual_seed(seed)
    modules = [
        attentions.build_for(
            name,
            grid=grid,
            dim=num_heads * 4,
            num_heads=num_heads,
            num_global=max(num_global, least),
            **{"position": "absolute", **options},
            implementation=implementation,
        )
        for implementation in ("fast", "reference")
    ]
    generator = torch.Generator().manual_seed(seed)
    for parameter in modules[0].parameters():
        # Biases and tables too, which start at zero or nearly so.
        torch.nn.init.uniform_(parameter, -spread, spread, generator=generator)
    modules[1].load_state_dict(modules[0].state_dict())
    return [module.to(dtype).eval() for module in modules]


def tokens(module, grid, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (batch, module.num_global + grid[0] * grid[1], module.dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def smallest(options):
    """The least side of a grid."""
    return options.get("reduction", 1 if options.get("linear", True) else options["size"])


def run(module, x, grid, *, context=contextlib.nullcontext, seed=None):
    """Output, and the gradients of the input and of every parameter, by name."""
    x = x.clone().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    with context():
        y = module(x, grid)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().view_as(y).to(y.dtype)
    module.zero_grad()
    incoming = weights.clone()
    y.backward(incoming)
    # A residual connection gets the same tensor.
    assert torch.equal(incoming, weights), "the incoming gradient was changed in place"
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **gradients}


def assert_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is None:
            continue
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name].double() - value.double()).abs().max()
        # Gradients that cancel to nothing have no size of their own to be compared with.
        allowed = tolerance * max(1.0, float(value.abs().max()))
        assert error <= allowed, f"{name}: off by {error:.1e}, allowed {allowed:.1e}"


@every_example
@settings(max_examples=15)
@given(
    grid=grids,
    made_larger=st.booleans(),
    num_global=globals_,
    batch=batches,
    heads=st.sampled_from([1, 2, 3]),
    seed=seeds,
)
def test_fast_form_equals_oracle(name, options, grid, made_larger, num_global, batch, heads, seed):
    made_for = grid
    if made_larger and not getattr(attentions.find(name), "fixed_size", False):
        made_for = (9, 9)
    fast, oracle = pair(
        name, options, grid=made_for, num_global=num_global, num_heads=heads, seed=seed
    )
    x = tokens(fast, grid, batch, seed)
    if min(grid) < smallest(options):
        message = f"grid {grid[0]}x{grid[1]} .* {smallest(options)}"
        for module in (fast, oracle):
            with pytest.raises(ValueError, match=message):
                module(x, grid)
        return
    assert_near(run(fast, x, grid), run(oracle, x, grid), 1e-9)


@pytest.mark.parametrize(
    ("name", "every"), [("longformer", LONGFORMER), ("swin", SWIN), ("focused_linear", LINEAR)]
)
@settings(max_examples=100)
@given(
    data=st.data(), grid=grids, num_global=globals_, batch=batches, train=st.booleans(), seed=seeds
)
def test_those_of_many_options_in_all_of_them(
    name, every, data, grid, num_global, batch, train, seed
):
    fast, oracle = pair(name, data.draw(every), grid=grid, num_global=num_global, seed=seed)
    x = tokens(fast, grid, batch, seed)
    # Training, both draw the same random neighbours from the same seed.
    results = [run(module.train(train), x, grid, seed=seed) for module in (fast, oracle)]
    assert_near(*results, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid", [(31, 17), (1, 300)], ids=str)
def test_scans_of_many_chunks_equal_the_formula_token_by_token(grid, dtype, tolerance):
    modules = pair("ss2d", {"state": 2, "gate": True}, grid=grid, num_global=2)
    for module in modules:
        with torch.no_grad():
            # From states that hardly fade to such as are gone after a token.
            module.A_logs.copy_(torch.linspace(-6, 8, module.A_logs.numel()).view(-1, 2))
    expected = run(modules[1], tokens(modules[1], grid, 2, 0), grid)
    fast = modules[0].to(dtype)
    assert_near(run(fast, tokens(fast, grid, 2, 0, dtype), grid), expected, tolerance)


def test_performers_redraw_alike():
    options = {"num_features": 5, "redraw_interval": 2}
    fast, oracle = pair("performer", options, grid=(4, 5), num_global=1)
    drawn = []
    for step in range(6):
        x = tokens(fast, (4, 5), 2, step)
        for module in (fast, oracle):
            torch.manual_seed(step)
            module.train().set_training_step(step)
        results = [run(module, x, (4, 5)) for module in (fast, oracle)]
        assert_near(*results, 1e-9)
        drawn.append(fast.fast_attention.projection_matrix.clone())
    same = [torch.equal(*both) for both in itertools.pairwise(drawn)]
    assert same == [True, False, True, False, True]


def test_what_a_reduction_leaves_over_is_seen_by_nobody_else():
    # 5x7 reduced by 2: the last row and the last column are in no whole square.
    fast, oracle = pair("srformer", {"reduction": 2}, grid=(5, 7), num_global=1)
    x = tokens(fast, (5, 7), 1, 0)
    for module in (fast, oracle):
        before = module(x, (5, 7))
        for cell, alone in (((4, 0), True), ((0, 6), True), ((4, 6), True), ((3, 5), False)):
            place = 1 + cell[0] * 7 + cell[1]
            other = x.clone()
            other[0, place] += 1.0
            changed = ((module(other, (5, 7)) - before).abs().amax(dim=-1) > 1e-9)[0]
            assert changed[place]
            assert (int(changed.sum()) == 1) == alone, cell


@pytest.mark.parametrize(("grid", "num_global"), [((1, 1), 3), ((5, 7), 0), ((9, 4), 3)])
@every_example
def test_single_precision(name, options, num_global, grid):
    if min(grid) < smallest(options):
        pytest.skip("the grid is smaller than the reduction")
    exact, _ = pair(name, options, grid=grid, num_global=num_global)
    expected = run(exact, tokens(exact, grid, 2, 0), grid)
    for module in pair(name, options, grid=grid, num_global=num_global, dtype=torch.float32):
        x = tokens(module, grid, 2, 0, torch.float32)
        assert_near(run(module, x, grid), expected, 1e-4)


# Grids that leave several tokens when they are reduced: what is left of two, normalised, is mostly
# rounding.
@pytest.mark.parametrize(("grid", "num_global"), [((1, 1), 3), ((10, 7), 0), ((7, 13), 3)])
@every_example
def test_bfloat16_autocast(name, options, num_global, grid):
    if min(grid) < smallest(options) or name in ILL_CONDITIONED:
        pytest.skip("the grid is smaller than the reduction, or rounding decides the result")
    same = {"grid": grid, "num_global": num_global, "spread": 0.4}
    exact, _ = pair(name, options, **same)
    expected = run(exact, tokens(exact, grid, 2, 0), grid)
    for module in pair(name, options, **same, dtype=torch.float32):
        x = tokens(module, grid, 2, 0, torch.float32)
        result = run(module, x, grid, context=lambda: torch.autocast("cpu", torch.bfloat16))
        assert_near(result, expected, 0.05)


@pytest.mark.gpu
@every_example
def test_gpu(name, options):
    grid = (10, 7)
    same = {"grid": grid, "num_global": 3, "spread": 0.4}
    exact, _ = pair(name, options, **same)
    expected = run(exact, tokens(exact, grid, 2, 0), grid)

    def on_gpu(module, dtype, **how):
        x = tokens(module, grid, 2, 0, dtype).cuda()
        return {key: value.cpu() for key, value in run(module.cuda(), x, grid, **how).items()}

    for module in pair(name, options, **same):
        assert_near(on_gpu(module, torch.float64), expected, 1e-9)
    for half in () if name in ILL_CONDITIONED else (torch.float16, torch.bfloat16):
        for module in pair(name, options, **same, dtype=torch.float32):
            context = functools.partial(torch.autocast, "cuda", half)
            assert_near(on_gpu(module, torch.float32, context=context), expected, 0.05)


def test_random_neighbours_are_the_own_chunk_and_one_of_eight():
    options = {"window": 2, "position": "relative"}
    grid = (6, 6)
    everyone, _ = pair("longformer", options, grid=grid, num_global=1)
    own, _ = pair("longformer", options | {"neighbours": "self"}, grid=grid, num_global=1)
    drawn, _ = pair("longformer", options | {"neighbours": "random"}, grid=grid, num_global=1)
    x = tokens(drawn, grid, 1, 0)
    torch.testing.assert_close(drawn(x, grid), everyone(x, grid))

    drawn.train()
    torch.manual_seed(0)
    # The centre chunk has all eight neighbours, so that each draw gives it another output.
    centre = 1 + 2 * 6 + 2
    outputs = [drawn(x, grid)[0, centre] for _ in range(100)]
    distinct = {tuple(output.round(decimals=6).tolist()) for output in outputs}
    assert len(distinct) == 8
    # A corner chunk has five neighbours outside, all masked: then it sees itself alone.
    alone = own(x, grid)[0, 1]
    same = sum(bool(torch.allclose(drawn(x, grid)[0, 1], alone)) for _ in range(100))
    assert 40 < same < 85


@every_example
def test_dropout_only_while_training(name, options):
    grid = (6, 5)
    plain = pair(name, options, grid=grid, num_global=2)
    dropping = pair(name, options | {"attn_drop": 0.3, "proj_drop": 0.4}, grid=grid, num_global=2)
    x = tokens(plain[0], grid, 2, 0)
    for module, other in zip(plain, dropping, strict=True):
        expected = module(x, grid)
        torch.testing.assert_close(other(x, grid), expected, rtol=0, atol=0)
        other.train()
        torch.manual_seed(0)
        share = (other(x, grid) == 0).double().mean()
        assert 0.3 < share < 0.5, "proj_drop"


@pytest.mark.parametrize("implementation", [0, 1], ids=["fast", "reference"])
@every_example
def test_attention_dropout_keeps_the_mean(name, options, implementation):
    grid = (4, 3)
    plain = pair(name, options, grid=grid, num_global=2)[implementation]
    dropping = pair(name, options | {"attn_drop": 0.2}, grid=grid, num_global=2)[implementation]
    x = tokens(plain, grid, 1, 0)
    torch.manual_seed(0)
    many = dropping.train()(x.expand(500, -1, -1), grid)
    expected = plain.train()(x, grid)[0]
    if getattr(attentions.find(name), "has_weights", True):
        assert many.std(dim=0).min() > 0.01
    else:
        assert torch.equal(many, many[:1].expand_as(many))
    assert (many.mean(dim=0) - expected).abs().max() < 6 * many.std(dim=0).max() / 500**0.5 + 1e-9
