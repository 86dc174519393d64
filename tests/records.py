"""A record with nothing but what each must have."""

from typing import Any

from bench.record import Record

MODEL = {
    "backbone": "ViL-Small",
    "method": "mask_rcnn",
    "library": "torchvision",
    "library_version": "0.26.0",
    "attention": "longformer",
    "arch": "l1,h2,d32,n1",
    "drop_path": 0.0,
    "schedule": "1x",
}


def plain(**changes: Any) -> Record:
    """A made-up record of a success, with some fields changed."""
    values: dict[str, Any] = {
        "suite": "made up",
        "row": "ViL",
        "key": "a key",
        "status": "done",
        "created": "2025-01-01T00:00:00+00:00",
        "seed": 0,
        "config": {},
        "environment": {},
        "model": MODEL,
    }
    return Record(**(values | changes))
