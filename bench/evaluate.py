"""Box and mask average precision by the rules of COCO, through faster-coco-eval.

The twelve figures: https://cocodataset.org/#detection-eval.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor
from torchvision.ops import box_convert

if TYPE_CHECKING:
    from bench.data.coco import CocoDataset

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

Figures = dict[str, float | None]

log = logging.getLogger(__name__)


class CocoEvaluator:
    """Collects detections image by image and scores them against a data set's annotations.

    Memory grows with the number of detections, not of pixels: masks are thresholded at 0.5 and
    become run lengths in `update`. Only images that were given to `update` are scored.

    Args:
        dataset: the annotations to score against: its `ground_truth()` and `categories`.
    """

    def __init__(self, dataset: "CocoDataset") -> None:
        self.dataset = dataset
        self.category_ids = [category_id for category_id, _ in dataset.categories]
        self.image_ids: set[int] = set()
        self.boxes: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []
        self.has_masks = False

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
            if image_id in self.image_ids:
                raise ValueError(f"image {image_id} was evaluated twice")
            self.image_ids.add(image_id)
            found = [
                {"image_id": image_id, "category_id": self.category_ids[label - 1], "score": score}
                for label, score in zip(
                    output["labels"].tolist(), output["scores"].tolist(), strict=True
                )
            ]
            boxes = box_convert(output["boxes"].float(), "xyxy", "xywh").tolist()
            self.boxes += [{**d, "bbox": box} for d, box in zip(found, boxes, strict=True)]
            if "masks" in output:
                self.has_masks = True
                runs = _encode(output["masks"])
                self.masks += [
                    {**d, "segmentation": run} for d, run in zip(found, runs, strict=True)
                ]

    def compute(self) -> dict[str, Figures | None]:
        """Return {"box": figures, "mask": figures or None}, None where no masks were predicted.

        Figures are in percent, and None where the annotations do not define them (no object of
        that size).
        """
        return {
            "box": self._score(self.boxes, "bbox"),
            "mask": self._score(self.masks, "segm") if self.has_masks else None,
        }

    def _score(self, detections: Iterable[Mapping[str, Any]], kind: str) -> Figures:
        # The library writes into the dictionaries that it is given.
        truth = COCO(self._ground_truth(), print_function=log.debug)
        found = truth.loadRes([dict(detection) for detection in detections])
        evaluation = COCOeval_faster(truth, found, kind, print_function=log.debug)
        evaluation.run()
        return {
            name: None if value < 0 else 100 * float(value)
            for name, value in zip(FIGURES, evaluation.stats[: len(FIGURES)], strict=True)
        }

    def _ground_truth(self) -> dict[str, Any]:
        truth = self.dataset.ground_truth()
        return {
            **truth,
            "images": [dict(i) for i in truth["images"] if i["id"] in self.image_ids],
            "annotations": [
                dict(a) for a in truth["annotations"] if a["image_id"] in self.image_ids
            ],
        }


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Run lengths of soft masks (n, 1, H, W)."""
    if len(masks) == 0:
        return []
    binary = (masks[:, 0] >= MASK_THRESHOLD).byte().cpu().numpy()
    runs: list[dict[str, Any]] = rle.encode(np.asfortranarray(binary.transpose(1, 2, 0)))
    return runs
