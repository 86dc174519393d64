"""What a run is: the settings and files that its weights come from, and what is made of them.

Two runs with the same weights key train the same weights: they share checkpoints, kept weights and
logs. Two with the same record key have the same record. The way that work is split up and reported
belongs to neither, so that a run that was stopped can go on with other workers or devices.

`survey` says of the runs of a suite which have their record, and why the others are run again.
"""

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import record
from bench.config.schema import CLASSIFIER, RunConfig, leaves
from bench.config.sources import OURS, Source, sources_of
from bench.config.suites import build_config
from bench.data import classes, layout
from bench.data.coco import CocoDataset
from bench.data.copies import Seen
from bench.data.fingerprint import files_of, fingerprint, fingerprint_images
from bench.data.split import named_files, open_split
from bench.errors import InputError
from bench.files import sha256
from bench.model.build import library_of
from bench.model.optimizer import effective
from bench.record import Record
from bench.system import processes

# The row's name stands in each file's name, and is compared itself.
_LABELS = ("suite", "row", "model.backbone", "train.schedule")
_INDIFFERENT = ("data.workers", "train.checkpoint_every", "train.log_every")
# What stands for them: the content of the files, and the product of the two numbers.
_PLACES = ("path", "train_file", "val_file", "images")
_REPLACED = (
    *(f"data.{name}" for name in _PLACES),
    *("train.init", "train.devices", "train.accumulate"),
)
# The weights do not depend on them; what is evaluated and measured does.
_AFTER_TRAINING = (
    "model.detector.rpn_proposals_test",
    "model.detector.detections",
    "model.detector.score_threshold",
    "evaluate",
    "profile",
)
_INIT = "the checkpoint of --init"
# Not worth trying again before something changes: the same command would end the same way.
_FINAL_ERRORS = ("error", "diverged", "out_of_memory")
# What is said of a row that is not tried again.
OF_FAILURE = "a record of a failure (--retry-failed runs it again)"
# What `build.initialise` notes.
_INIT_NOTE = re.compile(r"^initialised from .* \(sha256 ([0-9a-f]+)\)")


