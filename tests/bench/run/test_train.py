"""The training loop: its schedule, its factors by name, and what it logs."""

import contextlib
import dataclasses
import random
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bench.config.schema import CLASSIFIER, DataConfig, RunConfig, TrainConfig
from bench.config.suites import load_suite
from bench.data.coco import CocoDataset
from bench.errors import InputError
from bench.model.backbone import ViL
from bench.model.optimizer import build_optimizer, effective, learning_rate, schedule_notes
from bench.run import train as training
from bench.run.buffers import FollowingBuffers
from bench.run.checkpoints import Checkpoints
from bench.run.train import step_seed, train
from bench.system.devices import make_fabric
from bench.system.logs import StepLog, read_steps, readable
from tests.bench.run.killed import Brightness

STEPS = 7


def run(
    dataset: CocoDataset,
    folder: Path,
    *,
    stop_after: int | None = None,
    step_log: StepLog | None = None,
    made: type[Brightness] = Brightness,
    **changes: Any,
) -> dict[str, Tensor]:
    """The weights in the end, also of a run that was stopped."""
    values = {"batch_size": 2, "lr": 0.1, "warmup_steps": 2, "log_every": 3, "decay": "cosine"}

    class StopError(Exception):
        pass

    def progress(step: int, loss: float) -> None:
        del loss
        if step == stop_after:
            raise StopError

    detector = made()
    with contextlib.suppress(StopError):
        train(
            detector,
            dataset,
            fabric=make_fabric(RunConfig(device="cpu")),
            config=TrainConfig(steps=STEPS, checkpoint_every=2, **(values | changes)),
            data=DataConfig(),
            seed=5,
            checkpoints=Checkpoints(folder),
            progress=progress,
            step_log=step_log,
        )
    return detector.state_dict()


def test_the_rate_warms_up_and_falls_at_the_milestones() -> None:
    config = TrainConfig(
        steps=100, lr=2.0, warmup_steps=10, warmup_factor=0.01, milestones=[60, 80]
    )
    assert learning_rate(0, config) == pytest.approx(0.02)
    assert learning_rate(5, config) == pytest.approx(2.0 * 0.505)
    assert learning_rate(10, config) == 2.0
    assert learning_rate(59, config) == 2.0
    assert learning_rate(60, config) == pytest.approx(0.2)
    assert learning_rate(99, config) == pytest.approx(0.02)


def test_a_cosine_ends_near_nothing() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup_steps=0, decay="cosine")
    assert learning_rate(0, config) == 1.0
    assert learning_rate(50, config) == pytest.approx(0.5)
    assert 0 < learning_rate(99, config) < 0.001


def test_steps_seeds_and_parts_have_random_states_of_their_own() -> None:
    places = [(seed, step, part) for seed in range(10) for step in range(100) for part in range(3)]
    seeds = {step_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= value < 2**63 for value in seeds)
    assert step_seed(3, 4, 0) == step_seed(3, 4)


def test_the_gradient_is_clipped_as_the_method_was_published() -> None:
    for method, norm in (("mask_rcnn", 0.5), ("retinanet", 1.0)):
        run_config = load_suite("ablation", data="x", overrides=[f"model.method={method}"]).runs[0]
        assert effective(run_config.train, run_config.model.method).clip_norm == norm
    assert effective(TrainConfig(clip_norm=0.0), "mask_rcnn").clip_norm == 0.0


def test_half_the_batch_takes_half_the_rate_and_twice_the_steps() -> None:
    config = TrainConfig(
        steps=90000, batch_size=8, lr=1e-4, warmup_steps=1000, milestones=[60000, 80000],
        scale_from_batch=16,
    )  # fmt: skip
    scaled = effective(config, "mask_rcnn")
    assert (scaled.lr, scaled.steps, scaled.warmup_steps) == (5e-5, 180000, 2000)
    assert scaled.milestones == (120000, 160000)
    # The rate at a point of the epoch is half the recipe's.
    recipe = dataclasses.replace(config, batch_size=16)
    for step in (0, 700, 50000, 70000, 89999):
        assert learning_rate(2 * step, scaled) == pytest.approx(learning_rate(step, recipe) / 2)
    # It is the same whether it was scaled before or not.
    assert effective(scaled, "mask_rcnn") == scaled
    (note,) = schedule_notes(RunConfig(train=config))
    assert "0.0001 to 5e-05" in note
    assert schedule_notes(RunConfig(train=recipe)) == []


