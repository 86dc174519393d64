"""What can go wrong while training, and that nothing is lost by it."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.config.schema import DataConfig, RunConfig, TrainConfig
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.errors import DivergedError, InputError
from bench.run.checkpoints import Checkpoints
from bench.run.train import TrainingLog, train
from bench.system.devices import make_fabric
from bench.system.interrupt import EXIT_CODE, StopRequest, raised_where_it_arrives
from tests.processes import ONE_THREAD, ROOT, python

HERE = Path(__file__).parent
STEPS = 6


def killed_runs(folder: Path, model: str, kills: int, *, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(python(HERE / "killed.py", folder, model, kills, seed))
    return result


@pytest.mark.parametrize(
    ("model", "kills"),
    [
        ("brightness", 12),
        pytest.param("performer", 2, marks=pytest.mark.slow),
        pytest.param("performer", 24, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_ends_in_the_very_same_weights(
    tmp_path: Path, model: str, kills: int
) -> None:
    result = killed_runs(tmp_path, model, kills, seed=7)
    runs = result["runs"]
    assert len(runs) == kills
    # Those at any time may come too late; all others must have been killed.
    assert all(run["killed"] for run in runs if run["kind"] != "time")
    for run in runs:
        assert run["digest"] == result["undisturbed"], run
        # Half a checkpoint is gone at the end.
        assert run["at the end"] == result["at the end"]
    if kills > 6:
        assert any(name.endswith(".tmp") for run in runs for name in run["left"])
        assert Counter(run["kind"] for run in runs)["half written"] == kills // 6


class Meddled(nn.Module):
    """A linear "detector" whose losses a test meddles with, by its call."""

    def __init__(self, meddle: Callable[[int, Tensor], Tensor] = lambda _, loss: loss) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3, 1)
        self.meddle = meddle
        # A set, which no checkpoint keeps.
        self.called: set[int] = set()
        self.before: list[Tensor] = []

    @property
    def calls(self) -> int:
        return len(self.called)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        del targets
        self.before = [p.detach().clone() for p in self.parameters()]
        mean = torch.stack([image.mean(dim=(1, 2)) for image in images])
        loss = (self.layer(mean)[:, 0].float() - 1).square().mean()
        self.called.add(self.calls)
        return {"loss": self.meddle(self.calls, loss)}


class InfiniteGradient(torch.autograd.Function):
    """The loss as it is, with a gradient that is none."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        del ctx
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return gradient * float("inf")


def run(
    dataset: CocoDataset,
    folder: Path,
    detector: nn.Module,
    *,
    fabric: Fabric | None = None,
    workers: int = 0,
    identity: dict[str, str] | None = None,
    progress: Callable[[int, float], None] = lambda *_: None,
    **changes: Any,
) -> TrainingLog:
    values: dict[str, Any] = {
        "steps": STEPS, "batch_size": 4, "accumulate": 2, "lr": 0.1, "warmup_steps": 0,
        "checkpoint_every": 1, "decay": "cosine", "clip_norm": 1.0,
    }  # fmt: skip
    if fabric is not None:
        values["precision"] = "16-mixed"
    _, log = train(
        detector,
        dataset,
        fabric=fabric or make_fabric(RunConfig(device="cpu")),
        config=TrainConfig(**(values | changes)),
        data=DataConfig(workers=workers),
        seed=5,
        checkpoints=Checkpoints(folder, identity=identity),
        progress=progress,
    )
    return log


