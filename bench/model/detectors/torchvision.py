"""Mask R-CNN and RetinaNet of torchvision around ViL, configured as near to detectron2 as it goes.

Made equal to detectron2 here: the resize, anchors (unrounded, at the nominal stride of every
level), numbers of proposals, thresholds, RoIAlign, P6 from the last backbone map, L1 loss of
RetinaNet, exactly `num_classes` outputs of RetinaNet, initial weights of the heads, padding after
normalisation, box arithmetic and losses in float32 under autocast. With the same weights the
detections are the same, but for the edges of masks. What remains different, most of it in losses,
is listed in docs/detectors.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from torchvision.ops.poolers import LevelMapper

from bench.data.images import resize
from bench.data.masks import PASTED_AT_ONCE, RunLengths, encode_soft
from bench.model.backbone import ViL
from bench.model.detectors import (
    ASPECT_RATIOS,
    BOX_RESOLUTION,
    MASK_RESOLUTION,
    PIXEL_MEAN,
    PIXEL_STD,
    POSITIVE_FRACTION,
    Detector,
    Settings,
    Target,
    backbone_stages,
    check_targets,
    float32_outputs,
    network_size,
    octaves,
    pyramid_features,
    pyramid_strides,
    resize_target,
)
from bench.model.detectors.roi_align import roi_align

VERSION: str = torchvision.__version__
CPU = torch.device("cpu")


class Pyramid(nn.Module):
    """The backbone and the feature pyramid on top of it: (B, 3, H, W) -> {level: (B, C, h, w)}."""

    def __init__(
        self, vil: ViL, *, features: Sequence[str], out_channels: int, extra: ExtraFPNBlock
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.out_channels = out_channels
        self.bottom_up = vil
        self.fpn = FeaturePyramidNetwork(
            [vil.channels[name] for name in features], out_channels, extra_blocks=extra
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.bottom_up(images)
        levels: dict[str, Tensor] = self.fpn({name: maps[name] for name in self.features})
        return levels


class PyramidAnchors(AnchorGenerator):
    """Anchors of the exact sizes at the exact strides.

    torchvision rounds sizes to whole pixels and takes as stride the image size over the map size,
    61 instead of 64 for a map of 13 rows on an image of 800. It also makes anchors in the dtype
    of the features, and bfloat16 cannot tell 1001 from 1000. Their order is detectron2's.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        super().__init__(
            tuple(tuple(level) for level in sizes), (ASPECT_RATIOS,) * len(tuple(sizes))
        )
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> Tensor:
        """Return (len(scales) * len(aspect_ratios), 4) boxes around the origin, sizes outermost."""
        shapes = [
            (size / math.sqrt(ratio), size * math.sqrt(ratio))
            for size in scales
            for ratio in aspect_ratios
        ]
        corners = [[-width / 2, -height / 2, width / 2, height / 2] for width, height in shapes]
        return torch.tensor(corners, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return for each image the anchors of all levels, (sum of rows * columns * A, 4)."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        levels = self.grid_anchors(
            [list(feature_map.shape[-2:]) for feature_map in feature_maps],
            [[stride, stride] for stride in self.strides],
        )
        return [torch.cat(levels)] * len(image_list.image_sizes)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign shifted by half a pixel, at the true scales of the pyramid's levels.

    torchvision leaves out the shift, and infers the scales from the first image it sees, wrongly
    where the padding is a large share of that image.
    """

    def __init__(self, features: Sequence[str], strides: Sequence[int], resolution: int) -> None:
        super().__init__(list(features), output_size=resolution, sampling_ratio=0)
        used = strides[: len(self.featmap_names)]
        self.scales: list[float] | None = [1 / stride for stride in used]
        self.map_levels = LevelMapper(int(math.log2(used[0])), int(math.log2(used[-1])))

    def forward(
        self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Pool maps (B, C, h, w) in boxes (n, 4) of each image to (sum of n, C, side, side)."""
        del image_shapes
        levels = [maps[name] for name in self.featmap_names]
        rois = torch.cat(
            [nn.functional.pad(of_one, (1, 0), value=place) for place, of_one in enumerate(boxes)]
        )
        chosen = self.map_levels(boxes)
        # On a CPU as sums of cells come, and convolutions of the mask head are faster.
        on_cpu = levels[0].device.type == "cpu"
        pooled = torch.empty(
            (len(rois), levels[0].shape[1], *self.output_size),
            dtype=levels[0].dtype,
            device=levels[0].device,
            memory_format=torch.channels_last if on_cpu else torch.contiguous_format,
        )
        for number, (level, scale) in enumerate(zip(levels, self.scales or (), strict=True)):
            (places,) = torch.where(chosen == number)
            of_level = roi_align(level, rois[places], self.output_size[0], scale)
            pooled[places] = of_level.to(pooled.dtype)
        return pooled


