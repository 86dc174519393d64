"""Mask R-CNN and RetinaNet of detectron2 around ViL, as the published models were configured.

Modules are detectron2's own, under the names of its configurations
(https://github.com/facebookresearch/detectron2, configs/Base-RCNN-FPN.yaml, Base-RetinaNet.yaml),
so that a published state dict fits as it is. Images and targets are converted in `forward` alone.
"""

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import detectron2
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

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

VERSION: str = detectron2.__version__
# What detectron2's own calls of torch make torch say, at every start.
warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


class Detectron2MaskRCNN(GeneralizedRCNN, Detector):
    """Mask R-CNN: FPN on every map of the backbone, P6 by subsampling."""

    library = "detectron2"
    library_version = VERSION
    method = "mask_rcnn"
    proposal_generator: RPN
    roi_heads: StandardROIHeads

    def __init__(self, vil: ViL, settings: Settings) -> None:
        strides = pyramid_strides(vil, self.method)
        super().__init__(
            backbone=pyramid(
                vil,
                pyramid_features(vil, self.method),
                settings.fpn_channels,
                LastLevelMaxPool(),
            ),
            proposal_generator=_proposal_generator(strides, settings),
            roi_heads=_roi_heads(strides[:-1], settings),
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
            input_format="RGB",
        )
        self.settings = settings
        self.num_classes, self.fpn_channels = settings.num_classes, settings.fpn_channels

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Return losses in training and detections in evaluation, as the package says."""
        inputs = _to_detectron2(self, images, targets, masks=True)
        with EventStorage():
            if self.training or not self.run_lengths:
                return _from_detectron2(self, super().forward(inputs))
            found = GeneralizedRCNN.inference(self, inputs, do_postprocess=False)
        sizes = [(one["height"], one["width"]) for one in inputs]
        return [_in_pieces(*both) for both in zip(found, sizes, strict=True)]

    def parts(self) -> dict[str, nn.Module]:
        heads = self.roi_heads
        return {
            **backbone_stages(self.vil),
            "fpn": _without_backbone(self.backbone),
            "rpn": self.proposal_generator.rpn_head,
            "box_head": nn.Sequential(heads.box_head, heads.box_predictor),
            # Called as it is, the head goes on to losses or to the masks of instances.
            "mask_head": nn.Sequential(*heads.mask_head),
        }


class Detectron2RetinaNet(RetinaNet, Detector):
    """RetinaNet: FPN on the maps from stride 8, P6 from the last of them, P7 from P6.

    The losses are divided by a moving average of the numbers of positive anchors, the attribute
    `loss_normalizer`, which detectron2 keeps in no state dict.
    """

    running = ("loss_normalizer",)
    library = "detectron2"
    library_version = VERSION
    method = "retinanet"

    def __init__(self, vil: ViL, settings: Settings) -> None:
        channels, strides = settings.fpn_channels, pyramid_strides(vil, self.method)
        features = pyramid_features(vil, self.method)
        top = LastLevelP6P7(vil.channels[features[-1]], channels, in_feature=features[-1])
        sizes = octaves(settings.anchor_sizes)
        head = RetinaNetHead(
            input_shape=[ShapeSpec(channels=channels)] * len(strides),
            num_classes=settings.num_classes,
            num_anchors=len(sizes[0]) * len(ASPECT_RATIOS),
            conv_dims=[channels] * 4,
        )
        super().__init__(
            backbone=pyramid(vil, features, channels, top),
            head=float32_outputs(head),
            head_in_features=_level_names(strides),
            anchor_generator=_anchors(sizes, strides),
            box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
            anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
            num_classes=settings.num_classes,
            smooth_l1_beta=0.0,
            test_score_thresh=settings.score_threshold,
            max_detections_per_image=settings.detections,
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
            input_format="RGB",
        )
        # What detectron2 begins with where the attribute is missing.
        self.loss_normalizer = 100.0
        self.settings = settings
        self.fpn_channels = channels

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Return losses in training and detections in evaluation, as the package says."""
        inputs = _to_detectron2(self, images, targets, masks=False)
        with EventStorage():
            return _from_detectron2(self, super().forward(inputs))

    def parts(self) -> dict[str, nn.Module]:
        return {
            **backbone_stages(self.vil),
            "fpn": _without_backbone(self.backbone),
            "retinanet_head": self.head,
        }


# By method.
DETECTORS = {"mask_rcnn": Detectron2MaskRCNN, "retinanet": Detectron2RetinaNet}


class _Maps(Backbone):
    """The shapes of the backbone's maps, which is all that the pyramid asks for when it is made."""

    def __init__(self, vil: ViL) -> None:
        super().__init__()
        self.shapes = {
            name: ShapeSpec(channels=channels, stride=vil.strides[name])
            for name, channels in vil.channels.items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return maps


def pyramid(vil: ViL, features: Sequence[str], channels: int, top: nn.Module, **how: Any) -> FPN:
    """Return an FPN with `vil` below it; `how` is what FPN takes besides."""
    result = FPN(_Maps(vil), features, channels, top_block=top, **how)
    # In this place, and not wrapped, ViL's parameters have their published names.
    result.bottom_up = vil
    return result


def _without_backbone(fpn: FPN) -> FPN:
    """Return the pyramid, sharing its layers, as a module from the backbone's maps to levels."""
    shared = copy.copy(fpn)
    shared._modules = {**fpn._modules, "bottom_up": _Maps(fpn.bottom_up)}
    return shared


def _level_names(strides: tuple[int, ...]) -> list[str]:
    return [f"p{int(math.log2(stride))}" for stride in strides]


def _anchors(sizes: list[list[float]], strides: tuple[int, ...]) -> DefaultAnchorGenerator:
    return DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[list(ASPECT_RATIOS)], strides=list(strides), offset=0.0
    )


