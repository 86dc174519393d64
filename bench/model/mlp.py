"""The MLP of a block and the norm before it, whose training keeps less than their operators would.

Of layer norm, linear layer, GELU and linear layer, autograd keeps what goes into each: as many
numbers as ten copies of the input. Here the input and what goes into GELU are kept, five copies;
the rest is elementwise and is made again in the backward pass, to the same bits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as hooks

from attentions.parts import full_precision

MLP_RATIO = 4


class Mlp(nn.Module):
    """Linear to four times the channels, GELU, linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


def norm_and_mlp(norm: nn.LayerNorm, mlp: Mlp, x: Tensor) -> Tensor:
    """Return `mlp(norm(x))`: (B, N, dim) -> the same. Gradients of gradients are an error.

    The modules are called themselves where no gradient is wanted, where one of them has a hook, or
    where one was replaced by another kind (LoRA, quantization).
    """
    layers = (norm, mlp, mlp.fc1, mlp.fc2)
    out: Tensor
    if not torch.is_grad_enabled() or not all(map(_plain, layers)):
        out = mlp(norm(x))
        return out
    weights = (norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    out = _NormAndMlp.apply(x, *weights, norm.eps)
    return out


def _plain(layer: nn.Module) -> bool:
    """Whether a call of a layer is nothing but its forward pass."""
    own = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
        hooks._global_forward_hooks,
        hooks._global_forward_pre_hooks,
    )
    return type(layer) in (nn.LayerNorm, nn.Linear, Mlp) and not any(own)


class _NormAndMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        eps: float,
    ) -> Tensor:
        normal = nn.functional.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        hidden = nn.functional.linear(normal, weight1, bias1)
        ctx.save_for_backward(x, hidden, norm_weight, norm_bias, weight1, weight2)
        ctx.eps = eps
        return nn.functional.linear(nn.functional.gelu(hidden), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, norm_weight, norm_bias, weight1, weight2 = ctx.saved_tensors
        aten, wide = torch.ops.aten, norm_weight.dtype
        with full_precision(x):
            grad = grad.flatten(0, -2)
            grad_weight2 = grad.T @ nn.functional.gelu(hidden).flatten(0, -2)
            grad_active = (grad @ weight2.to(grad.dtype)).view(hidden.shape)
            grad_hidden = aten.gelu_backward(grad_active, hidden).flatten(0, -2)
            del grad_active
            shape, like = norm_weight.shape, x.to(wide)
            normal, mean, scale = torch.native_layer_norm(
                like, shape, norm_weight, norm_bias, ctx.eps
            )
            grad_weight1 = grad_hidden.T @ normal.to(hidden.dtype).flatten(0, -2)
            del normal
            grad_normal = (grad_hidden @ weight1.to(hidden.dtype)).view(x.shape).to(wide)
            grad_x, *grads_norm = aten.native_layer_norm_backward(
                grad_normal, like, shape, mean, scale, norm_weight, norm_bias, [True] * 3
            )
        first, second = (
            (of_weight.to(weight1.dtype), one.sum(dim=0).to(weight1.dtype))
            for of_weight, one in ((grad_weight1, grad_hidden), (grad_weight2, grad))
        )
        return grad_x.to(x.dtype), *grads_norm, *first, *second, None
