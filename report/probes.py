"""The report of probes: what each mechanism and row can do on small tasks, and what is told apart.

Accuracies are recorded as counts of cells, by seed, level and image. The score of a task is the
mean of its levels; two mechanisms are compared on the same seeds and images.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.record import PROBES, Record
from report import load as records_of
from report.columns import Column, Table, Unit, decimals, letters_of, number, table
from report.load import PARTIAL, published
from report.plots import COLOURS, WIDTH, Plot, render

log = logging.getLogger(__name__)

KINDS = {"mechanism": "mechanisms", "row": "rows"}
LEVEL = 0.05
# The one rule that the probes are compared with.
_RULE = "Partial or ViL"
_PERMUTATIONS = 20_000
_LEAST_ROWS = 5
_MARKS = ("o", "s", "^", "D")
_LINES = ("-", "--", ":", "-.")

_CAUTION = (
    "A probe is a profile of a mechanism on a grid of 16x16 cells, learnt in seconds. It does not"
    " predict COCO: see the rank agreement. A low score says that a mechanism did not learn the"
    " task in this time, not that it cannot."
)
_ABOUT_LETTERS = (
    "Mean over levels{spread}. Within a probe, {kind}"
    " that share a letter cannot be told apart (two-sided t tests of all pairs, family-wise error"
    f" {LEVEL:.0%} by Holm's correction). The error of a difference has two parts: the variance"
    " over seeds, for each of the two its own or the mean of all {kind} where that is larger, and"
    " the variance over the {images} evaluation images, on which both were evaluated. Degrees of"
    " freedom are Satterthwaite's, of each difference. {seeds}"
)
_ONE_SEED = (
    "With one seed the variance over seeds is unknown and left out, so too many are told apart."
)

Scores = dict[str, NDArray[np.float64]]
"""By name: accuracy of each seed, level and image, (seeds, levels, images)."""


def load(folder: Path, asked: Sequence[Record] = ()) -> list[Record]:
    """Return the records of probes in an output folder; mechanisms first, as they were planned.

    Of a subject whose files, tasks or recipe changed in between, it is the newest.

    Args:
        folder: the output folder.
        asked: records that are there and stand for their subjects, also where newer ones are.
    """
    every = [one for one in records_of.load(folder / PROBES) if "kind" in one.config]
    chosen = {_subject(one): one for one in sorted(every, key=lambda one: one.created)}
    chosen |= {_subject(one): one for one in asked if one.error is None}
    for one in every:
        if one.error is None and one.key != (other := chosen[_subject(one)]).key:
            log.warning(
                "left out of the report: the probes of %s of %s, as those of %s stand for it",
                *(one.row, one.created, other.created),
            )
    found = list(chosen.values())
    place = {row: number for number, row in enumerate(published()["row"])}
    return sorted(
        found,
        key=lambda one: (
            one.config["kind"] != "mechanism",
            place.get(one.row, len(place)),
            one.row,
        ),
    )


def _subject(record: Record) -> tuple[str, str]:
    """What was probed, whatever files it was made of, and however."""
    return record.row, record.config["kind"]


def blocks(records: Sequence[Record]) -> list[str | Table | Plot]:
    """Return what a page says of probes; nothing without records."""
    done = [one for one in records if one.probes]
    if not done:
        return []
    tasks = {name: task for one in done for name, task in _tasks(one).items()}
    asked = [f"{name} ({task['asks']}): {task['about']}" for name, task in tasks.items()]
    failed = [
        f"{one.row} ({one.config['kind']}) failed: {(one.error or {}).get('message')}"
        for one in records
        if one.error
    ]
    return [_CAUTION, *asked, *tables(records), *plots(records), *failed]


def tables(records: Sequence[Record]) -> list[Table]:
    """Return the scores of mechanisms and of rows, and the agreement of these with mAP."""
    found = [_table(kind, of) for kind, of in _by_kind(records)]
    return [*found, *agreement(records)]


def plots(records: Sequence[Record]) -> list[Plot]:
    """Return a heat map and the curves over levels, of mechanisms and of rows."""
    return [
        plot
        for kind, of in _by_kind(records)
        for plot in (
            render(
                f"probes_{kind}",
                f"Accuracy of {KINDS[kind]} in each probe",
                partial(heat_map, of),
            ),
            render(
                f"probe_levels_{kind}",
                f"Accuracy of {KINDS[kind]} over the levels of each probe",
                partial(curves, of),
            ),
        )
    ]


@dataclass(frozen=True)
class Profile:
    """What rows see.

    Attributes:
        scores: from 0 to 1, a line a row and a column a probe.
        apart: the pairs of rows that at least one probe tells apart.
        seeds: of each training, the fewest that a row has.
        about: what each probe asks and the accuracy of chance, in a sentence; or nothing.
    """

    scores: pd.DataFrame
    apart: frozenset[frozenset[str]]
    seeds: int
    about: str = ""


def profile(records: Sequence[Record]) -> Profile | None:
    """Return what the rows among the records see, or None where none was probed."""
    rows = dict(_by_kind(records)).get("row", [])
    if not rows:
        return None
    scores = {one.row: _scores_of(one) for one in rows}
    means = {row: {task: one.mean() for task, one in of.items()} for row, of in scores.items()}
    apart = [pair for own in _comparable(scores).values() for pair in _differences(own)]
    tasks = {name: task["asks"] for one in rows for name, task in _tasks(one).items()}
    asked = ", ".join(f"{name} ({asks})" for name, asks in tasks.items())
    return Profile(
        pd.DataFrame(means).T.rename_axis("row"),
        frozenset(map(frozenset, apart)),
        min(len((one.probes or {})["seeds"]) for one in rows),
        f"{asked}: accuracy in these probes, {(rows[0].probes or {})['chance']} by chance.",
    )


def agreement(records: Sequence[Record]) -> list[Table]:
    """Return the table of rank agreement with published mAP; none where too few rows are there."""
    seen, rows = profile(records), published()
    scores = pd.DataFrame() if seen is None else seen.scores
    truth = rows[rows["table"] == "ablation"].set_index("row")["box_map"]
    shared = [row for row in truth.index if row in scores.index]
    if len(shared) < _LEAST_ROWS:
        return []
    scores, truth = scores.loc[shared].dropna(axis="columns"), truth[shared]
    if scores.shape[1] > 1:
        scores["mean"] = scores.mean(axis="columns")
    scores[f"rule: {_RULE}"] = [float(row.startswith(PARTIAL) or row == "ViL") for row in shared]
    lines = [_agreement(str(name), scores[name], truth) for name in scores]
    columns = [
        Column("score", "rows ordered by"),
        Column("correlation", "Spearman", "", Unit.ONE, decimals(2)),
        Column("p", "p", "", Unit.ONE, decimals(4)),
    ]
    notes = [
        f"Of the {len(shared)} published rows probed here: rank correlation with the published box"
        f" mAP; p is the share of {_PERMUTATIONS:,} permutations of the rows that correlate as much"
        f" or more. The rule orders rows by one bit, {_RULE}: a probe that scores no more than it"
        " says no more than it."
    ]
    name = "probe_agreement"
    return [
        table(name, "Agreement of probes with published mAP", pd.DataFrame(lines), columns, notes)
    ]


def _agreement(name: str, score: pd.Series, truth: pd.Series) -> dict[str, Any]:
    """Spearman's correlation, and the share of permutations of the rows with one as large."""
    # Imported here: it takes as long as the rest of a report, which few commands write.
    from scipy import stats

    ranks = [stats.rankdata(values) for values in (score.round(6), truth)]
    ours, theirs = ((rank - rank.mean()) / max(float(rank.std()), 1e-12) for rank in ranks)
    found = float(ours @ theirs) / len(ours)
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(np.tile(theirs, (_PERMUTATIONS, 1)), axis=1)
    as_large = int((shuffled @ ours / len(ours) >= found - 1e-9).sum())
    return {"score": name, "correlation": found, "p": (1 + as_large) / (1 + _PERMUTATIONS)}


