"""Running modules on tensors that have shapes and no memory.

`torch._subclasses.FakeTensorMode` makes such tensors. They claim to be on the CPU and therefore
take its way through autograd, autocast and the choice of fused attention. What it lacks is here:

- What depends on data (`Answers`): how many entries of a mask are true, which number a tensor
  holds. A detector asks that between its parts. The answers are the most there can be where that
  is small, and numbers that the caller states (`Counts`) where it matters.
- What a GPU does otherwise (`AsOnCuda`): operators that autocast keeps in float32 there alone, and
  its fused attention.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from bench.model.detectors.rois import Counts, fixed_rois

aten = torch.ops.aten

# Of scores above a threshold: what RetinaNet keeps of a level, and more than Mask R-CNN detects.
CANDIDATES = 1000
# Bias rows of efficient attention on CUDA are padded to a multiple of so many keys.
_BIAS_ALIGNMENT = 16
# Fused attention on CUDA takes heads whose width is a multiple of so many channels.
_HEAD_ALIGNMENT = 8

Count = Callable[[object], int]


def copied(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `module` whose tensors are what `convert` makes of its own.

    Those in plain attributes count too, in containers as well: a mechanism may keep a mask there.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in tree_leaves(vars(part)):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                made = convert(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = made
    return copy.deepcopy(module, memo)


class Answers(TorchDispatchMode):
    """Answers operators whose result depends on data.

    Of a mask all entries are true, unless something is known of it. Known are masks of zeros with
    some entries set, what is made of them, floats above a threshold (at most CANDIDATES), a
    comparison of two matrices (one entry a row), and comparisons of tensors given to `expect`. A
    single number is 0; whether all are true, is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self._true: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._expected: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._certain: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def expect(self, tensor: Tensor, **counts: Count) -> Tensor:
        """Say for how many entries a comparison holds, by its operator and what it compares to."""
        self._expected[tensor] = counts
        return tensor

    def true(self, mask: Tensor) -> int:
        """How many entries of a mask are true, or of a tensor not zero."""
        return min(self._true.get(mask, mask.numel()), mask.numel())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        answer = _ANSWERS.get(func.overloadpacket)
        if answer is not None:
            return answer(self, func, *args, **kwargs)
        result = func(*args, **kwargs)
        learn = _LESSONS.get(func.overloadpacket)
        if learn is not None:
            learn(self, result, func.overloadpacket.__name__, *args)
        return result

    def _nonzero(self, _func: Any, mask: Tensor) -> Tensor:
        return mask.new_empty((self.true(mask), mask.dim()), dtype=torch.int64)

    def _masked_select(self, _func: Any, values: Tensor, mask: Tensor) -> Tensor:
        return values.new_empty(self.true(mask))

    def _index(self, func: Any, values: Tensor, indices: Iterable[Tensor | None]) -> Tensor:
        places: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                number = self.true(index)
                places += [index.new_empty(number, dtype=torch.int64) for _ in index.shape]
            else:
                places.append(index)
        selected: Tensor = func(values, places)
        return selected

    def _number(self, func: Any, value: Tensor) -> object:
        if getattr(value, "constant", None) is not None:
            return func(value)
        if value.dtype == torch.bool:
            return value in self._certain
        return 0.0 if value.is_floating_point() else 0

    def _equal(self, _func: Any, _one: Tensor, _other: Tensor) -> bool:
        return True

    def _nms(self, _func: Any, boxes: Tensor, _scores: Tensor, _threshold: float) -> Tensor:
        return boxes.new_empty(len(boxes), dtype=torch.int64)

    def _zeros(self, result: Tensor, _name: str, *_: Any) -> None:
        self._true[result] = 0

    def _set(self, result: Tensor, _name: str, target: Tensor, indices: Any, *_: Any) -> None:
        if target in self._true and len(indices) == 1 and indices[0] is not None:
            self._true[result] = self._true[target] + indices[0].numel()

    def _joined(self, result: Tensor, _name: str, tensors: list[Tensor], *_: Any) -> None:
        if any(tensor in self._true for tensor in tensors):
            self._true[result] = sum(map(self.true, tensors))
        expected = [self._expected.get(tensor) for tensor in tensors]
        if expected and None not in expected:
            counts: list[Mapping[str, Count]] = [each for each in expected if each is not None]
            self._expected[result] = {
                name: lambda value, name=name: sum(each[name](value) for each in counts)
                for name in counts[0]
            }

    def _either(self, result: Tensor, _name: str, one: Tensor, other: Tensor) -> None:
        self._true[result] = self.true(one) + self.true(other)

    def _both(self, result: Tensor, _name: str, one: Tensor, other: Tensor) -> None:
        self._true[result] = min(self.true(one), self.true(other))

    def _all(self, result: Tensor, *_: Any) -> None:
        self._certain[result] = True

    def _compared(self, result: Tensor, name: str, one: Tensor, other: object) -> None:
        count = (self._expected.get(one) or {}).get(name)
        if count is not None:
            self._true[result] = count(other)
        elif name == "gt" and one.is_floating_point() and not isinstance(other, Tensor):
            self._true[result] = CANDIDATES
        elif name == "eq" and one.dim() == 2 and isinstance(other, Tensor):
            self._true[result] = len(one)


