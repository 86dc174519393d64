import csv
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import attentions
from bench.config.schema import ProfileConfig, RunConfig
from bench.errors import InputError
from bench.measure import flops, formulas
from bench.measure.costs import flops_section
from bench.model import detectors
from bench.model.backbone import ViL

PUBLISHED = Path(__file__).parents[3] / "results" / "published.csv"
ROWS = {
    row["row"]: row
    for row in csv.DictReader(
        line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")
    )
}
METHODS = {"Mask R-CNN": "mask_rcnn", "RetinaNet": "retinanet"}
TINY = (
    "l1,h1,d12,n1,s1,g1,p4,f4,a1_l2,h2,d24,n1,s1,g1,p2,f4,a1"
    "_l3,h2,d24,n2,s1,g1,p2,f4,a1_l4,h2,d24,n1,s0,g0,p2,f4,a1"
)
SHAPE = (2, 3, 10, 8)


@functools.cache
def count_arch(arch, attention, method, convention, library="torchvision"):
    with torch.device("meta"):
        detector = detectors.build(ViL(arch, attention=attention), method=method, library=library)
    return flops.count_flops(detector, convention=convention)


@pytest.mark.detectron2
@pytest.mark.parametrize("row", ["ViL-Small Mask R-CNN 1x", "ViL-Small RetinaNet 1x", "performer"])
def test_detectors_of_both_libraries_cost_the_same(row):
    fields = ROWS[row]
    ours, theirs = (
        count_arch(
            fields["arch"], fields["attention"], METHODS[fields["method"]], "actual", library
        )
        for library in ("torchvision", "detectron2")
    )
    assert theirs.uncounted == {}
    assert list(theirs.by_part) == list(ours.by_part)
    for part, count in ours.by_part.items():
        assert theirs.by_part[part] == pytest.approx(count, rel=5e-3), part
    assert theirs.total == pytest.approx(ours.total, rel=5e-3)


def test_rows_of_one_backbone_differ_by_their_stages_alone():
    heads = ("fpn", "rpn", "box_head", "mask_head")
    some = (ROWS[row] for row in ("ViL", "performer"))
    one, other = (
        count_arch(row["arch"].replace("a0", "a1"), row["attention"], "mask_rcnn", "actual").by_part
        for row in some
    )
    assert [one[head] for head in heads] == [other[head] for head in heads]
    assert one["stage1"] != other["stage1"]


def sdpa_inputs(device, query, key=None, value=None, *, transposed=False):
    shapes = query, key or query, value or key or query
    if not transposed:
        return [torch.zeros(shape, device=device) for shape in shapes]
    return [
        torch.zeros(b, length, h, m, device=device).transpose(1, 2) for b, h, length, m in shapes
    ]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("inputs", "options", "products"),
    [
        ({"query": SHAPE}, {}, 6 * 10 * 10 * 16),
        ({"query": SHAPE, "transposed": True}, {}, 6 * 10 * 10 * 16),
        ({"query": SHAPE, "key": (2, 3, 7, 8)}, {}, 6 * 10 * 7 * 16),
        ({"query": SHAPE, "key": (2, 3, 7, 8), "value": (2, 3, 7, 4)}, {}, 6 * 10 * 7 * 12),
        ({"query": SHAPE}, {"is_causal": True}, 6 * 10 * 10 * 16),
        ({"query": SHAPE}, {"dropout_p": 0.1}, 6 * 10 * 10 * 16),
        ({"query": SHAPE}, {"attn_mask": (2, 3, 10, 10)}, 6 * 10 * 10 * 16),
        ({"query": SHAPE}, {"attn_mask": (10, 10)}, 6 * 10 * 10 * 16),
        ({"query": (2, 6, 10, 8), "key": SHAPE}, {"enable_gqa": True}, 12 * 10 * 10 * 16),
    ],
)
def test_attention_is_counted_once(device, inputs, options, products):
    if "attn_mask" in options:
        options = {"attn_mask": torch.zeros(options["attn_mask"], device=device)}
    tensors = sdpa_inputs(device, **inputs)
    counted = flops.count_operators(lambda: F.scaled_dot_product_attention(*tensors, **options))
    assert counted.total == products
    assert counted.uncounted == {}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_backward_of_attention(device):
    tensors = [t.requires_grad_() for t in sdpa_inputs(device, SHAPE)]
    counted = flops.count_operators(
        lambda: F.scaled_dot_product_attention(*tensors).sum().backward()
    )
    product = 6 * 10 * 10 * 8
    # The fused operator computes the scores a second time; two products keep theirs.
    assert counted.total == product * (2 + (5 if device == "cpu" else 4))
    assert counted.uncounted == {}


@pytest.mark.parametrize("operator", formulas.FORMULAS)
def test_formulas_are_of_operators_that_torch_lacks_or_miscounts(operator):
    from torch.utils.flop_counter import flop_registry

    grouped = "_scaled_dot_product" in str(operator) or "convolution_backward" in str(operator)
    assert operator not in flop_registry or grouped


@pytest.mark.parametrize(
    "operator", [name for name in formulas.FORMULAS if "_scaled_dot_product" in str(name)]
)
def test_fused_attention_by_the_shapes_of_its_arguments(operator):
    query, key, value = (2, 6, 10, 8), (2, 3, 7, 8), (2, 3, 7, 4)
    backward = "backward" in str(operator)
    shapes = [(2, 6, 10, 4)] * backward + [query, key, value]
    # Scores take 8 products a pair, values 4; backward, three and two times that.
    products = 3 * 8 + 2 * 4 if backward else 8 + 4
    assert formulas.FORMULAS[operator](*shapes) == 2 * (2 * 6 * 10 * 7 * products)


def test_inference_mode_hides_nothing():
    layer, x = nn.Linear(8, 8), torch.zeros(4, 8)

    def run():
        with torch.inference_mode():
            layer(x)

    counted = flops.count_operators(run)
    assert counted.total == 4 * 8 * 8
    assert counted.uncounted == {}


