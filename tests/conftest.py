import gc
import importlib.util
import os
import shutil

import hypothesis
import pytest
import torch

from bench import cgroups

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# The tests' tensors are small: threads wait for each other, and on a machine that does anything
# else besides, two of them take thirty times as long as one.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow too")


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not config.getoption("--run-slow"):
        reasons["slow"] = "slow, or in part tested faster elsewhere; run with --run-slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = f"needs a CUDA device; torch {torch.__version__} sees none"
    if importlib.util.find_spec("detectron2") is None:
        reasons["detectron2"] = "detectron2 is not importable"
    needed = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)
    ]
    if needed:
        reasons["slurm"] = f"needs Slurm: no {', '.join(needed)}; install slurm-wlm and munge"
    elif os.geteuid() != 0:
        reasons["slurm"] = "needs to be root, which starts Slurm's daemons"
    elif importlib.util.find_spec("submitit") is None:
        reasons["slurm"] = "submitit is not importable"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    # What is imported stays: each collection, and there is one before every measure of memory,
    # would look through it again for a quarter of a second.
    gc.collect()
    gc.freeze()


@pytest.fixture
def refusal(capsys):
    """Run what has to end with exit code 2, and return the one line that it says.

    Nothing else is printed, unless `begun`: it was known only after a command had begun.
    """

    def run(main, *words, begun=False):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        printed = capsys.readouterr()
        assert begun or printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    return run


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Put this process into made-up groups: a line of /proc/self/cgroup, and files by folder."""

    def put(line, groups):
        (tmp_path / "process").write_text("9:name=systemd:/elsewhere\n" + line + "\n")
        for group, files in groups.items():
            (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "groups" / group / name).write_text(text + "\n")
        monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "groups")
        monkeypatch.setattr(cgroups, "_OF_PROCESS", tmp_path / "process")

    return put