_ANSWERS: Mapping[Any, Callable[..., Any]] = {
    aten.nonzero: Answers._nonzero,
    aten.masked_select: Answers._masked_select,
    aten.index: Answers._index,
    aten._local_scalar_dense: Answers._number,
    aten.equal: Answers._equal,
    torch.ops.torchvision.nms: Answers._nms,
}
_LESSONS: Mapping[Any, Callable[..., None]] = {
    aten.zeros_like: Answers._zeros,
    aten.zeros: Answers._zeros,
    aten.index_put_: Answers._set,
    aten.cat: Answers._joined,
    aten.bitwise_or: Answers._either,
    aten.logical_or: Answers._either,
    aten.bitwise_and: Answers._both,
    aten.logical_and: Answers._both,
    aten.all: Answers._all,
    **dict.fromkeys((aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne), Answers._compared),
}


# Operators that autocast runs in float32 on CUDA and in the dtype of their input on the CPU.
_FLOAT32_ON_CUDA = """
    layer_norm group_norm softmax log_softmax exp expm1 log log1p log2 log10 pow __pow__ rsqrt
    reciprocal softplus sum cumsum cumprod norm cosine_similarity interpolate
    binary_cross_entropy_with_logits cross_entropy nll_loss l1_loss smooth_l1_loss mse_loss
    huber_loss kl_div logsumexp cdist
"""
_FLOAT32_NAMES = frozenset(_FLOAT32_ON_CUDA.split())


class AsOnCuda(TorchFunctionMode):
    """Does on CPU tensors what a GPU would: float32 under autocast, and fused attention.

    Fused attention is "efficient" with a mask or in float32 and "flash" otherwise. cuDNN's, which
    some GPUs prefer, keeps as much as flash.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            return _cuda_attention(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _FLOAT32_NAMES and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the operator that CUDA takes."""
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(low) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(low)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, dim=-3) for tensor in (key, value))
    fused = query.dim() == 4 and not query.shape[-1] % _HEAD_ALIGNMENT
    if not fused or value.shape[-1] % _HEAD_ALIGNMENT:
        found: tuple[Tensor, ...] = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )
        return found[0]
    if attn_mask is None and query.dtype != torch.float32:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return found[0]
    if attn_mask is not None:
        attn_mask = _cuda_bias(attn_mask, query, key)
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    found = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )
    return found[0]


def _cuda_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as efficient attention wants it: additive, its rows aligned, (B, H, L, S)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0.0)
    keys = mask.shape[-1]
    missing = -keys % _BIAS_ALIGNMENT
    if missing:
        mask = nn.functional.pad(mask, (0, missing))[..., :keys]
    return mask.expand(*query.shape[:3], key.shape[2])