@dataclass(frozen=True)
class Identity:
    """What one run is.

    Attributes:
        row: name of its row.
        trained: settings that the weights depend on.
        made: settings of evaluation and measurement.
        train_split: the split that is trained on.
        inputs: hashes of the files that the run depends on: `mechanism` (of each file by name),
            `init` and `data` (of each split); for the record. A file that is not there has None.
        sources: the files of its mechanisms.
        data: where its data is, by setting.
    """

    row: str
    trained: Mapping[str, Any]
    made: Mapping[str, Any]
    train_split: str
    inputs: Mapping[str, Any]
    sources: Sequence[Source] = ()
    data: Mapping[str, str | None] = field(default_factory=dict)

    @functools.cached_property
    def weights_key(self) -> str:
        """Hash of all that the weights depend on."""
        return record.key({"trained": self.trained, "inputs": self._of_training(self.inputs)})

    @functools.cached_property
    def key(self) -> str:
        """Hash of all that the record depends on."""
        return record.key({"trained": self.trained, "made": self.made, "inputs": self.inputs})

    @property
    def stem(self) -> str:
        """What checkpoints, weights, logs and lock are called."""
        return f"{record.slug(self.row)}-{self.weights_key[:10]}"

    def _of_training(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        data = {k: v for k, v in (inputs.get("data") or {}).items() if k == self.train_split}
        return {**inputs, "data": data}

    def changed(self, other: Record, *, weights_only: bool = False) -> list[str] | None:
        """Return the files that changed since a record was made, or None for another run's.

        A file that the record knows no hash of counts as unchanged, and so does one that is not
        there now, if the record is of the same place. Records of before hashes were kept are
        compared by what they hold: annotations of the first split evaluated, the checkpoint at the
        start, and when the mechanism's files were changed.

        Args:
            weights_only: compare what the weights depend on alone.
        """
        if other.row != self.row:
            return None
        try:
            theirs = identify(build_config(other.config), inputs={})
        except InputError:
            # Of a version with other settings.
            return None
        trained = {**theirs.trained, "model.library": other.model["library"]}
        if trained != self.trained or not (weights_only or theirs.made == self.made):
            return None
        known = other.environment.get("inputs")
        inputs = _inputs_of_old(other) if known is None else known
        data = self.inputs.get("data") or {}
        apart = _apart(data, inputs.get("data"))
        if theirs.data != self.data:
            apart += [split for split, own in data.items() if own is None]
        if weights_only:
            apart = [split for split in apart if split == self.train_split]
        found = [f"data {split}" for split in apart]
        if _differ(self.inputs.get("init"), inputs.get("init")):
            found.append(_INIT)
        if known is None:
            made = datetime.fromisoformat(other.created).timestamp()
            users = [one for one in self.sources if not one.name.endswith(OURS)]
            return found + [s.name for s in users if s.path.stat().st_mtime > made]
        before, now = inputs.get("mechanism") or {}, self.inputs.get("mechanism") or {}
        if not any(name.endswith(OURS) for name in before):
            # Of a version that did not look at its own files.
            now = {name: value for name, value in now.items() if not name.endswith(OURS)}
        return found + sorted(n for n in {*before, *now} if before.get(n) != now.get(n))


def identify(
    config: RunConfig,
    *,
    inputs: Mapping[str, Any] | None = None,
    seen: dict[tuple[str, ...], Any] | None = None,
) -> Identity:
    """Return what a run is, with the files that it depends on as they are now.

    Args:
        config: of the run.
        inputs: their hashes, where they are known.
        seen: hashes of splits by folder and name, filled here, so that runs share them.
    """
    recipe = effective(config.train, config.model.method)
    whole = replace(config, train=recipe)
    values = {name: operator.attrgetter(name)(whole) for name in leaves()}
    for name in (*_LABELS, *_INDIFFERENT, *_REPLACED):
        del values[name]
    values["parts"] = recipe.devices * recipe.accumulate
    values["device"] = config.device.partition(":")[0]
    # Where it cannot be had, that is the error of the run.
    with suppress(InputError):
        values["model.library"] = library_of(config)[0]
    unused = [] if config.data.path is None else ["data.generated."]
    unused += [] if config.model.dense else ["model.dense"]
    unused += [] if config.model.method == CLASSIFIER else ["classify."]
    values = {k: v for k, v in values.items() if not k.startswith(tuple(unused))}
    made = {k: values.pop(k) for k in list(values) if k.startswith(_AFTER_TRAINING)}
    sources: list[Source] = []
    if inputs is None:
        sources = sources_of(config.model)
        inputs = _inputs(config, sources, {} if seen is None else seen)
    place = {name: getattr(config.data, name) for name in _PLACES}
    return Identity(
        config.row, values, made, config.data.train_split, inputs, tuple(sources), place
    )


def records_of(row: str, folder: Path) -> list[Record]:
    """Return the readable records of a row in a folder of records, the oldest first."""
    found = record.read_all(folder.glob(f"{record.slug(row)}-*.json"))
    return sorted((entry for entry in found if entry.row == row), key=lambda entry: entry.created)


def done(identity: Identity, folder: Path) -> Record | None:
    """Return the newest record of a run that succeeded, or None."""
    return next(
        (
            entry
            for entry in reversed(records_of(identity.row, folder))
            if entry.status == "done" and identity.changed(entry) == []
        ),
        None,
    )


def _inputs(
    config: RunConfig, sources: Sequence[Source], seen: dict[tuple[str, ...], Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if sources:
        found["mechanism"] = {source.name: source.sha256 for source in sources}
    if config.train.init is not None:
        path = Path(config.train.init)
        found["init"] = sha256(path) if path.is_file() else None
    if config.data.path is not None:
        found["data"] = {}
        for split in dict.fromkeys([config.data.train_split, *config.evaluate.splits]):
            file, images = named_files(config.data, split)
            key = config.data.path, split, str(file), str(images)
            if key not in seen:
                with suppress(InputError):
                    if config.model.method == CLASSIFIER:
                        place = classes.find(Path(config.data.path), split)
                        seen[key] = {"pixels": fingerprint_images(place, files_of(place))}
                    else:
                        where = layout.find(Path(config.data.path), split, file=file, images=images)
                        seen[key] = fingerprint(where)
            found["data"][split] = seen.setdefault(key, None)
    return found


def _inputs_of_old(entry: Record) -> dict[str, Any]:
    """What a record without `inputs` says of the files that it was made from."""
    found: dict[str, Any] = {"data": {}}
    evaluation = entry.evaluation or {}
    if (entry.config.get("data") or {}).get("path") is not None:
        for section in (evaluation, *evaluation.get("also", ())):
            if "annotations_sha256" in section:
                found["data"][section["split"]] = {"annotations": section["annotations_sha256"]}
    for note in entry.notes:
        match = _INIT_NOTE.match(note)
        if match is not None:
            found["init"] = match[1]
    return found


def replaced(identity: Identity, config: RunConfig, *, of_training: bool) -> list[str]:
    """Return which files of data, start or mechanism changed since the identity was taken.

    Code is none of them: what was edited is imported already.

    Args:
        of_training: look at what the weights depend on alone.
    """
    before, now = identity.inputs, _inputs(config, (), {})
    apart = _apart(before.get("data"), now.get("data"))
    found = [f"data {name}" for name in apart if not of_training or name == identity.train_split]
    for source in identity.sources:
        is_file = source.path.suffix != ".py" and source.path.is_file()
        found += [source.name] * (is_file and sha256(source.path) != source.sha256)
    return found + [_INIT] * _differ(before.get("init"), now.get("init"))


def _apart(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    """Names under which both hold hashes that differ."""
    one, other = one or {}, other or {}
    found = []
    for name in one:
        ours, theirs = one[name] or {}, other.get(name) or {}
        if any(_differ(ours.get(what), theirs.get(what)) for what in ours):
            found.append(name)
    return found


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two hashes are not the same; of old records there may be the first letters alone."""
    if one is None or other is None:
        return False
    return not one.startswith(other)


@dataclass(frozen=True)
class Standing:
    """A run of a suite, and what there is of it.

    Attributes:
        config: of the run.
        identity: of the run, as its files were when the command began.
        record: its record, of a success or of a failure that the same command would repeat; None
            where it is to be run.
        note: what a person should know of a run that is to be run, or nothing.
    """

    config: RunConfig
    identity: Identity
    record: Record | None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether its record is of a failure that is not tried again."""
        return self.record is not None and self.record.status == "failed"


def survey(runs: Sequence[RunConfig], output: Path, *, retry_failed: bool) -> list[Standing]:
    """Return what there is of each run in the folder `output`.

    Args:
        retry_failed: count no failure as a record.
    """
    seen: dict[tuple[str, ...], Any] = {}
    found = []
    for config in runs:
        identity = identify(config, seen=seen)
        entries = records_of(config.row, output / "records")
        settled = _settled(identity, entries, retry_failed=retry_failed)
        note = "" if settled else _note(identity, entries)
        found.append(Standing(config, identity, settled, note))
    return found


def edited(standings: Sequence[Standing]) -> list[str]:
    """Return the files of mechanisms that changed since a command began, by name."""
    found: set[str] = set()
    for standing in standings:
        found |= _edited(standing.config, standing.identity.inputs)
    return sorted(found)


def edited_since(entry: Record) -> list[str]:
    """Return the files of a record's mechanism that changed since it was made, by name."""
    inputs = entry.environment.get("inputs") or {}
    return sorted(_edited(build_config(entry.config), inputs) if inputs.get("mechanism") else ())


def data_remarks(
    entry: Record, path: Path, split: CocoDataset, root: Path, *, other: bool
) -> list[str]:
    """Say whether a record is of other data of a split's name, or its run trained on the images.

    Args:
        entry: the record.
        path: its file, for the sentences.
        split: what its weights are evaluated on now.
        root: of the data of its run, where its configuration has none.
        other: whether the data was chosen, which is then meant to be other than the record's.
    """
    notes = []
    evaluation: Mapping[str, Any] = entry.evaluation or {}
    told = {
        section.get("split"): section.get("annotations_sha256")
        for section in (evaluation, *evaluation.get("also", ()))
    }
    inputs = (entry.environment.get("inputs") or {}).get("data") or {}
    pixels = None if other else (inputs.get(split.split) or {}).get("pixels")
    now = {"annotations": split.fingerprint}
    now |= {} if pixels is None else fingerprint(split.place) or {}
    before = {"annotations": None if other else told.get(split.split), "pixels": pixels}
    apart = [what for what, one in before.items() if one is not None and now.get(what) != one]
    if apart:
        notes.append(
            f"{split.annotation_file} is not what the run of {path} was evaluated on: its"
            f" {' and '.join(apart)} are others now"
        )
    recorded = build_config(entry.config)
    if recorded.data.path is None and other:
        # Generated images, of which there is no copy.
        return notes
    try:
        data = recorded.data
        trained = open_split(recorded, Path(data.path or root), data.train_split)
    except InputError:
        return notes
    seen = Seen()
    for _ in seen.files(trained, set()):
        pass
    copies = sum(1 for _ in seen.files(split, set()))
    if copies:
        notes.append(
            f"{split.annotation_file}: {copies} of {len(split)} images are files that the run of"
            f" {path} was trained on: AP says little of other images"
        )
    return notes


def _edited(config: RunConfig, inputs: Mapping[str, Any]) -> set[str]:
    before = inputs.get("mechanism") or {}
    sources = sources_of(config.model) if before else []
    now = {source.name: source.sha256 for source in sources}
    return {name for name in before if now.get(name) != before[name]}


def chosen(identities: Sequence[Identity], records: Sequence[Record]) -> list[Record]:
    """Return the newest success of each run, or else its newest failure, in the order given."""
    best: list[Record] = []
    for identity in identities:
        own = [entry for entry in records if identity.changed(entry) == []]
        best += sorted(own, key=lambda entry: (entry.status == "done", entry.created))[-1:]
    return [entry for entry in records if any(entry is one for one in best)]


def _settled(identity: Identity, entries: Sequence[Record], *, retry_failed: bool) -> Record | None:
    # Processes that are started anew, as the row failed in one of them, go on with the next row.
    since = processes.started_first()
    settled: Record | None = None
    for entry in entries:
        if identity.changed(entry) != []:
            continue
        if entry.status == "done":
            return entry
        again = since is not None and entry.created >= since
        final = (entry.error or {}).get("kind") in _FINAL_ERRORS and not retry_failed
        settled = entry if again or final else settled
    return settled


def _note(identity: Identity, entries: Sequence[Record]) -> str:
    """Why a row that has records is run all the same."""
    for entry in reversed(entries):
        changed = identity.changed(entry)
        if changed:
            what = " and ".join(changed)
            return f"{identity.row} is run again: {what} changed since its record was made"
        kept = (entry.training or {}).get("weights")
        if changed is None and kept and identity.changed(entry, weights_only=True) == []:
            return (
                f"{identity.row} was trained with these settings on {entry.created[:10]}: it is"
                " evaluated and measured anew, from the weights that were kept"
            )
    return ""
