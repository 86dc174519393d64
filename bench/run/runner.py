"""One run: build, count, train, evaluate, measure; and its record, whatever happens in it."""

import datetime
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from torch import nn

from bench import record
from bench.config.schema import RunConfig, TrainConfig
from bench.data import split as inputs
from bench.data.coco import CocoDataset
from bench.errors import InputError
from bench.files import sha256
from bench.measure import latency, memory
from bench.measure.costs import flops_section
from bench.measure.workload import Workload, stated_rois, timing_section
from bench.model import build as models
from bench.model import detectors
from bench.model.optimizer import effective, scaling_note
from bench.model.weights import save_file
from bench.record import Record, error_section
from bench.run.checkpoints import Checkpoints
from bench.run.evaluate import Progress, evaluate
from bench.run.evaluate import remarks as evaluation_remarks
from bench.run.train import TrainingLog, train
from bench.system import devices, locks
from bench.system import processes as launch
from bench.system.interrupt import Held
from bench.system.locks import HeldError
from bench.system.logs import StepLog, readable, story, table

# Shares of a run's time, for the progress bar alone.
_TRAINED, _EVALUATED = 0.85, 0.95
# How long a run waits for one that is ending: of a command that was stopped, or killed, just now.
_PATIENCE = 5.0


class AbandonedError(RuntimeError):
    """This process of several failed, and the others wait for it in vain."""


@dataclass
class _Outcome:
    """What a run came to: what its record says, and what is raised when that is written."""

    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    raised: BaseException | None = None


def run(
    config: RunConfig,
    *,
    output: Path | None = None,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
    tensorboard: bool = False,
    keep_weights: bool = True,
) -> Record:
    """Do one run and write its record below `output/records`.

    A run that was stopped continues from its newest checkpoint, and one that has its record is not
    done again. An error ends the run, not the caller: the record says what it was. All processes of
    a run call this; the first writes.

    Args:
        output: folder of records, checkpoints, weights, logs and generated data;
            `results/{suite}` by default.
        command: the command line, for the record.
        tensorboard: write TensorBoard's events too, to `output/tensorboard`.
        keep_weights: write what was trained to `output/weights`.

    Raises:
        InputError: for a mistake of the user; it is in the record too.
        HeldError: where another command does this run in the same folder.
        KeyboardInterrupt: when interrupted, after the record is written.
        AbandonedError: where this process failed and others did not, after the record is written.
    """
    output = output or Path("results") / (config.suite or "runs")
    with _claimed(config, output) as found:
        return found or _run(
            config,
            output,
            progress=progress or _silent,
            command=command,
            tensorboard=tensorboard,
            keep_weights=keep_weights,
        )


@contextmanager
def _claimed(config: RunConfig, output: Path) -> Iterator[Record | None]:
    """Keep other commands from the run's files, and give its record if it has one by now."""
    done = output / "records" / record.done_name(config.row, record.key(config.as_dict()))
    with ExitStack() as stack:

        def claim() -> list[bool]:
            try:
                stack.enter_context(claimed(config, output))
            except HeldError:
                return [True, False]
            return [False, done.exists()]

        held, is_done = devices.agree(config, claim)
        if held:
            raise HeldError(_lock(config, output))
        yield record.read(done) if is_done else None


@contextmanager
def claimed(config: RunConfig, output: Path) -> Iterator[None]:
    """Keep other commands from doing a run in `output`.

    Raises:
        HeldError: where one does it.
        InputError: where the folder cannot be written.
    """
    path = _lock(config, output)
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.locked(path, patience=_PATIENCE))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        yield


def _lock(config: RunConfig, output: Path) -> Path:
    return output / "locks" / f"{stem(config)}.lock"


def _run(
    config: RunConfig,
    output: Path,
    *,
    progress: Progress,
    command: Sequence[str] | None,
    tensorboard: bool,
    keep_weights: bool,
) -> Record:
    """Do the run that this command has claimed."""
    world = launch.world()
    came = _Outcome()
    failures = len(_failures(config, output))
    name = stem(config)
    checkpoints = Checkpoints(
        output / "checkpoints" / name, identity={"configuration": record.key(config.as_dict())}
    )
    with ExitStack() as stack:
        journal = None
        if world.is_first:
            stack.enter_context(readable(output / "logs" / f"{name}.log"))
        try:
            if world.is_first:
                journal = stack.enter_context(_journal(config, output, tensorboard))
            _tell_start(config, command)
            weights = output / "weights" / f"{name}.pth" if keep_weights else None
            _measure(
                config, output, checkpoints, weights, came.sections, came.notes, progress, journal
            )
        except (Exception, KeyboardInterrupt) as caught:
            came.error = error_section(caught)
            came.raised = caught if came.error["kind"] in ("input", "interrupted") else None
            story.info("failed: %s", came.error["message"])
        else:
            story.info("done")
    # Who interrupts now waits for the record.
    with Held(quiet=not world.is_first) as held:
        result = _record(config, came, command)
        failed = came.error is not None and came.error["kind"] != "interrupted"
        alone = failed and not devices.all_failed(world)
        # One that failed alone has written it; the next fails as that one is gone.
        told = alone and len(_failures(config, output)) > failures
        if (world.is_first or alone) and not told:
            record.write(result, output / "records")
        # Where weights were not kept against the user's will, the newest checkpoint holds them.
        kept = not keep_weights or (result.training or {}).get("weights") is not None
        if came.error is None and world.is_first and kept:
            checkpoints.remove()
    if came.raised is not None:
        raise came.raised
    if alone:
        raise AbandonedError(result.error["message"] if result.error else "")
    if held.requested:
        raise KeyboardInterrupt("interrupted while the record was written")
    return result


