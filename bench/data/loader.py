"""Batches that depend on nothing but the seed and the step.

So a run that resumes at a step sees exactly what an undisturbed one would have seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import horizontal_flip_image, horizontal_flip_mask

from bench.data.coco import CocoDataset, Target
from bench.errors import InputError

Sample = tuple[Tensor, Target]
Batch = tuple[list[Tensor], list[Target]]

_FLIP = 0.5


@dataclass(frozen=True)
class _Order:
    """The endless order of training images: a permutation for each epoch.

    `groups` holds the indices of images that may share a batch, such as all landscape ones.
    """

    groups: tuple[tuple[int, ...], ...]
    batch_size: int
    seed: int

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
                    yield [(index, first + place) for place, index in enumerate(batch)]
                step += 1
            epoch += 1

    def _epoch(self, epoch: int, carry: list[list[int]]) -> Iterator[list[int]]:
        """Batches of one epoch; what does not fill a batch stays in `carry` for the next."""
        group_of = {index: number for number, group in enumerate(self.groups) for index in group}
        order = np.random.default_rng([self.seed, epoch]).permutation(sorted(group_of))
        for index in order.tolist():
            waiting = carry[group_of[index]]
            waiting.append(index)
            if len(waiting) == self.batch_size:
                yield list(waiting)
                waiting.clear()


class _TrainingSamples(Dataset[Sample | InputError]):
    """Samples by (index, augmentation seed): crowds left out, flipped by the seed."""

    def __init__(self, dataset: CocoDataset, *, seed: int, flip: bool) -> None:
        self.dataset, self.seed, self.flip = dataset, seed, flip

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        index, place = key
        try:
            image, target = self.dataset[index]
        except InputError as error:
            # Returned, not raised: a worker would wrap it in its traceback.
            return error
        keep = target["iscrowd"] == 0
        target = {k: v if k == "image_id" else v[keep] for k, v in target.items()}
        if self.flip and np.random.default_rng([self.seed, place, 1]).random() < _FLIP:
            return flipped(image, target)
        return image, target


class _EvaluationSamples(Dataset[Sample | InputError]):
    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | InputError:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def flipped(image: Tensor, target: Target) -> Sample:
    """Mirror an image (3, H, W) and its target left to right."""
    width = image.shape[-1]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    masks = horizontal_flip_mask(target["masks"])
    return horizontal_flip_image(image), target | {"boxes": boxes, "masks": masks}


def training_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    num_workers: int = 0,
    flip: bool = True,
    aspect_ratio_grouping: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of steps `start_step` to `steps - 1`.

    Images without an instance that is no crowd are left out, and so are crowds. With
    `aspect_ratio_grouping` landscape and portrait images do not share a batch, which saves padding.

    Raises:
        InputError: where no image is left, or an image cannot be read.
        ValueError: for a batch of no images.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    usable = [index for index in range(len(dataset)) if dataset.instances(index)]
    if not usable:
        raise InputError(
            f"{dataset.annotation_file}: no image has an instance to train on (crowds do not count)"
        )
    landscape = {index: dataset.size(index)[1] >= dataset.size(index)[0] for index in usable}
    groups: tuple[tuple[int, ...], ...] = (tuple(usable),)
    if aspect_ratio_grouping:
        groups = tuple(
            tuple(index for index in usable if landscape[index] is wide) for wide in (True, False)
        )
    order = _Order(groups, batch_size, seed)
    yield from _load(
        _TrainingSamples(dataset, seed=seed, flip=flip),
        order.batches(start_step, steps),
        num_workers,
    )


def evaluation_batches(
    dataset: CocoDataset, *, batch_size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """Yield every image once, in the order of the annotation file.

    Raises:
        InputError: for an image that cannot be read.
    """
    indices = range(len(dataset))
    batches = (list(indices[i : i + batch_size]) for i in range(0, len(dataset), batch_size))
    yield from _load(_EvaluationSamples(dataset), batches, num_workers)


def _load(
    samples: Dataset[Sample | InputError], batches: Iterator[list[Any]], workers: int
) -> Iterator[Batch]:
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        # A generator of its own: drawing the workers' seed must not move the caller's random state.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_share_by_name,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _share_by_name(_: int) -> None:
    """Let a worker pass tensors by file name.

    By default each tensor takes an open file in both processes, and a few batches of images with
    their targets come to more than the 1024 that are usually allowed.
    """
    torch.multiprocessing.set_sharing_strategy("file_system")


def _collate(samples: Sequence[Sample | InputError]) -> Batch | InputError:
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        images.append(sample[0])
        targets.append(sample[1])
    return images, targets
