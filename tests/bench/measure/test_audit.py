import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn

import attentions
from bench import cli
from bench.measure import audit, flops
from tests import mechanisms

FUSED = ("full", "global", "linformer", "longformer", "srformer", "swin")
EXAMPLES = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in attentions.names()
    for options in getattr(attentions.find(name), "examples", ({},))
]


def audit_one(name, options, grid, **sizes):
    sizes = {"dim": 24, "num_heads": 3, "num_global": 2} | sizes
    return audit.audit(attentions.build_for(name, grid=grid, **sizes, **options), grid)


@pytest.mark.parametrize(("name", "options"), EXAMPLES)
def test_three_counts_of_every_mechanism_agree(name, options):
    counts = audit_one(name, options, (10, 13))
    assert counts.declared is not None
    assert counts.fvcore is not None
    # Of one state, ss2d writes out what it sums over its orders.
    unseen = {"fvcore": {"products written out": 1}} if options == {"state": 1} else {}
    assert counts.uncounted == unseen
    assert unseen or counts.disagreement <= audit.TOLERANCE
    assert counts.declared == counts.operators
    assert counts.unit == "multiply-adds"


@pytest.mark.parametrize("name", FUSED)
def test_counters_as_they_come_miss_fused_attention(name):
    options = attentions.find(name).examples[0]
    counts = audit_one(name, options, (10, 13))
    # Both count the linear layers and leave out all of scores and weighted values.
    assert counts.missed(counts.torch_on_cpu) > 0.005
    assert counts.missed(counts.fvcore_alone) > 0.005
    assert counts.torch_on_cpu < counts.operators


def test_full_attention_is_all_missed_but_its_projections():
    counts = audit_one("full", {}, (10, 13))
    assert counts.torch_on_cpu == counts.fvcore_alone == 4 * 132 * 24**2
    assert counts.operators == 4 * 132 * 24**2 + 2 * 132**2 * 24


class Wrong(nn.Module):
    """A mechanism whose closed form is two percent off."""

    num_global = 1

    def __init__(self, *, dim=24, num_heads=3, num_global=1):
        super().__init__()
        self.dim = dim
        self.mix = nn.Linear(dim, dim)

    def forward(self, x, grid):
        return self.mix(x)

    def multiply_adds(self, grid):
        return round(1.02 * (1 + grid[0] * grid[1]) * self.dim**2)


class Silent(Wrong):
    """A mechanism that declares nothing."""

    multiply_adds = None


class Opaque(Silent):
    """A mechanism with an operator that no counter knows."""

    def forward(self, x, grid):
        return self.mix(x) + torch.linalg.qr(x)[1].sum()


class Untraceable(Silent):
    """A mechanism that asks for a value, which a trace on tensors of zeros does not have."""

    def forward(self, x, grid):
        if torch.jit.is_tracing():
            raise RuntimeError("not for traces" + 1000 * " 5.0")
        return self.mix(x)


class Latents(Silent):
    """A mechanism that gives a parameter to one of its parts."""

    def __init__(self, **common):
        super().__init__(**common)
        self.latents = nn.Parameter(torch.ones(1, 4, self.dim))

    def forward(self, x, grid):
        return self.mix(x) + self.mix(self.latents.expand(x.shape[0], -1, -1)).mean()


def test_a_parameter_that_is_an_input_of_a_part_is_counted_by_torch_too():
    found = audit.audit(Latents(), (4, 6))
    assert found.failures == {}
    assert found.torch_on_cpu == found.operators


class Unused(Silent):
    """A mechanism that computes what it does not use, as one of two outputs."""

    def forward(self, x, grid):
        self.mix(x.flip(1))
        return self.mix(x)


def test_what_a_trace_leaves_out_is_no_disagreement():
    found = audit.audit(Unused(), (4, 6))
    assert found.agrees
    assert found.fvcore == found.operators // 2
    assert found.uncounted == {"fvcore": {"operators without a use": 1}}


