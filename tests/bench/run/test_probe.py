import dataclasses
import sys

import pytest
import torch
from torch import nn

from bench.config.probes import build_recipe, mechanisms, plan, suite_plan
from bench.errors import DivergedError, InputError
from bench.model.probe import ProbeModel
from bench.record import read
from bench.run import probe
from tests.mechanisms import write

TINY = build_recipe(["steps=0.02", "images=4", "seeds=[0]"])


def one(name="srformer", **how):
    return plan([name], ["bind"], dataclasses.replace(TINY, **how))[0]


def test_a_seed_gives_one_result_and_another_seed_another():
    first, again = (probe.train(one("performer"), "bind", 3) for _ in range(2))
    other = probe.train(one("performer"), "bind", 4)
    assert (first.right, first.losses) == (again.right, again.losses)
    assert first.losses != other.losses


@pytest.mark.parametrize("name", mechanisms())
def test_an_untrained_model_is_at_chance(name):
    subject = one(name)
    task = probe.TASKS["regions"]
    torch.manual_seed(0)
    right = probe.evaluate(ProbeModel(subject.stages), task, 16)
    asked = [(task.evaluation(level, 16).answers >= 0).sum() for level in task.levels]
    assert float(sum(map(sum, right)) / sum(asked)) == pytest.approx(0.25, abs=0.04)


def test_images_of_values_that_are_not_finite_are_counted():
    class Scores(nn.Module):
        def forward(self, cells):
            scores = torch.zeros(*cells.shape[:1], 256, 4)
            scores[1] = torch.nan
            return scores

    with pytest.raises(DivergedError, match="1 of 4 images gave values that are not finite"):
        probe.evaluate(Scores(), probe.TASKS["majority"], 4)


def test_full_attention_learns_the_most_frequent_colour():
    subject = plan(["full"], ["majority"], build_recipe(["seeds=[0]", "images=8"]))[0]
    right = probe.train(subject, "majority", 0).right[0]
    assert sum(right) / len(right) > 0.98 * 16 * 16


def test_a_row_has_two_stages_and_a_partial_one_full_attention_in_its_second():
    row, partial = plan([], [], TINY, rows=["srformer/64", "Partial srformer/32"])
    assert [(s.attention, s.dim, s.blocks) for s in row.stages] == [
        ("srformer", 32, 1),
        ("srformer", 64, 2),
    ]
    assert row.stages[0].options == {"reduction": 4}
    assert [stage.attention for stage in partial.stages] == ["srformer", "full"]
    assert probe.train(partial, "bindup", 0).losses[0] < 3


def test_records_are_kept_and_only_what_is_missing_is_done(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    write(path, "raise ValueError('does not fit')")
    monkeypatch.chdir(tmp_path)
    # The suite's test has several processes.
    monkeypatch.setattr(probe, "cores", lambda: 1)
    said = []

    def go(**how):
        subjects = plan(["srformer", "mine.py:Mine"], ["bind", "majority"], TINY)
        return probe.run(subjects, tmp_path, command=["x"], log=said.append, **how)

    fine, broken = go()
    assert (fine.status, broken.status) == ("done", "failed")
    assert "does not fit" in broken.error["message"]
    files = sorted((tmp_path / "probes").glob("*.json"))
    assert {read(file).row for file in files} == {"srformer", "mine.py:Mine"}
    tasks = fine.probes["tasks"]
    assert [len(tasks["bind"][part]) for part in ("levels", "asked", "right")] == [6, 6, 1]
    said.clear()
    assert [one.key for one in go()] == [fine.key, broken.key]
    assert said == [
        "1 of 2 have their record, 1 with a record of a failure (--retry-failed runs it again)"
    ]
    # What a mechanism is made of belongs to what it is.
    write(path)
    for name in [name for name in sys.modules if name.startswith("attentions_user_mine")]:
        del sys.modules[name]
    again = go()
    assert [one.status for one in again] == ["done", "done"]
    assert again[1].key != broken.key
    assert len(list((tmp_path / "probes").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: build_recipe(["seedz=1"]), "did you mean 'seeds'"),
        (lambda: build_recipe(["seeds=[]"]), r"seeds=\[\] must have at least 1 item"),
        (lambda: build_recipe(["seeds=[1,1]"]), r"seeds: \[1, 1\] must be different numbers"),
        (lambda: build_recipe(["lr=-1"]), "lr=-1 must be greater than"),
        (lambda: build_recipe(["images=x"]), "images='x' must be a valid integer"),
        (lambda: plan(["ful"], ["bind"], TINY), "did you mean 'full'"),
        (lambda: suite_plan(["Vil"], ["bind"], TINY), "did you mean 'ViL'"),
    ],
)
def test_wrong_input_is_said_in_one_line(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_name_of_a_mechanism_and_of_a_row_is_both():
    subjects = suite_plan(["full", "published", "srformer/4"], ["bind"], TINY)
    kinds = [(one.kind, one.name) for one in subjects]
    assert kinds[:2] == [("mechanism", "full"), ("mechanism", "srformer/4")]
    assert ("row", "full") in kinds
    assert ("row", "Partial ViL") in kinds
