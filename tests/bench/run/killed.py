"""Kill training again and again, and see whether it ends as if nothing had happened.

A program of its own: `python killed.py FOLDER MODEL KILLS SEED` prints a line of JSON, the digests
of the undisturbed run and of every killed and resumed one. Each run is a fork of this process,
which never runs a backward pass itself: autograd does not survive a fork.
"""

import hashlib
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from bench.config.schema import DataConfig, RunConfig, TrainConfig
from bench.config.suites import load_suite
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.model import build as models
from bench.run import checkpoints
from bench.run.checkpoints import Checkpoints
from bench.run.train import train
from bench.system import devices

STEPS = {"brightness": 8, "performer": 5}
# Where a run is killed: after a step, at a moment of a checkpoint's writing, or at any time.
KINDS = ("step", "half written", "written", "before the name", "after the name", "time")


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


def build(model: str, dataset: CocoDataset) -> nn.Module:
    torch.manual_seed(3)
    if model == "brightness":
        return Brightness()
    # Redrawn features and dropped paths: random states of every kind.
    overrides = ["model.options.redraw_interval=2", "model.drop_path=0.2"]
    config = load_suite("quick", rows=["performer"], device="cpu", overrides=overrides).runs[0]
    return models.build_detector(config, dataset.num_classes)


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: object, name: str, number: int, *, before: bool) -> None:
    """Kill this process before or after the call of `owner.name` with this number."""
    original: Callable[..., object] = getattr(owner, name)
    calls = 0

    def patched(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if before and calls == number:
            kill()
        result = original(*arguments)
        if calls == number:
            kill()
        return result

    setattr(owner, name, patched)


def in_checkpoint(number: int) -> None:
    """Kill this process in the middle of writing the checkpoint with this number."""
    original, files = checkpoints._Summed.write, []

    def write(file: checkpoints._Summed, content: object) -> int:
        files.append(file)
        if len(set(map(id, files))) == number and files.count(file) == 5:
            kill()
        return original(file, content)

    checkpoints._Summed.write = write  # type: ignore[method-assign]


def plan_kill(kind: str, number: int) -> None:
    if kind == "half written":
        in_checkpoint(number)
    if kind == "written":
        on_call(os, "fsync", number, before=True)
    if kind in ("before the name", "after the name"):
        on_call(Path, "replace", number, before=kind.startswith("before"))


def digest(value: object) -> str:
    """Of all tensors and numbers in nested containers, in order."""
    return hashlib.sha256(
        repr(apply_to_collection(value, Tensor, Tensor.tolist)).encode()
    ).hexdigest()


def run(folder: Path, model: str, dataset: CocoDataset, kind: str = "", number: int = 0) -> None:
    plan_kill(kind, number)
    detector = build(model, dataset)

    def progress(step: int, loss: float) -> None:
        del loss
        if kind == "step" and step == number:
            kill()

    _, log = train(
        detector,
        dataset,
        fabric=devices.make_fabric(RunConfig(device="cpu")),
        config=TrainConfig(
            steps=STEPS[model],
            batch_size=2,
            accumulate=2,
            lr=1e-3,
            clip_norm=1.0,
            warmup_steps=2,
            log_every=3,
            checkpoint_every=1,
            decay="cosine",
        ),
        data=DataConfig(),
        seed=5,
        checkpoints=Checkpoints(folder / "checkpoints"),
        progress=progress,
    )
    (folder / "digest").write_text(digest([detector.state_dict(), log.losses, log.steps]))


def forked(*arguments: object, patience: float | None = None) -> bool:
    """Run in a fork; after `patience` seconds it is killed. Return whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run(*arguments)  # type: ignore[arg-type]
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a run failed: {arguments}")
    return os.WIFSIGNALED(status)


def main(root: Path, model: str, kills: int, seed: int) -> dict[str, object]:
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    data = generate(root / "data", train_images=9, val_images=1, image_size=(64, 64))
    dataset = CocoDataset(data, "train2017")
    draw = random.Random(seed)
    start = time.monotonic()
    (root / "whole").mkdir()
    forked(root / "whole", model, dataset)
    whole = time.monotonic() - start
    runs = []
    while len(runs) < kills:
        folder = root / f"killed-{len(runs)}"
        folder.mkdir(exist_ok=True)
        kind, number = KINDS[len(runs) % len(KINDS)], draw.randint(1, STEPS[model] - 1)
        patience = draw.uniform(0.2, 0.9) * whole if kind == "time" else None
        killed = forked(folder, model, dataset, kind, number, patience=patience)
        left = sorted(path.name for path in (folder / "checkpoints").glob("*"))
        # Sometimes it is killed once more, on the way to its end.
        twice = draw.random() < 0.3 and forked(folder, model, dataset, "step", STEPS[model] - 1)
        forked(folder, model, dataset)
        runs.append(
            {
                "kind": kind,
                "number": number,
                "killed": killed,
                "twice": twice,
                "left": left,
                "digest": (folder / "digest").read_text(),
                "at the end": sorted(p.name[:13] for p in (folder / "checkpoints").glob("*")),
            }
        )
    return {
        "undisturbed": (root / "whole" / "digest").read_text(),
        "at the end": [f"step-{step:08d}" for step in (STEPS[model] - 1, STEPS[model])],
        "runs": runs,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