def _proposal_generator(strides: tuple[int, ...], settings: Settings) -> RPN:
    head = StandardRPNHead(in_channels=settings.fpn_channels, num_anchors=len(ASPECT_RATIOS))
    (pre_train, post_train), (pre_test, post_test) = (
        settings.rpn_proposals,
        settings.rpn_proposals_test,
    )
    return RPN(
        in_features=_level_names(strides),
        head=float32_outputs(head),
        anchor_generator=_anchors([[float(size)] for size in settings.anchor_sizes], strides),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=settings.rpn_batch,
        positive_fraction=0.5,
        pre_nms_topk=(pre_train, pre_test),
        post_nms_topk=(post_train, post_test),
        nms_thresh=0.7,
    )


def _roi_heads(strides: tuple[int, ...], settings: Settings) -> StandardROIHeads:
    channels, width = settings.fpn_channels, settings.head_width
    levels = _level_names(strides)
    mask_head = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=channels, height=MASK_RESOLUTION, width=MASK_RESOLUTION),
        num_classes=settings.num_classes,
        conv_dims=[settings.mask_width] * 5,
    )
    float32_outputs(mask_head.predictor)
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=width),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=settings.num_classes,
        test_score_thresh=settings.score_threshold,
        test_topk_per_image=settings.detections,
    )
    return StandardROIHeads(
        num_classes=settings.num_classes,
        batch_size_per_image=settings.roi_batch,
        positive_fraction=POSITIVE_FRACTION,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=levels,
        box_pooler=_pooler(BOX_RESOLUTION, strides),
        box_head=FastRCNNConvFCHead(
            ShapeSpec(channels=channels, height=BOX_RESOLUTION, width=BOX_RESOLUTION),
            conv_dims=[],
            fc_dims=[width, width],
        ),
        box_predictor=float32_outputs(predictor),
        mask_in_features=levels,
        mask_pooler=_pooler(MASK_RESOLUTION, strides),
        mask_head=mask_head,
    )


def _pooler(resolution: int, strides: tuple[int, ...]) -> ROIPooler:
    pooler = ROIPooler(
        resolution,
        scales=[1 / stride for stride in strides],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )
    pooler.register_forward_pre_hook(_wide_enough)
    return pooler


def _wide_enough(_pooler: nn.Module, inputs: tuple[list[Tensor], Any]) -> tuple[Any, Any]:
    """Pool bfloat16 maps in float32.

    detectron2 casts RoIs to the dtype of the maps. The published float16 keeps their coordinates
    to a pixel; bfloat16 would move those beyond 1024 by up to four.
    """
    maps, boxes = inputs
    return [m.float() if m.dtype == torch.bfloat16 else m for m in maps], boxes


def _to_detectron2(
    detector: Detectron2MaskRCNN | Detectron2RetinaNet,
    images: list[Tensor],
    targets: list[Target] | None,
    *,
    masks: bool,
) -> list[dict[str, Any]]:
    """Resize images and targets, and say in which size detections are wanted."""
    if detector.training:
        if targets is None:
            raise ValueError("training needs targets")
        check_targets(targets, num_classes=detector.num_classes, masks=masks)
    inputs: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        height, width = image.shape[-2:]
        target = targets[index] if detector.training and targets is not None else None
        size = network_size(
            height, width, detector.settings, training=detector.training, target=target
        )
        inputs.append({"image": resize(255 * image, size), "height": height, "width": width})
        if target is not None:
            resized = resize_target(target, (height, width), size)
            inputs[-1]["instances"] = _instances(resized, size, masks=masks)
    return inputs


def _instances(target: Target, size: tuple[int, int], *, masks: bool) -> Instances:
    instances = Instances(size)
    instances.gt_boxes = Boxes(target["boxes"])
    instances.gt_classes = target["labels"] - 1
    if masks:
        instances.gt_masks = BitMasks(target["masks"])
    return instances


def _from_detectron2(detector: Detectron2MaskRCNN | Detectron2RetinaNet, outputs: Any) -> Any:
    """Return losses as they are, and instances as dictionaries of tensors."""
    if detector.training:
        return outputs
    return [_detected(output["instances"]) for output in outputs]


def _in_pieces(instances: Instances, size: tuple[int, int]) -> dict[str, Any]:
    """Return what was found in an image of a size; few masks at a time have its pixels."""
    few = max(1, PASTED_AT_ONCE // (size[0] * size[1]))
    pieces: list[dict[str, Any]] = []
    counts: list[bytes] = []
    for first in range(0, max(1, len(instances)), few):
        pieces.append(_detected(detector_postprocess(instances[first : first + few], *size)))
        counts += encode_soft(pieces[-1].pop("masks"))
    found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return found | {"masks": RunLengths(tuple(counts), (len(counts), 1, *size))}


def _detected(instances: Instances) -> dict[str, Tensor]:
    found = {
        "boxes": instances.pred_boxes.tensor,
        "labels": instances.pred_classes + 1,
        "scores": instances.scores,
    }
    if instances.has("pred_masks"):
        found["masks"] = instances.pred_masks[:, None].float()
    return found
