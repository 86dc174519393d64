"""Box and mask average precision by the rules of COCO, through faster-coco-eval.

The twelve figures: https://cocodataset.org/#detection-eval.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_convert

from bench.config.schema import RunConfig
from bench.data.coco import CocoDataset
from bench.data.images import to_float
from bench.data.loader import clear_worker_errors, evaluation_batches
from bench.run import bootstrap
from bench.run.bootstrap import ImageMatches, Matches

FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)
MASK_THRESHOLD = 0.5
RESAMPLES = 1000
# The same for all runs, whatever their own seed: rows are compared on the same draws.
BOOTSTRAP_SEED = 0

_DIGITS = 4

Figures = dict[str, float | None]
Progress = Callable[[float, str], None]
"""Told how much is done (0 to 1) and what is being done."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, n detections.

    Attributes:
        boxes: (n, 4) x, y, width, height in pixels.
        categories: (n,) category ids of the annotations.
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

    Args:
        dataset: the annotations to score against: its `ground_truth()` and `categories`.
        resamples: draws of the bootstrap over images; 0 for none.
    """

    def __init__(self, dataset: CocoDataset, *, resamples: int = RESAMPLES) -> None:
        if resamples < 0:
            raise ValueError(f"resamples is {resamples}; it must not be negative")
        self.dataset = dataset
        self.resamples = resamples
        self.category_ids = np.array([category_id for category_id, _ in dataset.categories])
        self._found: State = {}

    def update(
        self, outputs: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add the detections of a batch.

        Args:
            outputs: for each image boxes (n, 4) x1, y1, x2, y2, labels (n,) in 1..K, scores (n,)
                and, where the detector has them, masks (n, 1, H, W) in 0..1.
            targets: for each image its `image_id`; more is not read.

        Raises:
            ValueError: for another number of outputs than targets, or an image given twice.
        """
        for output, target in zip(outputs, targets, strict=True):
            image_id = int(target["image_id"])
            if image_id in self._found:
                raise ValueError(f"image {image_id} was evaluated twice")
            masks = output.get("masks")
            self._found[image_id] = Detections(
                boxes=box_convert(output["boxes"].float(), "xyxy", "xywh").cpu().numpy(),
                categories=self.category_ids[output["labels"].cpu().numpy() - 1],
                scores=output["scores"].float().cpu().numpy(),
                masks=None if masks is None else _encode(masks),
                size=(0, 0) if masks is None else (masks.shape[-2], masks.shape[-1]),
            )

    def state(self) -> State:
        """Return what was collected, to be sent to another process and merged there."""
        return dict(self._found)

    def merge(self, states: Iterable[State]) -> None:
        """Add what other evaluators of the same data set collected.

        An image that is there already is passed over: samplers give the first images to two
        processes where the number of images is no multiple of theirs.
        """
        for state in states:
            self._found = state | self._found

    def compute(self) -> dict[str, Any]:
        """Return figures, their intervals and the draws that those come from.

        Returns:
            "box" and "mask": the twelve figures in percent, None where the annotations do not
            define them (no object of that size); "mask" is None where no masks were predicted.
            "box_interval" and "mask_interval": the bootstrap's interval of AP, with its level, or
            None. "bootstrap": seed, number of draws and AP of every draw (`box_AP`, `mask_AP`; None
            in a draw without objects), or None. Evaluators of the same images have the same draws,
            so that the difference of two detectors is that of their values, draw by draw.
        """
        masks = any(found.masks is not None for found in self._found.values())
        box, box_draws = self._score("bbox")
        mask, mask_draws = self._score("segm") if masks else (None, None)
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
        if not (self._found and self.resamples):
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
        for image_id in sorted(self._found):
            found = self._found[image_id]
            shapes: Iterable[Any] = found.boxes.tolist()
            if kind == "segm":
                size = list(found.size)
                shapes = ({"size": size, "counts": run} for run in found.masks or ())
            for category, score, shape in zip(
                found.categories.tolist(), found.scores.tolist(), shapes, strict=True
            ):
                yield {
                    "image_id": image_id,
                    "category_id": category,
                    "score": score,
                    "bbox" if kind == "bbox" else "segmentation": shape,
                }

    def _matches(self, truth: COCO, evaluation: COCOeval_faster) -> list[Matches]:
        """How the detections of each category were matched, from the overlaps worked out."""
        limit = evaluation.params.maxDets[-1]
        categories = self.category_ids.tolist()
        parts: dict[int, list[ImageMatches]] = {category: [] for category in categories}
        objects = np.zeros((len(categories), len(self._found)), dtype=np.int64)
        row = {category: place for place, category in enumerate(categories)}
        for place, image_id in enumerate(sorted(self._found)):
            crowds = _crowds(truth.imgToAnns.get(image_id, ()))
            for category, crowd in crowds.items():
                objects[row[category], place] = crowd.count(False)
            found = self._found[image_id]
            for category in np.unique(found.categories).tolist():
                scores = np.sort(found.scores[found.categories == category])[::-1][:limit]
                crowd = crowds.get(category, [])
                overlaps = np.reshape(
                    evaluation.ious[image_id, category], (len(scores), len(crowd))
                )
                parts[category].append(bootstrap.match(place, scores, overlaps, crowd))
        return [
            Matches.join(parts[category], counts)
            for category, counts in zip(categories, objects, strict=True)
        ]

    def _ground_truth(self) -> dict[str, Any]:
        truth = self.dataset.ground_truth()
        return {
            **truth,
            "images": [dict(i) for i in truth["images"] if i["id"] in self._found],
            "annotations": [dict(a) for a in truth["annotations"] if a["image_id"] in self._found],
        }


