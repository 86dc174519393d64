"""The record of one run: what is stored, how it is written, and what it was measured on.

A record is one JSON file that is written once and never changed; `results/README.md` explains every
field. This module imports no torch, so that records can be read anywhere.
"""

import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from bench import cgroups
from bench.errors import InputError, saying
from bench.files import check_writable, sync_folder, usable_cores

SCHEMA = 1
STATUSES = ("done", "failed")
ERROR_KINDS = (
    "input",
    "out_of_memory",
    "too_slow",
    "skipped",
    "interrupted",
    "diverged",
    "data_worker",
    "error",
)
FEW_IMAGES = 20
"""Of fewer the bootstrap's intervals are too narrow: of 10 images from one data set, that of 95 %
held the mAP of all its images in 49 of 60 cases, of 40 in 58."""
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's figures of boxes or masks, in the order of its evaluation."""
PACKAGES = (
    "torch",
    "torchvision",
    "lightning-fabric",
    "faster-coco-eval",
    "fvcore",
    "performer-pytorch",
    "timm",
    "detectron2",
)

_SECTIONS: dict[str, tuple[str, ...]] = {
    "parameters": ("total",),
    "flops": ("unit", "convention", "total"),
    "memory": ("unit", "kind", "inference", "training"),
    "latency": ("unit", "inference"),
    "training": ("steps", "seconds", "losses"),
    "evaluation": ("split", "box"),
    "probes": ("kind", "seeds", "chance", "tasks"),
}
"""The parts of a record that may be null, with the fields that each has at least."""

RECORDS = "records"
"""The folder of records in an output folder."""
PROBES = "probes"
"""The folder beside `records` that holds records of probes, and their suite."""
ALONE = ("profile", "sweep")
"""Suites whose page shows nothing but their own records."""

