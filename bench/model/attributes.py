"""What modules keep in plain attributes, which no state dict holds, for a run to go on with."""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Elements of a tensor that is kept. Larger ones are tables, which a mechanism makes anew.
_MOST = 2**24
# Elements of a running average, of which there is one in each block of each step in hand.
_SMALL = 2**16
_PLAIN = bool | int | float | str | None
_OF_MODULES = vars(nn.Module()).keys()


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return what modules keep in plain attributes, by their names, as a checkpoint can hold it.

    Numbers, strings and flags stand for themselves. Tensors, random generators, and lists, tuples,
    deques and dictionaries of tensors and numbers are there too. Attributes of `torch.nn.Module`
    are not, nor is what holds parameters, buffers or views of them.
    """
    weights = {_address(tensor) for tensor in (*module.parameters(), *module.buffers())}
    # What two modules share stays shared.
    copies: dict[int, Tensor] = {}
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        for name, value in _own(part).items():
            with suppress(TypeError, NotImplementedError):
                found[f"{path}.{name}".lstrip(".")] = _held(value, weights, copies)
    return found


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `attributes` that are numbers, strings and flags."""
    return {name: held for name, held in state.items() if isinstance(held, _PLAIN)}


def own_losses(module: nn.Module) -> list[str]:
    """Names of plain attributes that are one number with a gradient, as losses of a module are."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name, value in _own(part).items()
        if isinstance(value, Tensor) and value.numel() == 1 and value.grad_fn is not None
    ]


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `attributes` that are others now."""
    return {
        name: value
        for name, value in now.items()
        if name not in before or not _are_equal(before[name], value)
    }


def restore(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give plain attributes the values that `attributes` returned."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    moved: dict[int, Tensor] = {}
    for name, held in state.items():
        path, _, attribute = name.rpartition(".")
        part = module.get_submodule(path)
        if isinstance(held, _PLAIN):
            setattr(part, attribute, held)
        elif held[0] == "generator":
            _set_state(getattr(part, attribute), held[1])
        else:
            structure, leaves, devices = held
            for leaf, place in zip(leaves, devices, strict=True):
                if isinstance(leaf, Tensor):
                    moved.setdefault(id(leaf), leaf if place == "cpu" else leaf.to(device))
            values = [moved.get(id(leaf), leaf) for leaf in leaves]
            setattr(
                part, attribute, pytree.tree_unflatten(values, pytree.treespec_loads(structure))
            )


LooseAttributes = list[tuple[nn.Module, dict[str, Any]]]
"""Plain attributes of each module."""


def loose_copies(module: nn.Module) -> LooseAttributes:
    """Copy what a call may change in place; `...` stands for what is larger than an average."""
    copies: dict[int, Any] = {}
    return [
        (part, {name: _loose_copy(value, copies) for name, value in _own(part).items()})
        for part in module.modules()
    ]


@contextmanager
def swapped(attributes: LooseAttributes) -> Iterator[None]:
    """Let modules have other plain attributes for a while."""
    now = [(part, _own(part)) for part, _ in attributes]
    _put(attributes)
    try:
        yield
    finally:
        _put(now)


def _own(part: nn.Module) -> dict[str, Any]:
    """Attributes without those of `torch.nn.Module`."""
    return {name: value for name, value in vars(part).items() if name not in _OF_MODULES}


def _put(attributes: LooseAttributes) -> None:
    for part, values in attributes:
        for name in _own(part).keys() - values.keys():
            del vars(part)[name]
        vars(part).update({name: value for name, value in values.items() if value is not ...})


def _loose_copy(value: Any, copies: dict[int, Any]) -> Any:
    leaves, structure = pytree.tree_flatten(value)
    if any(isinstance(leaf, Tensor) and leaf.numel() > _SMALL for leaf in leaves):
        return ...
    for leaf in leaves:
        if not isinstance(leaf, _PLAIN) and id(leaf) not in copies:
            copies[id(leaf)] = _leaf_copy(leaf)
    return pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], structure)


def _leaf_copy(leaf: Any) -> Any:
    if isinstance(leaf, torch.Generator):
        return leaf.clone_state()
    if isinstance(leaf, random.Random | np.random.Generator):
        return copy.deepcopy(leaf)
    return leaf.clone() if type(leaf) is Tensor and not leaf.requires_grad else leaf


def _held(value: Any, weights: set[int], copies: dict[int, Tensor]) -> Any:
    """What a checkpoint holds of a value.

    Raises:
        TypeError, NotImplementedError: where it cannot.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Generator):
        return "generator", value.get_state()
    if isinstance(value, random.Random):
        return "generator", value.getstate()
    if isinstance(value, np.random.Generator):
        state = dict(value.bit_generator.state)
        if not all(isinstance(part, _PLAIN) for part in pytree.tree_leaves(state)):
            raise TypeError
        return "generator", state
    leaves, structure = pytree.tree_flatten(value)
    if not all(isinstance(leaf, _PLAIN) or _is_kept(leaf, weights) for leaf in leaves):
        raise TypeError
    held = pytree.treespec_dumps(structure)
    if pytree.treespec_loads(held) != structure:
        raise TypeError
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    for name in tensors.keys() - copies.keys():
        copies[name] = tensors[name].to("cpu", copy=True)
    devices = [leaf.device.type if isinstance(leaf, Tensor) else "" for leaf in leaves]
    return held, [copies.get(id(leaf), leaf) for leaf in leaves], devices


def _is_kept(leaf: Any, weights: set[int]) -> bool:
    """Whether it is a tensor of its own, small enough to be kept."""
    if type(leaf) is not Tensor or leaf.requires_grad or leaf.is_meta:
        return False
    own = leaf.layout is torch.strided and _address(leaf) not in weights
    return own and leaf.numel() <= _MOST


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return type(one) is type(other) and bool(one == other)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
