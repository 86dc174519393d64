"""What rows cost without training them: parameters, multiply-adds, peak memory and latency.

Of whole detectors and of their parts, for inference and for a training step. Counts are made on
the meta device. Each row is measured in a fresh process: first its memory, then the latency of all
rows in rounds, each process asked in turn for one call, so that drift of the machine hits all
alike. Only as many processes are there at once as fit into memory; where that is not all, groups of
them take turns, several times. A row that dies, for want of memory for one, harms no other.
"""

import dataclasses
import datetime
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.config.arch import parse
from bench.config.schema import MODES, QUANTITIES, RunConfig
from bench.data.split import find_split
from bench.measure import latency, throughput
from bench.measure.costs import counted, effort, latency_section, memory_section
from bench.measure.latency import Instruments, Latency
from bench.measure.predict import predict
from bench.measure.worker import Worker
from bench.measure.workload import attention_of, conditions
from bench.model.build import build_backbone, model_section, on_meta
from bench.record import Record, error_section
from bench.system import machine
from bench.system.devices import make_fabric, single_fabric

# A measurement that is predicted to need more than this share of the free memory is not tried.
_LARGEST_SHARE = 0.85
# What a process takes besides its tensors.
_PROCESS = 500_000_000
# How often rows that do not fit into memory together take turns.
_TURNS = 3
# Seconds of warm-up of a layer, some of which take half a minute a call; those are warm after two.
_SHORT_WARM_UP = 2.0

Progress = Callable[[float, str], None]


