"""The configuration of a run: every value that it depends on, typed and frozen; needs no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

METHODS = ("mask_rcnn", "retinanet")
LIBRARIES = ("torchvision", "detectron2", "auto")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
POSITIONS = ("absolute", "relative")
MODES = ("inference", "training")
SCOPES = ("backbone", "attention", "detector")
SWEPT = ("flops", "memory", "latency")
QUANTITIES = ("parameters", *SWEPT)
DECAYS = ("steps", "cosine")


@dataclass(frozen=True)
class DetectorConfig:
    """The detector around the backbone; lengths in pixels."""

    fpn_channels: int = 256
    head_width: int = 1024
    mask_width: int = 256
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    rpn_proposals: list[int] = field(default_factory=lambda: [2000, 1000])
    rpn_proposals_test: list[int] = field(default_factory=lambda: [1000, 1000])
    rpn_batch: int = 256
    roi_batch: int = 512
    detections: int = 100
    score_threshold: float = 0.05


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, mechanism and detector.

    Attributes:
        backbone: its label, for the tables.
        arch: ARCH string.
        attention: mechanism of the stages with `s1`, or one for each stage, comma-separated.
        options: options of the mechanisms.
        drop_path: rate of the last block.
    """

    backbone: str = ""
    arch: str = ""
    attention: str = "longformer"
    options: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    norm_embed: bool = True
    method: str = "mask_rcnn"
    library: str = "torchvision"
    detector: DetectorConfig = field(default_factory=DetectorConfig)


@dataclass(frozen=True)
class GeneratedConfig:
    """The generated data set; image_size is (height, width)."""

    seed: int = 0
    train_images: int = 800
    val_images: int = 100
    image_size: list[int] = field(default_factory=lambda: [128, 160])


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are resized.

    Attributes:
        path: folder in COCO layout, or None for the generated data set.
        min_sizes: shortest edge; training draws one of several, evaluation takes the last.
        max_size: longest edge.
        fixed_size: every image becomes exactly this (height, width); None keeps the aspect ratio.
        workers: decoding processes.
        degenerate_boxes: "error", or "drop" to leave out boxes without area.
    """

    path: str | None = None
    generated: GeneratedConfig = field(default_factory=GeneratedConfig)
    train_split: str = "train2017"
    min_sizes: list[int] = field(default_factory=lambda: [800])
    max_size: int = 1333
    fixed_size: list[int] | None = None
    flip: bool = True
    workers: int = 0
    aspect_ratio_grouping: bool = False
    degenerate_boxes: str = "error"


@dataclass(frozen=True)
class TrainConfig:
    """Schedule: steps are optimiser steps, batch_size images a step, lr the peak rate.

    Attributes:
        batch_size: of all processes and accumulated parts together.
        devices: processes that share a step, one a GPU.
        accumulate: parts that each process does its share of a step in, one after the other. The
            result depends on `devices * accumulate` alone, not on how it is made up.
        scale_from_batch: images a step that lr, steps, warmup_steps and milestones are meant for;
            with another batch_size, lr is scaled by the ratio and the steps inversely.
        no_decay: what has no weight decay: "norms", "biases", "tokens", "positions" or patterns of
            parameter names such as "backbone.*".
        lr_multipliers: factors of the rate by pattern of parameter names; the first that fits.
        init: checkpoint that a new run starts from, of a classifier or a detector.
        clip_norm: of the gradient of the full model, 0 for no clipping, None for the published one
            of the method.
    """

    schedule: str = "1x"
    steps: int = 90000
    batch_size: int = 16
    devices: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    scale_from_batch: int | None = None
    weight_decay: float = 0.05
    no_decay: list[str] = field(default_factory=list)
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    init: str | None = None
    warmup_steps: int = 1000
    warmup_factor: float = 0.01
    decay: str = "steps"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    clip_norm: float | None = None
    precision: str = "32-true"
    checkpoint_every: int = 2500
    log_every: int = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """Splits to evaluate on; the first one fills the tables.

    Attributes:
        bootstrap: draws of images that the intervals of mAP come from; 0 for none.
    """

    splits: list[str] = field(default_factory=lambda: ["val2017"])
    batch_size: int = 4
    bootstrap: int = 1000


@dataclass(frozen=True)
class ProfileConfig:
    """What is measured: image_size is (height, width); seconds and repeats are the least."""

    enabled: bool = True
    image_size: list[int] = field(default_factory=lambda: [800, 1344])
    batch_size: int = 1
    proposals: int = 1000
    repeats: int = 10
    seconds: float = 1.0
    training: bool = True


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run depends on."""

    suite: str = ""
    row: str = ""
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, for the record."""
        return asdict(self)
