"""Tensors that follow from shapes alone, such as masks and indices, kept from one call to the next.

They are kept outside of the modules, which stay free of state: copies, pickles and state dicts do
not hold them, and modules of one shape share them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

# Bytes kept on all devices together; what was used longest ago goes first.
LARGEST_CACHE = 2**26

Make = Callable[..., Tensor]

_kept: OrderedDict[Hashable, Tensor] = OrderedDict()
_lock = threading.Lock()


def cached(make: Make, *shapes: Hashable, like: Tensor) -> Tensor:
    """Return `make(*shapes, device=like.device, dtype=like.dtype)`, made once and kept.

    The result is shared between calls and threads: it must not be written to. It has no gradient.
    It is made anew where it could not be used later: without data (meta and fake tensors), in
    graphs that are compiled or captured, and for subclasses of tensors.

    Args:
        make: a function of a module, of its arguments alone.
        shapes: what it depends on, besides device and dtype.
        like: a tensor of the call at hand.
    """
    if torch.compiler.is_compiling() or not has_data(like):
        return make(*shapes, device=like.device, dtype=like.dtype)
    stream = None
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return make(*shapes, device=like.device, dtype=like.dtype)
        # What one stream makes, another may read too early.
        stream = torch.cuda.current_stream(like.device).cuda_stream
    key = (make.__module__, make.__qualname__, shapes, like.device, like.dtype, stream)
    with _lock:
        found = _kept.get(key)
        if found is not None:
            _kept.move_to_end(key)
            return found
    # Tensors made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        made = make(*shapes, device=like.device, dtype=like.dtype)
    if has_data(made):
        _keep(key, made)
    return made


def has_data(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, not on the meta device nor of a subclass, as fake ones."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_meta


def cached_bytes() -> int:
    """Bytes that are kept now."""
    with _lock:
        return sum(map(_bytes, _kept.values()))


def clear() -> None:
    """Forget everything."""
    with _lock:
        _kept.clear()


def _keep(key: Hashable, made: Tensor) -> None:
    with _lock:
        _kept[key] = made
        total = sum(map(_bytes, _kept.values()))
        while total > LARGEST_CACHE:
            total -= _bytes(_kept.popitem(last=False)[1])


def _bytes(x: Tensor) -> int:
    # Of the storage, which a view keeps alive in full.
    return x.untyped_storage().nbytes()
