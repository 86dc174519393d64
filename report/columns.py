"""Tables whose columns are declared once, for the CSV file and for a reader.

The CSV file holds numbers in the units of the records, at full precision; a reader sees them scaled
and rounded, with the unit in the heading.
"""

import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pandas as pd

from report.load import TEXT, Named

MISSING = "\N{EN DASH}"
AT_LEAST = "\N{GREATER-THAN OR EQUAL TO}"
METHODS = {"mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}
REASONS = {
    "input": "bad input",
    "out_of_memory": "out of memory",
    "too_slow": "too slow",
    "skipped": "skipped",
    "interrupted": "interrupted",
    "diverged": "diverged",
    "data_worker": "lost a data process",
    "error": "error",
}

Cell = Callable[[Any], str]
Format = Callable[[pd.Series], pd.Series]
Values = Callable[[pd.DataFrame], Iterable[Any]]


class Unit(Enum):
    """A unit that readers see: its symbol and its size in the unit of the records."""

    ONE = "", 1
    MEGA = "M", 1e6
    GIGA = "G", 1e9
    MB = "MB", 1e6
    GB = "GB", 1e9
    MS = "ms", 1e-3
    SECONDS = "s", 1
    MINUTES = "min", 60
    # Average precision is recorded in percent; shares are not.
    PERCENT = "%", 1
    SHARE = "%", 0.01

    def __init__(self, symbol: str, size: float) -> None:
        self.symbol = symbol
        self.size = size


def number(decimals: int, *, sign: bool = False) -> Cell:
    """Return what writes a number with `decimals`; what rounds to 0 has no sign."""

    def cell(value: Any) -> str:
        if pd.isna(value):
            return MISSING
        plus = sign and round(value, decimals) > 0
        return "+" * plus + format(float(value), f"z,.{decimals}f")

    return cell


def decimals(count: int, *, sign: bool = False) -> Format:
    """Return the format of a column with `count` decimals."""
    return lambda values: values.map(number(count, sign=sign))


def aligned(values: pd.Series) -> pd.Series:
    """Return `values` as strings with one number of decimals, enough to tell them apart."""
    largest = values.max() if values.notna().any() else 0
    return values.map(number(0 if largest >= 1000 else 1 if largest >= 100 else 2))


def three_digits(value: Any) -> str:
    """Return three digits of a number, or its whole part if that has more."""
    if pd.isna(value):
        return MISSING
    return number(0 if value >= 100 else 1 if value >= 10 else 2)(value)


def words(values: pd.Series) -> pd.Series:
    """Return `values` as text."""
    return values.astype(TEXT).fillna(MISSING)


def joined(separator: str, names: Sequence[str], unit: Unit, cell: Cell | None = None) -> Values:
    """Return what joins several columns of numbers to one text, missing where one of them is."""
    cell = cell or number(1)

    def values(data: pd.DataFrame) -> Iterable[str | None]:
        for row in data[list(names)].itertuples(index=False):
            missing = any(map(pd.isna, row))
            yield None if missing else separator.join(cell(value / unit.size) for value in row)

    return values


def letters_of(count: int) -> list[str]:
    """Return names of one letter, and of two where these do not suffice: a to z, aa, ab, …"""
    every = (itertools.product(string.ascii_lowercase, repeat=n) for n in itertools.count(1))
    return ["".join(name) for name in itertools.islice(itertools.chain.from_iterable(every), count)]


def reason(kind: str) -> str:
    """Return an error's kind as a person would say it."""
    return REASONS.get(kind, kind)


def memory_unit(*columns: pd.Series) -> Unit:
    """Return GB where all bytes in `columns` are a GB or more, or one is ten or more; else MB."""
    ends = [end for column in columns for end in (column.min(), column.max()) if pd.notna(end)]
    large = ends and (min(ends) >= Unit.GB.size or max(ends) >= 10 * Unit.GB.size)
    return Unit.GB if large else Unit.MB


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: heading in the CSV file, which says the unit; empty to leave the column out there.
        title: heading for readers, with `{}` for the unit; empty likewise.
        values: column of the data, or what makes the values of the data; the column `name` if
            empty.
        unit: of the numbers for readers; None for text.
        format: of the scaled numbers or the text; by default `words` for text, a decimal for
            percentages, and `aligned` for other numbers.
        optional: whether readers see it only where a row has a value.
        lacks: column of the data that names what a number does not hold. Where it does, readers
            see that the number is a lower bound, and the table's notes name what it lacks.
        aside: column of the data that says how many products of elements are beside a count, which
            is complete without them; the table's notes name them.
    """

    name: str
    title: str = ""
    values: str | Values = ""
    unit: Unit | None = None
    format: Format | None = None
    optional: bool = False
    lacks: str = ""
    aside: str = ""

    @property
    def heading(self) -> str:
        """The heading for readers."""
        return self.title.format(self.unit.symbol if self.unit else "").strip()

    def raw(self, data: pd.DataFrame) -> pd.Series:
        """Return the values in the units of the records."""
        if callable(self.values):
            return pd.Series(self.values(data), index=data.index)
        return data[self.values or self.name]

    def shown(self, data: pd.DataFrame) -> pd.Series:
        """Return the values as strings for readers."""
        if self.unit is None:
            texts = (self.format or words)(self.raw(data))
        else:
            usual = decimals(1) if self.unit.symbol == "%" else aligned
            texts = (self.format or usual)(self.raw(data).astype("Float64") / self.unit.size)
        if not self.lacks:
            return texts
        bound = data[self.lacks].notna() & (texts != MISSING)
        return texts.mask(bound, AT_LEAST + " " + texts)

    def notes(self, data: pd.DataFrame) -> Iterator[str]:
        """Yield what the numbers lack and leave out, in sentences."""
        label = "label" if "label" in data else "row"
        for about, said in (
            (self.lacks, f"{AT_LEAST} is a lower bound; calls without a formula"),
            (self.aside, "Not in FLOPs, as in no sum: products of elements, as of gates"),
        ):
            found = data[data[about].notna()] if about in data else data.head(0)
            if len(found):
                named = zip(found[label], found[about], strict=True)
                names = dict.fromkeys(f"{row}: {what}" for row, what in named)
                yield f"{said}: {'; '.join(names)}."

    def is_in(self, data: pd.DataFrame) -> bool:
        """Whether the data have it."""
        return callable(self.values) or (self.values or self.name) in data.columns

    def is_shown(self, data: pd.DataFrame) -> bool:
        """Whether readers see it."""
        return bool(self.title) and not (self.optional and self.raw(data).isna().all())


def of_flops(
    title: str = "FLOPs {}", *, name: str = "flops_multiply_adds", values: str = "flops"
) -> tuple[Column, ...]:
    """Return the columns of counts, with what they lack and leave out."""
    lacks, aside = "flops_uncounted", "flops_unsummed"
    counted = Column(name, title, values, Unit.GIGA, lacks=lacks, aside=aside)
    return counted, Column(lacks), Column(aside)


@dataclass(frozen=True)
class Table(Named):
    """One table.

    Attributes:
        raw: numbers in the units of the records, at full precision.
        shown: strings, units in the headings.
        notes: sentences that belong under it.
    """

    raw: pd.DataFrame
    shown: pd.DataFrame
    notes: tuple[str, ...] = ()


def table(
    name: str,
    title: str,
    data: pd.DataFrame,
    columns: Sequence[Column],
    notes: Iterable[str] = (),
) -> Table:
    """Return the table of the declared columns that `data` have, a line a row."""
    columns = [column for column in columns if column.is_in(data)]
    raw = {column.name: column.raw(data) for column in columns if column.name}
    shown = {column.heading: column.shown(data) for column in columns if column.is_shown(data)}
    own = (note for column in columns if column.is_shown(data) for note in column.notes(data))
    every = tuple(dict.fromkeys((*notes, *own)))
    return Table(name, title, pd.DataFrame(raw), pd.DataFrame(shown), every)