def test_sums_of_scaled_tokens_are_no_products():
    x, scale, gate = torch.rand(2, 5, 8), torch.rand(8), torch.rand(2, 1, 8)
    assert flops.count_operators(lambda: (x * scale * gate + x).mean(1)).total == 0
    # Variances, and norms of residuals, of biased and of centred tokens.
    for difference in (
        x - x.mean(-1, keepdim=True),
        x - x.flip(1),
        x - scale,
        x - x.mean(1)[:, None],
    ):
        counted = flops.count_operators(lambda it=difference: (it.pow(2).mean(-1), it.norm(dim=-1)))
        assert counted.total == 0
    activations = (F.hardswish, F.glu, nn.PReLU(), F.logsigmoid)
    # Networks of others use them, in place.
    activations += (nn.Hardswish(inplace=True), nn.LeakyReLU(inplace=True), nn.RReLU(inplace=True))
    activations += (nn.ReLU6(), nn.ELU(), nn.Softplus(), nn.Hardsigmoid(), nn.AdaptiveMaxPool1d(2))
    leaf = x.clone().requires_grad_()
    for run in activations:
        counted = flops.count_operators(lambda run=run: run(leaf * scale).sum().backward())
        assert counted.uncounted == {}


def test_operators_free_by_nature_are_not_listed():
    x = torch.zeros(2, 8, 8, 8, device="meta")

    def run():
        y = F.layer_norm(F.gelu(x).softmax(-1), (8,)).transpose(1, 2).contiguous()
        y = F.interpolate(F.max_pool2d(F.pad(y, (1, 1)), 2), scale_factor=2.0)
        return torch.cat([y.roll(1), y[:, torch.arange(4)]], dim=1).mean().exp()

    counted = flops.count_operators(run)
    assert counted.total == 0
    assert counted.uncounted == {}


def test_free_operators_exist():
    names = [name for names in formulas.FREE.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(torch.ops.aten, name)] == []