@dataclass
class _Row:
    """One row while it is measured.

    Attributes:
        config: of the row.
        root: the folder of its data, or None for what `config` says.
        stage: that whose attention is measured alone, from 1; None for the whole detector.
        needs: what its peak is expected to be in bytes, by mode.
        modes: those that fit.
        conditions: of `Workload.conditions`, once it was built.
        timings: of each mode, those of each turn.
        parts: latency of its parts, by mode.
        phases: latency of the phases of its training step.
        worker: where it is, while it is in memory.
    """

    config: RunConfig
    root: Path | None = None
    stage: int | None = None
    needs: Mapping[str, int | None] = field(default_factory=dict)
    modes: Sequence[str] = ()
    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    timings: dict[str, list[Latency]] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)
    worker: Worker | None = None

    def start(self) -> None:
        """Build it in a fresh process."""
        self.worker = Worker(threads=torch.get_num_threads())
        what = ("detector", self.root) if self.stage is None else ("attention", None, self.stage)
        self.conditions = self.worker.ask("build", self.config.as_dict(), *what)

    def release(self) -> None:
        """End its process, if it has one."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an error; whatever it is, it is the row's and goes into its record."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Keep the first error; what was measured before stays."""
        self.error = self.error or error_section(error)
        self.release()

    @property
    def need(self) -> int:
        """The most that it is expected to need; 0 where nothing is known."""
        return max((self.needs.get(mode) or 0 for mode in self.modes), default=0)


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
        quantities: some of QUANTITIES and of ON_DEMAND.
        by_part: measure the parts of each detector too.
        progress: receives the share that is done and what is being done.
        command: the command line, for the records.
    """
    rows = [_Row(config) for config in configs]
    measured = [name for name in ("memory", "latency") if name in quantities]
    if measured:
        # Before anything is counted.
        for config in configs:
            find_split(config, config.data.train_split)
    counting = 1 / (1 + 3 * len(measured))
    for number, row in enumerate(rows):
        progress(counting * number / len(rows), f"{row.config.row}: counting")
        with row.kept():
            _count(row, modes, quantities)

    def measuring(share: float, doing: str) -> None:
        progress(counting + (1 - counting) * share, doing)

    if measured:
        alive = [row for row in rows if row.error is None]
        _measure(alive, modes, measured, by_part=by_part, progress=measuring)
    if "throughput" in quantities:
        for row in rows:
            _add_throughput(row, modes, lambda doing: progress(1.0, doing))
    progress(1.0, "done")
    _say_session(row.sections for row in rows)
    return [_record(row, command) for row in rows]


@dataclass(frozen=True)
class Interleaved:
    """The latency of one of several rows that were timed in rounds.

    Attributes:
        section: the `latency` section of its record, or None where nothing was measured.
        error: the `error` section of a record, or None.
        notes: what was not measured, and why.
    """

    section: dict[str, Any] | None
    error: dict[str, Any] | None
    notes: list[str]


def measure_latency(
    configs: Sequence[RunConfig],
    modes: Sequence[str] = MODES,
    *,
    roots: Sequence[Path | None] | None = None,
    needs: Sequence[Mapping[str, int | None]] | None = None,
    progress: Progress | None = None,
) -> list[Interleaved]:
    """Time untrained rows in rounds, each in a process of its own, and return one result a row.

    Args:
        configs: of runs, on one device.
        modes: some of MODES; training only of the rows whose configuration measures it.
        roots: for each row the folder of its data; by default what its configuration names, or
            images generated for the purpose.
        needs: for each row what its peak is expected to be in bytes, by mode; a record's `memory`
            section will do. It decides how many rows are in memory at once.
        progress: receives the share that is done and what is being done.
    """
    rows = [
        _Row(config, root, needs=need)
        for config, root, need in zip(
            configs, roots or [None] * len(configs), needs or [{}] * len(configs), strict=True
        )
    ]
    show = progress or (lambda _share, _doing: None)
    _measure(rows, modes, ("latency",), by_part=False, progress=show)
    _say_session(row.sections for row in rows)
    return [Interleaved(row.sections.get("latency"), row.error, row.notes) for row in rows]


def measure_layers(
    configs: Sequence[RunConfig], *, progress: Progress | None = None
) -> list[tuple[dict[str, dict[str, Any]], list[str]]]:
    """Measure one attention layer of each stage alone, in inference, in rounds over the rows.

    Args:
        configs: of rows, on one device that is here and in a precision that it has.
        progress: receives the share that is done and what is being done.

    Returns:
        For each row its `memory` and `latency` sections, which have the stages in `by_part`, and
        what was not measured and why.
    """
    mode, show = MODES[0], progress or (lambda _share, _doing: None)
    found: list[tuple[dict[str, Any], list[str]]] = []
    for config in configs:
        said = conditions(config, str(single_fabric(config).device)) | {"rois": {}}
        latencies = latency_section(said, {}, threads=torch.get_num_threads())
        sections = {"memory": memory_section(said), "latency": latencies | {"by_part": {mode: {}}}}
        sections["memory"]["by_part"] = {mode: {}}
        found.append((sections, []))
    stages = max(config.model.arch.count("_") + 1 for config in configs)
    for stage in range(1, stages + 1):
        rows = [_Row(config, stage=stage) for config in configs]
        for row, (sections, _) in zip(rows, found, strict=True):
            row.sections = {"memory": memory_section(sections["memory"]) | {"ran": {}}}
            with row.kept():
                row.needs = {mode: _need_of_layer(row.config, stage, mode)}

        def measuring(share: float, doing: str, stage: int = stage) -> None:
            show((stage - 1 + share) / stages, f"stage {stage}: {doing}")

        alive = [row for row in rows if row.error is None]
        quantities = ("memory", "latency")
        _measure(
            alive, (mode,), quantities, by_part=False, progress=measuring, warm_up=_SHORT_WARM_UP
        )
        for row, (sections, notes) in zip(rows, found, strict=True):
            _add_layer(row, stage, mode, sections)
            notes += [f"attention of stage {stage}: {note}" for note in row.notes]
            if row.error is not None:
                notes.append(f"attention of stage {stage} not measured: {row.error['message']}")
    _say_session(sections for sections, _ in found)
    return found


def _need_of_layer(config: RunConfig, stage: int, mode: str) -> int:
    """Predict the peak of one attention layer, in bytes."""
    vil, meta = on_meta(build_backbone, config), torch.device("meta")
    module, (_, grid) = attention_of(vil, config, device=meta, stage=stage)
    device = single_fabric(config).device.type
    precision, batch = config.train.precision, config.profile.batch_size
    return predict(
        module, grid=grid, batch_size=batch, mode=mode, precision=precision, device=device
    ).total


def _add_layer(row: _Row, stage: int, mode: str, sections: dict[str, Any]) -> None:
    """Put what was measured of a layer with the other stages of its row."""
    name = f"stage{stage}"
    own = row.sections.get("latency") or {}
    if own.get(mode):
        blocks = parse(row.config.model.arch)[stage - 1].blocks
        times = {key: own[mode][key] for key in ("samples", "median", "q1", "q3")}
        sections["latency"]["by_part"][mode][name] = {**times, "layers": blocks}
        sections["latency"]["notes"] += [f"{name}: {note}" for note in own["notes"]]
    if row.sections["memory"][mode] is not None:
        sections["memory"]["by_part"][mode][name] = row.sections["memory"][mode]
        sections["memory"]["kind"] = row.sections["memory"]["kind"]


def _add_throughput(row: _Row, modes: Sequence[str], progress: Callable[[str], object]) -> None:
    """Measure images a second of a row alone, into its `latency` section."""
    if row.error is not None:
        return
    device = single_fabric(row.config).device

    def fits(need: int | None) -> bool:
        free = free_memory(device)
        return need is None or free is None or need <= _LARGEST_SHARE * free

    said = conditions(row.config, str(device))
    empty = latency_section(said, {}, threads=torch.get_num_threads())
    section = row.sections.setdefault("latency", empty)
    section["throughput"] = {}
    for mode in modes:
        with row.kept():
            found = throughput.measure(
                row.config,
                mode,
                fits=fits,
                root=row.root,
                progress=lambda doing: progress(f"{row.config.row}: {doing}"),
            )
            section["notes"] += found.pop("notes")
            section["throughput"][mode] = found


def _count(row: _Row, modes: Sequence[str], quantities: Sequence[str]) -> None:
    """Count on the meta device; what cannot run there may well be measured."""
    device = str(make_fabric(row.config).device)
    row.sections, notes = counted(row.config, modes, quantities, device=device)
    row.notes += notes
    predicted = row.sections.get("memory", {}).get("predicted", {})
    row.needs = {mode: found["total"] for mode, found in predicted.items()}


def _measure(
    rows: Sequence[_Row],
    modes: Sequence[str],
    quantities: Sequence[str],
    *,
    by_part: bool,
    progress: Progress,
    warm_up: float = math.inf,
) -> None:
    """Fill the `memory` and `latency` sections of rows."""
    done, timed = 0.0, "latency" in quantities
    for row in rows:
        row.modes = [mode for mode in modes if mode != "training" or row.config.profile.training]

    def advance(share: float, doing: str) -> None:
        nonlocal done
        done += share / (len(rows) * len(quantities))
        progress(min(done, 1.0), doing)

    for turn in range(_TURNS):
        # Backwards every other turn, so that none is always the one after the same other.
        waiting = [row for row in rows if row.error is None][:: -1 if turn % 2 else 1]
        groups = 0
        while waiting:
            with _resident() as group:
                while waiting and _has_room(group, waiting[0]):
                    row = waiting.pop(0)
                    group.append(row)
                    if turn == 0:
                        row.modes = [mode for mode in row.modes if _fits(row, mode)]
                    if not row.modes:
                        continue
                    with row.kept():
                        advance(0.0, f"{row.config.row}: building")
                        row.start()
                        if "memory" in quantities and turn == 0:
                            advance(0.0, f"{row.config.row}: measuring memory")
                            _measure_memory(row, by_part=by_part)
                            advance(1.0, f"{row.config.row}: measured")
                    if not timed:
                        row.release()
                groups += 1
                if timed:
                    turns = _TURNS if turn or waiting or groups > 1 else 1
                    advance(0.0, f"measuring latency of {len(group)} rows, in rounds")
                    _time(group, turns=turns, by_part=by_part and turn == 0, warm_up=warm_up)
                    advance(len(group) / turns, "measured")
        if not timed or (turn == 0 and groups < 2):
            break
    _add_latency(rows)


@contextmanager
def _resident() -> Iterator[list[_Row]]:
    """Rows that are in memory at the same time; those that are appended to the list."""
    rows: list[_Row] = []
    try:
        yield rows
    finally:
        for row in rows:
            row.release()


def _has_room(group: Sequence[_Row], row: _Row) -> bool:
    """Whether a row fits beside those in memory, of which one at a time comes to its peak."""
    alive = [other for other in group if other.worker is not None]
    free = free_memory(single_fabric(row.config).device)
    if not alive or free is None:
        return True
    transient = row.need + max(other.need for other in alive)
    return transient + _PROCESS <= _LARGEST_SHARE * free


def _fits(row: _Row, mode: str) -> bool:
    """Whether the row's call is expected to fit the free memory; says so where it does not."""
    need, free = row.needs.get(mode), free_memory(single_fabric(row.config).device)
    if need is None or free is None or need <= _LARGEST_SHARE * free:
        return True
    row.notes.append(
        f"{mode} not measured: predicted to need {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
    )
    return False


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return machine.free_memory()


