"""Batches that depend on nothing but the seed and the step.

So a run that resumes at a step sees exactly what an undisturbed one would have seen.
"""

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data import DataError
from bench.data.coco import CocoDataset, Target
from bench.data.images import NetworkSize, resize, to_float
from bench.errors import InputError

Sample = tuple[Tensor, Target]
Batch = tuple[list[Tensor], list[Target]]

_FLIP = 0.5
# An image is read with a byte a value, and resized with four.
_FLOAT_BYTES = 4


class DataWorkerError(DataError):
    """A process that reads data died, most often killed for want of memory."""

    kind = "data_worker"


@dataclass
class Pace:
    """How fast batches are read, and how long the caller waited for them.

    Where `waited` is near zero the data keeps up with the training; where it is near the whole
    time, more workers would help.

    Attributes:
        waited: seconds that the caller waited for batches since the last reset.
        reading: seconds that the same batches take to read at full speed: what each took where it
            was read, shared among the workers, which read side by side. What it costs to hand them
            over is not in it.
    """

    waited: float = 0.0
    reading: float = 0.0

    def reset(self) -> "Pace":
        """Return what was added up, and begin again at zero."""
        values = Pace(self.waited, self.reading)
        self.waited = self.reading = 0.0
        return values


@dataclass(frozen=True)
class _Order:
    """The endless order of training images: a permutation for each epoch.

    `groups` holds the indices of images that may share a batch, such as all landscape ones. With
    `repeats` each image comes that many times in a row, and an epoch has as many images as before:
    it sees the first of its permutation alone.
    """

    groups: tuple[tuple[int, ...], ...]
    batch_size: int
    seed: int
    repeats: int = 1

    def batches(self, start_step: int, steps: int) -> Iterator[list[tuple[int, int]]]:
        """Lists of (index, seed of the image's augmentation) for the steps from `start_step` on."""
        step, epoch = 0, 0
        carry: list[list[int]] = [[] for _ in self.groups]
        while step < steps:
            for batch in self._epoch(epoch, carry):
                if step >= steps:
                    return
                if step >= start_step:
                    first = step * self.batch_size
                    # Copies of an image apart, so that processes have different ones, as in DeiT.
                    spread = [i for k in range(self.repeats) for i in batch[k :: self.repeats]]
                    yield [(index, first + place) for place, index in enumerate(spread)]
                step += 1
            epoch += 1

    def _epoch(self, epoch: int, carry: list[list[int]]) -> Iterator[list[int]]:
        """Batches of one epoch; what does not fill a batch stays in `carry` for the next."""
        group_of = {index: number for number, group in enumerate(self.groups) for index in group}
        order = np.random.default_rng([self.seed, epoch]).permutation(sorted(group_of))
        for index in order.repeat(self.repeats)[: len(order)].tolist():
            waiting = carry[group_of[index]]
            waiting.append(index)
            if len(waiting) == self.batch_size:
                yield list(waiting)
                waiting.clear()


class Samples(Dataset[Sample]):
    """Samples that are read a batch at a time, by a clock."""

    def __getitems__(self, keys: Sequence[Any]) -> list[Any]:
        """The samples of a batch, or the error of one; last, the seconds that they took here."""
        start = time.perf_counter()
        try:
            samples: list[Any] = [self[key] for key in keys]
        except InputError as error:
            # Returned, not raised: a worker would wrap it in its traceback.
            samples = [error]
        return [*samples, time.perf_counter() - start]


class _TrainingSamples(Samples):
    """Samples by (index, augmentation seed): crowds left out, flipped by the seed."""

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        seed: int,
        flip: bool,
        masks: bool,
        network_size: NetworkSize | None,
    ) -> None:
        self.dataset, self.seed, self.flip, self.masks = dataset, seed, flip, masks
        self.network_size = network_size

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, place = key
        flip = np.random.default_rng([self.seed, place, 1]).random() < _FLIP
        size = None
        if self.network_size is not None:
            rng, count = (
                np.random.default_rng([self.seed, place, 2]),
                len(self.network_size.min_sizes),
            )
            size = self.network_size.of(*self.dataset.size(index), int(rng.integers(count)))
        image, target = self.dataset.read(
            index, size=size, flip=self.flip and flip, crowds=False, masks=self.masks
        )
        return (image, target) if size is None else fitted(image, target, size)


