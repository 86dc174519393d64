"""Four scans of a selective state space over the grid (2D-selective-scan).

Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166, section 4, with
the selective state space of Gu and Dao, https://arxiv.org/abs/2312.00752, algorithm 2. The tokens,
projected, convolved (3x3, depthwise) and passed through SiLU, are read in four orders: by row, by
column, and both from the end. In each, every channel has states of its own,

    h_t = exp(Δ_t A) h_(t-1) + Δ_t B_t x_t,    y_t = C_t · h_t + D x_t,

with `Δ = softplus(W x + b)` of low rank, B and C projections of the token at hand, one for all
channels, and `A = -exp(A_log)`. The sum of the four is normalised and projected. The defaults are
those of the paper's last and fastest model: one state, no gate and no wider channels; Mamba's block
has 16, a gate `SiLU(z)`, and twice the channels. Cost with E channels inside, rank R and S states:
`(2 N C + 9 P) E + 8 N (R + S) E` for projections and the convolution of P grid tokens, and
`4 N S E` for `C · h`, summed over states and orders. What else the scans multiply, some 40 S times
a token and channel, they do element by element, which counts of FLOPs here leave out, as they do
softmax.

Global tokens are an extension of ours: tokens as any other, without convolution, at the beginning
of the two orders from the start and at the end of the two from the end. There are no heads.

All is in float32 under autocast too. An order is cut into chunks, which are scanned side by side:
once for what each leaves behind, and once with what those before it left. Factors lie in (0, 1) and
are only ever multiplied, so that nothing overflows.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.cache import cached
from attentions.contract import Attention, Grid
from attentions.depthwise import convolve, plain_local
from attentions.parts import full_precision, lowered, spans
from attentions.pieces import budget
from attentions.recompute import Gradients, recomputed
from attentions.registry import register

ORDERS = 4
# Channels that are scanned together, at least: fewer would leave little to do at each step.
_LEAST_CHANNELS = 8
_FASTEST, _SLOWEST = 0.1, 0.001


def _chunks(tokens: int) -> tuple[int, int]:
    """Length and number of chunks: two scans of their length and one of their number cost least."""
    length = max(1, round((tokens / 2) ** 0.5))
    return length, -(-tokens // length)


def _orders(grid: Grid, g: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The token at each place of each order, place by place of all chunks: (4, length, number)."""
    del dtype
    tokens = g + grid[0] * grid[1]
    places = torch.arange(tokens, device=device)
    by_column = torch.cat([places[:g], places[g:].view(grid).T.flatten()])
    both = torch.stack([places, by_column])
    length, number = _chunks(tokens)
    # The last chunk is filled up with the first token, which no other token sees there.
    four = nn.functional.pad(torch.cat([both, both.flip(1)]), (0, length * number - tokens))
    return four.view(ORDERS, number, length).transpose(1, 2).contiguous()


