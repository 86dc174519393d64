"""Checkpoints: of a run in progress, to resume from; and published ones, by their names."""

import contextlib
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attentions.parts import resize_square_table
from bench.backbone import ViL
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


DETECTOR_PREFIX = "backbone.bottom_up."
_PARALLEL_PREFIX = "module."
# Constants of an architecture, which every model makes for itself.
_DERIVED = "relative_position_index"


def load_published(vil: ViL, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict with the published names into a backbone, all of it or nothing.

    Args:
        state_dict: of the backbone alone, or of a whole detector, whose names of the backbone start
            with `backbone.bottom_up.`.

    Raises:
        ValueError: listing every name that is missing, unexpected or of another shape.
    """
    if any(name.startswith(DETECTOR_PREFIX) for name in state_dict):
        state_dict = {
            name.removeprefix(DETECTOR_PREFIX): tensor
            for name, tensor in state_dict.items()
            if name.startswith(DETECTOR_PREFIX)
        }
    own = vil.state_dict()
    misshapen = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in own if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in own],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        parts = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
        raise ValueError(f"the state dict does not fit the backbone; {'; '.join(parts)}")
    vil.load_state_dict(dict(state_dict))


def convert_classifier(state_dict: Mapping[str, Any], vil: ViL) -> dict[str, Tensor]:
    """Make the start of a detector's training from a classification checkpoint, as published.

    Args:
        state_dict: the checkpoint, `{"net": …}` or its tensors, with or without `module.` in front
            of their names.
        vil: the backbone that the result is for.

    Returns:
        Tensors by name, `backbone.bottom_up.` in front. `cls_token` is expanded to the backbone's
        global tokens, position tables are resized, `attn.proj` serves `attn.proj_global` too, and
        `attn.qkv` is split where the backbone has `attn.query` and `attn.kv`. `cls_pos_embed` is
        passed on as it is, as published, even where the number of global tokens differs.
    """
    tensors: Mapping[str, Tensor] = state_dict.get("net", state_dict)
    target = vil.state_dict()
    converted: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(_PARALLEL_PREFIX)
        if name.endswith(_DERIVED):
            continue
        fitted = {
            place: _fit(place, piece, target[place])
            for place, piece in _places(name, tensor, target).items()
        }
        if not fitted:
            log.warning("left out %s: the backbone has no such tensor", name)
        for place, piece in fitted.items():
            if piece.shape != target[place].shape and not place.endswith("cls_pos_embed"):
                log.warning(
                    "left out %s: shape %s does not fit %s",
                    place,
                    tuple(piece.shape),
                    tuple(target[place].shape),
                )
                continue
            converted[DETECTOR_PREFIX + place] = piece
    return converted


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


def _fit(name: str, tensor: Tensor, target: Tensor) -> Tensor:
    """Expand or resize what the published conversion expands or resizes."""
    if tensor.shape == target.shape:
        return tensor
    kind = name.rpartition(".")[2]
    if kind == "cls_token" and tensor.shape[1] == 1:
        return tensor.expand(-1, target.shape[1], -1).clone()
    if kind in ("x_pos_embed", "y_pos_embed") and tensor.shape[1] > 1:
        # A table is an image of one row: bilinear resizing of it is linear resizing.
        resized = nn.functional.interpolate(
            tensor.transpose(1, 2), target.shape[1], mode="linear", align_corners=False
        )
        return resized.transpose(1, 2)
    if kind == "local_relative_position_bias_table":
        return resize_square_table(tensor, target.shape[0])
    return tensor
