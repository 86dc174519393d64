"""One run: build, count, train, evaluate, measure; and its record, whatever happens in it."""

import dataclasses
import datetime
import functools
import gc
import hashlib
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies import DDPStrategy
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize_image, resize_mask

from bench import checkpoints as files
from bench import detectors, flops, latency, launch, memory, published, record
from bench.arch import parse
from bench.backbone import ViL
from bench.checkpoints import Checkpoints
from bench.config import ProfileConfig, RunConfig, TrainConfig
from bench.data.coco import CocoDataset, Target
from bench.data.generated import generate
from bench.data.loader import clear_worker_errors, evaluation_batches
from bench.errors import InputError
from bench.evaluate import CocoEvaluator, State
from bench.logs import StepLog, readable, story, table
from bench.record import Record
from bench.train import DivergedError, TrainingLog, effective, scaling_note, to_float, train
from bench.workload import Workload, timing_section

# Data sets up to this size are read whole before the first run.
_DECODED_AT_START = 2000
# Shares of a run's time, for the progress bar alone.
_TRAINED, _EVALUATED = 0.85, 0.95
# How long a process that failed waits for the others to fail too.
_MEETING = datetime.timedelta(seconds=10)


class AbandonedError(RuntimeError):
    """This process of several failed, and the others wait for it in vain."""


class Progress(Protocol):
    """Told how much of a run is done (0 to 1) and what it does."""

    def __call__(self, done: float, doing: str) -> None: ...


def run(
    config: RunConfig,
    *,
    output: Path | None = None,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
    tensorboard: bool = False,
) -> Record:
    """Do one run and write its record below `output/records`.

    A run that was stopped continues from its newest checkpoint. An error ends the run, not the
    caller: the record says what it was. All processes of a run call this; the first writes.

    Args:
        output: folder of records, checkpoints, logs and generated data; `results/{suite}` by
            default.
        command: the command line, for the record.
        tensorboard: write TensorBoard's events too, to `output/tensorboard`.

    Raises:
        InputError: for a mistake of the user; it is in the record too.
        KeyboardInterrupt: when interrupted, after the record is written.
        AbandonedError: where this process failed and others did not, after the record is written.
    """
    output = output or Path("results") / (config.suite or "runs")
    world = launch.world()
    sections: dict[str, Any] = {}
    notes: list[str] = []
    error: dict[str, Any] | None = None
    raised: BaseException | None = None
    key = record.key(config.as_dict())
    failures = len(_failures(config, output))
    name = stem(config)
    checkpoints = Checkpoints(output / "checkpoints" / name, identity={"configuration": key})
    with ExitStack() as stack:
        journal = None
        if world.is_first:
            stack.enter_context(readable(output / "logs" / f"{name}.log"))
        try:
            if world.is_first:
                journal = stack.enter_context(_journal(config, output, tensorboard))
            _tell_start(config, command)
            _measure(config, output, checkpoints, sections, notes, progress or _silent, journal)
        except (Exception, KeyboardInterrupt) as caught:
            error = error_section(caught)
            raised = caught if error["kind"] in ("input", "interrupted") else None
            story.info("failed: %s", error["message"])
        else:
            story.info("done")
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
    alone = error is not None and error["kind"] != "interrupted" and not _all_failed(world)
    # One that failed alone has written it; the next fails as that one is gone.
    told = alone and len(_failures(config, output)) > failures
    if (world.is_first or alone) and not told:
        record.write(result, output / "records")
    if alone and raised is None:
        raise AbandonedError(result.error["message"] if result.error else "")
    if raised is not None:
        raise raised
    if error is None and world.is_first:
        checkpoints.remove()
    return result


def stem(config: RunConfig) -> str:
    """What the files of a run are called: its row, and the head of its key."""
    return f"{record.slug(config.row)}-{record.key(config.as_dict())[:10]}"


def _failures(config: RunConfig, output: Path) -> list[Path]:
    return list((output / "records").glob(f"{stem(config)}-failed-*.json"))


def _journal(config: RunConfig, output: Path, tensorboard: bool) -> StepLog:
    name = stem(config)
    return StepLog(
        output / "logs" / f"{name}.jsonl",
        tensorboard=output / "tensorboard" / name if tensorboard else None,
        every=config.train.log_every,
        total=effective(config.train, config.model.method).steps,
    )


