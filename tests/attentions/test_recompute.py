"""What the mechanisms that make their scores again in the backward pass guarantee besides."""

import copy
import pickle
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attentions
from attentions import cache, local, relative
from bench.measure import memory
from tests.attentions.test_oracles import assert_near, pair, run, tokens

OPTIONS = [
    ("longformer", {"window": 3, "position": "relative"}),
    ("longformer", {"window": 2, "position": "absolute", "padding": "exact"}),
    ("longformer", {"window": 3, "position": "relative", "padding": "cyclic"}),
    ("longformer", {"window": 3, "position": "relative", "share_weights": False}),
    ("longformer", {"window": 3, "position": "relative", "neighbours": "random"}),
    ("full", {"position": "relative"}),
]
GRID = (7, 8)
every_option = pytest.mark.parametrize(("name", "options"), OPTIONS)


def build(name, options, *, grid=GRID, num_global=2, dim=12, dtype=torch.float64, **more):
    torch.manual_seed(0)
    module = attentions.build_for(
        name, grid=grid, dim=dim, num_heads=3, num_global=num_global, **options, **more
    ).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    return module


# Scores of one strip or query, of a few, or of everything at once.
@pytest.mark.parametrize(
    ("grid", "most"), [(GRID, 1), (GRID, 40_000), (GRID, 2**30), ((2, 11), 40_000)]
)
@every_option
def test_results_do_not_depend_on_the_blocks(name, options, grid, most, monkeypatch):
    for module in (local, relative):
        monkeypatch.setattr(module, "LARGEST_SCORES", {"cpu": most, "other": most})
    modules = pair(name, options, grid=grid, num_global=2, num_heads=3)
    x = tokens(modules[0], grid)
    assert_near(*(run(module.train(), x, grid, seed=3) for module in modules), 1e-9)


@every_option
def test_dropout_is_the_same_in_the_backward_pass(name, options, monkeypatch):
    for module in (local, relative):
        monkeypatch.setattr(module, "LARGEST_SCORES", {"cpu": 5000, "other": 5000})
    module = build(name, options, attn_drop=0.4, dim=6).train()
    x = tokens(module, GRID, batch=1)
    found = run(module, x, GRID, seed=3)
    y, gradient = found["output"], found["input"]
    assert (y - build(name, options, dim=6)(x, GRID)).abs().max() > 1e-3
    weights = torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        values = []
        for step in (1e-5, -1e-5):
            torch.manual_seed(3)
            values.append(float((module(x + step * direction, GRID) * weights).sum().detach()))
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-6)


class LargestBatch(TorchDispatchMode):
    """Watches how many matrices batched products have."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen = max(self.seen, len(args[-1]))
        return func(*args, **(kwargs or {}))


def test_products_of_more_matrices_than_a_gpu_takes_are_split(monkeypatch):
    module = build("longformer", {"window": 2})
    x = tokens(module, GRID, batch=3)
    with LargestBatch() as watch:
        expected = run(module, x, GRID)
    assert watch.seen == 3 * 3 * 4 * 4
    monkeypatch.setattr(local, "LARGEST_BATCH", 20)
    with LargestBatch() as watch:
        actual = run(module, x, GRID)
    assert 8 <= watch.seen <= 20
    assert_near(actual, expected, 1e-9)


def peak(module, grid):
    x = tokens(module, grid, batch=1, dtype=torch.float32).requires_grad_()

    def step():
        module(x, grid).square().sum().backward()

    step()
    measured = [memory.peak(step, device="cpu", live=[module, x]) for _ in range(2)][1]
    return measured.bytes - measured.before


def test_full_attention_keeps_no_tensor_of_all_pairs(monkeypatch):
    grid = (40, 40)
    module = build("full", {"position": "relative"}, grid=grid, dtype=torch.float32)
    pairs = 4 * (module.num_global + grid[0] * grid[1]) ** 2
    shares = []
    for most in (2**18, 2**40):
        monkeypatch.setattr(relative, "LARGEST_SCORES", {"cpu": most, "other": most})
        shares.append(peak(module, grid) / pairs)
    assert shares[0] < 0.3
    # The same measure sees such tensors, one a head, where they are made.
    assert shares[1] > 3


def test_longformer_keeps_queries_keys_and_values_alone(monkeypatch):
    grid = (42, 84)
    module = build("longformer", {"position": "relative"}, grid=grid, dim=48, dtype=torch.float32)
    tokens_bytes = 4 * 48 * (module.num_global + grid[0] * grid[1])
    shares = []
    for most in (1, 2**40):
        monkeypatch.setattr(local, "LARGEST_SCORES", {"cpu": most, "other": most})
        shares.append(peak(module, grid) / tokens_bytes)
    # Several tensors of queries, keys, values and their gradients, and a strip of one head.
    assert shares[0] < 20
    # 3 heads with 9 x 49 keys a token, twice, and what is gathered.
    assert shares[1] > 2 * 3 * 9 * 49 / 48


def test_threads_and_copies_share_what_is_cached():
    options = {"window": 3, "position": "relative", "padding": "exact"}
    module = build("longformer", options).eval()
    x = tokens(module, GRID)
    with torch.inference_mode():
        expected = module(x, GRID).clone()
    cache.clear()
    others = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    found = []

    def work(one):
        for _ in range(5):
            y = one(x, GRID)
            y.sum().backward()
            found.append(y.detach())

    threads = [threading.Thread(target=work, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for y in found:
        torch.testing.assert_close(y, expected)
    assert 0 < cache.cached_bytes() <= cache.LARGEST_CACHE


@pytest.mark.parametrize(("name", "options"), [OPTIONS[0], OPTIONS[-1]])
def test_compiled_training_with_dropout_is_one_graph(name, options):
    module = build(name, options, attn_drop=0.2).train()
    x = tokens(module, GRID)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x, GRID)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch._dynamo.reset()
