"""A record with nothing but what each must have, and records with other values."""

import copy
import functools
import operator
from collections.abc import Mapping
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


def changed(record: Record, values: Mapping[str, Any]) -> Record:
    """The record with other values at places such as `evaluation.box.AP`."""
    content = copy.deepcopy(vars(record))
    for place, value in values.items():
        *above, last = place.split(".")
        functools.reduce(operator.getitem, above, content)[last] = value
    return Record(**content)