def _tell_start(config: RunConfig, command: Sequence[str] | None) -> None:
    """Environment and configuration, to the run's log."""
    place = record.environment(command=list(command or sys.argv), device=config.device)
    story.info("row %s of suite %s, seed %d", config.row, config.suite or "none", config.seed)
    story.info("environment:\n%s", OmegaConf.to_yaml(place).rstrip())
    story.info("configuration:\n%s", OmegaConf.to_yaml(config.as_dict()).rstrip())


@functools.cache
def _meeting() -> Any:
    """A group of all processes in which a process can wait for a limited time."""
    return torch.distributed.new_group(backend="gloo", timeout=_MEETING)


def _all_failed(world: launch.World) -> bool:
    """Whether every process of the run failed, as this one did."""
    if world.size == 1 or not torch.distributed.is_initialized():
        return True
    try:
        torch.distributed.monitored_barrier(group=_meeting(), timeout=_MEETING)
    except RuntimeError:
        return False
    return True


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


def agree(config: RunConfig, decide: Callable[[], list[bool]]) -> list[bool]:
    """Return what the first process decides, in all processes of a run."""
    world = launch.world()
    if world.size == 1:
        return decide()
    fabric = make_fabric(config)
    decided = decide() if world.is_first else []
    found: list[bool] = fabric.broadcast(decided)
    return found


def check_data(
    configs: Sequence[RunConfig], output: Path, *, processes: int | None = None
) -> list[str]:
    """Read every split of the runs and return what is odd but usable, a line each.

    Args:
        processes: how many each run will have, if they are not started yet.

    Raises:
        InputError: for data that cannot be used; before any run has cost time.
    """
    lines: dict[str, None] = {}
    seen: set[tuple[Path, str, str]] = set()
    for config in configs:
        local = launch.World(size=processes, local_size=processes) if processes else None
        check_device(config, local)
        if config.train.init is not None and not Path(config.train.init).is_file():
            raise InputError(f"train.init={config.train.init}: no such file")
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


def build_backbone(config: RunConfig) -> ViL:
    """The untrained backbone of a run, its weights drawn from the run's seed.

    Raises:
        InputError: for a model that cannot be built, naming the row.
    """
    data, model = config.data, config.model
    names = model.attention.split(",")
    torch.manual_seed(config.seed)
    try:
        return ViL(
            model.arch,
            attention=names[0] if len(names) == 1 else names,
            image_size=_pair(data.fixed_size) if data.fixed_size else data.max_size,
            drop_path=model.drop_path,
            norm_embed=model.norm_embed,
            **model.options,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"row {config.row!r}: {error}") from error


def build_detector(config: RunConfig, num_classes: int) -> detectors.Detector:
    """The untrained detector of a run, its weights drawn from the run's seed."""
    data, model = config.data, config.model
    fixed = _pair(data.fixed_size) if data.fixed_size else None
    vil = build_backbone(config)
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


def check_device(config: RunConfig, world: launch.World | None = None) -> tuple[str, int | None]:
    """Return the accelerator of a run, "cpu" or "cuda", and the index asked for.

    Raises:
        InputError: for a device that is not there, or another number of processes than devices.
    """
    world = world or launch.world()
    name, _, index = config.device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"device={config.device!r} is none of auto, cpu, cuda, cuda:N")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={config.device!r}: torch {torch.__version__} sees no CUDA device")
    if index and int(index) >= torch.cuda.device_count():
        raise InputError(f"device={config.device!r}: there are {torch.cuda.device_count()} devices")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and config.train.precision == "16-mixed":
        raise InputError("train.precision=16-mixed needs a GPU; the CPU takes 32-true, bf16-mixed")
    if config.train.devices != world.size:
        raise InputError(
            f"train.devices={config.train.devices} and {world.size} process(es): start it with"
            " --devices, torchrun or srun, which set it"
        )
    if index and world.size > 1:
        raise InputError(f"device={config.device!r}: several devices are cuda, without a number")
    if name == "cuda" and world.local_size > torch.cuda.device_count():
        raise InputError(
            f"{world.local_size} processes on this machine, which has"
            f" {torch.cuda.device_count()} CUDA devices"
        )
    return name, int(index) if index else None


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric on the run's device or devices, in its precision.

    Raises:
        InputError: for a device that is not there.
    """
    world = launch.world()
    name, index = check_device(config, world)
    if world.size == 1:
        return _single(config, name, index)
    environments: dict[str, Callable[[], ClusterEnvironment]] = {
        "torchrun": TorchElasticEnvironment,
        "slurm": lambda: SLURMEnvironment(auto_requeue=False),
        "spawn": LightningEnvironment,
    }
    fabric = Fabric(
        accelerator=name,
        devices=world.local_size,
        num_nodes=world.size // world.local_size,
        # The backbone's classification head is no part of the detectors' losses. Buffers are the
        # same in all processes without being sent: what is random in them is drawn from the step.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False),
        plugins=[_precision(config, name), environments[world.launcher]()],
    )
    # Importing them sets their level.
    for library in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Of tables of one row, whose strides mean nothing.
    warnings.filterwarnings("ignore", message="(?s).*Grad strides do not match bucket view strides")
    fabric.launch()
    _meeting()
    return fabric


def single_fabric(config: RunConfig) -> Fabric:
    """Fabric on one device here, however many the run has; on the CPU without half precision."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = config.train.precision
    if cpu and precision == "16-mixed":
        precision = "32-true"
    recipe = dataclasses.replace(config.train, devices=1, accumulate=1, precision=precision)
    config = dataclasses.replace(config, train=recipe)
    name, index = check_device(config, launch.World())
    return _single(config, name, index)


