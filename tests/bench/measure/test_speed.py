"""Two commits are compared in turns, and only where their results agree."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from bench import cli
from bench.measure import latency, speed

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=False, capture_output=True
    ).returncode
    != 0,
    reason="needs a git checkout with a commit",
)

# The process of the base commit runs in a folder called so.
MECHANISM = """
from pathlib import Path
import torch
from torch import nn

class Mixed(nn.Module):
    positions = ("absolute",)

    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.is_base = Path.cwd().name == "base"

    def forward(self, x, grid):
        return self.proj(x)

class Sloppy(Mixed):
    def forward(self, x, grid):
        return self.proj(x) * (1.0 if self.is_base else 1.01)

class Hungry(Mixed):
    def forward(self, x, grid):
        copies = [x.repeat(1, 9, 1).sum() for _ in range(self.is_base)]
        return self.proj(x) + sum(copies) * 0

class Fails(Mixed):
    def forward(self, x, grid):
        if not self.is_base:
            raise RuntimeError("not any more")
        return self.proj(x)
"""
SMALL = "--backbone quick --image-size 64 --stages 1 --repeats 6 --seconds 0"


def compared(tmp_path, capsys, names, expected):
    path = tmp_path / "mine.py"
    path.write_text(MECHANISM)
    attention = ",".join(f"{path}:{name}" for name in names)
    code = cli.main(
        [
            *f"speed --base HEAD {SMALL} --mode training --format json".split(),
            *("--attention", attention, "--output", str(tmp_path / "out")),
        ]
    )
    assert code == expected
    lines = json.loads(capsys.readouterr().out)
    return {line["mechanism"].rpartition(":")[2]: line for line in lines}


def test_ratios_are_given_where_results_agree_and_only_there(tmp_path, capsys):
    lines = compared(tmp_path, capsys, ["Mixed", "Sloppy", "Hungry", "Fails", "Mixed"], 1)
    assert lines["Mixed"]["low"] <= lines["Mixed"]["speedup"] <= lines["Mixed"]["high"]
    assert lines["Mixed"]["memory_ratio"] == 1
    assert lines["Mixed"]["samples"] >= 6
    assert lines["Hungry"]["memory_ratio"] < 0.5
    assert "results differ by 1.0e-02" in lines["Sloppy"]["not_compared"]
    assert "now: RuntimeError: not any more" in lines["Fails"]["not_compared"]
    assert "speedup" not in lines["Sloppy"]
    assert "speedup" not in lines["Fails"]
    written = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert len(written["cases"][0]["seconds"]["base"]) == lines["Mixed"]["samples"]
    assert len(written["base"]) == 40


def test_cases_are_the_shapes_of_the_stages():
    found = list(speed.cases(["ViL", "performer"], stages=[1, 3], modes=["training"]))
    assert [(c.mechanism, c.stage, c.position) for c in found] == [
        ("ViL", 1, "relative"),
        ("ViL", 1, "absolute"),
        ("ViL", 3, "relative"),
        ("ViL", 3, "absolute"),
        ("performer", 1, "absolute"),
        ("performer", 3, "absolute"),
    ]
    assert found[0].spec["grid"] == (200, 336)
    assert found[2].spec == {
        "name": "longformer",
        "grid": (50, 84),
        "position": "relative",
        "block_index": 1,
        "dim": 384,
        "num_heads": 6,
        "num_global": 1,
        "window": 7,
    }


def test_a_ratio_is_of_one_round():
    case = speed.Case("full", 1, "absolute", "inference", {"grid": (2, 3), "dim": 8})
    times = {"base": [3.0, 6.0, 9.0], "now": [1.0, 2.0, 3.0]}
    found = speed.Comparison(case, seconds=times, memory={"base": 10, "now": 5})
    assert found.ratios == (3.0, 3.0, 3.0)
    line = found.line()
    assert (line["speedup"], line["low"], line["high"]) == (3.0, 3.0, 3.0)
    assert line["memory_ratio"] == 0.5
    assert latency.median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)


def test_the_bound_is_of_products_or_of_bytes_by_the_peaks():
    (case,) = speed.cases(["swin"], stages=[4], positions=["absolute"], modes=["training"])
    products, moved = speed.least_work(case, 2)
    # 28 x 42 tokens after padding to windows of 7, seen by 49 keys; no global tokens.
    assert products == 3 * 2 * (2 * 28 * 42 * 49 * 768 + 4 * 25 * 42 * 768**2)
    assert moved == 4 * (5 * 2 * 25 * 42 * 768 + 3 * (4 * 768**2 + 4 * 768))
    times = {"base": [2.0], "now": [1.0]}
    for peaks, bound in (((products, 4 * moved), 1.0), ((4 * products, moved / 2), 2.0)):
        named = dict(zip(("multiply_adds_per_s", "bytes_per_s"), peaks, strict=True))
        found = speed.Comparison(
            case,
            seconds=times,
            memory={"base": 1, "now": 1},
            peaks=named,
            multiply_adds=products,
            bytes_moved=moved,
        )
        assert found.line()["times_bound"] == pytest.approx(1 / bound)
        assert found.bound_with_linear == found.bound
        # Half of the products are in linear layers, which take two seconds.
        slow = {"seconds": 2.0, "multiply_adds": products / 2}
        slower = dataclasses.replace(found, linear=slow).line()
        assert slower["bound_with_linear_s"] == 2.0 + products / 2 / peaks[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "no-such-commit"], "--base no-such-commit: no such commit"),
        (["--base", "HEAD", "--stages", "5"], "--stages 5: there are 4 stages"),
        (["--base", "HEAD", "--attention", "fulll"], "did you mean 'full'"),
        (["--base", "HEAD", "--attention", "performer", "--position", "relative"], "no case"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, refusal):
    assert said in refusal(cli.main, "speed", *arguments)