def test_an_unknown_operator_is_listed_with_its_calls():
    @torch.library.custom_op("test_flops::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    @opaque.register_fake
    def _(x):
        return torch.empty_like(x)

    x = torch.zeros(4, 4, device="meta")
    counted = flops.count_operators(lambda: (opaque(opaque(x)), torch.linalg.qr(x)))
    assert counted.uncounted["test_flops.opaque"] == 2
    assert any("linalg_qr" in name for name in counted.uncounted)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_is_left_as_it_was(device):
    with torch.device(device):
        vil = ViL(TINY, image_size=64)
    # The trap: modules and parameters that have two names.
    attention = vil.get_submodule("layer1.1.attn")
    assert attention.kv is attention.kv_global
    vil.layer1.eval()
    modes = [module.training for module in vil.modules()]
    before = {name: (id(p), p.device.type) for name, p in vil.named_parameters()}
    report = flops.count_flops(vil, image_size=(64, 64))
    assert report.total > 0
    assert [module.training for module in vil.modules()] == modes
    assert {name: (id(p), p.device.type) for name, p in vil.named_parameters()} == before


def test_shared_weights_are_no_obstacle():
    shared = attentions.build(
        "linformer", dim=8, num_heads=2, num_global=1, seq_len=17, num_features=4, share_kv=True
    )
    weight = shared.proj_k
    assert flops.count_flops(shared, grid=(4, 4)).total == shared.multiply_adds((4, 4))
    assert shared.proj_k is shared.proj_v is weight


def test_half_precision_counts_the_same():
    with torch.device("meta"):
        detector = detectors.build(ViL(TINY, image_size=64))
    wide = flops.count_flops(detector, image_size=(64, 64))
    assert flops.count_flops(detector.to(torch.bfloat16), image_size=(64, 64)) == wide


def test_parts_of_a_backbone():
    report = flops.count_flops(ViL(TINY, image_size=64), image_size=(60, 64))
    assert list(report.by_part) == ["stage1", "stage2", "stage3", "stage4"]
    assert sum(report.by_part.values()) == sum(report.by_operator.values()) == report.total
    # Stage 4: patch embedding, one block of full attention on 2x2, its MLP.
    cells, dim = 4, 24
    attention = 2 * cells**2 * dim + 4 * cells * dim**2
    assert report.by_part["stage4"] == cells * 4 * dim * dim + attention + 8 * cells * dim**2


@pytest.mark.parametrize("convention", flops.CONVENTIONS)
@pytest.mark.parametrize("method", detectors.METHODS)
def test_parts_of_a_detector(method, convention):
    with torch.device("meta"):
        detector = detectors.build(ViL(TINY, image_size=64), method=method, fpn_channels=16)
    report = flops.count_flops(
        detector, image_size=(64, 64), proposals=50, detections=9, convention=convention
    )
    heads = {"mask_rcnn": ["rpn", "box_head", "mask_head"], "retinanet": ["retinanet_head"]}
    stages = ["stage1", "stage2", "stage3", "stage4", "fpn"]
    assert list(report.by_part) == stages + heads[method]
    assert all(report.by_part.values())
    assert report.total == sum(report.by_operator.values())
    assert report.unit == "multiply-adds"


def test_heads_grow_with_what_they_get():
    with torch.device("meta"):
        detector = detectors.build(ViL(TINY, image_size=64))
    one = flops.count_flops(detector, image_size=(64, 64), proposals=10, detections=10)
    two = flops.count_flops(detector, image_size=(64, 64), proposals=20, detections=30)
    assert two.by_part["box_head"] == 2 * one.by_part["box_head"]
    assert two.by_part["mask_head"] == 3 * one.by_part["mask_head"]
    assert two.by_part["rpn"] == one.by_part["rpn"]


def test_the_grid_of_a_mechanism_is_that_of_stage_1():
    module = attentions.build("full", dim=8, num_heads=2)
    report = flops.count_flops(module, image_size=(32, 48))
    assert report.by_part == {"attention": module.multiply_adds((8, 12))}


class Attention(nn.Module):
    """Softmax attention of one head; subclasses write the same mathematics otherwise."""

    def __init__(self, *, dim=8, num_heads=1, num_global=1):
        super().__init__()
        self.dim, self.num_heads, self.num_global = dim, num_heads, num_global
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("ones", torch.ones(dim))
        self.masks = {}

    def forward(self, x, grid):
        return self.proj(self.product(*self.qkv(x).chunk(3, -1)))

    def product(self, q, k, v):
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def plain(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def written_out(q, k, v):
    scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1).softmax(-1)
    return (scores.unsqueeze(-1) * v.unsqueeze(1)).sum(2)


def written_out_with_scales_and_views(q, k, v):
    scores = torch.mean(q.unsqueeze(2) * 0.3 * k.unsqueeze(1) / 2, -1).softmax(-1)
    weights = scores[..., None].expand(-1, -1, -1, v.shape[-1])
    return (v[:, None] * weights).flatten(0, 1).sum(1)[None]


def one_operand_broadcast(q, k, v):
    """As local attention on unfolded keys and values is written."""
    keys, values = (x.unsqueeze(1).repeat(1, x.shape[1], 1, 1) for x in (k, v))
    weights = (q.unsqueeze(2) * keys).sum(-1).softmax(-1)
    return weights.unsqueeze(-1).mul(values).sum(2)


def masked_and_added(q, k, v):
    mask = torch.ones(q.shape[1], k.shape[1], 1, device=q.device)
    weights = (q.unsqueeze(2) * k.unsqueeze(1) * mask).sum(-1).softmax(-1)
    start = torch.zeros(*weights.shape, v.shape[-1], device=q.device)
    return torch.addcmul(start, weights.unsqueeze(-1), v.unsqueeze(1)).sum(2)


def parts_summed_apart(q, k, v):
    products = q.unsqueeze(2) * k.unsqueeze(1)
    return (products.relu().sum(-1) - (-products).relu().sum(-1)).softmax(-1) @ v


def added_up_in_a_loop(q, k, v):
    weights, out = (q @ k.mT).softmax(-1), torch.zeros_like(q)
    for key in range(k.shape[1]):
        out = out + weights[..., key, None] * v[:, key, None]
    return out


def added_up_in_place(q, k, v):
    weights, out = (q @ k.mT).softmax(-1), torch.zeros_like(q)
    for key in range(k.shape[1]):
        out.addcmul_(weights[..., key, None], v[:, key, None])
    return out


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return plain(q, k, v)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
            return torch.autograd.grad(plain(*inputs), inputs, gradient)


def read_a_value(q, k, v):
    return plain(q, k, v) if q.abs().max().item() < 1e9 else q


def refused_on_meta(q, k, v):
    """As FlexAttention does."""
    if q.is_meta:
        raise ValueError("only supported on CUDA and CPU")
    return plain(q, k, v)


def constant_of_the_cpu(q, k, v):
    return plain(q * torch.arange(q.shape[1])[:, None].cos(), k, v)


def chosen_by_a_mask(q, k, v):
    chosen = torch.arange(q.shape[1], device=q.device) >= 0
    return plain(q[:, chosen], k[:, chosen], v[:, chosen])


def sparse_weights(q, k, v):
    weights = (q @ k.mT).softmax(-1)[0].to_sparse()
    return torch.sparse.mm(weights, v[0])[None]


def sparse_rows(q, k, v):
    return ((q @ k.mT).softmax(-1)[0].to_sparse_csr() @ v[0])[None]


def sparse_keys(q, k, v):
    return (v[0].mT @ (q @ k.mT).softmax(-1).mT[0].to_sparse())[None].mT


def chosen(q, k, v):
    operands = q.contiguous(), k.contiguous(), v.contiguous()
    return torch.cond(q.sum() > 1e9, lambda q, k, v: q + k + v, plain, operands)


def sparse_by_indices(q, k, v):
    places = torch.ones(TOKENS, TOKENS, device=q.device).nonzero().T
    weights = torch.sparse_coo_tensor(places, (q @ k.mT).softmax(-1).flatten(), [TOKENS] * 2)
    return torch.sparse.mm(weights, v[0])[None]


def squared_distances(q, k, v):
    return (-(q.unsqueeze(2) - k.unsqueeze(1)).pow(2).sum(-1)).softmax(-1) @ v


def scaled_distances(q, k, v):
    apart = (q[:, :, None] - k.unsqueeze(1).repeat(1, q.shape[1], 1, 1)) / 2
    return (-(apart * apart).mean(-1)).softmax(-1) @ v


def norms_of_differences(q, k, v):
    return (-torch.norm(q.unsqueeze(2) - k.unsqueeze(1), dim=-1)).softmax(-1) @ v


def squared_by_a_loss(q, k, v):
    pairs = torch.broadcast_tensors(q.unsqueeze(2), k.unsqueeze(1))
    return (-F.mse_loss(*pairs, reduction="none").sum(-1)).softmax(-1) @ v


def multiplied_in_place(q, k, v):
    scores = q.unsqueeze(2).repeat(1, 1, k.shape[1], 1).mul_(k.unsqueeze(1)).sum(-1)
    return scores.softmax(-1) @ v


def rounded(x):
    """With the gradient of what is not rounded."""
    return x + (x.round() - x).detach()


SUMMARIES = {
    "norm": lambda products: products.norm(dim=-1),
    "logsumexp": lambda products: products.logsumexp(-1),
    "amax": lambda products: products.amax(-1),
    "max": lambda products: products.max(-1)[0],
    "deviation": lambda products: products.std(-1),
    "product": lambda products: products.prod(-1),
    "median": lambda products: products.median(-1)[0],
    "largest": lambda products: products.topk(4)[0].sum(-1),
    "last": lambda products: products.logcumsumexp(-1)[..., -1],
    "pool": lambda products: F.max_pool1d(products.flatten(0, 1), 8).unflatten(0, (1, -1))[..., 0],
}


# What moves or leaves out products before they are summed.
MOVES = {
    "flip": lambda products: products.flip(1).cumsum(-1).flip(1)[..., -1],
    "index": lambda products: products[..., torch.arange(8).flip(0)].sum(-1),
    "index_select": lambda products: products.index_select(3, torch.arange(8)).sum(-1),
    "gather": lambda products: products.gather(3, torch.arange(8).expand(products.shape)).sum(-1),
    "triu": lambda products: products.triu().sum(-1),
    "tile": lambda products: products.tile(1, 1, 1, 2).sum(-1),
    "rot90": lambda products: products.rot90(1, (1, 2)).sum(-1),
    "reflect": lambda products: F.pad(products[0], (1, 1), mode="reflect").sum(-1)[None],
    "shuffle": lambda products: F.channel_shuffle(products.permute(0, 3, 1, 2), 2).sum(1),
}


def of_products(summary, q, k, v):
    return summary(q.unsqueeze(2) * k.unsqueeze(1)).softmax(-1) @ v


# The same mathematics, or as many products, and whether it runs on the meta device.
WRITTEN = {
    "plain": (plain, True),
    "einsum": (
        lambda q, k, v: torch.einsum(
            "bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", q, k).softmax(-1), v
        ),
        True,
    ),
    "baddbmm in place": (
        lambda q, k, v: torch.zeros_like(q).baddbmm_(
            q.new_zeros(len(q), *[q.shape[1]] * 2).baddbmm_(q, k.mT).softmax(-1), v
        ),
        True,
    ),
    "baddbmm": (
        lambda q, k, v: torch.baddbmm(v, torch.baddbmm(q.new_zeros(1), q, k.mT).softmax(-1), v),
        True,
    ),
    "matmul on views": (
        lambda q, k, v: ((q[0][None, None] @ k.mT).softmax(-1) @ v.mT.contiguous().mT)[0],
        True,
    ),
    "vmap": (lambda q, k, v: torch.func.vmap(plain)(q, k, v), True),
    "fused": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), True),
    "compiled": (lambda q, k, v: torch.compile(plain)(q, k, v), True),
    "autograd.Function": (lambda q, k, v: Backward.apply(q, k, v), True),
    "checkpoint": (lambda q, k, v: checkpoint(plain, q, k, v, use_reentrant=False), True),
    "product and sum": (written_out, True),
    "product and sum, scaled": (written_out_with_scales_and_views, True),
    "product and sum, unfolded": (one_operand_broadcast, True),
    "product and sum, masked": (masked_and_added, True),
    "squared distances": (squared_distances, True),
    "scaled distances": (scaled_distances, True),
    "norms of differences": (norms_of_differences, True),
    "squared by a loss": (squared_by_a_loss, True),
    "positive and negative parts": (parts_summed_apart, True),
    "pairwise_distance": (
        lambda q, k, v: (
            -F.pairwise_distance(*torch.broadcast_tensors(q[:, :, None], k[:, None])).softmax(-1)
            @ v
        ),
        True,
    ),
    "cdist": (lambda q, k, v: (-torch.cdist(q, k)).softmax(-1) @ v, True),
    "cdist without a product": (
        lambda q, k, v: (
            -torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").softmax(-1) @ v
        ),
        True,
    ),
    "quotients": (lambda q, k, v: (q[:, :, None] / k[:, None]).sum(-1).softmax(-1) @ v, True),
    **{
        f"{name} of products": (functools.partial(of_products, summary), True)
        for name, summary in (SUMMARIES | MOVES).items()
    },
    "multiplied in place": (multiplied_in_place, True),
    "rounded products": (functools.partial(of_products, lambda p: rounded(p).sum(-1)), True),
    "rounded factors": (lambda q, k, v: plain(rounded(q / 8), rounded(k * 8), v), True),
    "added up in a loop": (added_up_in_a_loop, True),
    "added up in place": (added_up_in_place, True),
    "item": (read_a_value, False),
    "refused on meta": (refused_on_meta, False),
    "constant of the CPU": (constant_of_the_cpu, False),
    "boolean mask": (chosen_by_a_mask, False),
    "sparse COO": (sparse_weights, False),
    "sparse CSR": (sparse_rows, False),
    "sparse on the right": (sparse_keys, False),
    "sparse by indices": (sparse_by_indices, False),
    "cond": (chosen, False),
    "FlexAttention": (
        lambda q, k, v: flex_attention(q[:, None], k[:, None], v[:, None])[:, 0],
        False,
    ),
}
GRID, TOKENS = (5, 6), 31
POOL = ThreadPoolExecutor(1)
BY_HAND = TOKENS * 4 * 8 * 8 + 2 * TOKENS * TOKENS * 8


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("way", WRITTEN)
def test_the_same_mathematics_costs_the_same(way):
    product, on_meta = WRITTEN[way]
    module = Attention()
    module.product = product
    report = flops.count_flops(module, grid=GRID)
    assert report.total == BY_HAND
    assert report.uncounted == {}
    assert (report.notes == ()) == on_meta