def _single(config: RunConfig, accelerator: str, index: int | None) -> Fabric:
    """Fabric on one device, whatever started this process."""
    return Fabric(
        accelerator=accelerator,
        devices=1 if index is None else [index],
        plugins=[_precision(config, accelerator), LightningEnvironment()],
    )


class _MixedPrecision(MixedPrecision):
    """Mixed precision that leaves inputs alone: coordinates of boxes are no numbers for half."""

    def convert_input(self, data: Any) -> Any:
        return data


def _precision(config: RunConfig, accelerator: str) -> Precision:
    precision: Any = config.train.precision
    if precision == "32-true":
        return Precision()
    return _MixedPrecision(precision, device=accelerator)


def _measure(
    config: RunConfig,
    output: Path,
    checkpoints: Checkpoints,
    sections: dict[str, Any],
    notes: list[str],
    progress: Progress,
    journal: StepLog | None,
) -> None:
    """Fill `sections`, one after the other, so that what was reached before an error is kept."""
    progress(0.0, "reading data")
    fabric = make_fabric(config)
    sections["device"] = fabric.device
    recipe = effective(config.train, config.model.method)
    scaled = scaling_note(config.train)
    notes += [scaled] if scaled else []
    # Generated data is made once, by the first process.
    if fabric.is_global_zero:
        data_root(config, output)
    fabric.barrier()
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

    if config.train.init is not None:
        notes.append(initialise(detector, Path(config.train.init)))
    _tell_model(detector, training, splits, fabric, recipe, sections, notes)
    model, result = train(
        detector,
        training,
        fabric=fabric,
        config=recipe,
        data=config.data,
        seed=config.seed,
        checkpoints=checkpoints,
        progress=lambda step, loss: progress(
            _TRAINED * step / recipe.steps,
            f"training, step {step} of {recipe.steps}, loss {loss:.3f}",
        ),
        journal=journal,
    )
    sections["training"] = _training_section(result, recipe)

    def evaluating(done: float, doing: str) -> None:
        progress(_TRAINED + (_EVALUATED - _TRAINED) * done, doing)

    evaluated = [evaluate(model, split, config, fabric, evaluating) for split in splits]
    if fabric.is_global_zero:
        sections["evaluation"] = evaluated[0] | {"also": evaluated[1:]}

    if config.profile.enabled:
        progress(_EVALUATED, "measuring memory and latency")
        if fabric.world_size > 1:
            # Its hooks would wait for the other processes.
            del model
            gc.collect()
            solo = _solo(config, fabric)
            model = solo.setup_module(detector)
        else:
            solo = fabric
        if fabric.is_global_zero:
            sections["memory"], sections["latency"] = _profile(
                detector, model, training, config, solo
            )
    fabric.barrier()
    progress(1.0, "done")


def _solo(config: RunConfig, fabric: Fabric) -> Fabric:
    """Fabric on the device of this process alone."""
    device = fabric.device
    return _single(config, device.type, device.index if device.type == "cuda" else None)


def _training_section(result: TrainingLog, recipe: TrainConfig) -> dict[str, Any]:
    parts = recipe.devices * recipe.accumulate
    return result.as_record(recipe.batch_size) | {
        "processes": recipe.devices,
        "parts_of_a_step": parts,
        "images_of_a_part": recipe.batch_size // parts,
    }


