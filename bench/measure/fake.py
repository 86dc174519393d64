"""Running modules on tensors that have shapes and no memory.

`torch._subclasses.FakeTensorMode` makes such tensors. They claim to be on the CPU and therefore
take its way through autograd, autocast and the choice of fused attention. What it lacks is here:

- What depends on data: a detector asks for values between its parts, so its parts run on stated
  numbers of boxes (`run_parts`).
- What a GPU does otherwise (`AsOnCuda`): operators that autocast keeps in float32 there alone, and
  its fused attention.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, roi_align, sigmoid_focal_loss

from bench.model.detectors import BOX_RESOLUTION, MASK_RESOLUTION, Detector
from bench.model.detectors.roi_align import sum_of_cells
from bench.model.detectors.rois import Counts, fixed_levels

aten = torch.ops.aten

# Bias rows of efficient attention on CUDA are padded to a multiple of so many keys.
_BIAS_ALIGNMENT = 16
# Fused attention on CUDA takes heads whose width is a multiple of so many channels.
_HEAD_ALIGNMENT = 8
# Cells a side of an RoI on its level: 14 to 28.
_ROI_SIDE = 21


def copied(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `module` whose tensors are what `convert` makes of its own.

    Those in plain attributes count too, in containers as well: a mechanism may keep a mask there.
    What cannot be copied, as locks and modules of Python, both have.
    """
    memo: dict[int, Any] = {}
    others: list[object] = []
    for part in module.modules():
        for tensor in tree_leaves(vars(part)):
            if not isinstance(tensor, Tensor | nn.Module):
                others.append(tensor)
            elif isinstance(tensor, Tensor) and id(tensor) not in memo:
                made = convert(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = made
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:
        for other in others:
            try:
                copy.deepcopy(other, dict(memo))
            except Exception:
                memo[id(other)] = other
    return copy.deepcopy(module, memo)


def run_parts(
    detector: Detector,
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]] | None,
    counts: Counts,
    *,
    device: str,
) -> Any:
    """Run the parts of a detector on stated numbers of RoIs, and what is large between them.

    A detector's own forward pass asks for values between its parts: which boxes overlap, which
    scores are high. Here boxes are any, in the numbers of `counts`: of inference on the levels that
    fixed ones go to, of training on the first. Left out is what is small beside the maps.

    Args:
        detector: with tensors that have no values, in the mode that is meant.
        images: (3, H, W) each, of one size.
        targets: `boxes`, `labels` and `masks` of each image when training, or None.
        counts: of `most`.
        device: where it would run, "cpu" or "cuda".

    Returns:
        losses when training, or whatever an inference ends with.
    """
    if detector.library == "detectron2":
        # It is given values up to 255, and keeps these too until it ends.
        images = [255 * image for image in images]
    batch = _batched(images, detector.vil.stride)
    levels = list(detector.backbone(batch).values())
    run = _mask_rcnn if detector.method == "mask_rcnn" else _retinanet
    return run(detector, levels, images[0].shape[-2:], targets, counts, device)


