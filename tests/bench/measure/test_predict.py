import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import attentions
from attentions import cache
from bench.config.suites import profile_configs
from bench.errors import InputError
from bench.measure import memory
from bench.measure.predict import KIND, Fit, NotPredictedError, fit, predict
from bench.model import detectors
from bench.model.backbone import ViL
from bench.model.build import build_detector
from bench.model.detectors.rois import fixed_rois, most
from tests.processes import python

MODES = ("inference", "training")
PRECISIONS = ("32-true", "bf16-mixed")
# Nothing in a mechanism or a backbone depends on data.
EXACT = 0.01
# Bytes of masks that are kept between calls, and of other pieces: a mechanism that works piece by
# piece takes large ones where tensors have no data, so that counting stays quick.
KEPT = 20_000
# On CUDA the allocator takes more than tensors hold.
LIMIT = {"cpu": 0.04, "cuda": 0.10}
TARGETS = 6
ARCH = (
    "l1,h2,d16,n1,s1,g1,p4,f4,a1_l2,h2,d32,n1,s1,g1,p2,f4,a1_"
    "l3,h2,d32,n1,s1,g1,p2,f2,a1_l4,h2,d32,n1,s0,g0,p2,f2,a1"
)
# Fewer operators, where a test does not ask for four stages.
LITTLE = "l1,h2,d16,n1,s1,g1,p4,f4,a1_l2,h2,d32,n1,s0,g0,p2,f2,a1_l3,h2,d32,n1,s0,g0,p2,f2,a1"
HEADS = {
    "fpn_channels": 32,
    "head_width": 64,
    "mask_width": 32,
    "roi_batch": 32,
    "detections": 10,
    "rpn_proposals": (200, 100),
    "rpn_proposals_test": (100, 50),
    "num_classes": 5,
}


def autocast(precision, device="cpu"):
    low = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    return nullcontext() if low is None else torch.autocast(device, dtype=low)


def measured(module, *inputs, mode, precision, device="cpu"):
    """The peak of inference or of a training step, as the profile measures it."""
    module.train(mode == "training")
    # A mechanism may have no parameters.
    steps = torch.optim.AdamW([{"params": module.parameters()}])

    def infer():
        with torch.no_grad(), autocast(precision, device):
            module(*inputs)

    def step():
        torch.manual_seed(0)
        steps.zero_grad(set_to_none=True)
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor):
                tensor.grad = None
        with autocast(precision, device):
            outputs = module(*inputs)
        tensors = outputs.values() if isinstance(outputs, dict) else [outputs]
        loss = torch.stack([output.sum() for output in tensors]).sum()
        loss.backward()
        steps.step()

    call = step if mode == "training" else infer
    call()
    live = [module, [x for x in inputs if not isinstance(x, tuple)], steps.state]
    return memory.peak(call, device=device, live=live)


def targets_of(count, size, batch, device="cpu"):
    torch.manual_seed(1)
    height, width = size
    corner = torch.rand(batch, count, 2) * torch.tensor([width, height]) * 0.6
    side = 4 + torch.rand(batch, count, 2) * torch.tensor([width, height]) * 0.35
    return [
        {
            "boxes": torch.cat([a, a + b], dim=1).to(device),
            "labels": torch.arange(count, device=device) % 5 + 1,
            "masks": torch.ones(count, height, width, dtype=torch.uint8, device=device),
        }
        for a, b in zip(corner, side, strict=True)
    ]


def vil(name="longformer", *, size=(64, 96), arch=ARCH, **options):
    torch.manual_seed(0)
    return ViL(arch, attention=name, image_size=size, **options)


def detector(name="longformer", method="mask_rcnn", *, size=(128, 160), arch=ARCH, **settings):
    anchors = (32, 64, 128, 256, 512) if arch == ARCH else (32, 64, 128, 256)
    return detectors.build(
        vil(name, size=size, arch=arch),
        method=method,
        fixed_size=size,
        anchor_sizes=anchors,
        **(HEADS | settings),
    )