_MODEL = ("backbone", "method", "library", "attention", "arch", "drop_path", "schedule")
MEMORY_KEPT = "glibc, which keeps what is freed"
# What chooses another allocator, or another way of this one; the first is ours and leaves it alone.
_ALLOCATORS = (
    "BENCH_ALLOCATOR",
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
LATENCIES = "latency"
"""The folder beside `records` whose files hold latencies of many rows measured together."""
PICTURES = "pictures"
"""The folder beside `records` whose files hold what rows find in a few images."""
COSTS = "costs"
"""The folder beside `records` that holds records of what rows cost at full size."""

_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("attentions", "bench", "configs", "run_all.py")
# How the names of records end, see `write`.
_OURS = re.compile(r"-[0-9a-f]{10}(-failed-\d+)?\.json$")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything known about one run, a failed one too. Units are in the record itself.

    Attributes:
        suite: the suite that the run belongs to.
        row: name of its row in the tables.
        key: hash of its configuration; see `key`.
        status: "done" or "failed".
        error: None, or kind, message and traceback of what ended the run.
        created: when it was made, UTC, ISO 8601.
        seed: of everything random.
        config: the full configuration.
        environment: see `environment`.
        model: backbone, method, library, attention, arch, drop_path, schedule and more.
        parameters: counts, or None where the run did not come so far; so are the rest.
        flops: multiply-adds.
        memory: peaks in bytes.
        latency: samples and quartiles in seconds.
        training: steps, seconds, losses over steps.
        evaluation: COCO's figures in percent.
        probes: results of small tasks, of the suite `probes` alone.
        notes: what a reader of the numbers should know.
        schema: version of this layout.

    Raises:
        ValueError: for a field of the wrong type or a section that lacks one.
    """

    suite: str
    row: str
    key: str
    status: str
    created: str
    seed: int
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    error: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] | None = None
    flops: Mapping[str, Any] | None = None
    memory: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    probes: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=list)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema!r} is unknown; known: {SCHEMA}")
        for name in ("suite", "row", "key", "status", "created"):
            _require(name, getattr(self, name), str)
        _require("seed", self.seed, int)
        for name in ("config", "environment", "model"):
            _require(name, getattr(self, name), Mapping)
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"status is {self.status!r} and error is {self.error!r}")
        if self.error is not None:
            _has("error", self.error, ("kind", "message"))
            if self.error["kind"] not in ERROR_KINDS:
                kinds = ", ".join(ERROR_KINDS)
                raise ValueError(f"error kind {self.error['kind']!r} is not one of {kinds}")
        _has("model", self.model, _MODEL)
        for name, needed in _SECTIONS.items():
            if getattr(self, name) is not None:
                _has(name, getattr(self, name), needed)
        if isinstance(self.notes, str) or not isinstance(self.notes, Sequence):
            raise ValueError(f"notes must be a list of strings, not {self.notes!r}")

    def to_json(self) -> str:
        """Return the record as JSON text. A number that is not finite becomes null."""
        values = {"schema": self.schema} | {f.name: getattr(self, f.name) for f in fields(self)}
        if self.probes is None:
            del values["probes"]
        return json.dumps(_plain(values), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "record") -> "Record":
        """Return the record of `to_json`'s text.

        Args:
            text: JSON.
            source: where the text came from, for the message.

        Raises:
            InputError: naming `source`, for malformed text, an unknown schema or a missing,
                unknown or malformed field.
        """
        try:
            values = json.loads(text, object_pairs_hook=_once)
        except ValueError as error:
            raise InputError(f"{source} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(
                f"{source} is not a record: {type(values).__name__} instead of an object"
            )
        if values.get("schema") != SCHEMA:
            raise InputError(
                f"{source} has schema {values.get('schema')!r}; this version reads schema {SCHEMA}"
            )
        known = {f.name for f in fields(cls)}
        missing, unknown = sorted(known - set(values) - {"probes"}), sorted(set(values) - known)
        if missing or unknown:
            raise InputError(
                f"{source} is not a record: missing {', '.join(missing) or 'nothing'},"
                f" unknown {', '.join(unknown) or 'nothing'}"
            )
        # Those that only write records do without pydantic.
        from bench import sections

        try:
            made = cls(**values)
            sections.check(values)
            for name in ("suite", "row", "seed"):
                if made.config.get(name, values[name]) != values[name]:
                    said = f"{name} is {values[name]!r}, and {made.config[name]!r} in its config"
                    raise ValueError(said)
            return made
        except ValueError as error:
            raise InputError(f"{source} is not a record: {error}") from error


def of_run(config: Any, /, *, error: Mapping[str, Any] | None = None, **values: Any) -> Record:
    """Return the record, made now, of what was done with a configuration.

    Args:
        config: a `RunConfig`, which says suite, row, seed and configuration.
        error: section of what ended it, None for a success.
        values: all other fields, and what is to be said otherwise than `config` has it.
    """
    said = {name: getattr(config, name) for name in ("suite", "row", "seed")}
    said |= {"config": config.as_dict(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    return Record(**said | values, status="failed" if error else "done", error=error)


def read(path: Path) -> Record:
    """Return the record in the file `path`.

    Raises:
        InputError: naming the file, if it cannot be read or holds no record.
    """
    try:
        with saying(f"cannot read {path}"):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error
    return Record.from_json(text, source=str(path))


def read_all(
    paths: Iterable[Path], skipped: Callable[[InputError], object] | None = None
) -> Iterator[Record]:
    """Yield the records in files, by the names of the files.

    Args:
        skipped: called with the error of a file that cannot be read or holds no record, as the
            report warns of it. Without it such a file is passed over, but for one with a name that
            `write` gives: what it holds would be made again, and then have no place.

    Raises:
        InputError: for such a file.
    """
    for path in sorted(paths):
        try:
            yield read(path)
        except InputError as error:
            if skipped is not None:
                skipped(error)
            elif _OURS.search(path.name):
                raise InputError(f"{error}; restore it, or delete it to make it again") from error


def check_output(folder: Path, suite: str, *, make: bool = True) -> None:
    """Make the folder of --output, before anything is done that would then not be written there.

    Raises:
        InputError: where it cannot be written, or has records that are not for one page with those
            of `suite`.
    """
    if make:
        check_writable(folder)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"--output {folder} cannot be written: {above} is not a folder to write to; name"
            " another folder"
        )
    there = [path for name in (RECORDS, PROBES) for path in folder.glob(f"{name}/*.json")]
    for one in read_all(there):
        if one.suite != suite and {one.suite, suite} & {*ALONE}:
            raise InputError(
                f"--output {folder} has records of {one.suite}, whose page that of {suite} would"
                " replace; name another folder"
            )


def newest(records: Iterable[Record]) -> list[Record]:
    """Return the newest success of each run (same row and key), or else its newest failure."""
    found: dict[tuple[str, str], Record] = {}
    for one in records:
        other = found.get((one.row, one.key))
        if other is None or _rank(one) > _rank(other):
            found[one.row, one.key] = one
    return list(found.values())


def _rank(record: Record) -> tuple[bool, str]:
    return record.status == "done", record.created


def write(record: Record, directory: Path) -> Path:
    """Write `record` into `directory`, made if it is missing, and return the new file.

    The file appears whole or not at all, and never takes the place of another. It is called
    `{row}-{key}.json`, or `{row}-{key}-failed-{n}.json` with the first free n.

    Raises:
        InputError: if the run already has a record of its success, or the folder cannot be written.
    """
    text = record.to_json()
    temporary = directory / f".{slug(record.row)}-{uuid.uuid4().hex}.tmp"
    with saying(f"cannot write the record of {record.row} to {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            # Bytes of a path that are not UTF-8 become escapes of JSON, which read gives back.
            with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            target = _publish(temporary, directory, record)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(directory)
    return target


def read_latencies(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the newest `latency` section of each record, by its row and key, with its session.

    Args:
        folder: `latency` beside `records`.

    Raises:
        InputError: for a file there that cannot be read or holds something else.
    """
    from bench import sections

    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text)["rows"]
            for row in rows:
                sections.check({"latency": row["latency"]})
            # Another machine may have measured in the same second.
            session = {"session": f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"}
            found |= {(row["row"], row["key"]): session | row["latency"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{path} holds no latencies of rows ({why}); restore it, or delete it to measure"
                " again"
            ) from error
    return found


def error_section(error: BaseException) -> dict[str, Any]:
    """Return the `error` section of a record.

    An exception class of ours says its kind, one of ERROR_KINDS, in an attribute `kind`.
    """
    return {
        "kind": _error_kind(error),
        "message": " ".join(str(error).split()) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }


def _error_kind(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # torch's class is known by its name, since records need no torch; what torch raises on the CPU
    # has no class of its own.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return "out_of_memory"
    kind = getattr(error, "kind", None)
    return kind if kind in ERROR_KINDS else "error"


def done_name(row: str, key: str) -> str:
    """Return the file name of the record of a run that succeeded."""
    return f"{slug(row)}-{key[:10]}.json"


def slug(name: str) -> str:
    """Return `name` as a file name of at most 80 lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80].strip("-") or "row"


def key(config: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of `config` as canonical JSON.

    It depends neither on the order of the keys nor on whether a sequence is a list or a tuple.

    Raises:
        TypeError: for a value that JSON does not have.
    """
    text = json.dumps(_plain(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def environment(*, command: str | Sequence[str], device: str) -> dict[str, Any]:
    """Return where and with what a run is made.

    Args:
        command: how to do it again; a list of arguments is joined as a shell would read it.
        device: the name of the device, as a person would call it.
    """
    commit, dirty = code_running()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "cores": usable_cores(),
        "memory_bytes": _memory(),
        "device": device,
        **({"allocator": allocator()} if device == "cpu" else {}),
        "packages": _versions(),
        "commit": commit,
        "dirty": dirty,
        "command": command if isinstance(command, str) else shlex.join(command),
    }


def allocator() -> str:
    """How memory of the CPU is allocated, on which times there depend; MEMORY_KEPT if by us."""
    chosen = [f"{name}={os.environ[name]}" for name in _ALLOCATORS if os.environ.get(name)]
    if chosen:
        return ", ".join(chosen)
    return MEMORY_KEPT if platform.libc_ver()[0] == "glibc" else "the system's"


@functools.cache
def code_at_start(root: Path = _ROOT) -> tuple[str | None, bool | None]:
    """Return `checkout` of when this was first called, as commands and runs do when they start."""
    return checkout(root)


def code_running(root: Path = _ROOT) -> tuple[str | None, bool | None]:
    """Return the git commit that this process started with, and whether its code differs from it.

    Where other code has been checked out since it does: what is imported late is of that.
    """
    commit, dirty = code_at_start(root)
    now, changed = checkout(root)
    if commit is None:
        return None, None
    moved = "" if now == commit else _git(root, "diff", "--name-only", commit, "HEAD", "--", *_CODE)
    return commit, dirty or changed or (None if moved is None else bool(moved))


def checkout(root: Path) -> tuple[str | None, bool | None]:
    """Return the git commit checked out at `root`, and whether the code there differs from it.

    Both are None where `root` is not the top of a checkout that has a commit, or without git.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed package may lie inside somebody else's checkout, whose commit says nothing.
    if top is None or Path(top).resolve() != root.resolve():
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git(root, "status", "--porcelain", "--", *_CODE)
    return commit, None if changes is None else bool(changes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON none of whose names stands twice, as where two files were merged."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _require(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r}, which is not of type {kind.__name__}")


def _has(name: str, section: object, needed: Sequence[str]) -> None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is {section!r}, which is not a mapping")
    missing = [item for item in needed if item not in section]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it: non-finite numbers as None, tuples as lists, scalars plain."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in a record")


def _names(record: Record) -> Iterator[str]:
    if record.status == "done":
        yield done_name(record.row, record.key)
        return
    stem = done_name(record.row, record.key).removesuffix(".json")
    for number in count(1):
        yield f"{stem}-failed-{number}.json"


def _publish(temporary: Path, directory: Path, record: Record) -> Path:
    """Give the finished file its first free name."""
    for name in _names(record):
        target = directory / name
        with suppress(FileExistsError):
            _link(temporary, target)
            return target
    raise InputError(f"{directory / name} exists already; a record is never overwritten")


def _link(temporary: Path, target: Path) -> None:
    try:
        target.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Some file systems have no hard links; there a rename has to do.
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        temporary.rename(target)


# What says, in a hook of git's, which repository is meant; another one than ours, it may be.
_REPOSITORY = {f"GIT_{name}" for name in ("DIR", "WORK_TREE", "INDEX_FILE", "COMMON_DIR")}


def _git(root: Path, *arguments: str) -> str | None:
    environment = {k: v for k, v in os.environ.items() if k not in _REPOSITORY}
    try:
        result = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def cpu() -> str:
    """Return the name of the processor."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of main memory, or what a container allows; None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    allowed = cgroups.memory_limit()
    return there if allowed is None else min(there, allowed)
