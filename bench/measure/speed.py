"""Mechanisms of two commits against each other: the same call, in turns, in one process tree.

Absolute times depend on the machine and on what else it does. Here a process of each commit waits
for its turn, one call a round, every other round in reverse, and only ratios are reported, each
with the interval of its median, and beside them how far the time now is from a bound: what the
multiply-adds of the mechanism's formula, or the bytes that any implementation moves, take at the
peaks measured in the same process before and after the case. The peak of products is that of one
shape: other shapes may reach more, and fall below the bound, or less, as linear layers do; a second
bound takes these as long as they take alone. Before anything is timed, both get the same
weights, input and incoming gradient and must give the same output and gradients; where they do not,
no ratio is given.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import attentions
from bench.config.arch import parse
from bench.config.schema import MODES
from bench.config.suites import profile_configs
from bench.errors import InputError
from bench.measure import latency
from bench.model.build import on_meta

ROOT = Path(__file__).resolve().parents[2]
# The largest difference of equal results in float32, relative to the largest value of each tensor:
# gradients of biases are sums over all tokens in another order.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A mechanism where it stands in a backbone.

    Attributes:
        mechanism: its name.
        stage: of the backbone, from 1.
        position: "absolute" or "relative".
        mode: one of MODES; a training call is forward and backward.
        spec: keyword arguments of `attentions.build_for`.
    """

    mechanism: str
    stage: int
    position: str
    mode: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What a case took at the base commit and takes now.

    Attributes:
        case: what was run.
        reason: why there are no figures; empty where there are.
        difference: the largest of outputs and gradients, relative to the largest value.
        seconds: of each call, by side ("base", "now"), in the order of measurement.
        core_seconds: likewise, of the cores that the call used.
        memory: bytes at the peak above what was there before, by side.
        peaks: multiply-adds and bytes a second that the process of "now" reached.
        multiply_adds: of the mechanism's formula, three times for training: each product has two
            in the backward pass. What is made again is not in it; 0 for one without a formula.
        bytes_moved: input, output, parameters and their gradients, each as often as it must be
            read or written.
        linear: the linear layers of "now", each timed alone: their seconds and multiply-adds.
    """

    case: Case
    reason: str = ""
    difference: float | None = None
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    core_seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    multiply_adds: int = 0
    bytes_moved: int = 0
    linear: Mapping[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> float | None:
        """Seconds that these products and tensors take at the peaks, if counted."""
        if not self.multiply_adds:
            return None
        products = self.multiply_adds / self.peaks["multiply_adds_per_s"]
        return max(products, self.bytes_moved / self.peaks["bytes_per_s"])

    @property
    def bound_with_linear(self) -> float | None:
        """The bound, if the linear layers take as long as they do alone and the rest its peaks."""
        bound, peak = self.bound, self.peaks.get("multiply_adds_per_s", 0.0)
        if bound is None or not self.linear:
            return bound
        rest = max(0.0, self.multiply_adds - self.linear["multiply_adds"])
        return max(bound, self.linear["seconds"] + rest / peak)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Base over now, of each round: above 1 where it is faster now."""
        pairs = zip(self.seconds.get("base", ()), self.seconds.get("now", ()), strict=True)
        return tuple(base / now for base, now in pairs)

    def line(self) -> dict[str, Any]:
        """Plain values of a table's line."""
        case = self.case
        rows, columns = case.spec["grid"]
        found: dict[str, Any] = {
            "mechanism": case.mechanism,
            "stage": case.stage,
            "grid": f"{rows}x{columns}",
            "dim": case.spec["dim"],
            "position": case.position,
            "mode": case.mode,
            "not_compared": self.reason,
        }
        if self.reason:
            return found
        low, high = latency.median_interval(self.ratios)
        found |= {f"{side}_s": statistics.median(taken) for side, taken in self.seconds.items()}
        found |= {"speedup": statistics.median(self.ratios), "low": low, "high": high}
        found |= {f"{side}_bytes": size for side, size in self.memory.items()}
        for name, bound in (("bound", self.bound), ("bound_with_linear", self.bound_with_linear)):
            if bound is not None:
                found |= {f"{name}_s": bound, f"times_{name}": found["now_s"] / bound}
        found["memory_ratio"] = self.memory["now"] / max(1, self.memory["base"])
        return found | {"difference": self.difference, "samples": len(self.ratios)}


