"""What makes a run repeat itself: the seeds of all generators, and sums in one order."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from attentions.reads import deterministic


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Unlike Lightning's function of the name it takes seeds of 64 bits and leaves the environment.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def in_one_order(device: torch.device) -> Iterator[None]:
    """Let torch add up in the same order each time, on the CPU; where it can.

    Two threads that add to the same element, as the gradient of `table[index]` does, would
    otherwise round as it happens. A GPU is left as it is: there it would cost time.
    """
    with deterministic(True) if device.type == "cpu" else nullcontext():
        yield


def global_state() -> tuple[Any, Any]:
    """Return what the global generators of Python and NumPy go on from."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


@contextmanager
def drawing_from(state: tuple[Any, Any]) -> Iterator[None]:
    """Let Python and NumPy draw from a state, and then go on as before."""
    before = global_state()
    _set(state)
    try:
        yield
    finally:
        _set(before)


def _set(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
