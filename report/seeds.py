"""The seeds of a row: which records belong together, and the one that stands for them.

A row that was trained with several seeds is their mean. How sure it is comes from a hierarchical
bootstrap: seeds are drawn with replacement, then images, and every row meets the same draws, so
that rows are compared in pairs.

Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapter 8 (data of several levels).
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, harmonic_mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bench.record import Record
from report import searches

LEVEL = 0.95
KINDS = ("box", "mask")
# Of classifiers.
SHARES = ("top1", "top5")

# Settings that seeds of one row may differ in: they change no number.
_FREE = ("row", "seed", "data.workers", "train.checkpoint_every", "train.log_every")
_SECTIONS = ("parameters", "flops", "memory", "latency")

Draws = Sequence[float | None]
Array = NDArray[np.float64]


def merged(records: Sequence[Record]) -> list[Record]:
    """Return one record a row, in the order of its first.

    That of several seeds has the mean of their accuracies, with draws of seeds and images, and the
    costs of the first seed that has them. Its `evaluation.seeds` holds `seeds`, `failed`, and for
    "box" and "mask" the AP of each seed (`box_AP`) and their standard deviation (`box_sd`), in
    percent; of classifiers `top1` and `top5` of each seed. Its `training.by_seed` holds what each
    seed's training was.
    """
    return [_mean(row) for row in rows(records)]


def rows(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records of each row, one a seed, in the order of its first."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for place, record in enumerate(records):
        groups[f"{place}" if of(record) else alike(record)].append(record)
    parts = [part for group in groups.values() for part in _parts(group)]
    places = {id(record): number for number, record in enumerate(records)}
    return sorted(parts, key=lambda part: places[id(part[0])])


def of(record: Record) -> Mapping[str, Any]:
    """Return what `merged` says of the seeds of a record; nothing of a single run."""
    found: Mapping[str, Any] = (record.evaluation or {}).get("seeds") or {}
    return found


def listed(record: Record) -> str:
    """Return the seeds that a record has numbers of, such as `0, 1, 2`."""
    return ", ".join(map(str, of(record).get("seeds", [record.seed])))


def sentence(means: Mapping[str, Record]) -> str:
    """Say which seeds rows are means of, or that seeds were not varied.

    Args:
        means: rows by their label, as `merged` returns them.
    """
    several = {label: record for label, record in means.items() if of(record)}
    if not several:
        return (
            "Each row was trained with one seed: what another seed would change was not measured."
        )
    known = {label: listed(record) for label, record in means.items() if record.evaluation}
    usual = Counter(known.values()).most_common(1)[0][0]
    others = [f"{label}: {own}" for label, own in known.items() if own != usual]
    failed = [
        f" Seed {seed} of {label} failed and is not in its mean."
        for label, record in several.items()
        for seed in of(record)["failed"]
    ]
    but = f" ({'; '.join(others)})" if others else ""
    return f"mAP is the mean of the trainings with seeds {usual}{but}.{''.join(failed)}"


def interval(value: float, draws: Draws, *, least: float = 0.0) -> tuple[float, float] | None:
    """Return the interval of a figure or a difference, in percent; None without a defined draw.

    It is the percentile interval, moved so that the mean of the draws is the value itself, as
    `bench/run/bootstrap.py` explains.

    Args:
        value: on all images.
        draws: the same of every draw, None where it is not defined.
        least: what the figure cannot be below.
    """
    drawn = [one for one in draws if one is not None]
    if not drawn:
        return None
    tail = 50 * (1 - LEVEL)
    limits = np.percentile(drawn, [tail, 100 - tail]) - np.mean(drawn) + value
    low, high = np.clip(limits, least, 100).tolist()
    return low, high


def draws(values: Array, seeds: Sequence[int]) -> Array:
    """Return draws of seeds and images, (R,), of those of images alone.

    The seeds in each draw depend on `seeds` alone, so that rows with the same ones stay paired. A
    draw of images moves the mean of the seeds, and a draw of seeds moves it by what they differ in
    over all draws of images. S values resampled scatter less than they should, by
    sqrt((S - 1) / S), and the spread of a few is itself uncertain: what the seeds move is
    multiplied to make up for both, with Student's t in place of the normal distribution. Without
    that, the 95 % interval of three seeds holds the truth three times in four.

    Args:
        values: (S, R), of each seed in each draw of images; NaN where it is not defined.
        seeds: the S seeds.
    """
    count, resamples = values.shape
    mean: Array = values.mean(axis=0)
    if count == 1:
        return mean
    upper = (1 + LEVEL) / 2
    widen = math.sqrt(count / (count - 1)) * stats.t.ppf(upper, count - 1) / stats.norm.ppf(upper)
    chances = np.full(count, 1 / count)
    drawn = np.random.default_rng(list(seeds)).multinomial(count, chances, size=resamples).T
    of_seeds = np.nanmean(values, axis=1, keepdims=True)
    moved: Array = ((drawn - 1) / count * of_seeds).sum(axis=0)
    return mean + widen * moved


def alike(record: Record) -> str:
    """What the seeds of a row have in common, as text."""
    config = {
        name: value for name, value in searches.flat(record.config).items() if name not in _FREE
    }
    inputs = record.environment.get("inputs")
    named = [_row(record), record.suite, record.model["library"], inputs, config]
    return json.dumps(named, sort_keys=True, default=list)


def _row(record: Record) -> str:
    """The row's name; that of records that were made as a search of seeds, without the seed."""
    name = searches.split(record)
    return name[0] if name is not None and name[1] == "seed" else record.row


