"""Images sorted into a folder for each class, such as ImageNet, read by timm's reader, or shards.

Shards are WebDataset's: uncompressed tar files in which the files of an image share a name up to
its first dot, `.cls` the number of its class. They are indexed and then read at any place, not
streamed, so that images come in the same order as from folders, and a resumed run finds its own.

Of a batch everything random is drawn from the seed and the place of an image in the order of
training, as for detection.
"""

import functools
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from bench.config.schema import RunConfig
from bench.data import images
from bench.data.fingerprint import files_of, fingerprint_images
from bench.data.generated import CLASS_SPLITS
from bench.data.loader import Batch, Pace, Sample, Samples, load, ordered_batches
from bench.errors import InputError, saying, some

TRAIN, VAL = CLASS_SPLITS
# What folders of a split are called.
_NAMES = {TRAIN: ("train", "training"), VAL: ("val", "validation", "valid", "test")}
LAYOUT = "train/CLASS/IMAGE and val/CLASS/IMAGE, or train/*.tar and val/*.tar (WebDataset)"
# A file, and where it lies in it: first byte and number of bytes, -1 for all.
Place = tuple[str, int, int]
_SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
# What timm passes over in folders, besides jpg, jpeg and png.
_MORE_IMAGES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


class ClassDataset:
    """One split of images by class.

    Args:
        root: folder of the splits.
        split: "train" or "val".
        classes: names of those that labels count; by default those of the split.

    Attributes:
        samples: place and number of the class of each image.
        classes: names, in the order of their numbers.
        shards_beside: names of shards that are not read, as there are folders beside them.

    Raises:
        InputError: for a folder that is missing or holds no images.
    """

    def __init__(self, root: Path, split: str, classes: tuple[str, ...] | None = None) -> None:
        self.split, self.folder = split, find(root, split)
        inside = sorted(self.folder.iterdir())
        shards = [path for path in inside if path.suffix == ".tar"]
        # Archives beside folders are what these were unpacked from.
        sharded = shards and not any(path.is_dir() for path in inside)
        # Images of samples that have another one too, by which they are known.
        self.passed_over: list[str] = []
        own, samples = _shards(shards, self.passed_over) if sharded else _folders(self.folder)
        self.is_sharded = bool(sharded)
        self.shards_beside = [] if sharded else [path.name for path in shards]
        self.classes_are_own = classes is None
        self.classes: tuple[str, ...] = classes or own
        unknown = [name for name in own if name not in self.classes]
        if unknown:
            raise InputError(f"{self.folder}: no such class in {TRAIN}: {some(unknown)}")
        labels = [self.classes.index(name) for name in own]
        self.samples = [(place, labels[label]) for place, label in samples]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the names and contents of its files."""
        return fingerprint_images(self.folder, files_of(self.folder))

    def left_out(self) -> tuple[list[str], list[str]]:
        """Return the classes that have no image here, and the files of others that are not read."""
        if self.is_sharded:
            labels = {label for _, label in self.samples}
            # A split to evaluate on need not have all of the other's.
            numbers = range(len(self.classes)) if self.classes_are_own else ()
            return [self.classes[n] for n in numbers if n not in labels], self.passed_over
        own = (Path(path).relative_to(self.folder) for (path, *_), _ in self.samples)
        read = {path.as_posix() for path in own}
        used = {name.partition("/")[0] for name in read}
        folders = (path.name for path in self.folder.iterdir() if path.is_dir())
        return (
            sorted(name for name in folders if not name.startswith(".") and name not in used),
            sorted(
                name
                for name in files_of(self.folder).keys() - read
                if name.partition("/")[0] in used and "/." not in name
            ),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, white: int = images.DEEPEST) -> tuple[Image.Image, int]:
        """Return an image in RGB, upright, and its class; arguments and errors as of `picture`."""
        return to_pil_image(self.picture(index, white)[0].pixels), self.samples[index][1]

    def picture(self, index: int, white: int = images.DEEPEST) -> tuple[images.Picture, str]:
        """Return an image with what its file was, and where that is.

        Args:
            white: the value that becomes 255 in grey images of 16 bits.

        Raises:
            InputError: naming the file, where it cannot be read.
        """
        (path, start, length), _ = self.samples[index]
        place = Path(f"{path} at byte {start}" if start else path)
        with saying(f"cannot read image {place}"), Path(path).open("rb") as file:
            file.seek(start)
            raw = file.read(length)
        return images.read(place, raw, white=white), str(place)


def _folders(folder: Path) -> tuple[tuple[str, ...], list[tuple[Place, int]]]:
    """Return the names of classes, and place and class of each image."""
    # Detectors start sooner without it.
    from timm.data.readers import create_reader
    from timm.data.readers.img_extensions import add_img_extensions
    from timm.utils.misc import natural_key

    add_img_extensions(_MORE_IMAGES)
    try:
        reader: Any = create_reader("", root=str(folder))
    except RuntimeError as error:
        raise InputError(f"{folder}: no images in folders of classes; {error}") from error
    # Of the folder of each image its way from here; none where a program hid it from view.
    below: dict[str, Path | None] = {}
    kept: list[tuple[str, int]] = []
    for path, label in reader.samples:
        parent, name = os.path.split(path)
        if parent not in below:
            place = Path(parent).relative_to(folder)
            hidden = any(part.startswith(".") for part in place.parts)
            below[parent] = None if hidden else place
        if below[parent] is not None and not name.startswith("."):
            kept.append((path, label))
    used = {label for _, label in kept}
    names = (name for name, label in reader.class_to_idx.items() if label in used)
    # To timm "01" is "1" and "A" is "a", in an order that differs from run to run.
    own = tuple(sorted(names, key=lambda name: (natural_key(name), name)))
    places = [place for place in below.values() if place is not None]
    depths = {len(place.parts) for place in places}
    if 0 in depths or len(depths) > 1 or len(places) > len(own):
        deepest = max(places, key=lambda place: len(place.parts))
        which = f", not in {deepest}" if len(deepest.parts) > 1 else ""
        raise InputError(f"{folder}: images must lie in a folder for each class{which}")
    number = {reader.class_to_idx[name]: place for place, name in enumerate(own)}
    return own, [((path, 0, -1), number[label]) for path, label in kept]


def _shards(
    shards: list[Path], passed_over: list[str]
) -> tuple[tuple[str, ...], list[tuple[Place, int]]]:
    """Return likewise what WebDataset's shards hold; classes are called by their numbers.

    Args:
        shards: the files.
        passed_over: receives the names of images of samples that have another one, of a kind that
            stands before theirs in `_SHARD_IMAGES`.
    """
    # By shard, name, and how often that was there before, as in shards that were joined.
    found: dict[tuple[str, str, int], dict[str, Place]] = {}
    labels: dict[tuple[str, str, int], int] = {}
    for shard in map(str, shards):
        times: Counter[tuple[str, str]] = Counter()
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    key = shard, f"{folder}/{stem}", times[f"{folder}/{stem}", kind]
                    times[f"{folder}/{stem}", kind] += 1
                    if kind == "cls":
                        labels[key] = _number(tar.extractfile(member))
                    elif kind.lower() in _SHARD_IMAGES:
                        place = shard, member.offset_data, member.size
                        found.setdefault(key, {})[kind.lower()] = place
                _check_end(tar)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise InputError(f"cannot read shard {shard}: {error}") from error
    places = {}
    for key, kinds_of in found.items():
        first, *others = sorted(kinds_of, key=_SHARD_IMAGES.index)
        places[key] = kinds_of[first]
        passed_over += [f"{key[1].lstrip('/')}.{kind}" for kind in others]
    apart = sorted(places.keys() ^ labels.keys())
    if apart or not places:
        shard, stem, _ = apart[0] if apart else (str(shards[0]), "an image", 0)
        kinds = ", ".join(_SHARD_IMAGES)
        raise InputError(f"{shard}: {stem.lstrip('/')} must be there as one of {kinds}, and as cls")
    own = tuple(map(str, range(max(labels.values()) + 1)))
    return own, [(place, labels[key]) for key, place in places.items()]


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse a file that goes on behind the end of its archive, as one that `cat` put together."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError("more lies behind its end; join archives with tar --concatenate")


def _number(file: IO[bytes] | None) -> int:
    text = file.read().decode() if file else ""
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r} in a cls file must be the number of a class, from 0")
    return int(text)


def find(root: Path, split: str) -> Path:
    """Return the folder of a split.

    Raises:
        InputError: where there is none.
    """
    places = [root / name for name in _NAMES[split]]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        names = ", ".join(_NAMES[split])
        raise InputError(
            f"--data {root}: no folder {names} in it; a data set of classes is {LAYOUT}"
        )
    return found


def open_splits(root: Path) -> tuple[ClassDataset, ClassDataset]:
    """Read the images to train on and those to evaluate on.

    Raises:
        InputError: for data that cannot be used, or classes that only evaluation has.
    """
    train = ClassDataset(root, TRAIN)
    return train, ClassDataset(root, VAL, train.classes)


def image_size(config: RunConfig) -> tuple[int, int]:
    """Return (height, width) of a run's images."""
    if config.data.fixed_size is None:
        raise InputError("data.fixed_size: a classifier needs the (height, width) of its images")
    return config.data.fixed_size[0], config.data.fixed_size[1]


