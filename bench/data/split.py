"""What a run is given: its data, checked before it costs time, and the images it is measured on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image, resize_mask

from bench.config.schema import RunConfig
from bench.data.coco import Categories, CocoDataset, Target
from bench.data.generated import generate
from bench.data.images import to_float
from bench.errors import InputError
from bench.system import processes as launch
from bench.system.devices import check_device

# Data sets up to this size are read whole before the first run.
_DECODED_AT_START = 2000
_SHOWN = 5


def data_root(config: RunConfig, output: Path) -> Path:
    """The folder of the run's data; generated data is made where it is missing."""
    if config.data.path is not None:
        return Path(config.data.path)
    generated = config.data.generated
    size = (generated.image_size[0], generated.image_size[1])
    name = f"generated-{generated.seed}-{generated.train_images}-{generated.val_images}"
    return generate(
        output / "data" / f"{name}-{size[0]}x{size[1]}",
        seed=generated.seed,
        train_images=generated.train_images,
        val_images=generated.val_images,
        image_size=size,
    )


def open_split(config: RunConfig, root: Path, split: str) -> CocoDataset:
    """Read one split as the run's configuration says."""
    return CocoDataset(root, split, degenerate_boxes=config.data.degenerate_boxes)


def check_data(
    configs: Sequence[RunConfig], output: Path, *, processes: int | None = None
) -> list[str]:
    """Read every split of the runs and return what is odd but usable, a line each.

    Args:
        processes: how many each run will have, if they are not started yet.

    Raises:
        InputError: for data that cannot be used; before any run has cost time.
    """
    lines: dict[str, None] = {}
    seen: dict[tuple[Path, str, str], Categories] = {}
    for config in configs:
        local = launch.World(size=processes, local_size=processes) if processes else None
        check_device(config, local)
        if config.train.init is not None and not Path(config.train.init).is_file():
            raise InputError(f"train.init={config.train.init}: no such file")
        root = data_root(config, output)
        splits = [config.data.train_split, *config.evaluate.splits]
        places = [(root, split, config.data.degenerate_boxes) for split in splits]
        for place in places:
            if place in seen:
                continue
            dataset = open_split(config, root, place[1])
            seen[place] = dataset.categories
            found = dataset.check(decode=len(dataset) <= _DECODED_AT_START)
            # What the generator leaves empty it does on purpose.
            if config.data.path is not None:
                lines |= dict.fromkeys(found)
        check_categories({place[1]: seen[place] for place in places}, root)
    return list(lines)


def check_categories(found: Mapping[str, Categories], root: Path) -> None:
    """Compare the categories of the first split, which is trained on, with those of the others.

    Labels count categories in the order of their ids: with one more or less, each that comes after
    it would be taken for another.

    Args:
        found: id and name of each category, by split.

    Raises:
        InputError: where they are not the same.
    """
    (first, trained), *others = found.items()
    for split, own in others:
        apart = [
            f"only {where} has {_named(categories)}"
            for where, categories in (
                (first, sorted(set(trained) - set(own))),
                (split, sorted(set(own) - set(trained))),
            )
            if categories
        ]
        if apart:
            raise InputError(
                f"{root}: the categories of {split} are not those of {first}: {'; '.join(apart)};"
                " both annotation files must list the same ids and names, also of those without"
                " an instance"
            )


def _named(categories: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f"{id_} {name!r}" for id_, name in categories[:_SHOWN])
    more = len(categories) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def profile_batch(
    dataset: CocoDataset, size: tuple[int, int], count: int
) -> tuple[list[Tensor], list[Target]]:
    """The first `count` images with instances, stretched to `size` (height, width)."""
    usable = [index for index in range(len(dataset)) if dataset.instances(index)]
    images, targets = [], []
    for place in range(count):
        image, target = dataset[usable[place % len(usable)]]
        height, width = image.shape[-2:]
        keep = target["iscrowd"] == 0
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        images.append(resize_image(to_float(image), list(size)))
        targets.append(
            {
                "image_id": target["image_id"],
                "boxes": target["boxes"][keep] * scale,
                "labels": target["labels"][keep],
                "masks": resize_mask(target["masks"][keep], list(size)),
            }
        )
    return images, targets
