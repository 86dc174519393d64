import copy
import gzip
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from bench.data.masks import encode_soft
from bench.errors import InputError
from bench.model import detectors
from bench.model.backbone import ViL
from bench.model.detectors import Settings, network_size
from bench.model.detectors.roi_align import roi_align
from bench.model.detectors.torchvision import PyramidAnchors, PyramidRoIAlign

TINY = (
    "l1,h1,d8,n1,s1,g1,p4,f3,a1_l2,h2,d16,n1,s1,g1,p2,f3,a1_"
    "l3,h2,d16,n1,s1,g1,p2,f3,a1_l4,h4,d32,n1,s1,g0,p2,f3,a1"
)
SMALL = (
    "l1,h3,d96,n1,s1,g1,p4,f7,a1_l2,h3,d192,n2,s1,g1,p2,f7,a1_"
    "l3,h6,d384,n8,s1,g1,p2,f7,a1_l4,h12,d768,n1,s1,g0,p2,f7,a1"
)
LIBRARIES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
RECIPE = {"num_classes": 80, "min_sizes": (800,), "max_size": 1333, "fixed_size": None}
every_library = pytest.mark.parametrize("library", LIBRARIES)
every_method = pytest.mark.parametrize("method", detectors.METHODS)


def tiny(method="mask_rcnn", library="torchvision", *, image_size=96, **options):
    torch.manual_seed(0)
    small = {
        "num_classes": 3,
        "fpn_channels": 16,
        "head_width": 32,
        "mask_width": 16,
        "anchor_sizes": (8, 16, 32, 64, 96),
    }
    vil = ViL(TINY, image_size=image_size)
    return detectors.build(vil, method=method, library=library, **{**small, **options})


def square(rows, columns, box, label=3, image_id=7):
    """A grey image with a bright rectangle, and its target."""
    x1, y1, x2, y2 = box
    image = torch.full((3, rows, columns), 0.3)
    image[:, y1:y2, x1:x2] = 0.9
    masks = torch.zeros(1, rows, columns, dtype=torch.uint8)
    masks[0, y1:y2, x1:x2] = 1
    target = {
        "boxes": torch.tensor([[float(side) for side in box]]),
        "labels": torch.tensor([label]),
        "masks": masks,
        "image_id": torch.tensor(image_id),
    }
    return image, target


def empty(rows, columns):
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, rows, columns, dtype=torch.uint8),
        "image_id": torch.tensor(8),
    }
    return torch.rand(3, rows, columns), target


def batch():
    pairs = [square(50, 70, (6, 5, 40, 30)), empty(80, 61)]
    return [image for image, _ in pairs], [target for _, target in pairs]


