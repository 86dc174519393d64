"""Attention in windows of a grid, strip by strip: never all windows at once, nor kept for backward.

A side of the grid is cut into spans of windows that see alike: side by side and perhaps shifted, at
equal distances (a lattice), or around each query (neighbourhoods, where windows overlap). A strip
is all windows in a span of rows and one of columns, of some images. Windows that padding or the
shift cuts have a mask of their own; all others share one, so that no mask is as large as the batch
or the grid.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attentions.cache import cached, has_data
from attentions.contract import Grid
from attentions.parts import (
    LARGEST_BATCH,
    dropout_factors,
    full_precision,
    merge_heads,
    qkv_heads,
    softmax_,
    softmax_gradient_,
    split_heads,
)
from attentions.pieces import budget
from attentions.recompute import Gradients, recomputed

# Keys of a mask are aligned as these kernels want them, which would copy it otherwise.
ALIGNMENT = 8
SHIFTED, LATTICE, AROUND = range(3)
_SEEN, _PADDING, _WRAPPED = range(3)
_SHORTEST = 1e-12

Interval = tuple[int, int]


class Run(NamedTuple):
    """Where tokens of windows stand along a side; slots in no run are padding.

    Slot `slots.start + i` of window `n` is at `start + n * between + i * step`.
    """

    slots: slice
    start: int
    between: int = 1
    step: int = 1


class Span(NamedTuple):
    """Windows along one side of the grid that see alike.

    Attributes:
        number: of windows.
        queries, keys: where they stand.
        seen: for each slot of a query, the first key that it sees and the one behind the last.
        width: slots of keys.
        offset: place of the first key, from the first query.
        apart: keys that no two windows share, in a row.
    """

    number: int
    queries: tuple[Run, ...]
    keys: tuple[Run, ...]
    seen: tuple[Interval, ...]
    width: int
    offset: int = 0
    apart: int = 0


def shifted(side: int, window: int, shift: int, most: int) -> Iterator[Span]:
    """Windows side by side that cover a side, shifted, padded to whole ones."""
    count = -(-side // window)
    length, whole = count * window, (side - shift) // window
    starts = [*range(0, whole, most), *range(whole, count)]
    for first, last in zip(starts, [*starts[1:], count], strict=True):
        begin, end = first * window, last * window
        runs = []
        for low, high, moved in (
            (0, side - shift, shift),
            (length - shift, length, shift - length),
        ):
            low, high = max(begin, low), min(end, high)
            if low < high:
                # Where a run is a part of a window, this is the only one.
                slots = slice(low - begin, min(high - begin, window))
                runs.append(Run(slots, low + moved, window))
        at = [begin + shift + i for i in range(window)]
        kinds = [_PADDING if i % length >= side else _WRAPPED * (i >= length) for i in at]
        # Only padding sees padding, so that every query sees a key.
        seen = tuple((kinds.index(kind), window - kinds[::-1].index(kind)) for kind in kinds)
        yield Span(last - first, tuple(runs), tuple(runs), seen, window, 0, window)


def lattice(side: int, window: int, most: int) -> Iterator[Span]:
    """Windows of at most `window` tokens at equal distances that cover a side."""
    step = -(-side // window)
    for tokens, group in groupby(range(step), lambda first: -(-(side - first) // step)):
        alike = list(group)
        for i in range(0, len(alike), most):
            runs = (Run(slice(0, tokens), alike[i], 1, step),)
            count = len(alike[i : i + most])
            yield Span(count, runs, runs, ((0, tokens),) * tokens, tokens, 0, tokens)


def around(
    side: int, tile: int, kernel: int, dilation: int, stride: int, most: int
) -> Iterator[Span]:
    """Windows of `tile` queries, a multiple of `stride`, and of all keys around these."""
    for first in range(min(dilation, side)):
        length = -(-(side - first) // dilation)

        def window(begin: int, length: int = length) -> tuple[int, int, tuple[Interval, ...]]:
            queries = range(begin, min(begin + tile, length))
            starts = [first_key(i, length, kernel, stride) for i in queries]
            keys = min(kernel, length)
            seen = tuple((one - starts[0], one - starts[0] + keys) for one in starts)
            return len(queries), starts[0] - begin, seen

        for (queries, offset, seen), group in groupby(range(0, length, tile), window):
            begins = list(group)
            width = seen[-1][1]
            for i in range(0, len(begins), most):
                count, start = len(begins[i : i + most]), first + begins[i] * dilation
                between = tile * dilation
                query = Run(slice(0, queries), start, between, dilation)
                key = Run(slice(0, width), start + offset * dilation, between, dilation)
                yield Span(count, (query,), (key,), seen, width, offset, tile)


def first_key(query: int, length: int, kernel: int, stride: int) -> int:
    """The first key of a query's window: centred on the leader of its stride, kept inside."""
    leader = min(query // stride * stride + stride // 2, length - 1)
    return max(0, min(leader - kernel // 2, length - kernel))


def hidden(rows: Span, columns: Span, num_global: int, like: Tensor) -> Tensor | None:
    """What is added to scores in windows of two spans: (1, Q, g + K), or None for nothing."""
    if all(every == (0, span.width) for span in (rows, columns) for every in span.seen):
        return None
    sides = ((span.seen, span.width) for span in (rows, columns))
    return cached(hidden_keys, *sides, num_global, like=like)


def hidden_keys(
    rows: tuple[tuple[Interval, ...], int],
    columns: tuple[tuple[Interval, ...], int],
    num_global: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Minus infinity for keys outside of the intervals of rows and columns that a query sees."""
    row, column = (_within(*side, device) for side in (rows, columns))
    seen = (row[:, None, :, None] & column[:, None, :]).flatten(2).flatten(0, 1)
    mask = torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, float("-inf"))
    return aligned(nn.functional.pad(mask, (num_global, 0))[None])


def _within(seen: tuple[Interval, ...], width: int, device: torch.device) -> Tensor:
    """(queries, keys)."""
    low, high = torch.tensor(seen, device=device).T[..., None]
    key = torch.arange(width, device=device)
    return (key >= low) & (key < high)


def aligned(mask: Tensor) -> Tensor:
    """The same, with rows that begin at multiples of ALIGNMENT."""
    keys = mask.shape[-1]
    return nn.functional.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]


class Strip(NamedTuple):
    """Windows of some images that see alike."""

    images: slice
    rows: Span
    columns: Span


class Plan(NamedTuple):
    """Where the windows of a grid are.

    Attributes:
        grid: rows and columns.
        heads: attention heads.
        num_global: global tokens.
        kind: SHIFTED, LATTICE or AROUND.
        window: tokens of a window along a side; for AROUND, queries.
        how: of SHIFTED, rows and columns by which the windows are moved; of AROUND, kernel,
            dilation and stride.
    """

    grid: Grid
    heads: int
    num_global: int
    kind: int
    window: int
    how: tuple[int, ...] = ()

    def flat(self) -> list[int]:
        """As numbers, for an operator."""
        return [*self.grid, *self[1:5], *self.how]

    @classmethod
    def of(cls, flat: Sequence[int]) -> "Plan":
        """The inverse of `flat`."""
        rows, columns, heads, num_global, kind, window, *how = flat
        return cls((rows, columns), heads, num_global, kind, window, tuple(how))

    def spans(self, axis: int, most: int) -> Iterator[Span]:
        """Spans of at most `most` windows that cover a side."""
        side = self.grid[axis]
        if self.kind == SHIFTED:
            return shifted(side, self.window, self.how[axis], most)
        if self.kind == LATTICE:
            return lattice(side, self.window, most)
        kernel, dilation, stride = self.how
        return around(side, self.window, kernel, dilation, stride, most)

    @property
    def frame(self) -> int:
        """Keys along a side that a bias has, for all windows."""
        return self.window + 2 * self.margin

    @property
    def margin(self) -> int:
        """Keys that a window has before its first query, at most."""
        return self.how[0] - 1 if self.kind == AROUND else 0

    def pairs(self) -> int:
        """Pairs of queries and keys that are multiplied, global keys included."""
        local, queries = 1, 1
        for axis in (0, 1):
            spans = list(self.spans(axis, max(self.grid)))
            local *= sum(span.number * len(span.seen) * span.width for span in spans)
            queries *= sum(span.number * len(span.seen) for span in spans)
        return local + queries * self.num_global


def attend_in_windows(
    qkv: Tensor,
    plan: Plan,
    *,
    local_bias: Tensor | None = None,
    whole_bias: Tensor | None = None,
    temperature: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from grid tokens to their window and the global tokens, and from these to all tokens.

    Kept for the backward pass are the inputs alone. Gradients of gradients are an error.

    Shapes: qkv (B, N, 3 C), local_bias (H, w², g + frame²) or (2, w, w, M), whole_bias (H, g, N),
    temperature (H, 1, 1) -> (B, N, C).

    Args:
        qkv: queries, keys and values of all tokens.
        plan: where the windows are.
        local_bias: added to scores in windows; the frame begins `plan.margin` rows and columns
            before the first query. Of four dimensions: its products with the query are added, for
            the rows of query and key, and for their columns.
        whole_bias: added to scores of the global tokens as queries.
        temperature: what scores of normalised queries and keys are multiplied with, instead of
            scores of queries and keys with `M ** -0.5`.
        dropout: probability.
    """
    return _attend(qkv, local_bias, whole_bias, temperature, plan.flat(), dropout)


class _Call:
    """One call. Below, a strip is `n` windows of `Q` queries and `K` keys in the grid."""

    def __init__(
        self,
        qkv: Tensor,
        local_bias: Tensor | None,
        whole_bias: Tensor | None,
        temperature: Tensor | None,
        seed: Tensor | None,
        numbers: Sequence[int],
        dropout: float,
    ) -> None:
        self.plan, self.qkv, self.dropout = Plan.of(numbers), qkv, dropout
        self.local_bias, self.whole_bias = local_bias, whole_bias
        self.temperature = temperature
        self.masked: object = None
        self.mask: Tensor | None = None
        self.seed = int(seed) if seed is not None and has_data(qkv) else 0
        self.channels = qkv.shape[2] // 3

    def forward(self) -> Tensor:
        qkv, g = self.qkv, self.plan.num_global
        out = qkv.new_empty(*qkv.shape[:2], self.channels)
        by_head = self._split(out)
        with full_precision(qkv):
            for number, strip in enumerate(self._strips()):
                parts = self._read(strip)
                found = self._fused(parts, self._mask(strip, parts[0]), number)
                for view, part in self._places(by_head, strip, found, keys=False):
                    view.copy_(part)
            for number, images, parts, mask in self._whole():
                out[images, :g] = merge_heads(self._fused(parts, mask, number))
        return out

    def backward(self, grad: Tensor) -> Gradients:
        qkv, g, heads = self.qkv, self.plan.num_global, self.plan.heads
        wide, apart = torch.promote_types(qkv.dtype, torch.float32), self.plan.kind != AROUND
        # Windows apart write every gradient once; others add to it.
        grads = torch.empty_like(qkv) if apart else torch.zeros_like(qkv)
        by_head, above = self._split(grads), self._split(grad)
        firsts = qkv.new_zeros(len(qkv), 2 * heads, g, qkv.shape[2] // (3 * heads), dtype=wide)
        local, whole, self.warmer = (
            None if one is None else torch.zeros_like(one, dtype=wide)
            for one in (self.local_bias, self.whole_bias, self.temperature)
        )
        with full_precision(qkv):
            for number, strip in enumerate(self._strips()):
                parts = self._read(strip)
                mask = self._mask(strip, parts[0])
                out = self._windows(above, strip, keys=False)
                q, k, v, scores = self._gradients(out, parts, mask, number)
                if local is not None and self.by_query:
                    q = q + self._add_products(local, parts[0], scores)
                elif local is not None:
                    self._add_bias(local, strip, scores.sum(dim=0, dtype=wide))
                for view, part in self._places(by_head[:, :, :heads], strip, q, keys=False):
                    view.copy_(part)
                for i, each in enumerate((k, v)):
                    place = slice((i + 1) * heads, (i + 2) * heads)
                    target = by_head[:, :, place]
                    for view, part in self._places(target, strip, each[:, :, g:], keys=True):
                        (view.copy_ if apart else view.add_)(part)
                    of_global = firsts[strip.images, i * heads : (i + 1) * heads]
                    by_image = each[:, :, :g].unflatten(0, (len(of_global), -1))
                    of_global += by_image.sum(dim=1, dtype=wide)
            by_head[:, :g, heads:] = firsts.transpose(1, 2)
            for number, images, parts, mask in self._whole():
                out = split_heads(grad[images, :g], heads)
                q, k, v, scores = self._gradients(out, parts, mask, number)
                grad_q, grad_k, grad_v = qkv_heads(grads[images], heads)
                grad_q[:, :, :g] = q
                grad_k += k
                grad_v += v
                if whole is not None:
                    whole += scores.sum(dim=0, dtype=wide)
        like = (self.local_bias, self.whole_bias, self.temperature)
        biases = zip((local, whole, self.warmer), like, strict=True)
        return grads, *(None if a is None or b is None else a.to(b.dtype) for a, b in biases)

    def _strips(self) -> Iterator[Strip]:
        """Strips that cover all windows of all images."""
        plan, qkv = self.plan, self.qkv
        queries, keys = plan.window**2, plan.num_global + (plan.window + plan.margin) ** 2
        widest = keys * max(qkv.shape[2], plan.heads * queries) * qkv.element_size()
        most = min(LARGEST_BATCH, max(1, budget(qkv) // widest))
        for columns in plan.spans(1, most):
            left = max(1, most // columns.number)
            for rows in plan.spans(0, left):
                images = max(1, left // rows.number)
                for first in range(0, len(qkv), images):
                    yield Strip(slice(first, first + images), rows, columns)

    def _whole(self) -> Iterator[tuple[int, slice, tuple[Tensor, ...], Tensor | None]]:
        """Of global tokens as queries: a number, images, queries, keys and values, and a mask."""
        g, (count, tokens, width) = self.plan.num_global, self.qkv.shape
        if not g:
            return
        mask = self.whole_bias
        mask = None if mask is None else aligned(mask.to(self.qkv.dtype))
        # The gradients of keys and values are as large as these.
        most = max(1, budget(self.qkv) // (tokens * width * self.qkv.element_size()))
        for first in range(0, count, most):
            images = slice(first, first + most)
            q, k, v = qkv_heads(self.qkv[images], self.plan.heads)
            yield -1 - first, images, (q[:, :, :g], k, v), mask

    @property
    def by_query(self) -> bool:
        """Whether biases are products with queries."""
        return self.local_bias is not None and self.local_bias.ndim == 4

    def _mask(self, strip: Strip, q: Tensor) -> Tensor | None:
        """What is added to the scores of a strip: (H or 1, Q, g + K), or with n before."""
        if self.masked != strip[1:]:
            self.masked, self.mask = strip[1:], self._mask_of_all(strip)
        if not self.by_query:
            return self.mask
        (row, column), side, g = self._products(q), self.plan.window, self.plan.num_global
        out = aligned(q.new_zeros(*q.shape[:3], g + side**2))
        local = out[..., g:].unflatten(-1, (side, side))
        local.unflatten(2, (side, side)).copy_(row[..., None]).add_(column[..., None, :])
        return out if self.mask is None else out.add_(self.mask)

    def _products(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Biases of keys' rows and of their columns: q (n, H, w², M) -> (n, H, w, w, w) twice."""
        assert self.local_bias is not None
        rows, columns = self.local_bias.to(q.dtype)
        q = q.unflatten(2, (self.plan.window, -1))
        row = torch.einsum("nhijm,irm->nhijr", q, rows)
        return row, torch.einsum("nhijm,jsm->nhijs", q, columns)

    def _add_products(self, target: Tensor, q: Tensor, scores: Tensor) -> Tensor:
        """Add the gradient of scores to that of the biases; return that of q through these."""
        assert self.local_bias is not None
        (rows, columns), sides = self.local_bias.to(q.dtype), (self.plan.window, self.plan.window)
        local = scores[..., self.plan.num_global :].unflatten(-1, sides).unflatten(2, sides)
        row, column, q = local.sum(-1), local.sum(-2), q.unflatten(2, sides)
        target[0] += torch.einsum("nhijr,nhijm->irm", row, q)
        target[1] += torch.einsum("nhijs,nhijm->jsm", column, q)
        through = torch.einsum("nhijr,irm->nhijm", row, rows)
        return (through + torch.einsum("nhijs,jsm->nhijm", column, columns)).flatten(2, 3)

    def _mask_of_all(self, strip: Strip) -> Tensor | None:
        """What is added to the scores of every window of a strip: (H or 1, Q, g + K)."""
        mask = hidden(strip.rows, strip.columns, self.plan.num_global, self.qkv)
        if self.local_bias is not None and not self.by_query:
            of_global, local = self._framed(self.local_bias, strip)
            parts = [of_global.flatten(1, 2), local.flatten(3).flatten(1, 2)]
            bias = torch.cat(parts, dim=-1).to(self.qkv.dtype)
            mask = aligned(bias if mask is None else bias + mask)
        return mask

    def _framed(self, bias: Tensor, strip: Strip) -> tuple[Tensor, Tensor]:
        """The biases of a strip as views: (H, t, u, g), and (H, t, u, keys' rows, columns)."""
        g, plan, (rows, columns) = self.plan.num_global, self.plan, strip[1:]
        own = bias.unflatten(1, (plan.window, plan.window))[
            :, : len(rows.seen), : len(columns.seen)
        ]
        row, column = (plan.margin + span.offset for span in (rows, columns))
        local = own[..., g:].unflatten(-1, (plan.frame, plan.frame))
        local = local[..., row : row + rows.width, column : column + columns.width]
        return own[..., :g], local

    def _add_bias(self, target: Tensor, strip: Strip, scores: Tensor) -> None:
        """Add the gradient of a strip's scores (H, Q, g + K) to that of the bias."""
        of_global, local = self._framed(target, strip)
        of_global += scores[..., : self.plan.num_global].view(of_global.shape)
        local += scores[..., self.plan.num_global :].reshape(local.shape)

    def _read(self, strip: Strip) -> tuple[Tensor, ...]:
        """Queries (n, H, Q, M), keys and values (n, H, g + K, M) of a strip."""
        tokens, heads = self._split(self.qkv), self.plan.heads
        q = self._windows(tokens[:, :, :heads], strip, keys=False)
        k, v = self._windows(tokens[:, :, heads:], strip, keys=True).chunk(2, dim=1)
        return q, k, v

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D / M, M), a view."""
        return x.unflatten(-1, (-1, self.channels // self.plan.heads))

    def _windows(self, x: Tensor, strip: Strip, *, keys: bool) -> Tensor:
        """A strip's queries (n, h, Q, M), or keys (n, h, g + K, M), of x (B, N, h, M); a copy."""
        (rows, columns), g = strip[1:], self.plan.num_global if keys else 0
        grid_tokens = x[strip.images, self.plan.num_global :].unflatten(1, self.plan.grid)
        sides = [span.width if keys else len(span.seen) for span in (rows, columns)]
        down, across = (span.keys if keys else span.queries for span in (rows, columns))
        counts = (len(grid_tokens), rows.number, columns.number)
        out = x.new_empty(*counts, g + sides[0] * sides[1], *x.shape[2:])
        windows = out[:, :, :, g:].unflatten(3, sides)
        if [sum(map(_length, runs)) for runs in (down, across)] != sides:
            windows.zero_()
        for one, other in product(down, across):
            seen = _look(grid_tokens, strip, one, other)
            windows[..., one.slots, other.slots, :, :] = seen
        if g:
            out[:, :, :, :g] = x[strip.images, None, None, :g]
        return out.flatten(0, 2).transpose(1, 2)

    def _places(
        self, x: Tensor, strip: Strip, windows: Tensor, *, keys: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of windows (n, h, Q or K, M) that have tokens, each with these in x (B, N, h, M).

        The tokens of a part are disjoint.
        """
        image = x[strip.images, self.plan.num_global :].unflatten(1, self.plan.grid)
        (rows, columns), parts = strip[1:], []
        for span in (rows, columns):
            runs = span.keys if keys else span.queries
            most = span.apart if keys else len(span.seen)
            parts.append([one for run in runs for one in _cut(run, most)])
        sides = [span.width if keys else len(span.seen) for span in (rows, columns)]
        counts = (-1, rows.number, columns.number)
        windows = windows.transpose(1, 2).unflatten(1, sides).unflatten(0, counts)
        for row, column in product(*parts):
            yield _look(image, strip, row, column), windows[..., row.slots, column.slots, :, :]

    def _fused(self, parts: tuple[Tensor, ...], mask: Tensor | None, number: int) -> Tensor:
        """Attention by a fused kernel; with dropout in the open."""
        (q, k, v), scale = parts, None
        if self.temperature is not None:
            q, k, scale = _normal(q)[0] * self.temperature.to(q.dtype), _normal(k)[0], 1.0
        if not self.dropout:
            mask = mask[None] if mask is not None and mask.ndim == 3 else mask
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        flat, heads = [_by_head(x) for x in (q, k, v)], q.shape[1]
        weights = _weights(flat[0], flat[1], mask, heads, scale or q.shape[-1] ** -0.5)
        factors = dropout_factors(weights, self.dropout, self.seed + number)
        return torch.bmm(weights.mul_(factors), flat[2]).unflatten(0, (heads, -1)).transpose(0, 1)

    def _gradients(
        self, grad: Tensor, parts: tuple[Tensor, ...], mask: Tensor | None, number: int
    ) -> tuple[Tensor, ...]:
        """The gradients of q, k, v and the scores, the weights computed again."""
        heads, temperature = parts[0].shape[1], self.temperature
        q, k, v, grad = (_by_head(x) for x in (*parts, grad))
        scale, warmth = q.shape[-1] ** -0.5, None
        if temperature is not None:
            (q, q_lengths), (k, k_lengths), scale = _normal(q), _normal(k), 1.0
            warmth = temperature.to(q.dtype).repeat_interleave(len(q) // heads, dim=0)
        query = q if warmth is None else q * warmth
        weights = _weights(query, k, mask, heads, scale)
        scores, used = torch.bmm(grad, v.transpose(1, 2)), weights
        if self.dropout:
            factors = dropout_factors(weights, self.dropout, self.seed + number)
            used, scores = weights * factors, scores.mul_(factors)
        grad_v = torch.bmm(used.transpose(1, 2), grad)
        scores = softmax_gradient_(scores, weights)
        grad_q, grad_k = (
            torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)
            for a, b in ((scores, k), (scores.transpose(1, 2), query))
        )
        if warmth is not None:
            assert self.warmer is not None
            found = (grad_q * q).view(heads, -1).sum(dim=1, dtype=self.warmer.dtype)
            self.warmer += found.view(-1, 1, 1)
            grad_q = _normal_gradient(grad_q * warmth, q, q_lengths)
            grad_k = _normal_gradient(grad_k, k, k_lengths)
        q, k, v, scores = (
            x.unflatten(0, (heads, -1)).transpose(0, 1) for x in (grad_q, grad_k, grad_v, scores)
        )
        return q, k, v, scores


def _length(run: Run) -> int:
    return int(run.slots.stop - run.slots.start)


def _cut(run: Run, most: int) -> Iterator[Run]:
    """The same tokens in runs of at most `most` slots."""
    for i in range(0, _length(run), most):
        first = run.slots.start + i
        slots = slice(first, min(first + most, run.slots.stop))
        yield run._replace(slots=slots, start=run.start + i * run.step)


def _look(image: Tensor, strip: Strip, row: Run, column: Run) -> Tensor:
    """Tokens of a strip's windows: (B, rows, columns, ...) -> (B, R, S, t, u, ...), a view."""
    for axis, run, span in ((1, row, strip.rows), (2, column, strip.columns)):
        reach = (_length(run) - 1) * run.step + 1
        image = image.narrow(axis, run.start, (span.number - 1) * run.between + reach)
        image = image.unfold(axis, reach, run.between)[..., :: run.step]
    return image.movedim((-2, -1), (3, 4))


def _by_head(x: Tensor) -> Tensor:
    """(n, H, Q, M) -> (H n, Q, M), a view where n is 1."""
    return x.transpose(0, 1).flatten(0, 1)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """Weights (H n, Q, K) under a mask (H or 1, Q, K), or one with n before."""
    if mask is None:
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        return softmax_(scores)
    scores = q.new_empty(heads, len(q) // heads, q.shape[1], k.shape[1])
    scores = scores.copy_(mask[:, None] if mask.ndim == 3 else mask.transpose(0, 1)).flatten(0, 1)
    return softmax_(torch.baddbmm(scores, q, k.transpose(1, 2), alpha=scale, out=scores))


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., M) of length 1, in the dtype of x, and their lengths before (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = wide.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
    return (wide / lengths).to(x.dtype), lengths


def _normal_gradient(grad: Tensor, normal: Tensor, lengths: Tensor) -> Tensor:
    """The gradient of what was normalised."""
    along = (grad * normal).sum(dim=-1, keepdim=True)
    return ((grad - normal * along) / lengths).to(grad.dtype)


def _result(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


_attend = recomputed("attend_in_windows", _Call, _result)