def _tell_model(
    detector: detectors.Detector,
    training: CocoDataset,
    splits: Sequence[CocoDataset],
    fabric: Fabric,
    recipe: TrainConfig,
    sections: dict[str, Any],
    notes: Sequence[str],
) -> None:
    """What is trained, on what and how, to the run's log."""
    parts = sections["parameters"]["by_part"]
    rows = [*parts.items(), ("total", sections["parameters"]["total"])]
    total = sections["flops"]["total"]
    story.info(
        "model: %s of %s %s; parameters:\n%s",
        detector.method,
        detector.library,
        detector.library_version,
        table(rows),
    )
    story.info("%.2f G multiply-adds an image of the profile's size", total / 1e9)
    images = ", ".join(f"{len(split)} of {split.split}" for split in [training, *splits])
    story.info("images: %s", images)
    story.info(
        "%d steps of %d images, %.2f epochs, over %d process(es) on %s, %d part(s) each",
        recipe.steps,
        recipe.batch_size,
        recipe.steps * recipe.batch_size / max(1, len(training)),
        fabric.world_size,
        fabric.device,
        recipe.accumulate,
    )
    for note in notes:
        story.info("note: %s", note)


def initialise(detector: detectors.Detector, path: Path) -> str:
    """Load what fits of a classifier's or detector's checkpoint, and say what did.

    Raises:
        InputError: for a file that cannot be read, or none of whose tensors fits the backbone.
    """
    given = files.load_file(path)
    if not any(name.startswith(files.DETECTOR_PREFIX) for name in given):
        given = files.convert(given, detector.vil).tensors
    own = detector.state_dict()
    fitting = {
        name: tensor
        for name, tensor in given.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not any(name.startswith(files.DETECTOR_PREFIX) for name in fitting):
        raise InputError(f"train.init={path}: none of its {len(given)} tensors fits the backbone")
    detector.load_state_dict({**own, **fitting})
    left = sorted(set(given) - set(fitting))
    missing = sum(name.startswith(files.DETECTOR_PREFIX) for name in set(own) - set(fitting))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return (
        f"initialised from {path.name} (sha256 {digest[:16]}): {len(fitting)} tensors"
        + (f"; left out as they do not fit: {', '.join(left)}" if left else "")
        + (f"; {missing} of the backbone start anew" if missing else "")
    )


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
    return {
        **dataclasses.asdict(report),
        "unit": flops.UNIT,
        "published": published.section(
            detector, image_size=report.image_size, proposals=profile.proposals
        ),
    }


def evaluate(
    model: nn.Module, split: CocoDataset, config: RunConfig, fabric: Fabric, progress: Progress
) -> dict[str, Any]:
    """The `evaluation` section of one split; figures in the first process alone."""
    evaluator = CocoEvaluator(split, resamples=config.evaluate.bootstrap)
    model.eval()
    with _timed() as seconds, torch.no_grad(), clear_worker_errors():
        done = 0
        for images, targets in evaluation_batches(
            split,
            batch_size=config.evaluate.batch_size,
            num_workers=config.data.workers,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            outputs = model([to_float(image.to(fabric.device)) for image in images])
            evaluator.update(outputs, targets)
            done = min(done + len(images) * fabric.world_size, len(split))
            progress(done / len(split), f"evaluating {split.split}, image {done} of {len(split)}")
        _gather(evaluator, fabric)
        figures = evaluator.compute() if fabric.is_global_zero else {}
    return {
        "split": split.split,
        "images": len(split),
        "annotations_sha256": split.fingerprint,
        "seconds": seconds(),
        "unit": "percent",
        **figures,
    }


def _gather(evaluator: CocoEvaluator, fabric: Fabric) -> None:
    """Give the first process what all have found."""
    if fabric.world_size == 1:
        return
    states: list[State] | None = None
    if fabric.is_global_zero:
        states = [{} for _ in range(fabric.world_size)]
    torch.distributed.gather_object(evaluator.state(), states)
    evaluator.merge(states or ())


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
        effort = latency.Effort(min_repeats=profile.repeats, min_seconds=profile.seconds)
        timing = latency.measure(call, device=device, effort=effort)
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
    library, version = model.library, None
    # Where the library cannot be had, that is the error of the record.
    with suppress(InputError):
        library = detectors.resolve_library(library)
        version = detectors.library_version(library)
    return {
        "backbone": model.backbone,
        "method": model.method,
        "library": library,
        "library_version": version,
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
