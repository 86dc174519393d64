"""Softmax attention of the chunks of a grid to chunks around them, strip by strip.

A strip is a column of chunks. Its keys and values are gathered, its scores made, used and dropped;
the backward pass makes them again. So a training step keeps queries, keys and values alone, as
fused attention does (Dao et al., https://arxiv.org/abs/2205.14135), and scores stay in the cache.
The bias is one for all chunks: it is added to each strip, and its gradient summed strip by strip.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attentions.cache import has_data
from attentions.contract import Grid
from attentions.parts import (
    LARGEST_BATCH,
    add_product_,
    at_once,
    dropout_factors,
    full_precision,
    softmax_,
    softmax_gradient_,
    spans,
)
from attentions.recompute import Gradients, recomputed

# Bytes of the scores that are made at once: on a CPU what its caches hold, elsewhere enough to keep
# the device busy.
LARGEST_SCORES = {"cpu": 2**21, "other": 2**26}


class Square(NamedTuple):
    """Chunks seen together: `side` x `side` of them, the first `row`, `column` from one's own."""

    row: int
    column: int
    side: int


OWN = Square(0, 0, 1)


class Plan(NamedTuple):
    """What a chunk sees.

    Attributes:
        grid: rows and columns.
        window: side of a chunk.
        heads: attention heads.
        cyclic: neighbours wrap around the padded grid.
        seen: squares of chunks, none further from the own chunk than the next.
    """

    grid: Grid
    window: int
    heads: int
    cyclic: bool
    seen: tuple[Square, ...]

    @property
    def chunks(self) -> Grid:
        """Rows and columns of chunks."""
        return -(-self.grid[0] // self.window), -(-self.grid[1] // self.window)

    def flat(self) -> list[int]:
        """As numbers, for an operator."""
        squares = [number for square in self.seen for number in square]
        return [*self.grid, self.window, self.heads, int(self.cyclic), *squares]

    @classmethod
    def of(cls, flat: Sequence[int]) -> "Plan":
        """The inverse of `flat`."""
        rows, columns, window, heads, cyclic, *rest = flat
        squares = tuple(Square(*rest[i : i + 3]) for i in range(0, len(rest), 3))
        return cls((rows, columns), window, heads, bool(cyclic), squares)


def attend_locally(
    q: Tensor,
    keys_values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from every grid token to the global tokens and its neighbourhood, under one softmax.

    Gradients of gradients are an error.

    Shapes: q (B, cells, C), keys_values (B, g + cells, 2 C), bias (H or 1, w², g + keys) with keys
    in the order of `plan.seen`, row by row in each square -> as q.
    """
    return _attend(q, keys_values, bias, None, plan.flat(), dropout)


class _Block(NamedTuple):
    """Images and columns of chunks cut out at once, and heads whose scores are made at once."""

    images: slice
    strip: slice
    groups: tuple[slice, ...]


class _Call:
    """One call. Below, a block is `b` images, a strip of `R x c` chunks and `h` heads."""

    def __init__(
        self,
        q: Tensor,
        keys_values: Tensor,
        bias: Tensor | None,
        other: None,
        seed: Tensor | None,
        numbers: Sequence[int],
        dropout: float,
    ) -> None:
        del other
        plan = Plan.of(numbers)
        self.q, self.keys_values, self.bias = q, keys_values, bias
        self.plan, self.dropout = plan, dropout
        self.seed = int(seed) if seed is not None and has_data(q) else 0
        self.cells = plan.grid[0] * plan.grid[1]
        self.num_global = keys_values.shape[1] - self.cells
        self.width = q.shape[2] // plan.heads
        self.scale = self.width**-0.5
        # Where the keys of each square stand, behind the global tokens.
        self.places: list[slice] = []
        self.keys = self.num_global
        for square in plan.seen:
            many = (square.side * plan.window) ** 2
            self.places.append(slice(self.keys, self.keys + many))
            # Not in place: in a trace, sizes are tensors.
            self.keys = self.keys + many

    def forward(self) -> Tensor:
        out = self.q.new_empty(self.q.shape)
        with full_precision(self.q):
            for block in self._blocks():
                queries, around = self._cut(self.q, block).mul_(self.scale), self._around(block)
                attended = torch.empty_like(queries)
                for heads in block.groups:
                    q, (k, v) = self._chunks(queries, heads), self._keys(around, block, heads)
                    p, factors = self._weights(q, k, block, heads)
                    p = p if factors is None else p.mul_(factors)
                    self._put(attended, torch.bmm(p, v), heads)
                for place, cells in self._pieces(out, block):
                    cells.copy_(attended[place])
        return out

    def backward(self, grad: Tensor) -> Gradients:
        dq, dkv = self.q.new_empty(self.q.shape), torch.zeros_like(self.keys_values)
        # Sums over all chunks.
        wide = torch.promote_types(grad.dtype, torch.float32)
        dglobal = torch.zeros_like(self._split(dkv[:, : self.num_global]), dtype=wide)
        dbias = None if self.bias is None else torch.zeros_like(self.bias, dtype=wide)
        with full_precision(self.q):
            for block in self._blocks():
                queries, around = self._cut(self.q, block).mul_(self.scale), self._around(block)
                grads, dqueries = self._cut(grad, block), torch.empty_like(queries)
                daround = [torch.zeros_like(cut) for cut in around]
                targets = dglobal[:, block.images], daround
                for heads in block.groups:
                    q, do = self._chunks(queries, heads), self._chunks(grads, heads)
                    k, v = self._keys(around, block, heads)
                    p, factors = self._weights(q, k, block, heads)
                    ds = torch.bmm(do, v.transpose(1, 2))
                    ds = softmax_gradient_(ds if factors is None else ds.mul_(factors), p)
                    p = p if factors is None else p.mul_(factors)
                    del v, factors
                    self._add_keys(targets, p, do, self._values(heads))
                    del p
                    self._add_keys(targets, ds, q, heads)
                    self._put(dqueries, torch.bmm(ds, k), heads)
                    if dbias is not None:
                        by_head = ds.unflatten(0, (heads.stop - heads.start, -1)).sum(1, dtype=wide)
                        if len(dbias) < self.plan.heads:
                            dbias += by_head.sum(0)
                        else:
                            dbias[heads] += by_head
                dqueries.mul_(self.scale)
                for place, cells in self._pieces(dq, block):
                    cells.copy_(dqueries[place])
                for square, cut in zip(self.plan.seen, daround, strict=True):
                    for place, cells in self._pieces(dkv, block, square):
                        cells.add_(cut[place])
            self._split(dkv[:, : self.num_global]).copy_(dglobal)
        return dq, dkv, None if dbias is None else dbias.to(grad.dtype), None

    def _blocks(self) -> Iterator[_Block]:
        (rows, columns), heads = self.plan.chunks, self.plan.heads
        matrix = self.plan.window**2 * self.keys * self.q.element_size()
        fit = min(at_once(self.q, LARGEST_SCORES) // matrix, LARGEST_BATCH) // rows
        groups = tuple(spans(heads, fit))
        for images in spans(len(self.q), fit // (heads * columns)):
            for strip in spans(columns, fit // (heads * (images.stop - images.start))):
                yield _Block(images, strip, groups)

    def _values(self, heads: slice) -> slice:
        """Where the values of these heads stand among keys and values."""
        return slice(self.plan.heads + heads.start, self.plan.heads + heads.stop)

    def _split(self, x: Tensor) -> Tensor:
        """(b, ..., D) -> (D / M, b, ..., M), a view: heads of queries, or of keys and values."""
        return x.unflatten(-1, (-1, self.width)).movedim(-2, 0)

    def _around(self, block: _Block) -> list[Tensor]:
        """Keys and values of a strip, for each square that is seen."""
        return [self._cut(self.keys_values, block, square) for square in self.plan.seen]

    def _cut(self, x: Tensor, block: _Block, square: Square = OWN) -> Tensor:
        """The cells of a strip's squares, padded by zeros or wrapped.

        Shapes: (B, tokens, D) -> (D / M, b, (R - 1 + side) w, (c - 1 + side) w, M).
        """
        columns = block.strip.stop - block.strip.start
        high, wide = (
            (many - 1 + square.side) * self.plan.window for many in (self.plan.chunks[0], columns)
        )
        images = block.images.stop - block.images.start
        out = x.new_zeros(x.shape[2] // self.width, images, high, wide, self.width)
        for place, cells in self._pieces(x, block, square):
            out[place] = cells
        return out

    def _pieces(
        self, x: Tensor, block: _Block, square: Square = OWN
    ) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Rectangles of a cut that have tokens, each with these as a view of x (B, tokens, D)."""
        plan, w, strip = self.plan, self.plan.window, block.strip
        image = self._split(x[block.images, x.shape[1] - self.cells :].unflatten(1, plan.grid))
        down, across = (
            list(self._ranges((first + start) * w, (stop - 1 + start + square.side) * w, side))
            for first, stop, start, side in (
                (0, plan.chunks[0], square.row, plan.grid[0]),
                (strip.start, strip.stop, square.column, plan.grid[1]),
            )
        )
        every = slice(None)
        for (row, source_row), (column, source_column) in itertools.product(down, across):
            yield (every, every, row, column), image[:, :, source_row, source_column]

    def _ranges(self, first: int, last: int, side: int) -> Iterator[tuple[slice, slice]]:
        """Of the places from `first` to `last` along an axis those with tokens, and which."""
        padded = -(-side // self.plan.window) * self.plan.window
        turns = range(first // padded, -(-last // padded)) if self.plan.cyclic else (0,)
        for origin in (turn * padded for turn in turns):
            start, stop = max(first, origin), min(last, origin + side)
            if start < stop:
                yield slice(start - first, stop - first), slice(start - origin, stop - origin)

    def _chunks(self, cut: Tensor, heads: slice) -> Tensor:
        """Of a cut (H, b, R w, c w, M) the chunks of some heads: (h b R c, w², M)."""
        return self._windows(cut[heads]).flatten(4, 5).flatten(0, 3)

    def _put(self, cut: Tensor, part: Tensor, heads: slice) -> None:
        """Write (h b R c, w², M) where `_chunks` reads it in a cut."""
        chunks = self._windows(cut[heads])
        chunks.copy_(part.view(chunks.shape))

    def _windows(self, cut: Tensor, square: Square = OWN) -> Tensor:
        """What each chunk sees of a cut (h, b, ..., M): (h, b, R, c, side w, side w, M), a view."""
        w = self.plan.window
        # Each `unfold` puts a dimension at the end.
        return cut.unfold(2, square.side * w, w).unfold(3, square.side * w, w).movedim(4, -1)

    def _keys(self, around: list[Tensor], block: _Block, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values that each chunk sees, global ones first: each (h b R c, keys, M)."""
        of_global = self._split(self.keys_values[block.images, : self.num_global])
        both = []
        for some in (heads, self._values(heads)):
            windows = [
                self._windows(cut[some], square)
                for cut, square in zip(around, self.plan.seen, strict=True)
            ]
            out = windows[0].new_empty(*windows[0].shape[:4], self.keys, self.width)
            out[..., : self.num_global, :] = of_global[some, :, None, None]
            for window, place in zip(windows, self.places, strict=True):
                out[..., place, :].view(window.shape).copy_(window)
            both.append(out.flatten(0, 3))
        return both[0], both[1]

    def _add_keys(
        self, targets: tuple[Tensor, list[Tensor]], a: Tensor, b: Tensor, heads: slice
    ) -> None:
        """Add aᵀ b to where `_keys` reads keys: a (h b R c, w², keys), b (h b R c, w², M).

        `targets` are those of the global tokens (2 H, b, g, M), and the cuts of the squares.
        """
        of_global, cuts = targets
        if self.num_global:
            images = (heads.stop - heads.start) * of_global.shape[1]
            first = a.view(images, -1, self.keys)[..., : self.num_global].transpose(1, 2)
            found = torch.bmm(first, b.view(images, -1, self.width))
            of_global[heads] += found.view(of_global[heads].shape)
        for cut, square, place in zip(cuts, self.plan.seen, self.places, strict=True):
            target, weights = self._windows(cut[heads], square), a[..., place].transpose(1, 2)
            rows = target.shape[2]
            if len(weights) == rows:
                # Every `side`-th chunk: their keys do not overlap, and follow each other.
                for i in range(min(square.side, rows)):
                    some = slice(i, None, square.side)
                    keys = target[0, 0, some, 0].flatten(1, 2)
                    add_product_(keys, weights[some], b[some])
                continue
            part = torch.bmm(weights, b).view(target.shape)
            # Squares overlap, but not those of every `side`-th chunk along both axes.
            for i, j in itertools.product(range(square.side), repeat=2):
                target[:, :, i :: square.side, j :: square.side] += part[
                    :, :, i :: square.side, j :: square.side
                ]

    def _weights(
        self, q: Tensor, k: Tensor, block: _Block, heads: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Weights (h b R c, w², keys) before dropout, and what dropout multiplies them with."""
        if self.bias is None:
            scores = torch.bmm(q, k.transpose(1, 2))
        else:
            bias = self.bias[heads] if len(self.bias) == self.plan.heads else self.bias
            count = heads.stop - heads.start
            scores = q.new_empty(count, len(q) // count, *bias.shape[1:]).copy_(bias[:, None])
            scores = add_product_(scores.flatten(0, 1), q, k.transpose(1, 2))
        self._hide(scores, block, heads)
        weights = softmax_(scores)
        if not self.dropout:
            return weights, None
        first = (block.images.start * self.plan.chunks[1] + block.strip.start) * self.plan.heads
        return weights, dropout_factors(weights, self.dropout, self.seed + first + heads.start)

    def _hide(self, scores: Tensor, block: _Block, heads: slice) -> None:
        """Set scores (h b R c, w², keys) of keys outside of the grid to -inf."""
        rows, columns = self.plan.chunks[0], block.strip.stop - block.strip.start
        scores = scores.view(heads.stop - heads.start, -1, rows, columns, *scores.shape[1:])
        for square, place in zip(self.plan.seen, self.places, strict=True):
            side = square.side * self.plan.window
            seen = scores[..., place].unflatten(-1, (side, side))
            for i, hidden in self._hidden(range(rows), square.row, square.side, 0):
                seen[:, :, i, ..., hidden, :] = float("-inf")
            strip = range(block.strip.start, block.strip.stop)
            for j, hidden in self._hidden(strip, square.column, square.side, 1):
                seen[:, :, :, j, ..., hidden] = float("-inf")

    def _hidden(
        self, chunks: range, first: int, side: int, axis: int
    ) -> Iterator[tuple[int, slice]]:
        """Along an axis, the keys of a square that its chunk does not see, by the chunk's place."""
        w, length, last = self.plan.window, self.plan.grid[axis], self.plan.chunks[axis] - 1
        for place, chunk in enumerate(chunks):
            start = (chunk + first) * w
            if self.plan.cyclic:
                # Of a neighbour that is not wrapped, keys that pad the grid.
                if start <= last * w < start + side * w and length % w:
                    yield place, slice(length - start, (last + 1) * w - start)
                continue
            if start < 0:
                yield place, slice(0, -start)
            if start + side * w > length:
                yield place, slice(max(length - start, 0), side * w)


_attend = recomputed("attend_locally", _Call)
