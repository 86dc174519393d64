import json
import textwrap

import pytest
import torch

from bench import cli
from bench.config.suites import profile_configs
from bench.measure import profile as profiler
from bench.measure.workload import build
from bench.record import Record, read
from report import profiles

# Time limits are for hangs alone: a busy machine may need minutes to start a process.
pytestmark = pytest.mark.timeout(1800)

# A detector in proportion to the small backbone, so that a test takes seconds.
SMALL = (
    "model.detector.fpn_channels=32",
    "model.detector.head_width=64",
    "model.detector.mask_width=32",
    "model.detector.rpn_proposals=[100,50]",
    "model.detector.rpn_proposals_test=[100,50]",
    "model.detector.detections=10",
    "model.detector.roi_batch=64",
    "profile.proposals=50",
    "device=cpu",
)
# What says something of RetinaNet, too.
OF_BOTH = ("model.detector.detections=10", "device=cpu")
PARTS = {"stage1", "stage2", "stage3", "stage4", "fpn", "rpn", "box_head", "mask_head"}


def configs(*names, image_size=(64, 96), **profile):
    values = {"profile": {"batch_size": 2, "repeats": 2, "seconds": 0.0} | profile}
    return profile_configs(
        names, backbone="quick", image_size=image_size, values=values, overrides=SMALL
    )


def run(rows, **options):
    return profiler.profile(rows, progress=lambda *_: None, command=["test"], **options)


@pytest.fixture(scope="module")
def measured():
    return run(configs("ViL", "linformer"))


# What runs in PyTorch and not on the meta device.
NO_META = """
import torch
from torch import nn

class Odd(nn.Module):
    calls = 0

    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.dim, self.num_global = dim, num_global
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
        scale = 1.0 + 0.0 * x.detach().sum().item()
        mask = x.detach()[..., 0].relu() > 0
        picked = torch.zeros_like(x).masked_scatter(mask[..., None], x[mask])
        sparse = torch.eye(x.shape[1]).to_sparse()
        mixed = torch.stack([torch.sparse.mm(sparse, image) for image in picked])
        return self.proj(x + scale * mixed)

class Built(Odd):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.scale = self.proj.weight.norm().item()

class Third(Odd):
    def forward(self, x, grid):
        if x.device.type == "cpu":
            Third.calls += 1
            if Third.calls > 40:
                raise torch.OutOfMemoryError("no more")
        return self.proj(x)
"""


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(textwrap.dedent(NO_META))
    return lambda name: f"{path}:{name}"


def test_a_row_has_all_its_costs_by_part(measured):
    for record in measured:
        assert record.status == "done", record.error
        assert set(record.parameters["by_part"]) == PARTS
        assert set(record.flops["by_part"]) == PARTS
        for mode in ("inference", "training"):
            assert record.memory[mode] > 0
            assert set(record.memory["by_part"][mode]) == PARTS
            assert len(record.latency[mode]["samples"]) >= 2
            assert set(record.latency["by_part"][mode]) == PARTS
            assert all(part["median"] > 0 for part in record.latency["by_part"][mode].values())
        # Weights, gradients and AdamW's two moments are four times the parameters.
        assert record.memory["training"] > 16 * record.parameters["total"]
        assert record.memory["training"] > record.memory["inference"]


def test_what_is_predicted_says_so_and_is_near_what_is_measured(measured):
    for record in measured:
        for mode in ("inference", "training"):
            predicted = record.memory["predicted"][mode]
            assert "predict" in predicted["kind"]
            assert predicted["total"] == pytest.approx(record.memory[mode], rel=0.1)
            assert predicted["counts"].items() >= record.memory["rois"].items()


def test_heads_run_on_stated_numbers_of_rois(measured):
    stated = {"proposals": 50, "detections": 10, "rois": 64, "mask_rois": 16, "targets": 8}
    for record in measured:
        assert record.memory["rois"] == record.latency["rois"] == stated
    (retinanet,) = run(
        profile_configs(
            ["ViL"],
            backbone="quick",
            image_size=(64, 96),
            values={"model": {"method": "retinanet"}},
            overrides=OF_BOTH,
        ),
        quantities=("memory",),
        modes=("inference",),
        by_part=False,
    )
    assert retinanet.memory["rois"] == {"targets": 8}


def test_records_are_those_that_runs_write(measured):
    for record in measured:
        assert Record.from_json(record.to_json()).row == record.row


def test_tables_fit_and_name_units(measured):
    from report import tables

    table = profiles.costs(measured)
    text = tables.to_text(table.shown)
    assert max(map(len, text.splitlines())) <= 120
    assert list(table.raw["row"]) == ["ViL", "linformer"]
    assert table.raw["latency_training_s"].gt(0).all()
    assert "multiply-adds" in " ".join(table.notes)
    assert "50 proposals and 10 detections an image" in str(table.notes)
    part = profiles.parts(measured[0])
    assert set(part.raw["part"]) == PARTS
    assert part.raw["parameters"].sum() <= measured[0].parameters["total"]


