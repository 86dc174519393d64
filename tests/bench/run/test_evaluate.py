import contextlib
import copy
import functools
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.record import FIGURES
from bench.run import bootstrap
from bench.run.evaluate import RESAMPLES, CocoEvaluator
from tests import coco

CATEGORIES = ((3, "disc"), (7, "box"), (90, "bar"))
SIZE = (220, 260)


class Annotations:
    """The part of a data set that the evaluator reads."""

    def __init__(self, images, annotations):
        self.categories = CATEGORIES
        self.has_masks = True
        self._truth = {
            "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in images],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in CATEGORIES],
        }

    def ground_truth(self):
        return self._truth


def annotation(number, image_id, category_id, box, crowd=False):
    x, y, w, h = box
    if not crowd:
        return coco.annotation(number, image_id, category_id, list(box))
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
    runs = {"size": list(SIZE), "counts": pycoco_mask.encode(mask)["counts"].decode()}
    return coco.annotation(number, image_id, category_id, list(box), iscrowd=1, segmentation=runs)


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


def crowded_case(seed, tied=True):
    """What is rare: equal scores and overlaps, over 100 detections of a class, empty images."""
    rng = np.random.default_rng(seed)
    images = [int(i) for i in rng.permutation(500)[:8]]
    annotations, outputs = [], []
    for number, image_id in enumerate(images):
        objects = [] if number in (1, 5) else range(int(rng.integers(3, 30)))
        boxes = []
        for _ in objects:
            # A coarse grid of positions and sizes: many overlaps are equal.
            x, y = rng.integers(0, 8, size=2) * 16
            box = [int(x), int(y), int(rng.choice([16, 32, 96])), int(rng.choice([16, 32, 96]))]
            boxes.append(box)
            crowd = rng.random() < 0.3
            annotations.append(annotation(len(annotations) + 1, image_id, 7, box, crowd))
        found = []
        for x, y, w, h in [] if number in (1, 4) else boxes * 9:
            dx, dy = rng.integers(-1, 2, size=2) * 8
            found.append((x + dx, y + dy, x + dx + w, y + dy + h, 2))
        output = detections(found, rng)
        if tied:
            output["scores"] = torch.tensor(rng.integers(0, 6, len(found)) / 5, dtype=torch.float32)
        outputs.append(output)
    return Annotations(images, annotations), images, outputs


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


def evaluated(dataset, images, outputs, **options):
    evaluator = CocoEvaluator(dataset, **options)
    evaluator.update(outputs, targets(images))
    return evaluator


def assert_equals_pycocotools(dataset, images, outputs):
    before = copy.deepcopy(dataset.ground_truth())
    evaluator = evaluated(dataset, images[:3], outputs[:3])
    evaluator.update(outputs[3:], targets(images[3:]))
    results = evaluator.compute()
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = by_pycocotools(dataset, images, outputs, kind)
        assert tuple(results[name]) == FIGURES
        assert list(results[name].values()) == pytest.approx(expected, abs=1e-9)
    assert evaluator.compute() == results
    assert dataset.ground_truth() == before
    return results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("subset", [12, 5])
def test_all_figures_equal_pycocotools(seed, subset):
    dataset, images, outputs = random_case(seed)
    results = assert_equals_pycocotools(dataset, images[:subset], outputs[:subset])
    assert 5 < results["box"]["AP"] < 95


@pytest.mark.parametrize("seed", range(4))
def test_ties_crowds_and_too_many_detections_are_scored_as_by_pycocotools(seed):
    dataset, images, outputs = crowded_case(seed)
    assert max(len(output["boxes"]) for output in outputs) > 100
    results = assert_equals_pycocotools(dataset, images, outputs)
    assert 1 < results["box"]["AP"] < 95


def repeated(dataset, images, outputs, counts):
    """A data set in which each image is as often as `counts` says, each time under a new id."""
    truth = dataset.ground_truth()
    new, found, annotations = [], [], []
    # pycocotools goes by image id, so copies keep the order of their originals.
    for place in np.argsort(images):
        for _ in range(counts[place]):
            new.append(len(new) + 1)
            found.append(outputs[place])
            annotations += [
                {**a, "id": len(annotations) + 1 + k, "image_id": new[-1]}
                for k, a in enumerate(
                    a for a in truth["annotations"] if a["image_id"] == images[place]
                )
            ]
    return Annotations(new, annotations), new, found


