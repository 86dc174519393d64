"""What a reader would decide: three sentences and one table, from the records alone."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from bench.record import FEW_IMAGES, Record
from report import confidence, reference, seeds, tables
from report.columns import (
    MISSING,
    Column,
    Table,
    Unit,
    decimals,
    number,
    of_flops,
    reason,
    table,
    three_digits,
)
from report.load import (
    Library,
    Named,
    apart_note,
    at,
    code_note,
    finite_note,
    per_library,
    timed_apart,
    trained_apart,
)
from report.probes import Profile
from report.provenance import listed
from report.reference import Conditions
from report.tables import marked, memory_column

# More names than these are counted, not listed.
_MOST_NAMES = 6
# Measured memory closer than this, as a share, decides nothing.
_ALIKE = 0.005


@dataclass(frozen=True)
class Answer(Named):
    """The first screen of a page.

    Attributes:
        sentences: which rows are best at which cost, what cannot be told apart, and what was not
            measured.
        table: one line a row.
    """

    sentences: tuple[str, ...]
    table: Table


def first(
    records: Sequence[Record], costs: Sequence[Record], sees: Profile | None = None
) -> list[Answer]:
    """Return the answer of each library.

    Args:
        records: of runs.
        costs: of their rows at full size; without any, what they cost as they were trained.
        sees: what each row sees, of `report.probes.profile`.
    """
    about = reference.conditions(costs)
    build = per_library(partial(_answer, about=about, sees=sees))
    found = build(reference.at_reference(records, costs) if about else records)
    return [replace(one, table=replace(one.table, name=one.name)) for one in found]


def to_text(answer: Answer, width: int = tables.WIDTH) -> str:
    """Return the answer for a terminal of `width` columns."""
    said = (textwrap.fill(sentence, width) for sentence in answer.sentences)
    return "\n".join([*said, "", tables.to_text(answer.table.shown, width)])


def _answer(library: Library, about: Conditions | None, sees: Profile | None) -> Answer:
    standing = Standing(library, about)
    sentences = (
        standing.best(sees),
        standing.alike(sees),
        standing.unknown(probed=sees is not None),
    )
    return Answer("answer", "Answer", sentences, rows(standing, sees))


class Standing:
    """Where the rows of a library stand against each other.

    Args:
        library: the rows, with their costs at full size where they are known.
        about: what these costs are of; None for those of the rows' own profile.
        mode: "inference" or "training", for memory; None for training where that is known.

    Attributes:
        data: one line a row, with `rank`, and `half`, half of the interval of box mAP.
        memory, mode: the column of memory, and of what.
        leader: the place of the row with the highest box mAP among those that were evaluated alike,
            or None.
        ties: places of the rows that cannot be told apart from it, itself among them.
    """

    def __init__(self, library: Library, about: Conditions | None, mode: str | None = None) -> None:
        self.library, self.about = library, about
        self.pairs = confidence.apart(library)
        data = library.data
        half = (data["box_high"] - data["box_low"]) / 2
        ranks = pd.Series(confidence.ranks(library), dtype="Int64")
        self.data = data.assign(half=half, rank=ranks)
        self.memory, self.mode = (f"memory_{mode}", mode) if mode else memory_column(data)
        known = data["box_AP"][ranks.notna()] if ranks.notna().any() else data["box_AP"]
        values = known.to_numpy(dtype=float, na_value=-np.inf)
        place = known.index[int(values.argmax())] if known.notna().any() else None
        self.leader: int | None = place
        self.ties = [] if self.leader is None else self._alike(self.leader)

    @property
    def at_size(self) -> str:
        """Where the costs are of, for sentences."""
        return f" at {self.about.image_size}" if self.about else f" at {self.sizes}"

    @property
    def sizes(self) -> str:
        """The images that the rows' own costs are of."""
        return " or ".join(self.data["flops_size"].dropna().unique()) or "unknown sizes"

    def _alike(self, row: int) -> list[int]:
        same = [place for place in range(len(self.data)) if self.pairs[row, place] == 0]
        return sorted({row, *same})

    def name(self, place: int) -> str:
        """The label of a row."""
        return str(self.data["label"][place])

    def accuracy(self, place: int) -> str:
        """Box mAP of a row and half of its interval."""
        value, half = self.data["box_AP"][place], self.data["half"][place]
        spread = "" if pd.isna(half) else f" ± {number(1)(half)}"
        return f"{number(1)(value)}{spread} %"

    def best(self, sees: Profile | None = None) -> str:
        """Which rows are best at which cost, by mAP and by what the probes say they see."""
        if self.leader is None:
            cheapest = self.cheapest(range(len(self.data)))
            return f"No row was evaluated, so none is best; {cheapest}."
        leader = self.name(self.leader)
        said = f"{leader} has the highest box mAP, {self.accuracy(self.leader)}"
        others = len(self.ties) - 1
        if not others:
            # Of one row there is no cheapest.
            return f"{said}; of all rows, {self.cheapest(range(len(self.data)))}."
        rows = "row" if others == 1 else f"{others} rows"
        among = f"of it and the {rows} that cannot be told apart from it"
        probes = "" if sees is None else self._by_probes(sees)
        return f"{said}, which may be chance; {among}, {self.cheapest(self.ties)}{probes}."

    def _by_probes(self, sees: Profile) -> str:
        """Which of the rows that mAP does not tell apart the probes do, the cheapest first."""
        means = sees.scores.mean(axis="columns", skipna=False)
        data = self.data.loc[self.ties]
        data = data.assign(mean=data["base"].map(means).astype("Float64"))
        data = data[data["flops_uncounted"].isna()].dropna(subset=["mean", "flops"])
        found: list[tuple[str, float]] = []
        words = []
        for row in data.sort_values(["flops", "mean"], ascending=[True, False]).to_dict("records"):
            if found:
                name, best = found[-1]
                if row["mean"] <= best or frozenset((row["base"], name)) not in sees.apart:
                    continue
            found.append((row["base"], row["mean"]))
            flops = three_digits(row["flops"] / Unit.GIGA.size)
            words.append(f"{row['label']} ({number(2)(row['mean'])} at {flops} G)")
        if len(words) < 2:
            return ""
        return f"; the best of them for their FLOPs by the mean over probes are {in_words(words)}"

    def cheapest(self, places: Iterable[int]) -> str:
        """Which of some rows cost least, in words."""
        chosen = self.data.loc[list(places)]
        # What cannot be trained is no choice, where anything else is.
        trained = chosen[chosen["status"] != "failed"]
        chosen = trained if len(trained) else chosen
        full = chosen["flops"].mask(chosen["flops_uncounted"].notna())
        predicted = ", predicted" if self.about else ""
        most = ""
        needs = chosen[self.memory].dropna()
        if self.about and len(needs) and self.data[self.memory].max() > needs.min():
            largest = self.data[self.memory].max() / Unit.GB.size
            most = f"; the most of any row is {number(2)(largest)} GB"
        time = "layers" if self.about else "latency"
        sessions = chosen.loc[chosen[time].notna(), f"{time}_session"].nunique()
        times = chosen[chosen[time].notna()][: len(chosen) * (sessions < 2)].sort_values(time)
        apart = chosen.index[timed_apart(self.data, time)[chosen.index]]
        memory = chosen[self.memory]
        alike = reference.ALIKE if self.about else _ALIKE
        # Of each cost: what it is, each row's, the least that a row may have, and the most that the
        # cheapest row may have.
        least = [
            ("FLOPs", full, full, full.min(), f"{self.at_size} ({{}} G)", Unit.GIGA),
            (
                *(f"memory for {self.mode}", memory, memory, (1 + alike) * memory.min()),
                *(f" ({{}} GB{predicted}{most})", Unit.GB),
            ),
            (
                "time in attention layers" if self.about else "time for inference",
                *(times[time], times[f"{time}_q1"], times[f"{time}_q3"][:1].max()),
                *(" ({} ms, median)", Unit.MS),
            ),
        ]
        found, before = [], ""
        for what, values, lowest, most_of_least, where, unit in least:
            known = values.dropna()
            if not len(known):
                continue
            few = known.index[lowest[known.index] <= most_of_least]
            # A row whose times spread reaches lower than a quicker one whose times do not.
            few = known.index[known <= known[few].max()]
            digits = number(2) if unit is Unit.GB else three_digits
            low, high = (digits(end / unit.size) for end in (known.min(), known[few].max()))
            if unit is not Unit.GIGA and 1 < len(few) == len(known):
                of = f" {unit.symbol}{predicted * (unit is Unit.GB)}"
                found.append(f"{what} does not decide ({low} to {high}{of})")
                before = ""
                continue
            who = f"{self.named(sorted(few))} need{'s' * (len(few) == 1)}"
            said = f"the {'fewest' if unit is Unit.GIGA else 'least'} {what}"
            said += where.format(low if low == high else f"{low} to {high}")
            if unit is not Unit.MS and len(left := self._left_out(chosen, values)):
                said = f"{said.removesuffix(')')}; not known of {self.named(sorted(left))})"
            found.append(said if who == before else f"{who} {said}")
            before = who
        if sessions > 1:
            found.append(
                f"time does not decide, as it was taken in {sessions} sessions"
                f" ({self.named(apart)} in another than most rows)"
            )
        return in_words(found) or "what rows cost is not known"

    @staticmethod
    def _left_out(chosen: pd.DataFrame, values: pd.Series) -> pd.Index:
        """Places of the rows that could cost less than all whose costs are known."""
        above = chosen["flops"] > values.min() if values.name == "flops" else values > values.min()
        return values.index[values.isna() & ~above.fillna(False)]

    def alike(self, sees: Profile | None = None) -> str:
        """What cannot be told apart."""
        compared = ~np.isnan(self.pairs)
        pairs = int(np.triu(compared, 1).sum())
        if self.leader is None or not pairs:
            return "Which rows could be told apart is not known: no two have draws of images."
        differ = compared & (self.pairs != 0)
        apart = int(np.triu(differ, 1).sum())
        worse = np.flatnonzero(self.pairs[self.leader] == 1)
        others = [place for place in self.ties if place != self.leader]
        parts = []
        if others:
            parts.append(f"not told apart from {self.name(self.leader)}: {self.named(others)}")
        if len(worse):
            parts.append(f"told apart as worse: {self.named(worse)}")
        said = "; ".join(parts)
        count = f"in all, {apart} of {pairs} pairs of rows are told apart by mAP"
        if sees is not None:
            names = self.data["base"]
            seen = [[frozenset((one, other)) in sees.apart for other in names] for one in names]
            either = int(np.triu(compared & (differ | np.array(seen)), 1).sum())
            count += f", {either} by mAP or a probe" + " (of one seed)" * (sees.seeds == 1)
        evaluated = self.data["images"].dropna()
        if evaluated.min() < FEW_IMAGES:
            count += f"; of {evaluated.min()} images, mAP says little"
        return f"{said[:1].upper()}{said[1:]}; {count}."

    def unknown(self, *, probed: bool) -> str:
        """What was not measured here."""
        records = self.library.records
        found = []
        if self.about is None:
            found.append("costs at the size of large images (--costs counted)")
        elif self.data["layers"].isna().all():
            found.append(
                f"latency{self.at_size} (--costs measured times the attention layers), nor anything"
                " else on a GPU of that size"
            )
        else:
            found.append(f"latency of whole models{self.at_size}")
        done = [one for one in records if one.evaluation]
        if done and all(at(one, "config.data.path") is None for one in done):
            images, steps = (
                listed(at(one, path) for one in done)
                for path in ("evaluation.images", "training.steps")
            )
            found.append(
                f"accuracy on photographs (mAP is of {images} generated images after {steps} steps)"
            )
        found += trained_apart(done)
        once = [n for n, one in enumerate(records) if one.evaluation and not seeds.of(one)]
        if once:
            of = f" of {self.named(once)}" * (len(once) < len(done))
            found.append(f"what another seed changes{of} (--seeds 3)")
        if not probed:
            found.append("what each row can see (--suite probes)")
        for place, one in enumerate(records):
            if one.error is not None:
                found.append(f"{self.name(place)} ({reason(str(one.error['kind']))})")
        return f"Not measured here: {'; '.join(found) or 'nothing that this page shows'}."

    def named(self, places: Iterable[int]) -> str:
        """The labels of rows, in words."""
        names = [self.name(place) for place in places]
        more = len(names) - _MOST_NAMES
        return in_words([*names[:_MOST_NAMES], f"{more} more"] if more > 1 else names)


