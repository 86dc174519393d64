"""What actually ran: back ends of fused attention, compiled or not, and dtypes of the products.

Read from the trace of torch's profiler, which sees every operator that runs, those of the backward
pass and of compiled functions too, and changes none of them. A call of
`scaled_dot_product_attention` whose back end is "math" keeps all its scores in memory; where fused
back ends exist (CPU and CUDA both have them), that is a fallback that torch takes without a word.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

SDPA_BACK_ENDS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_fused_attention_overrideable": "overrideable",
    "aten::_scaled_dot_product_attention_math": "math",
    "aten::_native_multi_head_attention": "native multi-head",
}
_MATH = "math"
_MATRIX_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "mv"))
_CONVOLUTIONS = frozenset(("aten::convolution", "aten::convolution_backward"))
_COMPILED = "Torch-Compiled Region"
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "c10::Half": "float16",
    "c10::BFloat16": "bfloat16",
}
# Of `_scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, …)`.
_MASK, _DROPOUT = 3, 4


@dataclass(frozen=True)
class Ran:
    """What ran in a call.

    Attributes:
        sdpa: calls of fused attention by back end: "flash", "efficient", "cudnn", "math", …; empty
            if there were none.
        dtypes: of the operands of products, convolutions and fused attention; "float32 as tf32"
            where a GPU was allowed to round them.
        compiled: whether anything ran compiled by `torch.compile`.
        notes: silent fallbacks, in words.
    """

    sdpa: Mapping[str, int]
    dtypes: tuple[str, ...]
    compiled: bool
    notes: tuple[str, ...]


def what_ran(fn: Callable[[], object], *, device: torch.device | str = "cpu") -> Ran:
    """Run `fn` once, untimed, and say what ran.

    Args:
        fn: the work, called before if it compiles anything.
        device: where it runs; on CUDA products of float32 may be rounded to TF32.
    """
    # Without it, a build for CUDA complains on the standard error of a machine without a GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    # `torch.profiler.profile` makes a Python object of every event, which takes longer than they.
    with profile(record_shapes=True) as trace:
        fn()
    results: Any = trace.kineto_results
    on_cuda = torch.device(device).type == "cuda"
    sdpa: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    dtypes: set[str] = set()
    compiled = False
    for event in results.events():
        name = event.name()
        compiled = compiled or name.startswith(_COMPILED)
        back_end = SDPA_BACK_ENDS.get(name)
        if back_end is not None:
            sdpa[back_end] += 1
        if back_end == _MATH:
            causes[_cause(event)] += 1
        if name in _MATRIX_PRODUCTS or name in _CONVOLUTIONS or back_end is not None:
            rounded = on_cuda and _tf32(name)
            dtypes.update(_operands(event, as_tf32=rounded))
    return Ran(
        sdpa=dict(sorted(sdpa.items())),
        dtypes=tuple(sorted(dtypes)),
        compiled=compiled,
        notes=_fallbacks(sdpa, causes),
    )


def _fallbacks(sdpa: Counter[str], causes: Counter[str]) -> tuple[str, ...]:
    if not sdpa[_MATH]:
        return ()
    listed = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    return (
        f"{sdpa[_MATH]} of {sdpa.total()} calls of scaled_dot_product_attention fell back from a"
        f" fused back end to math ({listed})",
    )


def _cause(event: Any) -> str:
    """What sets a call apart that no fused back end took."""
    dropout = event.concrete_inputs()[_DROPOUT]
    if isinstance(dropout, float) and dropout > 0:
        return "with dropout"
    return "with a mask" if event.dtypes()[_MASK] else "without mask or dropout"


def _operands(event: Any, *, as_tf32: bool) -> set[str]:
    """Dtypes of the tensors among the first three arguments."""
    kinds = zip(event.dtypes()[:3], event.shapes()[:3], strict=True)
    names = {_DTYPES.get(kind, kind) for kind, shape in kinds if shape and "Scalar" not in kind}
    if as_tf32 and "float32" in names:
        names = names - {"float32"} | {"float32 as tf32"}
    return names - {""}


def _tf32(operator: str) -> bool:
    """Whether an operator may round float32 to TF32 on a GPU; fused attention follows products."""
    if operator in _CONVOLUTIONS:
        return torch.backends.cudnn.allow_tf32
    return torch.backends.cuda.matmul.allow_tf32
