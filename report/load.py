"""Records from a folder, and as a data frame with one row a record."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from bench.errors import InputError
from bench.record import (
    FIGURES,
    LATENCIES,
    RECORDS,
    Record,
    newest,
    read,
    read_all,
    read_latencies,
    slug,
)
from report import searches, seeds

RESULTS = Path(__file__).resolve().parent.parent / "results"
KINDS = seeds.KINDS
MODES = ("inference", "training")
PARTIAL = "Partial "
# Text of the same kind whether pyarrow is there or not, which has columns of nothing otherwise.
TEXT = pd.StringDtype("python")

_COMMIT_LETTERS = 10

log = logging.getLogger(__name__)

_QUARTILES = {"": "median", "_q1": "q1", "_q3": "q3"}
# Column: where its value stands in a record.
_TEXT = {
    **{name: name for name in ("row", "key", "status", "created")},
    **{
        name: f"model.{name}"
        for name in ("backbone", "method", "library", "library_version", "attention", "arch")
    },
    "schedule": "model.schedule",
    "pretrain": "model.pretrain",
    "error_kind": "error.kind",
    "flops_convention": "flops.convention",
    "memory_kind": "memory.kind",
    "split": "evaluation.split",
    "device": "environment.device",
    "commit": "environment.commit",
    "precision": "config.train.precision",
    "init": "config.train.init",
    **{f"group_{mode}": f"latency.group.{mode}" for mode in MODES},
    "latency_session": "latency.session",
    "layers_session": "latency.layers.session",
}
_WHOLE = {
    "seed": "seed",
    "parameters": "parameters.total",
    "flops": "flops.total",
    "unsummed": "flops.unsummed",
    "flops_published": "flops.published.total",
    **{f"memory_{mode}": f"memory.{mode}" for mode in MODES},
    **{f"predicted_{mode}": f"memory.predicted.{mode}.total" for mode in MODES},
    "layers_memory": "memory.layers",
    "memory_batch": "memory.batch_size",
    "latency_batch": "latency.batch_size",
    "steps": "training.steps",
    "batch_size": "training.batch_size",
    "images": "evaluation.images",
    "not_finite": "evaluation.not_finite",
}
_REAL = {
    "drop_path": "model.drop_path",
    **{f"latency{part}": f"latency.inference.{name}" for part, name in _QUARTILES.items()},
    **{f"latency_training{part}": f"latency.training.{name}" for part, name in _QUARTILES.items()},
    **{f"layers{part}": f"latency.layers.{name}" for part, name in _QUARTILES.items()},
    "train_seconds": "training.seconds",
    "images_per_second": "training.images_per_second",
    **{f"{kind}_{figure}": f"evaluation.{kind}.{figure}" for kind in KINDS for figure in FIGURES},
    **{f"{kind}_sd": f"evaluation.seeds.{kind}_sd" for kind in KINDS},
    **{figure: f"evaluation.{figure}" for figure in seeds.SHARES},
}
_LIMITS = tuple(f"{kind}_{end}" for kind in KINDS for end in ("low", "high"))
# What rows have to share for a number of theirs to be compared.
_CONDITIONS = ("device", "batch_size", "image_size", "precision", "rois.targets")
_PLACE = ("environment.cpu", "environment.device", "environment.allocator")
_COMPARED = {
    "flops_as": [f"flops.{name}" for name in ("convention", "image_size", "proposals")],
    "memory_as": [f"memory.{name}" for name in (*_CONDITIONS, "kind")],
    "latency_as": [*(f"latency.{name}" for name in (*_CONDITIONS, "threads")), *_PLACE],
    "evaluated_as": [f"evaluation.{name}" for name in ("split", "images", "annotations_sha256")],
}
# A share of a count below which what it leaves out is not said.
_FEW = 0.01
_SIZED = ("flops", "memory", "latency")
_DERIVED = (
    *(f"{name}_size" for name in _SIZED),
    "base",
    "family",
    "seeds",
    "notes",
    "flops_uncounted",
    "flops_unsummed",
    "code",
    *_COMPARED,
)


@dataclass(frozen=True)
class Named:
    """A table or a plot.

    Attributes:
        name: for file names.
        title: heading.
    """

    name: str
    title: str


@dataclass(frozen=True)
class Library:
    """The records of one detector library on the same images, one a row, and their frame."""

    records: list[Record]
    data: pd.DataFrame


Exhibit = TypeVar("Exhibit", bound=Named)


def per_library(
    build: Callable[[Library], Exhibit | None],
) -> Callable[[Sequence[Record]], list[Exhibit]]:
    """Make a function of one library's rows one of all records: a table or plot for each library.

    The seeds of a row are merged, see `report/seeds.py`.
    Two libraries never share a column or an axis, and neither do rows that were evaluated on other
    images; the names of both are in those of the results. A row that was not evaluated, or that
    does not say on which annotations, stands with most others.
    """

    @functools.wraps(build)
    def every(records: Sequence[Record]) -> list[Exhibit]:
        return on_same_images(build, seeds.merged(records))

    return every


def on_same_images(
    build: Callable[[Library], Exhibit | None], records: Sequence[Record]
) -> list[Exhibit]:
    """Return a table or plot for each library and set of images, as `per_library` names them."""
    data = frame(records)
    images = pd.Series(map(_images, records), dtype=object)
    usual = images.groupby(data["library"]).transform(lambda own: next(iter(own.mode()), ""))
    images = images.fillna(usual)
    apart = list(zip(data["library"], images, strict=True))
    libraries = {library for library, _ in apart}
    found = []
    for group in dict.fromkeys(apart):
        chosen = [one == group for one in apart]
        own = [record for record, keep in zip(records, chosen, strict=True) if keep]
        one = build(Library(own, data[chosen].reset_index(drop=True)))
        names = [str(group[0])] * (len(libraries) > 1)
        names += [str(group[1])] * (len(set(apart)) > len(libraries))
        if one is not None and names:
            stem = "-".join([one.name, *map(slug, names)])
            one = replace(one, name=stem, title=", ".join([one.title, *names]))
        if one is not None:
            found.append(one)
    return found


def _images(record: Record) -> str | None:
    """What a row was evaluated on, for headings."""
    split, count, annotations = (
        at(record, f"evaluation.{name}") for name in ("split", "images", "annotations_sha256")
    )
    if annotations is None:
        return None
    # Folders of classes have no annotations but their images.
    hashes = ", ".join(dict.fromkeys(one[:8] for one in str(annotations).split()))
    return f"{split} of {count} images ({hashes})"


def load_one(path: Path) -> Record:
    """Read one record, with the latency that was measured for it beside `records/`.

    Raises:
        InputError: naming the file, if it cannot be read or holds no record.
    """
    (record,) = _timed([read(path)], path.resolve().parent.parent)
    return record


def load(directory: Path, *, needed: bool = False) -> list[Record]:
    """Read the records in `directory/records`, or in `directory` itself if it has no such folder.

    Of the records of one run (same row and configuration) the newest success is returned, or,
    without one, the newest failure. A file that is not a record is left out with a warning. Where
    rows were timed together (`latency/` beside `records/`), that is their latency. The rows come in
    the order of the published ablation, the others after it by name, each mechanism before its
    partial form, so that the order does not depend on which run ended first.

    Raises:
        InputError: with the reason of the first, if it is `needed` and none of them can be read.
    """
    folder = directory / "records" if (directory / "records").is_dir() else directory
    return ordered(_timed(load_newest(folder, needed=needed), folder.parent))


def load_all(
    folders: Sequence[Path], *, sweep_alone: bool = False
) -> tuple[list[Path], list[Record]]:
    """Return output folders, each named itself or by its `records`, and the records of their runs.

    Args:
        folders: as they were named.
        sweep_alone: take points of a sweep from one folder that has no others.

    Raises:
        InputError: for what is no folder, and for points of a sweep, which are not rows.
    """
    outputs, found = [], []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name the output folder of a run")
        inner = folder.resolve().name == RECORDS and not (folder / RECORDS).is_dir()
        outputs.append(folder.resolve().parent if inner else folder)
        found += load(outputs[-1], needed=True)
        points = sum("sweep" in one.config for one in found)
        if points and not (sweep_alone and len(folders) == 1 and points == len(found)):
            raise InputError(
                f"{folder} has points of a sweep, which `report` takes from one folder alone"
            )
    return outputs, ordered(found)


def load_newest(folder: Path, *, needed: bool = False) -> list[Record]:
    """Return the newest success of each run in a folder, or else its newest failure."""
    errors: list[InputError] = []
    every = list(read_all(folder.glob("*.json"), errors.append))
    found = newest(every)
    if needed and errors and not found:
        raise errors[0]
    for error in errors:
        log.warning("left out of the report: %s", error)
    for one in every:
        if one.status == "done" and one not in found:
            log.warning(
                "left out of the report: %s of %s, as there is a newer record of the same run",
                *(one.row, one.created),
            )
    return found


def _timed(records: Iterable[Record], output: Path) -> list[Record]:
    """Records with the latency that was measured for all rows of an output folder together."""
    timed = read_latencies(output / LATENCIES)
    records = map(_known_by_pixels, records)
    return [replace(one, latency=timed.get((one.row, one.key), one.latency)) for one in records]


def _known_by_pixels(record: Record) -> Record:
    """A record whose images are told from others by their pixels too, where it knows them."""
    evaluation = record.evaluation or {}
    pixels = inputs_of(record, evaluation.get("split")).get("pixels")
    if pixels is None or not evaluation.get("annotations_sha256"):
        return record
    both = f"{evaluation['annotations_sha256']} {pixels}"
    return replace(record, evaluation={**evaluation, "annotations_sha256": both})


def inputs_of(record: Record, split: str | None) -> Mapping[str, Any]:
    """Return the hashes of a split that a record knows, by "annotations" and "pixels"."""
    inputs = record.environment.get("inputs") or {}
    found: Mapping[str, Any] = (inputs.get("data") or {}).get(split) or {}
    return found


def trained_apart(records: Sequence[Record]) -> list[str]:
    """Return what to say of rows whose training data differ, as far as they know it; or nothing."""
    trained = [inputs_of(one, at(one, "config.data.train_split")) for one in records]
    differ = len({str(sorted(one.items())) for one in trained if one}) > 1
    return ["the rows with the same training data, which differs (Environment says whose)"] * differ


def ordered(records: Iterable[Record]) -> list[Record]:
    """Return `records` in the order of the tables, see `load`; copies of one count once."""
    known = published()["row"].tolist()
    place = {row: number for number, row in enumerate(known)}

    def position(record: Record) -> tuple[Any, ...]:
        row = searches.base(record)
        name = row.removeprefix(PARTIAL)
        return (
            place.get(row, len(place)),
            name.lower(),
            row.startswith(PARTIAL),
            record.row,
            record.suite,
            record.seed,
            record.key,
        )

    once: list[Record] = []
    for record in sorted(records, key=position):
        if record not in once[-1:]:
            once.append(record)
    return once


def published() -> pd.DataFrame:
    """Return the published rows, `results/published.csv`."""
    return pd.read_csv(RESULTS / "published.csv")


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row a record, in the order given, with the units of the records.

    Parameters and FLOPs (multiply-adds) are counts, memory is in bytes, times are in seconds,
    average precision in percent. What a record lacks is missing. `base` is the row's name without
    the value of a search; `label` is the whole, with the seed, the first letters of the key or the
    time where several records have that name. `seeds` are those that a row is the mean of, `box_sd`
    is the standard deviation over them, `box_low` and `box_high` are the ends of the interval.
    `family` is the mechanism of the first stage, by which plots choose colours. `best` marks the
    best of a
    search. `flops_uncounted` names the operators that FLOPs lack. `*_size` are the images that
    costs are of, `latency_rate` is images a second. `*_as` say how a number was made: rows
    are compared where they are the same, in time where `*_session` is the same too. `code` is the
    commit of the package, see `code`.
    """
    paths = _TEXT | _WHOLE | _REAL
    lines: list[dict[str, Any]] = [
        {name: at(record, path) for name, path in paths.items()}
        | _derived(record)
        | _limits(record)
        for record in records
    ]
    types = (
        dict.fromkeys((*_TEXT, *_DERIVED), TEXT)
        | dict.fromkeys(_WHOLE, "Int64")
        | dict.fromkeys((*_REAL, *_LIMITS), "Float64")
    )
    data = pd.DataFrame(lines, columns=list(types)).astype(types)
    for latency in ("latency", "latency_training"):
        data[f"{latency}_iqr"] = data[f"{latency}_q3"] - data[f"{latency}_q1"]
    samples = [at(record, "latency.inference.samples") for record in records]
    for percent in (90, 95):
        found = [np.quantile(times, percent / 100) if times else None for times in samples]
        data[f"latency_p{percent}"] = pd.Series(found, dtype="Float64")
    data["latency_rate"] = data["latency_batch"] / data["latency"]
    data["steps_per_second"] = data["steps"] / data["train_seconds"].replace(0, pd.NA)
    data["best"] = pd.Series(_best(records), dtype="boolean")
    data["label"] = data["row"]
    own, key = (data[name].astype(TEXT) for name in ("seed", "key"))
    kinds = pd.Series(map(seeds.alike, records), index=data.index, dtype=TEXT)
    # A seed is no name of rows that differ in something else too.
    others = kinds.groupby(data["row"]).transform("nunique") > 1
    for more in (
        (" (seed " + own + ")").mask(others, " #" + key.str[:6]),
        " #" + key.str[:6],
        " of " + data["created"].str[:19],
    ):
        differ = more.groupby(data["label"]).transform("nunique") > 1
        data["label"] = data["label"].mask(differ, data["label"] + more)
    return data


