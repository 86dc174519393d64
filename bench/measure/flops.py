"""Multiply-adds of a backbone, a detector or a mechanism, by part.

Counted from the operators that run (`operators.py`), on the meta device; or, in the published
convention, with attention by the formulas of the published table.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bench.errors import InputError, choose
from bench.measure.operators import count_call
from bench.model.backbone import AttentionPlace, ViL

Convention = Literal["actual", "published"]
CONVENTIONS = ("actual", "published")
UNIT = "multiply-adds"

# The published totals hold every part but this one.
OUTSIDE_TOTAL = ("mask_head",)
_STAGE_1_STRIDE = 4
_META = torch.device("meta")


@dataclass(frozen=True)
class FlopReport:
    """Multiply-adds of a forward pass of one image.

    Attributes:
        total: what published tables count: the backbone without its classification head, FPN, RPN
            head and box head, or RetinaNet head. The mask head is not in it.
        by_part: by "stage1" …, "fpn", "rpn", "box_head", "mask_head", "retinanet_head" (whichever
            there are), or "attention" for a bare mechanism. Without "mask_head" they sum to
            `total`.
        by_operator: by operator, of what `total` holds. In the published convention attention is
            one entry a mechanism, "formula of <class>".
        uncounted: calls of operators without a formula, in all parts; empty in a complete count.
        image_size: (height, width) in pixels.
        proposals: boxes in the box head.
        detections: boxes in the mask head.
        convention: "actual" or "published".
        unit: "multiply-adds".
    """

    total: int
    by_part: Mapping[str, int]
    by_operator: Mapping[str, int]
    uncounted: Mapping[str, int]
    image_size: tuple[int, int]
    proposals: int
    detections: int
    convention: Convention
    unit: str = UNIT

    @property
    def total_with_mask_head(self) -> int:
        """Multiply-adds of all parts."""
        return sum(self.by_part.values())


@dataclass(frozen=True)
class Audit:
    """Two counts of one mechanism that know nothing of each other.

    Attributes:
        declared: the mechanism's `multiply_adds(grid)`; None where it declares nothing.
        operators: counted from the operators that ran.
        uncounted: calls of operators without a formula.
    """

    declared: int | None
    operators: int
    uncounted: Mapping[str, int]

    @property
    def disagreement(self) -> float | None:
        """|declared - operators| / operators; None where nothing is declared."""
        if self.declared is None:
            return None
        if self.operators == 0:
            return 0.0 if self.declared == 0 else math.inf
        return abs(self.declared - self.operators) / self.operators


@runtime_checkable
class _DividesIntoParts(Protocol):
    def part_calls(
        self, image_size: tuple[int, int], *, proposals: int, detections: int
    ) -> Iterable[Any]: ...


def count(
    module: nn.Module,
    *,
    image_size: tuple[int, int] = (800, 1344),
    grid: tuple[int, int] | None = None,
    proposals: int = 1000,
    detections: int = 100,
    convention: Convention = "actual",
) -> FlopReport:
    """Count the multiply-adds of one image through a backbone, a detector or a bare mechanism.

    The module may be on any device, the meta device included; it is neither moved nor changed, and
    counted as in evaluation.

    Args:
        module: a `ViL`, a detector (it has `part_calls`), or an attention module (it has `dim` and
            `num_global`).
        image_size: (height, width) in pixels; padded to the backbone's total stride.
        grid: (rows, columns) for an attention module; by default that of stage 1, `image_size` / 4.
        proposals: boxes in the box head of a detector.
        detections: boxes in the mask head of a detector.
        convention: "actual", or "published": attention by the formulas of the published table,
            everything else as it runs.

    Raises:
        InputError: for an unknown convention, sizes that are not positive, a mechanism without a
            published formula, or a module that is none of the three.
    """
    choose(convention, CONVENTIONS, "FLOP convention")
    _check_positive(image_size=image_size, proposals=proposals, detections=detections, grid=grid)
    if isinstance(module, _DividesIntoParts):
        calls = module.part_calls(image_size, proposals=proposals, detections=detections)
        parts = [
            part
            for call in calls
            for part in _count_part(
                call.name,
                call.module,
                call.make_inputs(_META, _dtype(module)),
                image_size,
                convention,
            )
        ]
    elif isinstance(module, ViL):
        images = torch.empty(1, 3, *image_size, device=_META, dtype=_dtype(module))
        parts = _count_part("backbone", module, (images,), image_size, convention)
    else:
        grid = grid or (image_size[0] // _STAGE_1_STRIDE, image_size[1] // _STAGE_1_STRIDE)
        parts = [_count_attention(module, grid, convention)]
    inside = [part for part in parts if part.name not in OUTSIDE_TOTAL]
    by_operator = _merge(part.by_operator for part in inside)
    return FlopReport(
        total=sum(by_operator.values()),
        by_part={part.name: sum(part.by_operator.values()) for part in parts},
        by_operator=dict(sorted(by_operator.items())),
        uncounted=dict(sorted(_merge(part.uncounted for part in parts).items())),
        image_size=image_size,
        proposals=proposals,
        detections=detections,
        convention=convention,
    )


def audit(attention: nn.Module, grid: tuple[int, int]) -> Audit:
    """Compare what a mechanism declares with what its operators do, for one image on `grid`."""
    declare = getattr(attention, "multiply_adds", None)
    counted = count_call(attention, (tokens(attention, grid), grid))
    return Audit(
        declared=None if declare is None else declare(grid),
        operators=counted.total,
        uncounted=counted.uncounted,
    )


@dataclass(frozen=True)
class _Part:
    name: str
    by_operator: Mapping[str, int]
    uncounted: Mapping[str, int]


def _count_part(
    name: str,
    module: nn.Module,
    inputs: tuple[object, ...],
    image_size: tuple[int, int],
    convention: Convention,
) -> list[_Part]:
    """Count one part of a detector; a backbone becomes a part for each of its stages."""
    counted = count_call(module, inputs)
    found = [(path, part) for path, part in module.named_modules() if isinstance(part, ViL)]
    if not found:
        return [_Part(name, counted.by_operator, counted.uncounted)]
    path, vil = found[0]
    root = ".".join(filter(None, (type(module).__name__, path)))
    padded = (
        math.ceil(image_size[0] / vil.stride) * vil.stride,
        math.ceil(image_size[1] / vil.stride) * vil.stride,
    )
    places = list(vil.attention_places())
    parts = []
    for layer in vil.channels:
        operators = _subtree(counted.by_module, f"{root}.{layer}", vil.get_submodule(layer))
        if convention == "published":
            for place in places:
                if place.name.startswith(f"{layer}."):
                    operators.subtract(counted.by_module[f"{root}.{place.name}"])
                    operators[_formula_name(place.module)] += _published(place, padded)
        parts.append(_Part(layer.replace("layer", "stage"), +operators, {}))
    rest = Counter(counted.by_operator)
    for layer in vil.channels:
        rest.subtract(_subtree(counted.by_module, f"{root}.{layer}", vil.get_submodule(layer)))
    # What runs outside the stages belongs to the part too; a plain ViL has nothing there.
    if +rest:
        parts.append(_Part(name, +rest, {}))
    parts[-1] = _Part(parts[-1].name, parts[-1].by_operator, counted.uncounted)
    return parts


def _subtree(
    by_module: Mapping[str, Mapping[str, int]], name: str, module: nn.Module
) -> Counter[str]:
    """Operators within a module, or, where it only holds modules and never runs, within those."""
    if name in by_module:
        return Counter(by_module[name])
    children = module.named_children()
    return _merge(_subtree(by_module, f"{name}.{child}", part) for child, part in children)


def _merge(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for one in counts:
        merged.update(one)
    return merged


def _count_attention(module: nn.Module, grid: tuple[int, int], convention: Convention) -> _Part:
    counted = count_call(module, (tokens(module, grid), grid))
    by_operator = counted.by_operator
    if convention == "published":
        by_operator = {_formula_name(module): _published_formula(module, grid)}
    return _Part("attention", by_operator, counted.uncounted)


def tokens(attention: nn.Module, grid: tuple[int, int], *, device: torch.device = _META) -> Tensor:
    """Tokens of one image for a mechanism: zeros (1, num_global + rows * columns, dim).

    Raises:
        InputError: for a module that does not say its `dim` and `num_global`.
    """
    num_global, dim = getattr(attention, "num_global", None), getattr(attention, "dim", None)
    if not (isinstance(num_global, int) and isinstance(dim, int)):
        raise InputError(
            f"cannot count {type(attention).__name__}: it is no ViL, has no part_calls as detectors"
            " have, and no whole numbers dim and num_global as attention modules have"
        )
    return torch.zeros(
        1, num_global + grid[0] * grid[1], dim, device=device, dtype=_dtype(attention)
    )


def _dtype(module: nn.Module) -> torch.dtype:
    kinds = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(kinds, torch.get_default_dtype())


def _formula_name(attention: nn.Module) -> str:
    return f"formula of {type(attention).__name__}"


def _published(place: AttentionPlace, image_size: tuple[int, int]) -> int:
    return _published_formula(place.module, place.grid(image_size))


def _published_formula(attention: nn.Module, grid: tuple[int, int]) -> int:
    declare = getattr(attention, "published_multiply_adds", None)
    multiply_adds = None if declare is None else declare(grid)
    if multiply_adds is None:
        raise InputError(
            f"{type(attention).__name__} has no count in the convention 'published', which knows"
            " only mechanisms of the published table; use the convention 'actual'"
        )
    return int(multiply_adds)


def _check_positive(**sizes: int | tuple[int, int] | None) -> None:
    for name, value in sizes.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number < 1 for number in numbers):
            raise InputError(f"{name} {value} must be positive")
