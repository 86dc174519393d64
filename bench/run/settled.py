"""Which rows of a suite have their record, and why the others are run, or run again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config.schema import RunConfig
from bench.record import Record
from bench.run.identity import Identity, identify, records_of
from bench.system import processes

# Not worth trying again before something changes: the same command would end the same way.
_FINAL_ERRORS = ("error", "diverged", "out_of_memory")


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