@pytest.mark.parametrize("bend", [torch.relu, torch.abs, torch.square, lambda x: x**3, F.gelu])
def test_sums_of_bent_products_are_counted(bend):
    module = Attention()
    module.product = lambda q, k, v: bend(q[:, :, None] * k[:, None]).sum(-1).softmax(-1) @ v
    report = flops.count_flops(module, grid=GRID)
    assert (report.total, report.uncounted) == (BY_HAND, {})


class Keeping(Attention):
    """Makes a table in its first call, of each grid or of values."""

    def __init__(self, *, of_values):
        super().__init__()
        self.table, self.kept, self.of_values = nn.Linear(8, 8), None, of_values

    def product(self, q, k, v):
        if self.kept is None:
            if self.of_values:
                float(q.sum())
            self.kept = self.table(torch.ones_like(q))
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v + self.kept


@pytest.mark.parametrize("of_values", [False, True])
def test_what_is_made_in_the_first_call_alone_is_no_cost_of_an_image(of_values):
    module = Keeping(of_values=of_values)
    report = flops.count_flops(module, grid=GRID)
    assert (report.total, report.uncounted) == (BY_HAND, {})
    more = f"{TOKENS * 64:,} multiply-adds of first calls, which the next ones do not take"
    assert f"{more}, are not counted" in report.notes
    assert module.kept is None


PAIRS = TOKENS * TOKENS * 8


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("product", "unsummed"),
    [
        (lambda q, k, v: plain(q, k, v) * v * 0.5, TOKENS * 8),
        (lambda q, k, v: plain(q, k, v) / v.square(), 2 * TOKENS * 8),
        (
            lambda q, k, v: plain(torch.complex(q, k) * torch.complex(k, v), v, v).real,
            4 * TOKENS * 8,
        ),
        (lambda q, k, v: plain(q, k, v) + pooled_with_stride_1(q, k), PAIRS),
        (lambda q, k, v: plain(*(x.mul(1).mul_(x) for x in (q, k)), v), 2 * TOKENS * 8),
        (lambda q, k, v: plain(F.glu(torch.cat([q, k], -1)), k, v), TOKENS * 8),
        (lambda q, k, v: plain(q, k, v + crossed(q, v).sum(-1, keepdim=True)), 2 * TOKENS * 3),
        (written_out, 0),
        (masked_and_added, 0),
    ],
)
def test_products_in_no_sum_are_counted_apart(product, unsummed, training):
    module = Attention()
    module.product = product
    x = torch.zeros(1, TOKENS, 8, device="meta", requires_grad=training)
    counted = flops.count_call(module, (x, GRID), training=training)
    assert counted.unsummed == unsummed
    assert training or flops.count_flops(module, grid=GRID).unsummed == unsummed


def crossed(q, v):
    return torch.linalg.cross(q[..., :3], v[..., :3])


def pooled_with_stride_1(q, k):
    pairs = q.unsqueeze(2) * k.unsqueeze(1)
    return F.avg_pool1d(pairs.flatten(0, 1), 3, 1, 1).unflatten(0, pairs.shape[:2]).amax(2)


class Alternating(Attention):
    """Makes a table in every other call."""

    calls = 0

    def product(self, q, k, v):
        self.calls += 1
        return (q @ k.transpose(-2, -1)).softmax(-1) @ (v @ v.mT @ v if self.calls % 2 else v)


