"""Several processes: those that share a run, and those that do rows side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.data.generated import generate
from bench.errors import InputError
from bench.system import processes as launch
from bench.system import slurm
from tests import mechanisms

ROOT = Path(__file__).parents[3]
SHARED = Path(__file__).parents[1] / "shared.py"
# A suite of seconds.
TINY = [
    "--device", "cpu", "train.steps=16", "train.batch_size=2", "train.checkpoint_every=1000",
    "data.generated.train_images=4", "data.generated.val_images=3", "profile.enabled=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as the tests' own process has, and this code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), path])))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, launch.World()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
             "TORCHELASTIC_RUN_ID": "x"},
            launch.World(3, 4, 1, 2, "torchrun"),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
             "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            launch.World(1, 2, 1, 2, "spawn"),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
             "SLURM_STEP_NUM_NODES": "2"},
            launch.World(5, 8, 1, 4, "slurm"),
        ),
        # A job's script, and a job of one task, are one process.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, launch.World()),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, launch.World()),
    ],
)  # fmt: skip
def test_the_processes_are_those_that_the_launcher_says(
    environment: dict[str, str], expected: launch.World
) -> None:
    assert launch.world(environment) == expected


def test_an_environment_that_is_not_understood_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"torchrun is not understood.*LOCAL_RANK"):
        launch.world({"RANK": "0", "WORLD_SIZE": "2"})


def test_each_process_knows_its_place() -> None:
    code = (
        "import sys; from bench.system import processes as launch; w = launch.world();"
        "sys.exit(0 if (w.size, w.local_size, w.launcher) == (3, 3, 'spawn')"
        " and w.rank == w.local_rank else 9)"
    )
    assert launch.spawn(python(code), 3) == 0


def test_one_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_TOGETHER", 1.0)
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3 - 1); time.sleep(100)"
    start = time.monotonic()
    assert launch.spawn(python(code), 2) == 2
    assert time.monotonic() - start < 60


def test_one_that_is_killed_gives_its_signal_as_exit_code(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    assert launch.spawn(python(code), 2) == 128 + signal.SIGKILL
    assert "SIGKILL; the same command continues" in capfd.readouterr().err


def test_after_one_failed_alone_all_are_started_anew(tmp_path: Path) -> None:
    """A row failed in one process has its record then, and the others go on with the next."""
    code = (
        "import os, pathlib, sys, time; rank = os.environ['RANK'];"
        f"mark = pathlib.Path({str(tmp_path)!r}) / rank; again = mark.exists(); mark.touch();"
        "sys.exit(0) if again else None;"
        f"rank == '1' and sys.exit({launch.ABANDONED}); time.sleep(100)"
    )
    assert launch.spawn(python(code), 2) == 0


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    inner = (
        "import os, pathlib, time; from bench.system.processes import end_with_parent;"
        "end_with_parent();"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()));"
        f"time.sleep(2); pathlib.Path({str(tmp_path / 'survived')!r}).touch()"
    )
    outer = (
        "import sys, time; from bench.system import processes as launch;"
        f"launch.start([sys.executable, '-c', {inner!r}], {{}}); time.sleep(100)"
    )
    process = subprocess.Popen(python(outer))
    wait_for(lambda: (tmp_path / "pid").exists())
    process.kill()
    process.wait()
    time.sleep(3)
    assert not (tmp_path / "survived").exists()


def wait_for(happened: Any, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("performer/mask_rcnn/torchvision", marks=pytest.mark.slow),
        "averaging/retinanet/torchvision",
        pytest.param("ViL/retinanet/torchvision", marks=pytest.mark.slow),
        pytest.param("performer/mask_rcnn/detectron2", marks=pytest.mark.detectron2),
        pytest.param("ViL/retinanet/detectron2", marks=pytest.mark.detectron2),
    ],
)
def test_two_processes_do_what_one_does_in_two_parts(tmp_path: Path, model: str) -> None:
    """With all that is random: sampled RoIs, dropped paths, redrawn features; and averages."""
    row, *rest = model.split("/")
    if row == "averaging":
        norm = "self.norm(x.transpose(1, 2)).transpose(1, 2)"
        row = mechanisms.write(tmp_path / "averaging.py", f"x = {norm}")
        own = (tmp_path / "averaging.py").read_text()
        made = "self.proj = nn.Linear(dim, dim)"
        (tmp_path / "averaging.py").write_text(
            own.replace(made, f"{made}; self.norm = nn.BatchNorm1d(dim)")
        )
    data = generate(tmp_path / "data", train_images=8, val_images=1, image_size=(64, 96))

    def command(name: str, devices: int, accumulate: int) -> list[str]:
        arguments = [str(data), str(tmp_path / name), str(devices), str(accumulate), row, *rest]
        return [sys.executable, str(SHARED), *arguments]

    assert subprocess.run(command("one", 1, 2), check=False).returncode == 0
    assert launch.spawn(command("two", 2, 1), 2) == 0
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for entry, other in zip(one["steps"], two["steps"], strict=True):
        assert entry == pytest.approx(other, rel=1e-6)
    for name, value in one["weights"].items():
        if value.is_floating_point() and value.numel():
            other = two["weights"][name]
            assert (value - other).abs().max() <= 1e-5 * value.abs().max(), name


def a_job(tmp_path: Path, row: str, code: str) -> launch.Job:
    return launch.Job(row, tuple(python(code)), tmp_path / "logs" / f"{row}.out")


def test_local_jobs_run_side_by_side_and_each_says_how_it_ended(tmp_path: Path) -> None:
    """Each of two waits for the other, so that one after the other they would not end."""

    def meet(own: str, other: str) -> str:
        return (
            f"import pathlib, sys, time; place = pathlib.Path({str(tmp_path)!r});"
            f"(place / {own!r}).touch()\nfor _ in range(600):\n"
            f"    if (place / {other!r}).exists(): sys.exit(0)\n    time.sleep(0.1)\nsys.exit(9)"
        )

    said: list[str] = []
    found = [
        a_job(tmp_path, "a", meet("a", "b")),
        a_job(tmp_path, "b", meet("b", "a")),
        a_job(tmp_path, "c", "print('out of luck'); raise SystemExit(1)"),
    ]
    assert launch.run_local(found, count=2, devices=1, log=said.append) == 1
    assert sum("done in" in line for line in said) == 2
    assert any(line.startswith("[3/3] c: failed, out of luck") for line in said)


def test_slurm_options_are_read() -> None:
    assert slurm.read_options("slurm_partition=gpu, timeout_min=60") == {
        "slurm_partition": "gpu",
        "timeout_min": 60,
    }
    assert slurm.read_options(None) == {}
    with pytest.raises(InputError, match="--slurm gpu: 'gpu' is not of the form key=value"):
        slurm.read_options("gpu")


def test_without_submitit_there_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"needs submitit.*pip install '\.\[slurm\]'"):
        slurm.submit([], folder=tmp_path, gpus=1, options={})


def test_an_unknown_slurm_option_or_no_slurm_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match="--launcher slurm"):
        slurm.submit([], folder=tmp_path, gpus=1, options={"nonsense": "x"}, cluster="local")
    with pytest.raises(InputError, match=r'"timeout_min" expected type .*int.* "2h"'):
        slurm.submit([], folder=tmp_path, gpus=1, options={"timeout_min": "2h"}, cluster="local")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="--launcher slurm"):
        slurm.submit([], folder=tmp_path, gpus=1, options={})


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    output = tmp_path / "out"
    command = launch.this_command(["--rows", "ViL", "--output", str(output), "--no-report", *TINY])
    job = launch.Job("ViL", tuple(command), output / "x")
    (handle,) = slurm.submit(
        [job], folder=tmp_path / "slurm", gpus=1, options={"timeout_min": 5}, cluster="local"
    )
    wait_for(lambda: _steps(output) > 1)
    # As Slurm does, to the job's task, which submitit's local executor runs below another process.
    controller = handle._process.pid
    (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)
    assert handle.result() == 0
    found = [json.loads(path.read_text()) for path in (output / "records").glob("*.json")]
    done = {entry["status"]: entry for entry in found}
    assert done["failed"]["error"]["kind"] == "interrupted"
    assert done["done"]["training"]["resumed"] == 1
    assert _steps(output) == 16


def _steps(output: Path) -> int:
    logs = list(output.glob("logs/*.jsonl"))
    return len(logs[0].read_text().splitlines()) if logs else 0
