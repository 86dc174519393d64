"""Which row to take under limits, what each limit costs, and what would decide between ties."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from bench.errors import InputError
from bench.record import Record
from report import answer, confidence, reference
from report.answer import Answer, Standing
from report.columns import Unit, number, three_digits
from report.load import Library, at, per_library
from report.probes import Profile
from report.reference import Conditions

# More of what was measured than this tells rows apart in no time that anyone has.
_FUTILE = 100
_LITTLE = 1.5


@dataclass(frozen=True)
class Limit:
    """The most that a row may cost.

    Attributes:
        option: as it was asked for, such as `--max-memory 16GB`.
        column: of `report.load.frame`.
        most: in its unit.
        unit: for readers.
    """

    option: str
    column: str
    most: float
    unit: Unit

    def say(self, value: float) -> str:
        """Return a cost as a person would write it."""
        digits = number(2) if self.unit is Unit.GB else three_digits
        return f"{digits(value / self.unit.size)} {self.unit.symbol}"


def recommend(
    records: Sequence[Record],
    costs: Sequence[Record],
    limits: Sequence[Limit],
    *,
    mode: str,
    sees: Profile | None = None,
) -> list[Answer]:
    """Return for each library the rows under all limits, the best first, and what to know of them.

    Args:
        records: of runs.
        costs: of their rows at the size that is asked about.
        limits: on costs at that size.
        mode: of memory, "inference" or "training".
        sees: what each row sees, of `report.probes.profile`.

    Raises:
        InputError: for limits that no row meets, naming the nearest.
    """
    about = reference.conditions(costs)
    build = per_library(partial(_recommend, about=about, limits=limits, mode=mode, sees=sees))
    return build(reference.at_reference(records, costs))


def _recommend(
    library: Library,
    about: Conditions | None,
    limits: Sequence[Limit],
    mode: str,
    sees: Profile | None,
) -> Answer:
    meets = {limit.option: _meets(library.data, limit) for limit in limits}
    inside = pd.Series(True, index=library.data.index) & library.data["box_AP"].notna()
    if not inside.any():
        raise InputError("no row has a box mAP, so that none is better than another")
    within = inside.copy()
    for met in meets.values():
        within &= met
    if not within.any():
        raise InputError(_nearest(library.data[inside], limits, about))
    standing = Standing(_only(library, within), about, mode)
    sentences = [standing.best(sees)]
    for limit in limits:
        others = inside & ~_undecided(library.data, limit)
        for option, met in meets.items():
            others &= met if option != limit.option else True
        sentences.append(_cost_of(limit, library, within, others))
    sentences += [_decide(standing, probed=sees is not None), *_unknown(library.data, limits)]
    size = "" if about is None else f" at {about.image_size}"
    asked = " and ".join(limit.option for limit in limits) or "no limits"
    found = answer.rows(standing, sees)
    return Answer("recommend", f"Rows under {asked}{size}", tuple(filter(None, sentences)), found)


def _meets(data: pd.DataFrame, limit: Limit) -> pd.Series:
    """Which rows surely cost no more; what is unknown or a lower bound does not."""
    met = (data[limit.column].astype("Float64") <= limit.most).fillna(False).astype(bool)
    return met & data["flops_uncounted"].isna() if limit.column == "flops" else met


def _undecided(data: pd.DataFrame, limit: Limit) -> pd.Series:
    """Which rows may or may not cost more, as their costs are unknown or a lower bound."""
    cost = data[limit.column].astype("Float64")
    if limit.column != "flops":
        return cost.isna()
    return cost.isna() | (data["flops_uncounted"].notna() & (cost <= limit.most).fillna(False))


def _only(library: Library, chosen: pd.Series) -> Library:
    records = [one for one, keep in zip(library.records, chosen, strict=True) if keep]
    return Library(records, library.data[chosen].reset_index(drop=True))


def _nearest(data: pd.DataFrame, limits: Sequence[Limit], about: Conditions | None) -> str:
    """Say which row comes nearest to what no row meets."""
    data = (
        data[data["flops_uncounted"].isna()] if any(x.column == "flops" for x in limits) else data
    )
    over = pd.DataFrame(
        {limit.option: data[limit.column].astype("Float64") / limit.most for limit in limits}
    )
    asked = " and ".join(limit.option for limit in limits)
    worst = over.max(axis=1, skipna=False).dropna()
    size = "" if about is None else f" at {about.image_size}"
    if worst.empty:
        return f"no row is known to meet {asked}{size}: their costs could not be counted"
    near = worst.sort_values().index[0]
    needs = ", ".join(
        f"{_rounded_up(data[limit.column][near] / limit.unit.size):,.6g} {limit.unit.symbol}"
        f" {'FLOPs' if limit.column == 'flops' else 'memory'}"
        for limit in limits
    )
    return f"no row meets {asked}{size}; the nearest is {data['label'][near]} ({needs})"


def _rounded_up(value: float) -> float:
    """A number of six digits that, as a limit, the value meets."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 5) if value > 0 else 1.0
    return math.ceil(value / unit) * unit