def assert_predicted(module, *, size, batch, mode, precision, device="cpu"):
    """What is predicted of a detector is near what is measured as in a profile."""
    images = [torch.rand(3, *size, device=device) for _ in range(batch)]
    inputs = (images, targets_of(TARGETS, size, batch, device)) if mode == "training" else (images,)
    for target in inputs[1] if mode == "training" and module.method != "mask_rcnn" else ():
        del target["masks"]
    case = {"mode": mode, "precision": precision, "device": device}
    with fixed_rois(module, most(module)):
        peak = measured(module, *inputs, **case)
    found = predict(module, image_size=size, batch_size=batch, targets=TARGETS, **case)
    assert found.total == pytest.approx(peak.bytes, rel=LIMIT[device])


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("inference", "32-true"), ("training", "32-true"), ("training", "bf16-mixed")],
)
@pytest.mark.parametrize("name", attentions.names())
def test_mechanism(name, mode, precision):
    grid, batch = (9, 14), 2
    # All option sets in one mode, where nothing is lost by the others.
    every = attentions.find(name).examples
    thorough = mode == "training" and precision == "32-true"
    for options in every if thorough else every[:1]:
        given = dict(options)
        position = given.pop("position", "absolute")
        module = attentions.build_for(
            name, grid=grid, position=position, dim=16, num_heads=2, num_global=2, **given
        )
        x = torch.randn(batch, 2 + grid[0] * grid[1], 16, requires_grad=mode == "training")
        cache.clear()
        peak = measured(module, x, grid, mode=mode, precision=precision)
        found = predict(module, grid=grid, batch_size=batch, mode=mode, precision=precision)
        # A prediction makes masks anew and forgets them; a call keeps them.
        least = peak.bytes - cache.cached_bytes()
        assert (1 - EXACT) * least - KEPT <= found.total <= (1 + EXACT) * peak.bytes + KEPT


@pytest.mark.parametrize("name", ["longformer", "performer"])
def test_what_is_worked_through_in_pieces_of_a_cpu(name):
    grid = (64, 80)
    module = attentions.build_for(name, grid=grid, dim=32, num_heads=2, num_global=1)
    x = torch.randn(2, 1 + 64 * 80, 32)
    cache.clear()
    peak = measured(module, x, grid, mode="inference", precision="32-true")
    found = predict(module, grid=grid, batch_size=2)
    assert found.total == pytest.approx(peak.bytes - cache.cached_bytes(), rel=EXACT)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("longformer", "inference"), *((name, "training") for name in attentions.names())],
)
def test_backbone(name, mode):
    # No multiple of the stride, so that the image is padded.
    size = (60, 90)
    module = vil(name, arch=LITTLE)
    images = torch.randn(2, 3, *size)
    cache.clear()
    peak = measured(module, images, mode=mode, precision="32-true")
    found = predict(module, image_size=size, batch_size=2, mode=mode)
    assert found.total == pytest.approx(peak.bytes - cache.cached_bytes(), rel=EXACT)


@pytest.mark.parametrize(
    ("method", "batch", "precision", "mode"),
    [
        ("mask_rcnn", 1, "bf16-mixed", "training"),
        ("mask_rcnn", 2, "32-true", "training"),
        ("mask_rcnn", 1, "32-true", "inference"),
        ("retinanet", 2, "32-true", "training"),
        ("retinanet", 1, "bf16-mixed", "inference"),
    ],
)
def test_detector(method, batch, precision, mode):
    size = (128, 160)
    module = detector(method=method)
    assert_predicted(module, size=size, batch=batch, mode=mode, precision=precision)


