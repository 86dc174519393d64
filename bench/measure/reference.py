"""What rows cost at a reference size, whatever size they were trained at; see `Reference`.

Counted and predicted, which needs neither training nor a GPU; of the attention layers alone latency
and memory can be measured here besides. Records are kept in a folder beside those of runs: what has
its record there is neither counted nor measured again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from bench import record
from bench.config.schema import RunConfig
from bench.config.sources import sources_of
from bench.files import cores
from bench.measure import profile
from bench.measure.worker import Worker
from bench.model.build import model_section
from bench.record import Record, error_section
from bench.system import devices


def count(
    configs: Sequence[RunConfig],
    folder: Path | None,
    *,
    command: Sequence[str],
    progress: Callable[[str], object] = lambda _row: None,
    into: str = ".",
) -> list[Record]:
    """Return the costs of each row, that of a failure too, counted on all cores.

    Args:
        configs: of `bench.config.suites.reference_config`.
        folder: where records of costs are and new ones go; None to keep none.
        command: the command line, for the records.
        progress: called with each row that was counted.
        into: the folder in it for new ones.

    Raises:
        InputError: if the folder cannot be written.
    """
    known = {} if folder is None else _known(folder)
    keys = [_key(config) for config in configs]
    todo = {key: one for key, one in zip(keys, configs, strict=True) if key not in known}
    # A process for each core, of those only that have something to do.
    idle: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker(threads=1) for _ in range(min(cores(), len(todo)))]
    for worker in workers:
        idle.put(worker)

    def one(key: str) -> Record:
        worker = idle.get()
        try:
            return _count(worker, key, todo[key], command)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(max(1, len(workers))) as pool:
            for found in pool.map(one, todo):
                known[found.key] = found
                progress(found.row)
                if folder is not None:
                    record.write(found, folder / into)
    finally:
        for worker in workers:
            worker.close()
    return [known[key] for key in keys]


def measure_layers(
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    command: Sequence[str],
    progress: profile.Progress | None = None,
) -> list[Record]:
    """Return latency and memory of the attention layers of rows, measured on this machine.

    One layer of each stage, in inference; on the CPU in full precision, as it has no other that is
    worth timing. Arguments as for `count`.
    """
    there = [_here(config) for config in configs]
    device = devices.device_name(devices.single_fabric(there[0]).device)
    on = {"name": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    keys = [_key(config, measured=on) for config in there]
    for session in _sessions(folder):
        if session.keys() >= set(keys):
            return [session[key] for key in keys]
    # All of them, those too that were measured in other sessions: they could not be compared.
    found = []
    measured = profile.measure_layers(there, progress=progress)
    for key, config, (sections, notes) in zip(keys, there, measured, strict=True):
        values = config.as_dict() | {"layers": on | {"key": key}}
        own = record.key({"key": key, "session": sections["latency"]["session"]})
        found.append(_record(config, own, command, device, config=values, notes=notes, **sections))
        record.write(found[-1], folder)
    return found


def _sessions(folder: Path) -> list[dict[str, Record]]:
    """Records of layers by what they are of, for each session, the newest first."""
    found: dict[str, dict[str, Record]] = {}
    for one in record.read_all(folder.rglob("*.json")):
        if "layers" in one.config:
            session = found.setdefault((one.latency or {}).get("session", ""), {})
            session[one.config["layers"].get("key", one.key)] = one
    return [found[session] for session in sorted(found, reverse=True)]


def _here(config: RunConfig) -> RunConfig:
    """The same on the device that is here."""
    config = dataclasses.replace(config, device="auto")
    on_gpu = devices.single_fabric(config).device.type == "cuda"
    precision = config.train.precision if on_gpu else "32-true"
    effort = dataclasses.replace(config.profile, repeats=3, seconds=0.0)
    recipe = dataclasses.replace(config.train, precision=precision)
    return dataclasses.replace(config, train=recipe, profile=effort)


def _count(worker: Worker, key: str, config: RunConfig, command: Sequence[str]) -> Record:
    sections: dict[str, Any] = {}
    notes: list[str] = []
    error = None
    try:
        sections, notes = worker.ask("count", config.as_dict(), config.device)
    except Exception as failure:
        # Whatever it is, it is the row's and goes into its record.
        error = error_section(failure)
    device = "none: counted and predicted"
    return _record(config, key, command, device, notes=notes, error=error, **sections)


def _record(
    config: RunConfig, key: str, command: Sequence[str], device: str, /, **values: Any
) -> Record:
    place = record.environment(command=command, device=device)
    model = model_section(config)
    return record.of_run(config, key=key, environment=place, model=model, **values)


def _key(config: RunConfig, **on: Any) -> str:
    """Of what the numbers depend on; a mechanism of the user that changed is counted again."""
    sources = {source.name: source.sha256 for source in sources_of(config.model)}
    return record.key({"config": config.as_dict(), "mechanism": sources, **on})


def _known(folder: Path) -> dict[str, Record]:
    return {one.key: one for one in record.newest(record.read_all(folder.rglob("*.json")))}