def labels(records: Sequence[Record]) -> list[str]:
    """Return the names that tell `records` apart; see `frame`."""
    return [str(label) for label in frame(records)["label"]]


def timed_apart(data: pd.DataFrame, time: str = "latency") -> pd.Series:
    """Whether each row of a frame has times of another session than most evaluated rows have.

    Args:
        data: of `frame`.
        time: "latency" or "layers".
    """
    sessions = data[f"{time}_session"].fillna("").where(data[time].notna())
    evaluated = sessions[data["box_AP"].notna()].dropna()
    usual = (evaluated if len(evaluated) else sessions).mode()
    return (sessions.notna() & ~sessions.isin(usual.head(1))).astype(bool)


def apart_note(data: pd.DataFrame, time: str = "latency") -> list[str]:
    """Return a sentence that names the rows of `timed_apart`, or nothing."""
    rows = ", ".join(data["label"][timed_apart(data, time)])
    return [f"Times of another session than most rows', not to be compared: {rows}."] * bool(rows)


def code_note(data: pd.DataFrame) -> list[str]:
    """Return a sentence that names measured rows of another commit than most, or nothing."""
    measured = data[["box_AP", *(f"memory_{mode}" for mode in MODES)]].notna().any(axis=1)
    codes = data["code"][measured].dropna()
    rows = ", ".join(data.loc[codes.index[~codes.isin(codes.mode().head(1))], "label"])
    return [
        "Made with another commit of this package than most rows, which may be why memory or mAP"
        f" differs: {rows}."
    ] * bool(rows)


