"""The training loop: its schedule, and that a resumed run is the undisturbed one."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.checkpoints import Checkpoints
from bench.config import DataConfig, RunConfig, TrainConfig
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.errors import InputError
from bench.runner import make_fabric
from bench.train import DivergedError, learning_rate, step_seed, train

STEPS = 7


class Brightness(nn.Module):
    """A "detector" of two losses that draws random numbers, as real ones do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3, 2)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        mean = torch.stack([image.mean(dim=(1, 2)) for image in images])
        out = self.layer(nn.functional.dropout(mean, 0.5, self.training))
        counts = torch.tensor([float(len(target["boxes"])) for target in targets])
        return {"count": (out[:, 0] - counts).square().mean(), "size": out[:, 1].square().mean()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    root = generate(tmp_path_factory.mktemp("data") / "set", train_images=9, val_images=1)
    return CocoDataset(root, "train2017")


def run(
    dataset: CocoDataset, folder: Path, *, stop_after: int | None = None, **changes: object
) -> dict[str, object]:
    config = dataclasses.replace(
        TrainConfig(
            steps=STEPS,
            batch_size=2,
            lr=0.1,
            warmup_steps=2,
            log_every=3,
            checkpoint_every=2,
            decay="cosine",
        ),
        **changes,  # type: ignore[arg-type]
    )

    class StopError(Exception):
        pass

    def progress(step: int, loss: float) -> None:
        del loss
        if step == stop_after:
            raise StopError

    detector = Brightness()
    try:
        _, log = train(
            detector,
            dataset,
            fabric=make_fabric(RunConfig(device="cpu")),
            config=config,
            data=DataConfig(),
            seed=5,
            checkpoints=Checkpoints(folder),
            progress=progress,
        )
    except StopError:
        return {}
    return {"weights": detector.state_dict(), "losses": log.losses, "resumed": log.resumed}


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_at_any_step_ends_in_the_same_weights_and_losses(
    dataset: CocoDataset, tmp_path: Path, stop: int
) -> None:
    whole = run(dataset, tmp_path / "whole")
    run(dataset, tmp_path / "parts", stop_after=stop)
    resumed = run(dataset, tmp_path / "parts")
    for name, value in whole["weights"].items():  # type: ignore[attr-defined]
        assert torch.equal(resumed["weights"][name], value), name  # type: ignore[index]
    assert resumed["losses"] == whole["losses"]
    assert resumed["resumed"] == (1 if stop >= 2 else 0)


def test_a_broken_checkpoint_falls_back_to_the_one_before(
    dataset: CocoDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(dataset, tmp_path / "whole")
    run(dataset, tmp_path / "parts", stop_after=5)
    newest = sorted((tmp_path / "parts").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:200])
    resumed = run(dataset, tmp_path / "parts")
    assert "broken" in caplog.text
    assert newest.name in caplog.text
    assert resumed["losses"] == whole["losses"]


def test_the_newest_two_checkpoints_are_kept(dataset: CocoDataset, tmp_path: Path) -> None:
    run(dataset, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000006.pt",
        "step-00000007.pt",
    ]


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write checkpoint"):
        Checkpoints(tmp_path / "file" / "folder").save({"step": torch.tensor(1)}, 1)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"step \d+ on images \d+, \d+"):
        run(dataset, tmp_path, lr=1e30, warmup_steps=0, clip_norm=0.0)


def test_the_rate_warms_up_and_falls_at_the_milestones() -> None:
    config = TrainConfig(
        steps=100, lr=2.0, warmup_steps=10, warmup_factor=0.01, milestones=[60, 80]
    )
    assert learning_rate(0, config) == pytest.approx(0.02)
    assert learning_rate(5, config) == pytest.approx(2.0 * 0.505)
    assert learning_rate(10, config) == 2.0
    assert learning_rate(59, config) == 2.0
    assert learning_rate(60, config) == pytest.approx(0.2)
    assert learning_rate(99, config) == pytest.approx(0.02)


def test_a_cosine_ends_near_nothing() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup_steps=0, decay="cosine")
    assert learning_rate(0, config) == 1.0
    assert learning_rate(50, config) == pytest.approx(0.5)
    assert 0 < learning_rate(99, config) < 0.001


def test_steps_and_seeds_give_different_random_states() -> None:
    seeds = {step_seed(seed, step) for seed in range(10) for step in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= value < 2**63 for value in seeds)
