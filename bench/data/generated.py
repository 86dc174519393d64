"""A generated data set for instance segmentation, in COCO layout on disk.

Coloured shapes on textured backgrounds: six classes, each an outline that leans to a hue, objects
of all three COCO sizes, overlaps (masks hold what is visible), crowd regions and images without an
object. It takes the same path through the harness as COCO, and is learnt in about a minute, which
is why colour helps to tell the classes apart.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import contourpy
import numpy as np
from faster_coco_eval.core import mask as mask_api
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench.config.schema import CLASSIFIER, RunConfig
from bench.errors import InputError, saying
from bench.system import locks

Array = NDArray[np.float64]

SHAPES = ("disc", "square", "triangle", "star", "cross", "bar")
SPLITS = ("train2017", "val2017")
CLASS_SPLITS = ("train", "val")
# Classes of images of one object each: its shape, and the longer side of its box from one of SIDES
# to the next, as a share of the image's shorter side. Sizes make a backbone see where objects end.
SIZES = ("small", "medium", "large")
SIDES = (0.25, 0.4, 0.62, 0.97)
CLASSES = tuple(f"{shape}-{size}" for shape in SHAPES for size in SIZES)
# Areas in pixels of small, medium and large objects, within COCO's limits of 32² and 96², and how
# often each comes.
AREAS = ((200.0, 950.0), (1150.0, 6500.0), (9400.0, 11000.0))
SHARES = (0.25, 0.65, 0.10)
MOST_OBJECTS = 5
CROWD_SHARE = 0.06
EMPTY_SHARE = 0.02
LEAST_VISIBLE = 0.5
# Standard deviation of the hue in a class; neighbouring classes are 1 apart.
HUE_SPREAD = 0.3
SMALLEST_SIDE = 64

_MARK = "generated.json"
_VERSION = 4
_SUPERSAMPLING = 4
_TRIES = 12
_SPECK = 1.0


@dataclass(frozen=True)
class _Object:
    shape: int
    alpha: Array
    colour: Array
    crowd: bool = False


def generate(
    root: str | Path,
    *,
    seed: int = 0,
    train_images: int = 800,
    val_images: int = 100,
    image_size: tuple[int, int] = (128, 160),
    classes: bool = False,
) -> Path:
    """Write the data set, unless it is there already, and return its folder.

    The same arguments give the same bytes. A folder that was not finished is written anew, and so
    is a generated data set of other arguments. Of several processes at once, one writes it.

    Args:
        root: the folder to make.
        image_size: height and width of every image, in pixels.
        classes: images of one object each instead, as `train/CLASS/*.jpg` and `val/CLASS/*.jpg`
            for each of CLASSES.

    Raises:
        InputError: for values that cannot be, a folder that holds something else, or a full disk.
    """
    root = Path(root)
    if min(train_images, val_images) < 1 or min(image_size) < SMALLEST_SIDE:
        raise InputError(
            f"generated data of {train_images} and {val_images} images of {image_size[0]}x"
            f"{image_size[1]}: at least one image each, of at least {SMALLEST_SIDE} pixels a side"
        )
    if seed < 0:
        raise InputError(f"the seed of generated data is {seed}; it must not be negative")
    arguments = {
        "version": _VERSION,
        "seed": seed,
        "train_images": train_images,
        "val_images": val_images,
        "image_size": list(image_size),
        **({"classes": True} if classes else {}),
    }
    # Of a link, the folder behind it.
    place = root.resolve()
    lock = place.with_name(f".{place.name}.lock")
    with saying(f"cannot write generated data to {root}"):
        if _mark(place) == arguments:
            return root
        _refuse_foreign(place)
        with locks.locked(lock):
            try:
                # Another process may have made it meanwhile.
                if _mark(place) != arguments:
                    _refuse_foreign(place)
                    _replace(place, arguments)
            finally:
                # Who waits for it sees that it is gone, and takes a new one.
                lock.unlink(missing_ok=True)
    return root


def data_root(config: RunConfig, output: Path) -> Path:
    """Return the folder of a run's data; generated data is made where it is missing."""
    if config.data.path is not None:
        return Path(config.data.path)
    made, classes = config.data.generated, config.model.method == CLASSIFIER
    size = (made.image_size[0], made.image_size[1])
    numbers = f"{made.seed}-{made.train_images}-{made.val_images}-{size[0]}x{size[1]}"
    return generate(
        output / "data" / f"{'classes' if classes else 'generated'}-{numbers}",
        seed=made.seed,
        train_images=made.train_images,
        val_images=made.val_images,
        image_size=size,
        classes=classes,
    )