def weights(detector: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in detector.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_no_weight_and_names_its_images(
    dataset: CocoDataset, tmp_path: Path, value: float
) -> None:
    seen: list[list[int]] = []

    class Watched(Meddled):
        def forward(self, images: Any, targets: Any) -> dict[str, Tensor]:
            seen.append([int(target["image_id"]) for target in targets])
            return super().forward(images, targets)

    # The second part of the fourth step.
    detector = Watched(lambda call, loss: loss * value if call == 8 else loss)
    with pytest.raises(DivergedError, match=r"the loss was (nan|inf) at step 3") as caught:
        run(dataset, tmp_path, detector)
    assert same(weights(detector), detector.before)
    assert all(p.grad is None for p in detector.parameters())
    assert f"at step 3 on images {', '.join(map(str, seen[-1]))};" in str(caught.value)
    assert not set(seen[-2]) & set(seen[-1])
    state = Checkpoints(tmp_path).latest()
    assert state is not None
    assert state["log"]["steps"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())
    # What was wrong is mended: it goes on from there to the end of an undisturbed run.
    mended, undisturbed = Meddled(), Meddled()
    run(dataset, tmp_path, mended)
    run(dataset, tmp_path / "undisturbed", undisturbed)
    assert same(weights(mended), weights(undisturbed))


def test_an_infinite_gradient_of_a_finite_loss_changes_no_weight(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    detector = Meddled(
        lambda call, loss: InfiniteGradient.apply(loss) if call == 5 else loss  # type: ignore[no-untyped-call]
    )
    with pytest.raises(DivergedError, match=r"gradient's norm was (inf|nan) at step 2 on images"):
        run(dataset, tmp_path, detector, clip_norm=0.0)
    assert same(weights(detector), detector.before)


def half_precision(scale: float) -> Fabric:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)
    return Fabric(accelerator="cpu", devices=1, plugins=[plugin])


def test_an_overflow_in_half_precision_skips_the_step_and_goes_on(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    """A scale that is too large at first is normal; the scaler finds its own."""
    parameters: list[list[Tensor]] = []
    detector = Meddled()
    log = run(
        dataset,
        tmp_path,
        detector,
        fabric=half_precision(2.0**19),
        progress=lambda *_: parameters.append(weights(detector)),
    )
    assert 0 < log.skipped < STEPS
    assert same(parameters[0], weights(Meddled()))
    assert not same(parameters[-1], parameters[0])
    assert all(p.isfinite().all() for p in parameters[-1])


def test_the_scale_of_half_precision_is_resumed(dataset: CocoDataset, tmp_path: Path) -> None:
    whole = Meddled()
    log = run(dataset, tmp_path / "whole", whole, fabric=half_precision(2.0**19))

    def stop(step: int, _: float) -> None:
        if step == 1:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        run(
            dataset,
            tmp_path / "parts",
            Meddled(),
            fabric=half_precision(2.0**19),
            progress=stop,
        )
    resumed = Meddled()
    log_of_parts = run(dataset, tmp_path / "parts", resumed, fabric=half_precision(2.0**4))
    assert log_of_parts.skipped == log.skipped > 1
    assert same(weights(resumed), weights(whole))


def test_gradients_that_overflow_at_every_scale_end_the_run(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    detector = Meddled(lambda _, loss: InfiniteGradient.apply(loss))  # type: ignore[no-untyped-call]
    with pytest.raises(DivergedError, match="gradient's norm"):
        run(dataset, tmp_path, detector, fabric=half_precision(2.0**-18), steps=9)
    assert same(weights(detector), weights(Meddled()))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    """In the middle of a tensor, where reading it raises nothing."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
@pytest.mark.parametrize("damaged", [1, 2])
def test_from_a_damaged_checkpoint_it_falls_back_to_the_one_before(
    dataset: CocoDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    damaged: int,
) -> None:
    undisturbed = Meddled()
    run(dataset, tmp_path, undisturbed)
    files = sorted(tmp_path.glob("step-*.pt"))
    for path in files[-damaged:]:
        damage(path)
    resumed = Meddled()
    log = run(dataset, tmp_path, resumed)
    assert caplog.text.count("is broken") == damaged
    assert files[-1].name in caplog.text
    # With both damaged it starts anew.
    assert (log.resumed, resumed.calls) == ((1, 2) if damaged == 1 else (0, 2 * STEPS))
    assert same(weights(resumed), weights(undisturbed))


def test_a_checkpoint_of_another_configuration_is_passed_over(
    dataset: CocoDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(dataset, tmp_path, Meddled(), identity={"configuration": "one"})
    other = Meddled()
    log = run(dataset, tmp_path, other, identity={"configuration": "another"}, lr=0.2)
    assert "of another configuration" in caplog.text
    assert (log.resumed, other.calls) == (0, 2 * STEPS)


def test_a_checkpoint_of_other_annotations_is_passed_over(
    dataset: CocoDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(dataset, tmp_path / "run", Meddled())
    root = generate(tmp_path / "other", train_images=8, val_images=1)
    log = run(CocoDataset(root, "train2017"), tmp_path / "run", Meddled())
    assert "of another annotations" in caplog.text
    assert log.resumed == 0


def test_a_checkpoint_that_does_not_fit_the_detector_is_one_clear_line(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    run(dataset, tmp_path, Meddled())
    changed = Meddled()
    changed.layer = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"step 6 does not fit the detector.*size mismatch") as got:
        run(dataset, tmp_path, changed)
    assert "\n" not in str(got.value)


def test_on_a_full_disk_the_checkpoints_before_stay(
    dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # As torch.save, which cannot close its archive then.
            raise RuntimeError("unexpected pos 704 vs 598") from error

    def fill(step: int, _: float) -> None:
        if step == 4:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(InputError, match=r"cannot write checkpoint .*step-00000005.*No space left"):
        run(dataset, tmp_path, Meddled(), progress=fill)
    assert sorted(path.name[:13] for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]
    monkeypatch.undo()
    resumed, undisturbed = Meddled(), Meddled()
    assert run(dataset, tmp_path, resumed).resumed == 1
    run(dataset, tmp_path / "undisturbed", undisturbed)
    assert same(weights(resumed), weights(undisturbed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
# In the middle of the third step, and of the last.
@pytest.mark.parametrize(("told", "after"), [(5, 4), (2 * STEPS - 1, STEPS)])
def test_told_to_stop_it_finishes_the_step_and_leaves_a_checkpoint(
    dataset: CocoDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
    told: int,
    after: int,
) -> None:
    def tell(call: int, loss: Tensor) -> Tensor:
        if call == told:
            os.kill(os.getpid(), number)
        return loss

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {after}"):
        run(dataset, tmp_path, Meddled(tell), checkpoint_every=1000)
    assert "stopping after this step" in caplog.text
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert [path.name[:13] for path in tmp_path.iterdir()] == [f"step-{after:08}"]
    resumed, undisturbed = Meddled(), Meddled()
    log = run(dataset, tmp_path, resumed, checkpoint_every=1000)
    run(dataset, tmp_path / "undisturbed", undisturbed)
    assert (log.resumed, resumed.calls) == (int(after < STEPS), 2 * (STEPS - after))
    assert same(weights(resumed), weights(undisturbed))


def test_a_second_signal_ends_at_once() -> None:
    child = os.fork()
    if child == 0:
        logging.disable()
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        os._exit(0)
    start = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == EXIT_CODE
    assert time.monotonic() - start < 10


class Interrupted(TorchDispatchMode):
    """Interrupts each operator, where an error can end the process."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self.done = done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        signal.raise_signal(signal.SIGINT)
        self.done.append("within")
        return func(*args, **(kwargs or {}))


def interrupted_operator(done: list[str]) -> None:
    with Interrupted(done):
        torch.ones(2)


def interrupted_callback(done: list[str]) -> None:
    done.append("within")
    weakref.finalize(torch.ones(2), signal.raise_signal, signal.SIGINT)


@pytest.mark.parametrize("interrupted", [interrupted_operator, interrupted_callback])
def test_an_interrupt_is_neither_lost_nor_raised_within_an_operator(
    interrupted: Callable[[list[str]], None],
) -> None:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    done: list[str] = []
    try:
        with raised_where_it_arrives(signal.SIGINT):
            interrupted(done)
            time.sleep(30)
            done.append("lost")
    except KeyboardInterrupt:
        done.append("arrived")
    finally:
        after = signal.signal(signal.SIGINT, usual)
    assert after is signal.default_int_handler
    assert done == ["within", "arrived"]


def test_ctrl_c_ends_what_workers_are_forked_from_in_silence() -> None:
    meddled = "import bench.measure.forked_from, os, time; os.kill(os.getpid(), 2); time.sleep(30)"
    done = subprocess.run(
        [sys.executable, "-c", meddled],
        env=os.environ | ONE_THREAD,
        capture_output=True,
        timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("command", [("-m", "bench"), (str(ROOT / "run_all.py"),)])
def test_ctrl_c_while_libraries_are_imported_is_one_line(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    # In the place of one that all commands import.
    meddled = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    (tmp_path / "pydantic.py").write_text(meddled)
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        env=os.environ | ONE_THREAD | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=100,
        # Shells make what they start in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "", "interrupted\n")