def test_a_wrong_closed_form_is_found():
    counts = audit.audit(Wrong(), (4, 5))
    assert counts.disagreement == pytest.approx(0.02 / 1.02, rel=0.05)
    assert not counts.agrees


def test_a_mechanism_may_declare_nothing():
    counts = audit.audit(Silent(), (4, 5))
    assert counts.declared is None
    assert counts.agrees


def test_uncounted_operators_are_named_by_counter():
    counts = audit.audit(Opaque(), (4, 5))
    assert set(counts.uncounted) == {"operators", "fvcore"}
    assert counts.uncounted["fvcore"] == {"aten::linalg_qr": 1}
    assert not counts.agrees


class WrittenOut(Silent):
    """A product and a sum, which fvcore takes for nothing."""

    def forward(self, x, grid):
        return self.mix(x) + (x.unsqueeze(2) * x.unsqueeze(1)).sum((2, 3))[..., None]


class Raises(Silent):
    """A mechanism that does not run."""

    def forward(self, x, grid):
        raise RuntimeError("not today")


def test_what_fvcore_alone_misses_is_no_disagreement(capsys):
    counts = audit.audit(WrittenOut(), (4, 5))
    assert counts.operators == 21 * 24**2 + 21 * 21 * 24
    assert counts.fvcore == 21 * 24**2
    assert set(counts.uncounted) == {"fvcore"}
    assert counts.agrees
    # What is incomplete may count less, but not more.
    assert not dataclasses.replace(counts, fvcore=2 * counts.operators).agrees
    assert cli.main(["audit", "--attention", f"{__file__}:WrittenOut", "--grid", "4x5"]) == 0
    assert "uncounted, fvcore: " in capsys.readouterr().out


def test_a_mechanism_that_cannot_be_traced_is_incomplete():
    counts = audit.audit(Untraceable(), (4, 5))
    assert counts.fvcore is None
    assert "not for traces" in counts.failures["fvcore"]
    assert len(counts.failures["fvcore"]) < 400
    # One count alone agrees with nothing; a declared one would do.
    assert not counts.agrees
    assert dataclasses.replace(counts, declared=counts.operators).agrees


def test_large_grids_are_counted_without_being_run():
    counts = audit_one("longformer", {"window": 7}, (200, 336))
    assert counts.declared == counts.operators
    assert counts.fvcore is counts.torch_on_cpu is None
    assert counts.agrees
    assert "8192 tokens" in counts.failures["fvcore"]


def test_a_module_is_left_in_its_mode():
    module = attentions.build("full", dim=24, num_heads=3).train()
    audit.audit(module, (4, 5))
    assert module.training


