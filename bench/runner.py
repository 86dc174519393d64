"""One run: build, count, train, evaluate, measure; and its record, whatever happens in it."""

import dataclasses
import datetime
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize_image, resize_mask

from bench import detectors, flops, latency, memory, record
from bench.arch import parse
from bench.backbone import ViL
from bench.checkpoints import Checkpoints
from bench.config import ProfileConfig, RunConfig
from bench.data.coco import CocoDataset, Target
from bench.data.generated import generate
from bench.data.loader import evaluation_batches
from bench.errors import InputError
from bench.evaluate import CocoEvaluator
from bench.record import Record
from bench.train import DivergedError, to_float, train
from bench.workload import Workload, timing_section

# Data sets up to this size are read whole before the first run.
_DECODED_AT_START = 2000
# Shares of a run's time, for the progress bar alone.
_TRAINED, _EVALUATED = 0.85, 0.95


class Progress(Protocol):
    """Told how much of a run is done (0 to 1) and what it does."""

    def __call__(self, done: float, doing: str) -> None: ...


def run(
    config: RunConfig,
    *,
    output: Path | None = None,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> Record:
    """Do one run and write its record below `output/records`.

    A run that was stopped continues from its newest checkpoint. An error ends the run, not the
    caller: the record says what it was.

    Args:
        output: folder of records, checkpoints and generated data; `results/{suite}` by default.
        command: the command line, for the record.

    Raises:
        InputError: for a mistake of the user; it is in the record too.
        KeyboardInterrupt: when interrupted, after the record is written.
    """
    output = output or Path("results") / (config.suite or "runs")
    sections: dict[str, Any] = {}
    notes: list[str] = []
    error: dict[str, Any] | None = None
    raised: BaseException | None = None
    key = record.key(config.as_dict())
    checkpoints = Checkpoints(output / "checkpoints" / f"{record.slug(config.row)}-{key[:10]}")
    try:
        _measure(config, output, checkpoints, sections, notes, progress or _silent)
    except (Exception, KeyboardInterrupt) as caught:
        error = error_section(caught)
        raised = caught if error["kind"] in ("input", "interrupted") else None
    result = Record(
        suite=config.suite,
        row=config.row,
        key=key,
        status="failed" if error else "done",
        error=error,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        config=config.as_dict(),
        environment=record.environment(
            command=list(command or sys.argv), device=_device_name(sections)
        )
        | {"threads": torch.get_num_threads()},
        model=model_section(config),
        notes=notes,
        **{name: value for name, value in sections.items() if name != "device"},
    )
    record.write(result, output / "records")
    if raised is not None:
        raise raised
    if error is None:
        checkpoints.remove()
    return result


def _silent(done: float, doing: str) -> None:
    """The progress of a caller that asks for none."""
    del done, doing


def data_root(config: RunConfig, output: Path) -> Path:
    """The folder of the run's data; generated data is made where it is missing."""
    if config.data.path is not None:
        return Path(config.data.path)
    generated = config.data.generated
    size = (generated.image_size[0], generated.image_size[1])
    name = f"generated-{generated.seed}-{generated.train_images}-{generated.val_images}"
    return generate(
        output / "data" / f"{name}-{size[0]}x{size[1]}",
        seed=generated.seed,
        train_images=generated.train_images,
        val_images=generated.val_images,
        image_size=size,
    )


def open_split(config: RunConfig, root: Path, split: str) -> CocoDataset:
    """Read one split as the run's configuration says."""
    return CocoDataset(root, split, degenerate_boxes=config.data.degenerate_boxes)


def check_data(configs: Sequence[RunConfig], output: Path) -> list[str]:
    """Read every split of the runs and return what is odd but usable, a line each.

    Raises:
        InputError: for data that cannot be used; before any run has cost time.
    """
    lines: dict[str, None] = {}
    seen: set[tuple[Path, str, str]] = set()
    for config in configs:
        make_fabric(config)
        root = data_root(config, output)
        for split in dict.fromkeys([config.data.train_split, *config.evaluate.splits]):
            place = (root, split, config.data.degenerate_boxes)
            if place in seen:
                continue
            seen.add(place)
            dataset = open_split(config, root, split)
            found = dataset.check(decode=len(dataset) <= _DECODED_AT_START)
            # What the generator leaves empty it does on purpose.
            if config.data.path is not None:
                lines |= dict.fromkeys(found)
    return list(lines)


def build_detector(config: RunConfig, num_classes: int) -> detectors.Detector:
    """The untrained detector of a run, its weights drawn from the run's seed."""
    data, model = config.data, config.model
    fixed = _pair(data.fixed_size) if data.fixed_size else None
    names = model.attention.split(",")
    torch.manual_seed(config.seed)
    try:
        vil = ViL(
            model.arch,
            attention=names[0] if len(names) == 1 else names,
            image_size=fixed or data.max_size,
            drop_path=model.drop_path,
            norm_embed=model.norm_embed,
            **model.options,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"row {config.row!r}: {error}") from error
    options: dict[str, Any] = dataclasses.asdict(model.detector)
    return detectors.build(
        vil,
        method=model.method,
        num_classes=num_classes,
        library=model.library,
        min_size=None if fixed else tuple(data.min_sizes),
        max_size=None if fixed else data.max_size,
        fixed_size=fixed,
        **{key: _hashable(value) for key, value in options.items()},
    )


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric on the run's device, in its precision.

    Raises:
        InputError: for a device that is not there.
    """
    name, _, index = config.device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"device={config.device!r} is none of auto, cpu, cuda, cuda:N")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={config.device!r}: torch {torch.__version__} sees no CUDA device")
    if index and int(index) >= torch.cuda.device_count():
        raise InputError(f"device={config.device!r}: there are {torch.cuda.device_count()} devices")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Any = config.train.precision
    if name == "cpu" and precision == "16-mixed":
        raise InputError("train.precision=16-mixed needs a GPU; the CPU takes 32-true, bf16-mixed")
    return Fabric(accelerator=name, devices=[int(index)] if index else 1, precision=precision)


def _measure(
    config: RunConfig,
    output: Path,
    checkpoints: Checkpoints,
    sections: dict[str, Any],
    notes: list[str],
    progress: Progress,
) -> None:
    """Fill `sections`, one after the other, so that what was reached before an error is kept."""
    progress(0.0, "reading data")
    fabric = make_fabric(config)
    sections["device"] = fabric.device
    root = data_root(config, output)
    training = open_split(config, root, config.data.train_split)
    splits = [open_split(config, root, split) for split in config.evaluate.splits]
    if config.data.path is not None:
        notes += training.check()
    if config.data.fixed_size:
        size = "x".join(map(str, config.data.fixed_size))
        notes.append(f"works for one sequence length: every image is resized to {size}")

    detector = build_detector(config, training.num_classes)
    sections["parameters"] = parameters_section(detector)
    sections["flops"] = flops_section(detector, config.profile)

    model, result = train(
        detector,
        training,
        fabric=fabric,
        config=config.train,
        data=config.data,
        seed=config.seed,
        checkpoints=checkpoints,
        progress=lambda step, loss: progress(
            _TRAINED * step / config.train.steps,
            f"training, step {step} of {config.train.steps}, loss {loss:.3f}",
        ),
    )
    sections["training"] = result.as_record(config.train.batch_size)

    evaluated = [_evaluate(model, split, config, fabric, progress) for split in splits]
    sections["evaluation"] = evaluated[0] | {"also": evaluated[1:]}

    if config.profile.enabled:
        progress(_EVALUATED, "measuring memory and latency")
        sections["memory"], sections["latency"] = _profile(
            detector, model, training, config, fabric
        )
    progress(1.0, "done")


def parameters_section(detector: detectors.Detector) -> dict[str, Any]:
    """The `parameters` section of a record."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    parts = {name: count(module) for name, module in detector.parts().items()}
    return {"total": count(detector), "by_part": parts}


def flops_section(detector: detectors.Detector, profile: ProfileConfig) -> dict[str, Any]:
    """The `flops` section of a record."""
    report = flops.count(
        detector, image_size=_pair(profile.image_size), proposals=profile.proposals
    )
    return {**dataclasses.asdict(report), "unit": flops.UNIT}


def _evaluate(
    model: nn.Module, split: CocoDataset, config: RunConfig, fabric: Fabric, progress: Progress
) -> dict[str, Any]:
    """The `evaluation` section of one split."""
    evaluator = CocoEvaluator(split)
    model.eval()
    with _timed() as seconds, torch.no_grad():
        done = 0
        for images, targets in evaluation_batches(
            split, batch_size=config.evaluate.batch_size, num_workers=config.data.workers
        ):
            outputs = model([to_float(image.to(fabric.device)) for image in images])
            evaluator.update(outputs, targets)
            done += len(images)
            share = done / len(split)
            progress(
                _TRAINED + (_EVALUATED - _TRAINED) * share,
                f"evaluating {split.split}, image {done} of {len(split)}",
            )
        figures = evaluator.compute()
    return {
        "split": split.split,
        "images": len(split),
        "annotations_sha256": split.fingerprint,
        "seconds": seconds(),
        "unit": "percent",
        **figures,
    }


def _profile(
    detector: nn.Module,
    model: nn.Module,
    dataset: CocoDataset,
    config: RunConfig,
    fabric: Fabric,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Peak memory and latency of inference and of a training step, on images of one stated size."""
    profile, device = config.profile, fabric.device
    images, targets = profile_batch(dataset, _pair(profile.image_size), profile.batch_size)
    workload = Workload(
        detector, fabric=fabric, config=config, images=images, targets=targets, model=model
    )
    peaks: dict[str, int | None] = {"inference": None, "training": None}
    timings: dict[str, dict[str, Any] | None] = {"inference": None, "training": None}
    kind = ""
    notes: list[str] = []
    for mode in ("inference", "training") if profile.training else ("inference",):
        call = workload.call(mode)
        peak = memory.peak(call, device=device, live=workload.live(mode))
        peaks[mode], kind = peak.bytes, peak.kind
        timing = latency.measure(
            call, device=device, min_repeats=profile.repeats, min_seconds=profile.seconds
        )
        timings[mode] = timing_section(timing)
        notes += [f"{mode}: {note}" for note in timing.notes]
    common = {
        "device": str(device),
        "batch_size": profile.batch_size,
        "image_size": list(profile.image_size),
        "precision": config.train.precision,
    }
    return (
        {"unit": "bytes", "kind": kind, **common, **peaks},
        {
            "unit": latency.UNIT,
            "threads": torch.get_num_threads(),
            **common,
            **timings,
            "notes": notes,
        },
    )


def profile_batch(
    dataset: CocoDataset, size: tuple[int, int], count: int
) -> tuple[list[Tensor], list[Target]]:
    """The first `count` images with instances, stretched to `size` (height, width)."""
    usable = [index for index in range(len(dataset)) if dataset.instances(index)]
    images, targets = [], []
    for place in range(count):
        image, target = dataset[usable[place % len(usable)]]
        height, width = image.shape[-2:]
        keep = target["iscrowd"] == 0
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        images.append(resize_image(to_float(image), list(size)))
        targets.append(
            {
                "image_id": target["image_id"],
                "boxes": target["boxes"][keep] * scale,
                "labels": target["labels"][keep],
                "masks": resize_mask(target["masks"][keep], list(size)),
            }
        )
    return images, targets


def model_section(config: RunConfig) -> dict[str, Any]:
    """The `model` section of a record."""
    model = config.model
    library = model.library
    # Where the library cannot be had, that is the error of the record.
    with suppress(InputError):
        library = detectors.resolve_library(library)
    return {
        "backbone": model.backbone,
        "method": model.method,
        "library": library,
        "attention": _attention_label(config),
        "arch": model.arch,
        "drop_path": model.drop_path,
        "schedule": config.train.schedule,
    }


def _attention_label(config: RunConfig) -> str:
    """The mechanism, and "/ full" where the last stages have full attention instead."""
    names = config.model.attention.split(",")
    try:
        stages = parse(config.model.arch, names[0] if len(names) == 1 else names)
    except ValueError:
        return config.model.attention
    return " / ".join(dict.fromkeys(stage.attention for stage in stages))


def error_section(error: BaseException) -> dict[str, Any]:
    """The `error` section of a record."""
    return {
        "kind": _kind(error),
        "message": " ".join(str(error).split()) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }


def _kind(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, DivergedError):
        return "diverged"
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out_of_memory"
    return "error"


def _device_name(sections: dict[str, Any]) -> str:
    device = sections.get("device")
    if device is None:
        return "none"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pair(size: Sequence[int]) -> tuple[int, int]:
    return size[0], size[1]


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start
