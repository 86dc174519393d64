"""The detector around a backbone: Mask R-CNN or RetinaNet, from torchvision or from detectron2.

Both libraries are driven in torchvision's conventions, converted at one seam (the `forward` of
each detector):

- training: `detector(images, targets) -> {loss name: scalar}`;
- evaluation: `detector(images) -> [{"boxes", "labels", "scores", "masks"}]`, one a given image;
- images: a list of float (3, H, W) in 0..1, of any sizes; the resize happens inside;
- boxes: (n, 4) x1, y1, x2, y2 in pixels of the given image; labels: (n,) in 1..num_classes;
- target masks: uint8 (n, H, W); predicted masks: float (n, 1, H, W) in 0..1 (Mask R-CNN only).
"""

import dataclasses
import importlib
from collections.abc import Sequence
from types import ModuleType

from bench.config.schema import LIBRARIES, METHODS
from bench.errors import InputError, choose
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
    fpn_channels: int = 256,
    head_width: int = 1024,
    mask_width: int = 256,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    rpn_proposals: tuple[int, int] = (2000, 1000),
    rpn_proposals_test: tuple[int, int] = (1000, 1000),
    rpn_batch: int = 256,
    roi_batch: int = 512,
    detections: int = 100,
    score_threshold: float = 0.05,
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
        fpn_channels: channels of the feature pyramid.
        head_width: width of the two linear layers of the box head (Mask R-CNN).
        mask_width: channels of the four convolutions of the mask head (Mask R-CNN).
        anchor_sizes: one anchor size in pixels a pyramid level; RetinaNet adds two octave scales.
        rpn_proposals: proposals in training: a level before NMS, an image after it (Mask R-CNN).
        rpn_proposals_test: the same in evaluation (Mask R-CNN).
        rpn_batch: anchors an image in the loss of the RPN (Mask R-CNN).
        roi_batch: RoIs an image in the loss of the box head (Mask R-CNN).
        detections: detections kept an image.
        score_threshold: detections below it are dropped.

    Raises:
        InputError: an unknown method or library, detectron2 asked for and not importable, a
            value that is not positive, another number of anchor sizes than pyramid levels, or
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
    settings = Settings(
        num_classes=num_classes,
        min_sizes=(min_size,) if isinstance(min_size, int) else tuple(min_size),
        max_size=max_size,
        fixed_size=fixed_size,
        fpn_channels=fpn_channels,
        head_width=head_width,
        mask_width=mask_width,
        anchor_sizes=tuple(anchor_sizes),
        rpn_proposals=rpn_proposals,
        rpn_proposals_test=rpn_proposals_test,
        rpn_batch=rpn_batch,
        roi_batch=roi_batch,
        detections=detections,
        score_threshold=score_threshold,
    )
    _check_settings(settings, vil, levels=len(pyramid_strides(vil, method)))
    detector: Detector = getattr(module, method)(vil, settings)
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
        try:
            return importlib.import_module("bench.model.detectors.detectron2")
        except ImportError as error:
            if library == "detectron2":
                raise InputError(
                    f"detector library 'detectron2' is not importable ({error}); "
                    f"install it with: {DETECTRON2_INSTALL}"
                ) from error
    return importlib.import_module("bench.model.detectors.torchvision")


def _check_settings(settings: Settings, vil: ViL, *, levels: int) -> None:
    for name, value in dataclasses.asdict(settings).items():
        if name == "score_threshold" or value is None:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or min(numbers) < 1:
            raise InputError(f"detector option {name}={value!r} has to be positive")
    if not 0 <= settings.score_threshold < 1:
        raise InputError(
            f"detector option score_threshold={settings.score_threshold} has to be in [0, 1)"
        )
    if len(settings.anchor_sizes) != levels:
        raise InputError(
            f"detector option anchor_sizes={settings.anchor_sizes} has to name {levels} sizes, "
            "one a pyramid level"
        )
    canvas = settings.fixed_size or (settings.max_size, settings.max_size)
    if any(side > limit for side, limit in zip(canvas, vil.largest, strict=True)):
        raise InputError(
            f"images of up to {canvas[0]}x{canvas[1]} (max_size or fixed_size of the detector) are "
            f"larger than the {vil.largest[0]}x{vil.largest[1]} of the backbone's image_size"
        )