def test_calls_that_differ_are_no_cost_of_an_image():
    report = flops.count_flops(Alternating(), grid=GRID)
    assert report.total == BY_HAND
    assert report.uncounted == {flops.CALLS: 2 * TOKENS * TOKENS * 8}
    assert report.notes == ()
    inputs = (torch.zeros(1, TOKENS, 8, device="meta"), GRID)
    trained = flops.count_call(Alternating(), inputs, training=True)
    assert flops.CALLS in trained.uncounted
    assert trained.notes == ()


def absolute_distances(q, k, v):
    return (-(q.unsqueeze(2) - k.unsqueeze(1)).abs().sum(-1)).softmax(-1) @ v


def one_query_after_the_other(q, k, v):
    apart = [(q[:, i : i + 1] - k).abs().sum(-1, keepdim=True) for i in range(q.shape[1])]
    return torch.stack([((-one).softmax(1) * v).sum(1) for one in apart], dim=1)


def weights(q, around):
    scores = [(q * k).sum(-1) for k, _ in around]
    return torch.stack(scores, -1).softmax(-1)[..., None].unbind(-2)


def one_after_the_other(q, around):
    out = 0
    for weight, (_, v) in zip(weights(q, around), around, strict=True):
        out = out + weight * v
    return out


def in_parts_of_the_output(q, around):
    """As a loop over shifts is written that leaves out what lies beyond the border."""
    out = torch.zeros_like(q)
    for weight, (_, v) in zip(weights(q, around), around, strict=True):
        for part in (slice(0, 7), slice(7, None)):
            out[:, part] += weight[:, part] * v[:, part]
    return out


def fused(q, around):
    out = torch.zeros_like(q)
    for weight, (_, v) in zip(weights(q, around), around, strict=True):
        out = torch.addcmul(out, weight, v)
    return out


def put_together(q, around):
    parts = [w * v for w, (_, v) in zip(weights(q, around), around, strict=True)]
    return torch.stack(parts).sum(0)


def put_in_a_buffer(q, around):
    buffer = q.new_empty(len(around), *q.shape)
    for place, (weight, (_, v)) in enumerate(zip(weights(q, around), around, strict=True)):
        buffer[place] = weight * v
    return buffer.sum(0)


def put_by_indices(q, around):
    buffer = q.new_zeros(len(around), *q.shape)
    for place, (weight, (_, v)) in enumerate(zip(weights(q, around), around, strict=True)):
        buffer[torch.tensor([place], device=q.device)] = (weight * v)[None]
    return buffer.sum(0)


def put_one_after_the_other(q, around):
    parts = [w * v for w, (_, v) in zip(weights(q, around), around, strict=True)]
    return torch.cat([part[None] for part in parts]).sum(0)


def pooled(q, around):
    parts = [w * v for w, (_, v) in zip(weights(q, around), around, strict=True)]
    return F.avg_pool1d(torch.stack(parts, -1).flatten(1, 2), len(around)).view(q.shape)


def copied(q, around):
    parts = torch.cat([v for _, v in around]) * torch.cat(list(weights(q, around)))
    return parts.view(len(around), *q.shape).mT.reshape(len(around), -1).sum(0).view(q.mT.shape).mT


def scattered(add):
    """As along the edges of a graph: each token gets what its neighbours send."""

    def product(q, around):
        sent = torch.cat([w * v for w, (_, v) in zip(weights(q, around), around, strict=True)], 1)
        places = torch.arange(q.shape[1], device=q.device).repeat(len(around))
        return add(torch.zeros_like(q), places, sent)

    return product


def scattered_in_turns(q, around):
    out, places = torch.zeros_like(q), torch.arange(q.shape[1], device=q.device)
    for weight, (_, v) in zip(weights(q, around), around, strict=True):
        out.index_add_(1, places, weight * v)
    return out


def with_neighbours_put_into_zeros(q, around):
    def copied(tensor):
        buffer = torch.zeros_like(tensor)
        buffer[:, 1:] = tensor[:, 1:]
        return buffer

    return one_after_the_other(q, [(copied(k), copied(v)) for k, v in around])


SCATTERED = {
    "index_add": lambda out, places, sent: out.index_add(1, places, sent),
    "scatter_add": lambda out, places, sent: out.scatter_add_(
        1, places[None, :, None].expand_as(sent), sent
    ),
    "scatter_reduce": lambda out, places, sent: out.scatter_reduce(
        1, places[None, :, None].expand_as(sent), sent, "sum"
    ),
    "index_put": lambda out, places, sent: out[0].index_put_((places,), sent[0], accumulate=True)[
        None
    ],
}


def by_pairs(q, around):
    parts = [w * v for w, (_, v) in zip(weights(q, around), around, strict=True)]
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def without_a_softmax_of_all(q, around):
    terms = [((q * k).sum(-1, keepdim=True).exp(), v) for k, v in around]
    return sum(e * v for e, v in terms) / sum(e for e, _ in terms)


def online(add):
    """What is added up is rescaled whenever there is a greater score."""

    def product(q, around):
        out, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
        greatest = torch.full_like(total, -torch.inf)
        for k, v in around:
            score = (q * k).sum(-1, keepdim=True)
            greater = torch.maximum(greatest, score)
            scale, weight = (greatest - greater).exp(), (score - greater).exp()
            total, greatest = total * scale + weight, greater
            out = add(out, scale, weight, v, total)
        return out / total

    return product


