"""Two-dimensional sliding-chunk attention with global tokens (Vision Longformer).

Zhang et al., "Multi-Scale Vision Longformer: A New Vision Transformer for High-Resolution Image
Encoding", https://arxiv.org/abs/2103.15358, section 3.2 and appendix A. The grid is cut into
`w x w` chunks; a grid token attends to the global tokens and to the 3x3 chunks around its own,
under one softmax; a global token attends to all tokens. Cost with `P` grid tokens after padding to
whole chunks: `2 P (9 w² + g) C + 2 g N C` for attention and `6 N C²` for projections, `4 N C²`
without global tokens.

Deviation, equal up to rounding: the published code multiplies with nine shifted copies, where a
strip of 3x3 neighbourhoods is cut out here (`attentions.local`). As published, the global tokens'
keys and values are a product of their own where weights are shared, too.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.cache import cached
from attentions.contract import Attention, Grid
from attentions.full import POSITIONS
from attentions.local import Plan, Square, attend_locally
from attentions.parts import (
    add_relative_positions,
    apply,
    gather_bias,
    global_bias,
    grid_positions,
    lowered,
    merge_heads,
    relative_index,
    split_heads,
    with_global_keys,
)
from attentions.registry import register

PADDINGS = ("zero", "exact", "cyclic")
NEIGHBOURS = ("all", "self", "random")
AROUND = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1))
OWN = AROUND.index((0, 0))


def _offsets(
    window: int, seen: tuple[Square, ...], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Positions in a chunk (w², 2), and of the keys that it sees (keys, 2)."""
    squares = [
        grid_positions((square.side * window, square.side * window), device)
        + window * torch.tensor(square[:2], device=device)
        for square in seen
    ]
    return grid_positions((window, window), device), torch.cat(squares)