def _record(config: RunConfig, came: _Outcome, command: Sequence[str] | None) -> Record:
    device = devices.device_name(came.sections.get("device"))
    place = record.environment(command=list(command or sys.argv), device=device)
    return Record(
        suite=config.suite,
        row=config.row,
        key=record.key(config.as_dict()),
        status="failed" if came.error else "done",
        error=came.error,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        config=config.as_dict(),
        environment=place | {"threads": torch.get_num_threads()},
        model=models.model_section(config),
        notes=came.notes,
        **{name: value for name, value in came.sections.items() if name != "device"},
    )


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
    story.info("environment:\n%s", yaml.safe_dump(place, sort_keys=False).rstrip())
    story.info("configuration:\n%s", yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip())


def _silent(done: float, doing: str) -> None:
    """The progress of a caller that asks for none."""
    del done, doing


def _measure(
    config: RunConfig,
    output: Path,
    checkpoints: Checkpoints,
    weights: Path | None,
    sections: dict[str, Any],
    notes: list[str],
    progress: Progress,
    journal: StepLog | None,
) -> None:
    """Fill `sections`, one after the other, so that what was reached before an error is kept."""
    progress(0.0, "reading data")
    fabric = devices.make_fabric(config)
    sections["device"] = fabric.device
    recipe = effective(config.train, config.model.method)
    training, *splits = _open(config, output, fabric)
    notes += _remarks(config, [training, *splits] if fabric.is_global_zero else [])

    detector = models.build_detector(config, training.num_classes)
    sections["parameters"] = models.parameters_section(detector)
    sections["flops"] = flops_section(detector, config.profile)
    if config.train.init is not None:
        notes.append(models.initialise(detector, Path(config.train.init)))
    _tell_model(detector, training, splits, fabric, recipe, sections, notes)

    model: nn.Module | None
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
    sections["training"] = _training_section(result, recipe) | {
        "classes": [list(category) for category in training.categories]
    }
    if fabric.is_global_zero and weights is not None:
        sections["training"]["weights"] = _save_weights(detector, weights, output, notes)

    def evaluating(done: float, doing: str) -> None:
        progress(_TRAINED + (_EVALUATED - _TRAINED) * done, doing)

    evaluated = [evaluate(model, split, config, fabric, evaluating) for split in splits]
    if fabric.is_global_zero:
        sections["evaluation"] = evaluated[0] | {"also": evaluated[1:]}
        notes += [note for section in evaluated for note in evaluation_remarks(section)]

    if config.profile.enabled and fabric.is_global_zero:
        progress(_EVALUATED, "measuring memory and latency")
        if fabric.world_size > 1:
            # Its hooks would wait for the other processes.
            model = None
            gc.collect()
        solo = fabric if fabric.world_size == 1 else devices.alone(config, fabric)
        costs = _profile(detector, model, training, config, solo)
        sections["memory"], sections["latency"] = costs
    fabric.barrier()
    progress(1.0, "done")


def _open(config: RunConfig, output: Path, fabric: Fabric) -> list[CocoDataset]:
    """The split to train on, and those to evaluate on."""
    # Generated data is made once, by the first process.
    if fabric.is_global_zero:
        inputs.data_root(config, output)
    fabric.barrier()
    return inputs.open_splits(config, inputs.data_root(config, output))


def _remarks(config: RunConfig, splits: Sequence[CocoDataset]) -> list[str]:
    """What a reader of the numbers should know before anything is trained."""
    scaled = scaling_note(config.train)
    remarks = [scaled] if scaled else []
    remarks += inputs.remarks(config, splits) if splits else []
    if config.data.fixed_size:
        size = "x".join(map(str, config.data.fixed_size))
        remarks.append(f"works for one sequence length: every image is resized to {size}")
    return remarks


def _training_section(result: TrainingLog, recipe: TrainConfig) -> dict[str, Any]:
    parts = recipe.devices * recipe.accumulate
    return result.as_record(recipe.batch_size) | {
        "processes": recipe.devices,
        "parts_of_a_step": parts,
        "images_of_a_part": recipe.batch_size // parts,
        "weights": None,
    }


def _save_weights(
    detector: nn.Module, path: Path, output: Path, notes: list[str]
) -> dict[str, Any] | None:
    """Write what was trained, and return where it is and its hash; a full disk is a note."""
    try:
        save_file(detector.state_dict(), path)
    except InputError as error:
        notes.append(f"the weights were not kept: {error}; the newest checkpoint stays instead")
        story.info("note: %s", notes[-1])
        return None
    story.info("weights: %s", path)
    return {"path": path.relative_to(output).as_posix(), "sha256": sha256(path)}


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


def _profile(
    detector: detectors.Detector,
    model: nn.Module | None,
    dataset: CocoDataset,
    config: RunConfig,
    fabric: Fabric,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Peak memory and latency of inference and of a training step, on images of one stated size."""
    profile, device, size = config.profile, fabric.device, config.profile.image_size
    images, targets = inputs.profile_batch(dataset, (size[0], size[1]), profile.batch_size)
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
        "rois": stated_rois(config),
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