def test_what_is_assumed_is_the_most_there_can_be():
    module = detector(arch=LITTLE)
    given = {"image_size": (128, 160), "mode": "training"}
    found = predict(module, **given)
    assert found.counts == most(module)
    # A quarter of the RoIs have an object.
    assert found.counts.mask_rois == HEADS["roi_batch"] // 4
    # The peak may lie in another part than the one that is smaller.
    smaller = [
        predict(module, **given, **fewer).total
        for fewer in ({"mask_rois": 3}, {"rois": 20}, {"targets": 1})
    ]
    assert max(smaller) <= found.total
    assert min(smaller) < found.total


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", detectors.METHODS)
@pytest.mark.parametrize("name", attentions.names())
def test_every_detector(name, method, mode):
    size = (128, 160)
    module = detector(name, method)
    for batch, precision in ((1, "bf16-mixed"), (2, "32-true")):
        assert_predicted(module, size=size, batch=batch, mode=mode, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("row", "backbone", "size", "batch"),
    [("ViL", "tiny", (256, 320), 2), ("performer", "small", (320, 480), 1)],
)
@pytest.mark.parametrize("method", detectors.METHODS)
def test_published_sizes(row, backbone, size, batch, method, mode):
    (config,) = profile_configs(
        [row],
        backbone=backbone,
        image_size=size,
        values={"model": {"method": method}},
        overrides=["model.detector.detections=20"],
    )
    module = build_detector(config, 80)
    for precision in PRECISIONS:
        assert_predicted(module, size=size, batch=batch, mode=mode, precision=precision)


@pytest.mark.detectron2
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", detectors.METHODS)
def test_detectron2(method, mode):
    size = (128, 160)
    module = detector(method=method, library="detectron2")
    assert_predicted(module, size=size, batch=2, mode=mode, precision="32-true")


def test_terms():
    with torch.device("meta"):
        module = detector()
    found = predict(module, image_size=(128, 160), batch_size=2, mode="training")
    weights = 4 * sum(p.numel() for p in module.parameters())
    buffers = sum(b.nbytes for b in module.buffers())
    # Not trained: the norm and the classifier of the backbone.
    unused = 4 * sum(
        p.numel() for part in (module.vil.norm, module.vil.head) for p in part.parameters()
    )
    # What torchvision keeps as a list.
    anchors = sum(anchor.nbytes for anchor in module.rpn.anchor_generator.cell_anchors)
    assert found.weights == weights + buffers + anchors
    # Two moments, and the count of steps.
    assert found.optimizer_state == pytest.approx(2 * (weights - unused), rel=EXACT)
    assert found.inputs == 2 * (3 * 128 * 160 * 4 + 8 * (128 * 160 + 4 * 4 + 8))
    terms = (found.weights, found.gradients, found.optimizer_state, found.inputs, found.transient)
    assert found.total == sum(terms) + sum(found.activations.values())
    parts = {"stage1", "stage2", "stage3", "stage4", "fpn", "rpn", "box_head", "mask_head"}
    assert set(found.saved) == parts | {"between parts"}
    assert all(found.activations.get(part, 0) <= found.saved[part] for part in found.saved)
    assert found.part in found.saved
    assert found.phase in ("forward", "backward", "optimizer step")
    assert found.kind == KIND
    assert found.unit == "bytes"
    assert all(p.is_meta and p.grad is None for p in module.parameters())
    assert json.loads(json.dumps(dataclasses.asdict(found)))["counts"]["targets"] == 8


def test_inference_saves_nothing():
    found = predict(vil(), image_size=(64, 96))
    assert found.saved == {}
    assert found.activations == {}
    assert found.gradients == found.optimizer_state == 0
    assert found.phase == "forward"


def test_what_a_stage_saves_is_its_own():
    more = LITTLE.replace("l2,h2,d32,n1", "l2,h2,d32,n2")
    found, deeper = (
        predict(vil(arch=arch), image_size=(64, 96), mode="training").saved
        for arch in (LITTLE, more)
    )
    # A second block saves about as much as the first, and elsewhere nothing changes.
    assert deeper["stage2"] > 1.7 * found["stage2"]
    assert deeper | {"stage2": 0} == found | {"stage2": 0}


def test_parts_after_the_first_find_its_gradients():
    module = vil("identity")
    one, two, many = (
        predict(module, image_size=(64, 96), mode="training", parts=parts) for parts in (1, 2, 9)
    )
    parameters = 4 * sum(p.numel() for p in module.parameters())
    assert one.total < two.total <= one.total + parameters
    assert two.total == many.total
    assert one.saved == two.saved


