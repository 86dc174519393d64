import dataclasses
from pathlib import Path

import pytest

from bench.config.suites import load_suite
from bench.model.build import build_backbone
from bench.run import plan
from tests import mechanisms


def test_the_time_of_a_run_is_its_steps_times_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_seconds", lambda *_: 2.0)
    overrides = ["train.accumulate=2", "train.batch_size=4", "train.steps=9",
                 "data.generated.train_images=2"]  # fmt: skip
    suite = load_suite("quick", rows=["ViL"], device="cpu", overrides=overrides)
    planned: list[str] = []
    (run,), _ = plan.plan(suite, tmp_path, measure_steps=1, progress=planned.append)
    assert run.seconds == 2.0 * 9 * 2
    assert planned == ["ViL"]
    assert run.images_of_a_part == 2
    assert plan.table([run]).loc[0, "time"] == "36 s"


def test_what_rows_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = plan._splits
    monkeypatch.setattr(
        plan, "_splits", lambda *a, **k: (opened.append(a[0].row), real(*a, **k))[1]
    )
    monkeypatch.setattr(plan, "_memory", lambda *_: 1e9)
    suite = load_suite("quick", rows=["ViL", "full", "swin"], device="cpu")
    planned, _ = plan.plan(suite, tmp_path, measure_steps=0, progress=opened.append)
    assert len(planned) == 3
    assert opened == ["ViL", "ViL", "full", "swin"]


def test_why_memory_is_not_predicted_is_said(tmp_path: Path) -> None:
    row = mechanisms.write(tmp_path / "mine.py", "x = x * (1 if x.sum().item() < 1e9 else 2)")
    overrides = ["data.generated.train_images=2"]
    suite = load_suite("quick", rows=[row], device="cpu", overrides=overrides)
    planned, _ = plan.plan(suite, tmp_path, measure_steps=0, progress=lambda _: None)
    assert plan.table(planned).loc[0, "memory GB"] == "-"
    (note,) = (line for line in plan.lines(planned, 0) if "memory not predicted" in line)
    assert note.startswith(f"note: {row}: memory not predicted: ")


def test_memory_is_of_the_parts_of_a_step_and_of_the_average(tmp_path: Path) -> None:
    def memory(*overrides: str) -> float:
        rows = ["identity"]
        suite = load_suite("pretrain-quick", rows=rows, device="cpu", overrides=[*overrides])
        (run,), _ = plan.plan(suite, tmp_path, measure_steps=0, progress=lambda _: None)
        assert isinstance(run.memory, float)
        (config,) = suite.runs
        sizes.append(sum(one.nbytes for one in build_backbone(config).state_dict().values()))
        return run.memory

    sizes: list[int] = []
    whole = memory("train.batch_size=4")
    assert memory("train.batch_size=8", "train.accumulate=2") > whole + sizes[0] / 8
    assert memory("train.batch_size=4", "classify.average=0.99") == whole + sizes[0]


def test_the_objects_that_memory_is_of_are_said(tmp_path: Path) -> None:
    suite = load_suite("quick", rows=["identity"], device="cpu")
    (run,), _ = plan.plan(suite, tmp_path, measure_steps=0, progress=lambda _: None)
    for most, more in ((None, ""), (8, ""), (500, "; an image of the data has up to 500, which")):
        lines = plan.lines([dataclasses.replace(run, most_objects=most)], 0)
        (line,) = (line for line in lines if line.startswith("memory"))
        assert " with 8 objects each" + more in line
        assert ("up to" in line) == bool(more)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(40, "40 s"), (59 * 60, "59 min"), (3600 * 3.5, "3.5 h"), (86400 * 12.34, "12.3 d")],
)
def test_durations(seconds: float, said: str) -> None:
    assert plan.duration(seconds) == said
