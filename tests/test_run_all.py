"""The command a user runs: rows, records, resuming, reports, and what wrong input gets."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import run_all
from bench import cli, record
from bench.config.suites import build_config, load_suite, profile_configs
from bench.config.variants import started
from bench.data.generated import generate
from bench.errors import InputError
from bench.measure import memory
from bench.model import build as models
from bench.model.weights import load_file
from bench.run import runner, suite, timing, train
from bench.run.evaluate import CocoEvaluator
from bench.run.identity import identify
from bench.run.train import _Training
from bench.system import processes
from bench.system.progress import SuiteProgress
from report import load, tables
from tests import mechanisms
from tests.bench.system.test_locks import holder
from tests.processes import ONE_THREAD, ROOT, python

# As many threads as the tests' own process has: with another number, sums round differently.
# A suite of seconds: few steps, few images, little measured.
TINY = [
    "--device", "cpu", "train.steps=4", "train.batch_size=2", "train.checkpoint_every=1",
    "data.generated.train_images=4", "data.generated.val_images=2",
    "profile.repeats=2", "profile.seconds=0.01", "profile.batch_size=1", "--no-latency",
    "--costs", "none", "--no-pictures", "--no-report",
]  # fmt: skip
# Of data that is not generated.
OF_DATA = [word for word in TINY if "data.generated" not in word]
Refusal = Callable[..., str]
# But for how long and how often it is saved.
LONGER = [word for word in TINY if not word.startswith(("train.steps", "train.checkpoint_every"))]
REPORTED = [word for word in TINY if word != "--no-report"]
TIMED = [word for word in REPORTED if word != "--no-latency"]


def records(output: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (output / "records").glob("*.json")]
    return {entry["row"]: entry for entry in found}


def done_record(output: Path) -> dict:
    """The record of the one run that succeeded, beside those of its failures."""
    found = [json.loads(path.read_text()) for path in (output / "records").glob("*.json")]
    (entry,) = (entry for entry in found if entry["status"] == "done")
    return entry


def settled(entry: dict) -> dict:
    """What must come out the same in every run of the same seed."""
    evaluation = {k: v for k, v in entry["evaluation"].items() if k != "seconds"}
    return {
        "evaluation": evaluation,
        "losses": entry["training"]["losses"],
        "parameters": entry["parameters"],
        "flops": entry["flops"],
        "memory": entry["memory"],
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed tiny suite of two rows."""
    output = tmp_path_factory.mktemp("finished")
    assert run_all.main(["--rows", "ViL,linformer", "--output", str(output), *TIMED]) == 0
    return output


def test_every_row_leaves_a_full_record(finished: Path) -> None:
    found = records(finished)
    assert set(found) == {"ViL", "linformer"}
    for entry in found.values():
        assert entry["status"] == "done"
        assert len(entry["evaluation"]["box"]) == len(entry["evaluation"]["mask"]) == 12
        assert entry["parameters"]["total"] > entry["parameters"]["by_part"]["fpn"] > 0
        assert entry["flops"]["total"] > 0
        assert not entry["flops"]["uncounted"]
        assert entry["memory"]["training"] > entry["memory"]["inference"] > 0
        assert entry["training"]["steps"] == 4
        assert entry["training"]["losses"]
        assert entry["environment"]["packages"]["torch"]
        assert entry["config"]["train"]["steps"] == 4
        assert entry["seed"] == 0


