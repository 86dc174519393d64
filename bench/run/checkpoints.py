"""Checkpoints: of a run in progress, to resume from; and published ones, by their names."""

import contextlib
import hashlib
import io
import logging
import math
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from attentions.parts import resize_square_table
from bench.errors import InputError
from bench.model.backbone import ViL

log = logging.getLogger(__name__)

KEEP = 2
# What reading a file that is no checkpoint, or half of one, ends in.
_UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError,
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one run: written atomically, the newest few kept.

    A file's name carries its step and the CRC-32 of its content, so that a damaged one is known.

    Args:
        folder: where they are; made when the first is written.
        keep: how many stay.
        identity: what a checkpoint must hold to be one of this run, such as a hash of its
            configuration; written into each.
    """

    def __init__(
        self, folder: Path, *, keep: int = KEEP, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = dict(identity or {})

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Write `state` as the checkpoint after `step` steps, and remove the oldest.

        Raises:
            InputError: where the folder cannot be written; the checkpoints before stay.
        """
        temporary = self.folder / f"step-{step:08d}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                summed = _Summed(file)
                torch.save({**state, **self.identity}, cast(IO[bytes], summed))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"step-{step:08d}-{summed.crc:08x}.pt")
            _sync(self.folder)
        except (OSError, RuntimeError) as error:
            # torch turns a failed write into a RuntimeError of its own.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InputError(
                f"cannot write checkpoint {temporary.with_suffix('.pt')}: {error}"
            ) from error
        for old in [*self._files()[: -self.keep], *self.folder.glob("step-*.tmp")]:
            old.unlink(missing_ok=True)

    def latest(self, expected: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The newest checkpoint of this run that can be read, or None.

        One that is broken, or holds something else than the identity and `expected`, is said and
        passed over.
        """
        wanted = {**self.identity, **(expected or {})}
        for path in reversed(self._files()):
            try:
                content = path.read_bytes()
                if not path.stem.endswith(f"-{zlib.crc32(content):08x}"):
                    raise ValueError("wrong checksum")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                other = [name for name, value in wanted.items() if state.get(name) != value]
            except _UNREADABLE as error:
                log.warning(
                    "checkpoint %s is broken (%s); taking the one before", path, _why(error)
                )
                continue
            if other:
                what = " and ".join(other)
                log.warning("checkpoint %s is of another %s; taking the one before", path, what)
                continue
            return dict(state)
        return None

    def remove(self) -> None:
        """Remove all checkpoints: the run has its record."""
        for path in [*self._files(), *self.folder.glob("step-*.tmp")]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


class _Summed:
    """A file being written from its start to its end, and the CRC-32 of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.crc = 0

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _why(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else type(error).__name__


def _sync(folder: Path) -> None:
    """Make a new name survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


DETECTOR_PREFIX = "backbone.bottom_up."
_PARALLEL_PREFIX = "module."
# Under which a file may hold its state dict.
_WRAPPERS = ("model", "net", "state_dict")
# Constants of an architecture, which every model makes for itself.
_DERIVED = "relative_position_index"

COPIED, EXPANDED, RESIZED, SPLIT, LEFT_OUT = "copied", "expanded", "resized", "split", "left out"
ACTIONS = (COPIED, EXPANDED, RESIZED, SPLIT, LEFT_OUT)


def load_file(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file that torch.save wrote: tensors by name.

    It may stand alone or under "model", "net" or "state_dict"; what stands beside it, such as an
    optimiser's state, is not returned. Pickled code is never run.

    Raises:
        InputError: naming the file, where it cannot be read, is no such file, holds anything but
            plain values and tensors, or has no state dict.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    with file, warnings.catch_warnings():
        # Of other protocols of pickle, at the first sight of a file that is no checkpoint.
        warnings.simplefilter("ignore")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # A file of other content makes torch raise nearly anything.
            raise InputError(f"{path}: {_why_not_loaded(error)}") from error
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in _WRAPPERS if key in content), content)
    if not (isinstance(state, Mapping) and state):
        raise InputError(f"{path}: no state dict in it: {_content(content)}")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"{path}: no state dict in it, tensors by name, alone or under {', '.join(_WRAPPERS)}:"
            f" no tensors are {_some(others)}"
        )
    return {str(name): tensor for name, tensor in state.items()}


def save_file(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write `{"model": state_dict}`, whole or not at all; the folder is made where it is missing.

    Raises:
        InputError: where it cannot be written; a file that is there already stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"model": dict(state_dict)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch turns a failed write into a RuntimeError of its own.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why_not_loaded(error: Exception) -> str:
    named = re.search(r"\bGLOBAL ([\w.]+)", str(error))
    if named is None:
        return "is damaged, or no checkpoint that torch.save wrote"
    return (
        f"holds more than tensors and plain values ({named[1]}), which is never loaded, because it"
        " could run any code; save the state dict alone"
    )


def _content(content: object) -> str:
    if isinstance(content, Mapping):
        return f"it holds {_some([str(key) for key in content]) or 'nothing'}"
    return f"it holds one {type(content).__name__}"


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_published(vil: ViL, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict with the published names into a backbone, all of it or nothing.

    Args:
        state_dict: of the backbone alone, or of a whole detector, whose names of the backbone start
            with `backbone.bottom_up.`.

    Raises:
        InputError: listing every name that is missing, unexpected or of another shape.
    """
    if any(name.startswith(DETECTOR_PREFIX) for name in state_dict):
        state_dict = {
            name.removeprefix(DETECTOR_PREFIX): tensor
            for name, tensor in state_dict.items()
            if name.startswith(DETECTOR_PREFIX)
        }
    problems = misfits(vil.state_dict(), state_dict)
    if problems:
        parts = [f"{what}: {', '.join(names)}" for what, names in problems.items()]
        raise InputError(f"the state dict does not fit the backbone; {'; '.join(parts)}")
    vil.load_state_dict(dict(state_dict))


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps a state dict from being loaded whole: "missing", "unexpected" and "misshapen".

    Args:
        own: of the module.
        given: to be loaded.

    Returns:
        Names by what is wrong with them, in the order of the state dicts; empty if all fits.
    """
    found = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "misshapen": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    return {what: names for what, names in found.items() if names}


@dataclass(frozen=True)
class Step:
    """What a conversion did with a tensor, for one place in the backbone.

    Attributes:
        source: its name in the classification checkpoint, without `module.`.
        target: the place's name in the backbone; empty where there is none for it.
        action: "copied", "expanded", "resized", "split" (a part of it is copied) or "left out".
        source_shape: of the whole tensor.
        target_shape: of the place; None where there is none.
        reason: why it was left out, or what is odd about a copy.
    """

    source: str
    target: str
    action: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...] | None
    reason: str = ""


@dataclass(frozen=True)
class Conversion:
    """The start of a detector's training, and how it came about.

    Attributes:
        tensors: by name, `backbone.bottom_up.` in front.
        steps: what happened to the tensors of the source; one for each that is written or left out.
        untouched: names in the backbone that get nothing and start as they are initialised.
    """

    tensors: dict[str, Tensor]
    steps: tuple[Step, ...]
    untouched: tuple[str, ...]

    def count(self, action: str) -> int:
        """The number of steps with an action."""
        return sum(step.action == action for step in self.steps)


def convert_classifier(state_dict: Mapping[str, Any], vil: ViL) -> dict[str, Tensor]:
    """Make the start of a detector's training from a classification checkpoint, as published.

    Args:
        state_dict: the checkpoint, `{"net": …}` or its tensors, with or without `module.` in front
            of their names.
        vil: the backbone that the result is for; the meta device will do.

    Returns:
        Tensors by name, `backbone.bottom_up.` in front. `cls_token` is expanded to the backbone's
        global tokens, position tables are resized, `attn.proj` serves `attn.proj_global` too, and
        `attn.qkv` is split where the backbone has `attn.query` and `attn.kv`. `cls_pos_embed` is
        passed on as it is, as published, even where the number of global tokens differs.
    """
    conversion = convert(state_dict, vil)
    for step in conversion.steps:
        if step.action == LEFT_OUT and not step.source.endswith(_DERIVED):
            log.warning("left out %s: %s", step.target or step.source, step.reason)
    return conversion.tensors


def convert(state_dict: Mapping[str, Any], vil: ViL) -> Conversion:
    """Do what `convert_classifier` does, and say what happened to each tensor."""
    tensors: Mapping[str, Tensor] = state_dict.get("net", state_dict)
    target = vil.state_dict()
    converted: dict[str, Tensor] = {}
    # By place: what comes later in the source wins there, as `proj_global` does over `proj`.
    steps: dict[tuple[str, str], Step] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(_PARALLEL_PREFIX)
        shape = tuple(tensor.shape)
        places = {} if name.endswith(_DERIVED) else _places(name, tensor, target)
        if not places:
            derived = name.endswith(_DERIVED)
            reason = "every model makes its own" if derived else "the backbone has no such tensor"
            steps["", name] = Step(name, "", LEFT_OUT, shape, None, reason)
        for place, part in places.items():
            fitted, action = _fit(place, part, target[place])
            own = tuple(target[place].shape)
            reason = ""
            if fitted.shape != own and place.endswith("cls_pos_embed"):
                reason = "as it is, as published"
            elif fitted.shape != own:
                action = LEFT_OUT
                reason = f"shape {tuple(fitted.shape)} does not fit {own}"
            if action == COPIED and part is not tensor:
                action = SPLIT
            step = Step(name, place, action, shape, own, reason)
            if action == LEFT_OUT:
                steps[place, name] = step
            else:
                converted[DETECTOR_PREFIX + place] = fitted
                steps[place, ""] = step
    untouched = tuple(
        name
        for name in target
        if DETECTOR_PREFIX + name not in converted and not name.endswith(_DERIVED)
    )
    return Conversion(converted, tuple(steps.values()), untouched)


def _places(name: str, tensor: Tensor, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a tensor of the source goes in the target, and which part of it."""
    places = {name: tensor}
    if ".attn.proj." in name:
        places[name.replace(".attn.proj.", ".attn.proj_global.")] = tensor
    if ".attn.qkv." in name:
        third = len(tensor) // 3
        for suffix in ("", "_global"):
            places[name.replace(".qkv.", f".query{suffix}.")] = tensor[:third]
            places[name.replace(".qkv.", f".kv{suffix}.")] = tensor[third:]
    return {place: piece for place, piece in places.items() if place in target}


def _fit(name: str, tensor: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Expand or resize what the published conversion expands or resizes, and say which."""
    if tensor.shape == target.shape or tensor.ndim != target.ndim:
        return tensor, COPIED
    kind = name.rpartition(".")[2]
    if kind == "cls_token" and tensor.shape[1] == 1:
        return tensor.expand(-1, target.shape[1], -1).clone(), EXPANDED
    if kind in ("x_pos_embed", "y_pos_embed") and tensor.shape[1] > 1:
        # A table is an image of one row: bilinear resizing of it is linear resizing.
        resized = nn.functional.interpolate(
            tensor.transpose(1, 2), target.shape[1], mode="linear", align_corners=False
        )
        return resized.transpose(1, 2), RESIZED
    if kind == "local_relative_position_bias_table" and _square(tensor) and _square(target):
        return resize_square_table(tensor, target.shape[0]), RESIZED
    return tensor, COPIED


def _square(table: Tensor) -> bool:
    return math.isqrt(table.shape[0]) ** 2 == table.shape[0]