class Transform(GeneralizedRCNNTransform):
    """Normalise, resize as both libraries do here, and pad."""

    def __init__(self, vil: ViL, settings: Settings) -> None:
        super().__init__(
            settings.min_sizes,
            settings.max_size,
            image_mean=[value / 255 for value in PIXEL_MEAN],
            image_std=[value / 255 for value in PIXEL_STD],
            size_divisible=vil.stride,
        )
        self.settings = settings
        self.run_lengths = False

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Resize an image (3, H, W) and what is in it."""
        height, width = image.shape[-2:]
        size = network_size(height, width, self.settings, training=self.training, target=target)
        resized = None if target is None else resize_target(target, (height, width), size)
        return resize(image, size), resized

    def postprocess(
        self,
        result: list[dict[str, Any]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Return detections in the given images; masks as run lengths where they are asked for."""
        if self.training or not self.run_lengths:
            return super().postprocess(result, image_shapes, original_image_sizes)
        soft = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, masks, size in zip(result, soft, original_image_sizes, strict=True):
            if masks is not None:
                found["masks"] = _pasted(masks, found["boxes"], size)
        return result


class TorchvisionMaskRCNN(MaskRCNN, Detector):
    """Mask R-CNN: FPN on every map of the backbone, P6 by subsampling."""

    library = "torchvision"
    library_version = VERSION
    method = "mask_rcnn"
    backbone: Pyramid
    rpn: RegionProposalNetwork
    roi_heads: RoIHeads

    def __init__(self, vil: ViL, settings: Settings) -> None:
        channels, features = settings.fpn_channels, pyramid_features(vil, self.method)
        strides = pyramid_strides(vil, self.method)
        super().__init__(
            Pyramid(vil, features=features, out_channels=channels, extra=LastLevelMaxPool()),
            rpn_anchor_generator=PyramidAnchors([[s] for s in settings.anchor_sizes], strides),
            rpn_head=float32_outputs(RPNHead(channels, len(ASPECT_RATIOS))),
            rpn_pre_nms_top_n_train=settings.rpn_proposals[0],
            rpn_post_nms_top_n_train=settings.rpn_proposals[1],
            rpn_pre_nms_top_n_test=settings.rpn_proposals_test[0],
            rpn_post_nms_top_n_test=settings.rpn_proposals_test[1],
            rpn_batch_size_per_image=settings.rpn_batch,
            box_roi_pool=PyramidRoIAlign(features, strides, BOX_RESOLUTION),
            box_head=TwoMLPHead(channels * BOX_RESOLUTION**2, settings.head_width),
            box_predictor=float32_outputs(
                FastRCNNPredictor(settings.head_width, settings.num_classes + 1)
            ),
            box_score_thresh=settings.score_threshold,
            box_detections_per_img=settings.detections,
            box_batch_size_per_image=settings.roi_batch,
            box_positive_fraction=POSITIVE_FRACTION,
            mask_roi_pool=PyramidRoIAlign(features, strides, MASK_RESOLUTION),
            mask_head=MaskRCNNHeads(channels, (settings.mask_width,) * 4, 1),
            mask_predictor=float32_outputs(
                MaskRCNNPredictor(
                    settings.mask_width, settings.mask_width, settings.num_classes + 1
                )
            ),
        )
        self.settings = settings
        self.transform = Transform(vil, settings)
        self.num_classes, self.fpn_channels = settings.num_classes, channels
        self._initialise_heads()

    def _initialise_heads(self) -> None:
        """Give the heads the initial weights that detectron2 gives them."""
        box_head, box, mask = (
            self.roi_heads.box_head,
            self.roi_heads.box_predictor,
            self.roi_heads.mask_predictor,
        )
        for layer in (box_head.fc6, box_head.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(box.cls_score.weight, std=0.01)
        nn.init.normal_(box.bbox_pred.weight, std=0.001)
        nn.init.normal_(mask.mask_fcn_logits.weight, std=0.001)
        for layer in (
            box_head.fc6,
            box_head.fc7,
            box.cls_score,
            box.bbox_pred,
            mask.conv5_mask,
            mask.mask_fcn_logits,
        ):
            nn.init.zeros_(layer.bias)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Return losses in training and detections in evaluation, as the package says."""
        if targets is not None:
            check_targets(targets, num_classes=self.num_classes, masks=True)
        self.transform.run_lengths = self.run_lengths
        return super().forward(images, targets)

    def parts(self) -> dict[str, nn.Module]:
        heads = self.roi_heads
        return {
            **backbone_stages(self.vil),
            "fpn": self.backbone.fpn,
            "rpn": self.rpn.head,
            "box_head": nn.Sequential(heads.box_head, heads.box_predictor),
            "mask_head": nn.Sequential(heads.mask_head, heads.mask_predictor),
        }


class TorchvisionRetinaNet(RetinaNet, Detector):
    """RetinaNet: FPN on the maps from stride 8, P6 from the last of them, P7 from P6."""

    library = "torchvision"
    library_version = VERSION
    method = "retinanet"
    backbone: Pyramid
    head: RetinaNetHead

    def __init__(self, vil: ViL, settings: Settings) -> None:
        channels, features = settings.fpn_channels, pyramid_features(vil, self.method)
        extra = LastLevelP6P7(vil.channels[features[-1]], channels)
        # torchvision takes P5 instead where the backbone happens to be as wide as the pyramid.
        extra.use_P5 = False
        anchors = PyramidAnchors(octaves(settings.anchor_sizes), pyramid_strides(vil, self.method))
        super().__init__(
            Pyramid(vil, features=features, out_channels=channels, extra=extra),
            settings.num_classes,
            anchor_generator=anchors,
            head=float32_outputs(
                RetinaNetHead(channels, anchors.num_anchors_per_location()[0], settings.num_classes)
            ),
            score_thresh=settings.score_threshold,
            detections_per_img=settings.detections,
        )
        self.settings = settings
        self.transform = Transform(vil, settings)
        self.num_classes, self.fpn_channels = settings.num_classes, channels

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Return losses in training and detections in evaluation, as the package says.

        The head's outputs are the classes alone, so labels 1..num_classes are shifted by one on
        the way in and back on the way out.
        """
        if targets is not None:
            check_targets(targets, num_classes=self.num_classes, masks=False)
            kept = [{name: t[name] for name in ("boxes", "size") if name in t} for t in targets]
            targets = [k | {"labels": t["labels"] - 1} for k, t in zip(kept, targets, strict=True)]
        outputs = super().forward(images, targets)
        if self.training:
            return outputs
        return [_with_area({**output, "labels": output["labels"] + 1}) for output in outputs]

    def parts(self) -> dict[str, nn.Module]:
        return {
            **backbone_stages(self.vil),
            "fpn": self.backbone.fpn,
            "retinanet_head": self.head,
        }


# By method.
DETECTORS = {"mask_rcnn": TorchvisionMaskRCNN, "retinanet": TorchvisionRetinaNet}


def _pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> RunLengths:
    """Masks (n, 1, side, side) of boxes in an image of a size, a few at a time."""
    counts: list[bytes] = []
    few = max(1, PASTED_AT_ONCE // (size[0] * size[1]))
    for some, own in zip(masks.split(few), boxes.split(few), strict=True):
        counts += encode_soft(paste_masks_in_image(some, own, size))
    return RunLengths(tuple(counts), (len(masks), 1, *size))


def _with_area(output: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out boxes that nothing remained of when they were clipped to the image."""
    boxes = output["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {name: values[keep] for name, values in output.items()}