class _EvaluationSamples(Samples):
    """Images; of targets nothing is asked but whose they are."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset.read(index, masks=False)


def fitted(image: Tensor, target: Target, size: tuple[int, int]) -> Sample:
    """Say which size the network gets, and resize here what is smaller for it.

    Sizes and boxes alike are those that the detector would make of them.
    """
    target = target | {"size": torch.tensor(size)}
    height, width = image.shape[-2:]
    if height * width <= _FLOAT_BYTES * size[0] * size[1]:
        return image, target
    scale = target["boxes"].new_tensor([size[1] / width, size[0] / height] * 2)
    return resize(to_float(image), size), target | {"boxes": target["boxes"] * scale}


def training_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    num_workers: int = 0,
    flip: bool = True,
    masks: bool = True,
    network_size: NetworkSize | None = None,
    aspect_ratio_grouping: bool = False,
    rank: int = 0,
    world_size: int = 1,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    """Yield the batches of steps `start_step` to `steps - 1`.

    Images without an instance other than crowds are left out, and so are crowds. With
    `aspect_ratio_grouping` landscape and portrait images do not share a batch, which saves padding.

    Args:
        batch_size: images of a step, of all processes together.
        num_workers: processes that decode, which live as long as the iterator; 0 decodes here.
        masks: whether masks are decoded.
        network_size: the sizes that the detector resizes to. One is drawn here, is the target's
            "size", and what is smaller of this size than as stored comes in it: a step's memory
            does not grow with the stored size. None leaves all as it is.
        rank: which of `world_size` processes this one is; each has its own part of every batch, and
            the parts in order of rank are the batch of a single process.
        pace: receives the time that each batch took.

    Raises:
        InputError: where no image is left, or an image cannot be read.
        DataWorkerError: where a worker died.
        ValueError: for a batch that does not divide into `world_size` parts of an image or more.
    """
    dataset.require_instances("to train on")
    usable = [index for index in range(len(dataset)) if dataset.instances(index)]
    landscape = {index: dataset.size(index)[1] >= dataset.size(index)[0] for index in usable}
    groups: tuple[tuple[int, ...], ...] = (tuple(usable),)
    if aspect_ratio_grouping:
        groups = tuple(
            tuple(index for index in usable if landscape[index] is wide) for wide in (True, False)
        )
    yield from ordered_batches(
        _TrainingSamples(dataset, seed=seed, flip=flip, masks=masks, network_size=network_size),
        groups,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        steps=steps,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        pace=pace,
    )


def ordered_batches(
    samples: Samples,
    groups: tuple[tuple[int, ...], ...],
    *,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pace: Pace | None = None,
    repeats: int = 1,
) -> Iterator[Batch]:
    """Yield this process's share of the batches of steps `start_step` to `steps - 1`.

    Args:
        repeats: how often in a row each image comes, augmented anew.
        samples: read by (index, place), where the place in the endless order of images tells the
            augmentation of one from that of another.
        groups: indices of images that may share a batch.

    For the others and what is raised, see `training_batches`.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size is {batch_size}; a multiple of the {world_size} processes is needed"
            if world_size > 1
            else f"batch_size is {batch_size}; at least 1 is needed"
        )
    order = _Order(groups, batch_size, seed, repeats)
    share = batch_size // world_size
    own = slice(rank * share, (rank + 1) * share)
    batches = (batch[own] for batch in order.batches(start_step, steps))
    yield from load(samples, batches, num_workers, pace or Pace())


def evaluation_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    canvas: Callable[[int, int], tuple[int, int]] = lambda *_: (0, 0),
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield every image once, in the order of the annotation file but for those that share a batch.

    A batch is read when its turn is near and given up when the caller is done with it.

    Args:
        batch_size: images of a batch of this process, at most.
        canvas: the padded size that an image of a height and a width gets alone; only images of one
            such size share a batch, as a detector sees what it is padded to.
        rank: of `world_size` processes, each of which has every `world_size`-th image; no image is
            given to two.
        num_workers: as in `training_batches`.

    Raises:
        InputError: for an image that cannot be read.
        DataWorkerError: where a worker died.
    """
    alike = defaultdict(list)
    for index in range(rank, len(dataset), world_size):
        alike[canvas(*dataset.size(index))].append(index)
    batches = (
        own[start : start + batch_size]
        for own in alike.values()
        for start in range(0, len(own), batch_size)
    )
    yield from load(_EvaluationSamples(dataset), batches, num_workers, Pace())


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Turn PyTorch's errors about a dead worker into one clear `DataWorkerError`.

    The iterators here do so themselves; but PyTorch raises from a signal's handler, wherever the
    main thread is, so that a loop over batches has to stand in this as well.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataWorkerError(
            f"a process that reads data died ({' '.join(str(error).split())}); it is often killed"
            " for want of memory, which fewer data.workers need less of"
        ) from error


def load(
    samples: Samples, batches: Iterator[list[Any]], workers: int, pace: Pace
) -> Iterator[Batch]:
    """Yield the samples of each list of keys, read `workers` processes ahead."""
    start = time.perf_counter()
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        # A generator of its own: drawing the workers' seed must not move the caller's random state.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=prepare_worker,
        # A GPU copies from there fastest.
        pin_memory=torch.cuda.is_available(),
    )
    with clear_worker_errors():
        try:
            read = iter(loader)
        except OSError as error:
            raise DataWorkerError(
                f"cannot start the processes that read data: {error.strerror}; they share memory"
                " in /dev/shm, and data.workers=0 needs none"
            ) from error
        for batch in read:
            if isinstance(batch, InputError):
                raise batch
            images, targets, seconds = batch
            pace.reading += seconds / max(1, workers)
            pace.waited += time.perf_counter() - start
            yield images, targets
            # While the batch before is held here, it stays in memory.
            del batch, images, targets
            start = time.perf_counter()


def prepare_worker(_: int) -> None:
    """Set up a process that reads data."""
    # By default each tensor takes an open file in both processes, and a few batches of images with
    # their targets come to more than the 1024 that are usually allowed.
    torch.multiprocessing.set_sharing_strategy("file_system")
    # Ctrl-C reaches every process of a terminal, and SIGTERM every process of a job; the main one
    # ends its workers when it is done, with a second signal where one hangs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _collate(read: list[Any]) -> tuple[list[Tensor], list[Target], float] | InputError:
    """A batch, and the seconds that it took to read."""
    *samples, seconds = read
    if isinstance(samples[0], InputError):
        return samples[0]
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets), seconds
