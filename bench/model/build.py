"""The model of a run, as its configuration describes it, and what a record says of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.config.arch import parse
from bench.config.schema import CLASSIFIER, RunConfig
from bench.errors import InputError, RowError, some
from bench.files import sha256
from bench.model import detectors, weights
from bench.model.backbone import ViL
from bench.model.detectors import backbone_stages
from bench.system.seeding import seed_everything

T = TypeVar("T")


def on_meta(build: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `build` with nothing allocated, or as it is where what it makes asks for values.

    Raises:
        ValueError: from `build`.
    """
    try:
        with torch.device("meta"):
            return build(*args, **kwargs)
    except ValueError:
        raise
    except Exception:
        # A mechanism of others may fail in any way where tensors have no values.
        return build(*args, **kwargs)


@contextmanager
def refusing(config: RunConfig) -> Iterator[None]:
    """Turn whatever the mechanism of a row raises into an InputError that names the row.

    It is for what ends with a line where a run would have a record of the failure.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # A mechanism of others may fail in any way.
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"row {config.row!r}: {said}") from error


def build_backbone(config: RunConfig, num_classes: int = 1000) -> ViL:
    """Return the untrained backbone of a run, its weights drawn from the run's seed.

    Args:
        num_classes: outputs of its classification head.

    Raises:
        RowError: for a model that cannot be built, naming the row.
    """
    data, model = config.data, config.model
    seed_everything(config.seed)
    try:
        vil = ViL(
            model.arch,
            attention=model.attention,
            dense=model.dense,
            image_size=data.fixed_size or data.max_size,
            drop_path=model.drop_path,
            num_classes=num_classes,
            norm_embed=model.norm_embed,
            **model.options,
        )
    except (TypeError, ValueError) as error:
        raise RowError(f"row {config.row!r}: {error}") from error
    vil.grad_checkpointing = model.checkpoint
    if model.channels_last:
        _to_channels_last(vil)
    # Where nothing has values, operators are counted, which a compiled graph would hide.
    if model.compile and not next(vil.parameters()).is_meta:
        vil.compile()
    return vil


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return what of a configuration says what its weights compute, by dotted names."""
    model = config.as_dict()["model"]
    return {f"model.{name}": model[name] for name in ("attention", "options", "dense")}


def weights_notes(config: RunConfig, settings: Mapping[str, Any]) -> list[str]:
    """Say where weights come from a run whose mechanism computes something else.

    Args:
        config: of the model that takes them.
        settings: what their file says of that run; nothing is said of what it does not say.
    """
    apart = [
        f"{name}={settings[name]} (here {own})"
        for name, own in settings_of(config).items()
        if name in settings and settings[name] != own
    ]
    return [f"the weights' own run had {', '.join(apart)}"] if apart else []


def buffer_notes(config: RunConfig, vil: ViL) -> list[str]:
    """Say that buffers may be updated twice a step, where a compiled block is computed again."""
    averages = any(buffer.is_floating_point() for buffer in vil.buffers())
    if not (averages and config.model.compile and config.model.checkpoint):
        return []
    return [
        "buffers that a mechanism updates while it trains, as running averages of its own, may be"
        " updated twice a step (those of BatchNorm are not): model.compile with model.checkpoint"
        " computes a block again"
    ]


def _to_channels_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_detector(config: RunConfig, num_classes: int) -> detectors.Detector:
    """Return the untrained detector of a run, its weights drawn from the run's seed."""
    data, model = config.data, config.model
    fixed = data.fixed_size
    detector = detectors.build(
        build_backbone(config),
        method=model.method,
        num_classes=num_classes,
        library=model.library,
        min_size=None if fixed else data.min_sizes,
        max_size=None if fixed else data.max_size,
        fixed_size=fixed,
        **vars(model.detector),
    )
    if model.channels_last:
        _to_channels_last(detector)
    return detector


