"""The page of a set of records: one content as Markdown and HTML, tables and plots as files."""

import base64
import re
import shlex
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bench.errors import InputError, saying
from bench.record import Record
from report import (
    answer,
    classifiers,
    confidence,
    counts,
    export,
    front,
    pictures,
    plots,
    provenance,
    reference,
    seeds,
    tables,
)
from report import probes as small_tasks
from report.columns import MISSING, Table, reason
from report.load import at, labels, load, size
from report.plots import Plot
from report.provenance import listed, said

HERE = Path(__file__).resolve().parent
# What makes more than a paragraph of a line of Markdown that starts with it.
_STARTS = re.compile(r"^(\d{0,9})(#{1,6} |[-+=>]|(?<=\d)[.)] )")


# How a page names its tables and plots, whose files are in a folder and have these endings.
_NAMED = (
    ("index.html", re.compile(r'<table id="([\w-]+)">'), "tables", (".csv", ".md", ".tex")),
    ("index.md", re.compile(r"^!\[.*\]\(plots/([\w-]+)\.png\)$", re.M), "plots", (".png", ".svg")),
)

# What a command line says of its rows, as a shell reads it.
_ROWS = re.compile(r"(.*? --rows )('[^']*'|\S+)(.*)")


@dataclass(frozen=True)
class Code:
    """Text shown as it is."""

    text: str


Block = str | Code | Table | Plot
"""A paragraph, code, a table or a plot."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; left out of the page if that is nothing."""

    title: str
    blocks: Sequence[Block]


def write(
    records: Sequence[Record],
    directory: Path,
    *,
    title: str,
    costs: Sequence[Record] = (),
    probes: Sequence[Record] = (),
    drawn: Mapping[str, Mapping[str, Any]] | None = None,
    profiled: Sequence[Table] = (),
) -> Path:
    """Write the page of `records` into `directory` and return its `index.md`.

    Beside it come `index.html` (one file that needs no other), `tables/*.csv|md|tex`,
    `plots/*.png|svg` and `results.parquet`, a line for each record and figure. The same records
    give the same bytes. Each file is replaced as a whole; those of tables and plots that the page
    before had, and this one has not, are removed.

    Args:
        records: of runs.
        directory: made if it is missing.
        title: of the page.
        costs: of the rows at full size, see `report/reference.py`.
        probes: records of the suite `probes`, which may be all there is.
        drawn: what rows find and see, of `report.pictures.load`.
        profiled: of `report.profiles`, which come first.

    Raises:
        InputError: without records, or if the folder cannot be written.
    """
    if not records and not probes:
        raise InputError(f"there are no records to report in {directory}")
    made = provenance.sentence(records or probes)
    with saying(f"cannot write the report to {directory}"):
        _replace(directory / export.NAME, export.parquet([*records, *costs, *probes]))
    asked = Section("Probes", small_tasks.blocks(probes))
    shown = Section("Pictures", pictures.blocks(drawn or {}))
    if classifiers.are(records):
        sections = [
            Section("Pretrained classifiers", classifiers.comparison(records)),
            Section("Plots", classifiers.loss(records)),
            _failures(records),
            *_origin(records, name_rows=True),
        ]
    elif records:
        sees = small_tasks.profile(probes)
        sections = [
            Section("Profile", profiled),
            *_sections(records, costs, sees=sees, probes=asked, shown=shown),
        ]
    else:
        sections = [asked, *_origin(probes)]
    return publish(sections, directory, title=title, made=made)


def write_suite(
    records: Sequence[Record], output: Path, *, title: str, costs: Sequence[Record] = ()
) -> int:
    """Write the report of a suite, print its main tables and what failed, and return the exit code.

    Args:
        records: of the runs.
        output: the folder of the suite.
        title: of the page.
        costs: of the rows at full size.
    """
    probed, drawn = small_tasks.load(output), pictures.load(records, output)
    path = write(records, output, title=title, costs=costs, probes=probed, drawn=drawn)
    show(records, costs, probed)
    failed = [entry for entry in records if entry.status == "failed"]
    for label, entry in zip(labels(records), records, strict=True):
        if entry in failed:
            print(f"{label}: failed, {(entry.error or {}).get('message')}")
    if failed:
        print("Failed rows are run again with --retry-failed.")
    print(f"report: {_both(path)}")
    return 1 if failed else 0


