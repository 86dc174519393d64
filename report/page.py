"""The page of a set of records: one content as Markdown and HTML, tables and plots as files."""

import base64
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bench.errors import InputError
from bench.record import Record
from report import confidence, counts, front, plots, provenance, tables
from report.plots import Plot
from report.searches import flat
from report.tables import Table

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Text shown as it is."""

    text: str
    kind: str = "code"

    @property
    def fence(self) -> str:
        """More backticks than there are in the text."""
        longest = max((len(run) for run in re.findall(r"`+", self.text)), default=0)
        return "`" * max(3, longest + 1)


@dataclass(frozen=True)
class TableBlock:
    """A table."""

    table: Table
    kind: str = "table"

    @property
    def markdown(self) -> str:
        """As Markdown."""
        return tables.to_markdown(self.table.shown).strip()

    @property
    def html(self) -> str:
        """As HTML."""
        return tables.to_html(self.table.shown, self.table.name)


@dataclass(frozen=True)
class PlotBlock:
    """A plot that there is a picture of."""

    plot: Plot
    kind: str = "plot"

    @property
    def image(self) -> str:
        """The picture in base 64."""
        return base64.b64encode(self.plot.png).decode()


Block = Text | Code | TableBlock | PlotBlock


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def write(records: Sequence[Record], directory: Path, *, title: str) -> Path:
    """Write the page of `records` into `directory` and return its `index.md`.

    Beside it come `index.html` (one file that needs no other), `tables/*.csv|md|tex` and
    `plots/*.png|svg`. The same records give the same bytes. Each file is replaced as a whole.

    Raises:
        InputError: without records, or if the folder cannot be written.
    """
    if not records:
        raise InputError(f"there are no records to report in {directory}")
    drawn = [*plots.draw(records), *counts.conventions_plots(records)]
    sections = _sections(records, drawn)
    made = provenance.sentence(records)
    return publish(sections, drawn, directory, title=title, made=made)


def publish(
    sections: Sequence[Section],
    drawn: Sequence[Plot],
    directory: Path,
    *,
    title: str,
    made: str = "",
) -> Path:
    """Write a page of `sections` with its tables and plots, and return its `index.md`.

    Args:
        sections: of the page.
        drawn: plots that get files of their own.
        directory: made if it is missing.
        title: of the page.
        made: where the numbers come from, for the page and each table's file.

    Raises:
        InputError: if the folder cannot be written.
    """
    try:
        for table in _tables(sections):
            base = directory / "tables" / table.name
            _replace(base.with_suffix(".csv"), tables.to_csv(table.raw))
            notes = [*table.notes, *filter(None, [made])]
            _replace(base.with_suffix(".md"), _standalone(table, notes))
            caption = " ".join([f"{table.title}.", *notes])
            _replace(
                base.with_suffix(".tex"),
                tables.to_latex(table.shown, caption=caption, label=table.name),
            )
        for plot in drawn:
            if not plot.skipped:
                base = directory / "plots" / plot.name
                _replace(base.with_suffix(".png"), plot.png)
                _replace(base.with_suffix(".svg"), plot.svg)
        _replace(directory / "index.html", _render("page.html.jinja", title, sections, made))
        markdown = _render("page.md.jinja", title, sections, made)
        page = directory / "index.md"
        _replace(page, markdown)
    except OSError as error:
        raise InputError(
            f"cannot write the report to {directory}: {error.strerror or error}"
        ) from error
    return page


def _standalone(table: Table, notes: Sequence[str]) -> str:
    """A table as Markdown that says by itself what it is."""
    return "\n\n".join([f"**{table.title}**", TableBlock(table).markdown, *notes]) + "\n"


def _render(template: str, title: str, sections: Sequence[Section], made: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (HERE / "page.css").read_text(encoding="utf-8").strip()
    return environment.get_template(template).render(
        title=title, sections=sections, made=made, css=css
    )


def _replace(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _tables(sections: Iterable[Section]) -> list[Table]:
    return [
        block.table
        for section in sections
        for block in section.blocks
        if isinstance(block, TableBlock)
    ]


def _sections(records: Sequence[Record], drawn: Sequence[Plot]) -> list[Section]:
    failures = [record for record in records if record.status == "failed"]
    counts = f"{len(records)} rows, of which {len(failures)} failed."
    counts += " The rows that failed stay in the table; see Failures." if failures else ""
    sections = [
        Section("Comparison", (Text(counts), *map(TableBlock, tables.comparison(records)))),
        *_tabled("Rows that no other beats", front.tables(records)),
        *_tabled("Searched settings", tables.searches(records)),
        Section("Plots", (Text(_LEGEND), *(_picture(plot) for plot in drawn))),
        Section("All COCO figures, %", tuple(map(TableBlock, tables.figures(records)))),
        *_tabled(
            "How sure mAP is", [*confidence.intervals(records), *confidence.differences(records)]
        ),
        *_further(records),
        Section("Details", tuple(map(TableBlock, tables.details(records)))),
        Section("Published numbers", _published(records)),
        Section("How the numbers were counted", tuple(map(Text, _counting(records)))),
        Section("Differences in configuration", _differences(records)),
        Section("Environment", _environment(records)),
    ]
    if failures:
        blocks = [block for record in failures for block in _failure(record)]
        sections.append(Section("Failures", tuple(blocks)))
    commands = dict.fromkeys(str(record.environment.get("command")) for record in records)
    again = Text("The same command again runs only what has no record yet.")
    sections.append(Section("Run it again", (again, Code("\n".join(commands)))))
    return sections


def _tabled(title: str, found: Sequence[Table]) -> tuple[Section, ...]:
    """A section of tables, or none without them."""
    return (Section(title, tuple(map(TableBlock, found))),) if found else ()


def _further(records: Sequence[Record]) -> tuple[Section, ...]:
    table = tables.further_splits(records)
    return () if table is None else (Section(table.title, (TableBlock(table),)),)


_LEGEND = (
    "Colour and marker say the mechanism; hollow marks and bars are rows with full attention in"
    " their later stages. Bars of latency are medians, with their quartiles. Losses are drawn raw"
    " (light) and as a moving average (dark)."
)


def _picture(plot: Plot) -> Block:
    return Text(plot.skipped) if plot.skipped else PlotBlock(plot)


def _published(records: Sequence[Record]) -> tuple[Block, ...]:
    lines = counts.published_lines(records)
    found = [tables.against_published(records), counts.conventions(lines) if lines else None]
    blocks = tuple(TableBlock(table) for table in found if table is not None)
    if blocks:
        return blocks
    suites = _list(record.suite for record in records)
    return (
        Text(
            f"No row here has the architecture and schedule of a published one (suite {suites}),"
            " so these numbers are not comparable with published ones."
        ),
    )


def _counting(records: Sequence[Record]) -> list[str]:
    """One sentence or more for each kind of number."""
    flops = [record.flops for record in records if record.flops]
    memory = [record.memory for record in records if record.memory]
    latency = [record.latency for record in records if record.latency]
    evaluation = [record.evaluation for record in records if record.evaluation]
    sentences = [
        "Average precision and recall: COCO's, in percent"
        f" ({_facts(evaluation, split='split', images='images')}).",
        "Parameters: of the whole detector, the backbone's classification head included, in 10^6.",
        f"FLOPs: {_list(part.get('unit') for part in flops)}, in 10^9, of one image, the"
        " mask head left out as in published tables"
        f" ({_facts(flops, convention='convention', image_size='size', proposals='proposals')}).",
        f"Memory: the peak, MB = 10^6 and GB = 10^9 bytes ({_facts(memory, **_CONDITIONS)}).",
        "Latency: the median of one batch; its spread is the interquartile range"
        f" ({_facts(latency, **_CONDITIONS, threads='threads')}).",
        f"{tables.MISSING} means that there is no such number.",
    ]
    uncounted = {
        f"{name} ({record.row})"
        for record in records
        for name in (record.flops or {}).get("uncounted") or ()
    }
    if uncounted:
        sentences.append(f"Operators without a formula, not counted: {_list(sorted(uncounted))}.")
    sentences += [
        f"Latency of {label}: {note}."
        for label, record in zip(_labels(records), records, strict=True)
        for note in (record.latency or {}).get("notes") or ()
    ]
    return sentences


_CONDITIONS = {
    "kind": "kind",
    "device": "device",
    "batch_size": "batch size",
    "image_size": "size",
    "precision": "precision",
}


def _facts(parts: Sequence[Mapping[str, Any]], **names: str) -> str:
    """The values that `parts` have in the fields `names`, as a phrase."""
    facts = [
        f"{label} {_list(_size(part[field]) for part in parts if part.get(field) is not None)}"
        for field, label in names.items()
        if any(part.get(field) is not None for part in parts)
    ]
    return "; ".join(facts) or "not measured"


def _differences(records: Sequence[Record]) -> tuple[Block, ...]:
    """Where the configurations differ: setting, value and the rows that have it."""
    flats = [flat({k: v for k, v in record.config.items() if k != "row"}) for record in records]
    settings = dict.fromkeys(name for config in flats for name in config)
    labels = _labels(records)
    lines = []
    for setting in settings:
        rows: dict[str, list[str]] = {}
        for label, config in zip(labels, flats, strict=True):
            rows.setdefault(_say(config.get(setting)), []).append(label)
        if len(rows) > 1:
            lines += [(setting, value, ", ".join(having)) for value, having in rows.items()]
    if not lines:
        return (Text("The configurations of all rows are the same."),)
    table = pd.DataFrame(lines, columns=["setting", "value", "rows"])
    return (
        Text("Settings that are not listed are the same in all rows; each record has all of them."),
        TableBlock(Table("configuration", "Settings that differ", table, table)),
    )


def _environment(records: Sequence[Record]) -> tuple[Block, ...]:
    flats = [
        flat({k: v for k, v in record.environment.items() if k != "command"}) for record in records
    ]
    facts = dict.fromkeys(name for environment in flats for name in environment)
    labels = _labels(records)
    lines = []
    for fact in facts:
        rows: dict[str, list[str]] = {}
        for label, environment in zip(labels, flats, strict=True):
            rows.setdefault(_say(environment.get(fact)), []).append(label)
        same = len(rows) == 1
        value = "; ".join(v if same else f"{v} ({', '.join(rows[v])})" for v in rows)
        lines.append((fact.removeprefix("packages."), value))
    times = sorted(record.created for record in records)
    lines.append(("records made", f"{times[0]} to {times[-1]}"))
    lines.append(("seed", _list(str(record.seed) for record in records)))
    table = pd.DataFrame(lines, columns=["fact", "value"])
    return (TableBlock(Table("environment", "Where it ran", table, table)),)


def _failure(record: Record) -> Iterable[Block]:
    error = record.error or {}
    message = str(error.get("message"))
    kind = tables.reason(str(error.get("kind")))
    yield Text(f"{record.row} failed, {kind}: {' '.join(message.split())}")
    text = str(error.get("traceback") or "").rstrip()
    yield Code(text if message in text else f"{message}\n{text}".rstrip())


def _labels(records: Sequence[Record]) -> list[str]:
    return [str(label) for label in tables.frame(records)["label"]]


def _size(value: Any) -> str:
    """A size as height times width, anything else as it is."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    return "\N{MULTIPLICATION SIGN}".join(map(str, value)) if pair else _say(value)


def _say(value: Any) -> str:
    if value is None:
        return tables.MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=list)


def _list(values: Iterable[Any]) -> str:
    """The distinct values, in order."""
    return ", ".join(dict.fromkeys(str(value) for value in values)) or tables.MISSING