def fitting(detector: detectors.Detector, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return what of a checkpoint fits a detector, and the names of what does not.

    Args:
        detector: on any device, the meta device included.
        path: of a classifier's or detector's checkpoint.

    Raises:
        InputError: for a file that cannot be read, none of whose tensors fits the backbone, or with
            values that are not finite.
    """
    loaded = given = weights.load_file(path)
    if not any(name.startswith(weights.DETECTOR_PREFIX) for name in given):
        given = weights.convert(given, detector.vil).tensors
    own = detector.state_dict()
    found = {
        name: tensor
        for name, tensor in given.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not any(map(_is_of_backbone, found)):
        names = (some([*one], 2) for one in (loaded, detector.vil.state_dict()))
        raise InputError(
            "train.init={}: none of its {} tensors fits the backbone; they are called {}, those of"
            " the backbone {}".format(path, len(loaded), *names)
        )
    others = [name for name in found if weights.kind_of(found[name]) != weights.kind_of(own[name])]
    if others:
        raise InputError(
            f"train.init={path}: {len(others)} of its tensors are of {found[others[0]].dtype}, the"
            f" model's of {own[others[0]].dtype}: {some(others)}"
        )
    both = weights.shared(detector, found)
    if both:
        raise InputError(f"train.init={path}: {len(both)} {weights.SHARED}: {some(both)}")
    # As the model holds them: double precision holds values that single does not.
    held = {name: tensor.to(own[name].dtype) for name, tensor in found.items()}
    spoilt = [name for name, tensor in held.items() if not tensor.isfinite().all()]
    if spoilt:
        raise InputError(
            f"train.init={path}: {len(spoilt)} of its tensors hold values that are not finite (NaN"
            f" or infinite), the first of them {spoilt[0]}"
        )
    return found, sorted(set(given) - set(found))


def _is_of_backbone(name: str) -> bool:
    # The head of a classifier is of no use to a detector, and each makes what is derived.
    inside = name.startswith(weights.DETECTOR_PREFIX) and not name.endswith(weights.DERIVED)
    return inside and not name.startswith(f"{weights.DETECTOR_PREFIX}head.")


def initialise(detector: detectors.Detector, path: Path) -> str:
    """Load what fits of a checkpoint, and say what did; see `fitting` for what is raised."""
    found, left = fitting(detector, path)
    own = detector.state_dict()
    detector.load_state_dict({**own, **found})
    missing = sum(map(_is_of_backbone, set(own) - set(found)))
    digest = sha256(path)
    heads = ("cls_score", "classification_head.cls_logits")
    by_number = any(head in name for name in found for head in heads)
    return (
        f"initialised from {path.name} (sha256 {digest[:16]}): {len(found)} tensors"
        + (f"; left out as they do not fit: {', '.join(left)}" if left else "")
        + (f"; {missing} of the backbone start anew" if missing else "")
        + ("; heads of classes among them, taken over by the classes' numbers" if by_number else "")
    )


def parameters_section(detector: detectors.Detector | ViL) -> dict[str, Any]:
    """Return the `parameters` section of a record."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    modules = backbone_stages(detector) if isinstance(detector, ViL) else detector.parts()
    parts = {name: count(module) for name, module in modules.items()}
    return {"total": count(detector), "by_part": parts}


def library_of(config: RunConfig) -> tuple[str, str]:
    """Return the library of a run's model, the one that "auto" stands for here, and its version.

    Raises:
        InputError: for one that is not importable.
    """
    if config.model.method == CLASSIFIER:
        return "timm", metadata.version("timm")
    library = detectors.resolve_library(config.model.library)
    return library, detectors.library_version(library)


def model_section(config: RunConfig) -> dict[str, Any]:
    """Return the `model` section of a record."""
    model = config.model
    library, version = model.library, ""
    # Where the library cannot be had, that is the error of the record.
    with suppress(InputError):
        library, version = library_of(config)
    return {
        "backbone": model.backbone,
        "method": model.method,
        "library": library,
        "library_version": version or None,
        "attention": _attention_label(config),
        "arch": model.arch,
        "drop_path": model.drop_path,
        "schedule": config.train.schedule,
    }


def _attention_label(config: RunConfig) -> str:
    """Name the mechanism, and "/ full" where stages or blocks have full attention instead."""
    model = config.model
    try:
        stages = parse(model.arch, model.attention, model.dense)
    except ValueError:
        return model.attention
    return " / ".join(dict.fromkeys(name for stage in stages for name in stage.mechanisms))
