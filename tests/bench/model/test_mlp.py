"""The MLP of a block equals its modules called one after the other, and keeps half as much."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from bench.model.mlp import Mlp, norm_and_mlp

DIM = 24


@pytest.fixture
def layers() -> tuple[nn.LayerNorm, Mlp]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(DIM)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, Mlp(DIM)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_the_result_and_all_gradients_equal_the_modules_bit_by_bit(layers, low):
    norm, mlp = layers
    x = torch.randn(2, 35, DIM, requires_grad=True)
    found = []
    for call in (lambda: mlp(norm(x)), lambda: norm_and_mlp(norm, mlp, x)):
        leaves = [x, *norm.parameters(), *mlp.parameters()]
        with torch.autocast("cpu", low) if low else nullcontext():
            y = call()
        found.append([y, *torch.autograd.grad(y, leaves, y.detach())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_the_input_and_one_hidden_tensor_are_kept(layers):
    x, kept = torch.randn(2, 35, DIM, requires_grad=True), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.numel() * (tensor.dim() == 3)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm_and_mlp(*layers, x)
    assert sum(kept.values()) == 5 * x.numel()


def test_modules_with_hooks_and_other_modules_are_called(layers):
    norm, mlp = layers
    x, calls = torch.randn(1, 3, DIM), []
    handle = mlp.fc2.register_forward_hook(lambda *_: calls.append("hook"))
    norm_and_mlp(norm, mlp, x)
    handle.remove()

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("other")
            return super().forward(x)

    mlp.fc1 = Other(DIM, 4 * DIM)
    norm_and_mlp(norm, mlp, x)
    assert calls == ["hook", "other"]