class _Samples(Samples):
    """Images as the network sees them, and their classes."""

    def __init__(self, dataset: ClassDataset, config: RunConfig, *, training: bool) -> None:
        self.dataset, self.seed, self.white = dataset, config.seed, config.data.deep_white
        options: dict[str, Any] = {}
        how = config.classify
        if training:
            options = {
                "scale": (how.crop_area, 1.0),
                "hflip": 0.5 if config.data.flip else 0.0,
                "auto_augment": how.augment or None,
                "color_jitter": 0.0,
                "re_prob": how.erasing,
                "re_mode": "pixel",
            }
        from timm.data import create_transform

        self.transform = create_transform(
            (3, *image_size(config)),
            is_training=training,
            interpolation="bicubic",
            crop_pct=how.crop_share,
            **options,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        index, place = key if isinstance(key, tuple) else (key, 0)
        image, label = self.dataset.read(index, self.white)
        with random_from(self.seed, place):
            pixels: Any = self.transform(image)
        return pixels, {"label": torch.tensor(label), "image_id": torch.tensor(index)}


@contextmanager
def random_from(seed: int, place: int) -> Iterator[None]:
    """Let Python, NumPy and torch draw from a seed and a place, and then go on as before."""
    # timm's augmentation draws from NumPy's global state.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seeds = np.random.SeedSequence([seed, place]).generate_state(3, np.uint32).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def training_batches(
    dataset: ClassDataset,
    config: RunConfig,
    *,
    steps: int,
    start_step: int,
    rank: int = 0,
    world_size: int = 1,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    """Yield this process's share of the batches of steps `start_step` to `steps - 1`.

    Images are float (3, height, width), normalised; targets hold "label" and "image_id".
    """
    yield from ordered_batches(
        _Samples(dataset, config, training=True),
        (tuple(range(len(dataset))),),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        steps=steps,
        num_workers=config.data.workers,
        rank=rank,
        world_size=world_size,
        pace=pace,
        repeats=config.classify.repeats,
    )


def evaluation_batches(
    dataset: ClassDataset, config: RunConfig, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield every image once, each to one process."""
    own, size = range(rank, len(dataset), world_size), config.evaluate.batch_size
    batches = (list(own[start : start + size]) for start in range(0, len(own), size))
    samples = _Samples(dataset, config, training=False)
    yield from load(samples, batches, config.data.workers, Pace())