def show(records: Sequence[Record], costs: Sequence[Record], probed: Sequence[Record]) -> None:
    """Print the answer of records and their main tables; those of probes without any."""
    if classifiers.are(records):
        print("\n".join(map(classifiers.to_text, classifiers.comparison(records))))
        return
    if records:
        for one in answer.first(records, costs, small_tasks.profile(probed)):
            print(answer.to_text(one))
        found = [*tables.comparison(records), *tables.searches(records)]
    else:
        found = small_tasks.tables(probed)
    for table in found:
        print(tables.to_text(table.shown))


def write_folder(output: Path, *, title: str, probed: Sequence[Record] = ()) -> Path:
    """Write the page of all that an output folder has, and return its `index.md`.

    Args:
        output: the folder.
        title: of the page, where the folder has no suite.
        probed: records of probes that a command asked for.
    """
    records = load(output)
    suites = listed(record.suite for record in records)
    return write(
        records,
        output,
        title=f"Suite {suites}" if records else title,
        costs=reference.load(output),
        probes=small_tasks.load(output, probed),
        drawn=pictures.load(records, output),
    )


def write_probes(records: Sequence[Record], output: Path, *, title: str) -> None:
    """Write the page of a folder that has probes, and print the tables of `records`."""
    path = write_folder(output, title=title, probed=records)
    for table in small_tasks.tables(records):
        print(tables.to_text(table.shown))
    print(f"report: {_both(path)}")


def _both(path: Path) -> str:
    return f"{path} and {path.with_suffix('.html')}"


def publish(sections: Sequence[Section], directory: Path, *, title: str, made: str = "") -> Path:
    """Write a page of `sections` with files of its tables and plots, and return its `index.md`.

    Args:
        sections: of the page.
        directory: made if it is missing.
        title: of the page.
        made: where the numbers come from, for the page and each table's file.

    Raises:
        InputError: if the folder cannot be written.
    """
    with saying(f"cannot write the report to {directory}"):
        found = [block for section in sections for block in section.blocks]
        shown = [block for block in found if isinstance(block, Table)]
        write_tables(shown, directory / "tables", made)
        drawn = [block for block in found if isinstance(block, Plot)]
        write_plots(drawn, directory / "plots")
        names = {
            "tables": {table.name for table in shown},
            "plots": {plot.name for plot in drawn if not plot.skipped},
        }
        _remove_others(directory, names)
        _replace(directory / "index.html", _render("page.html.jinja", title, sections, made))
        markdown = _render("page.md.jinja", title, sections, made)
        page = directory / "index.md"
        _replace(page, markdown)
    return page


def write_tables(found: Iterable[Table], folder: Path, made: str = "") -> None:
    """Write tables as CSV, Markdown and LaTeX, which say by themselves what they are.

    Args:
        made: where the numbers come from.

    Raises:
        OSError: where they cannot be written.
    """
    for table in found:
        base = folder / table.name
        notes = [*table.notes, *filter(None, [made])]
        title = tables.in_markdown(table.title)
        _replace(base.with_suffix(".csv"), tables.to_csv(table.raw))
        text = "\n\n".join([f"**{title}**", _markdown(table), *map(_paragraph, notes)])
        _replace(base.with_suffix(".md"), f"{text}\n")
        caption = " ".join([f"{table.title}.", *notes])
        latex = tables.to_latex(table.shown, caption=caption, label=table.name)
        _replace(base.with_suffix(".tex"), latex)


def write_plots(found: Iterable[Plot], folder: Path) -> None:
    """Write plots as PNG and SVG, those that show something.

    Raises:
        OSError: where they cannot be written.
    """
    for plot in found:
        if not plot.skipped:
            _replace(folder / f"{plot.name}.png", plot.png)
            _replace(folder / f"{plot.name}.svg", plot.svg)


def _remove_others(directory: Path, names: Mapping[str, Collection[str]]) -> None:
    """Remove the tables and plots that a folder's present page has, but for those of `names`."""
    for page, named, folder, endings in _NAMED:
        if (directory / page).is_file():
            text = (directory / page).read_text(encoding="utf-8", errors="replace")
            for name in {*named.findall(text)} - {*names[folder]}:
                for ending in endings:
                    (directory / folder / f"{name}{ending}").unlink(missing_ok=True)


