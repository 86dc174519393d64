"""What a workload costs, as the sections of a record: the only place that makes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from bench.config.schema import MODES, QUANTITIES, ProfileConfig, RunConfig
from bench.data.coco import CocoDataset
from bench.measure import flops, latency, memory, published
from bench.measure.latency import Effort, Latency
from bench.measure.predict import predict
from bench.measure.workload import (
    COCO_CLASSES,
    Workload,
    attention_of,
    conditions,
    image_size,
    measured_batch,
    stated_rois,
)
from bench.model.build import build_backbone, build_detector, on_meta, parameters_section
from bench.model.detectors import Detector

_META = torch.device("meta")
# Of what was alive before a call, which it may leave besides without a word.
_GROWTH = 1e-3


def run_sections(
    detector: Detector,
    dataset: CocoDataset,
    config: RunConfig,
    fabric: Fabric,
    *,
    model: nn.Module | None = None,
    with_latency: bool = True,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what a run measures at its end, on images of one stated size, by section, and notes.

    Args:
        model: the detector as Fabric wrapped it, where that was done before.
        with_latency: False for memory alone.
    """
    profile = config.profile
    images, targets = measured_batch(dataset, config)
    workload = Workload(
        detector, (images,), fabric=fabric, config=config, targets=targets, model=model
    )
    modes = MODES if profile.training else ("inference",)
    section, notes = measure_memory(workload, modes)
    sections = {"memory": section}
    if with_latency:
        sections["latency"] = measure_latency(workload, modes, effort(config))
    return sections, notes