def _replace(place: Path, arguments: Mapping[str, Any]) -> None:
    """Write the data set beside `place`, and put it there when it is whole."""
    unfinished = place.with_name(f".{place.name}.unfinished")
    replaced = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    counts = (arguments["train_images"], arguments["val_images"])
    try:
        write, splits = _write_split, SPLITS
        if "classes" in arguments:
            write, splits = _write_classes, CLASS_SPLITS
        for number, (split, count) in enumerate(zip(splits, counts, strict=True)):
            seed, (height, width) = (arguments["seed"], number), arguments["image_size"]
            write(unfinished, split, count, seed, (height, width))
        (unfinished / _MARK).write_text(json.dumps(arguments), encoding="utf-8")
        # Moved away whole: half deleted under its own name, it would pass for finished.
        if place.exists():
            place.replace(replaced)
        unfinished.replace(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _mark(root: Path) -> Any:
    """What the folder's data was made with, or None where it does not say so."""
    try:
        return json.loads((root / _MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _refuse_foreign(root: Path) -> None:
    """Raise InputError unless the folder is missing, empty, or all of it may be replaced."""
    if not root.exists():
        return
    there = {path.name for path in root.iterdir()}
    mark = _mark(root)
    ours = isinstance(mark, dict) and "version" in mark
    foreign = there - {_MARK, "annotations", *SPLITS, *CLASS_SPLITS} if ours else there
    if foreign:
        raise InputError(
            f"{root} holds {sorted(foreign)[0]!r}, which is not generated data; name another folder"
        )


def _write_split(
    root: Path, split: str, count: int, seed: tuple[int, int], image_size: tuple[int, int]
) -> None:
    folder = root / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        pixels, objects = _draw(np.random.default_rng([*seed, index]), image_size)
        name = f"{index + 1:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=92)
        images.append(
            {"id": index + 1, "file_name": name, "height": image_size[0], "width": image_size[1]}
        )
        for item in objects:
            annotation = _annotation(item)
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1} | annotation)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(SHAPES, start=1)],
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_classes(
    root: Path, split: str, count: int, seed: tuple[int, int], image_size: tuple[int, int]
) -> None:
    for name in CLASSES:
        (root / split / name).mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng([*seed, index])
        number = index % len(CLASSES)
        shape, size = divmod(number, len(SIZES))
        outline = _outline(rng, SHAPES[shape], 1.0)
        share = np.exp(rng.uniform(*np.log(SIDES[size : size + 2])))
        outline *= share * min(image_size) / np.ptp(outline, axis=0).max()
        shown = _Object(shape, _somewhere(rng, outline, image_size), _colour(rng, shape))
        pixels = _paint(rng, _background(rng, image_size), [shown])
        name = f"{index + 1:012d}.jpg"
        Image.fromarray(pixels).save(root / split / CLASSES[number] / name, quality=92)


def _draw(
    rng: np.random.Generator, image_size: tuple[int, int]
) -> tuple[NDArray[np.uint8], list[_Object]]:
    """An image (height, width, 3) and its objects, each with what is visible of it."""
    canvas = _background(rng, image_size)
    placed: list[_Object] = []
    if rng.random() >= EMPTY_SHARE:
        areas = sorted((_area(rng) for _ in range(rng.integers(1, MOST_OBJECTS + 1))), reverse=True)
        for area in areas:
            placed = _place(rng, placed, area, image_size)
    if rng.random() < CROWD_SHARE:
        placed = [*placed, _crowd(rng, image_size, [item.alpha for item in placed])]
    pixels = _paint(rng, canvas, placed)
    return pixels, [item for item in placed if item.alpha.max(initial=0.0) > 0.5]


