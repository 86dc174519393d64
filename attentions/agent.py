"""Agent attention: agents see all tokens, and tokens see the agents.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention",
https://arxiv.org/abs/2312.08874, equations 5 and 6: `softmax(Q Aᵀ / √M + B₂) softmax(A Kᵀ / √M +
B₁) V + DWC(V)` with n agents `A`, the queries of the grid averaged to a small grid, biases `B` of
agents and places, and a 3x3 depthwise convolution of the values. A bias is the sum of a 7x7 image
for each agent, resized to the grid, and of one value for each of its rows and columns. Cost:
`4 N n C` for attention, `14 P n H` for the biases of P grid tokens, `9 P C` for the convolution and
`4 N C²` for projections.

Global tokens attend and are attended as in the authors' DeiT, with one bias for each agent, and are
in neither the agents' average nor the convolution. On a grid other than the one it is made for, the
biases of rows and columns are resized linearly, as by the authors for detection. Scores are float32
under autocast too.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.depthwise import add_convolution_, convolve_backward, image_of, plain_local
from attentions.parts import (
    apply,
    dropout_factors,
    full_precision,
    merge_heads,
    qkv_heads,
    split_heads,
)
from attentions.pieces import budget, piece
from attentions.registry import register

# Side of the image of biases that each agent has.
IMAGE = 7

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


class Biases(NamedTuple):
    """Biases of agents and tokens in parts, which are resized and summed for a piece at a time.

    Attributes:
        image: (H, 7, columns, n), to be resized to all rows; those of columns are added already.
        rows: (H, rows, n).
        first: of the global tokens, (H, g, n).
        resize: (rows, 7), what resizes the image.
    """

    image: Tensor
    rows: Tensor
    first: Tensor
    resize: Tensor

    def of(self, rows: slice | None) -> Tensor:
        """Biases of some rows of the grid, or of the global tokens: (H, T, n)."""
        if rows is None:
            return self.first
        resized = (self.resize[rows] @ self.image.flatten(2)).unflatten(2, self.image.shape[2:])
        return resized.add_(self.rows[:, rows, None]).flatten(1, 2)

    def zeros(self) -> "Biases":
        """Gradients of nothing yet."""
        image, rows, first = map(torch.zeros_like, self[:3])
        return Biases(image, rows, first, self.resize)

    def add_gradient(self, found: Tensor, rows: slice | None) -> None:
        """Add the gradient of what `of` gives: (H, T, n)."""
        if rows is None:
            self.first.add_(found)
            return
        found = found.unflatten(1, (-1, self.image.shape[2]))
        self.image.add_((self.resize[rows].T @ found.flatten(2)).view_as(self.image))
        self.rows[:, rows] += found.sum(dim=2)


class Part(NamedTuple):
    """Some tokens of some images: whole rows of the grid, or the global tokens, without rows."""

    images: slice
    tokens: slice
    rows: slice | None


class AgentTokens(torch.autograd.Function):
    """Both attentions and the convolution, with scores of a piece of the tokens at a time.

    Saved for the backward pass are queries, keys and values, and what agents made of them.

    Shapes: qkv (B, N, 3 C), weight (C, 1, K, K), bias (C), and twice the first three of `Biases`,
    of keys and of queries -> (B, N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        weight: Tensor,
        bias: Tensor,
        *rest: Any,
    ) -> Tensor:
        tables, resize, (grid, num_heads, g, agents, dropout, seed) = rest[:6], rest[6], rest[7]
        ctx.options = rest[7]
        with full_precision(qkv):
            q, k, v = qkv_heads(qkv, num_heads)
            batch, heads, tokens, width = q.shape
            wide = torch.promote_types(qkv.dtype, torch.float32)
            of_keys, of_queries = (
                Biases(tables[0], tables[1], tables[2], resize),
                Biases(tables[3], tables[4], tables[5], resize),
            )
            agent = _agents(q, grid, agents, wide) * width**-0.5
            largest = agent.new_full((batch, heads, 1, agents**2), float("-inf"))
            total, value = torch.zeros_like(largest), torch.zeros_like(agent)
            for i, part in enumerate(_parts(qkv, grid, g, heads * agents**2)):
                key = piece(k, part[:2], wide)
                scores = (key @ agent[part.images].mT).add_(of_keys.of(part.rows))
                before = largest[part.images]
                now = before.maximum(scores.amax(dim=-2, keepdim=True))
                scores = scores.sub_(now).exp_()
                rescale = (before - now).exp()
                total[part.images] = total[part.images] * rescale + scores.sum(-2, keepdim=True)
                if dropout:
                    scores *= dropout_factors(scores, dropout, int(seed) + 2 * i)
                found = scores.mT @ piece(v, part[:2], wide)
                value[part.images] = value[part.images].mul_(rescale.mT).add_(found)
                largest[part.images] = now
            value /= total.mT
            out = qkv.new_empty(batch, tokens, heads * width)
            for i, part in enumerate(_parts(qkv, grid, g, heads * agents**2)):
                weights = _query_weights(piece(q, part[:2], wide), agent, of_queries, part)
                if dropout:
                    weights *= dropout_factors(weights, dropout, int(seed) + 2 * i + 1)
                out[part[:2]] = merge_heads(weights @ value[part.images])
            add_convolution_(out, v, weight, bias, grid, g)
        ctx.save_for_backward(qkv, weight, *tables, resize, agent, value, largest, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight, *tables, resize, agent, value, largest, total = ctx.saved_tensors
        grid, num_heads, g, agents, dropout, seed = ctx.options
        with full_precision(qkv):
            grads = torch.empty_like(qkv)
            q, k, v = qkv_heads(qkv, num_heads)
            grad_q, grad_k, grad_v = qkv_heads(grads, num_heads)
            _, heads, _, width = q.shape
            wide, scale = agent.dtype, width**-0.5
            of_keys, of_queries = (
                Biases(tables[0], tables[1], tables[2], resize),
                Biases(tables[3], tables[4], tables[5], resize),
            )
            grad_keys, grad_queries = of_keys.zeros(), of_queries.zeros()
            grad_heads = split_heads(grad, heads)
            grad_agent, grad_value = torch.zeros_like(agent), torch.zeros_like(value)
            for i, part in enumerate(_parts(qkv, grid, g, heads * agents**2)):
                query, above = piece(q, part[:2], wide), piece(grad_heads, part[:2], wide)
                weights = used = _query_weights(query, agent, of_queries, part)
                scores = above @ value[part.images].transpose(-2, -1)
                if dropout:
                    factors = dropout_factors(weights, dropout, int(seed) + 2 * i + 1)
                    used, scores = weights * factors, scores.mul_(factors)
                grad_value[part.images] += used.transpose(-2, -1) @ above
                scores = torch._softmax_backward_data(scores, weights, -1, wide)
                grad_q[part.images, :, part.tokens] = scores @ agent[part.images]
                grad_agent[part.images] += scores.transpose(-2, -1) @ query
                grad_queries.add_gradient(scores.sum(dim=0), part.rows)
            shared = (grad_value * value).sum(dim=-1)[..., None, :]
            for i, part in enumerate(_parts(qkv, grid, g, heads * agents**2)):
                key = piece(k, part[:2], wide)
                weights = (key @ agent[part.images].mT).add_(of_keys.of(part.rows))
                weights = weights.sub_(largest[part.images]).exp_().div_(total[part.images])
                used, above = weights, grad_value[part.images]
                scores = piece(v, part[:2], wide) @ above.mT
                if dropout:
                    factors = dropout_factors(weights, dropout, int(seed) + 2 * i)
                    used, scores = weights * factors, scores.mul_(factors)
                grad_v[part.images, :, part.tokens] = used @ above
                scores = scores.sub_(shared[part.images]).mul_(weights)
                grad_k[part.images, :, part.tokens] = scores @ agent[part.images]
                grad_agent[part.images] += scores.mT @ key
                grad_keys.add_gradient(scores.sum(dim=0), part.rows)
            of_filters = convolve_backward(grad, v, grad_v, weight, grid, g)
            _add_agents_gradient(grad_agent.mul_(scale), grad_q, grid, agents)
        return grads, *of_filters, *grad_keys[:3], *grad_queries[:3], None, None


def _parts(qkv: Tensor, grid: Grid, num_global: int, scores: int) -> Iterator[Part]:
    """Parts that cover all tokens, with so many scores for each token."""
    rows, columns = grid
    wide = torch.promote_types(qkv.dtype, torch.float32)
    each = scores * columns * wide.itemsize
    length = min(rows, max(1, budget(qkv) // each))
    images = max(1, budget(qkv) // (each * rows))
    for first in range(0, len(qkv), images):
        some = slice(first, first + images)
        if num_global:
            yield Part(some, slice(0, num_global), None)
        for row in range(0, rows, length):
            last = min(rows, row + length)
            place = slice(num_global + row * columns, num_global + last * columns)
            yield Part(some, place, slice(row, last))


def _agents(q: Tensor, grid: Grid, agents: int, dtype: torch.dtype) -> Tensor:
    """Queries of the grid, averaged to `agents` rows and columns: (B, H, N, M) -> (B, H, n, M)."""
    image = image_of(merge_heads(q), grid, q.shape[2] - grid[0] * grid[1])
    rows, columns = (_bins(side, agents) for side in grid)
    strips = [image[:, first:last].mean(dim=1, dtype=dtype) for first, last in rows]
    strip = torch.stack(strips, dim=1)
    cells = [strip[:, :, first:last].mean(dim=2) for first, last in columns]
    return split_heads(torch.stack(cells, dim=2).flatten(1, 2), q.shape[1])


def _add_agents_gradient(grad: Tensor, grad_q: Tensor, grid: Grid, agents: int) -> None:
    """Add the gradient of the queries that `_agents` averages."""
    image = image_of(merge_heads(grad_q), grid, grad_q.shape[2] - grid[0] * grid[1])
    rows, columns = (_bins(side, agents) for side in grid)
    cells = merge_heads(grad).unflatten(1, (agents, agents))
    strip = grad.new_zeros(len(grad), agents, grid[1], cells.shape[-1])
    for i, (first, last) in enumerate(columns):
        strip[:, :, first:last] += cells[:, :, i, None] / (last - first)
    for i, (first, last) in enumerate(rows):
        image[:, first:last] += strip[:, i, None] / (last - first)


def _query_weights(query: Tensor, agent: Tensor, biases: Biases, part: Part) -> Tensor:
    scores = query @ agent[part.images].mT
    return scores.add_(biases.of(part.rows)).softmax(dim=-1)


@register("agent")
class AgentAttention(Attention):
    """Softmax attention through agents, and a convolution of the values.

    Args:
        agents: rows and columns of the grid of agents.
        grid: the grid whose rows and columns have a bias each; on another they are resized.

    Raises:
        ValueError: for no agents.
    """

    arch_option: ClassVar = "agents"
    examples: ClassVar = ({"agents": 2}, {"agents": 3})

    def __init__(self, *, agents: int = 7, grid: Grid = (14, 14), **common: Any) -> None:
        super().__init__(**common)
        if agents < 1:
            raise ValueError(f"agents {agents} is not positive")
        self.agents = agents
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.dwc = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim)
        heads, count, g = self.num_heads, agents**2, self.num_global
        # Agents see keys by the first of each pair, and queries see agents by the second.
        self.an_bias = _table(heads, count, IMAGE, IMAGE)
        self.na_bias = _table(heads, count, IMAGE, IMAGE)
        self.ah_bias = _table(1, heads, count, grid[0], 1)
        self.aw_bias = _table(1, heads, count, 1, grid[1])
        self.ha_bias = _table(1, heads, grid[0], 1, count)
        self.wa_bias = _table(1, heads, 1, grid[1], count)
        if g:
            self.ac_bias = _table(1, heads, count, g)
            self.ca_bias = _table(1, heads, g, count)

    def _key_tables(self) -> Tables:
        """Images (H, n, 7, 7), rows, columns and global tokens (H, n, …): agents see keys."""
        first = self.ac_bias[0] if self.num_global else self.an_bias[..., 0, :0]
        return self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, ..., 0, :], first

    def _query_tables(self) -> Tables:
        """The same: queries see agents."""
        first = self.ca_bias[0].mT if self.num_global else self.na_bias[..., 0, :0]
        return self.na_bias, self.ha_bias[0, :, :, 0].mT, self.wa_bias[0, :, 0].mT, first

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        biases = [
            part
            for tables in (self._key_tables(), self._query_tables())
            for part in _resized(tables, grid)
        ]
        # Drawn on the CPU, so that no device is waited for.
        seed = torch.randint(2**62, (), device="cpu") if self.dropout_p else None
        places = torch.eye(IMAGE, device=x.device, dtype=biases[0].dtype)
        resize = _resize(places[None, ..., None], (grid[0], 1))[0, ..., 0].mT
        options = grid, self.num_heads, self.num_global, self.agents, self.dropout_p, seed
        out = apply(
            AgentTokens,
            self.qkv(x),
            self.dwc.weight,
            self.dwc.bias,
            *biases,
            resize,
            options,
        )
        return self.proj(out)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Both matrices of weights as a whole, from biases for every agent and token."""
        g, side = self.num_global, self.agents
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            image = q[:, :, g:].unflatten(2, grid)
            agent = torch.stack(
                [
                    image[:, :, top:bottom, left:right].mean(dim=(2, 3))
                    for top, bottom in _bins(grid[0], side)
                    for left, right in _bins(grid[1], side)
                ],
                dim=2,
            )
            keys, queries = (
                _plain_bias(tables, grid) for tables in (self._key_tables(), self._query_tables())
            )
            weights = (self.scale * (agent @ k.mT) + keys).softmax(dim=-1)
            value = nn.functional.dropout(weights, self.dropout_p) @ v
            weights = (self.scale * (q @ agent.mT) + queries.mT).softmax(dim=-1)
            out = merge_heads(nn.functional.dropout(weights, self.dropout_p) @ value)
            out = out + plain_local(merge_heads(v), self.dwc, grid)
        return self.proj(out.to(x.dtype))

    def multiply_adds(self, grid: Grid) -> int:
        cells, count = grid[0] * grid[1], self.agents**2
        tokens = self.num_global + cells
        biases = 2 * IMAGE * cells * count * self.num_heads
        attention = 4 * tokens * count * self.dim + biases + 9 * cells * self.dim
        return attention + 4 * tokens * self.dim**2


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def _resized(tables: Tables, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The first three of `Biases` for a grid."""
    image, rows, columns, first = tables
    image = _resize(image, (IMAGE, grid[1])) + _resize(columns[..., None, :], (1, grid[1]))
    rows = _resize(rows[..., None], (grid[0], 1))[..., 0]
    return image.permute(0, 2, 3, 1).contiguous(), rows.mT, first.mT


def _resize(image: Tensor, grid: Grid) -> Tensor:
    """(H, n, rows, columns) to another grid, bilinearly."""
    return nn.functional.interpolate(image, size=grid, mode="bilinear")


def _bins(side: int, count: int) -> list[tuple[int, int]]:
    """First and last place of each of `count` bins, which overlap where they must."""
    return [(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]


def _plain_bias(tables: Tables, grid: Grid) -> Tensor:
    """The oracle of `Biases`, for all tokens: (H, n, N)."""
    image, rows, columns, first = tables
    bias = nn.functional.interpolate(image, size=grid, mode="bilinear")
    both = rows[..., None] + columns[..., None, :]
    bias = bias + nn.functional.interpolate(both, size=grid, mode="bilinear")
    return torch.cat([first, bias.flatten(-2)], dim=-1)