ONLINE = {
    "online": lambda out, scale, weight, v, _: out * scale + weight * v,
    "in place": lambda out, scale, weight, v, _: out.mul_(scale).add_(weight * v),
    "fused": lambda out, scale, weight, v, _: torch.addcmul(weight * v, out, scale),
    "borders": lambda out, scale, weight, v, _: (out * scale).where(scale > 0, out) + weight * v,
    "mean": lambda out, _scale, weight, v, total: out + weight / total * (v - out),
    "lerp": lambda out, _scale, weight, v, total: out.lerp(v, weight / total),
}
# Ways to repeat one factor for all channels before the product.
REPEATED = {
    "repeat_interleave": lambda scale, v: scale.repeat_interleave(v.shape[-1], -1),
    "clone": lambda scale, v: scale.expand_as(v).clone(),
    "turned": lambda scale, v: scale.mT.repeat_interleave(v.shape[-1], 1).mT,
    "repeat": lambda scale, v: scale.repeat(1, 1, v.shape[-1]),
    "ones": lambda scale, v: scale * torch.ones_like(v),
    "cat": lambda scale, v: torch.cat([scale] * v.shape[-1], -1),
    "index": lambda scale, v: scale[..., torch.arange(v.shape[-1], device=v.device) // 8],
}
ONLINE |= {
    name: lambda out, scale, weight, v, _, repeat=repeat: (
        out * repeat(scale.log(), v).exp() + weight * v
    )
    for name, repeat in REPEATED.items()
}


@pytest.mark.parametrize("neighbours", [3, 9, 25])
@pytest.mark.parametrize(
    "product",
    [
        one_after_the_other,
        in_parts_of_the_output,
        fused,
        put_together,
        put_in_a_buffer,
        by_pairs,
        without_a_softmax_of_all,
        put_by_indices,
        put_one_after_the_other,
        pooled,
        copied,
        with_neighbours_put_into_zeros,
        scattered_in_turns,
        *(pytest.param(scattered(add), id=name) for name, add in SCATTERED.items()),
        *(pytest.param(online(add), id=name) for name, add in ONLINE.items()),
    ],
)
def test_a_loop_over_neighbours_is_counted(product, neighbours):
    module = Attention()
    module.product = lambda q, k, v: product(
        q, [(k.roll(i, 1), v.roll(i, 1)) for i in range(neighbours)]
    )
    counted = flops.count_flops(module, grid=GRID)
    assert counted.total == TOKENS * 4 * 8 * 8 + 2 * TOKENS * neighbours * 8
    assert counted.uncounted == {}


def running_mean(q, around):
    """Its gradients are no sums of products that could be followed."""
    mean, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    for k, v in around:
        weight = (q * k).sum(-1, keepdim=True).exp()
        total = total + weight
        mean = mean + (weight / total) * (v - mean)
    return mean


@pytest.mark.parametrize("product", [one_after_the_other, online(ONLINE["online"]), running_mean])
def test_gradients_of_products_are_counted_or_marked(product):
    module = Attention()
    module.product = lambda q, k, v: product(q, [(k.roll(i, 1), v.roll(i, 1)) for i in range(9)])
    x = torch.zeros(1, TOKENS, 8, device="meta", requires_grad=True)
    counted = flops.count_call(module, (x, GRID), training=True)
    written_out = 2 * TOKENS * 9 * 8
    expected = 3 * (TOKENS * 4 * 8 * 8 + written_out)
    missing = counted.uncounted.get(flops.GRADIENTS, 0)
    assert counted.total + missing >= expected
    assert (missing > 0) == (product is running_mean)


def gated(x, y, scale):
    for _ in range(4):
        x = x + scale * F.layer_norm(x, x.shape[-1:])
        x = x + y * F.silu(x)
    return x.mean(1)


def recurrence(x, y, scale):
    h, found = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = y[:, t] * h + x[:, t] * scale
        found.append(h)
    return torch.stack(found, 1)


def rescaled_residual(x, y, scale):
    for gate in (scale, y[..., :1], scale, scale):
        x = x * gate + scale * F.layer_norm(x, x.shape[-1:])
    return x.mean(1)


def moved_to_each_token(x, y, _):
    h, found = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = h.lerp(x[:, t], y[:, t])
        found.append(h)
    return torch.stack(found, 1)


@pytest.mark.parametrize(
    "run",
    [
        gated,
        recurrence,
        rescaled_residual,
        moved_to_each_token,
        # Positions turned, GELU, tokens mixed as RWKV does, and the mean of shifted copies.
        lambda x, y, _: x * y + torch.cat([-x[..., 4:], x[..., :4]], -1) * y.sin(),
        lambda x, *_: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * x * x * x))),
        lambda x, y, scale: [x * share + y * (1 - share) for share in (scale, y, scale.exp())],
        lambda x, *_: sum(x.roll(i, 1) for i in range(9)) / 9,
    ],
)
def test_elementwise_work_is_neither_counted_nor_marked(run):
    x, y, scale = torch.zeros(2, 31, 8), torch.zeros(2, 31, 8), torch.zeros(8)
    counted = flops.count_operators(lambda: run(x, y, scale))
    assert (counted.total, counted.uncounted) == (0, {})


def in_a_new_thread(q, k, v):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(plain, q, k, v).result()


def written_by_a_thread(q, k, v):
    out = torch.zeros_like(q)
    POOL.submit(lambda: out[:, 1:].copy_(plain(q, k, v)[:, 1:])).result()
    return out


def with_modes_disabled(q, k, v):
    with _disable_current_modes():
        return plain(q, k, v)


@pytest.mark.parametrize("back", [torch.from_numpy, torch.tensor, torch.as_tensor])
def test_a_count_says_that_numpy_does_the_work(back):
    module = Attention()
    module.product = lambda q, k, v: back(q.numpy() @ k.numpy().swapaxes(1, 2)) @ v
    counted = flops.count_flops(module, grid=GRID)
    assert set(counted.uncounted) == {flops.UNSEEN}

    def into(q, k, v):
        out = torch.zeros_like(q)
        np.matmul(q.numpy() @ k.numpy().swapaxes(1, 2), v.numpy(), out=out.numpy())
        return out + back(np.zeros((TOKENS, 8), np.float32))

    module.product = into
    assert set(flops.count_flops(module, grid=GRID).uncounted) == {flops.UNSEEN}
    # A table that NumPy makes is none of the mechanism's work.
    table = np.ones((TOKENS, 8), np.float32)
    module.product = lambda q, k, v: plain(q + q.sum().item() + back(table), k, v)
    assert flops.count_flops(module, grid=GRID).uncounted == {}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "product",
    [
        in_a_new_thread,
        lambda q, k, v: POOL.submit(plain, q, k, v).result(),
        written_by_a_thread,
        with_modes_disabled,
    ],
)
def test_a_count_says_what_it_does_not_see(product, training):
    POOL.submit(int).result()
    module = Attention()
    module.product = product
    x = torch.zeros(1, TOKENS, 8, device="meta")
    counted = flops.count_call(module, (x, GRID), training=training)
    assert counted.uncounted[flops.UNSEEN] > 0
    assert (flops.THREADS in counted.uncounted) == (product is in_a_new_thread)
    assert threading.getprofile() is None


@pytest.mark.parametrize(
    "product", [lambda q, k, v: POOL.submit(plain, q, k, v).result(), with_modes_disabled]
)
def test_nor_does_it_see_everything_on_the_cpu(product):
    module, kept = Attention(), torch.randn(TOKENS, 8)
    module.product = lambda q, k, v: product(q, k, v) + kept * v.max().item()
    counted = flops.count_flops(module, grid=GRID)
    assert counted.uncounted == {flops.UNSEEN: 1}


