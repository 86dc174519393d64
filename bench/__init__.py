"""Attention mechanisms in one detector, trained, evaluated and measured; public names below."""

import getpass
import importlib
import os
from typing import TYPE_CHECKING, Any

# Before torch starts its threads: how long a thread spins while it waits for the others. By default
# it is so long that any other busy process makes a step take many times as long; CHANGELOG.md says
# what was measured.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# torch calls a folder after the user, and its import fails where the user is a number without a
# name, as in a container.
try:
    getpass.getuser()
except (ImportError, KeyError, OSError):
    os.environ["USER"] = "nameless"

if TYPE_CHECKING:
    from bench.config.schema import RunConfig
    from bench.measure.flops import count_flops
    from bench.model.backbone import ViL
    from bench.model.detectors import build as build_detector
    from bench.model.weights import convert_classifier, load_published
    from bench.record import Record

__all__ = [
    "Record",
    "RunConfig",
    "ViL",
    "build_detector",
    "convert_classifier",
    "count_flops",
    "load_published",
    "run",
]
_PLACES = {
    "Record": "record:Record",
    "RunConfig": "config.schema:RunConfig",
    "ViL": "model.backbone:ViL",
    "build_detector": "model.detectors:build",
    "convert_classifier": "model.weights:convert_classifier",
    "count_flops": "measure.flops:count_flops",
    "load_published": "model.weights:load_published",
    # The package itself, which is called as `run.runner.run` is.
    "run": "run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, inner = _PLACES[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    return getattr(found, inner) if inner else found
