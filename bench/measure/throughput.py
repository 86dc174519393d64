"""Images a second at batch 1 and at the best batch that fits, with percentiles and energy.

The batch is doubled until it is predicted not to fit the free memory, runs out of it, or gains
little. Each row is alone on the machine, in a process of its own.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.config.schema import RunConfig
from bench.measure.costs import counted, effort
from bench.measure.worker import Worker, WorkerError
from bench.system.devices import single_fabric

UNIT = "images/s"
# A doubling that gains less than this share is the last.
LEAST_GAIN = 0.03
_LARGEST = 1024
_WARM_UP_SECONDS = 2.0


def measure(
    config: RunConfig,
    mode: str,
    *,
    fits: Callable[[int | None], bool],
    root: Path | None = None,
    progress: Callable[[str], object] = lambda _doing: None,
) -> dict[str, Any]:
    """Return what a row does in a second, by batch, and `notes`; see `results/README.md`.

    Args:
        config: of the row; its batch size does not matter.
        mode: "inference" or "training".
        fits: whether a peak of so many bytes, None if it is not known, fits the free memory.
        root: the folder of its data.
        progress: called with what is being measured.

    Raises:
        WorkerError: if not even one image can be measured.
    """
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    batch, ended = 1, f"batch {_LARGEST} is the largest that is tried"
    how = dataclasses.replace(effort(config), max_warm_up_seconds=_WARM_UP_SECONDS)
    worker = Worker(threads=torch.get_num_threads())
    try:
        while batch <= _LARGEST:
            sized = dataclasses.replace(
                config, profile=dataclasses.replace(config.profile, batch_size=batch)
            )
            if found and not fits(_need(sized, mode)):
                ended = f"batch {batch} is predicted not to fit the free memory"
                break
            progress(f"{mode}, batch {batch}")
            try:
                worker.ask("build", sized.as_dict(), "detector", root)
                timed = worker.ask("latency", (mode,), how)
                spent = worker.ask("energy", mode)
            except WorkerError as error:
                if not found:
                    raise
                ended = f"batch {batch} was not measured: {error}"
                break
            rate = batch / timed[mode]["median"]
            notes += [f"batch {batch}, {note}" for note in timed["notes"]]
            found.append(
                percentiles(timed[mode]["samples"])
                | {"batch_size": batch, "images_per_second": rate, "energy": spent}
            )
            if len(found) > 1 and rate < (1 + LEAST_GAIN) * found[-2]["images_per_second"]:
                ended = f"batch {batch} gained less than {LEAST_GAIN:.0%}"
                break
            batch *= 2
    finally:
        worker.close()
    best = max(found, key=lambda one: float(one["images_per_second"]))
    return {
        "unit": UNIT,
        "batches": found,
        "best": best["batch_size"],
        "ended": ended,
        "notes": notes,
    }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles, and the times that 90 and 95 in 100 calls do not exceed."""
    at = statistics.quantiles(samples, n=20, method="inclusive")
    return {"q1": at[4], "median": at[9], "q3": at[14], "p90": at[17], "p95": at[18]}


def _need(config: RunConfig, mode: str) -> int | None:
    """Predict the peak of a batch, in bytes; None where that cannot be done."""
    device = single_fabric(config).device.type
    sections, _ = counted(config, (mode,), ("memory",), device=device)
    found = sections["memory"]["predicted"].get(mode)
    return None if found is None else int(found["total"])
