"""Probes: small models of attention mechanisms, trained for seconds on tasks that tell them apart.

A probe says what a mechanism can do on a small grid; it does not predict COCO. What is asked stands
in `bench/data/symbols.py`, what is trained in `bench/model/probe.py` and `configs/probes.yaml`.
"""

import datetime
import math
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attentions.contract import Redrawing
from bench import record
from bench.config.probes import ROW, SUITE, Recipe, Subject
from bench.config.sources import Width, mechanism_sources
from bench.data.symbols import CHANCE, TASKS, Task
from bench.errors import DivergedError
from bench.files import cores
from bench.model.probe import HEADS, ProbeModel
from bench.record import Record, error_section
from bench.run.identity import OF_FAILURE
from bench.system.seeding import seed_everything

TASK_NAMES = tuple(TASKS)
# Of the steps, how many stand in the curve of the loss.
_LOSSES = 25


@dataclass(frozen=True)
class Outcome:
    """The results of one training.

    Attributes:
        right: of each level and image, the cells that were answered rightly.
        losses: means over equal parts of the training.
        seconds: of one processor.
    """

    right: list[list[int]]
    losses: list[float]
    seconds: float


def train(subject: Subject, task: str, seed: int) -> Outcome:
    """Train a model of `subject` on one task and evaluate it; one seed gives one result.

    Raises:
        DivergedError: for a loss, or scores in evaluation, that are not finite.
    """
    begun, recipe, asked = time.process_time(), subject.recipe, TASKS[task]
    seed_everything(seed)
    model = ProbeModel(subject.stages).train()
    lr, share = (recipe.row_lr, recipe.row_steps) if subject.kind == ROW else (recipe.lr, 1.0)
    steps = max(1, round(recipe.steps * share * asked.steps))
    optimizer = _Optimizer(model, recipe, steps, lr)
    redrawing = [part for part in model.modules() if isinstance(part, Redrawing)]
    losses = []
    generator = torch.Generator().manual_seed(seed)
    for step, images in enumerate(
        asked.batches(recipe.batch_size, steps=steps, generator=generator)
    ):
        for part in redrawing:
            part.set_training_step(step)
        scores = model(images.cells).flatten(0, 1)
        loss = nn.functional.cross_entropy(scores, images.answers.flatten(), ignore_index=-1)
        losses.append(loss.detach())
        loss.backward()
        optimizer.step(step)
    curve = torch.stack(losses)
    if not curve.isfinite().all():
        raise DivergedError(f"the loss of {task}, seed {seed}, is not finite")
    means = [float(part.mean()) for part in curve.tensor_split(min(_LOSSES, steps))]
    try:
        right = evaluate(model, asked, recipe.images)
    except DivergedError as error:
        raise DivergedError(f"evaluating {task}, seed {seed}: {error}") from None
    return Outcome(right, means, time.process_time() - begun)


def evaluate(model: nn.Module, task: Task, images: int) -> list[list[int]]:
    """Return the cells of each level and image that a model answers rightly.

    Raises:
        DivergedError: for scores that are not finite.
    """
    model.eval()
    right = []
    for level in task.levels:
        shown = task.evaluation(level, images)
        with torch.no_grad():
            scores = torch.cat([model(part) for part in shown.cells.split(16)])
        bad = int((~scores.flatten(1).isfinite().all(dim=1)).sum())
        if bad:
            raise DivergedError(f"{bad} of {len(scores)} images gave values that are not finite")
        right.append((scores.argmax(dim=-1) == shown.answers).sum(dim=1).tolist())
    return right


