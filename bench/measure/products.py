"""Products of two tensors that are written out element by element, followed until they are summed.

Attention is written so too: queries times keys, summed over channels, and weights times values,
summed over neighbours or added up in a loop over them. So are squared distances of all pairs: a
difference times itself, summed over channels, is as many products as queries times keys.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bench.measure.formulas import is_complex, is_elementwise, varying

aten = torch.ops.aten
# How products are made, kept, moved, added up and summed. What is multiplied in place has other
# uses, as weighed features have, unless it holds copies for all pairs.
_MIXED = (aten.lerp, aten.lerp_)
_FUSED = (aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_, *_MIXED)
# A quotient is a product with a reciprocal.
_IN_PLACE = (aten.mul_, aten.div_)
_PRODUCTS = (aten.mul, aten.div, *_FUSED)
_COPIES = (aten.clone, aten._to_copy, aten.copy_)
_MULTIPLES = (aten.mul, aten.div, aten.neg, aten.where, aten.masked_fill, *_COPIES)
_PUT = (
    *(aten.stack, aten.index_put, aten.index_put_, aten.index_copy, aten.index_copy_),
    *(aten.scatter, aten.scatter_, aten.slice_scatter, aten.select_scatter),
)
_JOINED = (aten.cat, *_PUT)
# To which axes they move elements is not known.
_SHUFFLED = (
    *(aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle),
    *(aten.rot90, aten.im2col, aten.take, aten.masked_select),
)
_CHOSEN = (
    *(aten.flip, aten.triu, aten.triu_, aten.tril, aten.tril_, aten.repeat),
    *(aten.index, aten.index_select, aten.gather, aten._unsafe_index),
    *(aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
)
_MOVED = (aten.roll, aten.constant_pad_nd, *_JOINED, *_SHUFFLED, *_CHOSEN)
_ADDED = (aten.add, aten.add_, aten.sub, aten.sub_, *_FUSED)
_CONSTANTS = (
    *(aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero_, aten.full, aten.full_like),
    *(aten.ones, aten.ones_like, aten.new_ones, aten.new_full, aten.fill_),
)
_SCATTERED = (
    *(aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_),
    *(aten.index_reduce, aten.index_reduce_, aten.scatter_reduce, aten.scatter_reduce_),
)
# Axes that pooling adds up in, the last ones.
_POOLS = {aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten._adaptive_avg_pool2d: 2, aten.col2im: 2}
_POOLS |= {aten.avg_pool3d: 3, aten._adaptive_avg_pool3d: 3}
_POOLS |= {aten.max_pool2d_with_indices: 2, aten.max_pool3d_with_indices: 3}
_POOLS |= {aten.adaptive_max_pool2d: 2}
# Of squares, and how a tensor is squared besides by a product.
_NORMS, _POWERS = (aten.linalg_vector_norm, aten.norm), (aten.pow, aten.pow_)
_SUMS = (aten.sum, aten.mean, aten.nansum, aten.cumsum)
# What sums besides, or takes a few in place of a sum, and where its axis stands among its arguments
# if not second.
_SUMMARIES = (
    *(aten.logsumexp, aten.logcumsumexp, aten.prod, aten.cumprod, *_NORMS),
    *(aten.var, aten.std, aten.var_mean, aten.std_mean, aten.median, aten.nanmedian),
    *(aten.amax, aten.amin, aten.max, aten.min, aten.cummax, aten.cummin),
    *(aten.topk, aten.kthvalue, aten.sort),
)
_THIRD = (*_NORMS, aten.topk, aten.kthvalue)
# Products that an operator makes within itself, an element of its result.
_WITHIN = {aten.glu: 1, aten.linalg_cross: 2, aten.polar: 2, aten._prelu_kernel: 1}
_WITHIN |= {aten.xlogy: 1, aten.special_xlog1py: 1, aten.ldexp: 1}
_DIFFERENCES = (aten.sub, aten.mse_loss)
# Whose results hold the same element several times where they are larger than what they got.
_REPEATS = (aten.repeat, aten.cat, aten.stack, aten.index, aten.index_select, aten.gather)
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
        gradients: multiply-adds of the gradients of the factors of what it sums.
        squares: multiply-adds of differences squared and summed that are distances or norms, which
            nothing tells apart.
        products: multiply-adds that it makes element by element, summed later or not.
    """

    multiply_adds: int = 0
    elements: int = 0
    added: int = 0
    gradients: int = 0
    squares: int = 0
    products: int = 0


