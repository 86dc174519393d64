"""Box and mask average precision by the rules of COCO, through faster-coco-eval.

The twelve figures: https://cocodataset.org/#detection-eval.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from lightning_fabric import Fabric
from lightning_utilities.core.apply_func import apply_to_collection
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_convert

from bench.config.schema import RunConfig
from bench.data.coco import CocoDataset
from bench.data.images import to_float
from bench.data.loader import clear_worker_errors, evaluation_batches
from bench.data.masks import encode_soft
from bench.model.detectors import Detector, is_head
from bench.record import FEW_IMAGES, FIGURES
from bench.run import bootstrap
from bench.run.bootstrap import ImageMatches, Matches
from bench.system.seeding import in_one_order, seed_everything

RESAMPLES = 1000
# The same for all runs, whatever their own seed: rows are compared on the same draws.
BOOTSTRAP_SEED = 0

_DIGITS = 4

Figures = dict[str, float | None]
Progress = Callable[[float, str], None]
"""Receives how much is done (0 to 1) and what is being done."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, n detections.

    Attributes:
        boxes: (n, 4) x, y, width, height in pixels.
        categories: (n,) labels of the data set.
        scores: (n,).
        masks: n run lengths, or None where the detector has no masks.
        size: (height, width) of the masks.
    """

    boxes: NDArray[np.float32]
    categories: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: tuple[Any, ...] | None = None
    size: tuple[int, int] = (0, 0)


State = dict[int, Detections]
"""What an evaluator has collected: detections by image id."""


class CocoEvaluator:
    """Collects detections image by image and scores them against a data set's annotations.

    Memory grows with the number of detections, not of pixels: masks are thresholded at 0.5 and
    become run lengths in `update`. A detection takes about 50 bytes, and its mask its run lengths
    (150 bytes for a mask of common size) and 50 bytes; while `compute` runs, the library's
    dictionaries take 4 to 7 kB a detection besides. Only images that were given to `update` or
    `merge` are scored.

    Several processes share the images of a data set: each has an evaluator and updates it with its
    own, one of them merges the states of the others and computes.

    Ids of images and classes are only names, and may be negative or of 64 bits: both are numbered
    anew, in the order of ids, as faster-coco-eval counts in float64 and takes those below 0 amiss.

    Args:
        dataset: the annotations to score against: its `ground_truth()`, `categories` and
            `has_masks`.
        labels: for each label 1..K of the detector that of the data set; None where they agree.
        resamples: draws of the bootstrap over images; 0 for none.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        labels: Sequence[int] | None = None,
        resamples: int = RESAMPLES,
    ) -> None:
        if resamples < 0:
            raise ValueError(f"resamples is {resamples}; it must not be negative")
        self.dataset = dataset
        self.resamples = resamples
        self._classes = range(1, len(dataset.categories) + 1)
        self._labels = np.array([0, *(labels or self._classes)])
        self._found: State = {}

    def update(
        self, outputs: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add the detections of a batch.

        Args:
            outputs: for each image boxes (n, 4) x1, y1, x2, y2, labels (n,) in 1..K, scores (n,)
                and, where the detector has them, masks (n, 1, H, W) in 0..1 or `RunLengths`.
            targets: for each image its `image_id`; more is not read.

        Raises:
            ValueError: for another number of outputs than targets, or an image given twice.
        """
        for output, target in zip(outputs, targets, strict=True):
            image_id = int(target["image_id"])
            if image_id in self._found:
                raise ValueError(f"image {image_id} was evaluated twice")
            masks: Any = output.get("masks")
            size = (0, 0) if masks is None else (masks.shape[-2], masks.shape[-1])
            self._found[image_id] = Detections(
                boxes=box_convert(output["boxes"].float(), "xyxy", "xywh").cpu().numpy(),
                categories=self._labels[output["labels"].cpu().numpy()],
                scores=output["scores"].float().cpu().numpy(),
                masks=encode_soft(masks) if isinstance(masks, Tensor) else masks and masks.counts,
                size=size,
            )

    def state(self) -> State:
        """Return what was collected, to be sent to another process and merged there."""
        return dict(self._found)

    def merge(self, states: Iterable[State]) -> None:
        """Add what other evaluators of the same data set collected.

        An image that is there already is passed over: samplers give the first images to two
        processes where the number of images is not a multiple of theirs.
        """
        for state in states:
            self._found = state | self._found

    def compute(self) -> dict[str, Any]:
        """Return figures, their intervals and the draws that those come from.

        Returns:
            "box" and "mask": the twelve figures in percent, None where the annotations do not
            define them (no object of that size, or no mask at all); "mask" is None where no masks
            were predicted.
            "box_interval" and "mask_interval": the bootstrap's interval of AP, with its level, or
            None, as where there is one image. "bootstrap": seed, number of draws and AP of every
            draw (`box_AP`, `mask_AP`; None in a draw without objects), or None. Evaluators of the
            same images have the same draws, so that the difference of two detectors is that of
            their values, draw by draw.
        """
        masks = any(found.masks is not None for found in self._found.values())
        box, box_draws = self._score("bbox")
        mask, mask_draws = self._score("segm") if masks else (None, None)
        if mask and not self.dataset.has_masks:
            # Boxes in the place of masks would give a figure, of boxes.
            mask, mask_draws = dict.fromkeys(FIGURES), None
        return {
            "box": box,
            "mask": mask,
            "box_interval": self._interval(box, box_draws),
            "mask_interval": self._interval(mask, mask_draws),
            "bootstrap": None
            if box_draws is None
            else {
                "seed": BOOTSTRAP_SEED,
                "resamples": self.resamples,
                "unit": "percent",
                "box_AP": box_draws,
                "mask_AP": mask_draws,
            },
        }

    def _score(self, kind: str) -> tuple[Figures, list[float | None] | None]:
        """The figures, and AP of every draw."""
        # The library writes into the dictionaries that it is given.
        truth = COCO(self._ground_truth(), print_function=log.debug)
        found = truth.loadRes(list(self._results(kind)))
        evaluation = COCOeval_faster(truth, found, kind, print_function=log.debug)
        evaluation.run()
        figures = {
            name: None if value < 0 else 100 * float(value)
            for name, value in zip(FIGURES, evaluation.stats[: len(FIGURES)], strict=True)
        }
        if len(self._found) < 2 or not self.resamples:
            # Draws of one image are all alike, and say nothing of others.
            return figures, None
        weights = bootstrap.draws(len(self._found), self.resamples, BOOTSTRAP_SEED)
        values = bootstrap.average_precision(self._matches(truth, evaluation), weights)
        rounded = np.round(100 * values, _DIGITS).tolist()
        return figures, [None if math.isnan(value) else value for value in rounded]

    def _interval(
        self, figures: Figures | None, values: Sequence[float | None] | None
    ) -> dict[str, Any] | None:
        if figures is None or values is None:
            return None
        limits = bootstrap.interval(figures["AP"], values)
        if limits is None:
            return None
        return {
            "AP": list(limits),
            "level": bootstrap.LEVEL,
            "resamples": self.resamples,
            "seed": BOOTSTRAP_SEED,
        }

    def _results(self, kind: str) -> Iterator[dict[str, Any]]:
        """Detections as COCO's results, in the order of image ids."""
        for number, image_id in enumerate(sorted(self._found), start=1):
            found = self._found[image_id]
            shapes: Iterable[Any] = found.boxes.tolist()
            if kind == "segm":
                size = list(found.size)
                shapes = ({"size": size, "counts": run} for run in found.masks or ())
            for category, score, shape in zip(
                found.categories.tolist(), found.scores.tolist(), shapes, strict=True
            ):
                yield {
                    "image_id": number,
                    "category_id": category,
                    "score": score,
                    "bbox" if kind == "bbox" else "segmentation": shape,
                }

    def _matches(self, truth: COCO, evaluation: COCOeval_faster) -> list[Matches]:
        """How the detections of each category were matched, from the overlaps worked out."""
        limit = evaluation.params.maxDets[-1]
        parts: dict[int, list[ImageMatches]] = {category: [] for category in self._classes}
        objects = np.zeros((len(self._classes), len(self._found)), dtype=np.int64)
        for place, image_id in enumerate(sorted(self._found)):
            crowds = _crowds(truth.imgToAnns.get(place + 1, ()))
            for category, crowd in crowds.items():
                objects[category - 1, place] = crowd.count(False)
            found = self._found[image_id]
            for category in np.unique(found.categories).tolist():
                scores = np.sort(found.scores[found.categories == category])[::-1][:limit]
                crowd = crowds.get(category, [])
                overlaps = np.reshape(
                    evaluation.ious[place + 1, category], (len(scores), len(crowd))
                )
                parts[category].append(bootstrap.match(place, scores, overlaps, crowd))
        return [
            Matches.join(parts[category], counts)
            for category, counts in zip(self._classes, objects, strict=True)
        ]

    def _ground_truth(self) -> dict[str, Any]:
        truth = self.dataset.ground_truth()
        images = {id_: number for number, id_ in enumerate(sorted(self._found), start=1)}
        ids = [id_ for id_, _ in self.dataset.categories]
        labels = {id_: label for label, id_ in enumerate(ids, start=1)}
        return {
            "images": [i | {"id": images[i["id"]]} for i in truth["images"] if i["id"] in images],
            "categories": [c | {"id": labels[c["id"]]} for c in truth["categories"]],
            "annotations": [
                a | {"image_id": images[a["image_id"]], "category_id": labels[a["category_id"]]}
                for a in truth["annotations"]
                if a["image_id"] in images
            ],
        }


def _crowds(annotations: Iterable[Mapping[str, Any]]) -> dict[int, list[bool]]:
    """Whether each object of an image is a crowd, by category, in the order of annotations."""
    crowds: dict[int, list[bool]] = {}
    for annotation in annotations:
        crowds.setdefault(annotation["category_id"], []).append(bool(annotation["iscrowd"]))
    return crowds


class _Watch:
    """Finds the images that a detector gave values for that are not finite.

    Detections of such values are dropped on the way, so that only an AP of nearly zero would show
    it: the pyramid's maps and what the heads put out are looked at, image by image.
    """

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self._images: list[Tensor] = []
        self._rois: list[Tensor] = []
        self._proposals: list[int] = []
        self._handles: list[Any] = []
        for detector in (m for m in model.modules() if isinstance(m, Detector)):
            roi_heads = getattr(detector, "roi_heads", nn.Module())
            of_rois = {m for m in roi_heads.modules() if is_head(m)}
            self._handles.append(roi_heads.register_forward_pre_hook(self._note_proposals))
            for module in [detector.backbone, *filter(is_head, detector.modules())]:
                rows = self._rois if module in of_rois else self._images
                hook = functools.partial(self._look, rows)
                self._handles.append(module.register_forward_hook(hook))

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def batch(self, outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Count the images of a batch, whose detections these are."""
        bad = np.zeros(len(outputs), dtype=bool)
        for rows in self._images:
            bad |= rows.cpu().numpy()
        found = [len(output["boxes"]) for output in outputs]
        for rows in self._rois:
            counts = next((c for c in (self._proposals, found) if sum(c) == len(rows)), None)
            if counts is None:
                bad |= bool(rows.any())
            else:
                parts = rows.split(counts)
                bad |= [bool(part.any()) for part in parts]
        self.count += int(bad.sum())
        self._images.clear()
        self._rois.clear()

    def _note_proposals(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Both libraries give the proposals of each image as the first list.
        boxes = next((value for value in inputs if isinstance(value, list)), [])
        self._proposals = [len(of_one) for of_one in boxes]

    def _look(self, rows: list[Tensor], _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        def look(value: Tensor) -> None:
            rows.append(value.flatten(1).isfinite().all(dim=1).logical_not())

        apply_to_collection(outputs, Tensor, look)


@contextmanager
def _masks_as_run_lengths(model: nn.Module) -> Iterator[None]:
    """Have detectors paste a few masks at a time, not all at the size of a large image."""
    found = [m for m in model.modules() if isinstance(m, Detector)]
    for detector in found:
        detector.run_lengths = True
    try:
        yield
    finally:
        for detector in found:
            detector.run_lengths = False


def evaluate(
    model: nn.Module,
    split: CocoDataset,
    config: RunConfig,
    fabric: Fabric,
    progress: Progress,
    *,
    labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The `evaluation` section of one split; figures in the first process alone.

    Args:
        labels: for each label of the detector that of the split, where they differ.
    """
    evaluator = CocoEvaluator(split, labels=labels, resamples=config.evaluate.bootstrap)
    detector = next(module for module in model.modules() if isinstance(module, Detector))
    model.eval()
    # What draws here too gives the same figures whatever ran before.
    seed_everything(config.seed)
    start = time.perf_counter()
    with (
        torch.no_grad(),
        clear_worker_errors(),
        in_one_order(fabric.device),
        _masks_as_run_lengths(model),
        _Watch(model) as watch,
    ):
        done = 0
        for images, targets in evaluation_batches(
            split,
            batch_size=config.evaluate.batch_size,
            canvas=detector.canvas,
            num_workers=config.data.workers,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            outputs = model([to_float(image.to(fabric.device)) for image in images])
            evaluator.update(outputs, targets)
            watch.batch(outputs)
            done = min(done + len(images) * fabric.world_size, len(split))
            progress(done / len(split), f"evaluating {split.split}, image {done} of {len(split)}")
        not_finite = _gather(evaluator, watch.count, fabric)
        figures = evaluator.compute() if fabric.is_global_zero else {}
    return {
        "split": split.split,
        "images": len(split),
        "annotations_sha256": split.fingerprint,
        "seconds": time.perf_counter() - start,
        "unit": "percent",
        "not_finite": not_finite,
        **figures,
    }


def remarks(section: Mapping[str, Any]) -> list[str]:
    """What a reader of an `evaluation` section should know besides."""
    count, images = section["not_finite"], section["images"]
    found = []
    if count:
        found.append(
            f"{section['split']}: {count} of {images} images gave values that are not finite"
            " (NaN or infinite), which "
            + ("count as wrong" if section["box"] is None else "are no detections")
        )
    # Of a classifier the interval is right for any number.
    if images < FEW_IMAGES and section["box"] is not None:
        what = "intervals of mAP, and rows told apart by it," if images > 1 else "mAP"
        found.append(f"{section['split']}: {what} of {images} image{'s' * (images > 1)} say little")
    return found


def _gather(evaluator: CocoEvaluator, count: int, fabric: Fabric) -> int:
    """Give the first process what all have found; return the sum of their counts."""
    if fabric.world_size == 1:
        return count
    states: list[tuple[State, int]] | None = None
    if fabric.is_global_zero:
        states = [({}, 0) for _ in range(fabric.world_size)]
    torch.distributed.gather_object((evaluator.state(), count), states)
    evaluator.merge(state for state, _ in states or ())
    return sum(number for _, number in states or ())