def finite_note(data: pd.DataFrame) -> list[str]:
    """Return a sentence that names rows that gave values that are not finite, or nothing."""
    some = data[(data["not_finite"] > 0).fillna(False)]
    columns = some[["label", "not_finite", "images"]].itertuples(index=False)
    rows = ", ".join(f"{row} ({count:g} of {images} images)" for row, count, images in columns)
    return [f"Gave values that are not finite, which are no detections: {rows}."] * bool(rows)


def code(record: Record) -> str | None:
    """Return the commit of the package that a record was made with, where it is known.

    Code that differed from its commit is said to.
    """
    commit = at(record, "environment.commit")
    changed = " with changes" if at(record, "environment.dirty") else ""
    return None if commit is None else f"{commit[:_COMMIT_LETTERS]}{changed}"


def at(record: Record, path: str) -> Any:
    """Return the value at a dotted path of a record, None where there is none."""
    value: Any = vars(record)
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def size(pair: Any) -> str | None:
    """Return an image size (height, width) as a person would write it."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, pair)) if pair else None


def family(record: Record) -> str:
    """Return the mechanism of the first stage."""
    return str(record.model["attention"]).split("/")[0].strip()


def uncounted(record: Record) -> str | None:
    """Return the operators that a record's FLOPs lack, with their calls; None if they lack none."""
    return calls(at(record, "flops.uncounted") or {})


