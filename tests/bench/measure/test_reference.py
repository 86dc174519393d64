"""Costs at full size: as a profile counts them, kept, and counted again when a source changes."""

import dataclasses
from pathlib import Path

import pytest

from bench.config.schema import RunConfig
from bench.config.suites import Reference, load_suite, profile_configs, reference_config
from bench.measure import reference
from bench.measure.costs import counted
from bench.record import Record
from tests import mechanisms

SMALL = Reference(image_size=(128, 192))


def configs(*rows: str) -> list:
    return [reference_config(run, run.row, SMALL) for run in load_suite("quick", rows=rows).runs]


def test_a_row_of_the_quick_suite_is_counted_as_the_published_model() -> None:
    (own,) = configs("Partial global")
    (published,) = profile_configs(
        ["Partial global"],
        image_size=SMALL.image_size,
        values={
            "profile": {"batch_size": 2, "image_size": [128, 192]},
            "train": {"precision": "16-mixed"},
            "device": "cuda",
        },
    )
    for one in ("model", "profile", "data", "device"):
        assert getattr(own, one) == getattr(published, one)


def test_models_of_published_size_keep_it() -> None:
    (run,) = load_suite("zoo", rows=["ViL-Tiny RetinaNet 1x"], data="/nowhere").runs
    own = reference_config(run, run.row, SMALL)
    assert own.model == dataclasses.replace(run.model, drop_path=0.0)


@pytest.mark.slow
def test_costs_are_counted_once_and_again_for_a_mechanism_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "odd.py"
    rows = ("ViL", mechanisms.write(file, "if float(x.sum()) <= 0:\n    return x"))
    found = reference.count(configs(*rows), tmp_path / "costs", command=["x"])
    sections, _ = counted(configs("ViL")[0], device="cuda")
    assert found[0].flops == sections["flops"]
    assert found[0].memory is not None
    assert found[0].memory["predicted"]["training"]["total"] > 0
    # What cannot be predicted is missing, and the record says why.
    assert found[1].memory is not None
    assert found[1].memory["predicted"] == {}
    assert any("memory not predicted" in note for note in found[1].notes)

    started = []
    worker = reference.Worker
    monkeypatch.setattr(reference, "Worker", lambda **how: started.append(1) or worker(**how))
    again = reference.count(configs(*rows), tmp_path / "costs", command=["y"])
    assert [one.to_json() for one in again] == [one.to_json() for one in found]
    assert started == []
    file.write_text(file.read_text() + "# changed\n")
    last = reference.count(configs(*rows), tmp_path / "costs", command=["z"])
    assert [len(started), last[0].created == found[0].created] == [1, True]
    assert last[1].key != found[1].key


@pytest.mark.slow
def test_layers_are_measured_at_every_stage(tmp_path: Path) -> None:
    (config,) = configs("ViL")
    tiny = dataclasses.replace(
        config, profile=dataclasses.replace(config.profile, image_size=(64, 64), batch_size=1)
    )
    other = dataclasses.replace(tiny, row="pooling", model=configs("pooling")[0].model)

    def measured(*rows: RunConfig) -> list[Record]:
        return reference.measure_layers(rows, tmp_path, command=["x"])

    (found,) = measured(tiny)
    assert [one.key for one in measured(tiny)] == [found.key]
    # Beside another row it is measured again, in one session with it, which then serves both.
    both = measured(tiny, other)
    assert both[0].key != found.key
    assert len({one.latency["session"] for one in both}) == 1
    assert [one.key for one in measured(other, tiny)] == [one.key for one in both[::-1]]
    stages = found.latency["by_part"]["inference"]
    assert [stages[f"stage{n}"]["layers"] for n in (1, 2, 3, 4)] == [1, 2, 8, 1]
    assert all(stage["median"] > 0 for stage in stages.values())
    assert set(found.memory["by_part"]["inference"]) == set(stages)


def test_every_fourth_block_is_counted_through_the_depth_of_the_reference():
    (run,) = load_suite("quick", rows=["Mixed ViL"]).runs
    assert run.model.dense == {3: (1,)}
    assert reference_config(run, run.row, SMALL).model.dense == {3: (0, 4), 4: (0,)}