class _Chain:
    """A sum of products as it goes on from tensor to tensor.

    Attributes:
        complete: whether something else read it, as each layer of a residual does.
    """

    complete = False


class _Origin:
    """Products that one operator made.

    Attributes:
        number: of origins made before, by which sums take them in one order.
        total: how many.
        left: how many of them no sum has had yet.
        taken: how many of them sums have had, each with all that it could choose from.
    """

    _numbers = itertools.count()

    def __init__(self, total: float) -> None:
        self.number = next(self._numbers)
        self.total = self.left = total
        self.taken: list[tuple[frozenset[_Origin], float]] = []

    def take(self, count: float, chosen: "frozenset[_Origin]") -> float:
        """Take so many for a sum of `chosen`, or as many as are left."""
        found = min(count, self.left)
        self.left -= found
        self.taken += [(chosen, found)] * (found > 0)
        return found

    def give_back(self, count: float) -> None:
        """Let sums that had them have others, so that so many are left, or as many as can be."""
        for place, (chosen, had) in enumerate(self.taken):
            for other in _in_order(chosen - {self}):
                moved = other.take(min(had, count - self.left), chosen)
                self.left, had = self.left + moved, had - moved
            self.taken[place] = chosen, had


def _in_order(origins: Iterable[_Origin]) -> list[_Origin]:
    """The oldest first; a set has them in the order of their addresses."""
    return sorted(origins, key=attrgetter("number"))


@dataclass(frozen=True)
class _Product:
    """Products that a tensor holds, each in an element, or added up there.

    Attributes:
        count: how many; of slices, their share.
        each: multiply-adds of one, more than 1 of complex numbers.
        axes: those, counted from the last (-1), along which no factor is broadcast: a sum over
            others is one of a single tensor. None where they are not known.
        chain: the sum, element by element, that has come to it.
        counted: whether the products of that sum are counted, as are those that are still added.
        again: whether a factor is such a sum, as in a recurrence.
        rescaled: that sum, if the other factor is one number for several of its elements, as an
            online softmax rescales what it has added up.
        elements: of the additions of that sum, or of what is squared, as long as it is not counted.
        gradients: factors of each that have a gradient.
        sure: False for the square of a difference, unless it is of all pairs.
        origins: of all of them.
    """

    count: float
    each: int
    axes: frozenset[int] | None
    chain: _Chain | None = None
    counted: bool = False
    again: bool = False
    rescaled: "_Product | None" = None
    elements: float = 0
    gradients: int = 0
    sure: bool = True
    origins: frozenset[_Origin] = frozenset()

    def anew(self) -> "_Product":
        """As many, of an operator of their own."""
        return replace(self, origins=frozenset({_Origin(self.count)}))

    def summed(self) -> Seen:
        """What their sum is."""
        count = self.count
        # In a backward pass two gradients are sums of the same products.
        if self.each > 1 or torch._C._current_graph_task_id() == -1:
            count = 0
            for origin in _in_order(self.origins):
                count += origin.take(self.count - count, self.origins)
            for origin in _in_order(self.origins) if count < self.count else ():
                origin.give_back(self.count - count)
                count += origin.take(self.count - count, self.origins)
        elements, multiply_adds = -round(self.elements), round(count) * self.each
        added = elements if self.chain else 0
        if not self.sure:
            return Seen(squares=multiply_adds)
        return Seen(multiply_adds, elements, added, multiply_adds * self.gradients)

    def is_summed(self, dims: int, over: int | Sequence[int] | None = None) -> bool:
        """Whether a sum over some of `dims` axes, all without `over`, is a sum of products."""
        if self.axes is None:
            return True
        chosen = [over] if isinstance(over, int) else over or self.axes
        return any((axis if axis < 0 else axis - dims) in self.axes for axis in chosen)

    def seen_as(self, tensor: Tensor, other: Tensor, *, is_view: bool) -> "_Product":
        """What of it another tensor holds, which is a view or has the same last axes."""
        share = min(1.0, other.numel() / max(1, tensor.numel()))
        if tensor.is_complex() and not other.is_complex() and is_view:
            # Each part of a complex product takes all of it.
            share = 2.0
        return replace(
            self,
            count=self.count * share,
            elements=self.elements * share,
            axes=_axes_of_view(self.axes, tensor, other) if is_view else self.axes,
            rescaled=self.rescaled and self.rescaled.seen_as(tensor, other, is_view=is_view),
        )


