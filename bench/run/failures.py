"""What ended a run, for its record."""

import traceback
from typing import Any

import torch

from bench.data.loader import DataWorkerError
from bench.errors import InputError
from bench.run.train import DivergedError

_KINDS: dict[type[BaseException], str] = {
    KeyboardInterrupt: "interrupted",
    InputError: "input",
    DivergedError: "diverged",
    DataWorkerError: "data_worker",
    torch.OutOfMemoryError: "out_of_memory",
    MemoryError: "out_of_memory",
}


def error_section(error: BaseException) -> dict[str, Any]:
    """The `error` section of a record."""
    return {
        "kind": _kind(error),
        "message": " ".join(str(error).split()) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }


def _kind(error: BaseException) -> str:
    # What torch raises on the CPU has no type of its own.
    other = "out_of_memory" if "can't allocate memory" in str(error) else "error"
    return next((kind for type_, kind in _KINDS.items() if isinstance(error, type_)), other)
