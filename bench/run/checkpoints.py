"""Checkpoints of a run in progress, to resume from: whole, checked, the newest two."""

import contextlib
import io
import logging
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from bench.errors import InputError
from bench.files import reason, sync_folder

log = logging.getLogger(__name__)

KEEP = 2
# Errors of reading a file that is not a checkpoint, or half of one.
_UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError,
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one run: written atomically, the newest few kept.

    A file's name carries its step and the CRC-32 of its content, so that a damaged one is known.

    Args:
        folder: where they are; made when the first is written.
        identity: what a checkpoint must hold to be one of this run, such as a hash of its
            configuration; written into each.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
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
            sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            # torch turns a failed write into a RuntimeError of its own.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InputError(
                f"cannot write checkpoint {temporary.with_suffix('.pt')}: {reason(error)}"
            ) from error
        for old in [*self._files()[:-KEEP], *self.folder.glob("step-*.tmp")]:
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
