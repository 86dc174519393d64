"""Functions that keep their inputs alone, and make the rest again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]

_SCHEMA = "(Tensor q, Tensor? kv, Tensor? c, Tensor? d, Tensor? seed, int[] plan, float dropout)"


class Call(Protocol):
    """One call: made of four tensors, a seed, numbers and the probability of dropout.

    There is a gradient for each of the four that is given. Masks of dropout follow from the seed,
    so that both passes have the same.
    """

    def __init__(
        self,
        q: Tensor,
        keys_values: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        seed: Tensor | None,
        plan: Sequence[int],
        dropout: float,
    ) -> None: ...

    def forward(self) -> Tensor: ...

    def backward(self, grad: Tensor) -> Gradients: ...


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: type[Call], *inputs: Any) -> Tensor:
        *tensors, plan, dropout = inputs
        ctx.save_for_backward(*tensors)
        ctx.how = make, plan, dropout
        return make(*inputs).forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        make, plan, dropout = ctx.how
        return None, *make(*ctx.saved_tensors, plan, dropout).backward(grad), None, None, None


def recomputed(
    name: str, make: type[Call], result: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., Tensor]:
    """Return a differentiable function of a call's tensors, numbers and dropout.

    `result` makes a tensor like the function's result from the first tensor; by default, like it.
    Gradients of gradients are an error. Compiled, it is one operator, `attentions::name`: a graph
    of all its blocks would be thousands of nodes long.
    """
    operator = _operator(name, make, result or _like)

    def function(
        q: Tensor,
        keys_values: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        plan: Sequence[int],
        dropout: float,
    ) -> Tensor:
        # Drawn on the CPU, so that no device is waited for.
        seed = torch.randint(2**62, (), device="cpu") if dropout else None
        if torch.compiler.is_compiling():
            return operator(q, keys_values, c, d, seed, plan, dropout)
        inputs = (q, keys_values, c, d, seed, plan, dropout)
        if not torch.is_grad_enabled():
            # A traced graph then holds the operators, which counters of FLOPs look for.
            return make(*inputs).forward()
        result: Tensor = _Recomputed.apply(make, *inputs)
        return result

    return function


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _operator(
    name: str, make: type[Call], result: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    def forward(*inputs: Any) -> Tensor:
        return make(*inputs).forward()

    def backward(grad: Tensor, *inputs: Any) -> list[Tensor]:
        # An operator returns tensors alone.
        found = make(*inputs).backward(grad)
        return [grad.new_empty(0) if one is None else one for one in found]

    def gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = backward_operator(grad, *ctx.saved_tensors, *ctx.how)
        pairs = zip(ctx.saved_tensors[:4], found, strict=True)
        return *(None if one is None else each for one, each in pairs), None, None, None

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs[:5])
        ctx.how = inputs[5:]

    operator = torch.library.custom_op(
        f"attentions::{name}", forward, mutates_args=(), schema=f"{_SCHEMA} -> Tensor"
    )
    backward_operator = torch.library.custom_op(
        f"attentions::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad, {_SCHEMA[1:]} -> Tensor[]",
    )
    operator.register_fake(lambda q, *_: result(q))
    backward_operator.register_fake(
        lambda grad, *inputs: [
            grad.new_empty(0 if one is None else one.shape) for one in inputs[:4]
        ]
    )
    operator.register_autograd(gradient, setup_context=set_up)
    return operator
