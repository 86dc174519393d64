"""The configuration of a run: every value that it depends on, typed and frozen; needs no torch.

A field's type is its range. `build` makes a configuration of plain values and says in one line what
is wrong with them.
"""

import dataclasses
import operator
import re
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from bench.config.values import shown
from bench.errors import InputError, choose, nearest

METHODS = ("mask_rcnn", "retinanet")
CLASSIFIER = "classifier"
LIBRARIES = ("torchvision", "detectron2", "auto")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
POSITIONS = ("absolute", "relative")
MODES = ("inference", "training")
SCOPES = ("backbone", "attention", "detector")
SWEPT = ("flops", "memory", "latency")
QUANTITIES = ("parameters", *SWEPT)
# What a profile measures besides when it is asked to.
ON_DEMAND = ("throughput",)
DECAYS = ("steps", "cosine")
DEVICES = ("auto", "cpu", "cuda", "cuda:N")
DEGENERATE_BOXES = ("error", "drop")

# Strict: neither true nor "1" is the number 1.
Whole = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, gt=0)]
Repeats = Annotated[int, Field(strict=True, ge=2, le=1000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(lt=1)]
Share = Annotated[Number, Field(le=1)]
Size = tuple[Positive, Positive]
# Keys are texts in a record.
Stage = Annotated[int, Field(gt=0)]
Blocks = Annotated[tuple[Whole, ...], Field(min_length=1)]
Sizes = Annotated[tuple[Positive, ...], Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class With(NamedTuple):
    """What a setting has an effect with: another one that has one of some values.

    Attributes:
        setting: dotted name of the other.
        values: its values; none for all but null, false, 0 and what is empty.
    """

    setting: str
    values: tuple[Any, ...] = ()


_DETECTORS, _CLASSIFIERS = With("model.method", METHODS), With("model.method", (CLASSIFIER,))
_ROIS = With("model.method", ("mask_rcnn",))
_FOLDER, _GENERATED = With("data.path"), With("data.path", (None,))
_RESIZED, _STEPS = With("data.fixed_size", (None,)), With("classify.epochs", (None,))
_AT_STEPS = With("train.decay", ("steps",))

_RULES = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
_Config = TypeVar("_Config")
# Of pydantic's messages.
_PLAIN = {
    "Input should": "must",
    "Tuple should": "must",
    " after validation": "",
    "a valid dictionary": "a group of values",
}


def _device(value: str) -> str:
    choose(re.sub(r":\d+$", ":N", value), DEVICES, "value")
    return value


def _one_of(allowed: tuple[str, ...]) -> AfterValidator:
    return AfterValidator(lambda value: choose(value, allowed, "value"))


@dataclass(frozen=True, config=_RULES)
class DetectorConfig:
    """The detector around the backbone; the defaults are the published recipe.

    Attributes:
        fpn_channels: channels of the feature pyramid.
        head_width: width of the two linear layers of the box head.
        mask_width: channels of the four convolutions of the mask head.
        anchor_sizes: one anchor size in pixels a pyramid level; RetinaNet adds two octave scales.
        rpn_proposals: proposals in training: a level before NMS, an image after it.
        rpn_proposals_test: the same in evaluation.
        rpn_batch: anchors an image in the loss of the RPN.
        roi_batch: RoIs an image in the loss of the box head.
        detections: detections kept an image.
        score_threshold: detections below it are dropped.
    """

    fpn_channels: Positive = 256
    head_width: Annotated[Positive, _ROIS] = 1024
    mask_width: Annotated[Positive, _ROIS] = 256
    anchor_sizes: Sizes = (32, 64, 128, 256, 512)
    rpn_proposals: Annotated[Size, _ROIS] = (2000, 1000)
    rpn_proposals_test: Annotated[Size, _ROIS] = (1000, 1000)
    rpn_batch: Annotated[Positive, _ROIS] = 256
    roi_batch: Annotated[Positive, _ROIS] = 512
    detections: Positive = 100
    score_threshold: Fraction = 0.05


@dataclass(frozen=True, config=_RULES)
class ModelConfig:
    """Backbone, mechanism and detector.

    Attributes:
        backbone: its label, for the tables.
        arch: ARCH string.
        attention: mechanism of the stages with `s1`, or one for each stage, comma-separated.
        dense: blocks that have full attention instead, counted from 0, by stage, counted from 1.
        options: options of the mechanisms.
        compile: run the backbone through torch.compile.
        channels_last: weights of convolutions, and so what they give, in that memory format.
        checkpoint: compute the inside of each block again in the backward pass, which takes less
            memory and more time.
        drop_path: rate of the last block.
        method: of detection, or "classifier" for pretraining the backbone alone.
    """

    backbone: str = ""
    arch: str = ""
    attention: str = "longformer"
    dense: dict[Stage, Blocks] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    compile: bool = False
    channels_last: bool = False
    checkpoint: bool = False
    drop_path: Fraction = 0.0
    norm_embed: bool = True
    method: Annotated[str, _one_of((*METHODS, CLASSIFIER))] = "mask_rcnn"
    library: Annotated[str, _one_of(LIBRARIES), _DETECTORS] = "torchvision"
    detector: Annotated[DetectorConfig, _DETECTORS] = field(default_factory=DetectorConfig)


@dataclass(frozen=True, config=_RULES)
class GeneratedConfig:
    """The generated data set; image_size is (height, width)."""

    seed: Seed = 0
    train_images: Positive = 800
    val_images: Positive = 100
    image_size: Size = (128, 160)


@dataclass(frozen=True, config=_RULES)
class DataConfig:
    """Images and how they are resized.

    Attributes:
        path: folder in COCO layout, or None for the generated data set.
        train_file, val_file: annotation files of the split to train on and of the others, wherever
            they are; None where `path` has them.
        images: folder of the images of all splits; None to look for them near the annotations.
        min_sizes: shortest edge; training draws one of several, evaluation takes the last.
        max_size: longest edge.
        fixed_size: every image becomes exactly this (height, width), and so do those of
            profile.image_size where that is not set; None keeps the aspect ratio.
        workers: decoding processes.
        degenerate_boxes: "error", or "drop" to leave out boxes without area.
        deep_white: the value that is white in grey images of 16 bits, 4095 for 12 bits in 16.
    """

    path: str | None = None
    train_file: Annotated[str | None, _DETECTORS] = None
    val_file: Annotated[str | None, _DETECTORS] = None
    images: Annotated[str | None, _DETECTORS, _FOLDER] = None
    generated: Annotated[GeneratedConfig, _GENERATED] = field(default_factory=GeneratedConfig)
    train_split: Annotated[str, _DETECTORS] = "train2017"
    min_sizes: Annotated[Sizes, _RESIZED] = (800,)
    max_size: Annotated[Positive, _RESIZED] = 1333
    fixed_size: Size | None = None
    flip: bool = True
    workers: Whole = 0
    aspect_ratio_grouping: Annotated[bool, _DETECTORS] = False
    degenerate_boxes: Annotated[str, _one_of(DEGENERATE_BOXES), _DETECTORS] = "error"
    deep_white: Annotated[int, Field(strict=True, ge=1, le=65535)] = 65535


@dataclass(frozen=True, config=_RULES)
class TrainConfig:
    """Schedule: steps are optimizer steps, batch_size images a step, lr the peak rate.

    Attributes:
        batch_size: of all processes and accumulated parts together.
        devices: processes that share a step, one a GPU.
        accumulate: parts that each process does its share of a step in, one after the other. The
            result depends on `devices * accumulate` alone, but for the rounding of sums.
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
    steps: Annotated[Positive, _STEPS] = 90000
    batch_size: Positive = 16
    devices: Positive = 1
    accumulate: Positive = 1
    lr: PositiveNumber = 1e-4
    scale_from_batch: Positive | None = None
    weight_decay: Number = 0.05
    no_decay: Annotated[tuple[str, ...], _DETECTORS, With("train.weight_decay")] = ()
    lr_multipliers: Annotated[dict[str, Number], _DETECTORS] = field(default_factory=dict)
    init: str | None = None
    warmup_steps: Annotated[Whole, _STEPS] = 1000
    warmup_factor: Annotated[Number, _DETECTORS, With("train.warmup_steps")] = 0.01
    decay: Annotated[str, _one_of(DECAYS), _DETECTORS] = "steps"
    milestones: Annotated[tuple[Whole, ...], _DETECTORS, _AT_STEPS] = ()
    gamma: Annotated[Number, _DETECTORS, _AT_STEPS, With("train.milestones")] = 0.1
    clip_norm: Number | None = None
    precision: Annotated[str, _one_of(PRECISIONS)] = "32-true"
    checkpoint_every: Positive = 2500
    log_every: Positive = 20


@dataclass(frozen=True, config=_RULES)
class ClassifyConfig:
    """Pretraining of a classifier; of other methods it says nothing. Images have data.fixed_size.

    Attributes:
        epochs: length of the training, which then decides train.steps; None for train.steps.
        warmup_epochs: of them, with a rising rate; they decide train.warmup_steps.
        warmup_lr, min_lr: rate at the start of the warm-up, and at the end.
        crop_area: least share of an image's area that a training crop shows.
        crop_share: share of an image's sides that evaluation shows.
        augment: timm's name of a policy, such as "rand-m9-mstd0.5-inc1"; empty for none.
        repeats: how often in a row each image comes, augmented anew (repeated augmentation); an
            epoch keeps its length, and sees fewer images.
        erasing: share of training images with a random rectangle erased.
        mixup, cutmix: alpha of the mixing of images; 0 for none.
        smoothing: of labels.
        average: decay of a moving average of the weights, which is then what is kept; 0 for none.
    """

    epochs: Positive | None = None
    warmup_epochs: Annotated[Whole, With("classify.epochs")] = 0
    warmup_lr: Number = 1e-6
    min_lr: Number = 1e-5
    crop_area: Annotated[Share, Field(gt=0)] = 0.08
    crop_share: Annotated[Share, Field(gt=0)] = 0.875
    augment: str = ""
    repeats: Positive = 1
    erasing: Fraction = 0.0
    mixup: Number = 0.0
    cutmix: Number = 0.0
    smoothing: Fraction = 0.0
    average: Fraction = 0.0


@dataclass(frozen=True, config=_RULES)
class EvaluateConfig:
    """Splits to evaluate on; the first one fills the tables.

    Attributes:
        bootstrap: draws of images that the intervals of mAP come from; 0 for none.
    """

    splits: Annotated[Names, _DETECTORS] = ("val2017",)
    batch_size: Positive = 4
    bootstrap: Annotated[Whole, _DETECTORS] = 1000


@dataclass(frozen=True, config=_RULES)
class ProfileConfig:
    """What is measured: image_size is (height, width); seconds and repeats are the least."""

    enabled: bool = True
    image_size: Annotated[Size, _DETECTORS] = (800, 1344)
    batch_size: Annotated[Positive, _DETECTORS] = 1
    proposals: Annotated[Positive, _ROIS] = 1000
    repeats: Annotated[Repeats, _DETECTORS] = 10
    seconds: Annotated[Number, _DETECTORS] = 1.0
    training: Annotated[bool, _DETECTORS] = True


@dataclass(frozen=True, config=_RULES)
class RunConfig:
    """Everything that one run depends on."""

    suite: str = ""
    row: str = ""
    seed: Seed = 0
    device: Annotated[str, AfterValidator(_device)] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    classify: Annotated[ClassifyConfig, _CLASSIFIERS] = field(default_factory=ClassifyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, for the record."""
        values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(self, mode="json")
        return values


def build(kind: type[_Config], values: Mapping[str, Any]) -> _Config:
    """Return a configuration of plain nested values, such as those of a record.

    Args:
        kind: one of the classes above.
        values: of its fields; those that are missing have their defaults.

    Raises:
        InputError: for an unknown key or a value that its field does not allow.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(_line(kind, error.errors()[0])) from error


def leaves(node: Any = RunConfig) -> tuple[str, ...]:
    """Return the dotted names of all values of a class above."""
    names: list[str] = []
    for part in fields(node):
        kind = _kind(part)
        inner = is_dataclass(kind)
        names += [f"{part.name}.{name}" for name in leaves(kind)] if inner else [part.name]
    return tuple(names)


def without_effect(config: RunConfig, name: str) -> str | None:
    """Say in what run a setting has no effect, if `config` is one, or return None.

    Args:
        name: dotted, of the setting; one within options or the like is of these.
    """
    kind: Any = RunConfig
    # What is said of a value counts before what is said of its group.
    needed: dict[str, With] = {}
    for word in name.split("."):
        if not is_dataclass(kind):
            break
        part = next(part for part in fields(kind) if part.name == word)
        given = getattr(part.type, "__metadata__", ())
        needed |= {one.setting: one for one in given if isinstance(one, With)}
        kind = _kind(part)
    for other, (_, values) in needed.items():
        value = operator.attrgetter(other)(config)
        if value not in values if values else not value:
            only = f", only where it is {' or '.join(map(shown, values))}" if values else ""
            return f"where {other} is {shown(value)}{only}"
    return None


def _line(kind: type, error: ErrorDetails) -> str:
    """Say in one line what pydantic found."""
    path, given, allowed = ".".join(map(str, error["loc"])), error["input"], error["msg"]
    match error["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(kind, [str(part) for part in error["loc"]], given)
        case "value_error":
            return f"{path}: {error['ctx']['error']}"
        case "dataclass_type":
            allowed = "must be a group of values, " + ", ".join(leaves(_part(kind, path)))
        case "tuple_type":
            allowed = f"must be a list, such as [{given}]"
        case "missing":
            path, allowed = path.rpartition(".")[0], "has too few values"
        case "string_type" | "int_type" | "float_type" if isinstance(given, Mapping):
            allowed = "must be one value, not a group of values"
    for word, plain in _PLAIN.items():
        allowed = allowed.replace(word, plain)
    return f"{path}={repr(given) if isinstance(given, str) else given} {allowed}"


def _kind(part: "dataclasses.Field[Any]") -> Any:
    """Return the type of a field without what is said of it."""
    return getattr(part.type, "__origin__", part.type)


def _part(kind: Any, path: str) -> Any:
    """Return the class of a group of values."""
    for name in path.split("."):
        kind = next(_kind(part) for part in fields(kind) if part.name == name)
    return kind


def _unknown_key(kind: type, path: list[str], given: Any) -> str:
    *groups, _ = path
    known = [part.name for part in fields(_part(kind, ".".join(groups)) if groups else kind)]
    while isinstance(given, Mapping) and given:
        inner, given = next(iter(given.items()))
        path = [*path, str(inner)]
    key, names = ".".join(path), leaves(kind)
    # The name alone is enough where one value alone has it.
    alike = [name for name in names if name.rpartition(".")[2] == path[-1]]
    only = f" (did you mean {alike[0]!r}?)" if len(alike) == 1 else ""
    return (
        f"unknown configuration key {key!r}{nearest(key, alike) or only or nearest(key, names)};"
        f" allowed at {'.'.join(groups) or 'the top level'}: {', '.join(known)}"
    )