def inputs_of(module, run):
    """The positional arguments that `module` was last called with during `run()`."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    run()
    handle.remove()
    return seen[-1]


def shapes(values):
    if isinstance(values, torch.Tensor):
        return tuple(values.shape)
    values = values.values() if isinstance(values, dict) else values
    return [shapes(value) for value in values]


@every_library
@every_method
def test_training_gives_every_parameter_a_gradient(method, library):
    detector = tiny(method, library)
    losses = detector(*batch())
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = {name for name, p in detector.named_parameters() if p.grad is None}
    unused = {
        f"backbone.bottom_up.{name}.{w}" for name in ("norm", "head") for w in ("weight", "bias")
    }
    assert without == unused


@every_library
@every_method
def test_training_learns_one_object_in_the_coordinates_of_the_image(method, library):
    detector = tiny(method, library, fixed_size=(96, 80), roi_batch=32)
    image, target = square(48, 72, (20, 10, 50, 34), label=2)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        sum(detector([image], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    detector.eval()
    with torch.no_grad():
        (output,) = detector([image])
    best = output["scores"].argmax()
    assert output["labels"][best] == 2
    assert box_iou(output["boxes"][best : best + 1], target["boxes"]) > 0.6
    if method == "mask_rcnn":
        mask = output["masks"][best, 0] >= 0.5
        truth = target["masks"][0].bool()
        assert (mask & truth).sum() / (mask | truth).sum() > 0.6
    else:
        assert "masks" not in output


@every_library
@every_method
def test_images_without_objects_train_alone(method, library):
    image, target = empty(80, 61)
    losses = tiny(method, library)([image], [target])
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()


@every_library
@every_method
def test_outputs_keep_to_the_contract(method, library):
    detector = tiny(method, library, score_threshold=0.0, detections=9).eval()
    images = [torch.rand(3, 50, 70), torch.rand(3, 80, 61)]
    with torch.no_grad():
        outputs = detector(images)
    for image, output in zip(images, outputs, strict=True):
        rows, columns = image.shape[1:]
        assert set(output) == {"boxes", "labels", "scores"} | (
            {"masks"} if method == "mask_rcnn" else set()
        )
        assert 0 < len(output["boxes"]) <= 9
        assert output["labels"].dtype == torch.int64
        assert set(output["labels"].tolist()) <= {1, 2, 3}
        limits = torch.tensor([columns, rows, columns, rows])
        assert output["boxes"].min() >= 0
        assert (output["boxes"] <= limits + 1e-3).all()
        if method == "mask_rcnn":
            assert output["masks"].shape == (len(output["boxes"]), 1, rows, columns)
            assert output["masks"].is_floating_point()
            assert ((output["masks"] >= 0) & (output["masks"] <= 1)).all()


@every_library
@pytest.mark.parametrize("image", [torch.zeros(3, 60, 90), torch.zeros(3, 8, 8)])
def test_masks_are_pasted_a_few_at_a_time_to_run_lengths(library, image, monkeypatch):
    detector = tiny(library=library, score_threshold=0.0, detections=7).eval()
    pasted = []
    place = f"bench.model.detectors.{library}"
    monkeypatch.setattr(f"{place}.PASTED_AT_ONCE", 2 * 60 * 90)
    monkeypatch.setattr(
        f"{place}.encode_soft", lambda masks: pasted.append(masks.numel()) or encode_soft(masks)
    )
    with torch.no_grad():
        (whole,) = detector([image])
        detector.run_lengths = True
        (found,) = detector([image])
    assert found["masks"].counts == encode_soft(whole["masks"])
    assert found["masks"].shape == tuple(whole["masks"].shape)
    assert max(pasted) <= 2 * 60 * 90
    for name in ("boxes", "labels", "scores"):
        assert torch.equal(found[name], whole[name])


@every_library
def test_mask_rcnn_without_detections_returns_empty_masks(library):
    detector = tiny(library=library, score_threshold=0.99).eval()
    with torch.no_grad():
        (output,) = detector([torch.rand(3, 50, 70)])
    assert output["boxes"].shape == (0, 4)
    assert output["masks"].shape == (0, 1, 50, 70)


@every_library
@pytest.mark.parametrize("label", [1, 3])
def test_retinanet_has_one_output_a_class_and_shifts_labels_both_ways(library, label):
    detector = tiny("retinanet", library)
    (classes,) = [
        p
        for n, p in detector.named_parameters()
        if n.endswith((".cls_logits.bias", ".cls_score.bias"))
    ]
    assert len(classes) == 9 * 3
    with torch.no_grad():
        classes.view(9, 3)[:, label - 1] = 3.0
    image, target = square(50, 70, (6, 5, 40, 30))
    losses = {}
    for other in (1, 3):
        # detectron2's RetinaNet divides by a moving average over its calls.
        fresh = copy.deepcopy(detector)
        found = fresh([image], [{**target, "labels": torch.tensor([other])}])
        losses[other] = next(v.item() for k, v in found.items() if "cl" in k)
    assert min(losses, key=losses.get) == label
    with torch.no_grad():
        (output,) = detector.eval()([image])
    assert set(output["labels"].tolist()) == {label}


@every_library
@every_method
def test_boxes_stay_in_float32_under_autocast(method, library):
    detector = tiny(method, library, score_threshold=0.0)
    images, targets = batch()
    torch.manual_seed(1)
    exact = copy.deepcopy(detector)(images, targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
        sum(losses.values()).backward()
        with torch.no_grad():
            outputs = detector.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert sum(losses.values()).item() == pytest.approx(sum(exact.values()).item(), rel=0.05)
    for output in outputs:
        assert output["boxes"].dtype == output["scores"].dtype == torch.float32
        assert not torch.equal(output["boxes"], output["boxes"].bfloat16().float())


@every_library
@every_method
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.tensor([[6.0, 5, 6, 30]])}, r"image 7: .*\[6.0, 5.0, 6.0, 30.0\].* area"),
        ({"boxes": torch.tensor([[6.0, float("nan"), 9, 30]])}, "image 7: .* area"),
        ({"labels": torch.tensor([0])}, r"image 7: the label 0 is not within 1\.\.3"),
        ({"labels": torch.tensor([4])}, r"image 7: the label 4 is not within 1\.\.3"),
        ({"labels": torch.tensor([1, 2])}, "image 7: 2 labels for 1 boxes"),
        ({"boxes": torch.zeros(0)}, r"image 7: boxes have the shape \(0,\)"),
    ],
)
def test_wrong_targets_name_the_image(method, library, change, message):
    image, target = square(50, 70, (6, 5, 40, 30))
    with pytest.raises(InputError, match=message):
        tiny(method, library)([image], [{**target, **change}])


@every_library
def test_missing_masks_name_the_image(library):
    image, target = square(50, 70, (6, 5, 40, 30))
    with pytest.raises(InputError, match="image 7: 0 masks for 1 boxes"):
        tiny(library=library)([image], [{**target, "masks": target["masks"][:0]}])


@every_library
def test_training_draws_a_size_for_each_image_and_evaluation_takes_the_last(library):
    detector = tiny(library=library, min_size=(32, 64), max_size=96)
    image, target = square(50, 50, (6, 5, 40, 30))
    vil = detector.backbone.bottom_up
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        (images,) = inputs_of(vil, lambda: detector([image], [target]))
        seen.add(tuple(images.shape[2:]))
    assert seen == {(32, 32), (64, 64)}
    detector.eval()
    with torch.no_grad():
        (images,) = inputs_of(vil, lambda: detector([image]))
    assert images.shape[2:] == (64, 64)


@every_library
@every_method
def test_the_size_that_the_loader_drew_is_the_network_s(method, library):
    detector = tiny(method, library, min_size=(32, 64), max_size=96)
    for drawn in (32, 64):
        image, target = square(drawn, drawn, (6, 5, 30, 30))
        target["size"] = torch.tensor([drawn, drawn])
        for seed in range(4):
            torch.manual_seed(seed)
            run = partial(detector, [image], [target])
            (images,) = inputs_of(detector.backbone.bottom_up, run)
            assert images.shape[2:] == (drawn, drawn)


@every_library
@pytest.mark.parametrize(
    ("image_size", "options", "expected"),
    [
        (96, {}, (64, 96)),
        (96, {"fixed_size": (96, 64)}, (96, 64)),
        ((64, 96), {}, (64, 96)),
        ((64, 96), {"max_size": 64}, (64, 64)),
    ],
)
def test_the_canvas_comes_from_the_backbone_or_the_options(library, image_size, options, expected):
    detector = tiny(library=library, image_size=image_size, **options).eval()
    with torch.no_grad():
        (images,) = inputs_of(
            detector.backbone.bottom_up, lambda: detector([torch.rand(3, 50, 80)])
        )
    assert tuple(images.shape[2:]) == expected


@every_library
@every_method
def test_part_calls_have_the_inputs_of_a_real_run(method, library):
    detector = tiny(method, library, rpn_proposals_test=(20, 7), detections=4, score_threshold=0.0)
    detector.eval()
    calls = {c.name: c for c in detector.part_calls((60, 90), proposals=7, detections=4)}
    heads = {"rpn", "box_head", "mask_head"} if method == "mask_rcnn" else {"retinanet_head"}
    assert set(calls) == {"backbone", "fpn"} | heads
    cpu = torch.device("cpu")

    def run():
        with torch.no_grad():
            detector([torch.rand(3, 60, 90)])

    def first(name):
        module = calls[name].module
        return module[0] if isinstance(module, torch.nn.Sequential) else module

    for name in set(calls) - {"fpn"}:
        (expected,) = inputs_of(first(name), run)
        (given,) = calls[name].make_inputs(cpu, torch.float32)
        assert shapes(given) == shapes(expected), name
    with torch.no_grad():
        levels = calls["fpn"].module(*calls["fpn"].make_inputs(cpu, torch.float32))
        for name in heads & {"rpn", "retinanet_head"}:
            assert shapes(levels) == shapes(calls[name].make_inputs(cpu, torch.float32)[0])
        for call in detector.part_calls((60, 90), proposals=7, detections=4, batch_size=2):
            call.module(*call.make_inputs(cpu, torch.float32))


@every_library
@every_method
def test_parts_hold_all_parameters_but_the_classification_head(method, library):
    detector = tiny(method, library)
    parts = detector.parts()
    counted = sum(p.numel() for part in parts.values() for p in part.parameters())
    vil = detector.backbone.bottom_up
    unused = sum(p.numel() for m in (vil.norm, vil.head) for p in m.parameters())
    assert counted + unused == sum(p.numel() for p in detector.parameters())
    assert {"stage1", "stage2", "stage3", "stage4", "fpn"} < set(parts)


@every_library
@pytest.mark.parametrize(
    ("method", "published", "extra"),
    # torchvision's Mask R-CNN has outputs for the background: 4 * 1025 of boxes, 257 of masks.
    [("mask_rcnn", 45_017_176, 4 * 1025 + 257), ("retinanet", 35_681_372, 0)],
)
def test_parameters_and_part_calls_on_the_meta_device(method, published, extra, library):
    with torch.device("meta"):
        detector = detectors.build(ViL(SMALL), method=method, library=library)
    expected = published + (extra if library == "torchvision" else 0)
    assert sum(p.numel() for p in detector.parameters()) == expected
    for call in detector.part_calls((800, 1333), proposals=1000, detections=100):
        call.module(*call.make_inputs(torch.device("meta"), torch.float32))


@every_library
@every_method
def test_the_backbone_keeps_its_names_under_bottom_up(method, library):
    detector = tiny(method, library)
    prefix = "backbone.bottom_up."
    names = {n.removeprefix(prefix) for n in detector.state_dict() if n.startswith(prefix)}
    assert names == set(detector.backbone.bottom_up.state_dict())
    assert (detector.library, detector.method, detector.num_classes) == (library, method, 3)


def test_anchors_have_exact_sizes_and_strides():
    anchors = PyramidAnchors([[32 * 2 ** (1 / 3)], [64]], [8, 64])
    images = ImageList(torch.zeros(1, 3, 800, 800), [(800, 800)])
    maps = [torch.zeros(1, 1, side, side, dtype=torch.bfloat16) for side in (100, 13)]
    (found,) = anchors(images, maps)
    assert found.dtype == torch.float32
    widths, heights = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    assert (heights / widths)[:3].tolist() == pytest.approx([0.5, 1, 2])
    assert (widths * heights)[:3].tolist() == pytest.approx([(32 * 2 ** (1 / 3)) ** 2] * 3)
    centres = (found[-1, :2] + found[-1, 2:]) / 2
    assert centres.tolist() == [12 * 64, 12 * 64]


def test_rois_are_pooled_at_the_true_scale_where_padding_is_large():
    detector = tiny(fixed_size=(33, 33), image_size=64).eval()
    with torch.no_grad():
        detector([torch.rand(3, 33, 33)])
    assert detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_rois_are_pooled_half_a_pixel_further_left_than_torchvision_does():
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    pool = PyramidRoIAlign(["layer1"], [4, 8], 2)
    # On a map of stride 4 the pixel at 40 is 10 - 0.5, if pixel centres lie at halves.
    pooled = pool({"layer1": ramp}, [torch.tensor([[36.0, 40, 44, 48]])], [(128, 128)])
    assert pooled[0, 0].tolist() == [[9.0, 10.0]] * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("resolution", [7, 14])
def test_rois_are_pooled_as_torchvision_pools_them(dtype, tolerance, resolution):
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 19, 30, dtype=dtype, requires_grad=True)
    # Within the images of 76 x 120 pixels, across their borders, thin, empty, reversed, outside.
    corners = torch.rand(40, 2, dtype=dtype) * 140 - 15
    sides = torch.rand(40, 2, dtype=dtype) * 60
    sides[:6], sides[6], sides[7] = torch.tensor([[1.0, 110], [110, 1]] * 3), 0, -9
    corners[8] = -90
    place = (torch.arange(40) % 2).to(dtype)[:, None]
    rois = torch.cat([place, corners, corners + sides], dim=1)
    for some in (rois, rois[:0]):
        pooled = roi_align(maps, some, resolution, 1 / 4)
        wanted = torchvision.ops.roi_align(maps, some, resolution, 1 / 4, 0, True)
        grad = torch.randn_like(wanted)
        torch.testing.assert_close(pooled, wanted, rtol=tolerance, atol=tolerance)
        found = [torch.autograd.grad(out, maps, grad)[0] for out in (pooled, wanted)]
        torch.testing.assert_close(*found, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.detectron2
def test_detectron2_pools_bfloat16_maps_at_exact_rois():
    structures = pytest.importorskip("detectron2.structures")
    pooler = tiny(library="detectron2").roi_heads.box_pooler
    maps = [torch.rand(1, 16, 256 // 2**k, 8).bfloat16() for k in range(4)]
    boxes = [structures.Boxes(torch.tensor([[2.0, 1001, 19, 1017]]))]
    torch.testing.assert_close(pooler(maps, boxes), pooler([m.float() for m in maps], boxes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mask_rcn"}, "unknown detection method 'mask_rcn' .*'mask_rcnn'"),
        ({"library": "torchvison"}, "unknown detector library 'torchvison' .*'torchvision'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"min_size": ()}, r"min_sizes=\(\) must have at least 1"),
        ({"fixed_size": (64, 0)}, "fixed_size.1=0 must be greater"),
        ({"score_threshold": 1.5}, "score_threshold=1.5"),
        ({"anchor_sizes": (8, 16)}, r"model.detector.anchor_sizes=\[8, 16\] must have 5 values"),
        ({"fpn_chanels": 8}, "unknown .*'fpn_chanels' .did you mean 'fpn_channels'"),
        ({"max_size": 128}, "128x128 .* larger than the 96x96"),
        ({"fixed_size": (96, 97)}, "96x97 .* larger than the 96x96"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_without_detectron2_auto_takes_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "bench.model.detectors.detectron2", raising=False)
    assert detectors.resolve_library("auto") == "torchvision"
    assert tiny(library="auto").library == "torchvision"
    with pytest.raises(InputError) as error:
        tiny(library="detectron2")
    assert "pip install --no-build-isolation '.[detectron2]'" in str(error.value)


PUBLISHED = json.loads(
    gzip.decompress(Path(__file__).with_name("published_state_keys.json.gz").read_bytes())
)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dicts_have_the_published_names_and_shapes(name):
    published = PUBLISHED[name]
    attention = "longformer" if "longformer" in published["attention"] else published["attention"]
    if published["only_global"]:
        attention = "global"
    with torch.device("meta"):
        detector = detectors.build(
            ViL(published["arch"], attention=attention),
            method="retinanet" if "retina" in name else "mask_rcnn",
            library="detectron2",
        )
    found = {key: list(value.shape) for key, value in detector.state_dict().items()}
    assert found == published["state"]


@pytest.mark.detectron2
def test_with_detectron2_auto_takes_it():
    assert detectors.resolve_library("auto") == "detectron2"


def places(method):
    """Where torchvision keeps what detectron2 calls by its names, without weight and bias."""
    first = 2 if method == "mask_rcnn" else 3
    pairs = {
        f"backbone.fpn.{ours}_blocks.{level - first}.0": f"backbone.fpn_{theirs}{level}"
        for level in range(first, 6)
        for ours, theirs in (("inner", "lateral"), ("layer", "output"))
    }
    if method == "retinanet":
        pairs |= {f"backbone.fpn.extra_blocks.p{k}": f"backbone.top_block.p{k}" for k in (6, 7)}
        for ours, theirs in (("classification", "cls"), ("regression", "bbox")):
            for k in range(4):
                pairs[f"head.{ours}_head.conv.{k}.0"] = f"head.{theirs}_subnet.{2 * k}"
        pairs["head.classification_head.cls_logits"] = "head.cls_score"
        pairs["head.regression_head.bbox_reg"] = "head.bbox_pred"
        return pairs
    pairs |= {
        f"roi_heads.mask_head.{k}.0": f"roi_heads.mask_head.mask_fcn{k + 1}" for k in range(4)
    }
    return pairs | {
        "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
        "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
        "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
        "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
        "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.conv5_mask": "roi_heads.mask_head.deconv",
        "roi_heads.mask_predictor.mask_fcn_logits": "roi_heads.mask_head.predictor",
    }


def twins(method, **options):
    """The detectors of both libraries with the same weights, large enough to tell boxes apart."""
    ours, theirs = (tiny(method, library, **options) for library in ("torchvision", "detectron2"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() > 1 and not name.startswith("backbone."):
                parameter.normal_(0, 1.3 / parameter[0].numel() ** 0.5)
    source, target = theirs.state_dict(), ours.state_dict()
    for place, name in places(method).items():
        for kind in ("weight", "bias"):
            tensor = source[f"{name}.{kind}"]
            if name.endswith("box_predictor.cls_score"):
                # The background is the last class there, and the first here.
                tensor = torch.roll(tensor, 1, dims=0)
            extra = len(target[f"{place}.{kind}"]) - len(tensor)
            target[f"{place}.{kind}"] = torch.cat([torch.zeros_like(tensor[:extra]), tensor])
    target |= {name: tensor for name, tensor in source.items() if "bottom_up" in name}
    ours.load_state_dict(target)
    return ours.eval(), theirs.eval()


@pytest.mark.detectron2
@every_method
@pytest.mark.parametrize("canvas", [{}, {"min_size": 40, "max_size": 70}])
def test_both_libraries_find_the_same_with_the_same_weights(method, canvas):
    ours, theirs = twins(
        method, score_threshold=0.0, detections=30, rpn_proposals_test=(100, 40), **canvas
    )
    images = [torch.rand(3, 50, 71), torch.rand(3, 43, 90)]
    with torch.no_grad():
        for found, expected in zip(ours(images), theirs(images), strict=True):
            assert found["scores"].std() > 0.001
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-2)
            assert torch.equal(found["labels"], expected["labels"])


@pytest.mark.detectron2
def test_both_libraries_predict_the_same_masks_before_they_are_pasted():
    ours, theirs = twins("mask_rcnn", score_threshold=0.0, detections=9)
    logits = []
    for head in (ours.roi_heads.mask_predictor, theirs.roi_heads.mask_head.predictor):
        head.register_forward_hook(lambda _, __, output: logits.append(output))
    with torch.no_grad():
        ours([torch.ones(3, 64, 64)])
        theirs([torch.ones(3, 64, 64)])
    torch.testing.assert_close(logits[0][:, 1:], logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((480, 640), {}, (800, 1067)),
        ((427, 640), {}, (800, 1199)),
        ((640, 427), {}, (1199, 800)),
        ((300, 900), {}, (444, 1333)),
        ((800, 1333), {}, (800, 1333)),
        ((300, 900), {"fixed_size": (64, 96)}, (64, 96)),
        ((500, 500), {"min_sizes": (640, 800)}, (800, 800)),
    ],
)
def test_sizes_of_images_in_evaluation(size, options, expected):
    settings = Settings(**{**RECIPE, **options})
    assert network_size(*size, settings, training=False) == expected


@pytest.mark.detectron2
def test_sizes_of_images_are_those_of_detectron2():
    transforms = pytest.importorskip("detectron2.data.transforms")
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        height, width = torch.randint(80, 700, (2,), generator=random).tolist()
        settings = Settings(**RECIPE)
        expected = transforms.ResizeShortestEdge.get_output_shape(height, width, 800, 1333)
        assert network_size(height, width, settings, training=False) == expected


@pytest.mark.detectron2
@every_method
def test_a_resumed_detector_of_detectron2_trains_bit_by_bit_as_before(method, tmp_path):
    """What a checkpoint keeps: weights, the optimizer, and the numbers named by `running`."""
    images, targets = batch()

    def steps(detector, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            sum(detector(images, targets).values()).backward()
            optimizer.step()

    def fresh():
        detector = tiny(method, "detectron2")
        return detector, torch.optim.AdamW(detector.parameters(), lr=1e-2)

    whole, optimizer = fresh()
    steps(whole, optimizer, range(3))
    state = {
        "model": whole.state_dict(),
        "optimizer": optimizer.state_dict(),
        "running": {name: float(getattr(whole, name)) for name in whole.running},
    }
    torch.save(state, tmp_path / "state.pt")
    steps(whole, optimizer, range(3, 6))
    resumed, optimizer = fresh()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["running"].items():
        setattr(resumed, name, value)
    steps(resumed, optimizer, range(3, 6))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert (method == "retinanet") == ("loss_normalizer" in state["running"])
    for name in whole.running:
        assert name not in whole.state_dict()