@pytest.mark.parametrize(
    "summed",
    [
        lambda products: products.sum(-1).real,
        lambda products: products.real.sum(-1),
        lambda products: torch.view_as_real(products).sum((-1, -2)),
        lambda products: products.real.sum(-1) + products.imag.sum(-1),
    ],
)
def test_complex_products_are_four_whichever_part_is_summed(summed):
    def product(q, k, v):
        left, right = (torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) for x in (q, k))
        return summed(left.unsqueeze(2) * right.conj().unsqueeze(1)).softmax(-1) @ v

    module = Attention()
    module.product = product
    counted = flops.count_flops(module, grid=GRID)
    assert counted.total == TOKENS * 4 * 8 * 8 + TOKENS**2 * (4 * 4 + 8)


def test_a_module_elsewhere_that_is_not_initialised_is_no_matter_of_a_count_on_the_cpu():
    waiting, module = nn.LazyLinear(8), Attention()
    module.product = lambda q, k, v: plain(q, k, v) + v.max().item()
    assert flops.count_flops(module, grid=GRID).uncounted == {}
    assert is_lazy(waiting.weight)


def test_what_is_kept_or_made_of_values_is_seen():
    kept = {}

    def product(q, k, v):
        if "mask" not in kept:
            kept["mask"] = torch.zeros(TOKENS, device=q.device)
        constants = torch.tensor([1.0], device=q.device) + q.new_tensor(2)
        v.data.add_(kept["mask"][:, None]).mul_(constants)
        return plain(q, k, v)

    module = Attention()
    module.product = product
    x = torch.zeros(1, TOKENS, 8, device="meta")
    for training in (False, True, True):
        assert flops.count_call(module, (x, GRID), training=training).uncounted == {}


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor, torch.asarray])
@pytest.mark.parametrize("of", [lambda _: 1.0, lambda v: v.max().item()])
def test_values_of_python_are_seen(make, of):
    module, values = Attention(), [[1.0] * 8] * TOKENS
    module.product = lambda q, k, v: (
        plain(q, k, v) + make(values, device=q.device) * of(v) + q.new_tensor(values)
    )
    assert flops.count_flops(module, grid=GRID).uncounted == {}


@pytest.mark.parametrize("name", attentions.names())
def test_training_of_mechanisms_is_counted_in_full(name):
    module = attentions.build_for(name, grid=(10, 12), dim=32, num_heads=2, num_global=1)
    x = torch.zeros(1, 121, 32, device="meta", requires_grad=True)
    assert flops.count_call(module, (x, (10, 12)), training=True).uncounted == {}


@pytest.mark.parametrize("summed", [0, 1])
def test_products_of_two_operators_chosen_from_count_as_many_as_are_summed(summed):
    x, y, z, chosen = (torch.zeros(8, 16, device="meta") for _ in range(4))

    def run() -> object:
        parts = x * y, y * z
        return torch.where(chosen > 0, *parts).sum(dim=1), parts[summed].sum(dim=1)

    # Sets of objects are ordered by their addresses, which differ from call to call.
    assert {flops.count_operators(run).total for _ in range(8)} == {2 * 8 * 16}


def test_deterministic_algorithms_change_no_count():
    attention = attentions.build("agent", dim=12, num_heads=3, num_global=1)
    before = flops.count_flops(attention, grid=(8, 8))
    torch.use_deterministic_algorithms(True)
    try:
        assert flops.count_flops(attention, grid=(8, 8)) == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_parts_of_a_product_are_counted_once():
    x, y = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
    counted = flops.count_operators(lambda: [part.sum(-1) for part in (x * y).chunk(2, -1)])
    assert counted.total == 2 * 3 * 8


def test_nested_tensors_are_counted():
    layer = nn.Linear(8, 8)

    def run():
        parts = [torch.zeros(10, 8), torch.zeros(20, 8)]
        return layer(torch.nested.as_nested_tensor(parts, layout=torch.jagged)).unbind()

    counted = flops.count_operators(run)
    assert (counted.total, counted.uncounted) == (30 * 8 * 8, {})


def test_recurrent_layers_are_counted():
    x = torch.zeros(1, 5, 8, device="meta")
    counted = flops.count_call(nn.GRU(8, 8, batch_first=True), (x,))
    assert (counted.total, counted.uncounted) == (5 * 2 * 3 * 8 * 8, {})


@pytest.mark.parametrize(
    "product",
    [
        absolute_distances,
        lambda q, k, v: (-torch.cdist(q, k, p=1)).softmax(-1) @ v,
        one_query_after_the_other,
    ],
)
def test_work_of_elementwise_operators_makes_a_count_incomplete(product):
    class Mechanism(Attention):
        def product(self, q, k, v):
            return product(q, k, v)

    vil = ViL(TINY, attention="full", image_size=64)
    vil.layer1[1].attn = Mechanism(dim=12)
    elements = (1 + 16 * 16) ** 2 * 12
    for counted in (
        flops.count_flops(Mechanism(dim=12), grid=(16, 16)),
        flops.count_flops(vil, image_size=(64, 64)),
    ):
        assert list(counted.uncounted) == [flops.ELEMENTWISE]
        assert elements <= counted.uncounted[flops.ELEMENTWISE] < 3 * elements
    # Gradients that are counted do not hide it.
    x = torch.zeros(1, 1 + 16 * 16, 12, device="meta", requires_grad=True)
    trained = flops.count_call(Mechanism(dim=12), (x, (16, 16)), training=True)
    assert flops.ELEMENTWISE in trained.uncounted


def test_multihead_attention_and_compiled_modules_are_counted():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, TOKENS, 8, device="meta")
    assert flops.count_call(module, (x, x, x)).total == BY_HAND
    assert flops.count_call(torch.compile(nn.Linear(8, 8)), (x,)).total == TOKENS * 8 * 8


@pytest.mark.parametrize(
    "way",
    [
        "plain",
        "product and sum",
        "autograd.Function",
        "squared distances",
        "cdist without a product",
    ],
)
def test_backward_passes_are_counted(way):
    module = Attention()
    module.product, _ = WRITTEN[way]
    x = torch.zeros(1, TOKENS, 8, device="meta", requires_grad=True)
    counted = flops.count_call(module, (x, GRID), training=True)
    # The function computes its forward pass again.
    again = 2 * TOKENS * TOKENS * 8 if way == "autograd.Function" else 0
    assert counted.total == 3 * BY_HAND + again