class Products(nn.Module):
    """What `run` does to x."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


@pytest.mark.parametrize(
    ("run", "products"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3, :2]), 6 * 4 * 3 * 7),
        (lambda x: x @ x.transpose(-2, -1), 6 * 4 * 4 * 5),
        # The left operand is used for every matrix of the right one.
        (lambda x: x[0, 0] @ x.transpose(-2, -1), 6 * 4 * 4 * 5),
        (lambda x: x @ x[0, 0, 0], 6 * 4 * 5),
        (lambda x: torch.einsum("bhnm,bhkm->bhnk", x, x), 6 * 4 * 4 * 5),
        (lambda x: torch.einsum("...nm,km->...nk", x, x[0, 0]), 6 * 4 * 4 * 5),
        (lambda x: torch.baddbmm(x[0], x[0, :, :, :4], x[0]), 3 * 4 * 4 * 5),
        (lambda x: torch.addbmm(x[0, 0], x[0, :, :, :4], x[0]), 3 * 4 * 4 * 5),
        (lambda x: torch.mv(x[0, 0], x[0, 0, 0]), 4 * 5),
        (lambda x: torch.addmv(x[0, 0, :, 0], x[0, 0], x[0, 0, 0]), 4 * 5),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 1]), 5),
        (lambda x: F.conv2d(x, x.new_ones(7, 3, 2, 2)), 2 * 3 * 4 * 7 * 3 * 4),
        (lambda x: F.conv2d(x, x.new_ones(6, 1, 2, 2), groups=3), 2 * 3 * 4 * 6 * 4),
        (lambda x: F.linear(x, x.new_ones(7, 5), x.new_ones(7)), 6 * 4 * 5 * 7),
        (lambda x: x.cfloat() @ x.cfloat().mT, 4 * 6 * 4 * 4 * 5),
        (lambda x: torch.einsum("bhnm,bhkm->bhnk", x.cfloat(), x.cfloat()), 4 * 6 * 4 * 4 * 5),
        (lambda x: F.layer_norm(x, (5,)), 0),
        (lambda x: F.instance_norm(x), 0),
        (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), 0),
        (lambda x: F.max_pool2d(F.pad(x, (1, 1)), 2).softmax(-1).unflatten(1, (3, 1)), 0),
    ],
)
def test_handles_of_fvcore(run, products):
    inputs = (torch.ones(2, 3, 4, 5),)
    total, lacking = audit.count_graph(Products(run), inputs, audit.HANDLES)
    assert total == products
    assert lacking == {}
    assert flops.count_operators(lambda: run(inputs[0])).total == products


def test_free_composites_exist():
    names = audit.FREE_COMPOSITES.split()
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(torch.ops.aten, name)] == []


def test_handles_replace_what_fvcore_counts_by_itself():
    analysis = FlopCountAnalysis(nn.LayerNorm(5), (torch.ones(2, 5),))
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() > 0
    assert analysis.set_op_handle(**audit.HANDLES).total() == 0


def test_command_prints_and_passes(capsys):
    assert cli.main(["audit", "--attention", "swin,ViL", "--grid", "6x9"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for words in ("multiply-adds", "grid 6x9", "shift=2", "padding=cyclic", "agree"):
        assert words in out


def test_a_mechanism_need_not_say_its_size(tmp_path, capsys):
    name = mechanisms.write(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(
        (tmp_path / "mine.py")
        .read_text()
        .replace("self.dim, self.num_global = dim, num_global", "")
    )
    assert cli.main(["audit", "--attention", name, "--grid", "4x5"]) == 0
    assert "agree" in capsys.readouterr().out


def test_command_fails_where_one_fails_and_loses_no_other(capsys):
    names = ["full", *(f"{__file__}:{name}" for name in ("Wrong", "Opaque", "Raises"))]
    assert cli.main(["audit", "--attention", ",".join(names), "--grid", "4x5"]) == 1
    out = capsys.readouterr().out
    assert "3 of 5 do not agree" in out
    # The percent of the one that is wrong.
    assert " 2.0 " in out
    assert "uncounted, operators: " in out
    assert "Raises: not counted, Raises does not run on the meta device" in out
    assert "not today" in out


def test_json_has_plain_numbers(capsys):
    assert cli.main(["audit", "--attention", "full", "--grid", "4x5", "--format", "json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["options"] for line in lines] == list(attentions.find("full").examples)
    assert all(line["unit"] == "multiply-adds" for line in lines)
    assert lines[0]["declared"] == lines[0]["operators"] == lines[0]["fvcore"]
    assert lines[0]["torch_on_cpu_missed"] > 0.05


def test_a_mechanism_that_does_not_take_the_grid_says_so(capsys):
    assert cli.main(["audit", "--attention", "srformer", "--grid", "2x9"]) == 1
    out = capsys.readouterr().out
    assert "srformer reduction=3: not counted" in out
    assert "smaller than the reduction" in out


def test_a_mechanism_that_takes_no_grid_at_all_is_bad_input(refusal):
    command = ["audit", "--attention", f"{__file__}:OnlyLarge", "--grid", "4x5"]
    assert "needs a larger grid" in refusal(cli.main, *command)


class OnlyLarge(Silent):
    """A mechanism that takes no grid."""

    def forward(self, x, grid):
        raise ValueError(f"grid {grid} is too small: it needs a larger grid")