def measure_memory(
    workload: Workload, modes: Sequence[str], *, by_part: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return the `memory` section: peaks in bytes, best of a process that has seen nothing else.

    A mode that cannot be measured is null, and a note says why.
    """
    section, notes = memory_section(workload.conditions), []
    # One for all modes: what a mechanism keeps it may have made in the first.
    watch = memory.LiveTensors()
    for mode in modes:
        try:
            peak = memory.peak(
                workload.calls[mode],
                device=workload.fabric.device,
                live=workload.live(mode),
                prepare=partial(workload.call, mode),
                watch=watch,
            )
        except memory.NotMeasuredError as error:
            notes.append(f"memory of {mode} not measured: {error}")
            continue
        section |= {mode: peak.bytes, "kind": peak.kind}
        section["before"][mode], section["reserved"][mode] = peak.before, peak.reserved
        left = peak.after - peak.before
        if left > _GROWTH * peak.before:
            notes.append(
                f"memory of {mode} grows from call to call, by {left / 1e6:.3g} MB in the one that"
                " was measured: later ones need more"
            )
        if by_part:
            workload.module.zero_grad(set_to_none=True)
            section["by_part"][mode] = {
                name: _part_peak(part, mode, watch) for name, part in workload.parts().items()
            }
    return section, notes


def memory_section(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `memory` section of what has not been measured yet.

    Args:
        conditions: of `Workload.conditions`.
    """
    return {
        "unit": "bytes",
        "kind": "not measured",
        **conditions,
        **dict.fromkeys(MODES),
        **{name: {} for name in ("before", "reserved", "by_part")},
    }


def _part_peak(part: Workload, mode: str, watch: memory.LiveTensors) -> int:
    """Bytes at the peak of a part above what was there before it ran."""

    def prepare() -> None:
        part.call(mode)
        part.module.zero_grad(set_to_none=True)

    peak = memory.peak(part.calls[mode], device=part.fabric.device, prepare=prepare, watch=watch)
    return peak.bytes - peak.before


def measure_latency(workload: Workload, modes: Sequence[str], effort: Effort) -> dict[str, Any]:
    """Return the `latency` section of a workload that is timed alone."""
    device = workload.fabric.device
    timings = {
        mode: latency.measure(workload.call(mode), device=device, effort=effort) for mode in modes
    }
    return latency_section(workload.conditions, timings, threads=torch.get_num_threads())


def latency_section(
    conditions: Mapping[str, Any], timings: Mapping[str, Latency], *, threads: int
) -> dict[str, Any]:
    """Return the `latency` section of what took `timings`.

    Args:
        conditions: of `Workload.conditions`.
        timings: by mode.
        threads: of torch, where they were taken.
    """
    names = ("samples", "device_samples", "median", "q1", "q3", "stable")
    return {
        "unit": latency.UNIT,
        **conditions,
        "threads": threads,
        **dict.fromkeys(MODES),
        **{mode: _plain(timing, names) for mode, timing in timings.items()},
        "notes": [f"{mode}: {note}" for mode, timing in timings.items() for note in timing.notes],
    }


def part_latencies(workload: Workload, mode: str, effort: Effort) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each part of a detector, timed in rounds."""
    calls = {name: part.call(mode) for name, part in workload.parts().items()}
    timings = latency.interleaved(calls, device=workload.fabric.device, effort=effort)
    return {name: _plain(timing, ("median", "q1", "q3")) for name, timing in timings.items()}


def phase_latencies(workload: Workload, effort: Effort) -> dict[str, dict[str, float]]:
    """Return median and quartiles of forward, backward and optimizer in whole training steps.

    Clipping is the optimizer's. The device is waited for after each phase, so that on a GPU the
    phases may add up to more than a step.
    """
    timings = latency.phases(
        workload.call("training"),
        lambda after: setattr(workload, "after", after),
        device=workload.fabric.device,
        effort=effort,
    )
    return {name: _plain(timing, ("median", "q1", "q3")) for name, timing in timings.items()}


def _plain(timing: Latency, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(timing, name) for name in names}


def effort(config: RunConfig) -> Effort:
    """How long each call of a row is timed."""
    return Effort(min_repeats=config.profile.repeats, min_seconds=config.profile.seconds)


def build_on_meta(config: RunConfig) -> Detector:
    """Build the detector of a row for 80 classes, with nothing allocated where that can be."""
    return on_meta(build_detector, config, COCO_CLASSES)


def counted(
    config: RunConfig,
    modes: Sequence[str] = MODES,
    quantities: Sequence[str] = QUANTITIES,
    *,
    device: str,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what a row costs without running it: sections of its record, and notes on them.

    The memory of what cannot be predicted is missing, and a note says why.

    Args:
        config: of the row, for a device that need not be here.
        modes: those that memory is predicted for.
        quantities: some of QUANTITIES; latency is none that can be counted.
        device: the device, such as "cuda".
    """
    sections: dict[str, Any] = {}
    notes: list[str] = []
    detector = build_on_meta(config)
    if "parameters" in quantities:
        sections["parameters"] = parameters_section(detector)
    if "flops" in quantities:
        sections["flops"], remarks = flops_section(detector, config)
        notes += remarks
    if "memory" in quantities:
        section = memory_section(conditions(config, device)) | {"predicted": {}, "ran": {}}
        sections["memory"] = section
        stated: dict[str, Any] = stated_rois(config)
        try:
            for mode in modes:
                found = predict(
                    detector,
                    image_size=image_size(config),
                    batch_size=config.profile.batch_size,
                    mode=mode,
                    precision=config.train.precision,
                    device=device.partition(":")[0],
                    **stated,
                )
                section["predicted"][mode] = dataclasses.asdict(found)
        except Exception as error:
            # A mechanism of others may fail in any way where tensors have no values.
            message = " ".join(str(error).split())
            notes.append(f"memory not predicted: {type(error).__name__}: {message}")
    return sections, notes


def flops_section(detector: Detector, config: RunConfig) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the `flops` section of a record, and notes on it.

    It is None where no count can be made, and the notes say why. A detector on the meta device is
    built again where its mechanism has to run for real to be counted.
    """
    try:
        try:
            section = _counted(detector, config.profile)
        except flops.NotCountedError as error:
            if not error.needs_values:
                raise
            section = _counted(build_detector(config, detector.num_classes), config.profile)
    except flops.NotCountedError as error:
        return None, [f"FLOPs not counted: {error}"]
    return section, list(section["notes"])


def _counted(detector: Detector, profile: ProfileConfig) -> dict[str, Any]:
    height, width = profile.image_size
    report = flops.count_flops(detector, image_size=(height, width), proposals=profile.proposals)
    return {
        **dataclasses.asdict(report),
        "published": published.section(
            detector, image_size=report.image_size, proposals=profile.proposals
        ),
    }


def flops_of_one(scope: str, config: RunConfig, mode: str) -> dict[str, Any] | None:
    """Return the `flops` section of one mode: multiply-adds of one image.

    A training step is counted from its operators, forward and backward, on the meta device: what a
    fused backward pass computes again to save memory is not in it. None where it cannot be counted:
    the training of a detector depends on the image.

    Args:
        scope: one of `bench.config.schema.SCOPES`.
    """
    if scope == "detector" and mode == "training":
        return None
    size = image_size(config)
    try:
        counted = on_meta(_count_one, scope, config, mode)
    except flops.NotCountedError as error:
        if not error.needs_values:
            raise
        counted = _count_one(scope, config, mode)
    return {
        "unit": flops.UNIT,
        "convention": "actual",
        "image_size": list(size),
        "mode": mode,
        "total": counted.total,
        "uncounted": dict(counted.uncounted),
        "unsummed": counted.unsummed,
        "notes": list(counted.notes),
    }


def _count_one(scope: str, config: RunConfig, mode: str) -> flops.FlopReport | flops.OperatorCount:
    """Build what is counted on the device that is set, and count it for one image."""
    size, training = image_size(config), mode == "training"
    if scope == "detector":
        detector = build_detector(config, COCO_CLASSES)
        return flops.count_flops(detector, image_size=size, proposals=config.profile.proposals)
    config = dataclasses.replace(config, profile=dataclasses.replace(config.profile, batch_size=1))
    module: nn.Module = (vil := build_backbone(config))
    inputs: tuple[Any, ...] = (torch.empty(1, 3, *size, device=_META),)
    if scope == "attention":
        module, inputs = attention_of(vil, config, device=_META)
        inputs[0].requires_grad_(training)
    return flops.count_call(module, inputs, training=training)