def _cost_of(limit: Limit, library: Library, within: pd.Series, without: pd.Series) -> str:
    """Say what a limit costs: which rows it alone keeps out, and how good they are."""
    out = without & ~within
    if not out.any():
        if _undecided(library.data, limit).any():
            return f"{limit.option} keeps out no row whose cost is known."
        return f"{limit.option} costs nothing: it keeps out no row that the other limits allow."
    free = Standing(_only(library, without), None)
    best = Standing(_only(library, within), None)
    kept_out = set(library.data["label"][out])
    said = f"{limit.option} keeps out {free.named(_places(free, kept_out))}"
    if free.leader is None or best.leader is None or free.name(free.leader) not in kept_out:
        return f"{said}, none with a higher box mAP."
    place = next(i for i, one in enumerate(free.data["label"]) if one == best.name(best.leader))
    loss = float(free.data["box_AP"][free.leader] - free.data["box_AP"][place])
    verdict = "told apart" if free.pairs[free.leader, place] == 1 else "not told apart"
    return f"{said}; it costs {number(1)(loss)} box mAP ({free.name(free.leader)}, {verdict})."


def _places(standing: Standing, names: set[str]) -> list[int]:
    return [place for place, name in enumerate(standing.data["label"]) if name in names]


def _decide(standing: Standing, *, probed: bool) -> str:
    """Say what would have to be measured to decide between the rows that tie."""
    if standing.leader is None or len(standing.ties) < 2:
        return ""
    first = standing.library.records[standing.leader]
    needs = []
    for place in standing.ties:
        other = standing.library.records[place]
        ours, theirs = (at(one, "evaluation.bootstrap.box_AP") for one in (first, other))
        difference = at(first, "evaluation.box.AP") - at(other, "evaluation.box.AP")
        limits = confidence.difference_interval(difference, ours or [], theirs or [])
        if place == standing.leader or limits is None:
            continue
        half = (limits[1] - limits[0]) / 2
        times = (half / difference) ** 2 if difference else float("inf")
        more = f"about {times:.0f} times" if times < _FUTILE else f"over {_FUTILE} times"
        more = "a little more" if times < _LITTLE else more
        needs.append(
            f"{more} for {standing.name(place)} (now {number(1)(difference)} ± {number(1)(half)})"
        )
    leader = standing.name(standing.leader)
    if not needs:
        return f"To tell {leader} from the others, evaluate them on the same images, with draws."
    return (
        f"To tell {leader} from the rows that tie with it takes more test images and seeds than"
        f" were measured, if the differences stay: {'; '.join(needs)}. Until then choose by cost"
        f"{' and by the probes' * probed}."
    )


def _unknown(data: pd.DataFrame, limits: Sequence[Limit]) -> list[str]:
    """Name the rows whose costs are not known, or known in part, with the reason."""
    columns = [limit.column for limit in limits]
    missing = data[data[columns].isna().any(axis=1)] if columns else data.head(0)
    pairs = zip(missing["label"], missing["notes"].fillna("no reason given"), strict=True)
    found = [f"Not considered, as its cost is not known: {row} ({why})." for row, why in pairs]
    for limit in limits:
        partly = data[_undecided(data, limit) & data[columns].notna().all(axis=1)]
        for label, flops, lacks in partly[["label", "flops", "flops_uncounted"]].itertuples(
            index=False
        ):
            least = f"at least {three_digits(flops / Unit.GIGA.size)} G, without {lacks}"
            found.append(
                f"Not considered, as its FLOPs are incomplete and may be above {limit.option}:"
                f" {label} ({least})."
            )
    return found
