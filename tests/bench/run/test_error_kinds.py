"""What ended a run, as its record says it."""

import pytest
import torch

from bench.data.loader import DataWorkerError
from bench.errors import DivergedError, InputError
from bench.record import ERROR_KINDS, error_section


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (InputError("no such row"), "input"),
        (DivergedError("the loss was nan"), "diverged"),
        (DataWorkerError("a process died"), "data_worker"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (ValueError("anything else"), "error"),
    ],
)
def test_every_error_has_its_kind(error: BaseException, kind: str) -> None:
    section = error_section(error)
    assert section["kind"] == kind
    assert kind in ERROR_KINDS
    assert section["message"] == (str(error) or type(error).__name__)
    assert type(error).__name__ in section["traceback"]
