"""Pretraining: a classifier trained, evaluated and kept, to start detectors from.

It is a run as any other, with the loop, checkpoints, logs and records of `runner` and `train`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from bench import record
from bench.config.schema import RunConfig
from bench.data import classes
from bench.data.check import class_remarks
from bench.data.classes import ClassDataset
from bench.data.loader import clear_worker_errors
from bench.files import sha256, write_whole
from bench.measure.flops import NotCountedError, count_flops
from bench.model import build as models
from bench.model import classifier
from bench.model.optimizer import schedule_notes
from bench.model.weights import load_file, load_published, save_file
from bench.record import Record
from bench.run.evaluate import Progress
from bench.run.runner import Run
from bench.run.train import Task, TrainingLog, train_task
from bench.system.logs import run_log, table
from bench.system.seeding import in_one_order, seed_everything

LEVEL = 0.95
# Of a moving average, from which share on it is no longer that of what was trained.
_LEFT_OF_START = 0.01
# Settings that decide what a classifier sees of an image that it is evaluated on.
SIZE, CROP = "data.fixed_size", "classify.crop_share"
# The files of its mechanism.
MECHANISM = "mechanism"


class Pretraining(Run):
    """The phases of pretraining; weights are the backbone's alone, under their published names."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # Nothing is measured.
        self.phases.remove(self.measure)

    def read(self, root: Path) -> None:
        """Read the images to train on, and those to evaluate on."""
        self.images, val = classes.open_splits(root)
        self.splits: list[Any] = [val]
        self.recipe = classifier.recipe(self.config, len(self.images))
        self.notes += schedule_notes(self.config)
        left = (self.config.classify.average or 0.0) ** self.recipe.steps
        if left > _LEFT_OF_START:
            self.notes.append(
                f"{left:.0%} of the moving average that is evaluated and kept are weights of the"
                f" start (classify.average={self.config.classify.average:g},"
                f" {self.recipe.steps} steps)"
            )
        if self.config.data.path is not None:
            self.notes += class_remarks([self.images, val], self.config.data.deep_white)
        if self.step_log is not None:
            self.step_log.total = self.recipe.steps

    def build(self) -> None:
        """Build the classifier and count it."""
        config = self.config
        self.classifier = classifier.build_classifier(config, len(self.images.classes))
        vil = self.classifier.vil
        self.sections["parameters"] = models.parameters_section(vil)
        try:
            report = count_flops(vil, image_size=classes.image_size(config))
            self.sections["flops"] = dataclasses.asdict(report)
            self.notes += report.notes
        except NotCountedError as error:
            self.notes.append(f"FLOPs not counted: {error}")
        if config.train.init is not None:
            load_published(vil, load_file(Path(config.train.init)))
            self.notes.append(f"initialised from {config.train.init}")
        parameters = self.sections["parameters"]
        rows = [*parameters["by_part"].items(), ("total", parameters["total"])]
        run_log.info("model: %s; parameters:\n%s", config.model.attention, table(rows))
        run_log.info("images: %d of %d classes", len(self.images), len(self.images.classes))
        run_log.info("%d steps of %d images", self.recipe.steps, self.recipe.batch_size)

    def fit(self, progress: Callable[[int, float], None]) -> tuple[nn.Module, TrainingLog]:
        """Train the classifier; return it as Fabric wrapped it, and the log."""
        config, recipe, fabric = self.config, self.recipe, self.fabric
        optimizer = classifier.build_optimizer(self.classifier, recipe)
        rate = classifier.rates(config, recipe)

        def set_rate(step: int) -> float:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            return rate(step)

        task = Task(
            optimizer,
            set_rate,
            lambda start_step, pace: classes.training_batches(
                self.images,
                config,
                steps=recipe.steps,
                start_step=start_step,
                rank=fabric.global_rank,
                world_size=fabric.world_size,
                pace=pace,
            ),
            self.images.fingerprint,
        )
        return train_task(
            self.classifier,
            task,
            fabric=fabric,
            config=recipe,
            seed=config.seed,
            checkpoints=self.checkpoints,
            progress=progress,
            step_log=self.step_log,
            before_saving=partial(self.check_inputs, of_training=True),
        )

    def classes(self) -> list[Any]:
        """Return number and name of each class, as the record has them."""
        return [list(pair) for pair in enumerate(self.images.classes)]

    def score(self, split: Any, progress: Progress) -> dict[str, Any]:
        """Return the `evaluation` section of one split."""
        return evaluate(self.model, split, self.config, self.fabric, progress)

    def load(self, path: Path) -> None:
        """Load the weights that `save` wrote."""
        load_published(self.classifier.result, load_file(path))
        _put(path, self.output, self.config.row)
        self.model = self.fabric.setup_module(self.classifier)

    def save(self, path: Path) -> None:
        """Write the weights to a file, and to `ROW.pth`, which `--init` finds by its row."""
        count, recipe = len(self.images), self.recipe
        where = "generated images" if self.config.data.path is None else Path(self.images.folder)
        name = where if isinstance(where, str) else where.resolve().parent.name
        origin = (
            f"{name}, {len(self.images.classes)} classes,"
            f" {recipe.steps * recipe.batch_size / count:.3g} epochs of {count} images"
        )
        settings = {
            SIZE: [*classes.image_size(self.config)],
            CROP: self.config.classify.crop_share,
            **models.settings_of(self.config),
            MECHANISM: self.identity.inputs.get("mechanism", {}),
        }
        save_file(self.classifier.result.state_dict(), path, origin, self.images.classes, settings)
        _put(path, self.output, self.config.row)


