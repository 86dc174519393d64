"""The weights of a whole detector: whose they are, and into the detector with them."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from bench.errors import InputError
from bench.model.detectors.contract import Detector
from bench.run.checkpoints import DETECTOR_PREFIX, misfits

_SHOWN = 20
# A name that the detectors of one library and method have alone.
_SIGNS = {
    ("detectron2", "mask_rcnn"): "proposal_generator.rpn_head.conv.weight",
    ("torchvision", "mask_rcnn"): "rpn.head.cls_logits.weight",
    ("detectron2", "retinanet"): "head.cls_score.weight",
    ("torchvision", "retinanet"): "head.classification_head.cls_logits.weight",
}


def kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Return library and method of the detector that has these names, or None for no detector."""
    there = set(names)
    return next((found for found, sign in _SIGNS.items() if sign in there), None)


def load(detector: Detector, state_dict: Mapping[str, Tensor]) -> None:
    """Load all weights of a detector, or none.

    Raises:
        InputError: listing the names that are missing, unexpected or of another shape.
    """
    own = detector.state_dict()
    problems = misfits(own, state_dict)
    if problems:
        parts = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items()]
        raise InputError(
            f"the weights do not fit the {detector.library} {detector.method} that was built"
            f"{_hint(state_dict, own)}; {'; '.join(parts)}"
        )
    detector.load_state_dict(dict(state_dict))


def _hint(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is wrong in one phrase, where it can be told."""
    is_of = kind(given)
    backbone = [name for name in own if name.startswith(DETECTOR_PREFIX)]
    if is_of is None and any(name in given for name in backbone):
        return ": they are of a backbone alone, without pyramid and heads"
    if is_of is None:
        return ": they are of no detector"
    if is_of != kind(own):
        return f": they are of a {is_of[0]} {is_of[1]}"
    if all(name in given and given[name].shape == own[name].shape for name in backbone):
        return ": the backbone fits, pyramid or heads do not (other classes or widths)"
    return ": the backbone is another one (ARCH string, mechanism or size of its images)"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