def cases(
    names: Sequence[str],
    *,
    backbone: str = "small",
    image_size: tuple[int, int] = (800, 1344),
    stages: Sequence[int] = (1, 2, 3, 4),
    positions: Sequence[str] = ("relative", "absolute"),
    modes: Sequence[str] = MODES,
) -> Iterator[Case]:
    """Yield every mechanism at every stage's shape, for the positions that it has.

    Raises:
        InputError: for an unknown name, or a stage that the backbone does not have.
    """
    for config in profile_configs(names, backbone=backbone, image_size=image_size):
        specs = parse(config.model.arch, config.model.attention)
        stride = 1
        for stage in specs:
            stride *= stage.patch
            factory = attentions.find(stage.attention)
            own = dict(config.model.options)
            option = getattr(factory, "arch_option", None)
            if option is not None:
                own.setdefault(option, stage.feature)
            rows, columns = (-(-side // stride) for side in image_size)
            # A stage of one block never shifts; the second block of one does, where there is any.
            block = 1 if stage.blocks > 1 else 0
            for position in positions:
                if stage.number not in stages or position not in getattr(
                    factory, "positions", ("absolute",)
                ):
                    continue
                spec = {
                    "name": stage.attention,
                    "grid": (rows, columns),
                    "position": position,
                    "block_index": block,
                    "dim": stage.dim,
                    "num_heads": stage.heads,
                    "num_global": stage.num_global,
                    **own,
                }
                for mode in modes:
                    yield Case(config.row, stage.number, position, mode, spec)
        if not set(stages) <= {stage.number for stage in specs}:
            raise InputError(
                f"--stages {','.join(map(str, stages))}: there are {len(specs)} stages"
            )


def commit_of(revision: str) -> str:
    """Return the full hash of a commit of this checkout.

    Raises:
        InputError: where there is no such commit, or no checkout.
    """
    try:
        found = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"--base {revision}: no such commit in the checkout of this package"
        ) from error
    return found.decode().strip()


def compare(
    chosen: Sequence[Case],
    base: str,
    *,
    effort: latency.Effort,
    batch_size: int = 1,
    seed: int = 0,
) -> Iterator[Comparison]:
    """Compare each case at commit `base` with the code of this checkout, in turns.

    A case has two processes of its own, so that it does not depend on the cases before it.

    A case that fails, at either commit, says why and costs no other.

    Args:
        base: a full commit hash; see `commit_of`.
        effort: how long to measure; `min_repeats` rounds at least.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = {"base": folder / "base", "now": folder / "now"}
        for tree in trees.values():
            tree.mkdir()
        with tarfile.open(fileobj=io.BytesIO(_git("archive", base, "attentions"))) as archive:
            archive.extractall(trees["base"], filter="data")
        for case in chosen:
            # New processes: an allocator that has freed large tensors gives later ones faster.
            with ExitStack() as started:
                sides = {side: started.enter_context(_Side(tree)) for side, tree in trees.items()}
                try:
                    yield _compare(case, sides, folder, effort, batch_size, seed)
                except _SideError as error:
                    yield Comparison(case, reason=str(error))


def _compare(
    case: Case,
    sides: Mapping[str, "_Side"],
    folder: Path,
    effort: latency.Effort,
    batch_size: int,
    seed: int,
) -> Comparison:
    weights = str(folder / "weights.pt")
    common = {"mode": case.mode, "batch_size": batch_size, "seed": seed, "weights": weights}
    for side, process in sides.items():
        process.ask("build", spec=dict(case.spec), save=side == "base", **common)
    apart = _difference(sides, folder)
    if not apart <= TOLERANCE:
        return Comparison(
            case,
            reason=f"results differ by {apart:.1e} of the largest value; no speed is reported",
            difference=apart,
        )
    # Of the base for nothing but that both have done the same before.
    sides["base"].ask("peaks")
    peaks = [sides["now"].ask("peaks")]
    memory = {side: int(process.ask("peak")) for side, process in sides.items()}
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    order = list(sides)
    for process in sides.values():
        process.ask("timed")
    while len(taken["base"]) < effort.max_repeats and any(
        len(found) < effort.min_repeats or sum(one["wall"] for one in found) < effort.min_seconds
        for found in taken.values()
    ):
        for side in order:
            taken[side].append(sides[side].ask("timed"))
        order.reverse()
    linear = sides["now"].ask("linear")
    peaks.append(sides["now"].ask("peaks"))
    multiply_adds, bytes_moved = least_work(case, batch_size)
    return Comparison(
        case,
        difference=apart,
        seconds={side: [one["wall"] for one in found] for side, found in taken.items()},
        core_seconds={side: [one["cores"] for one in found] for side, found in taken.items()},
        memory=memory,
        peaks={name: max(one[name] for one in peaks) for name in peaks[0]},
        multiply_adds=multiply_adds,
        bytes_moved=bytes_moved,
        linear=linear,
    )


def least_work(case: Case, batch_size: int) -> tuple[int, int]:
    """Multiply-adds and bytes that a call takes at least; see `Comparison`."""
    module: Any = on_meta(attentions.build_for, **case.spec)
    rows, columns = case.spec["grid"]
    tokens = batch_size * (case.spec["num_global"] + rows * columns)
    layer, parameters = (
        4 * tokens * case.spec["dim"],
        4 * sum(p.numel() for p in module.parameters()),
    )
    count = getattr(module, "multiply_adds", lambda _grid: 0)
    products = batch_size * int(count((rows, columns)))
    if case.mode == "inference":
        return products, 2 * layer + parameters
    # The input is read in both passes, and so are parameters; their gradients are written.
    return 3 * products, 5 * layer + 3 * parameters


def _difference(sides: Mapping[str, "_Side"], folder: Path) -> float:
    found = []
    for side, process in sides.items():
        path = folder / f"{side}.pt"
        process.ask("results", path=str(path))
        found.append(torch.load(path, weights_only=True))
    base, now = found
    if set(base) != set(now):
        return float("inf")
    worst = 0.0
    for name, expected in base.items():
        gap = float((now[name] - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
        worst = max(worst, gap) if gap == gap else float("inf")
    return worst


class _SideError(RuntimeError):
    """What a process answered instead of a result."""


class _Side:
    """A process with the mechanisms of the checkout in `tree`, or of this one if it is empty."""

    def __init__(self, tree: Path) -> None:
        self.name = tree.name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.measure.speed_worker"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request and return what was found.

        Raises:
            _SideError: for an error in the process, or its end.
        """
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise _SideError(f"the process of {self.name} has no pipes")
        try:
            requests.write(json.dumps({"do": do, **request}) + "\n")
            requests.flush()
            line = answers.readline()
        except OSError:
            line = ""
        if not line:
            raise _SideError(
                f"the process of {self.name} was killed, most likely for want of memory"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise _SideError(f"{self.name}: {answer['error']}")
        return answer["found"]


def _git(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True
    ).stdout