def in_words(words: Sequence[str]) -> str:
    """Return words with commas, and an "and" before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def rows(standing: Standing, sees: Profile | None = None) -> Table:
    """Return the table of rows, the best first."""
    about, mode = standing.about, standing.mode
    shown = standing.data.sort_values(["rank", "flops"], kind="stable")
    columns = [Column("row", values="label"), Column("", "row", marked)]
    scores = pd.DataFrame() if sees is None else sees.scores
    for probe in scores.columns:
        shown[probe] = shown["base"].map(scores[probe]).astype("Float64")
        columns.append(Column(probe, probe, unit=Unit.ONE, format=decimals(2), optional=True))
    predicted = ", predicted" if about else ""
    columns += [
        Column("box_map_percent", values="box_AP"),
        Column("box_map_half_interval_percent", values="half"),
        Column("", "box mAP %", _accuracies),
        Column("rank", "rank", unit=Unit.ONE, format=decimals(0), optional=True),
        *of_flops(),
        Column(f"memory_{mode}_bytes", f"{mode} memory {{}}{predicted}", standing.memory, Unit.GB),
    ]
    if about is None:
        columns.append(Column("latency_median_s", "latency {}", "latency", Unit.MS))
        costs = f"FLOPs, memory and latency are of images of {standing.sizes}."
    else:
        columns.append(
            Column("layers_median_s", "attention layers {}", "layers", Unit.MS, optional=True)
        )
        costs = f"Costs are of {about.sentence}."
        if shown["layers"].notna().any():
            costs += f" {about.layers}"
        if shown[["flops", standing.memory]].isna().any(axis=None):
            costs += f" The table of costs says why there is {MISSING}."
    notes = [
        costs,
        "± is half of the 95 % interval; a rank is one more than the number of rows that are told"
        " apart as better.",
        *apart_note(shown, "layers" if about else "latency"),
        *finite_note(shown),
        *code_note(shown),
        *([sees.about] if sees is not None and sees.about else []),
    ]
    return table("answer", "Answer", shown, columns, notes)


def _accuracies(data: pd.DataFrame) -> Iterable[str | None]:
    for value, half in data[["box_AP", "half"]].itertuples(index=False):
        spread = "" if pd.isna(half) else f" ± {number(1)(half)}"
        yield None if pd.isna(value) else f"{number(1)(value)}{spread}"