def test_complex_products_are_four():
    def product(q, k, v):
        q, k, v = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k, v))
        return torch.view_as_real((q @ k.mT) @ v).flatten(-2)

    module = Attention()
    module.product = product
    expected = TOKENS * 4 * 8 * 8 + 2 * 4 * TOKENS * TOKENS * 4
    assert flops.count_flops(module, grid=GRID).total == expected


def test_products_that_something_else_takes_mark_the_count():
    module = Attention()
    module.product = lambda q, k, v: (
        F.layer_norm(q.unsqueeze(2) * k.unsqueeze(1), [8])[..., 0].softmax(-1) @ v
    )
    # As many for each token as there are tokens.
    counted = flops.count_flops(module, grid=(20, 20))
    assert counted.uncounted == {flops.ELEMENTWISE: 401 * 401 * 8}


class Keeps(Attention):
    """Keeps a mask by its grid, counts its calls, and keeps the weights of its last call."""

    calls = 0

    def forward(self, x, grid):
        self.calls += 1
        self.ones.add_(1)
        if grid not in self.masks:
            self.masks[grid] = torch.zeros(x.shape[1], device=x.device)
        self.last = super().forward(x + self.masks[grid][:, None], grid)
        return self.last


@pytest.mark.parametrize("product", [plain, read_a_value])
def test_counting_leaves_nothing_in_the_module(product):
    module = Keeps().train()
    module.product = product
    for grid in (GRID, (2, 3)):
        module(torch.randn(1, 1 + grid[0] * grid[1], 8), grid)
    before, masks = vars(module).copy(), dict(module.masks)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    for grid in (GRID, (4, 4)):
        flops.count_flops(module, grid=grid)
    assert vars(module) == before
    assert module.masks == masks
    assert module.calls == 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    # What ran before runs again.
    module(torch.randn(1, TOKENS, 8), GRID)


@pytest.mark.parametrize("product", [plain, read_a_value])
def test_what_cannot_be_copied_is_no_obstacle(product):
    module, expected = Attention(), flops.count_flops(Attention(), grid=GRID).total
    module.product, module.lock, module.parts = product, threading.Lock(), {"functions": [torch]}
    assert flops.count_flops(module, grid=GRID).total == expected


def in_a_list(module, x):
    return module.layers[0](x)


def in_a_dictionary(module, x):
    return x @ module.weights["first"].to(x.device)


def made_in_forward(module, x):
    module.late = getattr(module, "late", None) or nn.Linear(8, 8, device=x.device)
    return module.late(x)


def made_each_time(_, x):
    return nn.Linear(8, 8, device=x.device)(x * (1 if x.is_meta else x.sum().item()))


@pytest.mark.parametrize("layer", [in_a_list, in_a_dictionary, made_in_forward, made_each_time])
def test_weights_that_are_no_parameters_are_refused(layer):
    class Hides(Attention):
        def __init__(self):
            super().__init__()
            if layer is in_a_list:
                self.layers = [nn.Linear(8, 8)]
            if layer is in_a_dictionary:
                self.weights = {"first": torch.randn(8, 8, requires_grad=True)}

        def forward(self, x, grid):
            return super().forward(layer(self, x), grid)

    with pytest.raises(ValueError, match=r"weight of shape \(8, 8\) .* variable of forward"):
        flops.count_flops(Hides(), grid=GRID)


def test_a_variable_of_forward_is_no_weight():
    def adapted(q, k, v):
        with torch.enable_grad():
            state = torch.zeros(8, 8, device=q.device).requires_grad_()
            (step,) = torch.autograd.grad((k.detach() @ state).sum(), state)
        return q @ (state - step) + v

    module = Attention()
    module.product = adapted
    counted = flops.count_flops(module, grid=GRID)
    assert (counted.total, counted.uncounted) == (TOKENS * (4 + 3) * 8 * 8, {})


def test_what_runs_for_real_is_limited(monkeypatch):
    module = Attention()
    module.product = lambda q, k, v: read_a_value(q, k, v) + written_out(q, k, v).sum()
    monkeypatch.setattr(flops, "LARGEST_REAL_BYTES", TOKENS * TOKENS * 8 * 4 - 1)
    with pytest.raises(flops.NotCountedError, match="on the CPU takes more than"):
        flops.count_flops(module, grid=GRID)
    monkeypatch.undo()
    monkeypatch.setattr(flops, "LARGEST_REAL_COUNT", BY_HAND)
    with pytest.raises(flops.NotCountedError, match="multiply-adds"):
        flops.count_flops(module, grid=GRID)


def test_a_mechanism_in_a_detector_on_the_meta_device(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, *, dim, num_heads, num_global=1):\n"
        "        super().__init__()\n"
        "        self.dim, self.num_global, self.mix = dim, num_global, nn.Linear(dim, dim)\n"
        "    def forward(self, x, grid):\n"
        "        y = self.mix(x)\n"
        "        return y if y.sum().item() < 1e9 else 2 * y\n"
    )

    def build():
        return detectors.build(ViL(TINY, attention=f"{file}:Mine", image_size=64), fpn_channels=16)

    report = flops.count_flops(build(), image_size=(64, 64), proposals=5)
    assert report.uncounted == {}
    assert "Mine does not run on the meta device" in report.notes[0]
    # Stage 1: patch embedding, the mechanism on 16x16 and a global token, the MLP.
    assert report.by_part["stage1"] == 256 * 48 * 12 + 257 * 12 * 12 + 257 * 8 * 12 * 12
    with torch.device("meta"):
        on_meta = build()
    with pytest.raises(flops.NotCountedError) as caught:
        flops.count_flops(on_meta, image_size=(64, 64))
    assert caught.value.needs_values
    config = RunConfig(row="any", profile=ProfileConfig(image_size=[64, 64], proposals=5))
    section, notes = flops_section(build(), config)
    assert section["total"] == report.total
    assert notes == list(report.notes)


def test_nothing_published_for_a_mechanism():
    module = attentions.build("linformer", dim=8, num_heads=2, seq_len=17)
    with pytest.raises(InputError, match=r"LinformerAttention .* 'published'"):
        flops.count_flops(module, grid=(4, 4), convention="published")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "publishd"}, "did you mean 'published'"),
        ({"image_size": (0, 64)}, r"image_size \(0, 64\) must be positive"),
        ({"proposals": 0}, "proposals 0 must be positive"),
        ({"grid": (4, -1)}, r"grid \(4, -1\) must be positive"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        flops.count_flops(attentions.build("full", dim=8, num_heads=2), **options)


def test_a_module_that_is_none_of_the_three():
    with pytest.raises(InputError, match="cannot count Linear"):
        flops.count_flops(nn.Linear(8, 8))
