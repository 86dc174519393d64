"""What a run is given: its data, checked before it costs time, and the images it is measured on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image

from bench.config.schema import CLASSIFIER, DataConfig, RunConfig
from bench.data import check, classes
from bench.data.coco import MOST_FOUND, Categories, CocoDataset, Target
from bench.data.findings import quoted
from bench.data.generated import data_root
from bench.data.images import NetworkSize, to_float
from bench.data.layout import Place, find
from bench.errors import InputError, some
from bench.system import processes as launch
from bench.system.devices import check_device

# Pixels a side below which a detector finds next to nothing, the stride of the finest map, and the
# share of objects from which on that decides on AP.
_FEW_PIXELS, _MANY = 4, 0.1

_said: dict[tuple[tuple[str, str, int], ...], list[str]] = {}


def named_files(data: DataConfig, split: str) -> tuple[Path | None, Path | None]:
    """Return annotation file and folder of images where the configuration names them."""
    file = data.train_file if split == data.train_split else data.val_file
    return (
        None if file is None else Path(file),
        None if data.images is None else Path(data.images),
    )


def find_split(config: RunConfig, split: str) -> Place | None:
    """Where a split is, or None where it is generated.

    Raises:
        InputError: where it is not there.
    """
    data = config.data
    file, images = named_files(data, split)
    return None if data.path is None else find(Path(data.path), split, file=file, images=images)


def open_split(config: RunConfig, root: Path, split: str) -> CocoDataset:
    """Read one split as the run's configuration says."""
    data = config.data
    file, images = named_files(data, split)
    return CocoDataset(
        root,
        split,
        file=file,
        images=images,
        degenerate_boxes=data.degenerate_boxes,
        deep_white=data.deep_white,
    )


def open_splits(config: RunConfig, root: Path) -> list[CocoDataset]:
    """Read the split that is trained on and, after it, those to evaluate on.

    Raises:
        InputError: for data that cannot be used, splits of different classes, or one without an
            instance.
    """
    names = [config.data.train_split, *config.evaluate.splits]
    opened = {name: open_split(config, root, name) for name in dict.fromkeys(names)}
    check_categories({name: split.categories for name, split in opened.items()}, root)
    for name, split in opened.items():
        split.require_instances("to train on" if name == names[0] else "to evaluate with")
    return [opened[name] for name in names]


def remarks(config: RunConfig, splits: Sequence[CocoDataset]) -> list[str]:
    """What a reader of the numbers should know of the data, a line each; evaluated splits first.

    Args:
        splits: as `open_splits` returns them.
    """
    first = splits[1].split
    seen = f"{first} is trained on and fills the tables: its mAP says nothing of other images"
    known = [seen] * (first == config.data.train_split)
    # What the generator leaves empty it does on purpose.
    if config.data.path is None:
        return known
    distinct = {split.split: split for split in [*splits[1:], splits[0]]}
    key = tuple(
        (str(split.annotation_file), split.fingerprint, split.deep_white)
        for split in distinct.values()
    )
    if key not in _said:
        _said[key] = check.remarks(distinct.values())
    return known + _untrained(splits) + undetected(config, splits[1:]) + _said[key]


def undetected(config: RunConfig, splits: Sequence[CocoDataset]) -> list[str]:
    """Which evaluated splits have images of more objects than detections, or objects of few pixels.

    A line each. More than COCO's rules look at, the splits themselves say.
    """
    most = config.model.detector.detections
    lines = []
    for split in splits if most < MOST_FOUND else ():
        counts = [split.instances(index) for index in range(len(split))]
        over = sum(count > most for count in counts)
        if over:
            lines.append(
                f"{split.annotation_file}: {over} of {len(split)} images have more than {most}"
                f" objects (model.detector.detections), up to {max(counts)}; the others count as"
                " missed"
            )
    data = config.data
    sizes = NetworkSize(data.min_sizes, data.max_size, data.fixed_size)
    given = f"data.min_sizes={[*data.min_sizes]} data.max_size={data.max_size}"
    if data.fixed_size is not None:
        given = f"data.fixed_size={[*data.fixed_size]}"
    for split in splits:
        sides = _sides(split, sizes)
        small = int((sides < _FEW_PIXELS).sum())
        if small >= max(1, _MANY * len(sides)):
            lines.append(
                f"{split.annotation_file}: {small} of {len(sides)} objects have less than"
                f" {_FEW_PIXELS} pixels a side at {given}, the median {np.median(sides):.1f};"
                " hardly one is found: raise the size, or cut images into tiles"
            )
    return lines


