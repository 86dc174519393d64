"""What is measured: an attention module, a backbone, a detector or a part of one, on one batch.

`infer()` is inference on it, `step()` the step that training does. The heads of Mask R-CNN run on
stated RoIs (`stated_rois`), in every row and trained or not, so that rows differ by their attention
alone.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.config.schema import RunConfig
from bench.data.coco import CocoDataset, Target
from bench.data.generated import SPLITS, generate
from bench.data.split import open_split, profile_batch
from bench.errors import InputError
from bench.model.backbone import ViL
from bench.model.build import build_backbone, build_detector
from bench.model.detectors import POSITIVE_FRACTION, Detector
from bench.model.detectors.rois import Counts, fixed_rois
from bench.model.optimizer import build_optimizer, compute_gradients, effective, total_loss
from bench.system.devices import single_fabric
from bench.system.seeding import in_one_order

COCO_CLASSES = 80
# Generated images are stretched to the profile's size; they only have to hold objects.
_GENERATED_SIZE = (256, 320)
# A scale of the loss that starts at 65536 and is halved at each overflow ends below any use.
_MOST_OVERFLOWS = 40


class Workload:
    """A module with its batch on a device.

    Args:
        module: what is measured.
        inputs: what it is called with; tensors that need gradients get them in a step.
        fabric: device and precision.
        config: the run; the step is that of its recipe, and draws from its seed.
        targets: what a training step calls a detector with besides.
        model: the module as Fabric wrapped it, where that was done before.
        whole: False for a part of a model: its step has no clipping and no update.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[Any],
        *,
        fabric: Fabric,
        config: RunConfig,
        targets: Sequence[dict[str, Tensor]] | None = None,
        model: nn.Module | None = None,
        whole: bool = True,
    ) -> None:
        self.module, self.fabric, self.config = module, fabric, config
        self.model: Any = fabric.setup_module(module) if model is None else model
        self.inputs = self._on_device(tuple(inputs))
        self._given: tuple[Any, ...] = () if targets is None else (targets,)
        # On the device but for inference.
        self.targets = self._on_device(self._given)
        self.recipe = effective(config.train, config.model.method)
        self.optimizer: Any = None
        if whole and any(parameter.requires_grad for parameter in module.parameters()):
            self.optimizer = fabric.setup_optimizers(build_optimizer(module, self.recipe))
        self._backbones = [part for part in module.modules() if isinstance(part, ViL)]
        self._steps = 0
        self.calls: Mapping[str, Callable[[], None]] = {
            "inference": self.infer,
            "training": self.step,
        }
        # Called with the name of each phase of a step at its end.
        self.after: Callable[[str], None] = lambda _phase: None

    def call(self, mode: str) -> Callable[[], None]:
        """Return the call that is measured, run before so that lazily made state is there.

        A step in half precision updates nothing while its gradients overflow; it is repeated until
        the optimizer has its state.

        Args:
            mode: "inference" or "training"; it is set on the model until the next `call`.

        Raises:
            RuntimeError: if no step updates anything.
        """
        self.model.train(mode == "training")
        self.targets = self._on_device(self._given if mode == "training" else ())
        call = self.calls[mode]
        call()
        scaled = getattr(self.fabric.strategy.precision, "scaler", None) is not None
        if mode == "inference" or self.optimizer is None or not scaled:
            return call
        for _ in range(_MOST_OVERFLOWS):
            if self.optimizer.state:
                return call
            call()
        raise RuntimeError("gradients overflow at any scale of the loss: nothing is updated")

    def _on_device(self, given: Any) -> Any:
        return apply_to_collection(given, Tensor, lambda tensor: tensor.to(self.fabric.device))

    def live(self, mode: str) -> list[object]:
        """What is alive before the call, for `bench.measure.memory.peak`."""
        alive: list[object] = [self.module, self.inputs]
        if mode == "training":
            alive += [self._given, None if self.optimizer is None else self.optimizer.state]
        return alive

    def infer(self) -> None:
        """Run once without gradients."""
        with torch.no_grad(), in_one_order(self.fabric.device), self._fixed():
            self.model(*self.inputs)

    def step(self) -> None:
        """Do the step that training does."""
        with in_one_order(self.fabric.device):
            self._step()

    def _step(self) -> None:
        torch.manual_seed(self.config.seed)
        for backbone in self._backbones:
            backbone.start_training_step(self._steps)
        self._steps += 1
        for leaf in tree_leaves(self.inputs):
            if isinstance(leaf, Tensor):
                leaf.grad = None
        if self.optimizer is None:
            self.module.zero_grad(set_to_none=True)
            self.fabric.backward(self._loss())
            return
        compute_gradients(
            self.model,
            self.optimizer,
            self.fabric,
            [self._loss],
            clip_norm=self.recipe.clip_norm,
            after=self.after,
        )
        self.optimizer.step()
        self.after("optimizer")

    def _loss(self) -> Tensor:
        with self._fixed():
            return total_loss(self.model(*self.inputs, *self.targets))

    def _fixed(self) -> AbstractContextManager[object]:
        if not isinstance(self.module, Detector):
            return nullcontext()
        fixed = ExitStack()
        fixed.enter_context(fixed_rois(self.module, Counts(**stated_rois(self.config))))
        size = image_size(self.config)
        # What is measured is of the size that it says, whatever images are resized to elsewhere.
        if all(tuple(image.shape[-2:]) == size for image in self.inputs[0]):
            fixed.enter_context(_resized_to(self.module, size))
        return fixed

    @property
    def conditions(self) -> dict[str, Any]:
        """What it is measured under, as the sections of a record say it."""
        said = conditions(self.config, str(self.fabric.device))
        return said if isinstance(self.module, Detector) else said | {"rois": {}}

    def parts(self) -> dict[str, "Workload"]:
        """Return the parts of a detector, each alone with inputs of fixed sizes."""
        config, detector, device = self.config, self.module, self.fabric.device
        if not isinstance(detector, Detector):
            return {}
        height, width = image_size(config)
        calls = detector.part_calls(
            (height, width),
            proposals=config.profile.proposals,
            detections=config.model.detector.detections,
            batch_size=config.profile.batch_size,
        )
        vil = detector.vil
        parts: dict[str, tuple[nn.Module, Any]] = {}
        stride, channels = 1, 3
        rows, columns = (-(-side // vil.stride) * vil.stride for side in (height, width))
        for stage in vil.stages:
            shape = (config.profile.batch_size, channels, rows // stride, columns // stride)
            image = torch.randn(shape, device=device, requires_grad=stage.number > 1)
            parts[f"stage{stage.number}"] = _Stage(vil, stage.number), (image,)
            stride, channels = stride * stage.patch, stage.dim
        for call in calls[1:]:
            zeros = call.make_inputs(device, torch.float32)
            inputs = apply_to_collection(
                zeros, Tensor, lambda tensor: torch.randn_like(tensor).requires_grad_()
            )
            parts[call.name] = call.module, inputs
        return {name: self._part(module, inputs) for name, (module, inputs) in parts.items()}

    def _part(self, module: nn.Module, inputs: Any) -> "Workload":
        # The detector is set up already; only the precision is missing.
        model = _InPrecision(module, self.fabric)
        return Workload(
            module, inputs, fabric=self.fabric, config=self.config, model=model, whole=False
        )


@contextmanager
def _resized_to(detector: Detector, size: tuple[int, int]) -> Iterator[None]:
    """Let a detector resize images to one size, (rows, columns)."""
    usual = detector.settings
    parts: list[Any] = [part for part in detector.modules() if vars(part).get("settings") is usual]
    for part in parts:
        part.settings = replace(usual, fixed_size=size)
    try:
        yield
    finally:
        for part in parts:
            part.settings = usual


class _InPrecision(nn.Module):
    """A part of a model that Fabric has set up, under the same autocast."""

    def __init__(self, module: nn.Module, fabric: Fabric) -> None:
        super().__init__()
        self.module, self.fabric = module, fabric

    def forward(self, *inputs: Any) -> Any:
        with self.fabric.autocast():
            return self.module(*inputs)


class _Stage(nn.Module):
    """One stage of a backbone."""

    def __init__(self, vil: ViL, number: int) -> None:
        super().__init__()
        self.vil, self.number = vil, number

    def forward(self, image: Tensor) -> Tensor:
        return self.vil.run_stage(self.number, image)


def build(
    config: RunConfig, scope: str = "detector", *, root: Path | None = None, stage: int = 1
) -> Workload:
    """Build what `config` says, untrained and on its device, with the batch of its profile.

    Args:
        scope: one of `bench.config.schema.SCOPES`; "attention" is the first of a stage of the
            backbone, its tokens with gradients as inside of it.
        root: of a detector, the folder of its data; by default that of `config`, and generated
            images where it names none.
        stage: that of an attention, from 1.

    Raises:
        InputError: for a device or a precision that is not there, or data that cannot be read.
    """
    # One device, however many the run has.
    fabric = single_fabric(config)
    if fabric.strategy.precision.precision != config.train.precision:
        raise InputError(f"train.precision={config.train.precision} needs a GPU")
    if scope == "detector":
        images, targets, classes = _batch(config, root)
        module: nn.Module = build_detector(config, classes)
        return Workload(module, (images,), fabric=fabric, config=config, targets=targets)
    vil = build_backbone(config)
    batch = config.profile.batch_size
    if scope == "backbone":
        image = torch.randn(batch, 3, *image_size(config), device=fabric.device)
        return Workload(vil, (image,), fabric=fabric, config=config)
    module, (tokens, grid) = attention_of(vil, config, device=fabric.device, stage=stage)
    return Workload(module, (tokens.requires_grad_(), grid), fabric=fabric, config=config)


def attention_of(
    vil: ViL, config: RunConfig, *, device: torch.device, stage: int = 1
) -> tuple[nn.Module, tuple[Tensor, tuple[int, int]]]:
    """Return the first attention module of a stage, with tokens and grid for it."""
    place = next(place for place in vil.attention_places() if place.stage.number == stage)
    rows, columns = grid = place.grid(image_size(config))
    length = place.stage.num_global + rows * columns
    tokens = torch.randn(config.profile.batch_size, length, place.stage.dim, device=device)
    return place.module, (tokens, grid)


def _batch(
    config: RunConfig, root: Path | None
) -> tuple[list[Tensor], list[dict[str, Tensor]], int]:
    """Images and targets of the profile's size, and the number of classes."""
    if root is None and config.data.path is not None:
        root = Path(config.data.path)
    if root is not None:
        dataset = open_split(config, root, config.data.train_split)
        return *measured_batch(dataset, config), dataset.num_classes
    with tempfile.TemporaryDirectory() as folder:
        made = generate(
            Path(folder) / "data",
            seed=config.seed,
            train_images=max(8, config.profile.batch_size),
            val_images=1,
            image_size=_GENERATED_SIZE,
        )
        images, targets = measured_batch(open_split(config, made, SPLITS[0]), config)
    # As many classes as COCO, whatever the images show: the box head's size is part of the cost.
    return images, targets, COCO_CLASSES


def measured_batch(dataset: CocoDataset, config: RunConfig) -> tuple[list[Tensor], list[Target]]:
    """Images and targets of a detector's profile, of a stated number of objects an image.

    A step's memory grows with them, and rows on other data are compared.
    """
    return profile_batch(
        dataset,
        image_size(config),
        config.profile.batch_size,
        objects=Counts.targets,
        masks=config.model.method == "mask_rcnn",
    )


def conditions(config: RunConfig, device: str) -> dict[str, Any]:
    """What a detector is measured under, as the sections of a record say it."""
    return {
        "device": device,
        "batch_size": config.profile.batch_size,
        "image_size": list(config.profile.image_size),
        "precision": config.train.precision,
        "rois": stated_rois(config),
    }


def image_size(config: RunConfig) -> tuple[int, int]:
    """(height, width) of what is measured."""
    height, width = config.profile.image_size
    return height, width


def stated_rois(config: RunConfig) -> dict[str, int]:
    """RoIs and objects an image of what is measured and predicted; fields of `Counts`."""
    targets = {"targets": Counts.targets}
    if config.model.method != "mask_rcnn":
        return targets
    detector = config.model.detector
    return {
        **targets,
        "proposals": config.profile.proposals,
        "detections": detector.detections,
        "rois": detector.roi_batch,
        "mask_rois": int(detector.roi_batch * POSITIVE_FRACTION),
    }