def _places(grid: Grid, g: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Where each token is in the orders, as `_orders` has them, flat: (N, 4)."""
    tokens = g + grid[0] * grid[1]
    length, number = _chunks(tokens)
    orders = _orders(grid, g, device, dtype).transpose(1, 2).flatten(1)[:, :tokens]
    place = orders.argsort(dim=1)
    place = place % length * number + place.div(length, rounding_mode="floor")
    return (place + length * number * torch.arange(ORDERS, device=device)[:, None]).T.contiguous()


def _scan_(decay: Tensor, x: Tensor, *, from_the_end: bool = False) -> Tensor:
    """Turn x into `h_t = decay_t h_(t-1) + x_t`, or h_(t+1) from the end, in place.

    Shapes: decay and x (b, 4, length, number, ...).
    """
    steps, chunks = (range(x.shape[dim]) for dim in (2, 3))
    if from_the_end:
        steps, chunks = steps[::-1], chunks[::-1]
    left = x[:, :, steps[0]].clone()
    for t in steps[1:]:
        torch.addcmul(x[:, :, t], decay[:, :, t], left, out=left)
    factors = decay.prod(dim=2)
    before = torch.zeros_like(left)
    for this, following in itertools.pairwise(chunks):
        torch.addcmul(
            left[:, :, this], factors[:, :, this], before[:, :, this], out=before[:, :, following]
        )
    for t in steps:
        before = torch.addcmul(x[:, :, t], decay[:, :, t], before, out=x[:, :, t])
    return x


class _Scan:
    """One call: the scans of all tokens in four orders, added up.

    Shapes: x (B, N, E); projected (B, N, 4 (R + 2 S)), of each order what Δ, B and C are made of;
    parameters (4, E, R + 1 + S), W, b and A_log -> (B, N, E).
    """

    def __init__(
        self,
        x: Tensor,
        projected: Tensor | None,
        parameters: Tensor | None,
        _d: Tensor | None,
        _seed: Tensor | None,
        plan: Sequence[int],
        _dropout: float,
    ) -> None:
        assert projected is not None
        assert parameters is not None
        rows, columns, num_global, self.states = plan
        self.x, self.projected, self.parameters = x, projected, parameters
        self.rank = parameters.shape[-1] - 1 - self.states
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.tokens = num_global + rows * columns
        place = ((rows, columns), num_global)
        self.orders = cached(_orders, *place, like=x)
        self.places = cached(_places, *place, like=x)

    def forward(self) -> Tensor:
        out = torch.empty_like(self.x)
        with full_precision(self.x):
            for images, channels in self._groups():
                part = _Part(self, images, channels)
                h, c = part.states(), part.c[..., None]
                # Products of one number each are slow as products of matrices.
                y = (h @ c if self.states > 1 else h * c).squeeze(-1)
                out[images, :, channels] = self.to_tokens(y).sum(dim=2).to(out.dtype)
        return out

    def backward(self, grad: Tensor) -> Gradients:
        grad_x = torch.empty_like(self.x)
        found = [
            torch.zeros_like(each, dtype=self.wide) for each in (self.projected, self.parameters)
        ]
        with full_precision(self.x):
            for images, channels in self._groups():
                part = _Part(self, images, channels)
                y = self.in_orders(grad[images, :, channels].to(self.wide))
                of_x, of_projected, of_parameters = part.gradients(y)
                grad_x[images, :, channels] = of_x.to(grad_x.dtype)
                found[0][images] += of_projected.flatten(2)
                found[1][:, channels] += of_parameters
        given = (self.projected, self.parameters)
        return grad_x, *(one.to(like.dtype) for one, like in zip(found, given, strict=True)), None

    def in_orders(self, x: Tensor) -> Tensor:
        """Read tokens in the four orders: (b, N, ...), or (b, N, 4, ...) for each its own.

        Shapes: -> (b, 4, length, number, ...).
        """
        index = self.orders
        if x.ndim == ORDERS:
            own = torch.arange(ORDERS, device=x.device)[:, None, None]
            x, index = x.flatten(1, 2), index * ORDERS + own
        return x.index_select(1, index.flatten()).unflatten(1, index.shape)

    def to_tokens(self, y: Tensor) -> Tensor:
        """Put what was read in the tokens' order: (b, 4, length, number, D) -> (b, N, 4, D)."""
        index = self.places
        return y.flatten(1, 3).index_select(1, index.flatten()).unflatten(1, index.shape)

    def _groups(self) -> Iterator[tuple[slice, slice]]:
        """Images and channels that are scanned together; no channel sees another."""
        one = ORDERS * self.tokens * self.states * self.wide.itemsize
        fit, channels = budget(self.x) // one, self.x.shape[2]
        for images in spans(len(self.x), fit // channels):
            for some in spans(channels, max(fit, _LEAST_CHANNELS)):
                yield images, some


class _Part:
    """Some channels of some images, in the four orders.

    Attributes:
        x, delta: (b, 4, length, number, e).
        b, c: (b, 4, length, number, S).
        decay: (b, 4, length, number, e, S).
    """

    def __init__(self, scan: _Scan, images: slice, channels: slice) -> None:
        self.scan = scan
        sizes = (scan.rank, scan.states, scan.states)
        projected = scan.projected[images].unflatten(-1, (ORDERS, -1)).to(scan.wide)
        self.low, b, c = projected.split(sizes, dim=-1)
        self.weight, bias, a_log = (
            scan.parameters[:, channels].to(scan.wide).split((scan.rank, 1, scan.states), dim=-1)
        )
        # (4, b N, R) @ (4, R, e) -> (b, N, 4, e).
        low = self.low.permute(2, 0, 1, 3).flatten(1, 2)
        steps = torch.baddbmm(bias.transpose(1, 2), low, self.weight.transpose(1, 2))
        steps = nn.functional.softplus(steps).unflatten(1, projected.shape[:2])
        self.steps = steps.permute(1, 2, 0, 3)
        self.delta, self.b, self.c = map(scan.in_orders, (self.steps, b, c))
        self.x = scan.in_orders(scan.x[images, :, channels].to(scan.wide))
        self.a = -a_log.exp()
        self.decay = (self.delta[..., None] * self.a[:, None, None]).exp_()

    def states(self) -> Tensor:
        """h: (b, 4, length, number, e, S)."""
        return _scan_(self.decay, (self.delta * self.x)[..., None] * self.b[..., None, :])

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of x (b, N, e), what is projected (b, N, 4, R + 2 S) and parameters."""
        length, number = self.x.shape[2:4]
        # Nothing comes from what fills up the last chunk.
        filled = length * number - self.scan.tokens
        grad[:, :, length - filled :, -1] = 0
        h = self.states()
        of_c = (grad[..., None] * h).sum(dim=-2)
        of_h = grad[..., None] * self.c[..., None, :]
        # What h_t receives from those behind it, times its decay: what it hands on to h_(t-1).
        passed = _scan_(self.decay, self.decay * of_h, from_the_end=True)
        of_h[:, :, :-1] += passed[:, :, 1:]
        of_h[:, :, -1, :-1] += passed[:, :, 0, 1:]
        # Of the decay's logarithm.
        passed[:, :, 1:] *= h[:, :, :-1]
        passed[:, :, 0, 1:] *= h[:, :, -1, :-1]
        passed[:, :, 0, 0] = 0
        of_a = (passed * self.delta[..., None]).sum(dim=(0, 2, 3)) * self.a
        of_b = (of_h * (self.delta * self.x)[..., None]).sum(dim=-2)
        of_input = (of_h * self.b[..., None, :]).sum(dim=-1)
        of_delta = (passed * self.a[:, None, None]).sum(dim=-1).addcmul_(of_input, self.x)
        of_x = self.scan.to_tokens(of_input.mul_(self.delta)).sum(dim=2)
        # The derivative of softplus, from its result.
        of_steps = self.scan.to_tokens(of_delta).mul_(torch.expm1(-self.steps).neg_())
        of_steps = of_steps.permute(2, 0, 1, 3).flatten(1, 2)
        of_low = (of_steps @ self.weight).unflatten(1, self.steps.shape[:2]).permute(1, 2, 0, 3)
        of_weight = of_steps.transpose(1, 2) @ self.low.permute(2, 0, 1, 3).flatten(1, 2)
        of_b, of_c = map(self.scan.to_tokens, (of_b, of_c))
        return (
            of_x,
            torch.cat([of_low, of_b, of_c], dim=-1),
            torch.cat([of_weight, of_steps.sum(dim=1)[..., None], of_a], dim=-1),
        )


_scan = recomputed("scan_selectively", _Scan)


@register("ss2d")
class SelectiveScan2d(Attention):
    """Selective state spaces that scan the grid in four orders.

    Args:
        state: states of each channel.
        expand: channels inside, as a multiple of those outside.
        gate: whether the output is multiplied by SiLU of another projection.

    Raises:
        ValueError: for a size below 1.
    """

    has_weights: ClassVar = False
    examples: ClassVar = ({"state": 1}, {"state": 3, "expand": 2, "gate": True})

    def __init__(
        self, *, state: int = 1, expand: int = 1, gate: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        if state < 1 or expand < 1:
            raise ValueError(f"state {state} and expand {expand} must be positive")
        self.state, self.gate = state, gate
        self.inner, self.rank = expand * self.dim, -(-self.dim // 16)
        self.in_proj = nn.Linear(self.dim, (1 + gate) * self.inner, bias=False)
        self.conv2d = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        # Under the names of the authors' checkpoints.
        self.x_proj_weight = nn.Parameter(torch.empty(ORDERS, self.rank + 2 * state, self.inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(ORDERS, self.inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(ORDERS, self.inner))
        self.A_logs = nn.Parameter(torch.empty(ORDERS * self.inner, state))
        self.Ds = nn.Parameter(torch.ones(ORDERS * self.inner))
        self.out_norm = nn.LayerNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, self.dim, bias=False)
        self._init_scan()

    @torch.no_grad()
    def _init_scan(self) -> None:
        """As Mamba: Δ from 0.001 to 0.1, log-uniformly, and A from -1 to -S."""
        nn.init.uniform_(self.x_proj_weight, -(self.inner**-0.5), self.inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        nn.init.uniform_(self.dt_projs_bias)
        delta = _SLOWEST * (_FASTEST / _SLOWEST) ** self.dt_projs_bias
        # The inverse of softplus.
        self.dt_projs_bias.copy_(delta + (-torch.expm1(-delta)).log())
        self.A_logs.copy_(torch.arange(1, self.state + 1).log())

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        values, *gate = self.in_proj(x).split(self.inner, dim=-1)
        values = lowered(nn.functional.silu(convolve(values, self.conv2d, grid)))
        out = _scan(values, self._projected(values), self._per_order(), None, self._plan(grid), 0.0)
        return self._output(out + values * self._skip(), gate)

    def _plan(self, grid: Grid) -> list[int]:
        return [*grid, self.num_global, self.state]

    def _projected(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, self.x_proj_weight.flatten(0, 1))

    def _per_order(self) -> Tensor:
        """W, b and A_log of each order: (4, E, R + 1 + S)."""
        a_log = self.A_logs.unflatten(0, (ORDERS, -1))
        return torch.cat([self.dt_projs_weight, self.dt_projs_bias[..., None], a_log], dim=-1)

    def _skip(self) -> Tensor:
        """D, the sum of that of the orders: (E)."""
        return self.Ds.unflatten(0, (ORDERS, -1)).sum(dim=0)

    def _output(self, y: Tensor, gate: Sequence[Tensor]) -> Tensor:
        y = self.out_norm(y)
        for z in gate:
            y = y * nn.functional.silu(z)
        out: Tensor = self.out_proj(y)
        return out

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """The formula, token by token."""
        values, *gate = self.in_proj(x).split(self.inner, dim=-1)
        g, wide = self.num_global, torch.promote_types(x.dtype, torch.float32)
        with full_precision(x):
            local = plain_local(values.to(wide), self.conv2d, grid)
            local[:, :g] = values[:, :g]
            values = (local * local.sigmoid()).to(values.dtype)
        projected = self._projected(values).unflatten(-1, (ORDERS, -1))
        with full_precision(x):
            y = values * self._skip().to(wide)
            for k, order in enumerate(self._plain_orders(grid)):
                y = y + self._plain_scan(values.to(wide), projected[:, :, k].to(wide), order, k)
        return self._output(y, gate)

    def _plain_orders(self, grid: Grid) -> list[list[int]]:
        """Tokens by row, by column, and both from the end."""
        g, (rows, columns) = self.num_global, grid
        cells = [g + i * columns + j for j in range(columns) for i in range(rows)]
        both = [list(range(g + rows * columns)), [*range(g), *cells]]
        return [*both, *(order[::-1] for order in both)]

    def _plain_scan(self, x: Tensor, projected: Tensor, order: list[int], k: int) -> Tensor:
        """One order's scan: x (B, N, E), projected (B, N, R + 2 S) -> (B, N, E)."""
        low, b, c = projected.split((self.rank, self.state, self.state), dim=-1)
        weight, bias = (each[k].to(x.dtype) for each in (self.dt_projs_weight, self.dt_projs_bias))
        delta = nn.functional.softplus(low @ weight.T + bias)
        a = -self.A_logs.to(x.dtype).unflatten(0, (ORDERS, -1))[k].exp()
        h, found = x.new_zeros(len(x), self.inner, self.state), {}
        for t in order:
            h = (delta[:, t, :, None] * a).exp() * h
            h = h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
            found[t] = (h * c[:, t, None]).sum(dim=-1)
        return torch.stack([found[t] for t in range(len(order))], dim=1)

    def multiply_adds(self, grid: Grid) -> int:
        """Of products of matrices, the convolution and sums over states or, of one, over orders.

        The rest is elementwise.
        """
        cells = grid[0] * grid[1]
        tokens = self.num_global + cells
        length, number = _chunks(tokens)
        # What fills up a chunk is summed over states, too.
        sums = ORDERS * (self.state * length * number if self.state > 1 else tokens)
        projections = (2 + self.gate) * self.dim + ORDERS * (2 * self.rank + 2 * self.state)
        return (tokens * projections + 9 * cells + sums) * self.inner