def heat_map(records: Sequence[Record]) -> Figure | str:
    """Draw the score of each record in each probe as a shade, with its number and letters."""
    lines = _lines(records)
    tasks = list(dict.fromkeys(lines["task"]))
    names = _ordered(lines)
    figure = Figure(figsize=(WIDTH, 1.0 + 0.2 * len(names)), layout="constrained")
    ax = figure.subplots()
    grid = lines.pivot(index="name", columns="task", values="score").loc[names, tasks]
    shades = mpl.colormaps["Blues"]
    chance = float(records[0].probes["chance"]) if records[0].probes else 0.0
    drawn = ax.imshow(grid, cmap=shades, vmin=chance, vmax=1, aspect="auto")
    for one in lines.to_dict("records"):
        place = tasks.index(one["task"]), names.index(one["name"])
        text = f"{_said(one)}  {_short(one['letters'])}".rstrip()
        dark = one["score"] > chance + 0.6 * (1 - chance)
        ax.text(*place, text, ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=ax, location="bottom", aspect=40, pad=0.02)
    bar.set_label(f"accuracy, from chance ({chance}) to 1")
    bar.outline.set_visible(False)
    return figure


def _short(letters: str) -> str:
    """Three letters and more that follow each other as the first and the last: "cdef" as "c-f"."""
    numbered = itertools.groupby(enumerate(letters), lambda one: ord(one[1]) - one[0])
    runs = ["".join(letter for _, letter in run) for _, run in numbered]
    return "".join(run if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs)