def _parts(group: Sequence[Record]) -> list[list[Record]]:
    """Take apart what only looks like the seeds of one row.

    Those are records on other images, and, where a seed is there twice, those of other machines, or
    of one run that was done twice.
    """
    known = [_images(record) for record in group if record.evaluation]
    # A seed that failed has no images; it is of the first row.
    images = [_images(record) if record.evaluation else (known or [None])[0] for record in group]
    seen = Counter((of, record.seed) for of, record in zip(images, group, strict=True))
    twice = {of for (of, _), times in seen.items() if times > 1}
    times: Counter[tuple[Any, ...]] = Counter()
    found: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for of, record in zip(images, group, strict=True):
        machine = [record.environment.get(name) for name in ("cpu", "device")]
        part = of, str(machine) if of in twice else ""
        times[*part, record.seed] += 1
        found[*part, times[*part, record.seed]].append(record)
    return list(found.values())


def _images(record: Record) -> str | None:
    """What tells the images of an evaluation from others."""
    return (record.evaluation or {}).get("annotations_sha256")


def _mean(group: Sequence[Record]) -> Record:
    """The record that stands for the seeds of a row."""
    if len(group) == 1:
        return group[0]
    group = sorted(group, key=lambda record: record.seed)
    done = [record for record in group if record.evaluation]
    first = next(iter(done), group[0])
    sections: dict[str, Any] = {
        name: next(filter(None, (getattr(record, name) for record in group)), None)
        for name in _SECTIONS
    }
    notes = {
        note: [one.seed for one in group if note in one.notes] for r in group for note in r.notes
    }
    said = [
        note if len(seeds) == len(group) else f"seed {', '.join(map(str, seeds))}: {note}"
        for note, seeds in notes.items()
    ]
    return replace(
        first,
        row=_row(first),
        notes=said,
        training=_training([record for record in group if record.training]),
        evaluation=_evaluation(done, group) if done else None,
        **sections,
    )


def _training(records: Sequence[Record]) -> dict[str, Any] | None:
    sections = [dict(record.training or {}) for record in records]
    if not sections:
        return None
    means = {
        name: _average([section.get(name) for section in sections], mean)
        # All seeds see as many images, in the sum of their times.
        for name, mean in (("seconds", fmean), ("images_per_second", harmonic_mean))
    }
    return {**sections[0], **means, "by_seed": sections}


def _evaluation(done: Sequence[Record], group: Sequence[Record]) -> dict[str, Any]:
    sections: list[Mapping[str, Any]] = [record.evaluation or {} for record in done]
    seeds = [record.seed for record in done]
    found = _figures(sections)
    how: dict[str, Any] = {
        "seeds": seeds,
        "failed": [record.seed for record in group if record not in done],
    }
    drawn = [section.get("bootstrap") or {} for section in sections]
    same = len({(one.get("seed"), one.get("resamples")) for one in drawn}) == 1 and all(drawn)
    found["bootstrap"] = {**drawn[0]} if same else None
    for kind in KINDS:
        values = [(section.get(kind) or {}).get("AP") for section in sections]
        known = [value for value in values if value is not None]
        how[f"{kind}_AP"] = values
        how[f"{kind}_sd"] = stdev(known) if len(known) == len(values) > 1 else None
        of_draws = [one.get(f"{kind}_AP") for one in drawn]
        found[f"{kind}_interval"] = None
        if not same or len(known) < len(values) or None in of_draws:
            continue
        drawn_means = draws(np.array(of_draws, dtype=np.float64), seeds)
        numbers = [None if math.isnan(one) else one for one in drawn_means.tolist()]
        found["bootstrap"][f"{kind}_AP"] = numbers
        limits = interval(found[kind]["AP"], numbers)
        known_of = sections[0].get(f"{kind}_interval") or {}
        found[f"{kind}_interval"] = {**known_of, "AP": limits} if limits else None
    for name in SHARES:
        if name in found:
            how[name] = [section.get(name) for section in sections]
            # The interval of one seed is none of the mean.
            found |= {name: _average(how[name]), "top1_interval": None}
    also = [section.get("also") or () for section in sections]
    found["also"] = [_figures(list(parts)) for parts in zip(*also, strict=False)]
    return {**found, "seeds": how}


def _figures(sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first of some sections, with the mean of their figures."""
    found = dict(sections[0])
    for kind in KINDS:
        parts = [section.get(kind) or {} for section in sections]
        means = {name: _average([part.get(name) for part in parts]) for name in parts[0]}
        found[kind] = means if all(parts) else None
    return found


def _average(
    values: Sequence[float | None], mean: Callable[[Sequence[float]], float] = fmean
) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