def test_a_row_that_fails_while_it_is_timed_harms_no_other(odd):
    rows = configs("ViL", odd("Third"), odd("Odd"))
    records = run(rows, quantities=("latency",), modes=("inference",), by_part=False)
    assert [record.status for record in records] == ["done", "failed", "done"]
    assert records[1].error["kind"] == "out_of_memory"
    assert "no more" in records[1].error["traceback"]
    assert records[1].latency is None
    for record in (records[0], records[2]):
        assert len(record.latency["inference"]["samples"]) >= 2
        assert record.latency["group"]["inference"]
    assert "failed: out of memory" in profiles.costs(records).shown["row"][1]


@pytest.mark.parametrize("name", ["Odd", "Built"])
def test_what_cannot_run_on_the_meta_device_is_measured_all_the_same(odd, name):
    (record,) = run(configs(odd(name)), by_part=False)
    assert record.status == "done", record.error
    assert record.flops["total"] > 0
    assert record.parameters["total"] > 0
    for mode in ("inference", "training"):
        assert record.memory[mode] > 4 * record.parameters["total"]
        assert record.latency[mode]["median"] > 0


@pytest.mark.slow
def test_rows_that_do_not_fit_together_take_turns(monkeypatch):
    monkeypatch.setattr(profiler, "_has_room", lambda group, _row: not group)
    rows = configs("ViL", "global", repeats=4)
    found = profiler.measure_latency(rows, ("inference",))
    for one in found:
        assert one.error is None
        assert len(one.section["inference"]["samples"]) == 3 * 2
        assert one.section["group"]["inference"]


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(profiler, "free_memory", lambda _device: 10**6)
    (record,) = run(configs("ViL"), quantities=("memory",), modes=("inference",))
    assert record.memory["inference"] is None
    assert "not measured: predicted to need" in record.notes[0]
    assert record.memory["predicted"]["inference"]["total"] > 10**6


def command(*arguments):
    return cli.main(
        ["profile", "--backbone", "quick", "--image-size", "64x96", "--device", "cpu", *arguments]
    )


def test_the_command_prints_json_and_writes_records(tmp_path, capsys):
    arguments = ["--attention", "performer", "--what", "parameters,flops", "--format", "json"]
    assert command(*arguments, "--output", str(tmp_path)) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    (path,) = (tmp_path / "records").glob("*.json")
    assert read(path).flops["total"] == shown["flops"]["total"] > 0
    assert shown["flops"]["unit"] == "multiply-adds"
    assert (tmp_path / "tables" / "costs.csv").is_file()
    # A record is never overwritten, and that is said before anything is measured.
    assert command(*arguments, "--output", str(tmp_path)) == 2
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table", "csv", "markdown"])
def test_the_command_prints_every_form(form, capsys):
    assert command("--attention", "ViL", "--what", "flops", "--format", form) == 0
    assert "ViL" in capsys.readouterr().out


def test_the_largest_batch_within_a_budget(capsys):
    fit = ["--memory-budget", "400MB", "--fit", "batch-size", "--mode", "inference"]
    assert command("--attention", "ViL", *fit, "--format", "json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["prediction"]["total"] <= 400e6 < found["beyond"]["total"]
    assert found["largest"] == found["prediction"]["batch_size"] > 1


def test_a_budget_is_of_the_values_of_a_search_and_of_settings(capsys):
    words = ["profile", "--attention", "ViL", "--backbone", "quick", "--image-size", "64"]
    words += ["--memory-budget", "60MB", "--mode", "inference", "--method", "retinanet"]
    settings = ["--search", "fpn_channels=16,256", "profile.batch_size=2", "device=cuda"]
    assert cli.main([*words, *settings, "--format", "json"]) == 0
    narrow, wide = json.loads(capsys.readouterr().out)
    assert narrow["row"] == "ViL (fpn_channels=16)"
    assert narrow["prediction"]["batch_size"] == wide["prediction"]["batch_size"] == 2
    assert narrow["prediction"]["device"] == "cuda"
    assert narrow["prediction"]["weights"] < wide["prediction"]["weights"]


@pytest.mark.parametrize("method", ["mask_rcnn", "retinanet"])
def test_mixed_precision_trains_and_keeps_coordinates(method):
    (config,) = profile_configs(
        ["ViL"],
        backbone="quick",
        image_size=(64, 96),
        values={"model": {"method": method}, "train": {"precision": "bf16-mixed"}},
        overrides=SMALL if method == "mask_rcnn" else OF_BOTH,
    )
    workload = build(config)
    seen = []
    workload.module.register_forward_pre_hook(lambda _, given: seen.append(given))
    workload.call("training")
    images, targets = seen[0]
    assert {image.dtype for image in images} == {torch.float32}
    assert {target["boxes"].dtype for target in targets} == {torch.float32}
    gradients = [p.grad for p in workload.module.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
