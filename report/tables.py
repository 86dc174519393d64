"""The tables of a suite, and tables as text, Markdown, LaTeX, HTML and CSV."""

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import PurePath

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from bench.record import FIGURES, Record
from report.columns import (
    AT_LEAST,
    METHODS,
    MISSING,
    Column,
    Table,
    Unit,
    decimals,
    joined,
    memory_unit,
    of_flops,
    reason,
    table,
    words,
)
from report.load import (
    KINDS,
    MODES,
    TEXT,
    Library,
    apart_note,
    code_note,
    finite_note,
    frame,
    per_library,
    published,
)
from report.searches import box_ap, find

BEST = ", best"
# Columns of text for a terminal.
WIDTH = 120
# Accuracy is published for this many images of this split, memory for this kind of peak.
PUBLISHED_SPLIT, PUBLISHED_IMAGES = "val2017", 5000
PUBLISHED_MEMORY = "allocator"

# What GitHub's Markdown takes for markup: anywhere, at the edge of a word, before a link or a name
# of a character.
_MARKDOWN = re.compile(
    r"[|*`<~$\\]|(?<![^\W_])_|_(?![^\W_])|\[(?=[^\]]*\][(\[:])|&(?=#?\w+;)", flags=re.ASCII
)
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # After the end of a line they belong to it.
    "[": "{[}",
    "*": "{*}",
    # What not every engine and font encoding has.
    AT_LEAST: r"$\geq$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    MISSING: r"\textendash{}",
}

# Letters from which on a cell is wrapped: scaled to the page, such a table is too small to read.
_WRAPPED = 60

# Latency, and of a training step.
_LATENCIES = {"latency": "inference", "latency_training": "training step"}


@per_library
def comparison(library: Library) -> Table:
    """Return the main table of each library."""
    data = library.data
    memory, mode = memory_column(data)
    columns = [
        Column("row", values="label"),
        Column("", "row", marked),
        Column("backbone", "Backbone"),
        Column("method", "Method", format=lambda names: words(names.replace(METHODS))),
        Column("attention", "attention"),
        Column("drop_path", "drop path"),
        Column("schedule", "schedule"),
        Column("box_map_percent", "box mAP {}", "box_AP", Unit.PERCENT),
        Column("mask_map_percent", "mask mAP {}", "mask_AP", Unit.PERCENT),
        Column("parameters", "params {}", unit=Unit.MEGA),
        *of_flops(),
        Column(f"memory_{mode}_bytes", f"memory {{}}, {mode}", memory, memory_unit(data[memory])),
        Column("latency_median_s", values="latency"),
        Column("latency_iqr_s", values="latency_iqr"),
        Column(
            "",
            "latency ms (median ± IQR)",
            joined(" ± ", ("latency", "latency_iqr"), Unit.MS),
        ),
        Column("search_best", values="best"),
        Column("init"),
        Column("pretrain", "pretrained on", optional=True),
        *map(Column, ("library", "library_version", "device", "precision", "seeds", "commit")),
        *map(Column, ("created", "status")),
        Column("error", values="error_kind"),
        Column("key"),
    ]
    notes = [*apart_note(data), *finite_note(data), *code_note(data)]
    return table("comparison", "Comparison", data, columns, notes)


def marked(data: pd.DataFrame) -> pd.Series:
    """Return the label of each row, with what a reader has to know to compare it.

    That is the checkpoint that it started from, where rows started from different ones; what ended
    it; and that it is the best of its search.
    """
    label = data["label"]
    start = data["init"].fillna("scratch").map(lambda path: PurePath(path).name)
    if start.nunique() > 1:
        label = label + " (from " + start + ")"
    failed = data["status"] == "failed"
    why = " (failed: " + data["error_kind"].map(reason, na_action="ignore") + ")"
    best = data["best"].fillna(False).astype(bool)
    return label.mask(failed, label + why).mask(best, label + BEST)


