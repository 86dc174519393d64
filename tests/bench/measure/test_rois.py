"""The heads of Mask R-CNN on stated numbers of RoIs."""

from contextlib import contextmanager

import pytest
import torch
from torchvision.ops.poolers import LevelMapper

from bench.model import detectors
from bench.model.backbone import ViL
from bench.model.detectors.rois import Counts, fixed_boxes, fixed_levels, fixed_rois, most

ARCH = (
    "l1,h2,d16,n1,s1,g1,p4,f4,a1_l2,h2,d32,n1,s0,g0,p2,f2,a1_"
    "l3,h2,d32,n1,s0,g0,p2,f2,a1_l4,h2,d32,n1,s0,g0,p2,f2,a1"
)
SIZE = (64, 96)
BATCH = 2
LIBRARIES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
# More than there are, and fewer.
COUNTS = [
    Counts(proposals=400, detections=150, rois=300, mask_rois=120),
    Counts(proposals=7, detections=3, rois=9, mask_rois=2),
]


def detector(library="torchvision", method="mask_rcnn", **settings):
    torch.manual_seed(0)
    small = {
        "fpn_channels": 16,
        "head_width": 32,
        "mask_width": 16,
        "roi_batch": 64,
        "detections": 10,
        "rpn_proposals": (50, 40),
        "rpn_proposals_test": (50, 30),
    }
    return detectors.build(
        ViL(ARCH, image_size=SIZE),
        method=method,
        library=library,
        num_classes=5,
        fixed_size=SIZE,
        **(small | settings),
    )


def batch(objects):
    torch.manual_seed(1)
    images = [torch.rand(3, *SIZE) for _ in range(BATCH)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [40.0, 10.0, 90.0, 60.0]])[:objects]
    target = {
        "boxes": boxes,
        "labels": torch.arange(1, objects + 1),
        "masks": torch.ones(objects, *SIZE, dtype=torch.uint8),
    }
    return images, [dict(target) for _ in images]


@contextmanager
def watched(module):
    """The RoIs that reach the heads, by head."""
    seen = {}
    parts = module.parts()
    handles = [
        parts[name][0].register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.update({name: len(inputs[0])})
        )
        for name in ("box_head", "mask_head")
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("counts", COUNTS, ids=["more", "fewer"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_training(library, counts):
    module = detector(library).train()
    with watched(module) as seen, fixed_rois(module, counts):
        losses = module(*batch(objects=2))
        torch.stack(list(losses.values())).sum().backward()
    assert seen == {"box_head": BATCH * counts.rois, "mask_head": BATCH * counts.mask_rois}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("library", LIBRARIES)
def test_training_on_images_without_objects(library):
    module = detector(library).train()
    with watched(module) as seen, fixed_rois(module, COUNTS[1]):
        losses = module(*batch(objects=0))
    assert seen["box_head"] == BATCH * COUNTS[1].rois
    assert seen.get("mask_head", 0) == 0
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("counts", COUNTS, ids=["more", "fewer"])
@pytest.mark.parametrize("threshold", [0.0, 0.99], ids=["finds", "finds nothing"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_inference(library, threshold, counts):
    module = detector(library, score_threshold=threshold).eval()
    images, _ = batch(objects=0)
    with torch.no_grad(), watched(module) as seen, fixed_rois(module, counts):
        found = module(images)
    assert seen == {"box_head": BATCH * counts.proposals, "mask_head": BATCH * counts.detections}
    for output in found:
        assert len(output["boxes"]) == len(output["scores"]) == len(output["labels"])
        assert len(output["masks"]) == counts.detections
        assert 1 <= output["labels"].min() <= output["labels"].max() <= 5
        assert output["scores"].all()


def boxes_of(module, images, *targets):
    """The RoIs that are cut out of the pyramid, head by head."""
    seen = []
    pools = (
        (module.roi_heads.box_roi_pool, module.roi_heads.mask_roi_pool)
        if module.library == "torchvision"
        else (module.roi_heads.box_pooler, module.roi_heads.mask_pooler)
    )
    handles = [
        pool.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
        for pool in pools
    ]
    with fixed_rois(module, most(module)):
        torch.manual_seed(2)
        found = module(images, *targets)
    for handle in handles:
        handle.remove()
    return [torch.cat([getattr(b, "tensor", b) for b in boxes]) for boxes in seen], found


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_boxes_do_not_depend_on_weights(library, mode):
    module = detector(library, score_threshold=0.3).train(mode == "training")
    images, targets = batch(objects=2)
    given = (targets,) if mode == "training" else ()
    with torch.set_grad_enabled(mode == "training"):
        before, _ = boxes_of(module, images, *given)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        after, _ = boxes_of(module, images, *given)
    assert len(before) == 2
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_boxes_have_area_and_lie_in_the_image():
    boxes = fixed_boxes(500, SIZE, torch.zeros(1))
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([SIZE[1], SIZE[0]] * 2)).all()
    sides = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([SIZE[1], SIZE[0]])
    assert 0.12 < sides.min() < sides.max() < 0.51
    centres = (boxes[:, 2:] + boxes[:, :2]) / 2 / torch.tensor([SIZE[1], SIZE[0]])
    torch.testing.assert_close(centres.mean(dim=0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)


def test_what_is_open_is_the_most():
    module = detector()
    assert most(module) == Counts(proposals=30, detections=10, rois=64, mask_rois=16)
    assert most(module, Counts(rois=20, targets=3)) == Counts(
        proposals=30, detections=10, rois=20, mask_rois=5, targets=3
    )


def test_retinanet_has_none():
    module = detector(method="retinanet").eval()
    images, _ = batch(objects=0)
    assert most(module) == Counts()
    with torch.no_grad():
        found = module(images)
        with fixed_rois(module, most(module)):
            torch.testing.assert_close(module(images), found, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(128, 160), (320, 480), (800, 1344)])
def test_levels_of_fixed_boxes_are_those_that_they_are_pooled_on(size):
    boxes = fixed_boxes(1000, size, torch.zeros(()))
    levels = LevelMapper(2, 5)([boxes])
    counts = torch.bincount(levels, minlength=4).tolist()
    assert fixed_levels(1000, size, (4, 8, 16, 32)) == counts