def _measure_memory(row: _Row, *, by_part: bool) -> None:
    assert row.worker is not None
    section = row.sections["memory"]
    measured, notes = row.worker.ask("memory", row.modes, by_part)
    section |= measured
    row.notes += notes
    for mode in row.modes:
        ran = section["ran"][mode] = row.worker.ask("ran", mode)
        row.notes += [f"{mode}: {note}" for note in ran["notes"]]


def _time(group: Sequence[_Row], *, turns: int, by_part: bool, warm_up: float) -> None:
    """Time the rows of a group in rounds, for one of so many turns.

    Args:
        warm_up: most seconds before the first sample of a row.
    """
    workers = [row.worker for row in group if row.worker is not None]

    def others() -> float | None:
        used = machine.other_cpu_seconds()
        return None if used is None else used - sum(worker.cpu_seconds for worker in workers)

    for mode in MODES:
        members = {
            str(number): row
            for number, row in enumerate(group)
            if row.worker is not None and mode in row.modes
        }
        if not members:
            continue
        first = next(iter(members.values()))
        whole = dataclasses.replace(effort(first.config), max_warm_up_seconds=warm_up)
        found = latency.rounds(
            {name: row.worker.timed(mode) for name, row in members.items() if row.worker},
            device=torch.device(first.conditions["device"]),
            effort=dataclasses.replace(
                whole,
                min_repeats=max(2, math.ceil(whole.min_repeats / turns)),
                min_seconds=whole.min_seconds / turns,
            ),
            instruments=Instruments(others=others),
            lost=lambda name, error, members=members: members[name].fail(error),  # type: ignore[misc]
        )
        for name, timing in found.items():
            row = members[name]
            row.timings.setdefault(mode, []).append(timing)
            if by_part and row.worker is not None:
                with row.kept():
                    row.parts[mode] = row.worker.ask("parts", mode, whole)
                    if mode == "training":
                        row.phases = row.worker.ask("phases", whole)


