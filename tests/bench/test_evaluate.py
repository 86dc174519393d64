import contextlib
import copy
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.evaluate import FIGURES, CocoEvaluator

CATEGORIES = ((3, "disc"), (7, "box"), (90, "bar"))
SIZE = (220, 260)


class Annotations:
    """The part of a data set that the evaluator reads."""

    def __init__(self, images, annotations):
        self.categories = CATEGORIES
        self._truth = {
            "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in images],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in CATEGORIES],
        }

    def ground_truth(self):
        return self._truth


def annotation(number, image_id, category_id, box, crowd=False):
    x, y, w, h = box
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
    runs = pycoco_mask.encode(mask)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": float(w * h),
        "iscrowd": int(crowd),
        "segmentation": (
            {"size": list(SIZE), "counts": runs["counts"].decode()}
            if crowd
            else [[x, y, x + w, y, x + w, y + h, x, y + h]]
        ),
    }


def random_case(seed):
    """Annotations of all three sizes with crowds, and detections near and far from them."""
    rng = np.random.default_rng(seed)
    images = [int(i) for i in rng.permutation(1000)[:12]]
    annotations, outputs = [], []
    for image_id in images:
        boxes = []
        for _ in range(rng.integers(0, 9)):
            w, h = rng.choice([12, 50, 130], size=2) + rng.integers(0, 20, size=2)
            x, y = rng.integers(0, SIZE[1] - w), rng.integers(0, SIZE[0] - h)
            box = [int(x), int(y), int(w), int(h)]
            category = int(rng.choice([i for i, _ in CATEGORIES]))
            boxes.append((box, category))
            annotations.append(
                annotation(len(annotations) + 1, image_id, category, box, rng.random() < 0.15)
            )
        found = []
        for box, category in boxes * 4:
            x, y, w, h = np.array(box) + rng.normal(0, 0.07 * max(box[2:]), size=4)
            label = [i for i, _ in CATEGORIES].index(category) + 1
            found.append((x, y, x + max(w, 2), y + max(h, 2), label))
        for _ in range(rng.integers(0, 12)):
            x, y = rng.uniform(0, 150, size=2)
            found.append((x, y, x + rng.uniform(5, 60), y + rng.uniform(5, 60), rng.integers(1, 4)))
        outputs.append(detections(found, rng))
    return Annotations(images, annotations), images, outputs


def detections(found, rng):
    masks = torch.zeros(len(found), 1, *SIZE)
    for mask, (x1, y1, x2, y2, _) in zip(masks, found, strict=True):
        mask[0, max(int(y1), 0) : max(int(y2), 0), max(int(x1), 0) : max(int(x2), 0)] = 0.9
    return {
        "boxes": torch.tensor([f[:4] for f in found], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([int(f[4]) for f in found], dtype=torch.int64),
        "scores": torch.tensor(rng.random(len(found)), dtype=torch.float32),
        "masks": masks,
    }


def targets(images):
    return [{"image_id": torch.tensor(i)} for i in images]


def by_pycocotools(dataset, images, outputs, kind):
    results = []
    for image_id, output in zip(images, outputs, strict=True):
        for box, label, score, mask in zip(*(output[k] for k in output), strict=True):
            x1, y1, x2, y2 = box.tolist()
            result = {
                "image_id": image_id,
                "category_id": CATEGORIES[int(label) - 1][0],
                "score": float(score),
            }
            if kind == "bbox":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["segmentation"] = pycoco_mask.encode(
                    np.asfortranarray((mask[0] > 0.5).byte().numpy())
                )
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset.ground_truth())
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value < 0 else 100 * value for value in evaluation.stats]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("subset", [12, 5])
def test_all_figures_equal_pycocotools(seed, subset):
    dataset, images, outputs = random_case(seed)
    before = copy.deepcopy(dataset.ground_truth())
    images, outputs = images[:subset], outputs[:subset]
    evaluator = CocoEvaluator(dataset)
    evaluator.update(outputs[:3], targets(images[:3]))
    evaluator.update(outputs[3:], targets(images[3:]))
    results = evaluator.compute()
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = by_pycocotools(dataset, images, outputs, kind)
        assert tuple(results[name]) == FIGURES
        assert list(results[name].values()) == pytest.approx(expected, abs=1e-9)
    assert 5 < results["box"]["AP"] < 95
    assert evaluator.compute() == results
    assert dataset.ground_truth() == before


def test_masks_decide_the_mask_figures():
    dataset = Annotations([1], [annotation(1, 1, 7, [40, 40, 100, 100])])
    output = detections([(40, 40, 140, 140, 2)], np.random.default_rng(0))
    output["masks"][..., 90:] = 0.4
    evaluator = CocoEvaluator(dataset)
    evaluator.update([output], targets([1]))
    results = evaluator.compute()
    assert results["box"]["AP"] == pytest.approx(100)
    assert results["mask"]["AP50"] == pytest.approx(100)
    assert results["mask"]["AP75"] == 0


def test_no_detections_give_zero_and_undefined_sizes_give_none():
    dataset = Annotations([1, 2], [annotation(1, 1, 3, [10, 10, 50, 50])])
    evaluator = CocoEvaluator(dataset)
    nothing = detections([], np.random.default_rng(0))
    evaluator.update([nothing, nothing], targets([1, 2]))
    for figures in evaluator.compute().values():
        assert figures["AP"] == figures["APm"] == figures["AR100"] == 0
        assert figures["APs"] is figures["APl"] is figures["ARl"] is None


@pytest.mark.parametrize("found", [[], [(10, 10, 60, 60, 1)]])
def test_images_without_annotations_leave_all_figures_undefined(found):
    evaluator = CocoEvaluator(Annotations([5], []))
    evaluator.update([detections(found, np.random.default_rng(0))], targets([5]))
    assert set(evaluator.compute()["box"].values()) == {None}


def test_no_images_leave_all_figures_undefined():
    results = CocoEvaluator(Annotations([5], [])).compute()
    assert set(results["box"].values()) == {None}
    assert results["mask"] is None


def test_a_detector_without_masks_has_no_mask_figures(capfd):
    dataset, images, outputs = random_case(0)
    for output in outputs:
        del output["masks"]
    evaluator = CocoEvaluator(dataset)
    evaluator.update(outputs, targets(images))
    assert evaluator.compute()["mask"] is None
    assert capfd.readouterr() == ("", "")


def test_an_image_is_scored_once():
    dataset, images, outputs = random_case(0)
    evaluator = CocoEvaluator(dataset)
    evaluator.update(outputs[:1], targets(images[:1]))
    with pytest.raises(ValueError, match=f"image {images[0]} was evaluated twice"):
        evaluator.update(outputs[:1], targets(images[:1]))
