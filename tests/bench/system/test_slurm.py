"""Rows as jobs of a real Slurm: a cluster of one node, started in a scratch folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import run_all
from bench.model.weights import load_file

ROOT = Path(__file__).parents[3]
TINY = [
    "--rows", "ViL", "--device", "cpu", "train.steps=30", "train.batch_size=2",
    "train.checkpoint_every=1000", "data.generated.train_images=4",
    "data.generated.val_images=2", "profile.enabled=false", "evaluate.bootstrap=0",
]  # fmt: skip
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobRequeue=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(happened: Callable[[], object], what: str, *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the cluster's commands."""
    # Short, since the path of a socket may have 107 letters.
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    key, host = folder / "munge" / "key", socket.gethostname().partition(".")[0]
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host, folder=folder, controller_port=free_port(), node_port=free_port()
        )
    )
    environment = os.environ | {
        "SLURM_CONF": str(configuration), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    places = [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}",
         f"--socket={folder}/munge/socket", *places],
        ["slurmctld", "-D", "-f", str(configuration)],
        ["slurmd", "-D", "-f", str(configuration), "-N", host],
    ]  # fmt: skip
    started = []
    try:
        for command in daemons:
            started.append(
                subprocess.Popen(
                    [shutil.which(command[0]) or command[0], *command[1:]],
                    env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
            if command[0] == "munged":
                wait_for((folder / "munge" / "socket").exists, "munged")

        def idle() -> bool:
            command = ["sinfo", "--noheader", "--format=%T"]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            return done.stdout.strip() == "idle"

        wait_for(idle, "an idle node", seconds=60)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def run_apart(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run_all.py"), *TINY, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def steps_done(output: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in output.glob("logs/*.jsonl"))


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_requeued_row_ends_in_the_weights_of_an_undisturbed_one(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    output, undisturbed = tmp_path / "slurm", tmp_path / "undisturbed"
    done = run_apart(cluster, "--output", str(output), "--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    job = next(line for line in done.stdout.splitlines() if "submitted as job" in line).split()[-1]
    wait_for(lambda: steps_done(output) > 2, "the first steps")
    subprocess.run(["scontrol", "requeue", job], env=cluster, check=True)
    wait_for(lambda: list(output.glob("records/vil-*-failed-1.json")), "an interrupted record")
    assert steps_done(output) < 30
    wait_for(lambda: list(output.glob("records/vil-??????????.json")), "the row's record")
    (path,) = output.glob("records/vil-??????????.json")
    entry = json.loads(path.read_text())
    assert entry["training"]["resumed"] == 1
    # The report comes with the command that submitted, without the launcher.
    assert "0 of 1 rows to run" in run_apart(cluster, "--output", str(output)).stdout

    assert run_apart(cluster, "--output", str(undisturbed), "--no-report").returncode == 0
    (ours,), (theirs,) = (map(load_file, o.glob("weights/*.pth")) for o in (output, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slurm
@pytest.mark.parametrize(
    "parameters", ["slurm_partition=nowhere", "gpus_per_node=1", "slurm_time=nonsense"]
)
def test_what_slurm_refuses_is_one_line(
    cluster: dict[str, str],
    tmp_path: Path,
    parameters: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    launch = ["--launcher", "slurm", "--slurm", parameters]
    assert run_all.main([*TINY, "--output", str(tmp_path), *launch]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("run_all.py: error: --launcher slurm: sbatch: error:")
    assert "\n" not in error
