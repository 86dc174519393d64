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
LARGEST_SCORES = {"cpu": 2**22, "other": 2**26}


class Square(NamedTuple):
    """Chunks seen together: `side` x `side` of them, the first `row`, `column` from one's own."""

    row: int
    column: int
    side: int


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
        self.channels = q.shape[2]
        self.scale = (self.channels // plan.heads) ** -0.5
        self.margin = 0 if plan.seen == (Square(0, 0, 1),) else plan.window
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
                queries, keys_values = self._cut(self.q, block), self._cut_keys(block)
                attended = torch.empty_like(queries)
                for heads in block.groups:
                    q = self._from_strip(queries, heads).mul_(self.scale)
                    k, v = self._keys(keys_values, block, heads)
                    p, factors = self._weights(q, k, block, heads)
                    p = p if factors is None else p.mul_(factors)
                    self._to_strip(attended, torch.bmm(p, v), heads)
                for place, cells in self._pieces(out, block):
                    cells.copy_(attended[place])
        return out

    def backward(self, grad: Tensor) -> Gradients:
        dq, dkv = self.q.new_empty(self.q.shape), torch.zeros_like(self.keys_values)
        # Sums over all chunks.
        wide = torch.promote_types(grad.dtype, torch.float32)
        dglobal = torch.zeros_like(dkv[:, : self.num_global], dtype=wide)
        dbias = None if self.bias is None else torch.zeros_like(self.bias, dtype=wide)
        with full_precision(self.q):
            for block in self._blocks():
                queries, keys_values = self._cut(self.q, block), self._cut_keys(block)
                grads, dqueries = self._cut(grad, block), torch.empty_like(queries)
                for heads in block.groups:
                    q = self._from_strip(queries, heads).mul_(self.scale)
                    do = self._from_strip(grads, heads)
                    k, v = self._keys(keys_values, block, heads)
                    p, factors = self._weights(q, k, block, heads)
                    ds = torch.bmm(do, v.transpose(1, 2))
                    ds = softmax_gradient_(ds if factors is None else ds.mul_(factors), p)
                    p = p if factors is None else p.mul_(factors)
                    dv = torch.bmm(p.transpose(1, 2), do)
                    del p, v, factors
                    self._add_keys((dkv, dglobal), dv, block, heads, self.channels)
                    del dv
                    dk = torch.bmm(ds.transpose(1, 2), q)
                    self._add_keys((dkv, dglobal), dk, block, heads, 0)
                    del dk
                    self._to_strip(dqueries, torch.bmm(ds, k).mul_(self.scale), heads)
                    if dbias is not None:
                        by_head = ds.unflatten(0, (heads.stop - heads.start, -1)).sum(1, dtype=wide)
                        if len(dbias) < self.plan.heads:
                            dbias += by_head.sum(0)
                        else:
                            dbias[heads] += by_head
                for place, cells in self._pieces(dq, block):
                    cells.copy_(dqueries[place])
            dkv[:, : self.num_global] = dglobal
        return dq, dkv, None if dbias is None else dbias.to(grad.dtype), None

    def _blocks(self) -> Iterator[_Block]:
        (rows, columns), heads = self.plan.chunks, self.plan.heads
        matrix = self.plan.window**2 * self.keys * self.q.element_size()
        fit = min(at_once(self.q, LARGEST_SCORES) // matrix, LARGEST_BATCH) // rows
        groups = tuple(spans(heads, fit))
        for images in spans(len(self.q), fit // (heads * columns)):
            for strip in spans(columns, fit // (heads * (images.stop - images.start))):
                yield _Block(images, strip, groups)

    def _cut(self, x: Tensor, block: _Block, margin: int = 0) -> Tensor:
        """(B, tokens, D) -> (b, R w + 2 margin, c w + 2 margin, D), padded by zeros or wrapped."""
        w, (rows, _), strip = self.plan.window, self.plan.chunks, block.strip
        images = block.images.stop - block.images.start
        columns = strip.stop - strip.start
        out = x.new_zeros(images, rows * w + 2 * margin, columns * w + 2 * margin, x.shape[2])
        for place, cells in self._pieces(x, block, margin):
            out[place] = cells
        return out

    def _cut_keys(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Keys and values of the global tokens (b, g, 2 C), and what `_cut` gives with a margin."""
        return (
            self.keys_values[block.images, : self.num_global],
            self._cut(self.keys_values, block, self.margin),
        )

    def _pieces(
        self, x: Tensor, block: _Block, margin: int = 0
    ) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Rectangles of a cut that have tokens, each with these as a view of x (B, tokens, D)."""
        plan, w, strip = self.plan, self.plan.window, block.strip
        image = x[block.images, x.shape[1] - self.cells :].unflatten(1, plan.grid)
        down = self._ranges(-margin, plan.chunks[0] * w + margin, plan.grid[0])
        across = self._ranges(strip.start * w - margin, strip.stop * w + margin, plan.grid[1])
        for (row, source_row), (column, source_column) in itertools.product(down, across):
            yield (slice(None), row, column), image[:, source_row, source_column]

    def _ranges(self, first: int, last: int, side: int) -> Iterator[tuple[slice, slice]]:
        """Of the places from `first` to `last` along an axis those with tokens, and which."""
        padded = -(-side // self.plan.window) * self.plan.window
        turns = range(first // padded, -(-last // padded)) if self.plan.cyclic else (0,)
        for origin in (turn * padded for turn in turns):
            start, stop = max(first, origin), min(last, origin + side)
            if start < stop:
                yield slice(start - first, stop - first), slice(start - origin, stop - origin)

    def _from_strip(self, x: Tensor, heads: slice) -> Tensor:
        """(b, R w, c w, C) -> (h b R c, w², M), a copy."""
        chunks = self._chunks(x, heads)
        return chunks.reshape(-1, self.plan.window**2, chunks.shape[-1]).contiguous()

    def _to_strip(self, x: Tensor, part: Tensor, heads: slice) -> None:
        """Write (h b R c, w², M) where `_from_strip` reads it in x."""
        chunks = self._chunks(x, heads)
        chunks.copy_(part.view(chunks.shape))

    def _chunks(self, x: Tensor, heads: slice) -> Tensor:
        """(b, R w, c w, C) -> (h, b, R, c, w, w, M), a view."""
        w = self.plan.window
        x = x.unflatten(3, (self.plan.heads, -1))[..., heads, :]
        return x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).permute(5, 0, 1, 3, 2, 4, 6)

    def _windows(self, x: Tensor, row: int, column: int, high: int, wide: int) -> Tensor:
        """Of each chunk the `high` x `wide` chunks that begin `row`, `column` from it, as a view.

        Shapes: (..., R w + 2 margin, c w + 2 margin, M) -> (..., R, c, high w, wide w, M).
        """
        w, margin = self.plan.window, self.margin
        for axis, first, side in ((-3, row, high), (-2, column, wide)):
            length = x.shape[axis] - 2 * margin + (side - 1) * w
            x = x.narrow(axis, first * w + margin, length)
        # Each `unfold` puts a dimension at the end.
        return x.unfold(-3, high * w, w).unfold(-3, wide * w, w).movedim(-3, -1)

    def _keys(
        self, cut: tuple[Tensor, Tensor], block: _Block, heads: slice
    ) -> tuple[Tensor, Tensor]:
        """Keys and values around each chunk, global ones first: each (h b R c, keys, M)."""
        of_global, around = (
            x.unflatten(-1, (2, self.plan.heads, -1))[..., heads, :].movedim((-3, -2), (0, 1))
            for x in cut
        )
        rows, columns = self.plan.chunks[0], block.strip.stop - block.strip.start
        # (2, h, b, R, c, keys, M)
        out = around.new_empty(*around.shape[:3], rows, columns, self.keys, around.shape[-1])
        out[..., : self.num_global, :] = of_global[:, :, :, None, None]
        for square, place in zip(self.plan.seen, self.places, strict=True):
            side = square.side * self.plan.window
            out[..., place, :].unflatten(-2, (side, side)).copy_(
                self._windows(around, *square, square.side)
            )
        k, v = out.flatten(1, 4)
        return k, v

    def _add_keys(
        self, targets: tuple[Tensor, Tensor], part: Tensor, block: _Block, heads: slice, first: int
    ) -> None:
        """Add (h b R c, keys, M) to where `_keys` reads them: tokens (B, g + cells, 2 C), globals.

        `first` is the channel where keys, or values, begin.
        """
        count, width = heads.stop - heads.start, part.shape[-1]
        channels = slice(first + heads.start * width, first + heads.stop * width)
        tokens, of_global = (target[..., channels] for target in targets)
        rows, columns = self.plan.chunks[0], block.strip.stop - block.strip.start
        part = part.view(count, -1, rows, columns, *part.shape[-2:])
        from_global = part[..., : self.num_global, :].sum((2, 3), dtype=of_global.dtype)
        of_global[block.images] += from_global.movedim(0, 2).flatten(2)
        w, margin = self.plan.window, 2 * self.margin
        around = part.new_zeros(*part.shape[:2], rows * w + margin, columns * w + margin, width)
        for square, place in zip(self.plan.seen, self.places, strict=True):
            # One piece of each square at a time: squares overlap, these pieces do not.
            wide = square.side if columns == 1 else 1
            pieces = part[..., place, :].unflatten(-2, (square.side, w, square.side // wide, -1))
            for i, j in itertools.product(range(square.side), range(square.side // wide)):
                window = self._windows(around, square.row + i, square.column + j, 1, wide)
                window.add_(pieces[..., i, :, j, :, :])
        around = around.movedim(0, 3)
        for piece, cells in self._pieces(tokens, block, self.margin):
            cells.unflatten(3, (count, -1)).add_(around[piece])

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