class Products:
    """Sees operators as they run, and remembers the products in each tensor."""

    def __init__(self) -> None:
        self._held: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._chains: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._constants: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._repeated: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # Differences of two tensors, with what their squares are.
        self._squares: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> Seen:
        """Follow one operator.

        Args:
            func: an operator of aten, with the arguments that it had and its result.
        """
        every = [leaf for leaf in tree_leaves([args, result]) if isinstance(leaf, Tensor)]
        if any(tensor.is_nested for tensor in every):
            # It has neither shape nor strides.
            return Seen()
        seen, operator = self._see(func, args, result), func.overloadpacket
        return seen._replace(products=seen.products + self._multiplied(operator, args, result))

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> Seen:
        operator = func.overloadpacket
        tensors, results = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in (args, result)
        )
        if operator is aten._cdist_forward and args[2] != 2:
            # Differences of all pairs and their powers, as written out.
            return Seen(elements=2 * args[0].numel() * args[1].shape[-2])
        in_place = operator in _IN_PLACE and len(tensors) == 2 and self._are_pairs(*tensors)
        for one in results if tensors else ():
            self._note_repeats(func, tensors, one)
            self._note_differences(func, tensors, one)
        if operator in _NORMS and args[1:2] in ((), (2,)) and args[0] in self._squares:
            product = self._squares[args[0]].anew()
            seen = product.summed() if product.is_summed(args[0].dim(), *args[2:3]) else Seen()
            return seen._replace(products=seen.multiply_adds)
        is_summary = operator in _SUMMARIES and len(tensors) == 1
        if operator in _SUMS or operator in _POOLS or is_summary:
            product = self._held.pop(args[0], None)
            over = args[2:3] if operator in _THIRD else args[1:2]
            over = (range(-_POOLS[operator], 0),) if operator in _POOLS else over
            if product is None or not product.is_summed(args[0].dim(), *over):
                return Seen()
            could_be_few = product.axes is None or operator in _POOLS
            few = could_be_few and product.count <= _FEW * results[0].numel()
            return Seen() if few else product.summed()
        for one in results if operator in _CONSTANTS or func._schema.is_mutable else ():
            self._constants[one] = operator in _CONSTANTS
            if one._base is not None:
                self._constants[one._base] = False
        factors = _factors(operator, tensors) if operator in _PRODUCTS or in_place else []
        if _is_square(operator, args):
            factors = [results[0] if operator is aten.mse_loss else args[0]] * 2
        made = self._made(*factors) if factors else None
        puts = operator in (aten.index_put, aten.index_put_)
        is_added = operator in (*_ADDED, *_SCATTERED) or (puts and args[3:4] == (True,))
        is_square = len(factors) == 2 and factors[0] is factors[1] and made is not None
        goes_on = is_added or operator in _MULTIPLES or _is_view(func) or is_square or in_place
        if operator is aten.mul_ and self._rescales(tensors[-1], tensors[0]):
            goes_on, factors = True, []
        # A sum that something else reads is complete, as before each layer of a residual.
        for tensor in factors if goes_on else tensors:
            for one in (tensor, *([] if tensor._base is None else [tensor._base])):
                if self._chain(one):
                    del self._held[one]
                if one in self._chains and not goes_on:
                    self._chains[one].complete = True
        is_copy = operator in _COPIES or not is_elementwise(func)
        elements = 0 if is_copy else sum(out.numel() for out in results)
        if is_added:
            return self._add_up(operator, tensors, made, results[0], elements)
        # As in sums of rectified products.
        is_bent = not goes_on and len(tensors) == 1 and is_elementwise(func)
        if goes_on or operator in _MOVED or is_bent:
            held = [self._carry(func, tensors, made, out, elements) for out in results]
            if made is None or made.again:
                moved = any(one and one.axes != frozenset() for one in held)
                elements *= is_bent or not moved
        return Seen(elements=elements)

    def _hold(self, tensor: Tensor, product: _Product) -> None:
        self._held[tensor] = product
        if product.chain:
            self._chains[tensor] = product.chain

    def _chain(self, tensor: Tensor) -> _Chain | None:
        product = self._held.get(tensor)
        return product and product.chain

    def _note_repeats(self, func: Any, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Remember the axes along which a copy or what is made of it is not broadcast."""
        operator, axes = func.overloadpacket, None
        if _is_view(func):
            axes = _axes_of_view(self._varying(tensors[0]), tensors[0], out)
        elif operator in _COPIES or is_elementwise(func):
            axes = frozenset().union(*map(self._varying, tensors))
        elif operator in _REPEATS:
            parts = {id(one): one for one in tensors if one.dtype == out.dtype}.values()
            if out.numel() > sum(part.numel() for part in parts):
                sides = zip(out.shape[::-1], tensors[0].shape[::-1], strict=False)
                axes = frozenset(~i for i, (side, other) in enumerate(sides) if side == other)
        self._repeated.pop(out, None)
        if axes is not None and (axes := axes & varying(out)) != varying(out):
            self._repeated[out] = axes

    def _varying(self, tensor: Tensor) -> frozenset[int]:
        """Axes along which it is not broadcast, nor a copy of what is; none of a constant."""
        if self._constants.get(tensor):
            return frozenset()
        return self._repeated.get(tensor, varying(tensor))

    def _note_differences(self, func: Any, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Remember what the squares of differences are, and of multiples of these."""
        operator = func.overloadpacket
        known = next((tensor for tensor in tensors if tensor in self._squares), None)
        if operator in _DIFFERENCES and len(tensors) == 2:
            left, right = map(self._varying, tensors)
            made = self._product(tensors[0], tensors[1], left & right)
            pairs = self._are_pairs(*tensors)
            elements = made.count if pairs and operator is aten.sub else 0
            self._squares[out] = replace(made, elements=elements, sure=pairs)
        elif known is not None and (
            _is_view(func) or operator in _MULTIPLES or (operator in _ADDED and len(tensors) == 1)
        ):
            squares = self._squares[known]
            self._squares[out] = squares.seen_as(known, out, is_view=_is_view(func))

    def _are_pairs(self, left: Tensor, right: Tensor) -> bool:
        """Whether each is alike along an axis along which the other is not."""
        ours, theirs = self._varying(left), self._varying(right)
        return bool(ours - theirs and theirs - ours)

    def _rescales(self, factor: Tensor, total: Tensor) -> bool:
        """Whether `total` is a sum that is multiplied by one number for several elements."""
        return bool(self._chain(total)) and self._varying(factor) < varying(total)

    def _made(self, left: Tensor, right: Tensor) -> _Product | None:
        """The products of two tensors; none of constants, nor of one that is no difference."""
        if left is right:
            squares = self._squares.get(left)
            return squares and squares.anew()
        if self._is_multiple(left, right):
            return None
        made = self._product(left, right, varying(left) & varying(right))
        for one, other in ((left, right), (right, left)):
            if self._chain(one) and not self._varying(one) < varying(other):
                rescaled = self._held[one] if self._rescales(other, one) else None
                made = replace(made, again=True, rescaled=rescaled)
        return made

    def _multiplied(self, operator: Any, args: tuple[Any, ...], result: Any) -> int:
        """Multiply-adds of an elementwise product of two tensors, or of a square; 0 of the rest."""
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if operator in _WITHIN:
            return result.numel() * _WITHIN[operator]
        factors, is_product = _factors(operator, tensors), _is_square(operator, args)
        if factors:
            is_product = not self._is_multiple(*factors)
        if not is_product or not (result.is_floating_point() or result.is_complex()):
            return 0
        return result.numel() * (4 if is_complex(factors or args[:1]) else 1)

    def _is_multiple(self, left: Tensor, right: Tensor) -> bool:
        """Whether their product is that of one with a number or a constant."""
        constant = self._constants.get(left) or self._constants.get(right)
        return bool(constant) or min(left.numel(), right.numel()) < 2

    def _product(self, left: Tensor, right: Tensor, axes: frozenset[int]) -> _Product:
        """As many products as two tensors make together."""
        count = torch.broadcast_shapes(left.shape, right.shape).numel()
        each = 4 if is_complex((left, right)) else 1
        with_gradient = left.requires_grad + right.requires_grad if torch.is_grad_enabled() else 0
        return _Product(count, each, axes, gradients=with_gradient).anew()

    def _carry(
        self,
        func: Any,
        tensors: Sequence[Tensor],
        made: _Product | None,
        out: Tensor,
        elements: int,
    ) -> _Product | None:
        """Remember what `out` holds: a view, a multiple, or what was moved or put together.

        New products are elements of an elementwise operator until they are found to be summed.
        """
        operator = func.overloadpacket
        found = [
            self._held[tensor].seen_as(tensor, out, is_view=_is_view(func))
            for tensor in tensors
            if tensor in self._held
        ]
        found += [made] if made else []
        if not found:
            return None
        product = _merged(found, count=sum if operator in _JOINED else max)
        is_shuffled = operator in (*_PUT, *_SHUFFLED)
        is_shuffled |= operator in _CHOSEN and out.dim() != tensors[0].dim()
        if is_shuffled or (operator is aten.cat and _is_stack(tensors, out)):
            product = replace(product, axes=None)
        if made and not made.again:
            product = replace(product, chain=None, elements=product.elements + elements)
        self._hold(out, product)
        whole = out._base
        is_put = operator in (aten.copy_, *_IN_PLACE)
        if is_put and whole is not None and tensors[-1]._base is not whole:
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
        terms = tensors[:1] if operator in _FUSED and len(tensors) > 2 else tensors
        where = out._base if terms[0] is out and out._base is not None else out
        weighed = operator in _MIXED and len(tensors) > 2
        if weighed and self._chain(terms[0]) and not self._rescales(tensors[2], terms[0]):
            terms = terms[:0]
        parts = [
            # Where they are scattered, one element may get several.
            self._held[term].seen_as(term, out, is_view=False)
            if operator in _ADDED
            else self._held[term]
            for term in terms
            if term in self._held and not (term is out and where is not out)
        ]
        parts += [made] if made else []
        parts = _continued(parts, out)
        if where is not out and where in self._held:
            parts.append(self._held[where])
        if not parts:
            return Seen(elements=elements)
        total = replace(_merged(parts, count=sum), chain=_Chain())
        if operator not in _FUSED and len(parts) < len(terms):
            # Pooled, a residual with a gate is that of its parts.
            total = replace(total, axes=frozenset())
        if total.counted or total.count > _FEW * where.numel():
            begun = replace(total, count=0, counted=True, elements=0, origins=frozenset())
            self._hold(where, begun)
            return total.summed()
        # Of a sum that is not counted, as of a recurrence, additions are elements, and no products.
        products = sum(part.elements for part in parts if part.chain is None)
        self._hold(where, replace(total, elements=total.elements + elements - products))
        return Seen(0, elements - round(products), elements)


def _factors(operator: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The two tensors that an operator multiplies element by element; none of another."""
    enough = 3 if operator in _FUSED else 2
    multiplies = operator in (*_PRODUCTS, *_IN_PLACE) and len(tensors) >= enough
    return tensors[-2:] if multiplies else []


def _is_square(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether it squares its argument, or a difference of two, element by element."""
    is_power = operator in _POWERS and isinstance(args[1], int | float) and args[1] == 2
    return is_power or operator is aten.mse_loss


def _is_view(func: Any) -> bool:
    """Whether the result has the elements of the first argument, as a reshaped copy has too."""
    return func.is_view or func.overloadpacket is aten._unsafe_view


def _is_stack(parts: Sequence[Tensor], out: Tensor) -> bool:
    """Whether tensors are put together along an axis in which each has one place."""
    sides = zip(*(part.shape for part in parts), out.shape, strict=True)
    return any(len(parts) == whole and {*each} == {1} for *each, whole in sides)


def _continued(parts: Sequence[_Product], out: Tensor) -> list[_Product]:
    """What of the terms of an addition a sum goes on with.

    That is a sum as it was rescaled, or the product by which it is moved to the next term, as in
    `mean + weight * (term - mean)`. A recurrence begins anew with each addition.
    """
    moved = any(part.chain and not part.again for part in parts)
    found = []
    for part in parts:
        if not part.again:
            found.append(part)
        elif part.rescaled and part.rescaled.chain and not part.rescaled.chain.complete:
            once = _Product(out.numel(), part.each, part.axes, gradients=part.gradients)
            found.append(once.anew() if moved else part.rescaled)
    return found


def _axes_of_view(
    axes: frozenset[int] | None, tensor: Tensor, view: Tensor
) -> frozenset[int] | None:
    """Where axes of a tensor, counted from the last, are in a view; None where some were merged."""
    if axes is None or {tensor.layout, view.layout} != {torch.strided}:
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
    origins = frozenset().union(*(product.origins for product in products))
    number = count(product.count for product in products)
    if count is sum:
        # One that comes several times is once.
        number = min(number, sum(one.total for one in origins))
    return _Product(
        number,
        max(product.each for product in products),
        None if None in axes else frozenset().union(*filter(None, axes)),
        chain=next((product.chain for product in products if product.chain), None),
        counted=any(product.counted for product in products),
        again=any(product.again for product in products),
        rescaled=next((product.rescaled for product in products if product.rescaled), None),
        elements=count(product.elements for product in products),
        gradients=min(product.gradients for product in products),
        sure=all(product.sure for product in products),
        origins=origins,
    )
