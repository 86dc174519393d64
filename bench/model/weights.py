"""Weights: of files, of published checkpoints, of classifiers, into a backbone or detector."""

import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from attentions.parts import resize_square_table
from bench.errors import InputError, saying, some
from bench.files import write_whole
from bench.model.backbone import ViL
from bench.model.detectors import Detector

log = logging.getLogger(__name__)

_SHOWN = 20
# A name that the detectors of one library and method have alone.
_SIGNS = {
    ("detectron2", "mask_rcnn"): "proposal_generator.rpn_head.conv.weight",
    ("torchvision", "mask_rcnn"): "rpn.head.cls_logits.weight",
    ("detectron2", "retinanet"): "head.cls_score.weight",
    ("torchvision", "retinanet"): "head.classification_head.cls_logits.weight",
}
DETECTOR_PREFIX = "backbone.bottom_up."
_PARALLEL_PREFIX = "module."
# What wraps a model, in the names of all its weights: parallel and compiled training, Lightning.
_PREFIXES = (_PARALLEL_PREFIX, "_orig_mod.", "model.")
# Under which a file may hold its state dict.
_WRAPPERS = ("model", "net", "state_dict")
# torch computes nothing with floats of 8 bits, and with quantized numbers in its own layers alone.
_COARSE = re.compile("float8|float4|qu?int")
# Beside it, what the weights were pretrained on.
_ORIGIN, _CLASSES, _SETTINGS = "pretrain", "classes", "settings"
# Constants of an architecture, which every model makes for itself.
DERIVED = "relative_position_index"

# What is wrong with weights of which a module has one, and a state dict two.
SHARED = "shared here (share_weights), but different in the file"

COPIED, EXPANDED, RESIZED, SPLIT, LEFT_OUT = "copied", "expanded", "resized", "split", "left out"
ACTIONS = (COPIED, EXPANDED, RESIZED, SPLIT, LEFT_OUT)


