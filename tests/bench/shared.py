"""Train a small detector in one process or as one of several; the first saves its weights.

A program of its own: `python shared.py DATA FILE DEVICES ACCUMULATE ROW METHOD LIBRARY`.
"""

import sys
from pathlib import Path

import torch

from bench.config.schema import RunConfig
from bench.config.suites import load_suite
from bench.data.coco import CocoDataset
from bench.model import build as models
from bench.run.checkpoints import Checkpoints
from bench.run.train import train
from bench.system.devices import make_fabric
from bench.system.logs import StepLog, read_steps


def config(row: str, method: str, library: str, devices: int, accumulate: int) -> RunConfig:
    options = [
        f"model.method={method}", f"model.library={library}", "model.drop_path=0.2",
        "train.steps=4", "train.batch_size=4", "train.lr=0.001", "train.warmup_steps=2",
        f"train.devices={devices}", f"train.accumulate={accumulate}",
    ]  # fmt: skip
    if row == "performer":
        options.append("model.options.redraw_interval=2")
    return load_suite("quick", rows=[row], device="cpu", overrides=options).runs[0]


def main(data: str, file: str, devices: int, accumulate: int, model: list[str]) -> None:
    torch.set_num_threads(1)
    run = config(*model, devices=devices, accumulate=accumulate)
    dataset = CocoDataset(data, "train2017")
    fabric = make_fabric(run)
    detector = models.build_detector(run, dataset.num_classes)
    step_log = StepLog(Path(file).with_suffix(f".{fabric.global_rank}.jsonl"))
    train(
        detector,
        dataset,
        fabric=fabric,
        config=run.train,
        data=run.data,
        seed=5,
        checkpoints=Checkpoints(Path(file).with_suffix(".checkpoints")),
        progress=lambda *_: None,
        step_log=step_log,
    )
    if fabric.is_global_zero:
        steps = [
            {name: entry[name] for name in ("total", "gradient_norm", "lr")}
            for entry in read_steps(step_log.path)
        ]
        torch.save({"weights": detector.state_dict(), "steps": steps}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