@pytest.mark.parametrize("steps", [200, 1000])
def test_a_training_that_ends_within_its_warm_up_is_said(steps: int) -> None:
    config = TrainConfig(steps=steps, lr=1e-4, warmup_steps=1000)
    (note,) = schedule_notes(RunConfig(train=config))
    assert f"train.steps={steps}, train.warmup_steps=1000" in note
    assert f"ends at {learning_rate(steps - 1, config):.3g} and never reaches" in note
    longer = dataclasses.replace(config, steps=1001)
    assert schedule_notes(RunConfig(train=longer)) == []
    # A small batch stretches both.
    small = dataclasses.replace(config, steps=1000, batch_size=8, scale_from_batch=16)
    (_, note) = schedule_notes(RunConfig(train=small))
    assert "train.steps=2000, train.warmup_steps=2000" in note
    (run,) = load_suite("pretrain", rows=["full"], overrides=["classify.epochs=5"]).runs
    (note,) = schedule_notes(run)
    assert "classify.epochs=5, classify.warmup_epochs=5" in note


def test_a_short_classifier_does_not_end_at_the_rate_of_detectors() -> None:
    config = TrainConfig(steps=40, warmup_steps=50)
    run = RunConfig(train=config)
    classifier = dataclasses.replace(run, model=dataclasses.replace(run.model, method=CLASSIFIER))
    classifier = dataclasses.replace(
        classifier, classify=dataclasses.replace(run.classify, epochs=None)
    )
    (note,) = schedule_notes(classifier)
    assert note.endswith(": the rate never reaches train.lr=0.0001")
    assert "the rate ends at" in schedule_notes(run)[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_buffers_that_follow_the_data_end_a_step_as_the_mean_over_its_parts(parts: int) -> None:
    torch.manual_seed(0)
    layer, alone = nn.BatchNorm1d(3), [nn.BatchNorm1d(3) for _ in range(parts)]
    layer.register_buffer("table", torch.arange(3.0))
    buffers = FollowingBuffers(layer, Fabric(accelerator="cpu", devices=1), parts)
    for _ in range(3):
        for number, one in enumerate(alone):
            x = torch.randn(8, 3) + number
            buffers.begin(number)
            layer(x)
            buffers.end(number)
            one(x)
        buffers.average()
        for name in ("running_mean", "running_var"):
            mean = torch.stack([one.get_buffer(name) for one in alone]).mean(dim=0)
            torch.testing.assert_close(layer.get_buffer(name), mean)
            for one in alone:
                one.get_buffer(name).copy_(mean)
        assert layer.num_batches_tracked == alone[0].num_batches_tracked
    assert torch.equal(layer.get_buffer("table"), torch.arange(3.0))


def test_milestones_without_an_effect_are_said() -> None:
    config = TrainConfig(steps=100, warmup_steps=0, milestones=[50, 100])
    (note,) = schedule_notes(RunConfig(train=config))
    assert "training ends before train.milestones=[100] (train.steps=100)" in note
    (note,) = schedule_notes(RunConfig(train=dataclasses.replace(config, decay="cosine")))
    assert note == "train.milestones=[50, 100] change nothing under a cosine"
    assert schedule_notes(RunConfig(train=dataclasses.replace(config, steps=101))) == []


def groups_of(model: nn.Module, config: TrainConfig) -> dict[str, tuple[float, float]]:
    """Weight decay and factor of the rate of every parameter, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["weight_decay"], group["lr_factor"])
        for group in build_optimizer(model, config).param_groups
        for parameter in group["params"]
    }
    assert set(found) == set(names.values())
    return found


def test_norms_tokens_positions_and_patterns_may_be_exempt_from_weight_decay() -> None:
    vil = ViL("l1,h1,d4_l2,h1,d4_l3,h1,d4", image_size=32, num_classes=2)
    exempt = {
        name
        for name, (decay, _) in groups_of(
            vil, TrainConfig(no_decay=["norms", "tokens", "positions", "head.*"])
        ).items()
        if decay == 0
    }
    assert {"layer1.0.cls_token", "layer1.0.x_pos_embed", "norm.weight", "norm.bias"} < exempt
    assert {"head.weight", "head.bias"} < exempt
    assert not any(name.endswith((".qkv.weight", ".fc1.bias", ".qkv.bias")) for name in exempt)
    every = groups_of(vil, TrainConfig())
    assert set(every.values()) == {(0.05, 1.0)}
    biases = groups_of(vil, TrainConfig(no_decay=["biases"]))
    assert biases["layer1.1.attn.proj.bias"] == (0.0, 1.0)
    assert biases["layer1.1.attn.proj.weight"] == (0.05, 1.0)


def test_the_rate_has_a_factor_by_name_and_the_first_that_fits_counts(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    vil = ViL("l1,h1,d4_l2,h1,d4_l3,h1,d4", image_size=32, num_classes=2)
    found = groups_of(vil, TrainConfig(lr_multipliers={"layer1.0.*": 0.1, "layer1.*": 0.5}))
    assert found["layer1.0.cls_token"][1] == 0.1
    assert found["layer1.1.attn.proj.weight"][1] == 0.5
    assert found["layer2.1.attn.proj.weight"][1] == 1.0
    # A factor of nothing leaves what it names as it was, and only that.
    whole = run(dataset, tmp_path / "whole", weight_decay=0.0, lr_multipliers={"*.bias": 0.0})
    start = Brightness().state_dict()
    assert torch.equal(whole["layer.bias"], start["layer.bias"])
    assert not torch.equal(whole["layer.weight"], start["layer.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"no_decay": ["norm"]}, "did you mean 'norms'"),
        ({"no_decay": ["layer9.*"]}, "no parameter is called 'layer9.*'"),
        ({"lr_multipliers": {"nowhere": 2.0}}, "no parameter is called 'nowhere'"),
    ],
)
def test_a_name_that_no_parameter_has_is_one_clear_line(
    changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        build_optimizer(Brightness(), TrainConfig(**changes))  # type: ignore[arg-type]


class Once(Brightness):
    """Takes something from its first batch in training, as a plain attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.is_scaled = False
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Any, targets: Any = None) -> Any:
        if self.training and not self.is_scaled:
            self.scale.fill_(1 + images[0].mean().abs())
            self.is_scaled = True
        losses = super().forward(images, targets)
        return {name: loss * self.scale for name, loss in losses.items()}