def test_the_module_stays_as_it_was():
    module = vil("performer")
    module.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    predict(module, image_size=(64, 96), mode="training")
    assert not module.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_fused_attention_of_a_gpu_keeps_no_scores():
    attention = attentions.build("full", dim=64, num_heads=2)
    grid, tokens = (40, 50), 1 + 40 * 50
    scores = 2 * tokens * tokens * 4
    for precision in ("32-true", "16-mixed"):
        found = predict(attention, grid=grid, mode="training", precision=precision, device="cuda")
        assert found.total < scores
    # Nor does full attention with a bias, which makes them again.
    biased = attentions.build("full", dim=64, num_heads=2, position="relative", grid=grid)
    kept = predict(biased, grid=grid, mode="training", device="cuda")
    assert kept.saved["attention"] < scores / 4


def test_a_head_that_no_fused_kernel_takes():
    narrow = attentions.build("full", dim=6, num_heads=2)
    grid, tokens = (20, 20), 401
    found = predict(narrow, grid=grid, mode="training", device="cuda")
    assert found.saved["attention"] > 2 * tokens * tokens * 4


def test_mixed_precision_on_a_gpu():
    given = {"image_size": (64, 96), "mode": "training", "device": "cuda"}
    full, half = (predict(vil(arch=LITTLE), **given, precision=p) for p in ("32-true", "16-mixed"))
    # Half the bytes, but for what stays in float32: the residual stream and layer norms.
    assert 0.5 < sum(half.saved.values()) / sum(full.saved.values()) < 0.9
    assert half.weights == full.weights
    assert half.optimizer_state == full.optimizer_state
    # The allocator gives whole blocks.
    assert half.total % 512 == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "train"}, "unknown mode 'train'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"precision": "16-mixed"}, "needs device cuda"),
        ({"image_size": (0, 32)}, "image_size 0 must be positive"),
        ({"batch_size": -1}, "batch_size -1 must be positive"),
        ({"image_size": (640, 640)}, "no prediction at 640x640: grid 160x160 needs more absolute"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(InputError, match=message):
        predict(vil(), **{"image_size": (64, 96)} | given)


def test_a_mechanism_of_one_size():
    with pytest.raises(InputError, match=r"no prediction at 32x32: linformer was made for"):
        predict(vil("linformer"), image_size=(32, 32))


def test_a_module_of_another_kind():
    with pytest.raises(InputError, match="Linear: it is neither a detector nor a ViL and"):
        predict(torch.nn.Linear(2, 2))


class Reads(torch.nn.Module):
    """A mechanism that reads a value."""

    dim, num_global = 4, 1

    def forward(self, x, grid):
        return x if x.sum().item() > 0 else -x


class Keeps(Reads):
    """A mechanism that keeps a mask, holds a constant of the CPU and remembers its output."""

    def __init__(self):
        super().__init__()
        self.masks = {}
        self.mix = torch.nn.Linear(4, 4)
        self.scale = torch.ones(4)

    def forward(self, x, grid):
        if grid not in self.masks:
            self.masks[grid] = torch.zeros(x.shape[1], 1)
        self.last = self.mix(x) * self.scale + self.masks[grid]
        return self.last * torch.ones(4)


def test_mechanisms_of_others():
    with pytest.raises(NotPredictedError, match=r"Reads does not run on shapes alone \(\w+: "):
        predict(Reads(), grid=(3, 4))
    module = Keeps()
    module(torch.randn(2, 13, 4, requires_grad=True), (3, 4))
    before = vars(module).copy()
    found = predict(module, grid=(3, 4), mode="training")
    assert found.total > 0
    assert vars(module) == before


class Tabulates(Reads):
    """Makes a large table in its first call, and keeps a small one."""

    kept = None

    def forward(self, x, grid):
        if self.kept is None:
            self.kept = torch.ones(1000, 1000).sum(0)
        return x + self.kept[:4]


def test_memory_is_that_of_later_calls():
    module, x = Tabulates().eval(), torch.randn(1, 13, 4)
    found = predict(module, grid=(3, 4)).total
    with torch.no_grad():
        module(x, (3, 4))
        assert memory.peak(lambda: module(x, (3, 4)), device="cpu").bytes <= found < 10_000


class Folds(Reads):
    def forward(self, x, grid):
        image = x[:, 1:].mT.unflatten(2, grid)
        y = F.fold(F.unfold(image, 3, padding=1), grid, 3, padding=1)
        return torch.cat([x[:, :1], y.flatten(2).mT], 1).exp()


class Sparse(Reads):
    def forward(self, x, grid):
        return (torch.eye(x.shape[1]).to_sparse() @ x[0])[None]


class Recurrent(Reads):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer(4, 4, batch_first=True)

    def forward(self, x, grid):
        return self.layer(x)[0]


def test_what_torch_keeps_beside_its_tensors_is_predicted_or_refused():
    x = torch.randn(1, 13, 4)
    for module in (Folds(), Recurrent(torch.nn.GRU)):
        peak = measured(module, x, (3, 4), mode="inference", precision="32-true")
        assert predict(module, grid=(3, 4)).total == peak.bytes
    for module, device in (
        (Sparse(), "cpu"),
        (Recurrent(torch.nn.LSTM), "cpu"),
        (Recurrent(torch.nn.GRU), "cuda"),
    ):
        with pytest.raises(NotPredictedError):
            predict(module, grid=(3, 4), device=device)


def on_meta(_size):
    with torch.device("meta"):
        return attentions.build("global", dim=16, num_heads=2)


def test_fit_image_size():
    given = {"batch_size": 2, "mode": "training"}
    budget = predict(on_meta((0, 0)), image_size=(288, 288), **given).total
    found = fit(on_meta, budget_bytes=budget, **given)
    assert isinstance(found, Fit)
    assert found.largest == 288
    assert found.prediction.total == budget < found.beyond.total
    assert found.beyond.image_size == (320, 320)
    assert fit(on_meta, budget_bytes=budget - 1, **given).largest == 256
    assert fit(on_meta, budget_bytes=10**12, limit=100).largest == 96
    assert fit(on_meta, budget_bytes=10**12, limit=96).beyond is None


def test_fit_batch_size():
    given = {"image_size": (64, 96), "mode": "inference"}
    budget = predict(on_meta((64, 96)), batch_size=5, **given).total
    found = fit(on_meta, budget_bytes=budget, vary="batch_size", **given)
    assert found.largest == 5
    assert found.beyond.batch_size == 6


def test_fit_builds_for_the_size_it_asks_about():
    asked = []

    def build(size):
        asked.append(size)
        with torch.device("meta"):
            return vil("linformer", size=size, arch=LITTLE)

    found = fit(build, budget_bytes=10**12, limit=512, mode="inference")
    assert found.largest == 512
    assert asked == [(256, 256), (512, 512)]


def test_a_budget_that_fits_nothing():
    with pytest.raises(InputError, match=r"0\.00 GB is too small: training of 1 x 32x32 is pred"):
        fit(on_meta, budget_bytes=1000)
    with pytest.raises(InputError, match="limit 0 must be positive"):
        fit(on_meta, budget_bytes=1000, limit=16)
    with pytest.raises(InputError, match="unknown vary 'width'"):
        fit(on_meta, budget_bytes=1000, vary="width")


LARGE = """
import re, time
import torch
from bench.config.suites import profile_configs
from bench.measure.predict import predict
from bench.measure.costs import build_on_meta
(config,) = profile_configs(["ViL"], backbone="small", image_size=(800, 1344))
start = time.process_time()
found = predict(build_on_meta(config), image_size=(800, 1344), batch_size=2, mode="training",
                precision="16-mixed", device="cuda")
seconds = time.process_time() - start
kibibytes = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(found.total, seconds, kibibytes)
"""


@pytest.mark.slow
def test_a_large_detector_costs_little_to_predict():
    total, seconds, kibibytes = map(float, python("-c", LARGE).split())
    assert total > 2e9
    assert seconds < 60
    assert kibibytes * 1024 < 3e9


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("method", detectors.METHODS)
def test_agrees_with_the_allocator(method, precision, mode):
    size, batch = (512, 640), 2
    (config,) = profile_configs(
        ["ViL"], backbone="small", image_size=size, values={"model": {"method": method}}
    )
    module = build_detector(config, 80).cuda()
    assert_predicted(module, size=size, batch=batch, mode=mode, precision=precision, device="cuda")