def load_file(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file that torch.save wrote: tensors by name.

    It may stand alone or under "model", "net" or "state_dict"; what stands beside it, such as an
    optimizer's state, is not returned, nor is what parallel and compiled training and Lightning put
    before all names. A file of safetensors is read too. Pickled code is never run.

    Raises:
        InputError: naming the file, where it cannot be read, is no such file, holds anything but
            plain values and tensors, or has no state dict, or several that share most of their
            names, such as an average of the weights beside them.
    """
    content = _load(path)
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in _WRAPPERS if key in content), content)
    if not (isinstance(state, Mapping) and state):
        raise InputError(f"{path}: no state dict in it: {_content(content)}")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"{path}: no state dict in it, tensors by name, alone or under {', '.join(_WRAPPERS)}:"
            f" no tensors are {some(others)}"
        )
    own = _plain_names(state)
    alike = [
        key for key, value in _mappings(content) if 2 * len(own & _plain_names(value)) > len(own)
    ]
    if len(alike) > 1:
        raise InputError(
            f"{path}: several state dicts of the same names, {', '.join(alike)}; save the one that"
            " is meant alone"
        )
    for name, tensor in state.items():
        known = not _COARSE.search(str(tensor.dtype))
        if tensor.is_meta or tensor.layout != torch.strided or not known:
            what = "no values" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise InputError(f"{path}: {name} has {what}; dense floats or whole numbers are needed")
    found = {str(name): tensor for name, tensor in state.items()}
    while begun := next((p for p in _PREFIXES if all(n.startswith(p) for n in found)), ""):
        found = {name.removeprefix(begun): tensor for name, tensor in found.items()}
    return found


def _mappings(content: Mapping[object, object], at: str = "") -> Iterator[tuple[str, Any]]:
    """Each mapping within another, of any depth, and its keys from the outermost on."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield f"{at}{key}", value
            yield from _mappings(value, f"{at}{key}.")


def _plain_names(state: Mapping[object, object]) -> set[str]:
    tensors = (name for name, value in state.items() if isinstance(value, Tensor))
    return {str(name).removeprefix(_PARALLEL_PREFIX) for name in tensors}


def load_origin(path: Path) -> str | None:
    """Return what the weights of a file were pretrained on, where the file says so."""
    origin = _beside(path, _ORIGIN)
    return origin if isinstance(origin, str) else None


def load_classes(path: Path) -> tuple[str, ...] | None:
    """Return the names of a classifier's classes, by their numbers, where the file has them."""
    names = _beside(path, _CLASSES)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and names else None


def load_settings(path: Path) -> dict[str, Any]:
    """Return settings that the weights of a file were evaluated with, by their dotted names."""
    found = _beside(path, _SETTINGS)
    return dict(found) if isinstance(found, Mapping) else {}


def _beside(path: Path, name: str) -> object:
    """What a file holds beside its state dict."""
    content = _load(path)
    return content.get(name) if isinstance(content, Mapping) else None


def _load(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with saying(f"{path}: cannot read it"):
        file = path.open("rb")
    if path.suffix == ".safetensors":
        file.close()
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: is damaged, or no file of safetensors ({error})") from error
    with file, warnings.catch_warnings():
        # Of other protocols of pickle, as soon as a file turns out not to be a checkpoint.
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # A file of other content makes torch raise nearly anything.
            raise InputError(f"{path}: {_why_not_loaded(error)}") from error


def save_file(
    state_dict: Mapping[str, Tensor],
    path: Path,
    origin: str | None = None,
    classes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write `{"model": state_dict}`, whole or not at all; the folder is made where it is missing.

    Args:
        origin: what it was pretrained on, for `load_origin`.
        classes: of a classifier, for `load_classes`.
        settings: that it was evaluated with, for `load_settings`.

    Raises:
        InputError: where it cannot be written; a file that is there already stays.
    """
    content: dict[str, Any] = {"model": dict(state_dict)}
    if origin is not None:
        content[_ORIGIN] = origin
    if classes:
        content[_CLASSES] = list(classes)
    if settings:
        content[_SETTINGS] = dict(settings)
    write_whole(path, lambda file: torch.save(content, file))


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
        return f"it holds {some([str(key) for key in content]) or 'nothing'}"
    return f"it holds one {type(content).__name__}"


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
    problems = misfits(vil, state_dict)
    if problems:
        parts = [f"{what}: {', '.join(names)}" for what, names in problems.items()]
        raise InputError(f"the state dict does not fit the backbone; {'; '.join(parts)}")
    vil.load_state_dict(dict(state_dict))


def load_classifier(vil: ViL, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load a classifier's state dict, all of it or nothing, with or without `module.` in names.

    Args:
        source: where it is from, for the error.

    Raises:
        InputError: listing the names that are missing, unexpected or of another shape.
    """
    own = vil.state_dict()
    named = {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in state_dict.items()}
    given = {n: t for n, t in named.items() if n in own or not n.endswith(DERIVED)}
    problems = misfits(vil, given)
    if problems:
        parts = [f"{len(names)} {what}: {some(names, _SHOWN)}" for what, names in problems.items()]
        raise InputError(
            f"{source} does not fit the classifier of {len(own['head.weight'])} classes and"
            f" images of {vil.largest[0]}x{vil.largest[1]} that was built (backbone, row, positions"
            f" and size of images say which); {'; '.join(parts)}"
        )
    vil.load_state_dict(given)


def misfits(module: nn.Module, given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps a state dict from being loaded whole.

    Args:
        module: into which it is to be loaded.
        given: the state dict.

    Returns:
        Names by what is wrong with them ("missing", "unexpected", "misshapen" and so on), in the
        order of the state dicts; empty if all fits.
    """
    own = module.state_dict()
    found = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "misshapen": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in given and given[name].shape != tensor.shape
        ],
        "of other numbers": [
            f"{name} {given[name].dtype} instead of {tensor.dtype}"
            for name, tensor in own.items()
            if name in given and kind_of(given[name]) != kind_of(tensor)
        ],
        SHARED: shared(module, given),
    }
    return {what: names for what, names in found.items() if names}


def kind_of(tensor: Tensor) -> tuple[bool, bool]:
    """Return whether it is of floats, and whether of complex numbers."""
    return tensor.is_floating_point(), tensor.is_complex()


def shared(module: nn.Module, given: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose weights a module shares with an earlier name, unlike a state dict.

    Of two values, the one that is loaded last would win.
    """
    first: dict[int, str] = {}
    found = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        pair = [given[one] for one in (name, other) if one in given and other != name]
        # A NaN differs from itself.
        if len(pair) > 1 and not torch.equal(*(one.double().nan_to_num() for one in pair)):
            found.append(name)
    return found


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
    """The start of a detector's training, and how it was made.

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
        if step.action == LEFT_OUT and not step.source.endswith(DERIVED):
            log.warning("left out %s: %s", step.target or step.source, step.reason)
    return conversion.tensors


def convert(state_dict: Mapping[str, Any], vil: ViL) -> Conversion:
    """Do what `convert_classifier` does, and say what happened to each tensor."""
    tensors: Mapping[str, Tensor] = state_dict.get("net", state_dict)
    target = vil.state_dict()
    converted: dict[str, Tensor] = {}
    steps: dict[tuple[str, str], Step] = {}
    named = {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in tensors.items()}
    for name, tensor in named.items():
        shape = tuple(tensor.shape)
        places = {} if name.endswith(DERIVED) else _places(name, tensor, target)
        if not places:
            derived = name.endswith(DERIVED)
            reason = "every model makes its own" if derived else "the backbone has no such tensor"
            steps["", name] = Step(name, "", LEFT_OUT, shape, None, reason)
        for place, part in places.items():
            if place != name and place in named:
                # Its own tensor goes there, as `proj_global` rather than `proj`.
                continue
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
        if DETECTOR_PREFIX + name not in converted and not name.endswith(DERIVED)
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
    same = tensor.shape == target.shape or tensor.ndim != target.ndim
    if same or not tensor.is_floating_point():
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


def detector_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Return library and method of the detector that has these names, or None for no detector."""
    there = set(names)
    return next((found for found, sign in _SIGNS.items() if sign in there), None)


def load_detector(detector: Detector, state_dict: Mapping[str, Tensor]) -> None:
    """Load all weights of a detector, or none.

    Raises:
        InputError: listing the names that are missing, unexpected or of another shape.
    """
    own = detector.state_dict()
    problems = misfits(detector, state_dict)
    if problems:
        parts = [f"{len(names)} {what}: {some(names, _SHOWN)}" for what, names in problems.items()]
        hint = "" if problems.keys() == {SHARED} else _hint(state_dict, own)
        raise InputError(
            f"the weights do not fit the {detector.library} {detector.method} that was built"
            f"{hint}; {'; '.join(parts)}"
        )
    detector.load_state_dict(dict(state_dict))


def _hint(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is wrong in one phrase, where it can be said."""
    is_of = detector_kind(given)
    backbone = [name for name in own if name.startswith(DETECTOR_PREFIX)]
    if is_of is None and any(name in given for name in backbone):
        return ": they are of a backbone alone, without pyramid and heads"
    if is_of is None:
        return ": they are of no detector"
    if is_of != detector_kind(own):
        return f": they are of a {is_of[0]} {is_of[1]}"
    others = any(name.startswith(DETECTOR_PREFIX) and name not in own for name in given)
    fit = all(name in given and given[name].shape == own[name].shape for name in backbone)
    if fit and not others:
        return ": the backbone fits, pyramid or heads do not (other classes or widths)"
    return ": the backbone is another one (ARCH string, mechanism or size of its images)"
