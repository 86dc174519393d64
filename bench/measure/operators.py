"""Multiply-adds of the operators that run.

One multiply-add is one unit: half of what `torch.utils.flop_counter.FlopCounterMode` calls a FLOP.
Modules run on the meta device with meta copies of their parameters and buffers, so nothing is
allocated or computed, whatever the size of the image.

Counted are matrix products, convolutions and fused attention (queries times keys and weights times
values, densely: a causal or additive mask saves nothing; FlexAttention by the blocks that its
block mask keeps). Not counted are operators without products of matrices, such as views,
elementwise operators, biases, reductions, normalisation, softmax, pooling, interpolation, indexing,
copies, sorting, random numbers and creation (`formulas.FREE`). A product written out as an
elementwise one followed by a sum is not seen. Every other operator that ran without a formula is
listed in `uncounted`.

On the meta device `scaled_dot_product_attention` splits into two `bmm`. A fused operator that a
module calls itself, or that runs on a real device, is counted by `formulas.FORMULAS`, which
adds what torch lacks.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import flex
from bench.measure.formulas import FORMULAS, is_free

_META = torch.device("meta")


@dataclass(frozen=True)
class OperatorCount:
    """Multiply-adds of the operators that ran.

    Attributes:
        by_operator: multiply-adds by operator.
        by_module: the same within each module that ran, by its name in the outermost one
            (`Class.path.to.module`, as `torch.utils.module_tracker` names it).
        uncounted: calls of operators that have no formula and are not free by nature.
    """

    by_operator: Mapping[str, int]
    by_module: Mapping[str, Mapping[str, int]]
    uncounted: Mapping[str, int]

    @property
    def total(self) -> int:
        """Multiply-adds of all operators."""
        return sum(self.by_operator.values())


def count_call(module: nn.Module, inputs: tuple[object, ...]) -> OperatorCount:
    """Count `module(*inputs)` in evaluation, on meta copies of its parameters and buffers.

    Args:
        module: on any device; neither moved nor changed.
        inputs: with their tensors on the meta device.
    """
    # Each place of a tensor once: `functional_call` would restore a shared module's twice, wrongly.
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        parameters = part.named_parameters(recurse=False, remove_duplicate=False)
        buffers = part.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in chain(parameters, buffers):
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(_META)
            state[f"{path}.{name}" if path else name] = copies[id(tensor)]
    with evaluating(module), torch.no_grad():
        return count_operators(
            lambda: torch.func.functional_call(module, state, inputs, tie_weights=False)
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of `module` into evaluation, and back into its own mode at the end."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def count_operators(run: Callable[[], object]) -> OperatorCount:
    """Count whatever `run()` does, on whatever device, as it runs (backward passes too).

    Compiled functions run uncompiled, `nn.MultiheadAttention` without its fast path, whose one
    operator hides the rest, and FlexAttention is counted (forward only) instead of run: it gives
    zeros.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    watch = _Watch(counter)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_accept_meta_device())
            stack.enter_context(counter)
            stack.enter_context(watch)
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    by_module = {
        name: {str(operator): flops // 2 for operator, flops in operators.items()}
        for name, operators in counter.get_flop_counts().items()
    }
    return OperatorCount(
        by_operator=by_module.pop("Global", {}),
        by_module=by_module,
        uncounted=dict(watch.uncounted),
    )


@contextmanager
def _accept_meta_device() -> Iterator[None]:
    """Let `flex_attention` and `torch.autocast` take the meta device, which they refuse untried."""
    autocast = torch.autocast.__init__

    def autocast_of_cpu(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    with (
        flex.accept_masks_with_values(),
        patch.object(torch.autocast, "__init__", autocast_of_cpu),
    ):
        yield


class _Watch(TorchDispatchMode):
    """Sees every operator first: notes what has no formula, and counts FlexAttention."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is flex.OPERATOR:
            for name in self.counter.mod_tracker.parents:
                self.counter.flop_counts[name][flex.OPERATOR] += 2 * flex.multiply_adds(
                    *args, **kwargs
                )
            if not flex.knows_blocks(*args, **kwargs):
                self.uncounted[flex.DENSE] += 1
            return flex.outputs(*args, **kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.uncounted[str(func)] += 1
            return func(*args, **kwargs)
        if func.overloadpacket not in self.counter.flop_registry and not is_free(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self.uncounted[str(func.overloadpacket)] += 1
        return func(*args, **kwargs)