def _render(template: str, title: str, sections: Sequence[Section], made: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = _markdown
    environment.filters["inline"] = tables.in_markdown
    environment.filters["paragraph"] = _paragraph
    environment.filters["classes"] = _classes
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["fence"] = _fence
    environment.filters["kind"] = lambda block: type(block).__name__
    css = (HERE / "page.css").read_text(encoding="utf-8").strip()
    return environment.get_template(template).render(
        title=title, sections=sections, made=made, css=css
    )


def _classes(shown: pd.DataFrame) -> list[str]:
    """The CSS class of each column."""
    return ["number" if tables.is_numeric(shown[name]) else "text" for name in shown.columns]


def _markdown(table: Table) -> str:
    return tables.to_markdown(table.shown).strip()


def _paragraph(text: str) -> str:
    """A text as a paragraph of Markdown, which its first letters make no heading or list."""
    return _STARTS.sub(r"\1\\\2", tables.in_markdown(text))


def _fence(text: str) -> str:
    """More backticks than there are in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _replace(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    if isinstance(content, str):
        # Bytes of a path that are not UTF-8 are shown as escapes.
        content = content.encode(errors="backslashreplace")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sections(
    records: Sequence[Record],
    costs: Sequence[Record],
    *,
    sees: small_tasks.Profile | None,
    probes: Section,
    shown: Section,
) -> list[Section]:
    rows = seeds.merged(records)
    failed = sum(row.status == "failed" for row in rows)
    how_many = f"{len(rows)} row{'s' * (len(rows) != 1)}, of which {failed} failed."
    learnt = any(one.training or one.evaluation or one.error for one in records)
    how_many += " The rows that failed stay in the table; see Failures." if failed else ""
    further, different = tables.further_splits(rows), provenance.differences(rows)
    about = reference.conditions(costs)
    full = reference.at_reference(rows, costs) if about else rows
    varied = seeds.sentence(dict(zip(labels(rows), rows, strict=True)))
    drawn = [plot for plot in plots.draw(full) if learnt or not plot.skipped]
    return [
        *(
            Section(one.title, [*one.sentences, one.table])
            for one in answer.first(rows, costs, sees)
            if any(record.evaluation for record in records)
        ),
        Section(f"Costs at {about.image_size}" if about else "", reference.tables(rows, costs)),
        Section("Rows that no other beats", front.tables(full)),
        Section(
            _as_trained(rows),
            [how_many, *[varied] * learnt, *tables.comparison(rows)],
        ),
        probes,
        Section("Searched settings", tables.searches(records)),
        Section("Plots", [_LEGEND, *drawn]),
        shown,
        Section("All COCO figures, %", tables.figures(records) if learnt else []),
        Section(
            "How sure mAP is", [*confidence.intervals(records), *confidence.differences(records)]
        ),
        Section("Further splits, %", [further] if further else []),
        Section("Details", tables.details(records) + tables.latencies(rows)),
        Section("Published numbers", _published(rows)),
        Section("How the numbers were counted", _counting(rows)),
        Section("Differences in configuration", [_DIFFERENT, different] if different else [_SAME]),
        Section("Environment", [provenance.environment(records)]),
        _failures(records),
        run_again(records, "The same command again runs only what has no record yet."),
    ]


def _as_trained(records: Sequence[Record]) -> str:
    """The heading of the comparison, with the size of the images that its costs are of."""
    sizes = dict.fromkeys(filter(None, (size(at(one, "flops.image_size")) for one in records)))
    return f"Comparison, costs at {' or '.join(sizes)}" if sizes else "Comparison"


def _origin(records: Sequence[Record], *, name_rows: bool = False) -> list[Section]:
    """Where the records of a page come from, and how they are made again."""
    return [
        Section("Environment", [provenance.environment(records, name_rows=name_rows)]),
        run_again(records, "The same command again runs only what has no record yet."),
    ]


_LEGEND = (
    "Colour and marker say the mechanism; hollow marks and bars are rows with full attention in"
    " their later stages. Against a cost, rows are numbered from the highest mAP. mAP is drawn with"
    " its interval, where it has one, and of several seeds with a stroke for each; rows share a"
    " rank that cannot be told apart. Latencies are medians, with their quartiles. Losses are"
    " drawn raw (light), of every seed, and as a moving average of their mean (dark)."
)
_SAME = "The configurations of all rows are the same."
_DIFFERENT = "Settings that are not listed are the same in all rows; each record has all of them."


def run_again(records: Sequence[Record], about: str) -> Section:
    """Return the section with the commands that `records` were made with.

    Those that differ in their rows alone, as of --launcher local, are one.
    """
    rows: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for record in records:
        command = str(record.environment.get("command"))
        found = _ROWS.match(command)
        before, row, after = found.groups() if found else (command, "", "")
        rows[before, after] |= dict.fromkeys(shlex.split(row))
    commands = [
        f"{before}{shlex.quote(','.join(own)) if own else ''}{after}"
        for (before, after), own in rows.items()
    ]
    return Section("Run it again", [about, Code("\n".join(commands))])


def _published(records: Sequence[Record]) -> list[Block]:
    lines = counts.published_lines(records)
    found = [tables.against_published(records), counts.conventions(lines) if lines else None]
    suites = listed(record.suite for record in records)
    return [table for table in found if table is not None] or [
        f"No row here has the architecture and schedule of a published one (suite {suites}),"
        " so these numbers are not comparable with published ones."
    ]


def _counting(records: Sequence[Record]) -> list[str]:
    """One sentence or more for each kind of number."""
    flops = [record.flops for record in records if record.flops]
    memory = [one | one.get("rois", {}) for record in records if (one := record.memory)]
    latency = [one | one.get("rois", {}) for record in records if (one := record.latency)]
    evaluation = [record.evaluation for record in records if record.evaluation]
    sessions = {part["session"] for part in latency if "session" in part}
    apart = f"; taken in {len(sessions)} sessions, those of one alone are compared"
    apart *= len(sessions) > 1
    sentences = [
        "Average precision and recall: COCO's, in percent"
        f" ({_facts(evaluation, split='split', images='images')}).",
        "Parameters: of the whole detector, the backbone's classification head included, in 10^6.",
        f"FLOPs: {listed(part.get('unit') for part in flops)}, in 10^9, of one image, the"
        " mask head left out as in published tables"
        f" ({_facts(flops, convention='convention', image_size='size', proposals='proposals')}).",
        f"Memory: the peak, MB = 10^6 and GB = 10^9 bytes ({_facts(memory, **_CONDITIONS)}).",
        "Latency: the median of one batch; its spread is the interquartile range"
        f" ({_facts(latency, **_CONDITIONS, threads='threads')}){apart}.",
        f"{MISSING} means that there is no such number.",
    ]
    uncounted = {
        f"{name} ({record.row})"
        for record in records
        for name in (record.flops or {}).get("uncounted") or ()
    }
    if uncounted:
        sentences.append(f"Operators without a formula, not counted: {listed(sorted(uncounted))}.")
    sentences += [
        f"Latency of {label}: {note}."
        for label, record in zip(labels(records), records, strict=True)
        for note in (record.latency or {}).get("notes") or ()
    ]
    return sentences


_CONDITIONS = {
    "kind": "kind",
    "device": "device",
    "batch_size": "batch size",
    "image_size": "size",
    "precision": "precision",
    "targets": "objects to train on in an image",
}


def _facts(parts: Sequence[Mapping[str, Any]], **names: str) -> str:
    """The values that `parts` have in the fields `names`, as a phrase."""
    facts = [
        f"{label} {listed(_said(part[field]) for part in parts if part.get(field) is not None)}"
        for field, label in names.items()
        if any(part.get(field) is not None for part in parts)
    ]
    return "; ".join(facts) or "not measured"


def _failures(records: Sequence[Record]) -> Section:
    named = zip(labels(records), records, strict=True)
    failed = [(name, one) for name, one in named if one.status == "failed"]
    return Section("Failures", [block for name, one in failed for block in _failure(name, one)])


def _failure(name: str, record: Record) -> Iterable[Block]:
    error = record.error or {}
    message = str(error.get("message"))
    kind = reason(str(error.get("kind")))
    yield f"{name} failed, {kind}: {' '.join(message.split())}"
    text = str(error.get("traceback") or "").rstrip()
    yield Code(text if message in text else f"{message}\n{text}".rstrip())


def _said(value: Any) -> str:
    """A size as height times width, anything else as it is."""
    return size(value) or "" if isinstance(value, list | tuple) else said(value)
