"""The table of mechanisms that `register` fills."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=type[nn.Module])

_CLASSES: dict[str, type[nn.Module]] = {}


def registered() -> dict[str, type[nn.Module]]:
    """Return the registered classes by name."""
    return dict(_CLASSES)


def register(name: str) -> Callable[[Module], Module]:
    """Register a class under `name`, the word users and published tables know it by.

    Raises:
        ValueError: if the name is taken.
    """

    def add(cls: Module) -> Module:
        if name in _CLASSES:
            raise ValueError(f"attention {name!r} is already registered by {_CLASSES[name]}")
        _CLASSES[name] = cls
        return cls

    return add
