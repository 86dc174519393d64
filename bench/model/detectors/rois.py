"""Mask R-CNN on stated numbers of RoIs, whatever it finds.

How many RoIs reach the heads, and how large they are, depends on weights and images: the mask head
of an untrained detector sees next to none, and costs nothing. So that rows can be compared, trained
or not, and memory be predicted, what is measured runs on fixed boxes, as many as `Counts` says:
proposals and detections, their scores and classes are replaced before non-maximum suppression,
whose cost depends on them too, and after it, which may leave too few.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.model.detectors import POSITIVE_FRACTION, Detector

# A logit that is surer of its class than any threshold asks.
_SURE = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a detector works on in an image, which no shape says.

    Attributes:
        proposals: RoIs in the box head when evaluating.
        detections: RoIs in the mask head when evaluating.
        rois: RoIs in the box head when training.
        mask_rois: RoIs in the mask head when training.
        targets: objects when training.

    None where nothing is stated; RetinaNet has no RoIs.
    """

    proposals: int | None = None
    detections: int | None = None
    rois: int | None = None
    mask_rois: int | None = None
    targets: int = 8


def most(detector: Detector, counts: Counts | None = None) -> Counts:
    """Return `counts`, and where it states nothing the most that the detector is configured for.

    When training a quarter of the RoIs have an object, at most, and reach the mask head.
    """
    counts = counts or Counts()
    if detector.method != "mask_rcnn":
        return Counts(targets=counts.targets)
    settings = detector.settings
    rois = settings.roi_batch if counts.rois is None else counts.rois
    limits = {
        "proposals": settings.rpn_proposals_test[1],
        "detections": settings.detections,
        "rois": rois,
        "mask_rois": int(rois * POSITIVE_FRACTION),
    }
    stated = {name: value for name, value in vars(counts).items() if value is not None}
    return Counts(**(limits | stated))


@contextmanager
def fixed_rois(detector: Detector, counts: Counts) -> Iterator[None]:
    """Let the heads of `detector` run on fixed RoIs; nothing happens to RetinaNet.

    An image without objects has no RoIs for the mask head when training.

    Args:
        counts: of `most`, nothing in it left open.
    """
    fix = {"torchvision": _fix_torchvision, "detectron2": _fix_detectron2}
    with ExitStack() as stack:
        if detector.method == "mask_rcnn":
            fix[detector.library](detector, counts, stack)
        yield


# Powers of the inverse of the plastic number, whose multiples spread evenly in three axes.
_STEPS = (0.8191725134, 0.6710436067, 0.5497004779)