def _paint(rng: np.random.Generator, canvas: Array, placed: Sequence[_Object]) -> NDArray[np.uint8]:
    """Put objects on a background (height, width, 3), with shades and grain."""
    for item in placed:
        shade = 1.0 + 0.12 * _noise(rng, (canvas.shape[0], canvas.shape[1]), 12)
        paint = item.colour * shade[..., None]
        canvas = canvas * (1 - item.alpha[..., None]) + paint * item.alpha[..., None]
    grain = rng.normal(0.0, 0.015, canvas.shape)
    return ((canvas + grain).clip(0, 1) * 255).astype(np.uint8)


def _area(rng: np.random.Generator) -> float:
    low, high = AREAS[rng.choice(len(AREAS), p=SHARES)]
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _place(
    rng: np.random.Generator, placed: list[_Object], area: float, image_size: tuple[int, int]
) -> list[_Object]:
    """Put one more object on top; enough of those below stays visible."""
    for _ in range(_TRIES):
        shape = int(rng.integers(len(SHAPES)))
        outline = _outline(rng, SHAPES[shape], area)
        if (np.ptp(outline, axis=0) > image_size[::-1]).any():
            continue
        alpha = _somewhere(rng, outline, image_size)
        visible = [item.alpha * (1 - alpha) for item in placed]
        pairs = zip(visible, placed, strict=True)
        if all(seen.sum() >= _least(item.alpha.sum()) for seen, item in pairs):
            below = [
                _Object(item.shape, seen, item.colour)
                for seen, item in zip(visible, placed, strict=True)
            ]
            return [*below, _Object(shape, alpha, _colour(rng, shape))]
    return placed


def _somewhere(rng: np.random.Generator, outline: Array, image_size: tuple[int, int]) -> Array:
    """Share of each pixel that an outline covers, moved to where all of it is in the image."""
    low = outline.min(axis=0)
    room = np.array(image_size[::-1]) - (outline.max(axis=0) - low)
    return _raster(outline - low + rng.uniform(0, 1, 2) * room, image_size)


def _least(area: float) -> float:
    """How much of an object has to stay visible; a large one has to stay a large one."""
    large = AREAS[-1][0]
    return max(LEAST_VISIBLE * area, large if area >= large else 0.0)


def _crowd(
    rng: np.random.Generator, image_size: tuple[int, int], taken: Sequence[Array]
) -> _Object:
    """A cluster of tiny shapes of one class, behind everything placed before."""
    shape = int(rng.integers(len(SHAPES)))
    centre = rng.uniform(0.2, 0.8, 2) * np.array(image_size[::-1])
    alpha = np.zeros(image_size)
    for _ in range(rng.integers(8, 14)):
        outline = _outline(rng, SHAPES[shape], rng.uniform(40, 90))
        alpha = np.maximum(alpha, _raster(outline + centre + rng.normal(0, 14, 2), image_size))
    for other in taken:
        alpha = alpha * (1 - other)
    return _Object(shape, alpha, _colour(rng, shape), crowd=True)


def _outline(rng: np.random.Generator, shape: str, area: float) -> Array:
    """A turned outline (points, 2) as x, y around the origin, of `area` pixels."""
    if shape == "disc":
        points = _polygon(np.ones(40))
    elif shape == "square":
        points = _polygon(np.ones(4))
    elif shape == "triangle":
        points = _polygon(np.ones(3))
    elif shape == "star":
        points = _polygon(np.tile([1.0, 0.42], 5))
    elif shape == "cross":
        t = 0.32
        quarter = np.array([[t, t], [t, 1.0], [-t, 1.0]])
        turn = np.array([[0.0, -1.0], [1.0, 0.0]])
        points = np.concatenate([quarter @ np.linalg.matrix_power(turn, k).T for k in range(4)])
    else:
        points = np.array([[-1.0, -0.28], [1.0, -0.28], [1.0, 0.28], [-1.0, 0.28]])
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned: Array = points @ rotation.T * np.sqrt(area / abs(_signed_area(points)))
    return turned


