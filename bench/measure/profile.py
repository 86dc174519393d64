"""What a row costs without training it: parameters, multiply-adds, peak memory and latency.

Of the whole detector and of its parts, for inference and for a training step. Counts are made on
the meta device. Memory is measured in a fresh process for each row, so that no row sees what
another left; latency in one process for all rows, in rounds, so that drift of the machine hits all
alike. A row that dies, for want of memory for one, harms no other.
"""

import dataclasses
import datetime
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench import record
from bench.config.schema import MODES, QUANTITIES, RunConfig
from bench.config.suites import build_config
from bench.data.generated import SPLITS, generate
from bench.data.split import open_split, profile_batch
from bench.measure import latency, memory
from bench.measure.backends import what_ran
from bench.measure.costs import flops_section
from bench.measure.latency import Effort, Latency
from bench.measure.predict import MemoryPrediction, predict
from bench.measure.workload import Workload, stated_rois, timing_section
from bench.model import detectors
from bench.model.build import build_detector, model_section, parameters_section
from bench.model.detectors.rois import Counts
from bench.record import Record, error_section
from bench.system import machine
from bench.system.devices import make_fabric

# A measurement that is predicted to need more than this share of the free memory is not tried.
_LARGEST_SHARE = 0.85
_COCO_CLASSES = 80
_META = torch.device("meta")
# Generated images are stretched to the profile's size; they only have to hold objects.
_GENERATED_SIZE = (256, 320)

Progress = Callable[[float, str], None]


@dataclass
class Row:
    """One row while it is profiled."""

    config: RunConfig
    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None

    def fail(self, error: BaseException) -> None:
        """Keep the first error; what was measured before stays."""
        self.error = self.error or error_section(error)


def profile(
    configs: Sequence[RunConfig],
    *,
    modes: Sequence[str] = MODES,
    quantities: Sequence[str] = QUANTITIES,
    by_part: bool = True,
    progress: Progress,
    command: Sequence[str],
) -> list[Record]:
    """Profile every row and return its record, that of a failure too.

    Args:
        configs: of `bench.config.suites.profile_configs`, on one device.
        modes: some of MODES.
        quantities: some of QUANTITIES.
        by_part: measure the parts of each detector too.
        progress: told the share that is done and what is being done.
        command: the command line, for the records.
    """
    rows = [Row(config) for config in configs]
    steps = 1 + len(rows) * (("memory" in quantities) + ("latency" in quantities))
    done = 0
    for row in rows:
        progress(done / steps, f"{row.config.row}: counting")
        with _kept(row):
            _count(row, modes, quantities)
    done += 1
    alive = [row for row in rows if row.error is None]
    if "memory" in quantities:
        for row in alive:
            progress(done / steps, f"{row.config.row}: measuring memory")
            with _kept(row):
                _measure_memory(row, modes, by_part=by_part)
            done += 1
    if "latency" in quantities:
        alive = [row for row in alive if row.error is None]
        progress(done / steps, f"measuring latency of {len(alive)} rows, in rounds")
        _measure_latency(alive, modes, by_part=by_part)
    progress(1.0, "done")
    return [_record(row, command) for row in rows]


@contextmanager
def _kept(row: Row) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Whatever it is, it is the row's and goes into its record.
        row.fail(error)


def build_on_meta(config: RunConfig) -> detectors.Detector:
    """The detector of a row for 80 classes, with nothing allocated."""
    with _META:
        return build_detector(config, _COCO_CLASSES)


def _count(row: Row, modes: Sequence[str], quantities: Sequence[str]) -> None:
    detector = build_on_meta(row.config)
    if "parameters" in quantities:
        row.sections["parameters"] = parameters_section(detector)
    if "flops" in quantities:
        row.sections["flops"] = flops_section(detector, row.config.profile)
    if "memory" in quantities:
        device = make_fabric(row.config).device.type
        predicted = {mode: predict_memory(detector, row.config, mode, device) for mode in modes}
        row.sections["memory"] = {
            **_conditions(row.config),
            "unit": "bytes",
            "kind": "",
            "device": device,
            **dict.fromkeys(MODES),
            "predicted": {mode: dataclasses.asdict(p) for mode, p in predicted.items()},
        }


def predict_memory(
    detector: detectors.Detector,
    config: RunConfig,
    mode: str,
    device: str,
    *,
    targets: int = Counts.targets,
) -> MemoryPrediction:
    """The predicted peak of a row as it is profiled, with so many objects an image."""
    numbers: dict[str, Any] = stated_rois(config)
    return predict(
        detector,
        image_size=_size(config),
        batch_size=config.profile.batch_size,
        mode=mode,
        precision=config.train.precision,
        device=device,
        targets=targets,
        **numbers,
    )


def _conditions(config: RunConfig) -> dict[str, Any]:
    return {
        "batch_size": config.profile.batch_size,
        "image_size": list(config.profile.image_size),
        "precision": config.train.precision,
        "rois": stated_rois(config),
    }


