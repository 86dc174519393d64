"""How fast batches for training are read."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.data.coco import CocoDataset
from bench.data.loader import training_batches

_WARMUP = 2
_ENDLESS = 1_000_000


@dataclass(frozen=True)
class Speed:
    """What a number of worker processes achieves.

    Attributes:
        workers: processes; 0 where this one decodes.
        images: how many were read in `seconds`, the first batches not counted.
    """

    workers: int
    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """The rate."""
        return self.images / self.seconds


def measure(
    dataset: CocoDataset, workers: Sequence[int], *, batch_size: int, seconds: float
) -> list[Speed]:
    """Read training batches as fast as each number of workers can.

    Args:
        batch_size: images of a batch.
        seconds: for how long, at the least, after the workers have filled their queues.

    Raises:
        InputError: for data that cannot be read.
    """
    return [_measure(dataset, count, batch_size, seconds) for count in workers]


def _measure(dataset: CocoDataset, workers: int, batch_size: int, seconds: float) -> Speed:
    batches = training_batches(
        dataset, batch_size=batch_size, seed=0, steps=_ENDLESS, num_workers=workers
    )
    # What the workers had ready when the clock starts is not of this time; there are two batches a
    # worker at the most.
    for _ in range(_WARMUP * max(workers, 1)):
        next(batches)
    start = time.perf_counter()
    images, taken = 0, 0.0
    while taken < seconds or not images:
        images += len(next(batches)[0])
        taken = time.perf_counter() - start
    return Speed(workers, images, taken)