def _crowds(annotations: Iterable[Mapping[str, Any]]) -> dict[int, list[bool]]:
    """Whether each object of an image is a crowd, by category, in the order of annotations."""
    crowds: dict[int, list[bool]] = {}
    for annotation in annotations:
        crowds.setdefault(annotation["category_id"], []).append(bool(annotation["iscrowd"]))
    return crowds


def _encode(masks: Tensor) -> tuple[Any, ...]:
    """Run lengths of soft masks (n, 1, H, W)."""
    if len(masks) == 0:
        return ()
    binary = (masks[:, 0] >= MASK_THRESHOLD).byte().cpu().numpy()
    runs = rle.encode(np.asfortranarray(binary.transpose(1, 2, 0)))
    return tuple(run["counts"] for run in runs)


def evaluate(
    model: nn.Module, split: CocoDataset, config: RunConfig, fabric: Fabric, progress: Progress
) -> dict[str, Any]:
    """The `evaluation` section of one split; figures in the first process alone."""
    evaluator = CocoEvaluator(split, resamples=config.evaluate.bootstrap)
    model.eval()
    start = time.perf_counter()
    with torch.no_grad(), clear_worker_errors():
        done = 0
        for images, targets in evaluation_batches(
            split,
            batch_size=config.evaluate.batch_size,
            num_workers=config.data.workers,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            outputs = model([to_float(image.to(fabric.device)) for image in images])
            evaluator.update(outputs, targets)
            done = min(done + len(images) * fabric.world_size, len(split))
            progress(done / len(split), f"evaluating {split.split}, image {done} of {len(split)}")
        _gather(evaluator, fabric)
        figures = evaluator.compute() if fabric.is_global_zero else {}
    return {
        "split": split.split,
        "images": len(split),
        "annotations_sha256": split.fingerprint,
        "seconds": time.perf_counter() - start,
        "unit": "percent",
        **figures,
    }


def _gather(evaluator: CocoEvaluator, fabric: Fabric) -> None:
    """Give the first process what all have found."""
    if fabric.world_size == 1:
        return
    states: list[State] | None = None
    if fabric.is_global_zero:
        states = [{} for _ in range(fabric.world_size)]
    torch.distributed.gather_object(evaluator.state(), states)
    evaluator.merge(states or ())
