"""The command a user runs: rows, records, resuming, reports, and what wrong input gets."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import run_all
from bench.data.generated import generate

ROOT = Path(__file__).parents[1]
# As many threads as the tests' own process has: with another number, sums round differently.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# A suite of seconds: few steps, few images, little measured.
TINY = [
    "--device", "cpu", "train.steps=4", "train.batch_size=2", "train.checkpoint_every=1",
    "data.generated.train_images=4", "data.generated.val_images=2",
    "profile.repeats=2", "profile.seconds=0.01", "profile.batch_size=1",
]  # fmt: skip


def records(output: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (output / "records").glob("*.json")]
    return {entry["row"]: entry for entry in found}


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
    assert run_all.main(["--rows", "ViL,linformer", "--output", str(output), *TINY]) == 0
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
        assert len(entry["latency"]["inference"]["samples"]) >= 2
        assert entry["training"]["steps"] == 4
        assert entry["training"]["losses"]
        assert entry["environment"]["packages"]["torch"]
        assert entry["config"]["train"]["steps"] == 4
        assert entry["seed"] == 0


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


def test_the_same_command_again_runs_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    assert run_all.main(["--rows", "ViL,linformer", "--output", str(finished), *TINY]) == 0
    assert "0 of 2 rows to run" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}


def test_killed_in_the_second_row_it_continues_to_the_same_numbers(
    finished: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "run_all.py"), "--rows", "ViL,linformer",
               "--output", str(tmp_path), *TINY]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/linformer-*/step-00000002.pt")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = records(tmp_path)
    assert set(first) == {"ViL"}
    done = subprocess.run(
        command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 2 rows to run" in done.stdout
    again, undisturbed = records(tmp_path), records(finished)
    assert again["ViL"] == first["ViL"]
    assert again["linformer"]["training"]["resumed"] == 1
    for row in ("ViL", "linformer"):
        assert settled(again[row]) == settled(undisturbed[row])


def test_a_failing_row_says_so_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mechanism = tmp_path / "fragile.py"
    mechanism.write_text(
        "import torch\n"
        "class Fragile(torch.nn.Module):\n"
        "    def __init__(self, *, dim, num_heads, num_global=1):\n"
        "        super().__init__()\n"
        "        self.proj = torch.nn.Linear(dim, dim)\n"
        "    def forward(self, x, grid):\n"
        "        if not x.is_meta:\n"
        "            raise RuntimeError('out of luck')\n"
        "        return self.proj(x)\n"
    )
    rows = f"{mechanism}:Fragile,ViL"
    output = tmp_path / "out"
    assert run_all.main(["--rows", rows, "--output", str(output), *TINY]) == 1
    found = records(output)
    assert found["ViL"]["status"] == "done"
    failed = found[f"{mechanism}:Fragile"]
    assert failed["status"] == "failed"
    assert failed["error"]["message"] == "out of luck"
    assert failed["parameters"]["total"] > 0
    assert "out of luck" in capsys.readouterr().out
    assert "out of luck" in (output / "index.md").read_text()
    # A failure is a result too; it is tried again when asked to.
    assert run_all.main(["--rows", rows, "--output", str(output), *TINY]) == 1
    assert "0 of 2 rows to run" in capsys.readouterr().out
    assert run_all.main(["--rows", rows, "--output", str(output), "--retry-failed", *TINY]) == 1
    assert "1 of 2 rows to run" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "quik"], "did you mean 'quick'"),
        (["--rows", "Vil"], "did you mean 'ViL'"),
        (["train.stps=3"], "did you mean 'train.steps'"),
        (["train.steps=many"], "train.steps"),
        (["train.steps"], "no key=value"),
        (["train.steps=0"], "train.steps=0"),
        (["model.arch=l1,h3,x9_l2_l3"], ">>>x9<<<"),
        (["model.attention=lonformer"], "did you mean 'longformer'"),
        (["model.options.windw=3", "--rows", "ViL"], "windw"),
        (["--device", "tpu"], "tpu"),
        (["--data", "nowhere"], "nowhere"),
        (["--rows", "nowhere.py:Class"], "nowhere.py"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_all.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


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
    damage: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = generate(tmp_path / "data", train_images=2, val_images=1)
    damage(root)
    command = ["--data", str(root), "--rows", "ViL", "--output", str(tmp_path / "out"), *TINY]
    assert run_all.main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(root) in error
    assert len(error.strip().splitlines()) == 1


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def test_an_output_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_all.main(["--output", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_in_the_record(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the record fits, no checkpoint does."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "sys.argv[0] = 'run_all.py'; import run_all; sys.exit(run_all.main(sys.argv[1:]))"
    )
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, "--rows", "ViL", "--output", str(output), *TINY],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("run_all.py: error:")]
    assert len(error) == 1
    assert "cannot write checkpoint" in error[0]
    assert "Traceback" not in done.stderr
    assert records(output)["ViL"]["error"]["kind"] == "input"


def test_help_explains_the_options() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_all.py"), "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    for option in ("--suite", "--data", "--output", "--device", "--seed", "--rows", "key=value"):
        assert option in done.stdout
