"""Checkpoints: of a run in progress, to resume from; and published ones, by their names."""

import contextlib
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.errors import InputError

log = logging.getLogger(__name__)

KEEP = 2


class Checkpoints:
    """The checkpoints of one run: written atomically, the newest few kept.

    Args:
        folder: where they are; made when the first is written.
        keep: how many stay.
    """

    def __init__(self, folder: Path, *, keep: int = KEEP) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Write `state` as the checkpoint after `step` steps, and remove the oldest.

        Raises:
            InputError: where the folder cannot be written; the checkpoints before stay.
        """
        target = self.folder / f"step-{step:08d}.pt"
        temporary = target.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except (OSError, RuntimeError) as error:
            # torch turns a failed write into a RuntimeError of its own.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write checkpoint {target}: {error}") from error
        for old in self._files()[: -self.keep]:
            old.unlink(missing_ok=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None. A broken one is said and passed over."""
        for path in reversed(self._files()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                log.warning(
                    "checkpoint %s is broken (%s); taking the one before",
                    path,
                    type(error).__name__,
                )
                continue
            return dict(state)
        return None

    def remove(self) -> None:
        """Remove all checkpoints: the run has its record."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))