def _sides(split: CocoDataset, sizes: NetworkSize) -> NDArray[np.float64]:
    """The sides in the network of squares as large as the boxes of a split's instances."""
    found = []
    for index in range(len(split)):
        height, width = split.size(index)
        rows, columns = sizes.of(height, width)
        scale = rows / height * columns / width
        _, annotations = split.entry(index)
        boxes = [a["bbox"] for a in annotations if not a["iscrowd"]]
        found += [(box[2] * box[3] * scale) ** 0.5 for box in boxes]
    return np.array(found, dtype=np.float64)


def _untrained(splits: Sequence[CocoDataset]) -> list[str]:
    """Which classes are evaluated that the first split has no instance of, a line each split."""
    trained, *evaluated = splits
    absent = trained.unused_classes()
    found = {split: sorted({*absent} - {*split.unused_classes()}) for split in evaluated}
    return [
        f"{split.annotation_file}: classes of which {trained.split} has no instance, but for"
        f" crowds: {some([quoted(name) for name in names])}; never trained on, they count in mAP"
        for split, names in found.items()
        if names
    ]


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
    seen: set[object] = set()
    for config in configs:
        local = launch.World(size=processes, local_size=processes) if processes else None
        check_device(config, local)
        if config.train.init is not None and not Path(config.train.init).is_file():
            raise InputError(f"train.init={config.train.init}: no such file")
        if config.model.method == CLASSIFIER:
            pair = classes.open_splits(data_root(config, output))
            if config.data.path is not None and str(config.data) not in seen:
                seen.add(str(config.data))
                lines |= dict.fromkeys(check.class_remarks(pair, config.data.deep_white))
            continue
        root = data_root(config, output)
        place = (root, str(config.data), *config.evaluate.splits)
        if place not in seen:
            seen.add(place)
            lines |= dict.fromkeys(remarks(config, open_splits(config, root)))
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


def labels_by_name(trained: Categories, own: Categories) -> list[int] | None:
    """For each label of a detector that of the data it is evaluated on; None where they agree.

    Args:
        trained: id and name of the classes that the detector was trained on, in the order of its
            labels.
        own: the same of the data.

    Raises:
        InputError: where they are not of the same names, or names do not tell classes apart.
    """
    if tuple(trained) == tuple(own):
        return None
    first, second = ({name: label for label, (_, name) in enumerate(c, 1)} for c in (trained, own))
    if first.keys() != second.keys() or len(first) < len(trained) or len(second) < len(own):
        raise InputError(
            "the classes differ in their names, by which they are matched: trained on"
            f" {_named(trained)}; the data has {_named(own)}"
        )
    return [second[name] for _, name in trained]


def _named(categories: Sequence[tuple[int, str]]) -> str:
    return some([f"{id_} {quoted(name)}" for id_, name in categories])


def profile_batch(
    dataset: CocoDataset,
    size: tuple[int, int],
    count: int,
    *,
    objects: int | None = None,
    masks: bool = True,
) -> tuple[list[Tensor], list[Target]]:
    """The first `count` images with instances, stretched to `size` (height, width).

    Args:
        objects: of each image, its first ones, again and again where it has fewer; by default its
            own.
        masks: whether targets have masks.
    """
    dataset.require_instances("to measure with")
    usable = [index for index in range(len(dataset)) if dataset.instances(index)]
    images, targets = [], []
    for place in range(count):
        index = usable[place % len(usable)]
        image, target = dataset.read(index, size=size, crowds=False, masks=masks)
        height, width = image.shape[-2:]
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        images.append(resize_image(to_float(image), list(size)))
        own = len(target["boxes"])
        chosen = torch.arange(objects or own) % own
        found = {
            "image_id": target["image_id"],
            "boxes": (target["boxes"] * scale)[chosen],
            "labels": target["labels"][chosen],
        }
        if masks:
            resized = torch.nn.functional.interpolate(
                target["masks"][chosen, None], size, mode="nearest-exact"
            )
            found["masks"] = resized[:, 0]
        targets.append(found)
    return images, targets
