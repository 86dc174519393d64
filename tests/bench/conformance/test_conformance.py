"""The conformance test passes what is sound, and names what is broken and what to change."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import attentions
from bench import cli, conformance
from bench.errors import InputError

ROOT = Path(__file__).parents[3]
BROKEN = Path(__file__).with_name("broken_mechanisms.py")
BROKEN_RULES = sys.modules[attentions.find(f"{BROKEN}:Sound").__module__].BROKEN


def of(report, status):
    return {result.check: result for result in report.results if result.status == status}


@pytest.mark.parametrize("name", attentions.names())
def test_every_registered_mechanism_passes(name):
    report = conformance.check(name)
    assert of(report, "failed") == {}
    assert report.passed
    assert len(report.results) == len(conformance.CHECKS)
    assert report.options == tuple(getattr(attentions.find(name), "examples", ({},)))


def test_the_mechanism_of_the_readme_passes(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"a test trains this very example -->\n```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "my_attention.py").write_text(code[1], encoding="utf-8")
    report = conformance.check(f"{tmp_path}/my_attention.py:MeanAttention")
    assert of(report, "failed") == of(report, "warning") == {}
    # It has no oracle; all else is run.
    assert set(of(report, "skipped")) == {"reference"}


@pytest.mark.parametrize("name", ["Sound", "KeepsAverages", "RoundsInside"])
def test_a_sound_mechanism_passes(name):
    report = conformance.check(f"{BROKEN}:{name}")
    assert set(of(report, "passed")) | {"reference"} == {one.name for one in conformance.CHECKS}


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_a_broken_rule_fails_its_check_alone(name):
    check, reason = BROKEN_RULES[name]
    report = conformance.check(f"{BROKEN}:{name}")
    failed = of(report, "failed")
    assert set(failed) == {check}
    assert re.search(reason, failed[check].detail), failed[check].detail
    assert failed[check].advice
    assert "\n" not in failed[check].detail
    assert not report.passed


@pytest.mark.parametrize("name", ["Fresh", "RefusesByItsLayers"])
def test_what_is_odd_but_right_passes(name):
    report = conformance.check(f"{BROKEN}:{name}")
    assert of(report, "failed") == {}


def test_the_advice_names_the_wrong_gradient_of_torch():
    report = conformance.check(f"{BROKEN}:InstanceNorm")
    assert "nn.InstanceNorm2d" in of(report, "failed")["derivatives"].advice
    report = conformance.check(f"{BROKEN}:WrongBackward")
    advice = of(report, "failed")["derivatives"].advice
    assert "nn.InstanceNorm2d" not in advice
    assert "gradient_note" in advice


def test_the_advice_is_of_what_the_count_lacks():
    advice = {}
    for name in ("NoFormula", "Distances", "Threaded"):
        advice[name] = of(conformance.check(f"{BROKEN}:{name}"), "failed")["FLOPs"].advice
    assert "register a formula" in advice["NoFormula"]
    assert advice["Distances"].startswith("write what multiplies and adds")
    assert advice["Threaded"].startswith("run all operators in the thread that calls forward")
    assert ";" not in advice["Threaded"]


def test_every_check_has_a_mechanism_that_breaks_it():
    covered = {check for check, _ in BROKEN_RULES.values()}
    assert covered == {one.name for one in conformance.CHECKS}


def test_a_graph_break_is_a_warning():
    report = conformance.check(f"{BROKEN}:GraphBreak")
    assert report.passed
    assert set(of(report, "warning")) == {"compile"}
    assert "broken_mechanisms.py, line" in of(report, "warning")["compile"].detail


def test_a_check_that_fails_leaves_the_others_as_they_are():
    report = conformance.check(f"{BROKEN}:InferenceInside")
    assert {"derivatives", "compile"} == set(of(report, "failed"))


def test_after_an_essential_failure_nothing_is_run():
    report = conformance.check(f"{BROKEN}:FailsToBuild")
    assert [result.check for result in report.results] == ["constructor"]
    assert report.not_run == len(conformance.CHECKS) - 1


@pytest.mark.parametrize("name", ["ReadsValues", "ConstantOfTheCpu"])
def test_what_does_not_run_on_the_meta_device_is_a_warning(name):
    report = conformance.check(f"{BROKEN}:{name}")
    assert report.passed
    result = of(report, "warning")["FLOPs"]
    assert f"counted with random tokens on the CPU: {name} does not run on" in result.detail
    assert "device=x.device" in result.advice


@pytest.mark.parametrize(
    ("name", "what"), [("CountsCalls", "calls"), ("TrainsMean", "later outputs by something")]
)
def test_attributes_that_training_changes_are_a_warning(name, what):
    result = of(conformance.check(f"{BROKEN}:{name}"), "warning")["copies"]
    assert f"a call in training changes {what}, which no state dict holds" in result.detail
    assert "register_buffer" in result.advice


def test_products_in_no_sum_are_a_warning():
    result = of(conformance.check(f"{BROKEN}:Pools"), "warning")["FLOPs"]
    assert "products of elements are in no sum" in result.detail
    assert "as matrix products" in result.advice


def test_options_and_grid_reach_the_mechanism():
    name = f"{BROKEN}:Wide"
    report = conformance.check(name)
    assert "grid 6x8 is smaller than 16" in of(report, "failed")["output"].detail
    assert "--grid" in of(report, "failed")["output"].advice
    report = conformance.check(name, grid=(20, 24))
    assert of(report, "failed") == {}
    assert "grid 1x1 is smaller than 16" in of(report, "warning")["thin grids"].detail
    report = conformance.check(name, {"least": 1})
    assert of(report, "failed") == of(report, "warning") == {}
    with pytest.raises(InputError, match="--option least=0: least 0 is not positive"):
        conformance.check(name, {"least": 0})


def test_the_set_of_options_that_fails_is_named(monkeypatch):
    sets = ({"least": 1}, {"least": 30})
    monkeypatch.setattr(attentions.find(f"{BROKEN}:Wide"), "examples", sets, raising=False)
    report = conformance.check(f"{BROKEN}:Wide")
    assert "[with least=30]" in of(report, "failed")["output"].detail


def test_random_numbers_and_output_of_the_program_are_left_alone(capsys):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    conformance.check(f"{BROKEN}:Chatty")
    assert torch.equal(torch.rand(2), expected)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mixing" in captured.err


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    (tmp_path / "users_conformance.py").write_text(BROKEN.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "users_conformance", raising=False)


@pytest.mark.usefixtures("users_folder")
def test_the_command_prints_what_to_change(capsys):
    assert cli.main(["check", "users_conformance:Unused"]) == 1
    printed = capsys.readouterr().out
    assert "parameter 'spare.weight' got no gradient" in printed
    assert "→ use it in forward, or remove it" in printed
    assert "passed 15, warning 0, failed 1, skipped 2" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert "Traceback" not in printed


def test_the_command_takes_several_mechanisms(capsys):
    assert cli.main(["check", "linformer", f"{BROKEN}:Sound", f"{BROKEN}:NotFixed"]) == 1
    printed = capsys.readouterr().out
    assert "2 of 3 mechanisms pass" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert cli.main(["check", "linformer", f"{BROKEN}:Sound"]) == 0


def test_all_is_every_registered_mechanism(monkeypatch, capsys):
    monkeypatch.setattr(attentions, "names", lambda: ("linformer", "global"))
    assert cli.main(["check", "all", "--format", "json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["mechanism"] for report in reports] == ["linformer", "global"]
    for report in reports:
        assert report["passed"]
        assert {"check", "status", "detail", "advice"} == set(report["results"][0])


def test_options_of_the_command_are_values_and_not_text(capsys):
    command = ["check", "longformer", "--format", "json", "--grid", "8x8", "--option"]
    assert cli.main([*command, "window=2", "share_weights=false"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["options"] == [{"window": 2, "share_weights": False}]
