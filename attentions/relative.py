"""Full attention with relative positions, a block of queries at a time.

The bias of a pair of grid tokens follows from the difference of their positions. With the table as
an image, turned by half a turn, the biases of one query are the part of it that starts at a place
of the query's own: those of all queries, in reversed order, are overlapping views of the image, and
no tensor of all pairs is made. Nor is one kept: the backward pass makes the scores again.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attentions.cache import has_data
from attentions.contract import Grid
from attentions.parts import (
    add_product_,
    at_once,
    dropout_factors,
    full_precision,
    softmax_,
    softmax_gradient_,
    spans,
)
from attentions.recompute import Gradients, recomputed

# Bytes of the scores that are made at once, on a CPU and elsewhere, at least those of one query.
LARGEST_SCORES = {"cpu": 2**24, "other": 2**28}


def attend_relatively(
    q: Tensor,
    keys_values: Tensor,
    table: Tensor,
    of_global: Tensor | None,
    *,
    num_heads: int,
    grid: Grid,
    extent: Grid,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention over all tokens of a grid, biased by a table of relative positions.

    Shapes: q (B, N, C), keys_values (B, N, 2 C), table ((2 ex - 1)(2 ey - 1), H) for `extent`
    (ex, ey), of_global (H, g, g + 2): for a global token as query the bias of each global key and
    of the grid, and at last that of a grid token to it as key -> (B, N, C).
    """
    return _attend(q, keys_values, table, of_global, [num_heads, *grid, *extent], dropout)