@pytest.mark.parametrize("case", [random_case, functools.partial(crowded_case, tied=False)])
@pytest.mark.parametrize("seed", range(2))
def test_a_draw_has_the_average_precision_of_a_data_set_of_its_images(case, seed):
    # Of equal scores within an image, the order of a detection's copies is anybody's choice.
    dataset, images, outputs = case(seed)
    results = evaluated(dataset, images, outputs, resamples=3).compute()
    drawn = bootstrap.draws(len(images), 3, results["bootstrap"]["seed"])
    assert (drawn.sum(axis=1) == len(images)).all()
    assert (drawn != 1).any()
    place = np.argsort(np.argsort(images))
    for number, weights in enumerate(drawn):
        again = repeated(dataset, images, outputs, weights[place])
        for name, kind in (("box_AP", "bbox"), ("mask_AP", "segm")):
            expected = by_pycocotools(*again, kind)[0]
            assert results["bootstrap"][name][number] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("case", [random_case, crowded_case])
def test_all_images_once_have_the_average_precision_of_the_figures(case, monkeypatch):
    dataset, images, outputs = case(0)
    monkeypatch.setattr(bootstrap, "draws", lambda count, *_: np.ones((1, count), dtype=np.int32))
    results = evaluated(dataset, images, outputs).compute()
    for kind in ("box", "mask"):
        assert results["bootstrap"][f"{kind}_AP"] == pytest.approx([results[kind]["AP"]], abs=1e-4)


def test_draws_in_small_parts_are_the_same(monkeypatch):
    dataset, images, outputs = random_case(1)
    whole = evaluated(dataset, images, outputs).compute()
    monkeypatch.setattr(bootstrap, "_CHUNK", 1000)
    assert evaluated(dataset, images, outputs).compute() == whole


def test_intervals_hold_the_value_and_narrow_with_the_number_of_images():
    widths = {}
    for copies in (1, 9):
        dataset, images, outputs = repeated(*random_case(2), [copies] * 12)
        results = evaluated(dataset, images, outputs).compute()
        for kind in ("box", "mask"):
            interval = results[f"{kind}_interval"]
            low, high = interval["AP"]
            assert 0 <= low < results[kind]["AP"] < high <= 100
            assert (interval["level"], interval["resamples"]) == (0.95, RESAMPLES)
            widths[kind, copies] = high - low
    for kind in ("box", "mask"):
        assert widths[kind, 9] == pytest.approx(widths[kind, 1] / 3, rel=0.25)


def test_two_detectors_on_the_same_images_have_the_same_draws():
    dataset, images, outputs = random_case(0)
    first = evaluated(dataset, images, outputs).compute()
    # In another order, and the scores halved: every draw is as before.
    halved = [{**output, "scores": output["scores"] / 2} for output in outputs]
    second = evaluated(dataset, images[::-1], halved[::-1]).compute()
    assert second == first
    assert len(first["bootstrap"]["box_AP"]) == RESAMPLES


def test_no_draws_give_no_intervals():
    dataset, images, outputs = random_case(0)
    results = evaluated(dataset, images, outputs, resamples=0).compute()
    assert results["box_interval"] is results["mask_interval"] is results["bootstrap"] is None
    assert results["box"]["AP"] > 0
    with pytest.raises(ValueError, match="-1"):
        CocoEvaluator(dataset, resamples=-1)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_merge_to_the_figures_of_one_evaluator(shards):
    dataset, images, outputs = random_case(3)
    whole = evaluated(dataset, images, outputs).compute()
    # As a sampler does: padded with the first images, so that all shards are equally long.
    order = list(range(len(images))) + list(range(-len(images) % shards))
    states = []
    for number in range(shards):
        own = order[number::shards]
        shard = evaluated(dataset, [images[i] for i in own], [outputs[i] for i in own])
        states.append(pickle.loads(pickle.dumps(shard.state())))
    for first, *others in itertools.islice(itertools.permutations(states), 4):
        merged = CocoEvaluator(dataset)
        merged.merge([first])
        merged.merge(others)
        assert merged.compute() == whole