def unsummed(flops: Mapping[str, Any] | None) -> str | None:
    """Return how many products of elements are in no sum that a count holds, if they may matter.

    That is from a hundredth of the count on; the gradients of as many are about twice as many.
    """
    found = flops or {}
    count, total = found.get("unsummed") or 0, found.get("total") or 0
    times = 3 if found.get("mode") == "training" else 1
    if not count or times * count < _FEW * total:
        return None
    return f"{count:,}" + (f" ({count / total:.1%})" if total else "")


def calls(of: Mapping[str, int]) -> str | None:
    """Return names with how often they were called; None without any."""
    return ", ".join(f"{name} ({count})" for name, count in of.items()) or None


def _derived(record: Record) -> dict[str, Any]:
    return {
        "base": searches.base(record),
        "family": family(record),
        "seeds": seeds.listed(record),
        "notes": "; ".join(record.notes) or None,
        "flops_uncounted": uncounted(record),
        "flops_unsummed": unsummed(record.flops),
        "code": code(record),
        **{f"{name}_size": size(at(record, f"{name}.image_size")) for name in _SIZED},
        **{
            name: ", ".join(f"{path} {at(record, path)}" for path in paths)
            for name, paths in _COMPARED.items()
        },
    }


def _limits(record: Record) -> dict[str, float | None]:
    """The ends of the intervals of mAP; none of one image, all of whose draws are alike."""
    known = at(record, "evaluation.images") != 1
    ends = [
        (known and at(record, f"evaluation.{kind}_interval.AP")) or (None, None) for kind in KINDS
    ]
    return dict(zip(_LIMITS, (end for pair in ends for end in pair), strict=True))


def _best(records: Sequence[Record]) -> list[bool | None]:
    """Whether each record is the best of its search, None for those that are of none."""
    marks: dict[int, bool] = {}
    for search in searches.find(records):
        best = search.best
        for _, record in search.tried:
            marks[id(record)] = best is not None and best[1] is record
    return [marks.get(id(record)) for record in records]