class Draws(Brightness):
    """Draws from everything that draws, and keeps what it drew, in each way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.python, self.mean = random.Random(0), torch.zeros(())
        self.first: Tensor | None = None
        self.last: deque[Tensor] = deque(maxlen=2)
        self.by_name = {"steps": (0, 0)}
        self.view = self.layer.weight[:1]

    def forward(self, images: Any, targets: Any = None) -> Any:
        drawn = sum(one.random() for one in (random, np.random, self.numpy, self.python))
        drawn += torch.rand((), generator=self.torch)
        self.first = drawn if self.first is None else self.first
        self.mean += 0.1 * (drawn - self.mean)
        self.last.append(drawn)
        steps = self.by_name["steps"][0] + 1
        self.by_name["steps"] = steps, 0
        scale = steps + self.mean + self.first + sum(self.last) + self.view.mean()
        losses = super().forward(images, targets)
        return {name: loss * scale for name, loss in losses.items()}


@pytest.mark.parametrize("made", [Once, Draws])
def test_what_a_module_draws_and_keeps_in_attributes_goes_on_after_a_stop(
    dataset: CocoDataset, tmp_path: Path, made: type[Brightness]
) -> None:
    straight = run(dataset, tmp_path / "straight", made=made)
    run(dataset, tmp_path / "stopped", made=made, stop_after=4)
    resumed = run(dataset, tmp_path / "stopped", made=made)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


class LooksUp(Brightness):
    """Looks many values up in a small table, to whose gradient all threads add."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50))

    def forward(self, images: Any, targets: Any = None) -> Any:
        looked_up = self.table[torch.randint(50, (200_000,))] * torch.randn(200_000)
        losses = super().forward(images, targets)
        return {name: loss + looked_up.square().mean() for name, loss in losses.items()}