@per_library
def searches(library: Library) -> Table | None:
    """Return every value of searched settings and the best of each, for each library."""
    found = find(library.records)
    if not found:
        return None
    lines = pd.DataFrame(
        {
            "row": search.row,
            "setting": search.setting,
            "value": value,
            "box_map_percent": box_ap(record),
            "best": search.best is not None and search.best[1] is record,
            "status": record.status,
            "key": record.key,
        }
        for search in found
        for value, record in search.tried
    )
    columns = [
        *(Column(name, name) for name in ("row", "setting", "value")),
        Column("box_map_percent", "box mAP {}", unit=Unit.PERCENT),
        Column("best", "best", format=lambda best: best.map({True: "best", False: ""})),
        Column("status", "status"),
        Column("key"),
    ]
    note = (
        "The best value is chosen by box mAP on the images that the tables report, which makes this"
        " mAP somewhat too high."
    )
    return table("searches", "Searched settings", lines, columns, [note])


@per_library
def figures(library: Library) -> Table:
    """Return all twelve figures of COCO for boxes and masks, for each library."""
    data = library.data
    # A detector without masks needs no lines for them.
    kinds = KINDS if data["mask_AP"].notna().any() else KINDS[:1]
    lines = pd.DataFrame(
        {"row": line["label"], "of": kind}
        | {figure: line[f"{kind}_{figure}"] for figure in FIGURES}
        for line in data.to_dict("records")
        for kind in kinds
    )
    columns = [
        Column("row"),
        # The name once for the pair of lines.
        Column("", "row", lambda rows: rows["row"].where(rows["of"] == KINDS[0], "")),
        Column("of", "of"),
        *_figure_columns(),
    ]
    return table("coco_figures", "All COCO figures, %", lines, columns)


def _figure_columns() -> list[Column]:
    return [Column(figure, figure, unit=Unit.PERCENT) for figure in FIGURES]


def further_splits(records: Sequence[Record]) -> Table | None:
    """Return the figures of the splits evaluated besides the first, or None if there are none."""
    data = frame(records)
    lines = [
        {
            "row": f"{label} ({library})",
            "split": entry["split"],
            "images": entry["images"],
            "of": kind,
            **{figure: entry[kind].get(figure) for figure in FIGURES},
        }
        for label, library, record in zip(data["label"], data["library"], records, strict=True)
        for entry in (record.evaluation or {}).get("also", ())
        for kind in KINDS
        if entry.get(kind)
    ]
    if not lines:
        return None
    columns = [Column("row", "row"), Column("split", "split"), Column("images"), Column("of", "of")]
    columns += _figure_columns()
    return table("further_splits", "Further splits, %", pd.DataFrame(lines), columns)


@per_library
def details(library: Library) -> Table:
    """Return training time, quartiles, memory and notes, for each library."""
    data = library.data
    unit = memory_unit(data["memory_inference"], data["memory_training"])
    columns = [
        Column("row", "row", "label"),
        Column("seeds"),
        Column("steps", "steps", unit=Unit.ONE, format=decimals(0)),
        Column("batch_size"),
        Column("train_seconds", "training {}", unit=Unit.MINUTES, format=decimals(1)),
        Column("steps_per_second", "steps/s", unit=Unit.ONE),
        Column("images_per_second"),
    ]
    for stem, what in _LATENCIES.items():
        times = [f"{stem}_q1", stem, f"{stem}_q3"]
        values = joined(" / ", times, Unit.MS)
        columns += [*map(Column, times), Column("", f"{what} ms q1 / median / q3", values)]
    columns += [
        *(Column(f"memory_{mode}", f"memory {{}}, {mode}", unit=unit) for mode in MODES),
        Column("notes", "notes", optional=True),
    ]
    return table("details", "Details", data, columns)


