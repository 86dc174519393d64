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
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import pydantic.dataclasses
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from bench.config.schema import LIBRARIES, METHODS, DetectorConfig, Positive, Size, Sizes
from bench.config.schema import build as build_config
from bench.data.images import NetworkSize
from bench.errors import InputError, choose, import_optional
from bench.model.backbone import ViL

DETECTRON2_INSTALL = "pip install --no-build-isolation '.[detectron2]'"
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_RESOLUTION = 7
MASK_RESOLUTION = 14
# The share of RoIs with an object that the loss of the box head is computed on, at most.
POSITIVE_FRACTION = 0.25

Target = dict[str, Tensor]
Shapes = torch.Size | list[torch.Size] | dict[str, torch.Size]
Head = TypeVar("Head", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class PartCall:
    """One part of a detector with inputs of fixed sizes.

    `module(*make_inputs(device, dtype))` runs exactly that part, without the data-dependent
    path from proposals to detections.
    """

    name: str
    module: nn.Module
    make_inputs: Callable[[torch.device, torch.dtype], tuple[object, ...]]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(DetectorConfig):
    """What both libraries are configured with: a configuration, its classes, sizes of images."""

    num_classes: Positive
    min_sizes: Sizes
    max_size: Positive
    fixed_size: Size | None

    @property
    def network_size(self) -> NetworkSize:
        """What sizes images get."""
        return NetworkSize(self.min_sizes, self.max_size, self.fixed_size)


class Detector(nn.Module, ABC):
    """What a detector offers besides `forward`, which `bench.model.detectors` describes.

    `backbone` is the pyramid with ViL as its `bottom_up`, in both libraries. `settings` is what it
    was built with. `running` names plain numbers that a training call changes and no state dict
    keeps. Where `run_lengths` is set, masks come as `bench.data.masks.RunLengths`, made a few at a
    time: all of them at once take gigabytes at the size of a large image.
    """

    running: ClassVar[tuple[str, ...]] = ()
    run_lengths: bool = False
    library: str
    library_version: str
    method: str
    num_classes: int
    fpn_channels: int
    settings: Settings
    backbone: Any

    @property
    def vil(self) -> ViL:
        """The backbone below the pyramid."""
        bottom_up: ViL = self.backbone.bottom_up
        return bottom_up

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of an image while evaluating, resized and padded."""
        return self._padded(self.settings.network_size.of(height, width))

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (-(-side // self.vil.stride) * self.vil.stride for side in size)
        return rows, columns

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Return the parts that a profile is split into.

        "stage1" ... "stage4" of the backbone, "fpn", and "rpn", "box_head", "mask_head" or
        "retinanet_head". The backbone's classification head is in none of them.
        """

    def part_calls(
        self, image_size: tuple[int, int], *, proposals: int, detections: int, batch_size: int = 1
    ) -> list[PartCall]:
        """Return "backbone" (all of it) and the parts above it with inputs of fixed sizes.

        Args:
            image_size: (rows, columns) after the resize; padded here as the detector pads it.
            proposals: RoIs an image in the box head.
            detections: RoIs an image in the mask head.
            batch_size: images.
        """
        vil, channels = self.vil, self.fpn_channels
        rows, columns = self._padded(image_size)

        def shape(width: int, stride: int) -> torch.Size:
            return torch.Size((batch_size, width, -(-rows // stride), -(-columns // stride)))

        def rois(number: int, side: int) -> torch.Size:
            return torch.Size((batch_size * number, channels, side, side))

        maps = {
            n: shape(vil.channels[n], vil.strides[n]) for n in pyramid_features(vil, self.method)
        }
        levels = [shape(channels, stride) for stride in pyramid_strides(vil, self.method)]
        inputs: dict[str, Shapes] = {
            "fpn": maps,
            "rpn": levels,
            "retinanet_head": levels,
            "box_head": rois(proposals, BOX_RESOLUTION),
            "mask_head": rois(detections, MASK_RESOLUTION),
        }
        calls = [PartCall("backbone", vil, _zeros(shape(3, 1)))]
        for name, module in self.parts().items():
            if name in inputs:
                calls.append(PartCall(name, module, _zeros(inputs[name])))
        return calls


def pyramid_features(vil: ViL, method: str) -> tuple[str, ...]:
    """Return the backbone maps the pyramid is built on: strides 4-32, RetinaNet 8-32."""
    names = tuple(vil.channels)
    return names if method == "mask_rcnn" else names[1:]


def pyramid_strides(vil: ViL, method: str) -> tuple[int, ...]:
    """Return the stride of each pyramid level: P2-P6 of Mask R-CNN, P3-P7 of RetinaNet."""
    strides = [vil.strides[name] for name in pyramid_features(vil, method)]
    extra = 1 if method == "mask_rcnn" else 2
    return (*strides, *(strides[-1] * 2 ** (k + 1) for k in range(extra)))


def backbone_stages(vil: ViL) -> dict[str, nn.Module]:
    """Return {"stage1": ..., "stage2": ...}, the modules behind the backbone's feature maps."""
    return {name.replace("layer", "stage"): vil.get_submodule(name) for name in vil.channels}


def check_targets(targets: Sequence[Target], *, num_classes: int, masks: bool) -> None:
    """Check one batch of training targets; an image without boxes is fine.

    Raises:
        InputError: naming the image, for a box without area, a label outside 1..num_classes,
            or another number of labels or masks than boxes.
    """
    for index, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        name = f"image {int(target['image_id'])}" if "image_id" in target else f"target {index}"
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise InputError(f"{name}: boxes have the shape {tuple(boxes.shape)}, not (n, 4)")
        if len(labels) != len(boxes):
            raise InputError(f"{name}: {len(labels)} labels for {len(boxes)} boxes")
        if masks and len(target["masks"]) != len(boxes):
            raise InputError(f"{name}: {len(target['masks'])} masks for {len(boxes)} boxes")
        flat = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).logical_not()
        if flat.any():
            box = boxes[flat][0].tolist()
            raise InputError(f"{name}: the box {box} (x1, y1, x2, y2) has no positive area")
        foreign = (labels < 1) | (labels > num_classes)
        if foreign.any():
            raise InputError(
                f"{name}: the label {int(labels[foreign][0])} is not within 1..{num_classes}"
            )


def network_size(
    height: int, width: int, settings: Settings, *, training: bool, target: Target | None = None
) -> tuple[int, int]:
    """Return the size that an image gets: (rows, columns), before padding.

    A target's "size" says it; else it is drawn in training, and the last in evaluation.
    """
    place = -1
    if training and settings.fixed_size is None:
        # Drawn even where it is known, as what is drawn later follows from it.
        place = int(torch.randint(len(settings.min_sizes), ()))
    if target is not None and "size" in target:
        rows, columns = target["size"].tolist()
        return rows, columns
    return settings.network_size.of(height, width, place)


def resize_target(target: Target, given: tuple[int, int], size: tuple[int, int]) -> Target:
    """Return boxes and masks of an image of the size `given` as of one of `size`.

    Masks may have that size already.
    """
    resized = dict(target)
    scale = target["boxes"].new_tensor([size[1] / given[1], size[0] / given[0]] * 2)
    resized["boxes"] = target["boxes"] * scale
    if "masks" in target and target["masks"].shape[-2:] != size:
        resized["masks"] = nn.functional.interpolate(
            target["masks"][:, None], size, mode="nearest-exact"
        )[:, 0]
    return resized


def octaves(anchor_sizes: Sequence[int]) -> list[list[float]]:
    """Return the three anchor sizes of each level of RetinaNet, a third of an octave apart."""
    return [[size * 2 ** (k / 3) for k in range(3)] for size in anchor_sizes]


def float32_outputs(head: Head) -> Head:
    """Make `head` return float32 under autocast.

    Decoding boxes in half precision moves them by whole pixels, and losses lose their small parts.
    """
    head.register_forward_hook(_to_float32)
    return head


def is_head(module: nn.Module) -> bool:
    """Whether detections are made of what the module puts out: what `float32_outputs` was given."""
    return _to_float32 in module._forward_hooks.values()


def _to_float32(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
    return apply_to_collection(outputs, Tensor, Tensor.float)


def _zeros(shapes: Shapes) -> Callable[[torch.device, torch.dtype], tuple[object, ...]]:
    """Return a factory of one argument: `shapes` with a tensor of zeros for every shape."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
        filled = functools.partial(torch.zeros, device=device, dtype=dtype)
        return (apply_to_collection(shapes, torch.Size, filled),)

    return make_inputs


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