def test_two_threads_add_up_in_one_order(dataset: CocoDataset, tmp_path: Path) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [run(dataset, tmp_path / name, made=LooksUp)["table"] for name in "abc"]
    finally:
        torch.set_num_threads(usual)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.are_deterministic_algorithms_enabled()


def test_processes_that_built_other_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one's keys would be averaged with those of the other's values."""
    one = nn.ModuleDict({"key": nn.Linear(2, 2), "value": nn.Linear(2, 2)})
    other = ["value.weight", "value.bias", "key.weight", "key.bias"]

    def gather(found: list[Any], mine: Any) -> None:
        found[:] = mine, (mine[0], other)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    fabric: Any = SimpleNamespace(world_size=2)
    with pytest.raises(InputError, match=r"key\.weight, value\.weight: a mechanism"):
        training._check_same(fabric, 0, one)


def test_every_step_has_its_line_once_though_the_run_was_stopped(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    def go(folder: Path, stop: int | None, damage: bool = False) -> list[dict[str, float]]:
        path = folder / "steps.jsonl"
        if damage:
            path.write_text(path.read_text() + '{"step": 6, "tot')
        with StepLog(path, every=3, total=STEPS) as step_log:
            checkpoints = folder / "checkpoints"
            run(dataset, checkpoints, stop_after=stop, step_log=step_log, clip_norm=0.0)
        return list(read_steps(path))

    whole = go(tmp_path / "whole", None)
    assert [entry["step"] for entry in whole] == list(range(1, STEPS + 1))
    names = {"total", "count", "size", "lr", "gradient_norm", "images_per_second",
             "loader_images_per_second", "data_seconds", "step_seconds",
             "peak_memory_bytes"}  # fmt: skip
    assert all(names < set(entry) for entry in whole)
    # Five steps, of which four have a checkpoint.
    assert len(go(tmp_path / "parts", 5)) == 5
    parts = go(tmp_path / "parts", None, damage=True)
    for entry, other in zip(parts, whole, strict=True):
        for name in ("step", "total", "count", "size", "lr", "gradient_norm"):
            assert entry[name] == other[name]


def test_tensorboard_that_is_not_installed_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install '\.\[tensorboard\]'"):
        StepLog(tmp_path / "x.jsonl", tensorboard=tmp_path / "board")


def test_the_readable_log_says_how_fast_data_is_read_beside_the_time_waited(
    tmp_path: Path,
) -> None:
    steps = [(10.0, 40.0, 0.1, 1.0), (30.0, 120.0, 0.3, 1.0), (10.0, 60.0, 0.0, 0.5)]
    with readable(tmp_path / "x.log"), StepLog(tmp_path / "x.jsonl", every=2, total=3) as step_log:
        for number, values in enumerate(steps, start=1):
            names = ("images_per_second", "loader_images_per_second", "data_seconds",
                     "step_seconds")  # fmt: skip
            step_log.write({"step": number, **dict(zip(names, values, strict=True))})
    lines = (tmp_path / "x.log").read_text().splitlines()
    told = [line.partition("up to it: ")[2] for line in lines if "up to it" in line]
    assert told == [
        "15 images/s, where the loader reads up to 60 images/s; waited for data 20.0% of the time",
        "10 images/s, where the loader reads up to 60 images/s; waited for data 0.0% of the time",
    ]