@per_library
def latencies(library: Library) -> Table | None:
    """Return the percentiles of inference and its images a second, for each library."""
    data = library.data
    times = ("latency_q1", "latency", "latency_q3", "latency_p90", "latency_p95")
    if data["latency_p90"].isna().all():
        return None
    names = ("q1", "median", "q3", "p90", "p95")
    columns = [
        Column("row", "row", "label"),
        Column("batch_size", "batch", "latency_batch", Unit.ONE, decimals(0)),
        *(
            Column(f"{name}_s", f"{name} {{}}", time, Unit.MS, decimals(1))
            for name, time in zip(names, times, strict=True)
        ),
        Column("images_per_second", "images/s", "latency_rate", Unit.ONE),
    ]
    note = "Of 10 calls 9 take no longer than p90; profile --what throughput tries other batches."
    return table("latencies", "Latency of inference", data, columns, [note])


def against_published(records: Sequence[Record]) -> Table | None:
    """Return measured numbers beside the published ones, or None if no row is a published one.

    A row is a published one if name, ARCH string, method and schedule agree; any value of a search
    is compared. Accuracy is compared only where the whole published split was evaluated, memory
    only where a GPU's was measured.
    """
    measured = frame(records)
    measured["method"] = measured["method"].replace(METHODS)
    known = published().rename(columns={"row": "base"})
    both = measured.merge(known, on=["base", "arch", "method", "schedule"], suffixes=("", "_"))
    whole = (both["split"] == PUBLISHED_SPLIT) & (both["images"] == PUBLISHED_IMAGES)
    whole = whole.fillna(False).astype(bool)
    on_gpu = (both["memory_kind"] == PUBLISHED_MEMORY).fillna(False).astype(bool)
    quantities = {
        "box mAP %": ("box_map", both["box_AP"].where(whole)),
        "mask mAP %": ("mask_map", both["mask_AP"].where(whole)),
        "params M": ("params_m", both["parameters"] / Unit.MEGA.size),
        "FLOPs G": ("flops_g", both["flops"] / Unit.GIGA.size),
        "training memory GB": (
            "memory_gb",
            (both["memory_training"] / Unit.GIGA.size).where(on_gpu),
        ),
    }
    lines = pd.DataFrame(
        {
            "row": both.loc[i, "label"],
            "library": both.loc[i, "library"],
            "drop_path": both.loc[i, "drop_path"],
            "published_drop_path": both.loc[i, "drop_path_"],
            "quantity": quantity,
            "published": both.loc[i, column],
            "measured": values[i],
        }
        for i in both.index
        for quantity, (column, values) in quantities.items()
        if pd.notna(both.loc[i, column]) and pd.notna(values[i])
    )
    if lines.empty:
        return None
    columns = [
        Column("row", "row"),
        Column("library", "library"),
        Column("drop_path"),
        Column("published_drop_path"),
        Column("quantity", "quantity"),
        Column("published", "published", unit=Unit.ONE, format=decimals(2)),
        Column("measured", "measured", unit=Unit.ONE, format=decimals(2)),
        Column(
            "difference",
            "difference",
            lambda rows: rows["measured"] - rows["published"],
            Unit.ONE,
            decimals(2, sign=True),
        ),
        Column(
            "ratio",
            "measured / published",
            lambda rows: rows["measured"] / rows["published"],
            Unit.ONE,
            decimals(3),
        ),
    ]
    notes = _published_notes(lines, both[both["label"].isin(lines["row"])])
    return table("published", "Measured and published", lines, columns, notes)


def _published_notes(lines: pd.DataFrame, both: pd.DataFrame) -> list[str]:
    """Return how the rows that are compared were counted and trained.

    Args:
        lines: of the table.
        both: the rows in it, measured and published.
    """
    conventions = ", ".join(sorted(both["flops_convention"].dropna().unique())) or MISSING
    notes = [f"Measured FLOPs are counted in this convention: {conventions}."]
    other = lines.loc[lines["drop_path"] != lines["published_drop_path"], "row"].unique()
    if len(other):
        notes.append(f"Drop path differs from the published one in: {', '.join(other)}.")
    for title, facts in (("Trained", _training(both)), ("Published", both["note"])):
        for fact, rows in both["label"].groupby(facts, sort=False):
            which = "" if len(rows) == len(both) else f" ({', '.join(rows)})"
            notes.append(f"{title}: {fact}{which}.")
    return notes