@contextmanager
def data_free(detector: Any, counts: Counts, answers: Answers) -> Iterator[None]:
    """Let a copied detector run where nothing has a value, on the RoIs that `counts` says.

    Args:
        detector: the copy; it is changed.
        counts: of `most`.
        answers: the mode it will run in.
    """
    bind = {"torchvision": _bind_torchvision, "detectron2": _bind_detectron2}
    with ExitStack() as stack:
        stack.enter_context(patch("torchvision.ops.boxes.batched_nms", _keep_all))
        bind[detector.library](detector, counts, answers, stack)
        stack.enter_context(fixed_rois(detector, counts))
        yield


def fix_size(detector: Any, image_size: tuple[int, int]) -> None:
    """Make a copied detector take images of `image_size` (height, width) as they are."""
    detector.settings = dataclasses.replace(detector.settings, fixed_size=image_size)
    if detector.library == "torchvision":
        detector.transform.settings = detector.settings


def _keep_all(boxes: Tensor, *_: Any) -> Tensor:
    """Non-maximum suppression that suppresses nothing."""
    return torch.arange(len(boxes), device=boxes.device)


def _bind_torchvision(detector: Any, counts: Counts, answers: Answers, _stack: ExitStack) -> None:
    if detector.method != "mask_rcnn":
        return
    heads = detector.roi_heads
    select = heads.select_training_samples

    def select_training_samples(*args: Any) -> Any:
        selected = select(*args)
        for labels in selected[2]:
            answers.expect(labels, gt=lambda _: counts.mask_rois or 0)
        return selected

    heads.select_training_samples = select_training_samples
    for pool in (heads.box_roi_pool, heads.mask_roi_pool):
        pool.map_levels = _on_first_level(pool.map_levels, answers)


def _bind_detectron2(detector: Any, counts: Counts, answers: Answers, stack: ExitStack) -> None:
    from detectron2.modeling import poolers
    from detectron2.modeling.roi_heads import roi_heads
    from detectron2.structures import ImageList

    stack.enter_context(patch.object(ImageList, "from_tensors", _batch_images))
    if detector.method != "mask_rcnn":
        return
    select = roi_heads.select_foreground_proposals

    def select_foreground_proposals(proposals: Any, background: int) -> Any:
        for instances in proposals:
            answers.expect(instances.gt_classes, ne=lambda _: counts.mask_rois or 0)
        return select(proposals, background)

    for module, name, replacement in (
        (
            poolers,
            "assign_boxes_to_levels",
            _on_first_level(poolers.assign_boxes_to_levels, answers),
        ),
        (poolers, "convert_boxes_to_pooler_format", _numbered_boxes),
        (roi_heads, "select_foreground_proposals", select_foreground_proposals),
    ):
        stack.enter_context(patch.object(module, name, replacement))


def _batch_images(images: list[Tensor], size_divisibility: int = 0, *_: Any, **__: Any) -> Any:
    """detectron2's batch of images of one size, whose size it reads from a tensor."""
    from detectron2.structures import ImageList

    height, width = images[0].shape[-2:]
    stride = max(size_divisibility, 1)
    batch = images[0].new_zeros(
        len(images), 3, -(-height // stride) * stride, -(-width // stride) * stride
    )
    for image, place in zip(images, batch, strict=True):
        place[..., :height, :width].copy_(image)
    return ImageList(batch, [(height, width)] * len(images))


def _numbered_boxes(box_lists: Iterable[Any]) -> Tensor:
    """detectron2's boxes with the number of their image in front, which it reads from a tensor."""
    boxes = torch.cat([boxes.tensor for boxes in box_lists])
    return torch.cat([boxes.new_empty(len(boxes), 1), boxes], dim=1)


def _on_first_level(mapper: Callable[..., Tensor], answers: Answers) -> Callable[..., Tensor]:
    """Send every RoI to the first level of the pyramid, where the small ones go."""

    def levels(*args: Any) -> Tensor:
        found = mapper(*args)
        return answers.expect(found, eq=lambda level: len(found) if level == 0 else 0)

    return levels