def near_keys(
    window: int, seen: tuple[Square, ...], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """0 for keys at most `window` rows and columns away and -inf for others: (1, w², keys)."""
    query, key = _offsets(window, seen, device)
    far = (query[:, None] - key).abs().amax(dim=-1) > window
    return torch.zeros_like(far, dtype=dtype).masked_fill(far, float("-inf"))[None]


def bias_rows(
    window: int, seen: tuple[Square, ...], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Row of the table of relative positions for each query and key: (w², keys), integers."""
    del dtype
    return relative_index(*_offsets(window, seen, device), (2 * window, 2 * window))


class GlobalQueries(torch.autograd.Function):
    """Attention of the global tokens to all, by a projection of keys and values that is not kept.

    As published, keys and values are projected once for the grid's queries and once for the global
    tokens, with shared weights too, and the counts of FLOPs are of that. They are equal then: the
    backward pass takes the grid's, which are kept anyway, and gives them the gradient.

    Shapes: q (B, H, g, M), keys_values (B, N, 2 C), mask (H, g, N), x (B, N, C), weight (2 C, C),
    bias (2 C) -> as q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys_values: Tensor,
        mask: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, keys_values, mask)
        k, v = _keys_and_values(nn.functional.linear(x, weight, bias), q.shape[1])
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask.to(q.dtype)[None]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, keys_values, mask = ctx.saved_tensors
        grad_q, grad_keys_values = torch.empty_like(q), torch.empty_like(keys_values)
        grad_mask = None if mask is None else torch.zeros_like(mask)
        scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        images = zip(
            *(q * scale, grad, grad_q),
            *_keys_and_values(keys_values, q.shape[1]),
            *_keys_and_values(grad_keys_values, q.shape[1]),
            strict=True,
        )
        # Image by image, heads are a batch of matrices, of which none is copied to be multiplied.
        for query, out, grad_query, k, v, grad_k, grad_v in images:
            scores = (query @ k.transpose(-2, -1)).to(wide)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            grad_v.copy_(weights.to(q.dtype).transpose(-2, -1) @ out)
            change = out @ v.transpose(-2, -1)
            change = weights * (change - (change * weights).sum(dim=-1, keepdim=True))
            if grad_mask is not None:
                grad_mask += change
            change = change.to(q.dtype)
            grad_k.copy_(change.transpose(-2, -1) @ query)
            grad_query.copy_((change @ k).mul_(scale))
        return grad_q, grad_keys_values, grad_mask, None, None, None


def _keys_and_values(both: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """(B, N, 2 C) -> two views (B, H, N, M)."""
    k, v = both.chunk(2, dim=-1)
    return split_heads(k, num_heads), split_heads(v, num_heads)


class GlobalTokens(Attention):
    """What longformer and global share: projections, and the global tokens' own attention.

    Args:
        share_weights: the global tokens use the projections of the grid tokens.
    """

    published_note: ClassVar = (
        "the published formula has channels less global tokens, C - g, in the place of grid tokens,"
        " N - g, and so leaves out nearly all of what the grid tokens' attention costs"
    )

    def __init__(self, *, share_weights: bool = True, **common: Any) -> None:
        super().__init__(**common)
        self.query = nn.Linear(self.dim, self.dim)
        self.kv = nn.Linear(self.dim, 2 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.share_weights = share_weights
        if not self.num_global:
            return
        # Shared layers carry both published names; they are one tensor each.
        self.query_global = self.query if share_weights else nn.Linear(self.dim, self.dim)
        self.kv_global = self.kv if share_weights else nn.Linear(self.dim, 2 * self.dim)
        self.proj_global = self.proj if share_weights else nn.Linear(self.dim, self.dim)

    def attend_globally_plainly(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the global tokens get: x (B, N, C), bias (H, g, N) -> (B, g, C)."""
        q = split_heads(self.query_global(x[:, : self.num_global]), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv_global(x).chunk(2, dim=-1))
        scores = self.scale * (q @ k.transpose(-2, -1))
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        return self.proj_global(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def projection_multiply_adds(self, grid: Grid) -> int:
        """Of all linear layers: `4 N C²`, and the global tokens' own keys and values, `2 N C²`."""
        tokens = self.num_global + grid[0] * grid[1]
        return (6 if self.num_global else 4) * tokens * self.dim**2

    def published_global_multiply_adds(self, grid: Grid, local_keys: int) -> int:
        """The published count, which has C - g where the number of grid tokens, N - g, belongs."""
        g, channels = self.num_global, self.dim
        tokens = g + grid[0] * grid[1]
        local = (channels - g) * (local_keys + g) * channels
        linear = (4 * channels**2 + 4 * channels) * tokens
        return 2 * (local + g * tokens * channels) + linear


@register("longformer")
class LongformerAttention(GlobalTokens):
    """Sliding-chunk attention on a grid, with global tokens.

    Args:
        window: side of a chunk.
        position: "absolute" (positions are in x already) or "relative" (a learned bias).
        padding: keys that are masked out. "zero": those outside the grid; "exact": besides, those
            more than `window` rows or columns away; "cyclic": neighbours wrap around, and masked
            are padded keys of chunks that are not wrapped.
        neighbours: chunks seen. "all": the 3x3; "self": the own one; "random": while training the
            own one and one of the 8 others, drawn for each call, and all when evaluating.
    """

    local_relative_position_bias_table: Tensor
    g2l_relative_position_bias: Tensor
    g2g_relative_position_bias: Tensor
    relative_position_index: Tensor

    arch_option: ClassVar = "window"
    positions: ClassVar = POSITIONS
    examples: ClassVar = (
        {"window": 4, "position": "relative"},
        {"window": 3, "position": "absolute"},
        {"window": 4, "position": "relative", "padding": "exact"},
        {"window": 3, "position": "relative", "padding": "cyclic"},
        {"window": 4, "position": "relative", "neighbours": "self"},
        {"window": 3, "position": "relative", "share_weights": False},
    )

    def __init__(
        self,
        *,
        window: int = 7,
        position: str = "absolute",
        padding: str = "zero",
        neighbours: str = "all",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if window < 1:
            raise ValueError(f"window {window} is not positive")
        for what, value, allowed in (
            ("position", position, POSITIONS),
            ("padding", padding, PADDINGS),
            ("neighbours", neighbours, NEIGHBOURS),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {what} {value!r}; allowed: {', '.join(allowed)}")
        self.window = window
        self.position = position
        self.padding = padding
        self.neighbours = neighbours
        if position == "relative":
            extent = (2 * window, 2 * window)
            add_relative_positions(
                self, extent=extent, num_heads=self.num_heads, num_global=self.num_global
            )
            # Chunk by chunk, as published.
            chunks = tuple(Square(*chunk, 1) for chunk in AROUND)
            self.register_buffer(
                "relative_position_index", relative_index(*_offsets(window, chunks), extent)
            )

    @property
    def reach(self) -> int:
        """Chunks seen to each side of the own one, when evaluating."""
        return 0 if self.neighbours == "self" else 1

    def _seen_chunks(self) -> tuple[int, ...]:
        """Which of the 3x3 chunks are seen at this call, as indices into AROUND."""
        if self.neighbours == "self":
            return (OWN,)
        if self.neighbours == "random" and self.training:
            # On the CPU, whatever the default device: the meta device has no random numbers, and a
            # GPU would have to be waited for.
            other = int(torch.randint(len(AROUND) - 1, (), device="cpu"))
            return (OWN, other + (other >= OWN))
        return tuple(range(len(AROUND)))

    def _plan(self, grid: Grid) -> Plan:
        chunks = self._seen_chunks()
        seen = tuple(Square(*AROUND[chunk], 1) for chunk in chunks)
        if len(chunks) == len(AROUND):
            seen = (Square(-1, -1, 3),)
        return Plan(grid, self.window, self.num_heads, self.padding == "cyclic", seen)

    def _local_bias(self, plan: Plan, like: Tensor) -> Tensor | None:
        """Additive bias of global and local keys, one for all chunks: (H or 1, w², g + keys)."""
        near = None
        if self.padding == "exact":
            near = cached(near_keys, self.window, plan.seen, like=like)
        if self.position == "absolute":
            return None if near is None else nn.functional.pad(near, (self.num_global, 0))
        table = self.local_relative_position_bias_table
        index = cached(bias_rows, self.window, plan.seen, like=table)
        bias = gather_bias(table, index).to(like.dtype)
        bias = bias if near is None else bias + near
        return with_global_keys(bias, self.g2l_relative_position_bias) if self.num_global else bias

    def _global_bias(self, cells: int) -> Tensor | None:
        """Additive bias of what the global tokens see: (H, g, N)."""
        if self.position == "absolute" or not self.num_global:
            return None
        return global_bias(self.g2g_relative_position_bias, self.g2l_relative_position_bias, cells)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        x = lowered(x)
        g, plan, keys_values = self.num_global, self._plan(grid), self.kv(x)
        if g and self.share_weights:
            # One product of all tokens keeps x as it is; one of a part of them keeps a copy.
            first, q = self.query(x).tensor_split((g,), dim=1)
        else:
            first, q = self.query_global(x[:, :g]) if g else None, self.query(x[:, g:])
        bias = self._local_bias(plan, q)
        local = self.proj(attend_locally(q, keys_values, bias, plan, self.dropout_p))
        if first is None:
            return local
        whole = self._attend_globally(first, keys_values, x, self._global_bias(grid[0] * grid[1]))
        return torch.cat([whole, local], dim=1)

    def _attend_globally(
        self, queries: Tensor, keys_values: Tensor, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """What the global tokens get: queries (B, g, C), bias (H, g, N) -> (B, g, C)."""
        q, layer = split_heads(queries, self.num_heads), self.kv_global
        if self.share_weights and not self.dropout_p:
            out = apply(GlobalQueries, q, keys_values, bias, x, layer.weight, layer.bias)
        else:
            k, v = _keys_and_values(layer(x), self.num_heads)
            mask = None if bias is None else bias.to(q.dtype)[None]
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout_p
            )
        return self.proj_global(merge_heads(out))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Full attention under a mask over the whole grid."""
        g, heads, seen = self.num_global, self.num_heads, self._seen_chunks()
        rows, columns = grid
        w, cells = self.window, rows * columns
        sides = (-(-rows // w) * w, -(-columns // w) * w)
        padded = grid_positions(sides, x.device)
        inside = (padded[:, 0] < rows) & (padded[:, 1] < columns)
        query = grid_positions(grid, x.device)
        counts = torch.tensor([sides[0] // w, sides[1] // w], device=x.device)
        scores, values, visible = [], [], []
        q = split_heads(self.query(x[:, g:]), heads)
        # Keys of the padded grid are zero, not the bias of the projection.
        every = x.new_zeros(x.shape[0], len(padded), 2 * self.dim)
        keys_values = self.kv(x)
        every = every.to(keys_values.dtype).index_copy(
            1, inside.nonzero()[:, 0], keys_values[:, g:]
        )
        k, v = (split_heads(part, heads) for part in every.chunk(2, dim=-1))
        for a, b in (AROUND[c] for c in seen):
            shift = torch.tensor([a, b], device=x.device)
            chunk = query // w + shift
            wrapped = chunk % counts
            member = (padded // w)[None] == wrapped[:, None]
            mask = member.all(dim=-1)
            real = torch.stack([padded[:, 0] < rows, padded[:, 1] < columns], dim=-1)
            if self.padding == "cyclic":
                mask = mask & (real[None] | (chunk != counts - 1)[:, None]).all(dim=-1)
            else:
                mask = mask & ((chunk >= 0) & (chunk < counts)).all(dim=-1)[:, None] & inside[None]
            # Differences count from where the neighbour stands before it is wrapped.
            key = padded[None] + ((chunk - wrapped) * w)[:, None]
            difference = query[:, None] - key
            if self.padding == "exact":
                mask = mask & (difference.abs() <= w).all(dim=-1)
            score = self.scale * (q @ k.transpose(-2, -1))
            if self.position == "relative":
                bounded = difference.clamp(1 - 2 * w, 2 * w - 1) + 2 * w - 1
                index = bounded[..., 0] * (4 * w - 1) + bounded[..., 1]
                score = score + gather_bias(self.local_relative_position_bias_table, index)
            scores.append(score)
            visible.append(mask)
            values.append(v)
        if g:
            k, v = (split_heads(part, heads) for part in keys_values[:, :g].chunk(2, dim=-1))
            score = self.scale * (q @ k.transpose(-2, -1))
            if self.position == "relative":
                score = score + self.g2l_relative_position_bias[1][:, None]
            scores.append(score)
            visible.append(torch.ones(cells, g, dtype=torch.bool, device=x.device))
            values.append(v)
        score = torch.cat(scores, dim=-1).masked_fill(~torch.cat(visible, dim=-1), float("-inf"))
        weights = nn.functional.dropout(score.softmax(dim=-1), self.dropout_p)
        local = self.proj(merge_heads(weights @ torch.cat(values, dim=2)))
        if not g:
            return local
        return torch.cat([self.attend_globally_plainly(x, self._global_bias(cells)), local], dim=1)

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs when evaluating: whole chunks, the padded rows and columns included."""
        g, w = self.num_global, self.window
        padded = -(-grid[0] // w) * -(-grid[1] // w) * w * w
        chunks = 1 if self.neighbours == "self" else len(AROUND)
        local = padded * (chunks * w * w + g)
        whole = g * (g + grid[0] * grid[1])
        return 2 * (local + whole) * self.dim + self.projection_multiply_adds(grid)

    def published_multiply_adds(self, grid: Grid) -> int:
        return self.published_global_multiply_adds(grid, len(AROUND) * self.window**2)
