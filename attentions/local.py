"""Softmax attention of the chunks of a grid to chunks around them, strip by strip.

A strip is a column of chunks. Its keys and values are cut out, its scores made, used and dropped;
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
# The share of these that makes one column of chunks and one head work enough for a block.
_LEAST_SHARE = 4


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


Interval = tuple[int, int]
# Columns of queries in a strip of one column, and the first and last column of keys in a square.
_Sight = tuple[int, int, int]


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
    """One call. Below, a block is `b` images, a strip of `R x c` chunks and `h` heads.

    What a strip sees is cut out as bands, one for each row of chunks; a window is `side` bands.
    Where one column of chunks and one head are work enough, a block is that alone: global tokens
    stand in each band before its cells, so that windows are runs of memory that overlap and are not
    copied. Of the global keys that a window has so, the first are seen.
    """

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
        matrix = plan.window**2 * self.keys * q.element_size()
        self.fit = min(at_once(q, LARGEST_SCORES) // matrix, LARGEST_BATCH) // plan.chunks[0]
        enough = at_once(q, LARGEST_SCORES) // _LEAST_SHARE
        self.alone = len(plan.seen) == 1 and plan.chunks[0] * matrix >= enough
        # Global tokens in each band.
        self.first = self.num_global if self.alone else 0
        # Of blocks alone, the bias and its gradient by the columns that queries and keys have.
        self.biases: dict[_Sight, Tensor] = {}
        self.dbiases: dict[_Sight, Tensor] = {}

    def forward(self) -> Tensor:
        out = self.q.new_empty(self.q.shape)
        with full_precision(self.q):
            for block in self._blocks():
                queries, around = self._cut(self.q, block).mul_(self.scale), self._around(block)
                attended = torch.empty_like(queries)
                for heads in block.groups:
                    q, (k, v) = self._chunks(queries, heads), self._keys(around, block, heads)
                    p, factors = self._weights(q, k, block, heads)
                    self._put(attended, p if factors is None else p.mul_(factors), v, heads)
                for cut, cells in self._pieces(out, attended, block):
                    cells.copy_(cut)
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
                    self._put(dqueries, ds, k, heads)
                    if dbias is not None:
                        by_head = ds.unflatten(0, (heads.stop - heads.start, -1)).sum(1, dtype=wide)
                        self._add_bias(dbias, by_head, block, heads)
                dqueries.mul_(self.scale)
                for cut, cells in self._pieces(dq, dqueries, block):
                    cells.copy_(cut)
                for square, found in zip(self.plan.seen, daround, strict=True):
                    for cut, cells in self._pieces(dkv, found, block, square, self.first):
                        cells.add_(cut)
                if self.first:
                    targets[0].add_(daround[0][..., : self.first, :].sum(2, dtype=wide))
            self._split(dkv[:, : self.num_global]).copy_(dglobal)
            for sight, found in self.dbiases.items():
                assert dbias is not None
                parts = zip(self._framed(dbias, sight), self._banded(found, sight), strict=True)
                for target, part in parts:
                    target += part
        return dq, dkv, None if dbias is None else dbias.to(grad.dtype), None

    def _blocks(self) -> Iterator[_Block]:
        columns, heads = self.plan.chunks[1], self.plan.heads
        if self.alone:
            each = tuple(spans(heads, 1))
            for images, strip in itertools.product(spans(len(self.q), 1), spans(columns, 1)):
                yield _Block(images, strip, each)
            return
        groups = tuple(spans(heads, self.fit))
        for images in spans(len(self.q), self.fit // (heads * columns)):
            for strip in spans(columns, self.fit // (heads * (images.stop - images.start))):
                yield _Block(images, strip, groups)

    def _values(self, heads: slice) -> slice:
        """Where the values of these heads stand among keys and values."""
        return slice(self.plan.heads + heads.start, self.plan.heads + heads.stop)

    def _split(self, x: Tensor) -> Tensor:
        """(b, ..., D) -> (D / M, b, ..., M), a view: heads of queries, or of keys and values."""
        return x.unflatten(-1, (-1, self.width)).movedim(-2, 0)

    def _around(self, block: _Block) -> list[Tensor]:
        """Keys and values of a strip, for each square that is seen."""
        cuts = [self._cut(self.keys_values, block, square, self.first) for square in self.plan.seen]
        if self.first:
            tokens = self._split(self.keys_values[block.images, : self.first])
            cuts[0][..., : self.first, :] = tokens[:, :, None]
        return cuts

    def _columns(self, block: _Block, square: Square) -> Interval:
        """The columns of the grid that a strip's squares have, without those outside if alone."""
        w, strip = self.plan.window, block.strip
        first = (strip.start + square.column) * w
        last = (strip.stop - 1 + square.column + square.side) * w
        if self.alone and not self.plan.cyclic:
            return max(first, 0), min(last, self.plan.grid[1])
        return first, last

    def _cut(self, x: Tensor, block: _Block, square: Square = OWN, first: int = 0) -> Tensor:
        """The bands of a strip's squares, padded by zeros or wrapped.

        Shapes: (B, tokens, D) -> (D / M, b, R - 1 + side, first + w * columns, M), where the first
        cells of each band are not set.
        """
        begin, end = self._columns(block, square)
        images = block.images.stop - block.images.start
        bands = self.plan.chunks[0] - 1 + square.side
        cells = first + self.plan.window * (end - begin)
        out = x.new_empty(x.shape[2] // self.width, images, bands, cells, self.width)
        if self.alone and not self.plan.cyclic:
            whole = range(-square.row, self.plan.grid[0] // self.plan.window - square.row)
            for band in set(range(bands)) - set(whole):
                out[:, :, band] = 0
        else:
            out.zero_()
        for cut, part in self._pieces(x, out, block, square, first):
            cut.copy_(part)
        return out

    def _pieces(
        self, x: Tensor, cut: Tensor, block: _Block, square: Square = OWN, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of a cut that have tokens, each with these in x (B, tokens, D), both as views."""
        plan, w = self.plan, self.plan.window
        image = self._split(x[block.images, x.shape[1] - self.cells :].unflatten(1, plan.grid))
        bands = cut[..., first:, :].unflatten(-2, (w, -1))
        down = self._ranges(square.row * w, (plan.chunks[0] - 1 + square.row + square.side) * w, 0)
        across = list(self._ranges(*self._columns(block, square), 1))
        for row, source in down:
            # Of the last chunk the grid may have a part alone.
            rest = (source.stop - source.start) % w
            middle, band = source.stop - rest, (row.stop - rest) // w
            for column, source_column in across:
                cells = image[:, :, :, source_column]
                if source.start < middle:
                    part = cells[:, :, source.start : middle].unflatten(2, (-1, w))
                    yield bands[:, :, row.start // w : band, :, column], part
                if rest:
                    yield bands[:, :, band, :rest, column], cells[:, :, middle : source.stop]

    def _ranges(self, first: int, last: int, axis: int) -> Iterator[tuple[slice, slice]]:
        """Of the places from `first` to `last` along an axis those with tokens, and which."""
        side, padded = self.plan.grid[axis], self.plan.chunks[axis] * self.plan.window
        turns = range(first // padded, -(-last // padded)) if self.plan.cyclic else (0,)
        for origin in (turn * padded for turn in turns):
            start, stop = max(first, origin), min(last, origin + side)
            if start < stop:
                yield slice(start - first, stop - first), slice(start - origin, stop - origin)

    def _chunks(self, cut: Tensor, heads: slice) -> Tensor:
        """Of a cut of queries the chunks of some heads: (h b R c, queries, M)."""
        return self._by_chunk(cut[heads]).flatten(4, 5).flatten(0, 3)

    def _by_chunk(self, cut: Tensor) -> Tensor:
        """(h, b, R, w * columns, M) -> (h, b, R, c, w, columns / c, M), a view."""
        w = self.plan.window
        columns = (-1, w) if cut.shape[3] > w * w else (1, -1)
        return cut.unflatten(3, (w, *columns)).movedim(4, 3)

    def _put(self, cut: Tensor, a: Tensor, b: Tensor, heads: slice) -> None:
        """Write `a b` (h b R c, queries, M) where `_chunks` reads it in a cut."""
        if self.alone:
            torch.bmm(a, b, out=self._chunks(cut, heads))
            return
        chunks = self._by_chunk(cut[heads])
        chunks.copy_(torch.bmm(a, b).view(chunks.shape))

    def _windows(self, cut: Tensor, square: Square) -> Tensor:
        """What each chunk sees of a cut without global tokens, a view.

        Shapes: (h, b, bands, w * columns, M) -> (h, b, R, c, side, w, side w, M).
        """
        w, side = self.plan.window, square.side
        # Each `unfold` puts a dimension at the end.
        windows = cut.unflatten(3, (w, -1)).unfold(2, side, 1).unfold(4, side * w, w)
        return windows.permute(0, 1, 2, 4, 6, 3, 7, 5)

    def _keys(self, around: list[Tensor], block: _Block, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values that each chunk sees, global ones first: each (h b R c, keys, M)."""
        both = []
        for some in (heads, self._values(heads)):
            if self.alone:
                (cut,), (square,) = around, self.plan.seen
                rows, cells = self.plan.chunks[0], cut.shape[3]
                shape, run = (rows, square.side * cells, self.width), cut[some.start, 0]
                both.append(run.as_strided(shape, (run.stride(0), run.stride(1), 1)))
                continue
            of_global = self._split(self.keys_values[block.images, : self.num_global])
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
        """Add aᵀ b to where `_keys` reads keys, of a (n, queries, keys) and b (n, queries, M).

        `targets` are those of the global tokens (2 H, b, g, M), and the cuts of the squares.
        """
        of_global, cuts = targets
        rows = self.plan.chunks[0]
        if self.alone:
            (cut,), (square,) = cuts, self.plan.seen
            run = cut[heads.start, 0]
            # Windows of every `side`-th chunk do not overlap, and follow each other.
            for i in range(min(square.side, rows)):
                some = slice(i, None, square.side)
                part = a[some].transpose(1, 2)
                keys = run[i : i + square.side * len(part)].view(len(part), -1, self.width)
                add_product_(keys, part, b[some])
            return
        if self.num_global:
            images = (heads.stop - heads.start) * of_global.shape[1]
            first = a.view(images, -1, self.keys)[..., : self.num_global].transpose(1, 2)
            found = torch.bmm(first, b.view(images, -1, self.width))
            of_global[heads] += found.view(of_global[heads].shape)
        for cut, square, place in zip(cuts, self.plan.seen, self.places, strict=True):
            target = self._windows(cut[heads], square)
            part = torch.bmm(a[..., place].transpose(1, 2), b).view(target.shape)
            # Squares overlap, but not those of every `side`-th chunk along both axes.
            for i, j in itertools.product(range(square.side), repeat=2):
                target[:, :, i :: square.side, j :: square.side] += part[
                    :, :, i :: square.side, j :: square.side
                ]

    def _weights(
        self, q: Tensor, k: Tensor, block: _Block, heads: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Weights (h b R c, queries, keys) before dropout, and what it multiplies them with."""
        if self.bias is None:
            scores = torch.bmm(q, k.transpose(1, 2))
            if self.first:
                bands = scores.unflatten(-1, (self.plan.seen[0].side, -1))
                bands[..., 1:, : self.first] = float("-inf")
        else:
            bias = self._bias_of(block)
            bias = bias[heads] if len(bias) == self.plan.heads else bias
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
        """Set scores (h b R c, queries, keys) of keys outside of the grid to -inf."""
        rows, w = self.plan.chunks[0], self.plan.window
        columns = block.strip.stop - block.strip.start
        scores = scores.view(heads.stop - heads.start, -1, rows, columns, *scores.shape[1:])
        for square, place in zip(self.plan.seen, self.places, strict=True):
            if self.alone:
                seen = scores.unflatten(-1, (square.side, -1))[..., self.first :]
            else:
                seen = scores[..., place].unflatten(-1, (square.side, -1))
            seen = seen.unflatten(-1, (w, -1))
            for i, hidden in self._hidden(range(rows), square.row, square.side, 0):
                for band in range(hidden.start // w, -(-hidden.stop // w)):
                    within = slice(max(hidden.start - band * w, 0), hidden.stop - band * w)
                    seen[:, :, i, ..., band, within, :] = float("-inf")
            if self.alone and not self.plan.cyclic:
                continue
            strip = range(block.strip.start, block.strip.stop)
            for j, hidden in self._hidden(strip, square.column, square.side, 1):
                seen[:, :, :, j, ..., hidden] = float("-inf")

    def _framed(self, bias: Tensor, sight: _Sight) -> tuple[Tensor, Tensor]:
        """Views of what a sight has of a whole bias, of global and other keys; as `_banded`."""
        (queries, first, last), (square,), w = sight, self.plan.seen, self.plan.window
        own = bias.unflatten(1, (w, w))[:, :, :queries]
        local = own[..., self.first :].unflatten(-1, (square.side, w, -1))
        return own[..., : self.first], local[..., first:last]

    def _banded(self, bias: Tensor, sight: _Sight) -> tuple[Tensor, Tensor]:
        """Views of a sight's own bias (H or 1, queries, keys), of global and other keys.

        Shapes: (H or 1, w, columns, g), and (H or 1, w, columns, side, w, columns of keys).
        """
        own = bias.unflatten(1, (self.plan.window, -1)).unflatten(-1, (self.plan.seen[0].side, -1))
        local = own[..., self.first :].unflatten(-1, (self.plan.window, -1))
        return own[..., 0, : self.first], local

    def _empty(self, bias: Tensor, sight: _Sight, value: float) -> Tensor:
        """A sight's bias, filled."""
        (queries, first, last), w = sight, self.plan.window
        keys = self.plan.seen[0].side * (self.first + w * (last - first))
        return bias.new_full((len(bias), w * queries, keys), value)

    def _sight(self, block: _Block) -> _Sight:
        """Columns of queries of a strip of one column, and which columns of its square it has."""
        (square,), w = self.plan.seen, self.plan.window
        begin, end = self._columns(block, OWN)
        first, last = self._columns(block, square)
        corner = (block.strip.start + square.column) * w
        return end - begin, first - corner, last - corner

    def _bias_of(self, block: _Block) -> Tensor:
        """The bias for the queries and keys of a strip: (H or 1, queries, keys)."""
        assert self.bias is not None
        if not self.alone:
            return self.bias
        sight = self._sight(block)
        if sight not in self.biases:
            out = self.biases[sight] = self._empty(self.bias, sight, float("-inf"))
            parts = zip(self._banded(out, sight), self._framed(self.bias, sight), strict=True)
            for target, part in parts:
                target.copy_(part)
        return self.biases[sight]

    def _add_bias(self, dbias: Tensor, found: Tensor, block: _Block, heads: slice) -> None:
        """Add the gradient of the bias of some heads (h, queries, keys), summed over chunks."""
        if self.alone:
            sight = self._sight(block)
            if sight not in self.dbiases:
                self.dbiases[sight] = self._empty(dbias, sight, 0.0)
            dbias = self.dbiases[sight]
        if len(dbias) < self.plan.heads:
            dbias += found.sum(0)
        else:
            dbias[heads] += found

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
