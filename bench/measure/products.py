"""Products of two tensors that are written out element by element, followed until they are summed.

Attention is written so too: queries times keys, summed over channels, and weights times values,
summed over neighbours or added up in a loop over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bench.measure.formulas import is_complex, varying

aten = torch.ops.aten
# How products are made, kept, moved, added up and summed. What is multiplied in place has other
# uses, as weighed features have.
_FUSED = (aten.addcmul, aten.addcmul_)
_PRODUCTS = (aten.mul, *_FUSED)
_COPIES = (aten.clone, aten._to_copy, aten.copy_)
_MULTIPLES = (aten.mul, aten.div, *_COPIES)
_JOINED = (aten.cat, aten.stack)
_MOVED = (aten.roll, aten.constant_pad_nd, *_JOINED)
_ADDED = (aten.add, aten.add_, aten.sub, aten.sub_, *_FUSED)
_SUMS = (aten.sum, aten.mean, aten.nansum, aten.cumsum)
# Products an element that are added up and yet no sum over neighbours: one of a gate, two where
# positions are turned.
_FEW = 2


class Seen(NamedTuple):
    """What an operator did.

    Attributes:
        multiply_adds: of products that it sums.
        elements: of its results, if it is elementwise and part of no such product; below 0 where
            what was taken for that before turns out to be part of one.
        added: those of them that are sums with a product, which may be one over many neighbours.
    """

    multiply_adds: int = 0
    elements: int = 0
    added: int = 0


@dataclass(frozen=True)
class _Product:
    """Products that a tensor holds, each in an element, or added up there.

    Attributes:
        count: how many; of slices, their share.
        each: multiply-adds of one, more than 1 of complex numbers.
        axes: those, counted from the last (-1), along which no factor is broadcast: a sum over
            others is one of a single tensor. None where they are not known.
        is_sum: whether it is what a sum, element by element, has come to.
        counted: whether the products of that sum are counted, as are those that are still added.
        again: whether a factor is such a sum, as in a recurrence.
        elements: of the additions of that sum, as long as it is not counted.
    """

    count: float
    each: int
    axes: frozenset[int] | None
    is_sum: bool = False
    counted: bool = False
    again: bool = False
    elements: float = 0

    def summed(self) -> Seen:
        """What their sum is."""
        elements = -round(self.elements)
        return Seen(round(self.count) * self.each, elements, elements)

    def is_summed(self, dims: int, over: int | Sequence[int] | None = None) -> bool:
        """Whether a sum over some of `dims` axes, all without `over`, is a sum of products."""
        if self.axes is None:
            return True
        chosen = [over] if isinstance(over, int) else over or self.axes
        return any((axis if axis < 0 else axis - dims) in self.axes for axis in chosen)

    def seen_as(self, tensor: Tensor, other: Tensor, *, is_view: bool) -> "_Product":
        """What of it another tensor holds, which is a view or has the same last axes."""
        share = min(1.0, other.numel() / max(1, tensor.numel()))
        return replace(
            self,
            count=self.count * share,
            elements=self.elements * share,
            axes=_axes_of_view(self.axes, tensor, other) if is_view else self.axes,
        )


class Products:
    """Sees operators as they run, and remembers the products in each tensor."""

    def __init__(self) -> None:
        self._held: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> Seen:
        """Follow one operator.

        Args:
            func: an operator of aten, with the arguments that it had and its result.
        """
        operator = func.overloadpacket
        tensors, results = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in (args, result)
        )
        if operator in _SUMS:
            product = self._held.pop(args[0], None)
            if product is None or not product.is_summed(args[0].dim(), *args[1:2]):
                return Seen()
            few = product.axes is None and product.count <= _FEW * results[0].numel()
            return Seen() if few else product.summed()
        factors = tensors[-2:] if operator in _PRODUCTS and len(tensors) > 1 else []
        made = _made(*factors, again=any(map(self._is_sum, factors))) if factors else None
        goes_on = operator in (*_ADDED, *_MULTIPLES) or func.is_view
        # A sum that something else reads is complete, as before each layer of a residual.
        for tensor in factors if goes_on else tensors:
            for one in (tensor, tensor._base):
                if one is not None and self._is_sum(one):
                    del self._held[one]
        is_copy = operator in _COPIES or torch.Tag.pointwise not in func.tags
        elements = 0 if is_copy else sum(out.numel() for out in results)
        if operator in _ADDED:
            return self._add_up(operator, tensors, made, results[0], elements)
        if goes_on or operator in _MOVED:
            held = [self._carry(func, tensors, made, out) for out in results]
            if any(product and product.axes != frozenset() for product in held):
                elements = 0
        return Seen(elements=elements)

    def _is_sum(self, tensor: Tensor) -> bool:
        product = self._held.get(tensor)
        return product is not None and product.is_sum

    def _carry(
        self, func: Any, tensors: Sequence[Tensor], made: _Product | None, out: Tensor
    ) -> _Product | None:
        """Remember what `out` holds: a view, a multiple, or what was moved or put together."""
        operator = func.overloadpacket
        found = [
            self._held[tensor].seen_as(tensor, out, is_view=func.is_view)
            for tensor in tensors
            if tensor in self._held
        ]
        found += [made] if made else []
        if not found:
            return None
        product = _merged(found, count=sum if operator in _JOINED else max)
        if operator is aten.stack:
            product = replace(product, axes=None)
        self._held[out] = product
        whole = out._base
        if operator is aten.copy_ and whole is not None and tensors[-1]._base is not whole:
            # It was put in a part of another tensor.
            before = [self._held[whole]] if whole in self._held else []
            self._held[whole] = _merged([*before, replace(product, axes=None)], count=sum)
        return product

    def _add_up(
        self,
        operator: Any,
        tensors: Sequence[Tensor],
        made: _Product | None,
        out: Tensor,
        elements: int,
    ) -> Seen:
        """Count products that are added up one after the other, once there are many."""
        terms = tensors[:1] if operator in _FUSED else tensors
        where = out._base if terms[0] is out and out._base is not None else out
        parts = [
            self._held[term].seen_as(term, out, is_view=False)
            for term in terms
            if term in self._held and not (term is out and where is not out)
        ]
        parts += [made] if made else []
        parts = [part for part in parts if not part.again]
        if where is not out and where in self._held:
            parts.append(self._held[where])
        if not parts:
            return Seen(elements=elements)
        total = replace(_merged(parts, count=sum), is_sum=True)
        if operator not in _FUSED and len(parts) < len(terms):
            # Pooled, a residual with a gate is that of its parts.
            total = replace(total, axes=frozenset())
        if total.counted or total.count > _FEW * where.numel():
            self._held[where] = replace(total, count=0, counted=True, elements=0)
            return total.summed()
        self._held[where] = replace(total, elements=total.elements + elements)
        return Seen(0, elements, elements)


def _made(left: Tensor, right: Tensor, *, again: bool) -> _Product | None:
    """The products of two tensors; none where they are one, or one is a number."""
    if left is right or min(left.numel(), right.numel()) < 2:
        return None
    count = torch.broadcast_shapes(left.shape, right.shape).numel()
    each = 4 if is_complex((left, right)) else 1
    return _Product(count, each, varying(left) & varying(right), again=again)


def _axes_of_view(
    axes: frozenset[int] | None, tensor: Tensor, view: Tensor
) -> frozenset[int] | None:
    """Where axes of a tensor, counted from the last, are in a view; None where some were merged."""
    if axes is None or view.layout != torch.strided:
        return None
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    places = {stride: axis - tensor.dim() for axis, (side, stride) in enumerate(sides) if side > 1}
    sides = zip(view.shape, view.stride(), strict=True)
    found = {
        axis - view.dim(): places.get(stride)
        for axis, (side, stride) in enumerate(sides)
        if side > 1
    }
    if None in found.values():
        return None
    return frozenset(axis for axis, place in found.items() if place in axes)


def _merged(products: Sequence[_Product], *, count: Any) -> _Product:
    """Several as one, with the greatest of their counts or the sum."""
    axes = [product.axes for product in products]
    return _Product(
        count(product.count for product in products),
        max(product.each for product in products),
        None if None in axes else frozenset().union(*filter(None, axes)),
        is_sum=any(product.is_sum for product in products),
        counted=any(product.counted for product in products),
        again=any(product.again for product in products),
        elements=count(product.elements for product in products),
    )
