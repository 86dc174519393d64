"""A classifier to pretrain: the backbone, the mixing of images, the loss, a moving average."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.config.schema import ClassifyConfig, RunConfig, TrainConfig
from bench.data.classes import random_from
from bench.model.backbone import ViL
from bench.model.build import build_backbone
from bench.model.optimizer import effective, kinds_of


class Classifier(nn.Module):
    """Images and targets to a loss in training, images to class scores in evaluation.

    Mixup and CutMix take the images of a call in pairs, as timm's do by the batch; of an odd number
    of images none is mixed.

    Args:
        vil: the backbone, whose head has `num_classes` outputs.
        num_classes: classes.
        how: mixing, smoothing, and the decay of the moving average.
        compiled: run the backbone through torch.compile.
    """

    def __init__(
        self, vil: ViL, num_classes: int, how: ClassifyConfig, *, compiled: bool = False
    ) -> None:
        super().__init__()
        # `ViL.compile` is of its forward pass, whose maps a classifier does not take.
        self._classify = torch.compile(ViL.classify) if compiled else ViL.classify
        self.vil, self.num_classes = vil, num_classes
        self.mixup = Mixup(
            mixup_alpha=how.mixup,
            cutmix_alpha=how.cutmix,
            label_smoothing=how.smoothing,
            num_classes=num_classes,
        )
        self.mixup.mixup_enabled = how.mixup > 0 or how.cutmix > 0
        self.loss = SoftTargetCrossEntropy()
        self.average: AveragedModel | None = None
        if how.average:
            # Buffers are those of the newest step: random features are not averaged.
            self.average = AveragedModel(vil, multi_avg_fn=get_ema_multi_avg_fn(how.average))
            self.average.requires_grad_(False)

    @property
    def result(self) -> ViL:
        """The backbone to evaluate and to keep: the moving average, where there is one."""
        kept: Any = self.vil if self.average is None else self.average.module
        if not isinstance(kept, ViL):
            raise TypeError(f"the average is of a {type(kept).__name__}")
        return kept

    def no_weight_decay(self) -> set[str]:
        """Return the names that timm's optimizer spares besides those of norms and biases."""
        spared = ("tokens", "positions")
        return {name for name, kind in kinds_of(self).items() if kind in spared}

    def after_step(self) -> None:
        """Update the moving average."""
        if self.average is not None:
            self.average.update_parameters(self.vil)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> Any:
        """Return {"loss": …} with `targets`, whose "label" is a class, else scores (B, classes)."""
        x = torch.stack(list(images))
        if targets is None:
            return self._classify(self.result, x)
        labels = torch.stack([target["label"] for target in targets])
        if len(x) % 2:
            soft = mixup_target(labels, self.num_classes, smoothing=self.mixup.label_smoothing)
        else:
            with random_from(int(torch.randint(2**31, ())), 0):
                x, soft = self.mixup(x, labels)
        return {"loss": self.loss(self._classify(self.vil, x), soft)}


def build_classifier(config: RunConfig, num_classes: int) -> Classifier:
    """Return the untrained classifier of a run."""
    vil = build_backbone(config, num_classes)
    return Classifier(vil, num_classes, config.classify, compiled=config.model.compile)


def recipe(config: RunConfig, images: int) -> TrainConfig:
    """Return the schedule as it is run: its rate that of its batch, its steps those of its epochs.

    Args:
        images: of the training data.
    """
    train, how = effective(config.train, config.model.method), config.classify
    if how.epochs is None:
        return train
    # The last batch of an epoch takes images of the next.
    steps = [
        round(epochs * images / train.batch_size) for epochs in (how.epochs, how.warmup_epochs)
    ]
    return replace(train, steps=max(1, steps[0]), warmup_steps=steps[1])


def rates(config: RunConfig, train: TrainConfig) -> Callable[[int], float]:
    """Return the rate of each step, counted from 0, by timm's schedule: warm-up, then a cosine."""
    stub = torch.optim.SGD([torch.zeros(1)], lr=train.lr)
    scheduler = CosineLRScheduler(
        stub,
        t_initial=train.steps,
        lr_min=config.classify.min_lr,
        warmup_t=train.warmup_steps,
        warmup_lr_init=config.classify.warmup_lr,
        t_in_epochs=False,
    )

    def rate(step: int) -> float:
        scheduler.step_update(step)
        return float(stub.param_groups[0]["lr"])

    return rate


def build_optimizer(classifier: Classifier, config: TrainConfig) -> torch.optim.Optimizer:
    """Return timm's AdamW; norms, biases, global tokens and positions have no weight decay."""
    return create_optimizer_v2(classifier, "adamw", lr=config.lr, weight_decay=config.weight_decay)