def attend_decomposed(
    q: Tensor,
    keys_values: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    num_heads: int,
    grid: Grid,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention over all tokens, with biases `q · rows[i, r] + q · columns[j, s]`.

    The bias is that of a grid token at (i, j) as query and one at (r, s) as key.

    Shapes: q (B, N, C), keys_values (B, N, 2 C), rows (R, R, M), columns (S, S, M) -> (B, N, C).
    """
    return _attend_decomposed(q, keys_values, rows, columns, [num_heads, *grid], dropout)


class _Block(NamedTuple):
    """Images, heads and queries: rows and columns of the grid, or None for the global tokens."""

    images: slice
    heads: slice
    queries: tuple[slice, slice] | None


class _Call:
    """One call. Below, a block is `b` images, `h` heads and `Q` queries."""

    def __init__(
        self,
        q: Tensor,
        keys_values: Tensor,
        table: Tensor | None,
        of_global: Tensor | None,
        seed: Tensor | None,
        plan: Sequence[int],
        dropout: float,
    ) -> None:
        self.heads, rows, columns, *extent = plan
        self.q, self.of_global, self.dropout = q, of_global, dropout
        self.seed = int(seed) if seed is not None and has_data(q) else 0
        self.grid, self.extent = (rows, columns), (extent[0], extent[1])
        self.num_global = q.shape[1] - rows * columns
        self.scale = (q.shape[2] // self.heads) ** -0.5
        # (H, 2 ex - 1, 2 ey - 1), turned by half a turn.
        assert table is not None
        turned = table.to(q.dtype).flip(0).T.contiguous()
        self.image = turned.unflatten(1, (2 * extent[0] - 1, 2 * extent[1] - 1))
        # (B, H, N, M), in one piece: every block of queries reads all of them.
        split = keys_values.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        self.keys_values = split.contiguous()
        self.k, self.v = self.keys_values

    def forward(self) -> Tensor:
        out = self.q.new_empty(self.q.shape)
        with full_precision(self.q):
            for number, block in enumerate(self._blocks()):
                q = self._take(self.q, block).mul_(self.scale)
                weights, factors = self._weights(q, block, number)
                weights = weights if factors is None else weights.mul_(factors)
                self._put(out, torch.bmm(weights, self._of(self.v, block)), block)
        return out

    def backward(self, grad: Tensor) -> Gradients:
        wide = torch.promote_types(grad.dtype, torch.float32)
        dq, dk, dv = self.q.new_empty(self.q.shape), *torch.zeros_like(self.keys_values)
        sums = self._sums(wide)
        with full_precision(self.q):
            for number, block in enumerate(self._blocks()):
                q, do = self._take(self.q, block).mul_(self.scale), self._take(grad, block)
                weights, factors = self._weights(q, block, number)
                ds = torch.bmm(do, self._of(self.v, block).transpose(1, 2))
                ds = softmax_gradient_(ds if factors is None else ds.mul_(factors), weights)
                weights = weights if factors is None else weights.mul_(factors)
                add_product_(self._of(dv, block), weights.transpose(1, 2), do)
                add_product_(self._of(dk, block), ds.transpose(1, 2), q)
                del weights, factors
                dquery = torch.bmm(ds, self._of(self.k, block)).mul_(self.scale)
                self._put(dq, self._add_bias(sums, ds, q, dquery, block), block)
        dkv = torch.stack([dk, dv]).permute(1, 3, 0, 2, 4).flatten(2)
        return dq, dkv, *self._bias_gradients(sums, grad.dtype)

    def _sums(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Zeros for the gradients of the biases."""
        of_global = self.of_global
        dglobal = None if of_global is None else torch.zeros_like(of_global, dtype=dtype)
        return torch.zeros_like(self.image, dtype=dtype), dglobal

    def _bias_gradients(
        self, sums: tuple[Tensor, Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        dimage, dglobal = sums
        dtable = dimage.flatten(1).T.flip(0).to(dtype)
        return dtable, None if dglobal is None else dglobal.to(dtype)

    def _blocks(self) -> Iterator[_Block]:
        (rows, columns), batch, tokens = self.grid, *self.q.shape[:2]
        fit = at_once(self.q, LARGEST_SCORES) // (tokens * self.q.element_size())
        places: list[tuple[slice, slice] | None] = [None] if self.num_global else []
        across = list(spans(columns, fit))
        places += itertools.product(spans(rows, fit // columns), across)
        for images in spans(batch, fit // (self.heads * rows * columns)):
            for heads in spans(self.heads, fit // (rows * columns)):
                for place in places:
                    yield _Block(images, heads, place)

    def _cells(self, x: Tensor, block: _Block) -> Tensor:
        """Of tokens (B, N, C) a block's queries in order: (b, h, rows, columns, M), a view."""
        x = x.unflatten(2, (self.heads, -1))[block.images, :, block.heads]
        if block.queries is None:
            return x[:, None, : self.num_global].movedim(3, 1)
        rows, columns = block.queries
        return x[:, self.num_global :].unflatten(1, self.grid)[:, rows, columns].movedim(3, 1)

    def _take(self, x: Tensor, block: _Block) -> Tensor:
        """(B, N, C) -> (b h, Q, M), the last query first; a copy."""
        return self._cells(x, block).flip(2, 3).flatten(2, 3).flatten(0, 1)

    def _put(self, x: Tensor, part: Tensor, block: _Block) -> None:
        """Write (b h, Q, M) where `_take` reads it in x."""
        cells = self._cells(x, block)
        cells.copy_(part.view(cells.shape).flip(2, 3))

    def _of(self, x: Tensor, block: _Block) -> Tensor:
        """(B, H, N, M) -> (b h, N, M), a view."""
        return x[block.images, block.heads].view(-1, *x.shape[2:])

    def _weights(self, q: Tensor, block: _Block, number: int) -> tuple[Tensor, Tensor | None]:
        """Weights (b h, Q, N) before dropout, and what dropout multiplies them with."""
        heads = block.heads.stop - block.heads.start
        scores = q.new_empty(len(q) // heads, heads, q.shape[1], self.k.shape[2])
        self._fill(scores, q, block)
        scores = scores.flatten(0, 1)
        weights = softmax_(add_product_(scores, q, self._of(self.k, block).transpose(1, 2)))
        if not self.dropout:
            return weights, None
        return weights, dropout_factors(weights, self.dropout, self.seed + number)

    def _fill(self, scores: Tensor, q: Tensor, block: _Block) -> None:
        """Write the biases of a block into its scores (b, h, Q, N)."""
        del q
        g = self.num_global
        if block.queries is None:
            assert self.of_global is not None
            # The last query first.
            biases = self.of_global[block.heads].flip(1)
            scores[..., :g] = biases[..., :g]
            scores[..., g:] = biases[..., g : g + 1]
        else:
            if self.of_global is not None:
                scores[..., :g] = self.of_global[block.heads, None, :, g + 1]
            local = self._local(block)
            scores[..., g:].unflatten(3, self.grid).unflatten(2, local.shape[1:3]).copy_(local)

    def _corner(self, queries: tuple[slice, slice]) -> Grid:
        """Where in the image the biases of the last query begin."""
        return self.extent[0] - queries[0].stop, self.extent[1] - queries[1].stop

    def _local(self, block: _Block) -> Tensor:
        """Biases of a block's queries, the last one first: (h, rows, columns, *grid), a view."""
        assert block.queries is not None
        rows, columns = (span.stop - span.start for span in block.queries)
        image, (row, column) = self.image[block.heads], self._corner(block.queries)
        heads, across, _ = image.stride()
        return image.as_strided(
            (len(image), rows, columns, *self.grid),
            (heads, across, 1, across, 1),
            image.storage_offset() + row * across + column,
        )

    def _add_bias(
        self,
        sums: tuple[Tensor, Tensor | None],
        ds: Tensor,
        q: Tensor,
        dq: Tensor,
        block: _Block,
    ) -> Tensor:
        """Add the gradient of scores (b h, Q, N) to those of the biases they were made with.

        Return the gradient of the queries (b h, Q, M), `dq` and what came through the biases.
        """
        del q
        dimage, dglobal = sums
        g, heads, wide = self.num_global, block.heads.stop - block.heads.start, dimage.dtype
        ds = ds.unflatten(0, (-1, heads))
        ds = ds[0] if len(ds) == 1 else ds.sum(0, dtype=wide)
        if block.queries is None:
            assert dglobal is not None
            from_global = dglobal[block.heads]
            from_global[..., :g] += ds[..., :g].flip(1)
            from_global[..., g] += ds[..., g:].sum(2, dtype=wide).flip(1)
            return dq
        if dglobal is not None:
            dglobal[block.heads, :, g + 1] += ds[..., :g].sum(1, dtype=wide)
        rows, columns = (span.stop - span.start for span in block.queries)
        down, across = self.grid
        # Each query is moved on by one place against the next: its biases begin there.
        width = across + columns
        skewed = ds.new_zeros(heads, rows, columns, down, width)
        skewed[..., :across] = ds[..., g:].view(heads, rows, columns, down, across)
        skewed = skewed.as_strided(
            (heads, rows, columns, down, width - 1),
            (*skewed.stride()[:2], down * width - 1, width, 1),
        )
        summed = skewed.sum(2, dtype=wide)
        row, column = self._corner(block.queries)
        for i in range(rows):
            place = slice(row + i, row + i + down), slice(column, column + width - 1)
            dimage[block.heads, *place] += summed[:, i]
        return dq


class _Decomposed(_Call):
    """One call with biases that are products of a query with tables of rows and of columns."""

    def __init__(
        self,
        q: Tensor,
        keys_values: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        seed: Tensor | None,
        plan: Sequence[int],
        dropout: float,
    ) -> None:
        assert rows is not None
        assert columns is not None
        # Nothing is read from the table of differences.
        extent = (1, 1)
        super().__init__(
            q, keys_values, q.new_zeros(1, plan[0]), None, seed, [*plan, *extent], dropout
        )
        # For queries that are multiplied with the scale already.
        self.tables = [table.to(q.dtype) / self.scale for table in (rows, columns)]

    def _sums(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        rows, columns = (torch.zeros_like(table, dtype=dtype) for table in self.tables)
        return rows, columns

    def _bias_gradients(
        self, sums: tuple[Tensor, Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        rows, columns = sums
        assert columns is not None
        return (rows / self.scale).to(dtype), (columns / self.scale).to(dtype)

    def _of_queries(self, block: _Block) -> list[Tensor]:
        """The tables of a block's queries, the last one first: (rows, R, M), (columns, S, M)."""
        assert block.queries is not None
        pairs = zip(self.tables, block.queries, strict=True)
        return [table[queries].flip(0) for table, queries in pairs]

    def _fill(self, scores: Tensor, q: Tensor, block: _Block) -> None:
        scores[..., : self.num_global] = 0
        if block.queries is None:
            scores.zero_()
            return
        rows, columns = self._of_queries(block)
        q = q.view(*scores.shape[:2], len(rows), len(columns), -1)
        row = torch.einsum("bhijm,irm->bhijr", q, rows)
        column = torch.einsum("bhijm,jsm->bhijs", q, columns)
        local = scores[..., self.num_global :].unflatten(3, self.grid).unflatten(2, q.shape[2:4])
        local.copy_(row[..., None])
        local += column[..., None, :]

    def _add_bias(
        self,
        sums: tuple[Tensor, Tensor | None],
        ds: Tensor,
        q: Tensor,
        dq: Tensor,
        block: _Block,
    ) -> Tensor:
        if block.queries is None:
            return dq
        (rows, columns), heads = self._of_queries(block), block.heads.stop - block.heads.start
        shape = (len(q) // heads, heads, len(rows), len(columns))
        local = ds[..., self.num_global :].reshape(*shape, *self.grid)
        row, column, q = local.sum(-1), local.sum(-2), q.view(*shape, -1)
        assert sums[1] is not None
        for target, queries, found in (
            (sums[0], block.queries[0], torch.einsum("bhijr,bhijm->irm", row, q)),
            (sums[1], block.queries[1], torch.einsum("bhijs,bhijm->jsm", column, q)),
        ):
            target[queries] += found.flip(0)
        through = torch.einsum("bhijr,irm->bhijm", row, rows)
        through += torch.einsum("bhijs,jsm->bhijm", column, columns)
        return dq.add_(through.reshape(dq.shape), alpha=self.scale)


_attend = recomputed("attend_relatively", _Call)
_attend_decomposed = recomputed("attend_decomposed", _Decomposed)
