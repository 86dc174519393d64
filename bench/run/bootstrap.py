"""How far an average precision would move with other images: the bootstrap over images.

Images are drawn with replacement, as many as there are, and the average precision of COCO is worked
out again for every draw. Detections are matched to objects once, since a match depends on its own
image alone; a draw is then a weight for every image, how often it was drawn.

Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapters 13 (percentile intervals) and 8
(more than one sample: two detectors on the same draws are compared pair by pair).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
LEVEL = 0.95

# Numbers in the largest array at a time.
_CHUNK = 4_000_000
# What the rules of COCO add to the denominator of a precision.
_TINY = np.spacing(1)
# The highest overlap that the rules of COCO ask for.
_FULL = 1 - 1e-10

Array = NDArray[np.generic]


@dataclass(frozen=True)
class ImageMatches:
    """The detections of one category in one image, D of them, and how they were matched.

    Attributes:
        place: of the image, 0 to I - 1.
        scores: (D,) descending.
        found: (T, D) whether a detection found an object, at each of T overlap thresholds.
        ignored: (T, D) whether it does not count, since it lies in a crowd.
    """

    place: int
    scores: NDArray[np.float32]
    found: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True)
class Matches:
    """The same of all I images, D detections in descending order of score.

    Attributes:
        images: (D,) the place of each detection's image.
        found: (T, D) as in `ImageMatches`.
        ignored: (T, D).
        objects: (I,) objects an image that can be found.
    """

    images: NDArray[np.intp]
    found: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence[ImageMatches], objects: NDArray[np.int64]) -> "Matches":
        """Put the images of one category together; of equal scores the first image's is first."""
        if not parts:
            nothing = np.zeros((len(IOU_THRESHOLDS), 0), dtype=bool)
            return cls(np.zeros(0, dtype=np.intp), nothing, nothing, objects)
        scores = np.concatenate([part.scores for part in parts])
        order = np.argsort(-scores, kind="stable")
        places = np.repeat([part.place for part in parts], [len(part.scores) for part in parts])
        return cls(
            places[order],
            np.concatenate([part.found for part in parts], axis=1)[:, order],
            np.concatenate([part.ignored for part in parts], axis=1)[:, order],
            objects,
        )


def match(
    place: int, scores: NDArray[np.float32], overlaps: Array, crowd: Sequence[bool]
) -> ImageMatches:
    """Match the detections of one category in one image to its objects, by the rules of COCO.

    Detections choose in the order of their scores. Each takes the free object that it overlaps
    most, of equals the last, or else a crowd, which is never used up.

    Args:
        place: of the image.
        scores: (D,) descending.
        overlaps: (D, G) of detections and objects.
        crowd: (G,) whether an object is a crowd.
    """
    thresholds = np.minimum(IOU_THRESHOLDS, _FULL)[:, None]
    found = np.zeros((len(thresholds), len(scores)), dtype=bool)
    ignored = np.zeros_like(found)
    if not len(crowd):
        return ImageMatches(place, scores, found, ignored)
    crowds = np.array(crowd, dtype=bool)
    free = np.tile(~crowds, (len(thresholds), 1))
    rows = np.arange(len(thresholds))
    for column, overlap in enumerate(np.asarray(overlaps, dtype=np.float64)):
        enough = overlap >= thresholds
        candidates = np.where(enough & free, overlap, -1.0)
        best = len(crowds) - 1 - candidates[:, ::-1].argmax(axis=1)
        hit = candidates[rows, best] >= 0
        free[rows[hit], best[hit]] = False
        found[:, column] = hit
        ignored[:, column] = ~hit & (enough & crowds).any(axis=1)
    return ImageMatches(place, scores, found, ignored)


def draws(images: int, resamples: int, seed: int) -> NDArray[np.int32]:
    """Return how often each image is in each draw, (resamples, images).

    The same arguments give the same draws, so that two detectors meet the same images.
    """
    chances = np.full(images, 1 / max(images, 1))
    drawn = np.random.default_rng(seed).multinomial(images, chances, size=resamples)
    return drawn.astype(np.int32)


def average_precision(
    categories: Iterable[Matches], weights: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the mean average precision of every draw, 0 to 1, NaN where it holds no object.

    It equals what COCO's rules give for a data set in which each image is as often as its weight
    says, the copies of a detection next to each other.

    Args:
        categories: the matches of each.
        weights: (R, I), how often each image is in each draw.
    """
    total = np.zeros(len(weights))
    defined = np.zeros(len(weights), dtype=np.int64)
    for category in categories:
        objects = weights @ category.objects
        step = max(1, _CHUNK // max(1, len(category.images)))
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            values = _category(category, weights[part], objects[part])
            there = objects[part] > 0
            total[part] += np.where(there, values, 0.0)
            defined[part] += there
    return np.divide(total, defined, out=np.full(len(weights), np.nan), where=defined > 0)


def interval(
    value: float | None, draws_of_value: Sequence[float | None]
) -> tuple[float, float] | None:
    """Return the interval of an average precision, or None where none is defined.

    It is the percentile interval, moved so that the mean of the draws is the value itself: a draw
    repeats some images and lacks others, which raises average precision where classes are rare, by
    more than a point on a hundred images of 80 classes.

    Args:
        value: in percent.
        draws_of_value: the same of every draw, None where it is not defined.
    """
    known = [drawn for drawn in draws_of_value if drawn is not None]
    if value is None or not known:
        return None
    tail = 50 * (1 - LEVEL)
    limits = np.percentile(known, [tail, 100 - tail]) - np.mean(known) + value
    low, high = np.clip(limits, 0, 100).tolist()
    return low, high


def _category(
    category: Matches, weights: NDArray[np.int32], objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Average precision of one category, (R,), averaged over the thresholds.

    Precision rises where an object is found and nowhere else, so its envelope is worked out at
    those detections alone.
    """
    drawn = weights[:, category.images]
    seen = drawn.cumsum(axis=1, dtype=np.int32)
    objects = np.maximum(objects, 1)[:, None]
    result = np.zeros(len(weights))
    for found, ignored in zip(category.found, category.ignored, strict=True):
        hits = np.flatnonzero(found)
        counted = seen[:, hits]
        if ignored.any():
            skipped = np.flatnonzero(ignored)
            before = np.searchsorted(skipped, hits)
            sums = drawn[:, skipped].cumsum(axis=1, dtype=np.int32)
            counted = counted - np.pad(sums, ((0, 0), (1, 0)))[:, before]
        right = drawn[:, hits].cumsum(axis=1, dtype=np.int32)
        precision = right / (counted + _TINY)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, right / objects, side="right")
        gained = np.diff(reached, axis=1, prepend=0)
        result += (envelope * gained).sum(axis=1)
    return result / (len(category.found) * len(RECALLS))
