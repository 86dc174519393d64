"""One run: open the data, build, train, evaluate, measure; and its record, whatever happens."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from bench import record
from bench.config.schema import CLASSIFIER, RunConfig, TrainConfig
from bench.config.sources import import_anew
from bench.config.suites import resize_notes
from bench.data import split as inputs
from bench.data.coco import CocoDataset
from bench.data.generated import data_root
from bench.errors import InputError, saying, some
from bench.files import sha256
from bench.measure.costs import flops_section, run_sections
from bench.model import build as models
from bench.model.optimizer import effective, schedule_notes
from bench.model.weights import (
    load_detector,
    load_file,
    load_origin,
    load_settings,
    save_file,
)
from bench.record import Record, error_section
from bench.run.checkpoints import Checkpoints
from bench.run.evaluate import Progress, evaluate
from bench.run.evaluate import remarks as evaluation_remarks
from bench.run.identity import Identity, done, identify, records_of, replaced
from bench.run.train import TrainingLog, train
from bench.run.trial import run_own, sizes_of
from bench.system import devices, locks, processes
from bench.system.interrupt import StopRequest
from bench.system.locks import LockedError
from bench.system.logs import StepLog, readable, run_log, table

# Shares of a run's time, for the progress bar alone.
_TRAINED, _EVALUATED = 0.85, 0.95
# Seconds to wait for a command that is ending: it was stopped, or killed, just now.
_LOCK_TIMEOUT = 5.0
_WEIGHTS_OF = "the weights are those of the run of"


class AbandonedError(RuntimeError):
    """This process of several failed, and the others wait for it in vain.

    Attributes:
        recorded_before: whether another process failed first and wrote the record, so that this
            error only follows from that one.
    """

    def __init__(self, message: str, *, recorded_before: bool) -> None:
        super().__init__(message)
        self.recorded_before = recorded_before


@dataclass(frozen=True)
class Options:
    """How a run is done, which changes nothing of what it is.

    Attributes:
        progress: receives how much is done, and what is being done.
        command: the command line, for the record.
        tensorboard: write TensorBoard's events too, to `output/tensorboard`.
        keep_weights: write what was trained to `output/weights`.
        latency: measure latency, alone and at the end of the run.
    """

    progress: Progress = lambda _done, _doing: None
    command: Sequence[str] = ()
    tensorboard: bool = False
    keep_weights: bool = True
    latency: bool = True


def run(
    config: RunConfig,
    *,
    output: Path | None = None,
    identity: Identity | None = None,
    options: Options | None = None,
) -> Record:
    """Do one run and write its record below `output/records`.

    A run that was stopped continues from its newest checkpoint, and one that has its record is not
    done again. One whose weights are there already, of a run with other settings of evaluation or
    measurement, is not trained again. An error ends the run, not the caller: the record says what
    it was. All processes of a run call this; the first writes.

    Args:
        output: folder of records, checkpoints, weights, logs and generated data;
            `results/{suite}` by default.
        identity: of the run, where the caller has looked at its files already.
        options: how it is done.

    Raises:
        InputError: for a mistake of the user; it is in the record too.
        LockedError: where another command does this run in the same folder.
        KeyboardInterrupt: when interrupted, after the record is written.
        AbandonedError: where this process failed and others did not, after the record is written.
    """
    record.code_at_start()
    output = output or Path("results") / (config.suite or "runs")
    if identity is None:
        import_anew(config.model)
    identity = identity or devices.decide_in_first(config, lambda: identify(config))
    with _claimed(config, identity, output) as (finished, trained):
        if finished is not None:
            return finished
        return _kind(config)(config, identity, output, options or Options(), trained).record()


def _kind(config: RunConfig) -> "type[Run]":
    if config.model.method == CLASSIFIER:
        # It stands on this module.
        from bench.run.pretrain import Pretraining

        return Pretraining
    return Run


@contextmanager
def _claimed(
    config: RunConfig, identity: Identity, output: Path
) -> Iterator[tuple[Record | None, Record | None]]:
    """Keep other commands from the run's files.

    Yields:
        The run's record, if it has one by now, and the record of a run that kept its weights.
    """
    with ExitStack() as stack:

        def claim() -> tuple[bool, Record | None, Record | None]:
            try:
                stack.enter_context(claimed(identity, output))
            except LockedError:
                return True, None, None
            finished = done(identity, output / "records")
            return False, finished, None if finished else _trained_before(identity, output)

        locked, finished, trained = devices.decide_in_first(config, claim)
        if locked:
            raise LockedError(_lock(identity, output))
        yield finished, trained


@contextmanager
def claimed(identity: Identity, output: Path) -> Iterator[None]:
    """Keep other commands from doing a run in `output`.

    Raises:
        LockedError: where one does it.
        InputError: where the folder cannot be written.
    """
    path = _lock(identity, output)
    with ExitStack() as stack:
        with saying(f"cannot write {path}"):
            stack.enter_context(locks.locked(path, timeout=_LOCK_TIMEOUT))
        yield


def _lock(identity: Identity, output: Path) -> Path:
    return output / "locks" / f"{identity.stem}.lock"


def _trained_before(identity: Identity, output: Path) -> Record | None:
    """The newest record of a run with the same weights, where it kept them and they are whole."""
    for entry in reversed(records_of(identity.row, output / "records")):
        kept = (entry.training or {}).get("weights")
        if entry.status != "done" or not kept or identity.changed(entry, weights_only=True) != []:
            continue
        path = output / kept["path"]
        if path.is_file() and sha256(path) == kept["sha256"]:
            return entry
    return None


@dataclass(frozen=True)
class Ending:
    """What one process does when its part of a run has ended.

    Attributes:
        writes: it writes the record.
        removes_checkpoints: they are of no more use.
        raises: "error" (the one that it ended with), "abandoned" or nothing.
    """

    writes: bool
    removes_checkpoints: bool
    raises: str


def ending(
    error: str | None,
    *,
    first: bool = True,
    alone: bool = False,
    recorded: bool = False,
    weights_safe: bool = True,
) -> Ending:
    """Decide how a process ends its part of a run.

    Args:
        error: kind of the error that ended it, or None.
        first: whether it is the run's first process.
        alone: whether it failed and others did not.
        recorded: whether another process that failed has written the record.
        weights_safe: whether weights are kept in their file, or nobody wants them.
    """
    of_user = error in ("input", "interrupted")
    return Ending(
        writes=(first or alone) and not (alone and recorded),
        removes_checkpoints=error is None and first and weights_safe,
        raises="abandoned" if alone else "error" if of_user else "",
    )


class Run:
    """A run that this command has claimed: its phases, and what is known of it so far.

    Args:
        config: of the run.
        identity: of the run.
        output: folder of everything it writes.
        options: how it is done.
        trained: the record of a run that trained and kept the same weights, or None.

    Attributes:
        sections: of the record, filled phase by phase, so that what was reached before an error
            is kept.
        notes: of the record.
        pretrain: what the weights at the start were trained on, where their file says so.
    """

    def __init__(
        self,
        config: RunConfig,
        identity: Identity,
        output: Path,
        options: Options,
        trained: Record | None = None,
    ) -> None:
        self.config, self.identity, self.output, self.options = config, identity, output, options
        self.trained_before = trained
        self.recipe = effective(config.train, config.model.method)
        self.world = processes.world()
        self.sections: dict[str, Any] = {}
        self.notes: list[str] = []
        self.pretrain: str | None = None
        self.checkpoints = Checkpoints(
            output / "checkpoints" / identity.stem,
            identity={"configuration": identity.weights_key},
        )
        self.phases: list[Callable[[], None]] = [
            self.open, self.build, self.check_inputs, self.train,
            self.evaluate, self.check_inputs, self.measure,
        ]  # fmt: skip

    def record(self) -> Record:
        """Do all phases, write the record and return it; see `run` for what is raised."""
        failures = len(self._failures())
        error: BaseException | None = None
        with ExitStack() as stack:
            if self.world.is_first:
                name = f"{self.identity.stem}.log"
                stack.enter_context(readable(self.output / "logs" / name))
            try:
                self.step_log = stack.enter_context(self._step_log()) if self._logs() else None
                self._log_start()
                for phase in self.phases:
                    phase()
                self.options.progress(1.0, "done")
                run_log.info("done")
            except (Exception, KeyboardInterrupt) as caught:
                error = caught
                run_log.info("failed: %s", caught)
        # Who interrupts now waits for the record.
        with StopRequest(quiet=not self.world.is_first) as request:
            result = self._result(error)
            kind = result.error["kind"] if result.error else None
            alone = kind not in (None, "interrupted") and not devices.all_failed(self.world)
            recorded = alone and len(self._failures()) > failures
            # Where weights could not be kept, the newest checkpoint holds them.
            kept = (result.training or {}).get("weights") is not None
            decided = ending(
                kind,
                first=self.world.is_first,
                alone=alone,
                recorded=recorded,
                weights_safe=kept or not self.options.keep_weights,
            )
            if decided.writes:
                record.write(result, self.output / "records")
            if decided.removes_checkpoints:
                self.checkpoints.remove()
        if decided.raises == "abandoned":
            raise AbandonedError(
                result.error["message"] if result.error else "", recorded_before=recorded
            )
        if decided.raises == "error" and error is not None:
            raise error
        if request.requested:
            raise KeyboardInterrupt("interrupted while the record was written")
        return result

    def open(self) -> None:
        """Set up devices and read the data."""
        self.options.progress(0.0, "reading data")
        self.fabric = devices.make_fabric(self.config)
        # Generated data is made once, by the first process.
        if self.fabric.is_global_zero:
            data_root(self.config, self.output)
        self.fabric.barrier()
        self.read(data_root(self.config, self.output))

    def read(self, root: Path) -> None:
        """Read the split to train on, and those to evaluate on."""
        opened = inputs.open_splits(self.config, root)
        self.training, *self.splits = opened
        self.notes += _remarks(self.config, opened if self.fabric.is_global_zero else [])

    def build(self) -> None:
        """Build the detector, count it, and load what it starts from."""
        config = self.config
        self.detector = models.build_detector(config, self.training.num_classes)
        self.sections["parameters"] = models.parameters_section(self.detector)
        self.sections["flops"], notes = flops_section(self.detector, config)
        self.notes += notes
        self.notes += models.buffer_notes(config, self.detector.vil)
        if config.train.init is not None:
            self.notes.append(models.initialise(self.detector, Path(config.train.init)))
            self.pretrain = load_origin(Path(config.train.init))
            self.notes += models.weights_notes(config, load_settings(Path(config.train.init)))
        sizes = sizes_of(config, [self.training, *self.splits])
        # What is not finite the loss says, with its images.
        with torch.random.fork_rng(), suppress(FloatingPointError):
            self.notes += run_own(config, sizes, devices.alone(config, self.fabric))
        self._log_model()

    def check_inputs(self, *, of_training: bool = False) -> None:
        """Refuse files that are not those any more that the run and its record are called after.

        Args:
            of_training: look at what the weights depend on alone.

        Raises:
            InputError: naming them.
        """
        changed: list[str] = []
        if self.fabric.is_global_zero:
            changed = replaced(self.identity, self.config, of_training=of_training)
        changed = self.fabric.broadcast(changed)
        if changed:
            raise InputError(
                f"changed while the command ran: {', '.join(changed)}; give it again, and"
                " what has no record of these files yet is run"
            )

    def train(self) -> None:
        """Train, or load the weights of a run that trained them before."""
        if self.trained_before is not None:
            self._load_trained(self.trained_before)
            return
        steps = self.recipe.steps

        def progress(step: int, loss: float) -> None:
            doing = f"training, step {step} of {steps}, loss {loss:.3f}"
            self.options.progress(_TRAINED * step / steps, doing)

        self.model, log = self.fit(progress)
        if len(log.places) > 1:
            parts = "; ".join(log.places)
            self.notes.append(f"trained in parts, each of which rounds in its own way: {parts}")
        if log.plain:
            self.notes.append(
                f"training changed {some(log.plain)}, plain attributes that no weights"
                " file holds: what loads the weights has their first values; register_buffer keeps"
                " them"
            )
        self.sections["training"] = _training_section(log, self.recipe) | {
            "classes": self.classes()
        }
        try:
            self.check_inputs(of_training=True)
        except InputError:
            self.checkpoints.remove()
            raise
        if self.fabric.is_global_zero and self.options.keep_weights:
            self.sections["training"]["weights"] = self._save_weights()

    def evaluate(self) -> None:
        """Evaluate on all splits."""

        def progress(done: float, doing: str) -> None:
            self.options.progress(_TRAINED + (_EVALUATED - _TRAINED) * done, doing)

        found = [self.score(split, progress) for split in self.splits]
        if self.fabric.is_global_zero:
            self.sections["evaluation"] = found[0] | {"also": found[1:]}
            self.notes += [note for section in found for note in evaluation_remarks(section)]

    def measure(self) -> None:
        """Measure memory and, where it is asked for, latency, in the first process."""
        if self.config.profile.enabled and self.fabric.is_global_zero:
            self.options.progress(_EVALUATED, "measuring")
            model: nn.Module | None = self.model
            fabric = self.fabric
            if fabric.world_size > 1:
                # Its hooks would wait for the other processes.
                del self.model
                model = None
                gc.collect()
                fabric = devices.alone(self.config, fabric)
            sections, notes = run_sections(
                self.detector,
                self.training,
                self.config,
                fabric,
                model=model,
                with_latency=self.options.latency,
            )
            self.sections |= sections
            self.notes += notes
        self.fabric.barrier()

    def fit(self, progress: Callable[[int, float], None]) -> tuple[nn.Module, TrainingLog]:
        """Train the detector; return it as Fabric wrapped it, and the log."""
        return train(
            self.detector,
            self.training,
            fabric=self.fabric,
            config=self.recipe,
            data=self.config.data,
            seed=self.config.seed,
            checkpoints=self.checkpoints,
            progress=progress,
            step_log=self.step_log,
            before_saving=partial(self.check_inputs, of_training=True),
        )

    def classes(self) -> list[Any]:
        """Return id and name of each class, as the record has them."""
        return [list(category) for category in self.training.categories]

    def score(self, split: Any, progress: Progress) -> dict[str, Any]:
        """Return the `evaluation` section of one split."""
        return evaluate(self.model, split, self.config, self.fabric, progress)

    def load(self, path: Path) -> None:
        """Load the weights that `save` wrote."""
        load_detector(self.detector, load_file(path))
        self.model = self.fabric.setup_module(self.detector)

    def save(self, path: Path) -> None:
        """Write the weights to a file."""
        save_file(self.detector.state_dict(), path)

    def _load_trained(self, before: Record) -> None:
        kept = before.training or {}
        self.load(self.output / kept["weights"]["path"])
        self.sections["training"] = dict(kept)
        self.notes += [n for n in before.notes if n.startswith(_WEIGHTS_OF)] or [
            f"{_WEIGHTS_OF} {before.created}, which trained them with the same settings;"
            " evaluated and measured anew"
        ]
        run_log.info("%s", self.notes[-1])

    def _save_weights(self) -> dict[str, Any] | None:
        """Write what was trained, and return where it is and its hash; a full disk is a note."""
        path = self.output / "weights" / f"{self.identity.stem}.pth"
        try:
            self.save(path)
        except InputError as error:
            note = f"the weights were not kept: {error}; the newest checkpoint stays instead"
            self.notes.append(note)
            run_log.info("note: %s", note)
            return None
        run_log.info("weights: %s", path)
        return {"path": path.relative_to(self.output).as_posix(), "sha256": sha256(path)}

    def _result(self, error: BaseException | None) -> Record:
        config = self.config
        fabric = getattr(self, "fabric", None)
        device = devices.device_name(None if fabric is None else fabric.device)
        place = record.environment(command=list(self.options.command or sys.argv), device=device)
        return record.of_run(
            config,
            key=self.identity.key,
            error=None if error is None else error_section(error),
            environment=place
            | {"threads": torch.get_num_threads(), "inputs": self.identity.inputs},
            model=models.model_section(config) | {"pretrain": self.pretrain},
            notes=self.notes,
            **self.sections,
        )

    def _failures(self) -> list[Path]:
        stem = record.done_name(self.config.row, self.identity.key).removesuffix(".json")
        return list((self.output / "records").glob(f"{stem}-failed-*.json"))

    def _step_log(self) -> StepLog:
        name = self.identity.stem
        return StepLog(
            self.output / "logs" / f"{name}.jsonl",
            tensorboard=self.output / "tensorboard" / name if self.options.tensorboard else None,
            every=self.config.train.log_every,
            total=self.recipe.steps,
        )

    def _logs(self) -> bool:
        return self.world.is_first and self.trained_before is None

    def _log_start(self) -> None:
        """Environment and configuration, to the run's log."""
        config = self.config
        command = list(self.options.command or sys.argv)
        place = record.environment(command=command, device=config.device)
        suite = config.suite or "none"
        run_log.info("row %s of suite %s, seed %d", config.row, suite, config.seed)
        run_log.info("environment:\n%s", yaml.safe_dump(place, sort_keys=False).rstrip())
        run_log.info(
            "configuration:\n%s", yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip()
        )

    def _log_model(self) -> None:
        """What is trained, on what and how, to the run's log."""
        detector, recipe, fabric = self.detector, self.recipe, self.fabric
        parameters = self.sections["parameters"]
        rows = [*parameters["by_part"].items(), ("total", parameters["total"])]
        run_log.info(
            "model: %s of %s %s; parameters:\n%s",
            detector.method,
            detector.library,
            detector.library_version,
            table(rows),
        )
        flops = self.sections["flops"]
        if flops is not None:
            total, missed = flops["total"] / 1e9, ", ".join(flops["uncounted"])
            incomplete = f", {missed} not counted" if missed else ""
            run_log.info("%.2f G multiply-adds an image of the profile's size%s", total, incomplete)
        images = (f"{len(split)} of {split.split}" for split in [self.training, *self.splits])
        run_log.info("images: %s", ", ".join(images))
        run_log.info(
            "%d steps of %d images, %.2f epochs, over %d process(es) on %s, %d part(s) each",
            recipe.steps,
            recipe.batch_size,
            recipe.steps * recipe.batch_size / max(1, len(self.training)),
            fabric.world_size,
            fabric.device,
            recipe.accumulate,
        )
        for note in self.notes:
            run_log.info("note: %s", note)


def _remarks(config: RunConfig, splits: Sequence[CocoDataset]) -> list[str]:
    """What a reader of the numbers should know before anything is trained."""
    remarks = schedule_notes(config)
    remarks += inputs.remarks(config, splits) if splits else []
    return remarks + resize_notes(config)


def _training_section(result: TrainingLog, recipe: TrainConfig) -> dict[str, Any]:
    parts = recipe.devices * recipe.accumulate
    return result.as_record(recipe.batch_size) | {
        "processes": recipe.devices,
        "parts_of_a_step": parts,
        "images_of_a_part": recipe.batch_size // parts,
        "weights": None,
    }