def fixed_boxes(count: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Return boxes (count, 4) within an image of `size` (rows, columns), the same each time.

    Their centres are spread evenly (a sequence of low discrepancy, so that the first few are too),
    their sides from an eighth to half of the image's.
    """
    number = torch.arange(1, count + 1, device=like.device, dtype=torch.float64)
    x, y, z = ((number * step).frac() for step in _STEPS)
    half_side = (1 + 3 * z) / 16
    sides = torch.stack([half_side * size[1], half_side * size[0]], dim=1)
    centres = torch.stack([x * size[1], y * size[0]], dim=1)
    limits = torch.tensor([size[1], size[0]], device=like.device, dtype=torch.float64)
    # Those at the border are moved inwards, so that all keep their size.
    centres = centres.maximum(sides).minimum(limits - sides)
    return torch.cat([centres - sides, centres + sides], dim=1).to(like.dtype)


def fixed_levels(count: int, size: tuple[int, int], strides: Sequence[int]) -> list[int]:
    """Return how many of `fixed_boxes` are pooled at each stride of the pyramid, by their area."""
    found = [0] * len(strides)
    lowest = round(math.log2(strides[0]))
    for number in range(1, count + 1):
        side = (1 + 3 * (number * _STEPS[2] % 1)) / 8 * math.sqrt(size[0] * size[1])
        # Boxes of 224 pixels a side belong to stride 16.
        level = math.floor(4 + math.log2(side / 224)) - lowest
        found[min(max(level, 0), len(strides) - 1)] += 1
    return found


def _scores(count: int, like: Tensor) -> Tensor:
    """From 1 down to a half: (count,)."""
    return torch.linspace(1.0, 0.5, count, device=like.device, dtype=like.dtype)


def _shuffled_scores(like: Tensor) -> Tensor:
    """Between 0 and 1, neighbours far apart, so that the largest are spread evenly: (n,)."""
    number = torch.arange(like.shape[1], device=like.device, dtype=torch.float64)
    return (number * 0.6180339887).frac().to(like.dtype)


def _classes(count: int, num_classes: int, like: Tensor) -> Tensor:
    """Each class in turn, from 0: (count,)."""
    return torch.arange(count, device=like.device) % num_classes


def _logits(like: Tensor, classes: Tensor) -> Tensor:
    """Logits (n, classes) like those given, that are sure of one class each."""
    columns = torch.arange(like.shape[1], device=like.device)
    return (columns[None] == classes[:, None]).to(like.dtype) * _SURE


def _cycled(found: Tensor, count: int) -> Tensor:
    """The first `count` entries of `found` (n, ...), over and over where these are fewer."""
    return found[torch.arange(count, device=found.device) % max(len(found), 1)]


def _sampled(has_object: Tensor, counts: Counts) -> Tensor:
    """Places in `has_object` (n,) of as many RoIs with and without an object as `counts` says."""
    (objects,) = torch.where(has_object)
    (background,) = torch.where(has_object.logical_not())
    mask_rois, rois = counts.mask_rois or 0, counts.rois or 0
    return torch.cat(
        [
            _cycled(first if len(first) else other, count)
            for first, other, count in (
                (objects, background, mask_rois),
                (background, objects, rois - mask_rois),
            )
        ]
    )


def _replace(stack: ExitStack, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    stack.enter_context(patch.object(module, name, function))


def _fix_torchvision(detector: Any, counts: Counts, stack: ExitStack) -> None:
    rpn, heads = detector.rpn, detector.roi_heads
    proposals, detections = counts.proposals or 0, counts.detections or 0
    filter_proposals, subsample = rpn.filter_proposals, heads.subsample
    postprocess = heads.postprocess_detections

    def fixed_proposals(
        boxes: Tensor, objectness: Tensor, image_shapes: Sequence[tuple[int, int]], *rest: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        fixed = torch.stack([fixed_boxes(boxes.shape[1], size, boxes) for size in image_shapes])
        scores = _scores(boxes.shape[1], objectness).repeat(len(boxes)).reshape_as(objectness)
        kept, certain = filter_proposals(fixed, scores, image_shapes, *rest)
        if not rpn.training:
            kept = [fixed_boxes(proposals, size, boxes) for size in image_shapes]
            certain = [_scores(proposals, objectness) for _ in image_shapes]
        return kept, certain

    def fixed_samples(labels: Sequence[Tensor]) -> list[Tensor]:
        samples = zip(labels, subsample(labels), strict=True)
        return [places[_sampled(of_one[places] > 0, counts)] for of_one, places in samples]

    def fixed_detections(
        logits: Tensor, regression: Tensor, given: Sequence[Tensor], *rest: Any
    ) -> tuple[list[Tensor], ...]:
        classes = 1 + _classes(len(logits), detector.num_classes, logits)
        postprocess(_logits(logits, classes), torch.zeros_like(regression), given, *rest)
        return (
            [_cycled(boxes, detections) for boxes in given],
            [_scores(detections, logits) for _ in given],
            [1 + _classes(detections, detector.num_classes, logits) for _ in given],
        )

    _replace(stack, rpn, "filter_proposals", fixed_proposals)
    _replace(stack, heads, "subsample", fixed_samples)
    _replace(stack, heads, "postprocess_detections", fixed_detections)


def _fix_detectron2(detector: Any, counts: Counts, stack: ExitStack) -> None:
    from detectron2.structures import Boxes, Instances

    generator, heads = detector.proposal_generator, detector.roi_heads
    proposals, detections = counts.proposals or 0, counts.detections or 0
    find, sample = generator.predict_proposals, heads._sample_proposals
    inference = heads.box_predictor.inference

    def fixed_proposals(
        anchors: Any, logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Sequence[Any]
    ) -> list[Any]:
        scores = [_shuffled_scores(level).expand_as(level) for level in logits]
        found: list[Any] = find(anchors, scores, [torch.zeros_like(d) for d in deltas], sizes)
        if generator.training:
            return found
        return [
            Instances(
                size,
                proposal_boxes=Boxes(fixed_boxes(proposals, size, logits[0])),
                objectness_logits=_scores(proposals, logits[0]),
            )
            for size in sizes
        ]

    def fixed_samples(*args: Any) -> tuple[Tensor, Tensor]:
        places, classes = sample(*args)
        chosen = _sampled(classes != heads.num_classes, counts)
        return places[chosen], classes[chosen]

    def fixed_detections(predictions: Any, given: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
        logits, deltas = predictions
        classes = _classes(len(logits), heads.num_classes, logits)
        _, kept = inference((_logits(logits, classes), torch.zeros_like(deltas)), given)
        filled = [
            Instances(
                proposed.image_size,
                pred_boxes=Boxes(_cycled(proposed.proposal_boxes.tensor, detections)),
                scores=_scores(detections, logits),
                pred_classes=_classes(detections, heads.num_classes, logits),
            )
            for proposed in given
        ]
        return filled, kept

    _replace(stack, generator, "predict_proposals", fixed_proposals)
    _replace(stack, heads, "_sample_proposals", fixed_samples)
    _replace(stack, heads.box_predictor, "inference", fixed_detections)
