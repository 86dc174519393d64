"""The detector around a backbone: Mask R-CNN or RetinaNet, from torchvision or from detectron2.

Both libraries are driven in torchvision's conventions, converted at one seam (the `forward` of
each detector):

- training: `detector(images, targets) -> {loss name: scalar}`;
- evaluation: `detector(images) -> [{"boxes", "labels", "scores", "masks"}]`, one a given image;
- images: a list of float (3, H, W) in 0..1, of any sizes; the resize happens inside;
- boxes: (n, 4) x1, y1, x2, y2 in pixels of the given image; labels: (n,) in 1..num_classes;
- target masks: uint8 (n, H, W); predicted masks: float (n, 1, H, W) in 0..1 (Mask R-CNN only).
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from bench.config.schema import LIBRARIES, METHODS
from bench.config.schema import build as build_config
from bench.errors import InputError, choose, import_optional
from bench.model.backbone import ViL
from bench.model.detectors.contract import Detector, PartCall, Settings, pyramid_strides

__all__ = [
    "LIBRARIES",
    "METHODS",
    "Detector",
    "PartCall",
    "build",
    "library_version",
    "resolve_library",
]

DETECTRON2_INSTALL = "pip install --no-build-isolation '.[detectron2]'"


def build(
    vil: ViL,
    *,
    method: str = "mask_rcnn",
    num_classes: int = 80,
    library: str = "torchvision",
    min_size: int | Sequence[int] | None = None,
    max_size: int | None = None,
    fixed_size: tuple[int, int] | None = None,
    **options: Any,
) -> Detector:
    """Return a detector around `vil`; the defaults are the published recipe.

    Args:
        vil: the backbone; it becomes `detector.backbone.bottom_up`.
        method: "mask_rcnn" or "retinanet".
        num_classes: classes without background.
        library: "torchvision", "detectron2", or "auto": detectron2 where it is importable.
        min_size: shortest image edge; of several, training draws one an image and evaluation
            takes the last. Default: 800/1333 of `max_size`.
        max_size: longest image edge. Default: the image size of `vil`, of a pair the smaller.
        fixed_size: (rows, columns): every image is stretched to exactly this canvas, and
            `min_size` and `max_size` play no part. Default where the image size of `vil` is
            a pair and no other size was given: that pair.
        options: fields of `bench.config.schema.DetectorConfig`.

    Raises:
        InputError: an unknown method, library or option, detectron2 asked for and not importable,
            a value that is not allowed, another number of anchor sizes than pyramid levels, or
            images larger than those the backbone was made for.
    """
    choose(method, METHODS, "detection method")
    module = _library(library)
    if fixed_size is None and min_size is None and max_size is None:
        fixed_size = None if isinstance(vil.image_size, int) else vil.image_size
    if max_size is None:
        max_size = vil.image_size if isinstance(vil.image_size, int) else min(vil.image_size)
    if min_size is None:
        min_size = round(max_size * 800 / 1333)
    settings = build_config(
        Settings,
        {
            "num_classes": num_classes,
            "min_sizes": (min_size,) if isinstance(min_size, int) else min_size,
            "max_size": max_size,
            "fixed_size": fixed_size,
            **options,
        },
    )
    _check(settings, vil, levels=len(pyramid_strides(vil, method)))
    detector: Detector = module.DETECTORS[method](vil, settings)
    return detector


def resolve_library(library: str) -> str:
    """Return the library that `build(library=library)` takes: "torchvision" or "detectron2".

    Raises:
        InputError: an unknown library, or detectron2 where it is not importable.
    """
    return _library(library).__name__.rpartition(".")[2]


def library_version(library: str) -> str:
    """Return the version of the library that `build(library=library)` takes.

    Raises:
        InputError: an unknown library, or detectron2 where it is not importable.
    """
    version: str = _library(library).VERSION
    return version


def _library(library: str) -> ModuleType:
    choose(library, LIBRARIES, "detector library")
    if library != "torchvision":
        name, what = "bench.model.detectors.detectron2", "detector library 'detectron2'"
        try:
            return import_optional(name, what, DETECTRON2_INSTALL)
        except InputError:
            if library == "detectron2":
                raise
    return importlib.import_module("bench.model.detectors.torchvision")


def _check(settings: Settings, vil: ViL, *, levels: int) -> None:
    if len(settings.anchor_sizes) != levels:
        raise InputError(
            f"model.detector.anchor_sizes={list(settings.anchor_sizes)} must have {levels} values,"
            " one a level of the pyramid"
        )
    canvas = settings.fixed_size or (settings.max_size, settings.max_size)
    if any(side > limit for side, limit in zip(canvas, vil.largest, strict=True)):
        raise InputError(
            f"images of up to {canvas[0]}x{canvas[1]} (max_size or fixed_size of the detector) are "
            f"larger than the {vil.largest[0]}x{vil.largest[1]} of the backbone's image_size"
        )