def _signed_area(points: Array) -> float:
    """Area of a closed outline (points, 2), positive where it turns from x to y."""
    following = np.roll(points, -1, axis=0)
    return float(np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0])) / 2


def _polygon(radii: Array) -> Array:
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _raster(outline: Array, image_size: tuple[int, int]) -> Array:
    """Share of each pixel that the outline covers: (height, width)."""
    s = _SUPERSAMPLING
    large = Image.new("L", (image_size[1] * s, image_size[0] * s))
    ImageDraw.Draw(large).polygon([(x * s, y * s) for x, y in outline.tolist()], fill=255)
    return np.asarray(large.reduce(s), dtype=np.float64) / 255


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> Array:
    """A greyish texture: a gradient, noise of several scales, and now and then stripes."""
    height, width = image_size
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / max(height, width)
    light = rng.uniform(0.3, 0.7) + rng.uniform(-0.2, 0.2) * along
    for cell in (48, 16, 5):
        light = light + 0.05 * _noise(rng, image_size, cell)
    if rng.random() < 0.3:
        light = light + 0.04 * np.sin(2 * np.pi * along * rng.uniform(4, 16))
    tint = rng.normal(0, 0.03, 3)
    canvas: Array = light[..., None] + tint
    return canvas.clip(0.05, 0.95)


def _noise(rng: np.random.Generator, image_size: tuple[int, int], cell: int) -> Array:
    """Smooth noise of unit variance whose blobs are about `cell` pixels wide."""
    height, width = image_size
    coarse = rng.normal(size=(height // cell + 2, width // cell + 2)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float64)


def _colour(rng: np.random.Generator, shape: int) -> Array:
    """A saturated colour; each class leans to a hue, as many real ones do, with overlaps."""
    hue = (6 * shape / len(SHAPES) + rng.normal(0, HUE_SPREAD)) % 6
    saturation, value = rng.uniform(0.65, 1.0), rng.uniform(0.55, 1.0)
    distance = np.abs((hue - np.array([0.0, 2.0, 4.0]) + 3) % 6 - 3)
    colour: Array = value * (1 - saturation * (1 - (2 - distance).clip(0, 1)))
    return colour


def _annotation(item: _Object) -> dict[str, Any]:
    """The COCO annotation of what is visible: polygons, or run lengths where they cannot say it."""
    height, width = item.alpha.shape
    outlines = _outlines(item.alpha)
    # No polygon has a hole; a hole's outline turns the other way.
    if item.crowd or not outlines or min(map(_signed_area, outlines)) < 0:
        segmentation: Any = _run_lengths(item.alpha > 0.5)
        run = mask_api.frPyObjects(segmentation, height, width)
        box = mask_api.toBbox(run).flatten().tolist()
    else:
        segmentation = [points.flatten().tolist() for points in outlines]
        run = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
        every = np.concatenate(outlines)
        low, high = every.min(axis=0), every.max(axis=0)
        box = [*low.tolist(), *(high - low).tolist()]
    return {
        "category_id": item.shape + 1,
        "bbox": [round(value, 2) for value in box],
        "area": float(mask_api.area(run)),
        "segmentation": segmentation,
        "iscrowd": int(item.crowd),
    }


def _outlines(alpha: Array) -> list[Array]:
    """Outlines (points, 2) as x, y of what an object covers by more than half."""
    height, width = alpha.shape
    generator = contourpy.contour_generator(z=np.pad(alpha, 1), line_type="Separate")
    lines = cast("list[Array]", generator.lines(0.5))
    # Contour points lie between pixel centres; COCO counts from the edge of the first pixel.
    outlines = [(line[:-1] - 0.5).clip(0, [width, height]).round(2) for line in lines]
    # A speck covers no pixel, but would stretch the box.
    return [points for points in outlines if abs(_signed_area(points)) >= _SPECK]


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed run lengths of a mask (height, width), as COCO stores crowds."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
