"""What trained rows find in a few images, and what one query of them sees; data for pictures.

The images are the same for all rows: the first with objects of the split that fills the tables, at
the size of the profile. What a query sees is the gradient of its output of the first attention
layer by the tokens, which every mechanism has, whatever its weights look like; outputs are added up
with random signs, the same for all rows.

One file a row, `pictures/{row}-{key}.json` beside `records/`; `results/README.md` has its fields.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench import record
from bench.config.schema import METHODS
from bench.config.suites import build_config
from bench.data.generated import data_root
from bench.data.split import open_split, profile_batch
from bench.errors import InputError
from bench.files import sha256, write_whole
from bench.measure.workload import image_size
from bench.model.backbone import ViL
from bench.model.build import build_detector
from bench.model.detectors import Detector
from bench.model.weights import load_detector, load_file
from bench.record import Record
from bench.system.devices import single_fabric

IMAGES = 3
# Detections below this score are not drawn.
LEAST_SCORE = 0.3


def make(
    records: Sequence[Record],
    output: Path,
    *,
    progress: Callable[[str], object] = lambda _row: None,
) -> list[str]:
    """Write the file of each row that has kept weights and no file yet; return what failed.

    Args:
        records: of runs that are in `output`.
        output: the folder of the suite.
        progress: called with each row before it is drawn.
    """
    failed = []
    for entry in records:
        kept = (entry.training or {}).get("weights")
        name = record.done_name(entry.row, entry.key)
        target = output / record.PICTURES / name
        if (
            entry.model["method"] not in METHODS
            or not kept
            or target.exists()
            or not (output / kept["path"]).is_file()
        ):
            continue
        progress(entry.row)
        try:
            weights = output / kept["path"]
            if sha256(weights) != kept["sha256"]:
                raise InputError(f"{weights} is not what its run wrote (another SHA-256)")
            content = _content(entry, output, weights)
            write_whole(target, json.dumps(content, allow_nan=False) + "\n")
        except Exception as error:
            # A picture is worth less than the report, which is made without it, and a mechanism of
            # others may fail in any way.
            failed.append(f"no pictures of {entry.row}: {' '.join(str(error).split())}")
    return failed


def _content(entry: Record, output: Path, weights: Path) -> dict[str, Any]:
    config = build_config(entry.config)
    dataset = open_split(config, data_root(config, output), config.evaluate.splits[0])
    images, targets = profile_batch(dataset, image_size(config), IMAGES)
    classes = len((entry.training or {}).get("classes") or ()) or dataset.num_classes
    detector = build_detector(config, classes)
    load_detector(detector, load_file(weights))
    device = single_fabric(config).device
    detector.to(device).eval()
    images = [image.to(device) for image in images]
    shown = []
    with torch.no_grad():
        for image, target in zip(images, targets, strict=True):
            (found,) = detector([image])
            keep = found["scores"] >= LEAST_SCORE
            shown.append(
                {
                    "png": _png(image),
                    "truth": _boxes(target["boxes"], target["labels"]),
                    "found": _boxes(found["boxes"][keep], found["labels"][keep]),
                    "scores": found["scores"][keep].tolist(),
                }
            )
    return {
        "schema": record.SCHEMA,
        "row": entry.row,
        "key": entry.key,
        "split": config.evaluate.splits[0],
        "least_score": LEAST_SCORE,
        "images": shown,
        "sees": _sees(detector, images[0], targets[0]["boxes"]),
    }


def _sees(detector: Detector, image: Tensor, boxes: Tensor) -> dict[str, Any]:
    """What the query in the middle of the first object sees, from 0 to 1, by cell of stage 1."""
    left, top, right, bottom = boxes[0].tolist()
    x, y = (left + right) / 2, (top + bottom) / 2
    stride = detector.vil.strides["layer1"]
    query = int(y // stride), int(x // stride)
    return {
        "stage": 1,
        "query": list(query),
        "values": saliency(detector.vil, image, query).tolist(),
    }


def saliency(vil: ViL, image: Tensor, query: tuple[int, int]) -> Tensor:
    """Return how much a query's output of the first attention layer changes with each cell.

    Args:
        vil: a backbone.
        image: (3, H, W).
        query: row and column of the cell, in the feature map of the first stage.

    Returns:
        (rows, columns), the largest 1: the norm of the gradient by the token of a cell.

    Raises:
        InputError: where the gradient is not finite.
    """
    place = next(vil.attention_places())
    seen: list[tuple[Tensor, tuple[int, int]]] = []
    hook = place.module.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        with torch.no_grad():
            vil.run_stage(1, _padded(image[None], vil.stride))
    finally:
        hook.remove()
    tokens, grid = seen[0]
    tokens = tokens.detach().clone().requires_grad_()
    output = place.module(tokens, grid)[0, place.stage.num_global + query[0] * grid[1] + query[1]]
    signs = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).sign()
    (gradient,) = torch.autograd.grad((output * signs.to(output)).sum(), tokens)
    found = gradient[0, place.stage.num_global :].norm(dim=-1).unflatten(0, grid)
    if not found.isfinite().all():
        raise InputError("the gradient of its first attention layer is not finite")
    return (found / found.max().clamp_min(1e-30)).cpu()


def _padded(image: Tensor, stride: int) -> Tensor:
    height, width = image.shape[-2:]
    return torch.nn.functional.pad(image, (0, -width % stride, 0, -height % stride))


def _boxes(boxes: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    return [
        {"box": [round(side, 1) for side in box], "label": label}
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
    ]


def _png(image: Tensor) -> str:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
