import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attentions
from bench.measure.backends import what_ran

Q = torch.randn(1, 2, 64, 16)


def sdpa(**options):
    return nn.functional.scaled_dot_product_attention(Q, Q, Q, **options)


def test_fused_attention_is_counted_by_back_end():
    ran = what_ran(lambda: (sdpa(), sdpa()))
    assert ran.sdpa == {"flash": 2}
    assert ran.dtypes == ("float32",)
    assert not ran.compiled
    assert ran.notes == ()


def test_a_silent_fallback_is_shown_with_what_sets_the_call_apart():
    bias = torch.zeros(1, 1, 64, 64, requires_grad=True)
    ran = what_ran(lambda: (sdpa(), sdpa(dropout_p=0.5), sdpa(attn_mask=bias)))
    assert ran.sdpa == {"flash": 1, "math": 2}
    (note,) = ran.notes
    assert "2 of 3 calls" in note
    assert "1 with dropout" in note
    assert "1 with a mask" in note


def test_a_back_end_that_was_ruled_out_does_not_run():
    def fn():
        with sdpa_kernel(SDPBackend.MATH):
            sdpa()

    assert what_ran(fn).sdpa == {"math": 1}
    assert "1 without mask or dropout" in what_ran(fn).notes[0]


def test_the_backward_pass_is_seen():
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    loss = (weight @ weight).sum()
    ran = what_ran(loss.backward)
    assert ran.dtypes == ("float64",)
    assert ran.sdpa == {}


def test_dtypes_are_those_of_the_products_under_autocast():
    linear = nn.Linear(16, 16)

    def fn():
        with torch.autocast("cpu"):
            linear(Q)

    assert what_ran(fn).dtypes == ("bfloat16",)


def test_nothing_ran():
    ran = what_ran(lambda: None)
    assert (ran.sdpa, ran.dtypes, ran.compiled) == ({}, (), False)


def test_a_compiled_module_is_told():
    linear = nn.Linear(16, 16)
    compiled = torch.compile(linear, backend="eager")
    compiled(Q)
    assert what_ran(lambda: compiled(Q)).compiled
    assert not what_ran(lambda: linear(Q)).compiled


def test_a_learned_bias_falls_back_in_training_only():
    attention = attentions.build("longformer", dim=16, num_heads=2, window=4, position="relative")
    x = torch.randn(1, 1 + 64, 16)
    assert "math" in what_ran(lambda: attention(x, (8, 8)).sum().backward()).sdpa
    attention.requires_grad_(False)
    assert "math" not in what_ran(lambda: attention(x, (8, 8))).sdpa


@pytest.mark.gpu
def test_tf32_is_told(monkeypatch):
    x = torch.randn(64, 64, device="cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert what_ran(lambda: x @ x, device="cuda").dtypes == ("float32 as tf32",)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert what_ran(lambda: x @ x, device="cuda").dtypes == ("float32",)