def test_the_latency_of_all_rows_comes_from_one_pass_after_the_last(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(entry["latency"] is None for entry in records(finished).values())
    (path,) = (finished / "latency").iterdir()
    measured = json.loads(path.read_text())
    assert {row["row"] for row in measured["rows"]} == {"ViL", "linformer"}
    for entry in load.load(finished):
        for mode in ("inference", "training"):
            assert len(entry.latency[mode]["samples"]) >= 2
    # Two sessions are none of all rows.
    done = load.load(finished)
    assert timing.are_timed(done, finished)
    for entry in done:
        entry.latency["session"] = entry.row
    assert not timing.are_timed(done, tmp_path)
    assert timing.are_timed(done[:1], tmp_path)
    # The same command runs and measures nothing again.
    before = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    assert run_all.main(["--rows", "ViL,linformer", "--output", str(finished), *TIMED]) == 0
    assert list((finished / "latency").iterdir()) == [path]
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    out = capsys.readouterr().out
    assert "0 of 2 rows to run" in out
    assert "measuring" not in out


def test_every_row_has_its_logs(finished: Path) -> None:
    for row in ("vil", "linformer"):
        (steps,) = (finished / "logs").glob(f"{row}-*.jsonl")
        assert [json.loads(line)["step"] for line in steps.read_text().splitlines()] == [1, 2, 3, 4]
        text = steps.with_suffix(".log").read_text()
        for said in ("environment:", "torch: ", "configuration:", "stage1 ", "step 4 of 4", "done"):
            assert said in text


def test_linformer_says_that_it_works_for_one_size(finished: Path) -> None:
    assert any("one sequence length" in note for note in records(finished)["linformer"]["notes"])


def test_the_report_is_there_and_checkpoints_are_gone(finished: Path) -> None:
    page = (finished / "index.md").read_text()
    header = next(line for line in page.splitlines() if "Backbone" in line)
    names = ["Backbone", "Method", "attention", "drop path", "schedule", "box", "mask", "params",
             "FLOPs", "memory", "latency"]  # fmt: skip
    places = [header.find(name) for name in names]
    assert places == sorted(places)
    assert min(places) > 0
    assert len(list((finished / "plots").glob("*.png"))) >= 2
    assert not list((finished / "checkpoints").glob("*"))


def evaluated(record_file: Path, output: Path) -> dict:
    """What the command line makes of a record's weights."""
    arguments = ["--record", str(record_file), "--workers", "0", "--device", "cpu"]
    assert cli.main(["eval", *arguments, "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("row", ["vil", "linformer"])
def test_the_weights_of_a_record_score_what_the_record_says(
    finished: Path, tmp_path: Path, row: str
) -> None:
    (path,) = (finished / "records").glob(f"{row}-*.json")
    entry = json.loads(path.read_text())
    stem = Path(entry["training"]["weights"]["path"]).stem
    assert list(finished.glob(f"weights/{row}-*.pth")) == [finished / f"weights/{stem}.pth"]
    recorded = {k: v for k, v in entry["evaluation"].items() if k not in ("seconds", "also")}
    again = evaluated(path, tmp_path / "again.json")
    assert {k: v for k, v in again["evaluation"].items() if k != "seconds"} == recorded
    assert recorded["bootstrap"]["box_AP"]
    assert again["weights_sha256"] == entry["training"]["weights"]["sha256"]
    assert again["config"]["evaluate"] == entry["config"]["evaluate"]
    assert again["precision"] == entry["config"]["train"]["precision"]


def test_annotation_files_of_any_name_are_trained_and_evaluated_on(tmp_path: Path) -> None:
    root = generate(tmp_path / "made", train_images=4, val_images=2)
    export = tmp_path / "an export, räw"
    (root / "train2017").rename(export)
    for image in (root / "val2017").iterdir():
        image.rename(export / f"val {image.name}")
    for split, name in (("train2017", "learn.json"), ("val2017", "judge.json")):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        for entry in content["images"]:
            entry["file_name"] = "val " * (split == "val2017") + entry["file_name"]
        (export / name).write_text(json.dumps(content))
    files = ["--val", str(export / "judge.json"), "--images", str(export)]
    arguments = [*TINY, "data.min_sizes=[64]", "data.max_size=96", "profile.enabled=false",
                 "profile.image_size=[64,96]"]  # fmt: skip
    output = tmp_path / "out"
    assert run_all.main(
        ["--train", str(export / "learn.json"), *files, "--rows", "ViL", "--output", str(output),
         *arguments]
    ) == 0  # fmt: skip
    entry = records(output)["ViL"]
    assert (entry["evaluation"]["split"], entry["evaluation"]["images"]) == ("val2017", 2)
    assert entry["config"]["data"]["path"] == str(export)
    (path,) = (output / "records").glob("*.json")
    result = tmp_path / "again.json"
    arguments = ["--record", str(path), *files, "--workers", "0", "--output", str(result)]
    assert cli.main(["eval", *arguments]) == 0
    assert json.loads(result.read_text())["evaluation"]["box"] == entry["evaluation"]["box"]


@pytest.mark.detectron2
def test_the_weights_of_a_detectron2_run_have_the_published_names(tmp_path: Path) -> None:
    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY, "profile.enabled=false",
                 "model.library=detectron2"]  # fmt: skip
    assert run_all.main(arguments) == 0
    (path,) = (tmp_path / "records").glob("*.json")
    entry = json.loads(path.read_text())
    names = load_file(tmp_path / entry["training"]["weights"]["path"])
    published = ("backbone.bottom_up.layer1.0.", "backbone.fpn_lateral2.", "proposal_generator.",
                 "roi_heads.box_predictor.")  # fmt: skip
    assert all(any(name.startswith(start) for name in names) for start in published)
    again = evaluated(path, tmp_path / "again.json")["evaluation"]
    for kind in ("box", "mask"):
        assert again[kind] == entry["evaluation"][kind]


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"), [(Path.unlink, "are gone"), (damaged, "another SHA-256")]
)
def test_weights_that_are_gone_or_changed_are_one_line(
    finished: Path,
    tmp_path: Path,
    refusal: Refusal,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    for folder in ("records", "weights"):
        shutil.copytree(finished / folder, tmp_path / folder)
    (path,) = (tmp_path / "records").glob("vil-*.json")
    damage(tmp_path / json.loads(path.read_text())["training"]["weights"]["path"])
    error = refusal(cli.main, "eval", "--record", path)
    assert said in error
    assert "--weights" in error


def test_without_weights_the_run_is_the_same_one(
    finished: Path, tmp_path: Path, refusal: Refusal
) -> None:
    assert run_all.main(["--rows", "ViL", "--no-weights", "--output", str(tmp_path), *TINY]) == 0
    (path,) = (tmp_path / "records").glob("*.json")
    assert (finished / "records" / path.name).exists()
    assert records(tmp_path)["ViL"]["training"]["weights"] is None
    assert not (tmp_path / "weights").exists()
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert "its run kept no weights" in refusal(cli.main, "eval", "--record", path)


def fill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full for what is written to a folder."""
    sync = os.fsync

    def full(descriptor: int) -> None:
        if list(folder.rglob(".*")) or list(folder.rglob("*.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_at_the_weights_loses_neither_record_nor_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "weights", monkeypatch)
    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY, "profile.enabled=false"]
    assert run_all.main(arguments) == 0
    entry = records(tmp_path)["ViL"]
    assert entry["training"]["weights"] is None
    (note,) = (note for note in entry["notes"] if "weights" in note)
    assert "No space left on device" in note
    assert not list((tmp_path / "weights").iterdir())
    assert list(tmp_path.glob("checkpoints/vil-*/step-00000004-*.pt"))


# A limit for hangs alone: processes start slowly on a busy machine.
@pytest.mark.timeout(1800)
def test_costs_at_full_size_are_counted_once_and_lead_the_page(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    command = ["--rows", "ViL,linformer", "--output", str(output), *REPORTED]
    command.remove("--no-pictures")
    command += ["--costs", "counted", "--reference", "256x320"]
    assert run_all.main(command) == 0
    kept = {path: path.stat().st_mtime_ns for path in (output / "costs").iterdir()}
    assert len(kept) == 2
    page = (output / "index.md").read_text()
    assert page.index("## Answer") < page.index("## Costs at 256") < page.index("## Comparison")
    assert "has the highest box mAP" in capsys.readouterr().out
    assert "plots/sight.png" in page
    assert len(list((output / "pictures").iterdir())) == 2
    assert run_all.main(command) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in (output / "costs").iterdir()}
    # What is asked later about these records finds the same costs.
    ask = ["recommend", str(output), "--image-size", "256x320"]
    assert "the nearest is" in refusal(cli.main, *ask, "--max-memory", "1MB")
    assert cli.main([*ask, "--max-flops", "900T", "--format", "csv"]) == 0
    assert "ViL" in capsys.readouterr().out
    (output / "records" / "old.json").write_text('{"schema": 0}')
    assert "old.json has schema 0" in refusal(cli.main, *ask)
    refusal(cli.main, "recommend", tmp_path / "nothing")


def test_a_mechanism_edited_while_rows_run_gets_no_costs_beside_its_accuracy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refusal: Refusal,
) -> None:
    file, output = tmp_path / "mine.py", tmp_path / "out"
    row, whole = mechanisms.write(file), suite.run

    def edited(*arguments: object, **options: object) -> object:
        found = whole(*arguments, **options)
        file.write_text(file.read_text().replace("self.proj(x)", "self.proj(self.proj(x))"))
        return found

    monkeypatch.setattr(suite, "run", edited)
    command = ["--rows", row, "--output", str(output), *TIMED, "profile.enabled=false"]
    command[command.index("none")] = "counted"
    assert run_all.main([*command, "--reference", "256x320"]) == 0
    assert "mine.py changed while the rows ran: neither latency" in capsys.readouterr().out
    assert {"records", "index.md"} <= {path.name for path in output.iterdir()}
    assert not {"latency", "costs"} & {path.name for path in output.iterdir()}
    said = "mine.py changed since the record of"
    assert said in refusal(cli.main, "recommend", output, "--image-size", "256x320")


def test_a_row_whose_mechanism_was_edited_before_its_process_began_is_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    row = mechanisms.write(file)

    def run_local(jobs: list[processes.Job], **_: object) -> int:
        file.write_text(file.read_text() + "# edited\n")
        return max(run_all.main(job.command[2:]) for job in jobs)

    monkeypatch.setattr(processes, "run_local", run_local)
    command = ["--rows", f"identity,{row}", "--output", str(tmp_path / "out"), *REPORTED]
    command += ["--launcher", "local", "profile.enabled=false"]
    said = f"note: not on the page: {row}, without a record of the files that this command began"
    assert run_all.main(command) == 0
    assert said in capsys.readouterr().out
    assert set(records(tmp_path / "out")) == {"identity", row}
    assert "mine.py" not in (tmp_path / "out" / "tables" / "comparison.csv").read_text()
    # The same command goes on from what the file is now.
    monkeypatch.undo()
    assert run_all.main(command) == 0
    assert "not on the page" not in capsys.readouterr().out
    assert "mine.py" in (tmp_path / "out" / "tables" / "comparison.csv").read_text()


@pytest.mark.slow
def test_killed_in_the_second_row_it_continues_to_the_same_numbers(
    finished: Path, tmp_path: Path
) -> None:
    command = ["--rows", "ViL,linformer", *TINY]
    process = start(*command, output=tmp_path)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/linformer-*/step-00000002-*.pt")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    first = records(tmp_path)
    assert set(first) == {"ViL"}
    assert "1 of 2 rows to run" in python(ROOT / "run_all.py", *command, "--output", tmp_path)
    again, undisturbed = records(tmp_path), records(finished)
    assert again["ViL"] == first["ViL"]
    assert again["linformer"]["training"]["resumed"] == 1
    for row in ("ViL", "linformer"):
        assert settled(again[row]) == settled(undisturbed[row])


def test_a_failing_row_says_so_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    does = "if not x.is_meta:\n    raise RuntimeError('out of luck')"
    mechanism = mechanisms.write(tmp_path / "fragile.py", does)
    rows = f"{mechanism},ViL"
    output = tmp_path / "out"
    assert run_all.main(["--rows", rows, "--output", str(output), *REPORTED]) == 1
    found = records(output)
    assert found["ViL"]["status"] == "done"
    failed = found[mechanism]
    assert failed["status"] == "failed"
    tried = "stage 1, a grid of 32x40, as of images of 128x160: RuntimeError: out of luck"
    assert failed["error"]["message"] == tried
    assert failed["parameters"]["total"] > 0
    assert "out of luck" in capsys.readouterr().out
    assert "out of luck" in (output / "index.md").read_text()
    # A failure is a result too; it is tried again when asked to.
    assert run_all.main(["--rows", rows, "--output", str(output), *REPORTED]) == 1
    failure = "a record of a failure (--retry-failed runs it again)"
    out = " ".join(capsys.readouterr().out.split())
    assert f"0 of 2 rows to run, 1 have their record, 1 with {failure}" in out
    assert run_all.main(["--rows", rows, "--output", str(output), "--dry-run", *REPORTED]) == 0
    assert f"{mechanism} has {failure}\nViL has its record" in capsys.readouterr().out
    assert run_all.main(["--rows", rows, "--output", str(output), "--retry-failed", *REPORTED]) == 1
    assert "1 of 2 rows to run" in capsys.readouterr().out


@pytest.mark.parametrize("how", [[], pytest.param(["--launcher", "local"], marks=pytest.mark.slow)])
def test_a_row_that_cannot_be_built_says_so_and_the_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: list[str]
) -> None:
    file, output = tmp_path / "lazy.py", tmp_path / "out"
    mechanism = mechanisms.write(file)
    file.write_text(file.read_text().replace("Linear(dim, ", "LazyLinear("))
    command = ["--output", str(output), *how, *REPORTED]
    assert run_all.main(["--rows", f"{mechanism},identity", *command]) == 2
    found = records(output)
    assert found["identity"]["status"] == "done"
    assert found[mechanism]["error"]["kind"] == "input"
    for said in (" ".join("".join(capfd.readouterr()).split()), (output / "index.md").read_text()):
        assert "proj.weight, proj.bias have no shape before a first call" in said


def test_the_mechanism_of_the_readme_trains(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"a test trains this very example -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) < 40
    (tmp_path / "my_attention.py").write_text(code[1])
    row = f"{tmp_path}/my_attention.py:MeanAttention"
    output = tmp_path / "out"
    assert run_all.main(["--rows", row, "--output", str(output), *TINY]) == 0
    losses = records(output)[row]["training"]["losses"]
    assert all(entry["total"] > 0 for entry in losses)


def test_probes_are_a_suite_and_a_section_of_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    tiny = ["steps=0.02", "images=4", "seeds=[0]", "--output", output]
    assert run_all.main(["--suite", "probes", "--rows", "identity", *tiny]) == 0
    assert "Probes of mechanisms" in (tmp_path / "out" / "index.md").read_text()
    assert "identity" in capsys.readouterr().out
    assert cli.main(["probe", "--attention", "identity", "--format", "json", *tiny]) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 have their record" in err
    assert json.loads(out)[0]["probes"]["kind"] == "mechanism"
    assert cli.main(["report", output]) == 0


@pytest.mark.slow
def test_probes_in_the_folder_of_a_suite_leave_its_page(tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(ROOT / "results/measured/cpu-2-cores/quick", output)
    for path in output.glob("records/*.json"):
        if not path.name.startswith(("vil-", "full-")):
            path.unlink()
    assert cli.main(["report", str(output), "--title", "Suite quick"]) == 0
    before = (output / "index.md").read_text()
    tiny = ["steps=0.02", "images=4", "seeds=[0]", "--output", str(output)]
    assert cli.main(["probe", "--attention", "identity", *tiny]) == 0
    page = (output / "index.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings == [line for line in before.splitlines() if line.startswith("#")]
    assert "Suite quick" in headings[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "Vil"], "did you mean 'ViL'"),
        (["--device", "tpu"], "tpu"),
        (["--data", "nowhere"], "nowhere"),
        (["train.accumulate=2"], "train.batch_size=3 must be a multiple"),
        (["--devices", "2", "--device", "cpu"], "train.batch_size=3 must be a multiple"),
        (["--init", "nowhere.pth"], "nowhere.pth"),
        (["--search", "drop_path=2"], "model.drop_path=2"),
        (["--suite", "probes", "--data", "nowhere"], "--data says nothing to suite probes"),
        (["--suite", "probes", "seedz=1"], "did you mean 'seeds'"),
        (["train.no_decay=[norm]", "--rows", "ViL", *TINY], "did you mean 'norms'"),
        (["--suite", "ablation"], "`python -m bench data coco --root DIR` downloads it"),
        (["--seeds", "0"], "not a whole number of 1 or more"),
        (["--seeds", "2", "--search", "seed=0,1"], "--seeds 2 both say which seeds"),
        (["--seed", "2", "--search", "seed=0,1"], "--seed 2 both say which seeds"),
        (["--search", "lr=1e-3,2e-3", "train.lr=5e-4"], "and train.lr=5e-4 set the same"),
        (["--method", "retinanet", "--search", "method=mask_rcnn,retinanet"], "set the same"),
        (["--rows", "ViL,full", "train.init=a.pth"], "is one file for rows of several mechanisms"),
        (["--rows", "ViL", "--rows=swin"], "--rows is given twice, as 'ViL' and 'swin'"),
        (["--rows", "ViL", "--dry-run", "train.lr_multipliers.fpn=2", *TINY], "is called 'fpn'"),
        (["--device", "cpu", "device=cuda"], "device is given twice, as 'cpu' and 'cuda'"),
        (["--devices", "3", "train.devices=2"], "train.devices is given twice, as 3 and 2"),
        (["--val", "a.json", "data.val_file=b"], "data.val_file is given twice, as 'a.json'"),
        (["--measure-steps", "2"], "--measure-steps has no effect without --dry-run"),
        (["--slurm", "a=b"], "--slurm has no effect without --launcher slurm"),
        # Where there is no Slurm, a dry run says that.
        (["--dry-run", "--launcher", "slurm", "--slurm", "slurm_partitio=gpu"], "--launcher slurm"),
        (["--jobs", "3"], "--jobs has no effect without --launcher local"),
        (
            ["--search", "gamma=0.1,0.5"],
            "no effect in row srformer/64, where train.decay",
        ),
        (
            ["--rows", "ViL,linformer", "--search", "min_sizes=[64],[96]"],
            "no effect in row linformer, where data.fixed_size is",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert said in refusal(run_all.main, *arguments, "--output", tmp_path / "out", begun=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "annotations/instances_val2017.json").write_text("{"), "JSON"),
        (lambda root: (root / "annotations/instances_val2017.json").unlink(), "instances_val2017"),
        (lambda root: next((root / "train2017").iterdir()).unlink(), "is missing"),
        (lambda root: _truncate(next((root / "train2017").iterdir())), "cannot read image"),
    ],
)
def test_broken_data_is_one_line_and_exit_code_2(
    damage: Callable[[Path], object], said: str, tmp_path: Path, refusal: Refusal
) -> None:
    root = generate(tmp_path / "data", train_images=2, val_images=1)
    damage(root)
    command = ["--data", root, "--rows", "ViL", "--output", tmp_path / "out", *OF_DATA]
    error = refusal(run_all.main, *command, begun=True)
    assert said in error
    assert str(root) in error


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def test_wrong_input_of_several_processes_is_one_line_too(tmp_path: Path) -> None:
    process = start("--devices", "2", "--data", "nowhere", *OF_DATA, output=tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error == "run_all.py: error: no data folder nowhere\n"


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(
        run_all.main, "--output", tmp_path / "file" / "out", begun=True
    )


def test_a_full_disk_is_one_line_and_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "checkpoints", monkeypatch)
    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY, "profile.enabled=false"]
    assert run_all.main(arguments) == 2
    error = capsys.readouterr().err
    assert "run_all.py: error: cannot write checkpoint" in error
    assert error.count("\n") == 1
    assert records(tmp_path)["ViL"]["error"]["kind"] == "input"


def test_it_starts_in_a_notebooks_environment_and_without_unix_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a backend of matplotlib that is not there, an ASCII terminal, a user without a name."""
    code = (
        "import signal, sys; sys.modules |= dict.fromkeys(['resource', 'fcntl', 'pwd']);"
        "del signal.SIGKILL; import run_all; import bench.run.runner, bench.run.timing;"
        "run_all.main(['--help'])"
    )
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    said = python("-c", code, MPLBACKEND="module://not_there", PYTHONIOENCODING="ascii")
    assert "KEY=VALUE,..." in said
    for option in ("--suite", "--data", "--output", "--device", "--seed", "--rows", "key=value"):
        assert option in said


def start(*arguments: str, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "run_all.py"), *arguments, "--output", str(output)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ONE_THREAD, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps_done(output: Path, row: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in output.glob(f"logs/{row}-*.jsonl"))


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, "1"),
        pytest.param(signal.SIGINT, "2", marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_it_finishes_the_record_and_the_same_command_continues(
    tmp_path: Path, number: signal.Signals, processes: str
) -> None:
    # No step is lost that no checkpoint was due for.
    arguments = ["--rows", "ViL", "--devices", processes, *LONGER, "train.steps=25",
                 "train.checkpoint_every=1000", "profile.enabled=false",
                 "data.workers=1"]  # fmt: skip
    process = start(*arguments, output=tmp_path)
    deadline = time.monotonic() + 240
    while steps_done(tmp_path, "vil") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Whatever ends a job tells all of its processes, as `timeout` does.
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in error
    entry = records(tmp_path)["ViL"]
    assert entry["error"]["kind"] == "interrupted"
    (checkpoint,) = tmp_path.glob("checkpoints/vil-*/step-*.pt")
    step = int(checkpoint.name.split("-")[1])
    assert step >= 2
    again = start(*arguments, output=tmp_path)
    _, error = again.communicate(timeout=240)
    assert again.returncode == 0, error
    assert done_record(tmp_path)["training"]["resumed"] == 1
    assert steps_done(tmp_path, "vil") == 25


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (CocoEvaluator, "update", signal.SIGINT),
        pytest.param(CocoEvaluator, "update", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(memory, "peak", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_interrupted_after_its_training_it_is_not_trained_again(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    number: signal.Signals,
) -> None:
    # Shells make processes in the background ignore it, and so does pytest in several processes.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    if number is signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    def train(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY]
    with monkeypatch.context() as meddled:
        meddled.setattr(owner, name, interrupt)
        assert run_all.main(arguments) == 130
    signal.signal(signal.SIGINT, before)
    entry = records(tmp_path)["ViL"]
    assert (entry["status"], entry["error"]["kind"]) == ("failed", "interrupted")
    assert (entry["evaluation"] is None) == (owner is CocoEvaluator)
    assert entry["training"]["steps"] == 4
    monkeypatch.setattr(_Training, "step", train)
    assert run_all.main(arguments) == 0
    done = done_record(tmp_path)
    assert settled(done) == settled(records(finished)["ViL"])
    assert done["training"]["resumed"] == 0
    assert steps_done(tmp_path, "vil") == 4
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_interrupted_while_its_record_is_written_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = record.write

    def interrupt(result: record.Record, folder: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return write(result, folder)

    monkeypatch.setattr(record, "write", interrupt)
    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY, "profile.enabled=false"]
    assert run_all.main(arguments) == 130
    assert records(tmp_path)["ViL"]["status"] == "done"
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_row_that_lost_a_data_worker_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_a_worker(_: SuiteProgress, _done: float, doing: str) -> None:
        if doing.startswith("training, step 3 "):
            for worker in torch.multiprocessing.active_children():
                worker.kill()
                worker.join()

    arguments = ["--rows", "ViL", "--output", str(tmp_path), *LONGER, "train.steps=12",
                 "train.checkpoint_every=1", "data.workers=1", "profile.enabled=false"]  # fmt: skip
    with monkeypatch.context() as meddled:
        meddled.setattr(SuiteProgress, "update", kill_a_worker)
        assert run_all.main(arguments) == 1
    assert records(tmp_path)["ViL"]["error"]["kind"] == "data_worker"
    assert run_all.main(arguments) == 0
    assert "1 of 1 rows to run" in capsys.readouterr().out
    assert done_record(tmp_path)["training"]["resumed"] == 1


def test_a_row_that_another_command_runs_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "_LOCK_TIMEOUT", 0.1)
    arguments = ["--rows", "ViL,linformer", "--output", str(tmp_path), *TINY,
                 "profile.enabled=false"]  # fmt: skip
    config = load_suite("quick", rows=["ViL"], device="cpu", overrides=[
        value for value in arguments if "=" in value
    ]).runs[0]  # fmt: skip
    lock = tmp_path / "locks" / f"{identify(config).stem}.lock"
    with holder(lock) as process:
        who = f"process {process.pid} on "
        for launcher in (["--launcher", "local"], []):
            assert run_all.main([*arguments, *launcher]) == 2
            error = capsys.readouterr().err
            assert f"row ViL is being run in {tmp_path} by {who}" in error
            assert error.count("\n") == 1
        assert not (tmp_path / "records").exists()
        # One that begins when this command has begun: the other rows go on.
        with monkeypatch.context() as meddled:
            meddled.setattr(suite, "check_free", lambda *_: None)
            assert run_all.main(arguments) == 1
        assert f"ViL: being run by {who}" in capsys.readouterr().out
    assert set(records(tmp_path)) == {"linformer"}
    assert run_all.main(arguments) == 0
    assert set(records(tmp_path)) == {"ViL", "linformer"}


def test_a_row_that_was_done_meanwhile_is_not_done_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "records", tmp_path / "records")
    entry = records(finished)["ViL"]
    result = runner.run(build_config(entry["config"]), output=tmp_path)
    assert result.status == "done"
    assert result.created == entry["created"]
    assert len(list((tmp_path / "records").iterdir())) == 2


@pytest.mark.slow
def test_two_processes_make_the_records_of_one_that_takes_two_parts(tmp_path: Path) -> None:
    row = ["--rows", "ViL", *REPORTED]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_all.main([*row, "train.accumulate=2", "--output", str(one)]) == 0
    process = start(*row, "--devices", "2", output=two)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert out.count("1 of 1 rows to run") == 1
    assert out.count("report:") == 1
    assert not error.strip()
    single, shared = settled(records(one)["ViL"]), settled(records(two)["ViL"])
    for entry, other in zip(single.pop("losses"), shared.pop("losses"), strict=True):
        assert entry == pytest.approx(other, rel=1e-5)
    # An untrained detector's figures are all near zero; the images are the same ones, once each.
    for kind in ("box", "mask"):
        ours, theirs = (run["evaluation"].pop(kind) for run in (single, shared))
        assert ours == pytest.approx(theirs, abs=0.1)
    for run in (single, shared):
        run["evaluation"] = {k: run["evaluation"][k] for k in ("images", "split")}
    assert single == shared
    training = records(two)["ViL"]["training"]
    assert (training["processes"], training["images_of_a_part"]) == (2, 1)
    assert steps_done(two, "vil") == 4


@pytest.mark.parametrize(
    "error", [pytest.param("RuntimeError", marks=pytest.mark.slow), "InputError"]
)
def test_a_row_that_fails_in_one_process_says_so_and_the_others_go_on(
    tmp_path: Path, error: str
) -> None:
    """An error of the user's input, such as a broken image, too."""
    does = f"""
if not x.is_leaf and os.environ.get("RANK") == "1" and not x.is_meta:
    raise {error}("out of luck")"""
    imports = "from bench.errors import InputError"
    mechanism = mechanisms.write(tmp_path / "fragile.py", does, imports)
    output = tmp_path / "out"
    process = start(
        "--rows", f"{mechanism},ViL", "--devices", "2", "--retry-failed",
        *REPORTED, "profile.enabled=false",
        output=output,
    )  # fmt: skip
    out, said = process.communicate(timeout=280)
    assert process.returncode == 1, said
    assert said.count("failed in one process: out of luck") == 1
    found = records(output)
    assert found[mechanism]["error"]["message"] == "out of luck"
    assert found["ViL"]["status"] == "done"
    assert "out of luck" in out


@pytest.mark.slow
def test_under_torchrun_it_is_one_run(tmp_path: Path) -> None:
    under = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    python(*under, ROOT / "run_all.py", "--rows", "ViL", *TINY, "--output", tmp_path)
    assert records(tmp_path)["ViL"]["training"]["processes"] == 2


def test_a_search_runs_side_by_side_and_says_which_value_is_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--rows", "ViL", "--search", "drop_path=0.0,0.1", "--output", str(tmp_path),
                 *REPORTED, "profile.enabled=false"]  # fmt: skip
    assert run_all.main([*arguments, "--launcher", "local", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"ViL +drop_path +0\.0 ", out)
    # In the answer and in the comparison.
    assert out.count(", best") == 2
    assert out.count("report:") == 1
    page = (tmp_path / "index.md").read_text()
    assert "## Searched settings" in page
    assert page.count(", best |") == 2
    found = records(tmp_path)
    assert set(found) == {"ViL (drop_path=0.0)", "ViL (drop_path=0.1)"}
    assert found["ViL (drop_path=0.1)"]["model"]["drop_path"] == 0.1
    # The launcher changes nothing of what a run is.
    assert run_all.main(arguments) == 0
    assert "0 of 2 rows to run" in capsys.readouterr().out


def test_seeds_of_a_row_are_runs_of_their_own_and_one_row_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rows", "ViL", "--seed", "3", "--seeds", "2", "--output", str(tmp_path), *TIMED]
    assert run_all.main(arguments) == 0
    found = [record.read(path) for path in (tmp_path / "records").glob("*.json")]
    assert {(entry.row, entry.seed) for entry in found} == {("ViL", 3), ("ViL", 4)}
    assert len({entry.training["weights"]["sha256"] for entry in found}) == 2
    (table,) = tables.comparison(load.load(tmp_path))
    assert table.raw["row"].tolist() == ["ViL"]
    assert "mean of the trainings with seeds 3, 4" in (tmp_path / "index.md").read_text()
    # Seeds of one model are equally fast: one is timed, and stands for all.
    (timed,) = (tmp_path / record.LATENCIES).glob("*.json")
    assert len(json.loads(timed.read_text())["rows"]) == 1
    assert table.raw["latency_median_s"].notna().all()
    capsys.readouterr()
    # The way that seeds are given changes nothing of what a run is.
    search = ["--search", "seed=3,4", *arguments[:2], *arguments[6:], "--dry-run"]
    assert run_all.main(search) == 0
    assert "ViL (seed 4) has its record" in capsys.readouterr().out


def test_a_run_starts_from_a_classifier(tmp_path: Path) -> None:
    config = load_suite("quick", rows=["ViL"]).runs[0]
    vil = models.build_backbone(config)
    # What a training of a millionth of a step does not move.
    state = {f"module.{name}": value + 0.5 for name, value in vil.state_dict().items()
             if value.is_floating_point()}  # fmt: skip
    torch.save({"net": state}, tmp_path / "classifier.pth")
    output = tmp_path / "out"
    assert run_all.main(
        ["--rows", "ViL", "--init", str(tmp_path / "classifier.pth"), "--output", str(output),
         *TINY, "profile.enabled=false"]
    ) == 0  # fmt: skip
    (note,) = (n for n in records(output)["ViL"]["notes"] if n.startswith("initialised"))
    assert "classifier.pth" in note
    detector = models.build_detector(config, 6)
    models.initialise(detector, tmp_path / "classifier.pth")
    own = detector.vil.state_dict()
    assert all(torch.equal(own[name.removeprefix("module.")], v) for name, v in state.items())


def test_what_every_model_makes_does_not_start_anew(tmp_path: Path) -> None:
    (config,) = profile_configs(["ViL"], backbone="quick", position="relative")
    detector = models.build_detector(config, 6)
    state = detector.vil.state_dict()
    assert any(name.endswith("relative_position_index") for name in state)
    torch.save(state, tmp_path / "classifier.pth")
    assert "start anew" not in models.initialise(detector, tmp_path / "classifier.pth")


def test_a_checkpoint_of_another_backbone_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    detector = models.build_detector(load_suite("quick", rows=["ViL"]).runs[0], 6)
    with pytest.raises(InputError, match="none of its 1 tensors fits the backbone"):
        models.initialise(detector, tmp_path / "other.pth")
    # Heads, and what no detector uses, may fit all the same.
    state = detector.state_dict()
    heads = {n: v for n, v in state.items() if ".bottom_up." not in n or ".head." in n}
    assert "backbone.bottom_up.head.bias" in heads
    torch.save({"model": heads}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=f"none of its {len(heads)} tensors fits the backbone"):
        models.initialise(detector, tmp_path / "other.pth")
    # One of the two would win.
    apart = "backbone.bottom_up.layer1.1.attn.proj_global.weight"
    torch.save({"model": state | {apart: state[apart] + 1}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=rf"1 shared here .* different in the file: {apart}"):
        models.initialise(detector, tmp_path / "other.pth")
    # The last is infinite in single precision.
    for number in (torch.nan, 1e300):
        spoilt = {
            name: torch.full_like(value, number, dtype=torch.float64)
            for name, value in detector.state_dict().items()
        }
        torch.save({"model": spoilt}, tmp_path / "other.pth")
        with pytest.raises(
            InputError, match=r"tensors hold values that are not finite .*first of them"
        ):
            models.initialise(detector, tmp_path / "other.pth")
    # A dry run says so too.
    (tmp_path / "text.pth").write_text("text")
    for name, said in (("other.pth", "not finite"), ("text.pth", "no checkpoint")):
        command = ["--rows", "ViL", "--dry-run", "--init", str(tmp_path / name), *TINY]
        assert run_all.main(command) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_for_eight_gpus_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    arguments = ["--suite", "ablation", "--rows", "Partial performer", "--devices", "8"]
    assert run_all.main([*arguments, "--dry-run", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert not output.exists()
    assert max(map(len, out.splitlines())) <= 120
    row = next(line for line in out.splitlines() if line.startswith("Partial performer"))
    assert row.split()[2:8] == ["mask_rcnn", "1x", "0.05", "90000", "12.3", "0.5"]
    assert float(row.split()[-2]) > 1
    said = " ".join(out.split())
    assert "a step: 16 images on 8 devices, each with 1 part of 2 images" in said
    assert "1e-06 at 0, 0.0001 at 1000, 1e-05 at 60000, 1e-06 at 80000" in said
    assert "on one GPU, 2 images of 800x1344" in said
    assert "COCO 2017, train2017, 117266 images" in said


@pytest.mark.slow
def test_a_dry_run_says_of_which_rows_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    rows = "ViL-Tiny Mask R-CNN 1x,ViL-Tiny RetinaNet 3x"
    size = "profile.image_size=[64,96]"
    arguments = ["--suite", "zoo", "--rows", rows, "--dry-run", "--output", str(tmp_path), size]
    assert run_all.main(arguments) == 0
    out = capsys.readouterr().out
    first, second = (line.split() for line in out.splitlines() if line.startswith("ViL-Tiny"))
    assert first[-7:-2] == ["1x", "0.05", "90000", "12.3", "0.5"]
    assert second[-7:-2] == ["3x", "0.1", "270000", "36.8", "1"]
    assert "schedule 1x: 90000 steps" in out
    assert "schedule 3x: 270000 steps" in out
    assert out.count("a step:") == 1
    assert run_all.main([*arguments[:-1], "--search", "accumulate=1,2", size]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "each with 2 parts of 8 images (ViL-Tiny Mask R-CNN 1x (accumulate=2), ViL" in out


def test_a_dry_run_measures_steps_for_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY, "--dry-run"]
    assert run_all.main([*arguments, "--measure-steps", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "on 1 device as fast as cpu here: the median of 2 steps in 32-true" in out
    assert re.search(r"time of all rows, one after the other: \d+ (s|min)", out)
    assert "generated, 4 images, 4 of them with an instance" in out
    assert not (tmp_path / "records").exists()


def test_a_row_of_a_launcher_gets_the_schedule_and_method() -> None:
    given = ["--schedule", "3x", "--method", "retinanet", "--launcher", "local"]
    options = run_all.parser().parse_intermixed_args(given)
    config = load_suite("quick", rows=["ViL"]).runs[0]
    arguments = run_all._row_arguments({"ViL": "ViL"}, Path("out"), options, config)
    assert arguments[arguments.index("--schedule") + 1] == "3x"
    assert arguments[arguments.index("--method") + 1] == "retinanet"


def test_other_settings_of_evaluation_or_workers_train_nothing_again(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("records", "weights", "data", "latency"):
        shutil.copytree(finished / folder, tmp_path / folder)

    def train(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(_Training, "step", train)
    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY]
    assert run_all.main([*arguments, "data.workers=1", "train.log_every=7"]) == 0
    assert "0 of 1 rows to run" in capsys.readouterr().out
    assert run_all.main([*arguments, "evaluate.bootstrap=5", "profile.enabled=false"]) == 0
    assert "evaluated and measured anew, from the weights that were kept" in " ".join(
        capsys.readouterr().out.split()
    )
    found = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("vil-*.json")]
    before, after = sorted(found, key=lambda entry: entry["memory"] is None)
    assert after["training"] == before["training"]
    for kind in ("box", "mask"):
        assert after["evaluation"][kind] == before["evaluation"][kind]
    assert len(after["evaluation"]["bootstrap"]["box_AP"]) == 5
    assert any("the weights are those of the run of" in note for note in after["notes"])


def test_a_stopped_run_goes_on_with_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: SuiteProgress, _done: float, doing: str) -> None:
        if doing.startswith("training, step 2 "):
            raise KeyboardInterrupt

    arguments = ["--rows", "ViL", "--output", str(tmp_path), *TINY, "profile.enabled=false"]
    with monkeypatch.context() as meddled:
        meddled.setattr(SuiteProgress, "update", interrupt)
        assert run_all.main(arguments) == 130
    monkeypatch.setattr(train, "_place", lambda: "1 thread of another machine")
    assert run_all.main([*arguments, "data.workers=1", "evaluate.batch_size=1"]) == 0
    entry = done_record(tmp_path)
    assert entry["training"]["resumed"] == 1
    (said,) = (note for note in entry["notes"] if note.startswith("trained in parts"))
    assert said.endswith("; 1 thread of another machine")


def test_records_of_e514c85_are_settled_and_reported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their key is a hash of the whole configuration, and they say nothing of files."""
    (tmp_path / "records").mkdir()
    for row, entry in records(finished).items():
        entry["key"] = record.key(entry["config"])
        del entry["environment"]["inputs"]
        entry["latency"] = next(e.latency for e in load.load(finished) if e.row == row)
        path = tmp_path / "records" / record.done_name(row, entry["key"])
        path.write_text(json.dumps(entry))
    assert run_all.main(["--rows", "ViL,linformer", "--output", str(tmp_path), *TIMED]) == 0
    out = capsys.readouterr().out
    assert "0 of 2 rows to run" in out
    assert "measuring" not in out
    assert not (tmp_path / "latency").exists()
    assert "linformer" in (tmp_path / "index.md").read_text()


def test_each_row_starts_from_a_checkpoint_of_its_own(tmp_path: Path, refusal: Refusal) -> None:
    plain = load_suite("quick", rows=["ViL", "Partial ViL"])
    for name in ("ViL", "partial-vil"):
        (tmp_path / f"{name}.pth").touch()
    for init in (tmp_path, tmp_path / "{row}.pth"):
        found = started(plain, str(init), partial=False).runs
        assert [Path(run.train.init or "").stem for run in found] == ["ViL", "partial-vil"]
    one = str(tmp_path / "ViL.pth")
    assert all(run.train.init == one for run in started(plain, one, True).runs)
    command = ["--rows", "ViL,Partial ViL", "--output", tmp_path / "out", "--init"]
    for init, said in ((one, "--init-partial"), (f"{tmp_path}/x-{{row}}", "x-partial-vil")):
        error = refusal(run_all.main, *command, init, begun=True)
        assert said in error or "x-vil" in error


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "--attention", "full", "--image-sizes", "32,64", "--what", "flops"],
        ["profile", "--attention", "full", "--what", "flops"],
    ],
)
def test_the_page_of_a_suite_is_not_replaced(
    finished: Path, command: list[str], refusal: Refusal
) -> None:
    before = sorted(finished.rglob("*"))
    error = refusal(cli.main, *command, "--backbone", "tiny", "--output", finished)
    assert "has records of quick" in error
    assert sorted(finished.rglob("*")) == before


def test_a_row_says_what_is_odd_of_a_mechanism_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    does = "self.balance = x.var()\nif self.training:\n    CALLS.append(0)\n    x = x * len(CALLS)"
    does += "\nx = x if self.training else x * float('nan')"
    row = mechanisms.write(tmp_path / "late.py", does, "CALLS = []")
    words = ["--rows", row, *TINY, "--no-report", "--no-latency", "--output", str(tmp_path / "out")]
    assert run_all.main([*words, "--dry-run"]) == 0
    said = f"{row} keeps balance, with a gradient: training adds no loss of a mechanism to its own"
    assert f"note: {said}" in " ".join(capsys.readouterr().out.split())
    assert run_all.main(words) == 0
    assert re.search(r"done, box mAP 0\.0, (\d) of \1 images not finite", capsys.readouterr().out)
    (path,) = (tmp_path / "out/records").iterdir()
    notes = record.read(path).notes
    assert said in notes
    assert any(note.startswith(f"{row} keeps from call to call what no") for note in notes)


def test_a_dry_run_runs_a_mechanism_of_the_user(
    tmp_path: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(does: str, name: str) -> list[str]:
        row = mechanisms.write(tmp_path / name, does)
        return ["--rows", row, "--dry-run", *TINY, "--output", str(tmp_path / "out")]

    fragile = words("if not x.is_meta:\n    raise RuntimeError('out of luck')", "fragile.py")
    tried = "stage 1, a grid of 32x40, as of images of 128x160: RuntimeError: out of luck"
    assert tried in refusal(run_all.main, *fragile, begun=True)
    backward = words("x = x.exp(); y = x * x; x += 1; x = y", "backward.py")
    assert "modified by an inplace" in refusal(run_all.main, *backward, begun=True)
    late = "if not self.training and not x.is_meta:\n    raise RuntimeError('out of time')"
    assert "out of time" in refusal(run_all.main, *words(late, "late.py"), begun=True)
    unwritten = words("y = torch.empty_like(x); y[:, 1:] = x[:, 1:]; x = y", "unwritten.py")
    assert "memory that nothing wrote" in refusal(run_all.main, *unwritten, begun=True)
    longer = words("return torch.cat([x, x], dim=1)", "longer.py")
    assert "The size of tensor a" in refusal(run_all.main, *longer, begun=True)
    double = words("return self.proj(x).double()", "double.py")
    assert "it returns (2, 1281, 32) of torch.float64" in refusal(run_all.main, *double, begun=True)
    pair = words("assert x.is_meta or len(x) == 1, 'one image alone'", "pair.py")
    assert "one image alone" in refusal(run_all.main, *pair, begun=True)
    spoilt = words("x = x * float('nan')", "spoilt.py")
    assert "its output in training is not finite" in refusal(run_all.main, *spoilt, begun=True)
    values = words("x = x * x.abs().max().item()", "values.py")
    assert run_all.main(values) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"note: {values[1]}: memory not predicted: " in said


def test_a_mechanism_is_tried_on_the_grids_of_all_images_before_it_trains(
    tmp_path: Path, refusal: Refusal
) -> None:
    wide, high = (
        generate(tmp_path / name, train_images=2, val_images=2, image_size=size)
        for name, size in (("wide", (128, 160)), ("high", (160, 128)))
    )
    row = mechanisms.write(tmp_path / "table.py", "assert grid[0] <= 48, 'too many rows'")
    annotations = "annotations/instances_{}2017.json"
    words = [
        *("--rows", row, *OF_DATA, "--output", str(tmp_path / "out")),
        *("--train", str(wide / annotations.format("train"))),
        *("--val", str(high / annotations.format("val"))),
    ]
    tried = "stage 1, a grid of 64x48, as of images of 240x192: AssertionError: too many rows"
    assert tried in refusal(run_all.main, *words, "--dry-run", begun=True)
    assert run_all.main(words) == 1
    failed = records(tmp_path / "out")[row]
    assert failed["error"]["message"] == tried
    assert failed["training"] is None


BROKEN = """
from torch import nn

class One(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.scale = load_file("scale.safetensors")

class Other(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.scale = {}["scale"]
"""


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """Two mechanisms that cannot be built, as rows."""
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    return f"{file}:One,{file}:Other"


def test_a_dry_run_goes_on_where_a_mechanism_cannot_be_built(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rows", f"{broken},ViL", "--seeds", "2", "--dry-run", *TINY, "--output"]
    assert run_all.main([*words, str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines() if "mask_rcnn" in line] == ["ViL"]
    assert printed.err.count("\n") == 1
    for row, said in zip(
        broken.split(","), ("name 'load_file' is not defined", "KeyError: 'scale'"), strict=True
    ):
        assert printed.err.count(f"row '{row}': ") == 1
        assert said in printed.err


@pytest.mark.parametrize("words", [["--memory-budget", "1GB"], ["--sizes", "val2017"]])
def test_a_profile_of_a_mechanism_that_cannot_be_built_is_one_line(
    broken: str, words: list[str], refusal: Refusal
) -> None:
    said = refusal(cli.main, "profile", "--attention", broken, "--backbone", "tiny", *words)
    assert "NameError: name 'load_file' is not defined" in said


def test_a_dry_run_names_rows_with_a_record_and_refuses_what_the_run_would(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rows", "ViL,performer", *TINY, "--dry-run", "--output"]
    assert run_all.main([*arguments, str(finished)]) == 0
    out = capsys.readouterr().out
    assert "ViL has its record" in out
    assert [line.split()[0] for line in out.splitlines() if "mask_rcnn" in line] == ["performer"]
    root = generate(tmp_path / "data", train_images=2, val_images=1)
    arguments = ["--rows", "ViL,performer", *OF_DATA, "--dry-run", "--output"]
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"iscrowd"', '"ignore": 1, "iscrowd"'))
    assert run_all.main([*arguments, str(tmp_path / "out"), "--data", str(root)]) == 0
    assert "'ignore' (" in " ".join(capsys.readouterr().out.split())
    assert run_all.main([*arguments, str(file / "out"), "--data", str(root)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    file.write_text("{")
    assert run_all.main([*arguments, str(tmp_path / "out"), "--data", str(root)]) == 2
    assert "instances_val2017.json is" in capsys.readouterr().err
    assert run_all.main([*arguments, str(tmp_path / "out"), "--data", str(file)]) == 2
    assert "unpack an archive, and name a file by --train or --val" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