def curves(records: Sequence[Record]) -> Figure | str:
    """Draw accuracy over the levels of each probe that has several, a panel a record."""
    tasks = {
        name: task
        for one in records
        for name, task in _tasks(one).items()
        if len(task["levels"]) > 1
    }
    if not tasks:
        return "No probe here has several levels, so there are no curves."
    names = _ordered(_lines(records))
    shown = sorted(records, key=lambda one: names.index(one.row))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 1.0 + 1.05 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax, one in zip(axes.flat, shown, strict=False):
        _draw_levels(ax, one, list(tasks))
        ax.set_title(one.row, loc="left")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for column in range(columns):
        lowest = [ax for ax in axes[:, column] if ax.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
    most = max(len(task["levels"]) for task in tasks.values())
    axes[0, 0].set_ylim(0.15, 1.05)
    axes[0, 0].set_xticks(range(1, most + 1))
    figure.supxlabel("Level, from easy to hard", fontsize=8)
    several = any(len((one.probes or {})["seeds"]) > 1 for one in shown)
    spread = ": mean and standard\ndeviation over seeds" * several
    figure.supylabel(f"Accuracy{spread}", fontsize=8)
    said = [
        f"{name}: {', '.join(map(str, task['levels']))} ({task['level']})"
        for name, task in tasks.items()
    ]
    handles = axes[0, 0].get_legend_handles_labels()[0]
    figure.legend(handles, said, loc="outside upper left")
    return figure


def _draw_levels(ax: Axes, one: Record, tasks: Sequence[str]) -> None:
    chance = (one.probes or {})["chance"]
    ax.axhline(chance, color="#999999", linewidth=0.8, zorder=1)
    scores = _scores_of(one)
    for place, name in enumerate(tasks):
        if name not in scores:
            continue
        levels = scores[name].mean(axis=2)
        ax.errorbar(
            range(1, levels.shape[1] + 1),
            levels.mean(axis=0),
            yerr=levels.std(axis=0, ddof=1) if len(levels) > 1 else None,
            color=COLOURS[place],
            marker=_MARKS[place % len(_MARKS)],
            linestyle=_LINES[place % len(_LINES)],
            markersize=3,
            linewidth=1.0,
            elinewidth=0.8,
            label=name,
        )


def _by_kind(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The records that succeeded, of each kind; of one name the newest, whose tests are paired."""
    found = []
    for kind in KINDS:
        own = sorted(
            (one for one in records if one.probes and one.probes["kind"] == kind),
            key=lambda one: one.created,
        )
        newest = list({one.row: one for one in own}.values())
        if newest:
            found.append((kind, newest))
    return found


def _tasks(one: Record) -> dict[str, Any]:
    return dict((one.probes or {})["tasks"])


def _scores_of(one: Record) -> Scores:
    """Accuracies (seeds, levels, images) by probe; the share of the cells that ask."""
    return {
        name: np.asarray(task["right"], dtype=float) / np.asarray(task["asked"], dtype=float)
        for name, task in _tasks(one).items()
    }


def figures(one: Record) -> dict[str, float]:
    """Return the accuracy in each probe, from 0 to 1, its levels and its seeds, by dotted names."""
    found = {}
    for task, scores in _scores_of(one).items() if one.probes else ():
        levels = map(str, _tasks(one)[task]["levels"])
        found[task] = float(scores.mean())
        for name, keys, means in (
            ("level", levels, scores.mean(axis=(0, 2))),
            ("seed", map(str, (one.probes or {})["seeds"]), scores.mean(axis=(1, 2))),
        ):
            found |= {f"{task}.{name}.{k}": float(v) for k, v in zip(keys, means, strict=True)}
    return found


def _comparable(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """By probe and name, accuracies (seeds, images); others than the first's have no pairs."""
    found: dict[str, Scores] = {}
    for task in dict.fromkeys(task for of in scores.values() for task in of):
        own = {name: of[task].mean(axis=1) for name, of in scores.items() if task in of}
        first = next(iter(own.values())).shape
        found[task] = {name: one for name, one in own.items() if one.shape == first}
    return found


def _lines(records: Sequence[Record]) -> pd.DataFrame:
    """A line for each record and probe: its score, spread over seeds, and letters."""
    scores = {one.row: _scores_of(one) for one in records}
    comparable = _comparable(scores)
    found = []
    for task in comparable:
        own = {name: of[task].mean(axis=1) for name, of in scores.items() if task in of}
        apart = letters(comparable[task])
        found += [
            {
                "name": name,
                "task": task,
                "score": float(one.mean()),
                "sd": float(one.mean(axis=1).std(ddof=1)) if len(one) > 1 else None,
                "letters": apart.get(name, "") if len(apart) > 1 else "",
            }
            for name, one in own.items()
        ]
    return pd.DataFrame(found)


def _ordered(lines: pd.DataFrame) -> list[str]:
    """Names, the best over all probes first."""
    means = lines.groupby("name", sort=False)["score"].mean()
    return [str(name) for name in means.sort_values(ascending=False, kind="stable").index]


def _said(line: Mapping[Any, Any]) -> str:
    spread = "" if pd.isna(line["sd"]) else f" ± {number(2)(line['sd'])}"
    return f"{number(2)(line['score'])}{spread}"


def _table(kind: str, records: Sequence[Record]) -> Table:
    lines = _lines(records)
    tasks = list(dict.fromkeys(lines["task"]))
    data = pd.DataFrame({"name": _ordered(lines)})
    columns = [Column("name", kind)]
    for task in tasks:
        own = lines[lines["task"] == task].set_index("name")
        texts = {
            name: f"{_said(one)} {one['letters']}".strip()
            for name, one in own.to_dict("index").items()
        }
        data[f"{task}_text"] = data["name"].map(texts)
        for part in ("score", "sd", "letters"):
            data[f"{task}_{part}"] = data["name"].map(own[part])
            columns.append(Column(f"{task}_{part}"))
        columns.append(Column("", task, f"{task}_text"))
    seconds = {
        one.row: sum(map(sum, (t["seconds"] for t in _tasks(one).values()))) for one in records
    }
    data["seconds"] = data["name"].map(seconds)
    columns.append(Column("seconds", "CPU {}", "", Unit.SECONDS, decimals(0)))
    images = {len(task["asked"][0]) for one in records for task in _tasks(one).values()}
    counts = {len((one.probes or {})["seeds"]) for one in records}
    note = _ABOUT_LETTERS.format(
        kind=KINDS[kind],
        spread=" \N{PLUS-MINUS SIGN} standard deviation over seeds" * (counts != {1}),
        images=" or ".join(map(str, sorted(images))),
        seeds=_ONE_SEED if counts == {1} else f"Seeds: {' or '.join(map(str, sorted(counts)))}.",
    )
    return table(f"probes_{kind}", f"Probes of {KINDS[kind]}", data, columns, [note])


def letters(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
    """Return letters for each name; names that share one cannot be told apart.

    See `_ABOUT_LETTERS` for the tests. The letters are found by inserting each difference and
    absorbing what another letter says already (Piepho 2004,
    https://doi.org/10.1198/1061860043515). The first letter is that of the best.

    Args:
        scores: accuracies (seeds, images) of the same seeds and images.
    """
    order = sorted(scores, key=lambda name: -float(scores[name].mean()))
    groups = [set(order)]
    for pair in _differences(scores):
        split = [
            part
            for group in groups
            for part in ([group - {one} for one in pair] if pair <= group else [group])
        ]
        unique = [group for place, group in enumerate(split) if group not in split[:place]]
        groups = [group for group in unique if not any(group < other for other in unique)]
    groups.sort(key=lambda group: [order.index(name) for name in order if name in group])
    names = letters_of(len(groups))
    return {
        name: "".join(letter for letter, group in zip(names, groups, strict=True) if name in group)
        for name in scores
    }


def _differences(scores: Mapping[str, NDArray[np.float64]]) -> list[set[str]]:
    """The pairs that are told apart."""
    from scipy import stats

    pairs = list(itertools.combinations(scores, 2))
    if not pairs:
        return []
    seeds, images = next(iter(scores.values())).shape
    of_seeds = {
        name: float(one.mean(axis=1).var(ddof=1)) if seeds > 1 else 0.0
        for name, one in scores.items()
    }
    usual = float(np.mean(list(of_seeds.values())))
    # The mean is as certain as the few that are large make it.
    of_usual = _freedom([(own, seeds - 1) for own in of_seeds.values()])
    found = []
    for one, other in pairs:
        apart = (scores[one] - scores[other]).mean(axis=0)
        parts = [(float(apart.var(ddof=1)) / images if images > 1 else 0.0, images - 1.0)]
        for own in (of_seeds[one], of_seeds[other]):
            larger = (own, seeds - 1.0) if own > usual else (usual, of_usual)
            parts.append((larger[0] / seeds, larger[1]))
        ratio = abs(float(apart.mean())) / max(sum(part for part, _ in parts) ** 0.5, 1e-12)
        found.append((2 * float(stats.t.sf(ratio, _freedom(parts))), {one, other}))
    found.sort(key=lambda item: item[0])
    left = range(len(found), 0, -1)
    kept = itertools.takewhile(
        lambda item: item[0][0] * item[1] <= LEVEL, zip(found, left, strict=True)
    )
    return [pair for (_, pair), _ in kept]


def _freedom(variances: Sequence[tuple[float, float]]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances, each with its own."""
    spread = sum(own**2 / freedom for own, freedom in variances if own)
    return sum(own for own, _ in variances) ** 2 / spread if spread else float("inf")