class _Optimizer:
    """AdamW with a warm-up and a cosine, over all parameters as one.

    The models are so small that an update of each parameter by itself would cost as much as a
    block.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int, lr: float) -> None:
        self.recipe, self.steps, self.lr = recipe, steps, lr
        parameters = list(model.parameters())
        self.all = nn.Parameter(torch.cat([one.detach().flatten() for one in parameters]))
        self.gradient = self.all.grad = torch.zeros_like(self.all)
        sizes = [one.numel() for one in parameters]
        parts = zip(self.all.detach().split(sizes), self.gradient.split(sizes), strict=True)
        for one, (values, gradient) in zip(parameters, parts, strict=True):
            one.data, one.grad = values.view_as(one), gradient.view_as(one)
        self.adam = torch.optim.AdamW(
            [self.all], betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )

    def step(self, number: int) -> None:
        """Update the parameters from their gradients, and forget these."""
        self.adam.param_groups[0]["lr"] = self.lr * self._share(number)
        self.gradient.mul_(self._shrink())
        self.adam.step()
        self.gradient.zero_()

    def _shrink(self) -> Tensor:
        return (self.recipe.clip_norm / (self.gradient.norm() + 1e-6)).clamp(max=1.0)

    def _share(self, number: int) -> float:
        warm = self.recipe.warm_up * self.steps
        if number < warm:
            return (number + 1) / warm
        done = (number - warm) / (self.steps - warm)
        last = self.recipe.last_lr
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class _Standing:
    """What is known of a subject.

    Attributes:
        outcomes: by task and seed.
        error: of the first training that failed.
    """

    subject: Subject
    key: str
    sources: dict[str, str]
    outcomes: dict[tuple[str, int], Outcome] = field(default_factory=dict)
    error: dict[str, Any] | None = None


_Job = tuple[_Standing, str, int]


def run(
    subjects: Sequence[Subject],
    output: Path,
    *,
    command: Sequence[str],
    log: Callable[[str], object],
    retry_failed: bool = False,
) -> list[Record]:
    """Probe what has no record in `output/probes` yet, and return the records of all subjects.

    Each training is the work of one process with one thread; there are as many as cores. A record
    is written as soon as the trainings of its subject are done.

    Args:
        subjects: of `bench.config.probes.plan`.
        output: folder.
        command: the command line, for the records.
        log: called with a line for each subject that is done.
        retry_failed: run again what has failed.

    Raises:
        InputError: if the folder cannot be written.
        KeyboardInterrupt: when interrupted; what was done before is written.
    """
    record.check_output(output, SUITE)
    folder = output / record.PROBES
    known = {one.key: one for one in record.newest(record.read_all(folder.glob("*.json")))}
    standings = [_standing(subject) for subject in subjects]
    missing = [
        one
        for one in standings
        if one.key not in known or (retry_failed and known[one.key].status == "failed")
    ]
    if len(missing) < len(standings):
        settled = [known[one.key].status for one in standings if one not in missing]
        failed = settled.count("failed")
        log(
            f"{len(settled) - failed} of {len(standings)} have their record"
            + (f", {failed} with {OF_FAILURE}" if failed else "")
        )
    for number, standing in enumerate(_work(missing), start=1):
        written = _record(standing, command)
        record.write(written, folder)
        known[standing.key] = written
        log(f"[{number}/{len(missing)}] {standing.subject.name}: {_describe(written)}")
    return [known[one.key] for one in standings]


def _standing(subject: Subject) -> _Standing:
    names = ",".join(stage.attention for stage in subject.stages)
    widths = {Width(stage.dim, HEADS, stage.num_global) for stage in subject.stages}
    found = mechanism_sources(names, widths=widths)
    sources = {source.name: source.sha256 for source in found}
    shown = {name: (t.levels, t.steps, t.easy) for name in subject.tasks if (t := TASKS[name])}
    key = record.key({**subject.values(), "shown": shown, "mechanism": sources})
    return _Standing(subject, key, sources)


def _work(standings: Sequence[_Standing]) -> Iterator[_Standing]:
    """Do the trainings of subjects side by side, and yield each subject that is done."""
    jobs = [
        (standing, task, seed)
        for standing in standings
        for seed in standing.subject.recipe.seeds
        for task in standing.subject.tasks
    ]
    left = Counter(id(standing) for standing, _, _ in jobs)
    for (standing, task, seed), outcome in _outcomes(jobs):
        if isinstance(outcome, Outcome):
            standing.outcomes[task, seed] = outcome
        else:
            standing.error = standing.error or outcome
        left[id(standing)] -= 1
        if not left[id(standing)]:
            yield standing


def _outcomes(jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Outcome | dict[str, Any]]]:
    """Do each job in one of as many processes as cores, of which one core needs none."""
    count = min(cores(), len(jobs))
    if count <= 1:
        for job in jobs:
            yield job, _attempt(job[0].subject, *job[1:])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_prepare)
    try:
        waiting = {pool.submit(_attempt, job[0].subject, *job[1:]): job for job in jobs}
        for future in as_completed(waiting):
            broken = future.exception()
            yield waiting[future], error_section(broken) if broken else future.result()
        pool.shutdown()
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise


def _attempt(subject: Subject, task: str, seed: int) -> Outcome | dict[str, Any]:
    """Train, or return the `error` section of a record; not every exception can be pickled."""
    try:
        return train(subject, task, seed)
    except Exception as error:
        return error_section(error)


def _prepare() -> None:
    """In a process of the pool: one thread, and an end that the first process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _record(standing: _Standing, command: Sequence[str]) -> Record:
    subject = standing.subject
    mechanisms = list(dict.fromkeys(stage.attention for stage in subject.stages))
    return Record(
        suite=SUITE,
        row=subject.name,
        key=standing.key,
        status="failed" if standing.error else "done",
        error=standing.error,
        created=datetime.datetime.now(datetime.UTC).isoformat(),
        seed=subject.recipe.seeds[0],
        config=subject.values(),
        environment={
            **record.environment(command=command, device=record.cpu()),
            "threads": 1,
            "inputs": {"mechanism": standing.sources} if standing.sources else {},
        },
        model={
            "backbone": f"probe of {len(subject.stages)} stages",
            "method": "none",
            "library": "none",
            "attention": " / ".join(mechanisms),
            "arch": "none",
            "drop_path": 0.0,
            "schedule": "probe",
        },
        probes=None if standing.error else _section(standing),
    )


def _section(standing: _Standing) -> dict[str, Any]:
    subject, recipe = standing.subject, standing.subject.recipe
    tasks = {}
    for name in subject.tasks:
        task = TASKS[name]
        outcomes = [standing.outcomes[name, seed] for seed in recipe.seeds]
        shown = [task.evaluation(level, recipe.images) for level in task.levels]
        tasks[name] = {
            "asks": task.asks,
            "about": task.about,
            "level": task.level,
            "levels": task.levels,
            "asked": [(images.answers >= 0).sum(dim=1).tolist() for images in shown],
            "right": [outcome.right for outcome in outcomes],
            "losses": [outcome.losses for outcome in outcomes],
            "seconds": [outcome.seconds for outcome in outcomes],
        }
    return {"kind": subject.kind, "seeds": recipe.seeds, "chance": CHANCE, "tasks": tasks}


def _describe(one: Record) -> str:
    if one.error is not None:
        return f"failed, {one.error['message']}"
    parts, seconds = [], 0.0
    for name, task in (one.probes or {})["tasks"].items():
        asked = [sum(images) for images in task["asked"]]
        levels = [
            sum(sum(right[level]) for right in task["right"]) / (len(task["right"]) * count)
            for level, count in enumerate(asked)
        ]
        parts.append(f"{name} {sum(levels) / len(levels):.2f}")
        seconds += sum(task["seconds"])
    return f"{', '.join(parts)} ({seconds:.0f} s of a core)"
