"""Mask R-CNN on stated numbers of RoIs, whatever it finds.

How many RoIs reach the heads depends on weights and images: the mask head of an untrained detector
sees next to none, and costs nothing. So that rows can be compared, and memory be predicted, what
is measured runs on as many as `Counts` says. Everything else runs as ever: what the detector found
is taken first, and repeated where it is too little.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.model.detectors.contract import POSITIVE_FRACTION, Detector


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
    """Let the heads of `detector` run on so many RoIs an image; nothing happens to RetinaNet.

    An image without objects has no RoIs for the mask head when training.

    Args:
        counts: of `most`, nothing in it left open.
    """
    fix = {"torchvision": _fix_torchvision, "detectron2": _fix_detectron2}
    with ExitStack() as stack:
        if detector.method == "mask_rcnn":
            fix[detector.library](detector, counts, stack)
        yield


def _cycled(count: int, found: int, device: torch.device) -> Tensor:
    """The first `count` of `found` places, over and over where these are fewer: (count,)."""
    return torch.arange(count, device=device) % max(found, 1)


def _filled(found: Tensor, spare: Tensor, count: int) -> Tensor:
    """Return `count` entries of `found` (n, ...), then of `spare` (m, ...) and again."""
    every = torch.cat([found, spare])
    return every[_cycled(count, len(every), every.device)]


def _sampled(has_object: Tensor, counts: Counts) -> Tensor:
    """Places in `has_object` (n,) of as many RoIs with and without an object as `counts` says."""
    (objects,) = torch.where(has_object)
    (background,) = torch.where(has_object.logical_not())
    mask_rois, rois = counts.mask_rois or 0, counts.rois or 0
    chosen = []
    for first, other, count in (
        (objects, background, mask_rois),
        (background, objects, rois - mask_rois),
    ):
        places = first if len(first) else other
        chosen.append(places[_cycled(count, len(places), places.device)])
    return torch.cat(chosen)


def _whole_image(size: tuple[int, int], like: Tensor) -> Tensor:
    """One box (1, 4) around an image of `size` (rows, columns)."""
    return like.new_tensor([[0, 0, size[1], size[0]]])


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
        kept, scores = filter_proposals(boxes, objectness, image_shapes, *rest)
        if not rpn.training:
            shapes = zip(kept, image_shapes, strict=True)
            kept = [_filled(b, _whole_image(size, b), proposals) for b, size in shapes]
            scores = [_filled(s, s.new_zeros(1), proposals) for s in scores]
        return kept, scores

    def fixed_samples(labels: Sequence[Tensor]) -> list[Tensor]:
        samples = zip(labels, subsample(labels), strict=True)
        return [places[_sampled(of_one[places] > 0, counts)] for of_one, places in samples]

    def fixed_detections(
        logits: Tensor, regression: Tensor, given: Sequence[Tensor], *rest: Any
    ) -> tuple[list[Tensor], ...]:
        found = zip(*postprocess(logits, regression, given, *rest), given, strict=True)
        filled = [
            (
                _filled(boxes, spare, detections),
                _filled(scores, scores.new_zeros(len(spare)), detections),
                _filled(labels, labels.new_ones(len(spare)), detections),
            )
            for boxes, scores, labels, spare in found
        ]
        boxes, scores, labels = (list(of_all) for of_all in zip(*filled, strict=True))
        return boxes, scores, labels

    _replace(stack, rpn, "filter_proposals", fixed_proposals)
    _replace(stack, heads, "subsample", fixed_samples)
    _replace(stack, heads, "postprocess_detections", fixed_detections)


def _fix_detectron2(detector: Any, counts: Counts, stack: ExitStack) -> None:
    from detectron2.structures import Boxes, Instances

    generator, heads = detector.proposal_generator, detector.roi_heads
    proposals, detections = counts.proposals or 0, counts.detections or 0
    predict_proposals, sample = generator.predict_proposals, heads._sample_proposals
    inference = heads.box_predictor.inference

    def fixed_proposals(*args: Any) -> list[Any]:
        found = predict_proposals(*args)
        if generator.training:
            return found
        filled = []
        for of_one in found:
            boxes, logits = of_one.proposal_boxes.tensor, of_one.objectness_logits
            spare = _whole_image(of_one.image_size, boxes)
            filled.append(
                Instances(
                    of_one.image_size,
                    proposal_boxes=Boxes(_filled(boxes, spare, proposals)),
                    objectness_logits=_filled(logits, logits.new_zeros(1), proposals),
                )
            )
        return filled

    def fixed_samples(*args: Any) -> tuple[Tensor, Tensor]:
        places, classes = sample(*args)
        chosen = _sampled(classes != heads.num_classes, counts)
        return places[chosen], classes[chosen]

    def fixed_detections(predictions: Any, given: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
        found, kept = inference(predictions, given)
        filled = []
        for of_one, proposed in zip(found, given, strict=True):
            scores, classes = of_one.scores, of_one.pred_classes
            spare = proposed.proposal_boxes.tensor
            boxes = _filled(of_one.pred_boxes.tensor, spare, detections)
            filled.append(
                Instances(
                    of_one.image_size,
                    pred_boxes=Boxes(boxes),
                    scores=_filled(scores, scores.new_zeros(len(spare)), detections),
                    pred_classes=_filled(classes, classes.new_zeros(len(spare)), detections),
                )
            )
        return filled, kept

    _replace(stack, generator, "predict_proposals", fixed_proposals)
    _replace(stack, heads, "_sample_proposals", fixed_samples)
    _replace(stack, heads.box_predictor, "inference", fixed_detections)
