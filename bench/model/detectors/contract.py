"""What every detector is, and what both libraries share."""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import pydantic.dataclasses
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from bench.config.schema import DetectorConfig, Positive, Size, Sizes
from bench.data.images import NetworkSize
from bench.errors import InputError
from bench.model.backbone import ViL

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
        rows, columns = (-(-side // vil.stride) * vil.stride for side in image_size)

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