def _batched(images: Sequence[Tensor], stride: int) -> Tensor:
    """Images normalised and padded (B, 3, H, W)."""
    height, width = (-(-side // stride) * stride for side in images[0].shape[-2:])
    normal = [(image - 0.5) / 0.5 for image in images]
    batch = normal[0].new_zeros(len(normal), 3, height, width)
    for place, image in zip(batch, normal, strict=True):
        place[:, : image.shape[1], : image.shape[2]].copy_(image)
    return batch


def _mask_rcnn(
    detector: Detector,
    levels: list[Tensor],
    size: torch.Size,
    targets: Sequence[Mapping[str, Tensor]] | None,
    counts: Counts,
    device: str,
) -> Any:
    parts, batch = detector.parts(), len(levels[0])
    masks = [target["masks"].clone() for target in targets or ()]
    losses = _proposed(detector, parts["rpn"](levels), targets)
    # In detectron2 each RoI has the mask of its object, as large as the image.
    copies = [
        mask[mask.new_empty(counts.rois or 0, dtype=torch.int64)]
        for mask in masks
        if detector.library == "detectron2"
    ]
    maps = levels[: len(detector.vil.channels)]

    def pooled(rois: int, resolution: int) -> Tensor:
        strides = list(detector.vil.strides.values())
        # Which boxes are sampled in training depends on their overlaps.
        shares = fixed_levels(rois, (size[0], size[1]), strides) if targets is None else [rois]
        summed = device == "cpu" and detector.library == "torchvision"
        return _pooled(maps, [batch * share for share in shares], resolution, summed=summed)

    rois = (counts.proposals if targets is None else counts.rois) or 0
    scores, boxes = _in_turn(parts["box_head"], pooled(rois, BOX_RESOLUTION))
    if targets is None:
        _detected(scores, boxes)
    else:
        labels = scores.new_empty(len(scores), dtype=torch.int64)
        losses += [nn.functional.cross_entropy(scores, labels), boxes.abs().sum()]
    of_masks = (counts.detections if targets is None else counts.mask_rois) or 0
    masks = [every[:of_masks].clone() for every in copies] or masks
    drawn = _in_turn(parts["mask_head"], pooled(of_masks, MASK_RESOLUTION))
    places = drawn.new_empty(len(drawn), dtype=torch.int64)
    if targets is None:
        chosen = drawn.sigmoid()[places, places]
        del drawn
        return [_pasted(detector.library, part, size) for part in chosen.split(of_masks)]
    for target in masks:
        given = target[:, None].to(drawn.dtype)
        boxes = given.new_empty(of_masks, 5)
        losses_of = roi_align(given, boxes, drawn.shape[-1], 1.0, -1, True)
        del given, losses_of
    wanted = drawn.new_empty(len(drawn), *drawn.shape[-2:])
    chosen = drawn[places, places]
    return [*losses, nn.functional.binary_cross_entropy_with_logits(chosen, wanted)]


def _proposed(
    detector: Detector,
    outputs: tuple[list[Tensor], list[Tensor]],
    targets: Sequence[Mapping[str, Tensor]] | None,
) -> list[Tensor]:
    """Decode a box for every anchor; when training, match them with objects: the RPN's losses."""
    logits, deltas = _flat(outputs[0], 1).flatten(0, 1), _flat(outputs[1], 4)
    anchors = deltas.new_empty(deltas.shape[1], 4)
    decode = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single
    proposals = decode(deltas.detach().flatten(0, 1), anchors.repeat(len(deltas), 1))
    if targets is None:
        return []
    for target in targets:
        box_iou(target["boxes"], anchors)
    wanted = torch.zeros_like(proposals)
    sampled = wanted.new_empty(len(targets) * detector.settings.rpn_batch, dtype=torch.int64)
    chosen = logits[sampled]
    objects = nn.functional.binary_cross_entropy_with_logits(chosen, torch.zeros_like(chosen))
    return [objects, (deltas.flatten(0, 1)[sampled] - wanted[sampled]).abs().sum()]


def _retinanet(
    detector: Detector,
    levels: list[Tensor],
    _size: torch.Size,
    targets: Sequence[Mapping[str, Tensor]] | None,
    counts: Counts,
    _device: str,
) -> Any:
    outputs = detector.parts()["retinanet_head"](levels)
    if isinstance(outputs, Mapping):
        logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]
    else:
        logits, deltas = _flat(outputs[0], detector.num_classes), _flat(outputs[1], 4)
    anchors = deltas.new_empty(deltas.shape[1], 4)
    if targets is None:
        # The largest level: its scores, which of them are high, and the boxes of these.
        places = [level[0, 0].numel() for level in levels]
        first = logits[:, : logits.shape[1] * places[0] // sum(places)]
        return [of_one.sigmoid().flatten() > 0 for of_one in first]
    losses = []
    for of_one, target in zip(logits, targets, strict=True):
        box_iou(target["boxes"], anchors)
        wanted = torch.zeros_like(of_one)
        # All anchors but the few that are neither background nor an object.
        valid = wanted.new_empty(len(wanted), dtype=torch.int64)
        losses += [sigmoid_focal_loss(of_one[valid], wanted[valid], reduction="sum")]
    return [*losses, deltas.flatten(0, 1)[: counts.targets].abs().sum()]


def _in_turn(layers: Any, features: Any) -> Any:
    """Run layers one after the other; what one took is not alive in the next."""
    taken = [features]
    del features
    for layer in layers:
        taken.append(layer(taken.pop()))
    return taken.pop()


def _flat(maps: Sequence[Tensor], width: int) -> Tensor:
    """Maps (B, A * width, h, w) of all levels as (B, anchors, width)."""
    flat = [m.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
    return torch.cat(flat, dim=1)


def _pooled(
    maps: Sequence[Tensor], shares: Sequence[int], resolution: int, *, summed: bool
) -> Tensor:
    """RoIAlign of as many RoIs on each level as `shares` says, of none on those that it lacks.

    Args:
        summed: whether as a sum of cells, as torchvision's detectors have it on a CPU.
    """
    pooled = maps[0].new_zeros(sum(shares), maps[0].shape[1], resolution, resolution)
    for level, share in zip(maps, [*shares, *[0] * len(maps)], strict=False):
        places = pooled.new_empty(share, dtype=torch.int64)
        boxes = pooled.new_empty(len(places), 5, dtype=torch.float32)
        if summed:
            of_level = sum_of_cells(level, boxes, resolution, 1.0, _cells)
        else:
            of_level = roi_align(level, boxes, resolution, 1.0, 0, True)
        pooled[places] = of_level.to(pooled.dtype)
    return pooled


def _cells(
    rois: Tensor, resolution: int, _scale: float, _shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """As `roi_align.cells_of_bins`, of RoIs of the usual size; a bin has one cell more a side."""
    bins = len(rois) * resolution**2
    ends = rois.new_empty(bins + 1, dtype=torch.int32)
    each = (_ROI_SIDE / resolution + 1) ** 2
    taken = rois.new_empty(round(bins * each), dtype=torch.int32)
    return taken, ends, rois.new_empty(len(taken))


def _detected(scores: Tensor, boxes: Tensor) -> None:
    """Scores and boxes of all classes, clipped."""
    scores.softmax(-1)
    boxes.float().unflatten(1, (-1, 4)).clamp(min=0).flatten(0, 1).clone()


def _pasted(library: str, masks: Tensor, size: torch.Size) -> Tensor:
    """Masks (n, side, side) as large as the image, as the library makes them."""
    if library == "detectron2":
        return masks.new_zeros(len(masks), *size, dtype=torch.bool)
    return torch.stack([masks.new_zeros(size) for _ in masks])


# Operators that autocast runs in float32 on CUDA and in the dtype of their input on the CPU.
_FLOAT32_ON_CUDA = """
    layer_norm group_norm softmax log_softmax exp expm1 log log1p log2 log10 pow __pow__ rsqrt
    reciprocal softplus sum cumsum cumprod norm cosine_similarity interpolate
    binary_cross_entropy_with_logits cross_entropy nll_loss l1_loss smooth_l1_loss mse_loss
    huber_loss kl_div logsumexp cdist
"""
_FLOAT32_NAMES = frozenset(_FLOAT32_ON_CUDA.split())


class AsOnCuda(TorchFunctionMode):
    """Does on CPU tensors what a GPU would: float32 under autocast, and fused attention.

    Fused attention is "efficient" with a mask or in float32 and "flash" otherwise. cuDNN's, which
    some GPUs prefer, keeps as much as flash.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            return _cuda_attention(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _FLOAT32_NAMES and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the operator that CUDA takes."""
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(low) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(low)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, dim=-3) for tensor in (key, value))
    fused = query.dim() == 4 and not query.shape[-1] % _HEAD_ALIGNMENT
    if not fused or value.shape[-1] % _HEAD_ALIGNMENT:
        found: tuple[Tensor, ...] = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )
        return found[0]
    if attn_mask is None and query.dtype != torch.float32:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return found[0]
    if attn_mask is not None:
        attn_mask = _cuda_bias(attn_mask, query, key)
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    found = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )
    return found[0]


def _cuda_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as efficient attention wants it: additive, its rows aligned, (B, H, L, S)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0.0)
    keys = mask.shape[-1]
    missing = -keys % _BIAS_ALIGNMENT
    if missing:
        mask = nn.functional.pad(mask, (0, missing))[..., :keys]
    return mask.expand(*query.shape[:3], key.shape[2])