def test_what_is_kept_of_a_detection_is_small_and_of_no_image():
    dataset, images, outputs = random_case(0)
    sizes = [len(pickle.dumps(evaluated(dataset, images, outputs).state()))]
    wide = [
        {**output, "masks": torch.nn.functional.pad(output["masks"], (0, 3000))}
        for output in outputs
    ]
    sizes.append(len(pickle.dumps(evaluated(dataset, images, wide).state())))
    detections = sum(len(output["boxes"]) for output in outputs)
    assert sizes[0] / detections < 300
    assert sizes[1] < 1.1 * sizes[0]


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
    results = evaluator.compute()
    for figures in (results["box"], results["mask"]):
        assert figures["AP"] == figures["APm"] == figures["AR100"] == 0
        assert figures["APs"] is figures["APl"] is figures["ARl"] is None


@pytest.mark.parametrize("found", [[], [(10, 10, 60, 60, 1)]])
def test_images_without_annotations_leave_all_figures_undefined(found):
    evaluator = CocoEvaluator(Annotations([5, 6], []))
    for image in (5, 6):
        evaluator.update([detections(found, np.random.default_rng(0))], targets([image]))
    results = evaluator.compute()
    assert set(results["box"].values()) == {None}
    assert results["box_interval"] is None
    assert set(results["bootstrap"]["box_AP"]) == {None}


def test_no_images_leave_all_figures_undefined():
    results = CocoEvaluator(Annotations([5], [])).compute()
    assert set(results.pop("box").values()) == {None}
    assert set(results.values()) == {None}


def test_a_detector_without_masks_has_no_mask_figures(capfd):
    dataset, images, outputs = random_case(0)
    for output in outputs:
        del output["masks"]
    evaluator = CocoEvaluator(dataset)
    evaluator.update(outputs, targets(images))
    results = evaluator.compute()
    assert results["mask"] is results["mask_interval"] is results["bootstrap"]["mask_AP"] is None
    assert results["box_interval"] is not None
    assert capfd.readouterr() == ("", "")


def test_an_image_is_scored_once():
    dataset, images, outputs = random_case(0)
    evaluator = CocoEvaluator(dataset)
    evaluator.update(outputs[:1], targets(images[:1]))
    with pytest.raises(ValueError, match=f"image {images[0]} was evaluated twice"):
        evaluator.update(outputs[:1], targets(images[:1]))


def renamed(dataset, images, image_id, category_id):
    """The same annotations with other ids of images and categories."""
    truth = copy.deepcopy(dataset.ground_truth())
    for image in truth["images"]:
        image["id"] = image_id(image["id"])
    for category in truth["categories"]:
        category["id"] = category_id(category["id"])
    for found in truth["annotations"]:
        found["image_id"] = image_id(found["image_id"])
        found["category_id"] = category_id(found["category_id"])
    other = Annotations((), ())
    other.categories = tuple((category_id(id_), name) for id_, name in dataset.categories)
    other._truth = truth
    return other, [image_id(id_) for id_ in images]


@pytest.mark.parametrize(
    "rename",
    [lambda id_: id_ - 500, lambda id_: 1_700_000_000_000_000_000 + id_, lambda id_: id_ - 2**63],
    ids=["negative", "beyond float64", "the lowest of 64 bits"],
)
def test_ids_are_only_names(rename):
    dataset, images, outputs = random_case(0)
    other, names = renamed(dataset, images, rename, rename)
    expected = evaluated(dataset, images, outputs).compute()
    assert evaluated(other, names, outputs).compute() == expected


def test_labels_of_another_order_are_mapped():
    dataset, images, outputs = random_case(0)
    expected = evaluated(dataset, images, outputs).compute()
    # The detector's labels 1, 2, 3 are the data's 3, 1, 2.
    labels = [3, 1, 2]
    turned = [
        o | {"labels": torch.tensor([labels.index(x) + 1 for x in o["labels"]])} for o in outputs
    ]
    evaluator = CocoEvaluator(dataset, labels=labels)
    evaluator.update(turned, targets(images))
    assert evaluator.compute() == expected


def test_without_masks_there_is_no_mask_ap():
    dataset, images, outputs = random_case(0)
    dataset.has_masks = False
    results = evaluated(dataset, images, outputs).compute()
    assert set(results["mask"].values()) == {None}
    assert results["mask_interval"] is results["bootstrap"]["mask_AP"] is None
    assert results["box"]["AP"] > 1
