"""What is measured is what is trained."""

import dataclasses

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from bench.config.schema import MODES
from bench.config.suites import load_suite, profile_configs, resize_notes
from bench.data.loader import Pace
from bench.measure import memory
from bench.measure.costs import measure_memory, phase_latencies
from bench.measure.latency import Effort
from bench.measure.memory import NotMeasuredError, peak
from bench.measure.workload import Workload, build, stated_rois
from bench.model.detectors.rois import Counts, fixed_rois
from bench.model.optimizer import build_optimizer
from bench.run.train import _Training
from bench.system.devices import single_fabric
from tests.bench.data.test_check import content, write

pytestmark = pytest.mark.timeout(1800)
OVERRIDES = (
    "device=cpu",
    "model.detector.fpn_channels=16",
    "model.detector.mask_width=16",
    "model.detector.roi_batch=16",
    "model.detector.rpn_proposals=[40,20]",
    "train.clip_norm=0.5",
)


def config(**values):
    (found,) = profile_configs(
        ["ViL"], backbone="quick", image_size=(64, 96), values=values, overrides=OVERRIDES
    )
    return found


def test_the_peak_of_the_measured_step_is_that_of_training():
    # Two images: the peak is at the end of the forward pass, and not in the update of the weights.
    run = config(profile={"batch_size": 2})
    workload = build(run)
    measured = peak(workload.call("training"), device="cpu", live=workload.live("training"))
    trained = build(run)
    detector, fabric = trained.module, trained.fabric
    training = _Training(
        detector,
        trained.model,
        fabric.setup_optimizers(build_optimizer(detector, run.train)),
        fabric,
        trained.recipe,
        run.seed,
        lambda _step: trained.recipe.lr,
    )
    images, (targets,) = trained.inputs[0], trained.targets
    detector.train()

    def step():
        with fixed_rois(detector, Counts(**stated_rois(run))):
            training.step(images, targets, pace=Pace(reading=1.0), stop=False)

    step()
    live = [detector, training.optimizer.state, images, targets]
    real = peak(step, device="cpu", live=live)
    # The gradients of the step before are four bytes a parameter, most of which would be too much.
    parameters = sum(p.numel() for p in detector.parameters())
    assert measured.bytes == pytest.approx(real.bytes, abs=0.05 * 4 * parameters)


def crowded(folder, objects):
    """A split of one image with so many objects."""
    data = content()
    first = data["images"][0]["id"]
    own = [one for one in data["annotations"] if one["image_id"] == first and not one["iscrowd"]]
    data["annotations"] = [own[0] | {"id": number + 1} for number in range(objects)]
    data["images"] = data["images"][:1]
    write(folder, data)
    return folder


@pytest.mark.parametrize("method", ["mask_rcnn", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_memory_and_latency_are_of_a_stated_number_of_objects(tmp_path, method):
    """Not of those that the first images of the data happen to have."""
    (run,) = profile_configs(
        ["ViL"],
        backbone="quick",
        image_size=(64, 96),
        values={"model": {"method": method}, "profile": {"batch_size": 2}},
        overrides=OVERRIDES[:2],
    )
    found = []
    for objects in (3, 40):
        workload = build(run, root=crowded(tmp_path / str(objects), objects))
        section, _ = measure_memory(workload, MODES)
        assert [len(target["boxes"]) for target in workload.targets[0]] == [8, 8]
        # Those of RetinaNet have no masks, as in training.
        assert ("masks" in workload.targets[0][0]) == (method == "mask_rcnn")
        found.append({mode: section[mode] for mode in MODES})
    assert found[0] == found[1]
    images = sum(image.nbytes for image in workload.inputs[0])
    weights = {one.data_ptr(): one.nbytes for one in workload.module.state_dict().values()}
    # Inference has no targets, of which a mask alone is 6144 bytes.
    known = images + sum(weights.values())
    assert section["before"]["inference"] == pytest.approx(known, abs=4096)


def test_a_step_in_half_precision_is_repeated_until_it_updates():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    fabric = Fabric(
        accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    )
    run = config(train={"precision": "16-mixed"})
    workload = Workload(nn.Linear(4, 4), (torch.randn(2, 4),), fabric=fabric, config=run)
    before = [p.detach().clone() for p in workload.module.parameters()]
    workload.step()
    assert not workload.optimizer.state, "the first step of this test overflows"
    workload.call("training")
    assert len(workload.optimizer.state) == 2
    after = list(workload.module.parameters())
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "option", ["channels_last", "checkpoint", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_options_of_how_a_model_runs_change_no_result(option):
    gradients, peaks = [], []
    for value in (False, True):
        workload = build(config(model={option: value}))
        workload.module.train()
        workload.recipe = dataclasses.replace(workload.recipe, clip_norm=0.0)
        workload.step()
        named = workload.module.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None and p.numel()})
        (large,) = profile_configs(
            ["ViL"],
            backbone="quick",
            image_size=(256, 320),
            values={"model": {option: value}},
            overrides=["device=cpu"],
        )
        backbone = build(large, "backbone")
        step = backbone.call("training")
        peaks.append(peak(step, device="cpu", live=backbone.live("training")).bytes)
    plain, other = gradients
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        assert (other[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-3), name
    if option == "checkpoint":
        assert peaks[1] < 0.8 * peaks[0]


def test_a_step_is_forward_backward_and_optimizer():
    workload = build(config())
    effort = Effort(min_repeats=3, min_seconds=0.0)
    found = phase_latencies(workload, effort)
    assert list(found) == ["forward", "backward", "optimizer"]
    assert all(0 < one["q1"] <= one["median"] <= one["q3"] for one in found.values())


class Appending(nn.Module):
    """Keeps its output of each call, as a hook for an explanation does."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(8, 8), []

    def forward(self, x):
        x = self.layer(x)
        self.kept.append(x.detach().clone())
        return x


def test_memory_that_grows_from_call_to_call_is_said():
    run = config()
    for module, grows in ((Appending(), True), (nn.Linear(8, 8), False)):
        workload = Workload(module, (torch.randn(4, 8),), fabric=single_fabric(run), config=run)
        _, notes = measure_memory(workload, MODES)
        assert [note.partition(",")[0] for note in notes] == [
            f"memory of {mode} grows from call to call" for mode in MODES if grows
        ]
        assert all("by 0.000128 MB in the one" in note for note in notes)


def test_memory_that_cannot_be_measured_loses_nothing_else(monkeypatch):
    def watched(call, **how):
        if call == workload.step:
            raise NotMeasuredError("it does not run where its tensors are watched")
        return peak(call, **how)

    monkeypatch.setattr(memory, "peak", watched)
    workload = build(config(profile={"batch_size": 1}), "attention")
    section, notes = measure_memory(workload, ("inference", "training"))
    assert section["inference"] > 0
    assert section["training"] is None
    assert notes == [
        "memory of training not measured: it does not run where its tensors are watched"
    ]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (["data.min_sizes=[256]", "data.max_size=320"], "evaluated as 256x320"),
        (["data.min_sizes=[192,128]", "data.max_size=300"], None),
    ],
)
def test_memory_is_of_the_size_that_it_says(sizes, said):
    """Whatever images of that size are resized to in training and evaluation."""
    found = []
    for more in ([], sizes):
        (config,) = load_suite("quick", rows=["identity"], overrides=more, device="cpu").runs
        work = build(config)
        usual = work.module.settings
        peaks = [peak(work.call(mode), device="cpu", live=work.live(mode)).bytes for mode in MODES]
        found.append(peaks)
        assert work.module.settings is usual
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert [said in note for note in resize_notes(config)] == ([True] if said else [])