def _size(config: RunConfig) -> tuple[int, int]:
    height, width = config.profile.image_size
    return height, width


def _in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work(*arguments)` in a fresh process; its errors are raised here.

    Raises:
        MemoryError: where the process was killed, as systems do that run out of memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError("the process was killed, most likely for want of memory") from error


def _measure_memory(row: Row, modes: Sequence[str], *, by_part: bool) -> None:
    section = row.sections["memory"]
    wanted = [mode for mode in modes if _fits(row, mode)]
    if not wanted:
        return
    measured = _in_process(_memory_worker, row.config.as_dict(), wanted, by_part)
    row.notes += measured.pop("notes")
    measured["predicted"] = section["predicted"] | measured["predicted"]
    row.sections["memory"] = section | measured


def _fits(row: Row, mode: str) -> bool:
    """Whether the row's call is predicted to fit the free memory; says so where it does not."""
    predicted = (row.sections.get("memory") or {}).get("predicted", {}).get(mode)
    free = free_memory(make_fabric(row.config).device)
    if predicted is None or free is None or predicted["total"] <= _LARGEST_SHARE * free:
        return True
    row.notes.append(
        f"{mode} not measured: predicted to need {predicted['total'] / 1e9:.1f} GB"
        f" of {free / 1e9:.1f} GB free"
    )
    return False


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return machine.free_memory()


class Bench:
    """A row built on its device, with the batch that it is measured on."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.fabric = make_fabric(config)
        images, targets, classes = _batch(config)
        detector = build_detector(config, classes)
        self.workload = Workload(
            detector, fabric=self.fabric, config=config, images=images, targets=targets
        )
        self.detector = detector

    def part_calls(self, mode: str) -> dict[str, Callable[[], None]]:
        """Each part alone with inputs of fixed sizes: forward, and backward when training."""
        config, device = self.config, self.fabric.device
        height, width = _size(config)
        calls = self.detector.part_calls(
            (height, width),
            proposals=config.profile.proposals,
            detections=config.model.detector.detections,
            batch_size=config.profile.batch_size,
        )
        vil = self.detector.vil
        found: dict[str, Callable[[], None]] = {}
        stride, channels = 1, 3
        rows, columns = (-(-side // vil.stride) * vil.stride for side in (height, width))
        for stage in vil.stages:
            shape = (config.profile.batch_size, channels, rows // stride, columns // stride)
            image = torch.randn(shape, device=device, requires_grad=stage.number > 1)
            found[f"stage{stage.number}"] = self._part_call(
                _Stage(vil, stage.number), (image,), mode
            )
            stride, channels = stride * stage.patch, stage.dim
        for call in calls[1:]:
            inputs = apply_to_collection(
                call.make_inputs(device, torch.float32),
                Tensor,
                lambda zeros: torch.randn_like(zeros).requires_grad_(),
            )
            found[call.name] = self._part_call(call.module, inputs, mode)
        return found

    def _part_call(
        self, module: Callable[..., Any], inputs: tuple[Any, ...], mode: str
    ) -> Callable[[], None]:
        leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]

        def infer() -> None:
            with torch.no_grad(), self.fabric.autocast():
                module(*inputs)

        def step() -> None:
            for tensor in [*leaves, *self.detector.parameters()]:
                tensor.grad = None
            with self.fabric.autocast():
                outputs = [out for out in tree_leaves(module(*inputs)) if isinstance(out, Tensor)]
            outputs = [out for out in outputs if out.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

        return step if mode == "training" else infer


class _Stage:
    """One stage of a backbone as a callable."""

    def __init__(self, vil: nn.Module, number: int) -> None:
        self.vil: Any = vil
        self.number = number

    def __call__(self, image: Tensor) -> Tensor:
        stage: Tensor = self.vil.run_stage(self.number, image)
        return stage


def _batch(config: RunConfig) -> tuple[list[Tensor], list[dict[str, Tensor]], int]:
    """Images and targets of the profile's size, and the number of classes."""
    count = config.profile.batch_size
    if config.data.path is not None:
        dataset = open_split(config, Path(config.data.path), config.data.train_split)
        return *profile_batch(dataset, _size(config), count), dataset.num_classes
    with tempfile.TemporaryDirectory() as folder:
        root = generate(
            Path(folder) / "data",
            seed=config.seed,
            train_images=max(8, count),
            val_images=1,
            image_size=_GENERATED_SIZE,
        )
        images, targets = profile_batch(open_split(config, root, SPLITS[0]), _size(config), count)
    # As many classes as COCO, whatever the images show: the box head's size is part of the cost.
    return images, targets, _COCO_CLASSES


def _memory_worker(
    values: Mapping[str, Any], modes: Sequence[str], by_part: bool
) -> dict[str, Any]:
    """The memory section of one row; runs in a process of its own."""
    bench = Bench(build_config(values))
    device = bench.fabric.device
    section: dict[str, Any] = {"notes": [], "by_part": {}, "reserved": {}, "ran": {}}
    section["predicted"] = {}
    for mode in modes:
        call = bench.workload.call(mode)
        peak = memory.peak(call, device=device, live=bench.workload.live(mode))
        objects = sum(len(target["boxes"]) for target in bench.workload.targets)
        predicted = predict_memory(
            bench.detector,
            bench.config,
            mode,
            device.type,
            targets=max(1, round(objects / len(bench.workload.targets))),
        )
        section["predicted"][mode] = dataclasses.asdict(predicted)
        section |= {mode: peak.bytes, "kind": peak.kind, "device": peak.device}
        section["reserved"][mode] = peak.reserved
        ran = what_ran(call, device=device)
        section["ran"][mode] = dataclasses.asdict(ran)
        section["notes"] += [f"{mode}: {note}" for note in ran.notes]
        if by_part:
            bench.detector.zero_grad(set_to_none=True)
            parts = bench.part_calls(mode)
            section["by_part"][mode] = {
                name: _part_peak(part, device) for name, part in parts.items()
            }
    return section


def _part_peak(call: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of a part above what was there before: its activations and gradients."""
    call()
    peak = memory.peak(call, device=device)
    return peak.bytes - peak.before


def _measure_latency(rows: Sequence[Row], modes: Sequence[str], *, by_part: bool) -> None:
    for mode in modes:
        chosen = [row for row in rows if row.error is None and _fits(row, mode)]
        values = [row.config.as_dict() for row in chosen]
        try:
            found = _in_process(_latency_worker, values, mode, by_part) if chosen else []
        except MemoryError as error:
            for row in chosen:
                row.notes.append(f"{mode} latency not measured: {error}")
            continue
        for row, result in zip(chosen, found, strict=True):
            if "error" in result:
                row.error = row.error or result["error"]
                continue
            _add_latency(row, mode, result)


def _add_latency(row: Row, mode: str, result: Mapping[str, Any]) -> None:
    section = row.sections.setdefault(
        "latency",
        {
            "unit": latency.UNIT,
            **_conditions(row.config),
            **dict.fromkeys(MODES),
            "by_part": {},
            "group": {},
            "notes": [],
        },
    )
    section |= {"device": result["device"], "threads": result["threads"]}
    section[mode] = result["whole"]
    section["group"][mode] = result["group"]
    section["by_part"][mode] = result["by_part"]
    section["notes"] += [f"{mode}: {note}" for note in result["notes"]]


def _latency_worker(
    rows: Sequence[Mapping[str, Any]], mode: str, by_part: bool
) -> list[dict[str, Any]]:
    """What each row took in one mode, or its error; all rows in rounds, in one process."""
    configs = [build_config(values) for values in rows]
    results: list[dict[str, Any]] = [{} for _ in configs]
    benches: dict[str, Bench] = {}
    calls: dict[str, Callable[[], None]] = {}
    for place, config in enumerate(configs):
        try:
            bench = Bench(config)
            calls[str(place)] = bench.workload.call(mode)
            benches[str(place)] = bench
        except Exception as error:
            # It is this row's, and goes into its record.
            results[place] = {"error": error_section(error)}
    if not benches:
        return results
    effort = _effort(configs[0])
    fabric = next(iter(benches.values())).fabric
    measured = latency.interleaved(calls, device=fabric.device, effort=effort)
    groups = latency.groups(measured)
    for name, timing in measured.items():
        results[int(name)] = {
            "device": str(fabric.device),
            "threads": torch.get_num_threads(),
            "whole": timing_section(timing),
            "group": groups[name],
            "notes": list(timing.notes),
            "by_part": _part_latencies(benches[name], mode, effort) if by_part else {},
        }
    return results


def _part_latencies(bench: Bench, mode: str, effort: Effort) -> dict[str, dict[str, float]]:
    parts: Mapping[str, Latency] = latency.interleaved(
        bench.part_calls(mode), device=bench.fabric.device, effort=effort
    )
    return {
        name: {"median": timing.median, "q1": timing.q1, "q3": timing.q3}
        for name, timing in parts.items()
    }


def _effort(config: RunConfig) -> Effort:
    return Effort(min_repeats=config.profile.repeats, min_seconds=config.profile.seconds)


def _record(row: Row, command: Sequence[str]) -> Record:
    config = row.config
    device = "none"
    with _kept(row):
        device = str(make_fabric(config).device)
    memory_section = row.sections.get("memory")
    if memory_section is not None and not memory_section["kind"]:
        memory_section["kind"] = "not measured"
    return Record(
        suite=config.suite,
        row=config.row,
        key=record.key(config.as_dict()),
        status="failed" if row.error else "done",
        error=row.error,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        config=config.as_dict(),
        environment=record.environment(command=command, device=device)
        | {"threads": torch.get_num_threads()},
        model=model_section(config),
        notes=row.notes,
        **row.sections,
    )