def _add_latency(rows: Sequence[_Row]) -> None:
    """Make the `latency` sections of rows from what was timed in all turns."""
    joined = [
        {mode: latency.joined(timings) for mode, timings in row.timings.items()} for row in rows
    ]
    for row, timings in zip(rows, joined, strict=True):
        if timings:
            section = latency_section(row.conditions, timings, threads=torch.get_num_threads())
            row.sections["latency"] = section | {
                "by_part": row.parts,
                "phases": row.phases,
                "group": {},
            }
    for mode in MODES:
        found = {str(n): timings[mode] for n, timings in enumerate(joined) if mode in timings}
        for number, letters in latency.groups(found).items():
            rows[int(number)].sections["latency"]["group"][mode] = letters


def _say_session(rows: Iterable[Mapping[str, Any]]) -> None:
    """Say in the sections of rows which latencies were taken in turns, in one session."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # Another machine may measure in the same second.
    session = f"{time}-{uuid.uuid4().hex[:8]}"
    for sections in rows:
        if "latency" in sections:
            sections["latency"]["session"] = session


def _record(row: _Row, command: Sequence[str]) -> Record:
    config = row.config
    device = "none"
    with row.kept():
        device = str(single_fabric(config).device)
    return record.of_run(
        config,
        key=record.key(config.as_dict()),
        error=row.error,
        environment=record.environment(command=command, device=device)
        | {"threads": torch.get_num_threads()},
        model=model_section(config),
        notes=row.notes,
        **row.sections,
    )