def put_weights(records: Sequence[Record], output: Path) -> list[str]:
    """Let `ROW.pth`, which `--init` finds, be of these records; say where it cannot be.

    Another run of a row, with other settings, may have written it since.
    """
    notes = []
    for entry in records:
        kept = (entry.training or {}).get("weights")
        path = output / kept["path"] if kept else None
        if kept and path is not None and path.is_file() and sha256(path) == kept["sha256"]:
            _put(path, output, entry.row)
        elif (output / _name(entry.row)).is_file():
            notes.append(
                f"{output / _name(entry.row)} may be of another run of {entry.row}: the weights of"
                " the record are gone"
            )
    return notes


def _name(row: str) -> str:
    return f"{record.slug(row)}.pth"


def _put(path: Path, output: Path, row: str) -> None:
    target = output / _name(row)
    if not (target.is_file() and sha256(target) == sha256(path)):
        write_whole(target, path.read_bytes())


def evaluate(
    model: nn.Module,
    split: ClassDataset,
    config: RunConfig,
    fabric: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Return the `evaluation` section of a classifier on one split: top-1 and top-5 in percent."""
    model.eval()
    # What draws here too gives the same figures whatever ran before.
    seed_everything(config.seed)
    start = time.perf_counter()
    counts = torch.zeros(4, dtype=torch.float64, device=fabric.device)
    done = 0
    with torch.no_grad(), clear_worker_errors(), in_one_order(fabric.device):
        for images, targets in classes.evaluation_batches(
            split, config, rank=fabric.global_rank, world_size=fabric.world_size
        ):
            scores = model([image.to(fabric.device) for image in images])
            labels = torch.stack([target["label"] for target in targets]).to(fabric.device)
            counts += _right(scores, labels)
            done = min(done + len(images) * fabric.world_size, len(split))
            progress(done / len(split), f"evaluating {split.split}, image {done} of {len(split)}")
    if fabric.world_size > 1:
        counts = fabric.all_reduce(counts, reduce_op="sum")
    total, top1, top5, not_finite = (int(count) for count in counts.tolist())
    interval = binomtest(top1, total).proportion_ci(LEVEL, method="wilson")
    return {
        "split": split.split,
        "images": total,
        "annotations_sha256": split.fingerprint,
        "image_size": [*classes.image_size(config)],
        "crop_share": config.classify.crop_share,
        "seconds": time.perf_counter() - start,
        "unit": "percent",
        "top1": 100 * top1 / total,
        "top5": 100 * top5 / total,
        "top1_interval": {
            "level": LEVEL,
            "top1": [100 * float(interval.low), 100 * float(interval.high)],
        },
        "not_finite": not_finite,
        # Of detectors.
        "box": None,
        "mask": None,
    }


def _right(scores: Tensor, labels: Tensor) -> Tensor:
    """Count images, those right at first, those right in five, and those that are not finite."""
    finite = scores.isfinite().all(dim=1)
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    best = best & finite[:, None]
    counts = (len(labels), best[:, 0].sum(), best.sum(), (~finite).sum())
    return torch.tensor([int(count) for count in counts], dtype=torch.float64, device=scores.device)
