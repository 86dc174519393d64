"""What an attention module is.

Vocabulary: `B` batch, `H` heads, `M = dim / H` channels a head, `g` global tokens,
`grid = (rows, columns)`, `N = g + rows * columns` tokens. Every mechanism maps `x (B, N, dim)` to
`(B, N, dim)`; the `g` global tokens come first, then the grid in row-major order.

A mechanism of the user needs only what `AttentionModule` names. `Attention` is the base class of
the mechanisms in this package: it checks the input and chooses between the fast form and the
oracle.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

Grid = tuple[int, int]

IMPLEMENTATIONS = ("fast", "reference")


@runtime_checkable
class AttentionModule(Protocol):
    """The least that the backbone asks of a mechanism.

    The constructor takes keyword arguments only: `dim`, `num_heads`, `num_global` and options of
    its own, each with a default. `grid` (the largest grid of the stage), `seq_len` (its tokens,
    global ones included), `position` ("absolute" or "relative") and `block_index` (the block of
    its stage, from 0) are given when the constructor has a parameter of that name.

    Optional, found by name:
        arch_option: the option that `f` in an ARCH string sets (for example "window").
        positions: the kinds of positions it has, ("absolute",) or ("absolute", "relative").
        least_globals: the fewest global tokens it works with.
        fixed_size: True for one that works for a single image size.
        has_weights: False for one without attention weights that could be dropped.
        multiply_adds(grid): multiply-adds of one image, in closed form, of what runs.
        published_multiply_adds(grid): the same in the convention of the published table.
        published_note: why the two differ, in one sentence.
        gradient_note: why its gradient is not its derivative, in one sentence, where that is meant.
        window, reach: side of its windows, and how many windows to each side a window sees (0 if
            it does not say), for what padding to whole windows costs.
        set_training_step(step): told by the backbone before each training step, for random parts
            that are redrawn.
        examples: option sets that the conformance tests run.
    """

    def __call__(self, x: Tensor, grid: Grid) -> Tensor: ...


@runtime_checkable
class Redrawing(Protocol):
    """A mechanism with random parts that are redrawn while training."""

    def set_training_step(self, step: int) -> None:
        """Say which training step, counted from 0, comes next; redraw what is due, once a step."""


class Attention(nn.Module):
    """Base class of the mechanisms: checks, and the choice of implementation.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads.
        num_global: global tokens at the head of the sequence.
        attn_drop: dropout probability of attention weights, where a mechanism has such weights.
        proj_drop: dropout probability of the output.
        implementation: "fast", or "reference" for the mechanism's oracle, its plainest form.

    Raises:
        ValueError: for sizes that do not fit, naming both.
    """

    arch_option: ClassVar[str | None] = None
    positions: ClassVar[tuple[str, ...]] = ("absolute",)
    fixed_size: ClassVar[bool] = False
    has_weights: ClassVar[bool] = True
    published_note: ClassVar[str] = ""
    gradient_note: ClassVar[str] = ""
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    least_globals: ClassVar[int] = 0

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_global: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        implementation: str = "fast",
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} must be a positive multiple of num_heads {num_heads}")
        if num_global < self.least_globals:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.least_globals} global tokens,"
                f" got num_global {num_global}"
            )
        for name, probability in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0.0 <= probability < 1.0:
                raise ValueError(f"{name} {probability} is outside [0, 1)")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"unknown implementation {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.num_global = num_global
        self.attn_drop = attn_drop
        self.proj_drop = proj_drop
        self.implementation = implementation

    @property
    def scale(self) -> float:
        """`M ** -0.5`."""
        return float((self.dim // self.num_heads) ** -0.5)

    @property
    def dropout_p(self) -> float:
        """The dropout probability of attention weights now: 0 when evaluating."""
        return self.attn_drop if self.training else 0.0

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attend.

        Shapes: x (B, N, dim) with N = num_global + rows * columns; the result is alike.

        Raises:
            ValueError: where `x` does not have the tokens of `grid`, or not `dim` channels.
        """
        rows, columns = grid
        expected = (self.num_global + rows * columns, self.dim)
        if x.ndim != 3 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit grid {rows}x{columns} with"
                f" {self.num_global} global tokens: expected (B, {expected[0]}, {expected[1]})"
            )
        attend = self.reference if self.implementation == "reference" else self.attend
        return nn.functional.dropout(attend(x, grid), self.proj_drop, self.training)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        """The fast form: x (B, N, dim) -> (B, N, dim)."""
        raise NotImplementedError(f"{type(self).__name__}.attend")

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """The oracle: the plainest form of the same mechanism, slow, with the same parameters."""
        raise NotImplementedError(f"{type(self).__name__}.reference")

    def multiply_adds(self, grid: Grid) -> int:
        """Multiply-adds of matrix products and convolutions for one image, of what runs."""
        raise NotImplementedError(f"{type(self).__name__}.multiply_adds")

    def published_multiply_adds(self, grid: Grid) -> int | None:
        """The count in the convention of the published table; None where nothing was published."""
        return None


def accepted_options(factory: type) -> dict[str, inspect.Parameter]:
    """Return the keyword parameters of a mechanism's constructor, inherited `**` ones followed."""
    accepted: dict[str, inspect.Parameter] = {}
    for cls in inspect.getmro(factory):
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                accepted.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return accepted
