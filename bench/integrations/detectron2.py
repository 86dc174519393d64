"""ViL in detectron2's registry: a pyramid on it for yaml configurations and LazyConfig.

detectron2: https://github.com/facebookresearch/detectron2. A program that trains with a yaml file
imports this module, calls `add_vil_config(cfg)` after `get_cfg()`, and the file names
`MODEL.BACKBONE.NAME: build_vil_fpn_backbone`. In a LazyConfig, `L(vil_fpn)(...)` is the backbone.
Parameters have the published names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from bench.config.suites import profile_configs
from bench.config.values import assigned
from bench.errors import InputError
from bench.model.backbone import ViL
from bench.model.detectors import pyramid_features
from bench.model.detectors.detectron2 import pyramid


def add_vil_config(cfg: CfgNode) -> None:
    """Add `MODEL.VIL`, which describes the backbone; the keys are arguments of `vil_fpn`."""
    cfg.MODEL.VIL = CfgNode(
        {
            "BACKBONE": "small",
            "ATTENTION": "longformer",
            # "absolute" or "relative"; empty for that of the row.
            "POSITION": "",
            "IMAGE_SIZE": 1333,
            "DROP_PATH": 0.1,
            # Of the mechanism, such as ["window=7", "share_kv=true"].
            "OPTIONS": [],
            "GRAD_CHECKPOINTING": False,
        }
    )


def vil_fpn(
    *,
    backbone: str = "small",
    attention: str = "longformer",
    position: str | None = None,
    image_size: int | Sequence[int] = 1333,
    drop_path: float = 0.1,
    options: Mapping[str, Any] | None = None,
    grad_checkpointing: bool = False,
    method: str = "mask_rcnn",
    in_features: Sequence[str] = (),
    out_channels: int = 256,
    norm: str = "",
    fuse_type: str = "sum",
) -> FPN:
    """Return a feature pyramid on ViL.

    Random features of a mechanism are redrawn at the steps of detectron2's event storage, from the
    step alone, so that all processes draw the same.

    Args:
        backbone: a name in `configs/backbones.yaml`.
        attention: a mechanism, a row of `configs/rows.yaml` such as "Partial ViL", or a mechanism
            of the user as `package.module:Class` or `file.py:Class`.
        position: "absolute" or "relative" in all stages; None for that of the row.
        image_size: largest side, or largest (height, width), of the images to come, in pixels.
        drop_path: probability of the last block's residuals to be dropped.
        options: of the mechanism.
        grad_checkpointing: compute the inside of each block again in the backward pass.
        method: "mask_rcnn" for levels P2 to P6, "retinanet" for P3 to P7.
        in_features: maps of ViL, "layer1" to "layer4"; empty for those of the method.
        out_channels, norm, fuse_type: of detectron2's FPN.

    Raises:
        ValueError: for an unknown name or option, or a value that is not allowed.
    """
    (config,) = profile_configs([attention], backbone=backbone, position=position)
    vil = ViL(
        config.model.arch,
        attention=config.model.attention,
        dense=config.model.dense,
        image_size=image_size if isinstance(image_size, int) else (image_size[0], image_size[-1]),
        drop_path=drop_path,
        **(config.model.options | dict(options or {})),
    )
    vil.grad_checkpointing = grad_checkpointing
    vil.register_forward_pre_hook(_tell_step)
    # No loss depends on the classifier, and DistributedDataParallel waits for every gradient.
    for module in (vil.norm, vil.head):
        module.requires_grad_(False)
    features = tuple(in_features) or pyramid_features(vil, method)
    unknown = [name for name in features if name not in vil.channels]
    if unknown:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES: unknown map {unknown[0]!r}; allowed: {', '.join(vil.channels)}"
        )
    top = LastLevelMaxPool()
    if method == "retinanet":
        top = LastLevelP6P7(vil.channels[features[-1]], out_channels, in_feature=features[-1])
    return pyramid(vil, features, out_channels, top, norm=norm, fuse_type=fuse_type)


@BACKBONE_REGISTRY.register()
def build_vil_fpn_backbone(cfg: CfgNode, _input_shape: ShapeSpec) -> FPN:
    """ViL and the pyramid of Mask R-CNN, P2 to P6, as `MODEL.VIL` and `MODEL.FPN` say."""
    return _of_config(cfg, "mask_rcnn")


@BACKBONE_REGISTRY.register()
def build_retinanet_vil_fpn_backbone(cfg: CfgNode, _input_shape: ShapeSpec) -> FPN:
    """ViL and the pyramid of RetinaNet, P3 to P7, as `MODEL.VIL` and `MODEL.FPN` say."""
    return _of_config(cfg, "retinanet")


def _of_config(cfg: CfgNode, method: str) -> FPN:
    if "VIL" not in cfg.MODEL:
        raise InputError(
            "the configuration has no MODEL.VIL; call"
            " bench.integrations.detectron2.add_vil_config(cfg) after get_cfg()"
        )
    vil, fpn = cfg.MODEL.VIL, cfg.MODEL.FPN
    return vil_fpn(
        backbone=vil.BACKBONE,
        attention=vil.ATTENTION,
        position=vil.POSITION or None,
        image_size=vil.IMAGE_SIZE,
        drop_path=vil.DROP_PATH,
        options=assigned(vil.OPTIONS),
        grad_checkpointing=vil.GRAD_CHECKPOINTING,
        method=method,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        fuse_type=fpn.FUSE_TYPE,
    )


def _tell_step(vil: nn.Module, _inputs: Any) -> None:
    if not (isinstance(vil, ViL) and vil.training and has_event_storage()):
        return
    step = get_event_storage().iter
    devices = sorted({p.device.index or 0 for p in vil.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(step)
        vil.start_training_step(step)