def _training(both: pd.DataFrame) -> pd.Series:
    """How each row was trained, beside how the published one was; missing for untrained rows."""
    start = both["pretrain"].fillna(both["init"]).fillna("no pretrained weights")
    return (
        both["steps"].astype(TEXT)
        + " steps of "
        + both["batch_size"].astype(TEXT)
        + " images from "
        + start
        + "; the published row started from a classifier of "
        + both["pretrain_"]
    )


def memory_column(data: pd.DataFrame) -> tuple[str, str]:
    """Return the column of `frame` that tables and plots show as memory, and its mode."""
    mode = "training" if data["memory_training"].notna().any() else "inference"
    return f"memory_{mode}", mode


def to_text(shown: pd.DataFrame, width: int = WIDTH) -> str:
    """Return the table for a terminal of `width` columns; long cells wrap."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in shown.columns:
        numeric = is_numeric(shown[name])
        # Numbers never wrap; their headers do, so that they are no wider than they need to be.
        words = [*name.split(), *shown[name]] if numeric else [name]
        table.add_column(
            escape(textwrap.fill(name, max(map(len, words)))),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    for values in shown.itertuples(index=False):
        table.add_row(*(escape(value) for value in values))
    buffer = io.StringIO()
    console = Console(
        emoji=False, file=buffer, width=width, color_system=None, force_terminal=False
    )
    if console.measure(table, options=console.options.update(width=10 * width)).maximum > width:
        table.padding = 0
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def to_markdown(shown: pd.DataFrame) -> str:
    """Return the table as a pipe table of GitHub's Markdown."""
    cells = shown.map(in_markdown).rename(columns=in_markdown)
    align = ["right" if is_numeric(shown[name]) else "left" for name in shown.columns]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def to_latex(shown: pd.DataFrame, *, caption: str = "", label: str = "") -> str:
    """Return the table as a LaTeX tabular with the rules of booktabs.

    With a caption it stands in a float, no wider than the page, for which LaTeX needs the packages
    booktabs and adjustbox.
    """
    align = "".join(_column_type(shown[name]) for name in shown.columns)
    cells = shown.map(in_latex).rename(columns=in_latex)
    body = cells.to_latex(index=False, escape=False, column_format=align)
    if not caption:
        return body
    lines = (
        "% Needs \\usepackage{booktabs,adjustbox}.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{in_latex(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\begin{adjustbox}{max width=\textwidth}",
        body.rstrip(),
        r"\end{adjustbox}",
        r"\end{table*}",
    )
    return "\n".join(lines) + "\n"


def to_csv(raw: pd.DataFrame) -> str:
    """Return the table as CSV: units of the records, full precision, missing values empty."""
    return raw.to_csv(index=False, lineterminator="\n")


def is_numeric(column: pd.Series) -> bool:
    """Whether strings are numbers, their spreads or missing, which stand to the right."""
    part = r"[+-]?[\d.,]+"
    pattern = rf"{MISSING}|{part}(?: [±/] {part})*"
    return len(column) > 0 and bool(column.str.fullmatch(pattern).all())


def in_markdown(text: str) -> str:
    """Return a text in one line of GitHub's Markdown that shows it as it is, within a line."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def in_latex(text: str) -> str:
    """Return a text in one line of LaTeX that shows it as it is."""
    line = "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))
    # Two hyphens would be one dash.
    return line.replace("--", "-{}-")


def _column_type(column: pd.Series) -> str:
    """Return LaTeX's type of a column: numbers right, texts left, long ones wrapped."""
    if is_numeric(column):
        return "r"
    words = " ".join(column).split()
    wrapped = column.str.len().max() > _WRAPPED > max(map(len, words), default=0)
    return r"p{0.4\textwidth}" if wrapped else "l"
