"""What is measured of a detector: inference on one batch, and a training step on it.

The heads of Mask R-CNN run on stated numbers of RoIs (`stated_rois`), in every row and trained or
not, so that rows differ by their attention alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from bench.config.schema import RunConfig
from bench.measure.latency import Latency
from bench.model.detectors.contract import POSITIVE_FRACTION, Detector
from bench.model.detectors.rois import Counts, fixed_rois
from bench.model.optimizer import optimizer


class Workload:
    """A detector and one batch on a device.

    Args:
        detector: untrained or trained.
        fabric: device and precision.
        config: the run; its seed draws what a training step draws.
        images: of one size.
        targets: one an image.
        model: the detector as Fabric wrapped it, where that was done before.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        fabric: Fabric,
        config: RunConfig,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        model: nn.Module | None = None,
    ) -> None:
        device = fabric.device
        self.detector = detector
        self.fabric = fabric
        self.seed = config.seed
        self.counts = Counts(**stated_rois(config))
        self.model: Any = fabric.setup_module(detector) if model is None else model
        self.optimiser: Any = fabric.setup_optimizers(optimizer(detector, config.train))
        self.images = [image.to(device) for image in images]
        self.targets = [{key: value.to(device) for key, value in t.items()} for t in targets]

    def call(self, mode: str) -> Callable[[], None]:
        """The call that is measured, run once before so that lazily made state is there.

        Args:
            mode: "inference", or "training": forward, backward and optimiser. It is set on the
                model until the next `call`.
        """
        training = mode == "training"
        self.model.train(training)
        call = self._step if training else self._infer
        call()
        return call

    def live(self, mode: str) -> list[object]:
        """What is alive before the call, for `bench.measure.memory.peak`."""
        alive: list[object] = [self.detector, self.images, self.targets]
        return [*alive, self.optimiser.state] if mode == "training" else alive

    def _infer(self) -> None:
        with torch.no_grad(), fixed_rois(self.detector, self.counts):
            self.model(self.images)

    def _step(self) -> None:
        torch.manual_seed(self.seed)
        with fixed_rois(self.detector, self.counts):
            losses = self.model(self.images, self.targets)
        self.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(torch.stack(list(losses.values())).sum())
        self.optimiser.step()


def stated_rois(config: RunConfig) -> dict[str, int]:
    """RoIs an image in the heads of what is measured and predicted; fields of `Counts`."""
    if config.model.method != "mask_rcnn":
        return {}
    detector = config.model.detector
    return {
        "proposals": config.profile.proposals,
        "detections": detector.detections,
        "rois": detector.roi_batch,
        "mask_rois": int(detector.roi_batch * POSITIVE_FRACTION),
    }


def timing_section(timing: Latency) -> dict[str, Any]:
    """One mode of a record's `latency`."""
    return {
        "samples": list(timing.samples),
        "device_samples": list(timing.device_samples),
        "median": timing.median,
        "q1": timing.q1,
        "q3": timing.q3,
        "stable": timing.stable,
    }
