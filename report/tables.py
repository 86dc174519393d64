"""Tables of records: raw numbers for computing, and the same as text for reading.

A `Table` holds both; text, Markdown, LaTeX and HTML come from its `shown`, CSV from its `raw`.
"""

import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from bench.record import Record
from report.load import FIGURES, frame, published
from report.searches import Search, box_ap, find

MISSING = "\N{EN DASH}"
BEST = ", best"
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
# Accuracy is published for this many images of this split, memory for this kind of peak.
PUBLISHED_SPLIT, PUBLISHED_IMAGES = "val2017", 5000
PUBLISHED_MEMORY = "allocator"

_MEGA, _GIGA = 1e6, 1e9
_LATENCIES = ("latency", "latency_training")


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: for file names.
        title: heading.
        raw: numbers in the units of the records, at full precision.
        shown: the same rows as strings, units in the headers.
        notes: sentences that belong under it.
    """

    name: str
    title: str
    raw: pd.DataFrame
    shown: pd.DataFrame
    notes: tuple[str, ...] = ()


def comparison(records: Sequence[Record]) -> list[Table]:
    """Return the main table, one for each detector library: never two libraries in one column."""
    return by_library(records, _comparison)


def searches(records: Sequence[Record]) -> list[Table]:
    """Return every value of searched settings and the best of each, one table for each library."""
    libraries = list(dict.fromkeys(str(record.model["library"]) for record in records))
    tables = []
    for library in libraries:
        found = find([record for record in records if record.model["library"] == library])
        if found:
            tables.append(_searches(found, f", {library}" if len(libraries) > 1 else ""))
    return tables


def figures(records: Sequence[Record]) -> list[Table]:
    """Return all twelve figures of COCO for boxes and masks, one table for each library."""
    return by_library(records, _figures)


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
        for kind in ("box", "mask")
        if entry.get(kind)
    ]
    if not lines:
        return None
    raw = pd.DataFrame(lines).astype(dict.fromkeys(FIGURES, "Float64"))
    shown = raw[["row", "split", "of"]].join(raw[list(FIGURES)].map(_number(1)))
    return Table("further_splits", "Further splits, %", raw, shown)


def details(records: Sequence[Record]) -> list[Table]:
    """Return training time, quartiles, memory and notes, one table for each library."""
    return by_library(records, _details)


def against_published(records: Sequence[Record]) -> Table | None:
    """Return measured numbers beside the published ones, or None if no row is a published one.

    A row is a published one if name, ARCH string, method and schedule agree; any value of a search
    is compared. Accuracy is compared
    only where the whole published split was evaluated, memory only where a GPU's was measured.
    """
    measured = frame(records)
    measured["method"] = measured["method"].replace(METHODS)
    known = published().rename(columns={"row": "base"})
    both = measured.merge(known, on=["base", "arch", "method", "schedule"], suffixes=("", "_"))
    if both.empty:
        return None
    whole = (both["split"] == PUBLISHED_SPLIT) & (both["images"] == PUBLISHED_IMAGES)
    whole = whole.fillna(False).astype(bool)
    on_gpu = (both["memory_kind"] == PUBLISHED_MEMORY).fillna(False).astype(bool)
    quantities = {
        "box mAP %": ("box_map", both["box_AP"].where(whole)),
        "mask mAP %": ("mask_map", both["mask_AP"].where(whole)),
        "params M": ("params_m", both["parameters"] / _MEGA),
        "FLOPs G": ("flops_g", both["flops"] / _GIGA),
        "training memory GB": ("memory_gb", (both["memory_training"] / _GIGA).where(on_gpu)),
    }
    parts = [
        pd.DataFrame(
            {
                "row": both["label"],
                "library": both["library"],
                "drop_path": both["drop_path"],
                "published_drop_path": both["drop_path_"],
                "quantity": quantity,
                "published": both[column].astype("Float64"),
                "measured": values.astype("Float64"),
            }
        )
        for quantity, (column, values) in quantities.items()
    ]
    raw = pd.concat(parts, keys=range(len(parts)), names=["part", "place"])
    raw = raw.sort_values(["place", "part"]).dropna(subset=["published", "measured"])
    raw = raw.reset_index(drop=True)
    if raw.empty:
        return None
    raw["difference"] = raw["measured"] - raw["published"]
    raw["ratio"] = raw["measured"] / raw["published"]
    shown = pd.DataFrame(
        {
            "row": raw["row"],
            "library": raw["library"],
            "quantity": raw["quantity"],
            "published": raw["published"].map(_number(2)),
            "measured": raw["measured"].map(_number(2)),
            "difference": raw["difference"].map(_number(2, sign=True)),
            "measured / published": raw["ratio"].map(_number(3)),
        }
    )
    conventions = ", ".join(sorted(both["flops_convention"].dropna().unique())) or MISSING
    notes = [f"Measured FLOPs are counted in this convention: {conventions}."]
    other = raw.loc[raw["drop_path"] != raw["published_drop_path"], "row"].unique()
    if len(other):
        notes.append(f"Drop path differs from the published one in: {', '.join(other)}.")
    own = both[both["label"].isin(raw["row"])]
    for title, told in (("Trained", _training(own)), ("Published", own["note"])):
        for fact, rows in own["label"].groupby(told, sort=False):
            which = "" if len(rows) == len(own) else f" ({', '.join(rows)})"
            notes.append(f"{title}: {fact}{which}.")
    return Table("published", "Measured and published", raw, shown, tuple(notes))


def _training(both: pd.DataFrame) -> pd.Series:
    """How each row was trained, beside how the published one was; missing for untrained rows."""
    start = both["init"].fillna("no pretrained weights")
    return (
        both["steps"].astype("string")
        + " steps of "
        + both["batch_size"].astype("string")
        + " images from "
        + start
        + "; the published row started from a classifier of "
        + both["pretrain"]
    )


def to_text(shown: pd.DataFrame, width: int = 120) -> str:
    """Return the table for a terminal of `width` columns; long cells wrap."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in shown.columns:
        numeric = _numeric(shown[name])
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
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False)
    if console.measure(table, options=console.options.update(width=10 * width)).maximum > width:
        table.padding = 0
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def to_markdown(shown: pd.DataFrame) -> str:
    """Return the table as a pipe table of GitHub's Markdown."""
    cells = shown.map(lambda value: re.sub(r"([|*`<\\])", r"\\\1", " ".join(value.split())))
    align = ["right" if _numeric(shown[name]) else "left" for name in shown.columns]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def to_latex(shown: pd.DataFrame, *, caption: str = "", label: str = "") -> str:
    """Return the table as a LaTeX tabular with the rules of booktabs.

    With a caption it stands in a float, no wider than the page, for which LaTeX needs the packages
    booktabs and adjustbox.
    """
    align = "".join("r" if _numeric(shown[name]) else "l" for name in shown.columns)
    plain = shown.map(lambda value: " ".join(value.split()))
    body = plain.to_latex(index=False, escape=True, column_format=align)
    if not caption:
        return body
    lines = (
        "% Needs \\usepackage{booktabs,adjustbox}.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_latex(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\begin{adjustbox}{max width=\textwidth}",
        body.rstrip(),
        r"\end{adjustbox}",
        r"\end{table*}",
    )
    return "\n".join(lines) + "\n"


def to_html(shown: pd.DataFrame, name: str) -> str:
    """Return the table as HTML with the identifier `T_{name}`."""
    numeric = [place for place, column in enumerate(shown.columns) if _numeric(shown[column])]
    styler = Styler(_escaped(shown), uuid=name, cell_ids=False).hide(axis="index")
    if numeric:
        every = ", ".join(f".col{place}" for place in numeric)
        cells = ", ".join(f"td.col{place}" for place in numeric)
        styler = styler.set_table_styles(
            [
                {"selector": every, "props": "text-align: right"},
                {"selector": cells, "props": "white-space: nowrap"},
            ]
        )
    return styler.to_html()


def to_csv(raw: pd.DataFrame) -> str:
    """Return the table as CSV: units of the records, full precision, missing values empty."""
    return raw.to_csv(index=False, lineterminator="\n")


def by_library(
    records: Sequence[Record], build: Callable[[pd.DataFrame, str], Table]
) -> list[Table]:
    """Return what `build` makes of the frame of each library, and of what its titles end in."""
    data = frame(records)
    libraries = list(data["library"].unique())
    several = len(libraries) > 1
    tables = []
    for library in libraries:
        part = data[data["library"] == library].reset_index(drop=True)
        tables.append(build(part, f", {library}" if several else ""))
    return tables


def _comparison(data: pd.DataFrame, suffix: str) -> Table:
    memory, mode = memory_column(data)
    unit, size = memory_unit(data[memory])
    spread = data["latency_q3"] - data["latency_q1"]
    raw = pd.DataFrame(
        {
            "row": data["label"],
            "backbone": data["backbone"],
            "method": data["method"],
            "attention": data["attention"],
            "drop_path": data["drop_path"],
            "schedule": data["schedule"],
            "box_map_percent": data["box_AP"],
            "mask_map_percent": data["mask_AP"],
            "parameters": data["parameters"],
            "flops_multiply_adds": data["flops"],
            f"memory_{mode}_bytes": data[memory],
            "latency_median_s": data["latency"],
            "latency_iqr_s": spread,
            "search_best": data["best"],
            "library": data["library"],
            "library_version": data["library_version"],
            "device": data["device"],
            "precision": data["precision"],
            "seed": data["seed"],
            "commit": data["commit"],
            "created": data["created"],
            "status": data["status"],
            "error": data["error_kind"],
            "key": data["key"],
        }
    )
    latency = [
        MISSING if pd.isna(middle) else f"{middle:.1f} ± {width:.1f}"
        for middle, width in zip(data["latency"] * 1e3, spread * 1e3, strict=True)
    ]
    shown = pd.DataFrame(
        {
            "row": _rows(data),
            "Backbone": data["backbone"].fillna(MISSING),
            "Method": data["method"].replace(METHODS),
            "attention": data["attention"].fillna(MISSING),
            "drop path": data["drop_path"].map(_plain_number),
            "schedule": data["schedule"].fillna(MISSING),
            "box mAP %": data["box_AP"].map(_number(1)),
            "mask mAP %": data["mask_AP"].map(_number(1)),
            "params M": aligned(data["parameters"] / _MEGA),
            "FLOPs G": aligned(data["flops"] / _GIGA),
            f"memory {unit}, {mode}": aligned(data[memory] / size),
            "latency ms (median ± IQR)": latency,
        }
    )
    return Table(f"comparison{_slug(suffix)}", f"Comparison{suffix}", raw, shown)


def _searches(found: Sequence[Search], suffix: str) -> Table:
    raw = pd.DataFrame(
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
    number = _number(1)
    shown = pd.DataFrame(
        {
            "row": search.row,
            "setting": search.setting,
            "best value": MISSING if search.best is None else search.best[0],
            "box mAP %": MISSING if search.best is None else number(box_ap(search.best[1])),
            "box mAP % by value": ", ".join(
                f"{value}: {'failed' if record.status == 'failed' else number(box_ap(record))}"
                for value, record in search.tried
            ),
        }
        for search in found
    )
    notes = (
        "The best value is chosen by box mAP on the images that the tables report, which makes this"
        " mAP somewhat too high.",
    )
    return Table(f"searches{_slug(suffix)}", f"Searched settings{suffix}", raw, shown, notes)


def _figures(data: pd.DataFrame, suffix: str) -> Table:
    # A detector without masks needs no lines for them.
    kinds = ["box", "mask"] if data["mask_AP"].notna().any() else ["box"]
    parts = []
    for kind in kinds:
        part = data[[f"{kind}_{figure}" for figure in FIGURES]]
        part = part.set_axis(list(FIGURES), axis="columns")
        parts.append(pd.concat([data["label"].rename("row"), part], axis="columns"))
    raw = pd.concat(parts, keys=kinds, names=["of", "place"]).reset_index()
    raw = raw.sort_values(["place", "of"]).drop(columns="place")
    raw = raw[["row", "of", *FIGURES]].reset_index(drop=True)
    shown = raw[list(FIGURES)].map(_number(1))
    shown.insert(0, "of", raw["of"])
    # The name once for the pair of lines.
    shown.insert(0, "row", raw["row"].where(raw["of"] == "box", ""))
    return Table(f"coco_figures{_slug(suffix)}", f"All COCO figures, %{suffix}", raw, shown)


def _details(data: pd.DataFrame, suffix: str) -> Table:
    unit, size = memory_unit(pd.concat([data["memory_inference"], data["memory_training"]]))
    times = [f"{stem}{part}" for stem in _LATENCIES for part in ("_q1", "", "_q3")]
    columns = ["label", "seed", "steps", "batch_size", "train_seconds", "steps_per_second"]
    columns += ["images_per_second", *times, "memory_inference", "memory_training", "notes"]
    raw = data[columns].rename(columns={"label": "row"})

    def quartiles(stem: str) -> list[str]:
        parts = data[[f"{stem}_q1", stem, f"{stem}_q3"]] * 1e3
        return [
            MISSING if parts.loc[i].isna().any() else " / ".join(f"{v:.1f}" for v in parts.loc[i])
            for i in parts.index
        ]

    shown = pd.DataFrame(
        {
            "row": data["label"],
            "training min": (data["train_seconds"] / 60).map(_number(1)),
            "steps": data["steps"].map(_number(0)),
            "steps/s": aligned(data["steps_per_second"]),
            "inference ms q1 / median / q3": quartiles(_LATENCIES[0]),
            "training step ms q1 / median / q3": quartiles(_LATENCIES[1]),
            f"memory {unit}, inference": aligned(data["memory_inference"] / size),
            f"memory {unit}, training": aligned(data["memory_training"] / size),
            "notes": data["notes"].replace("", MISSING).fillna(MISSING),
        }
    )
    if (shown["notes"] == MISSING).all():
        shown = shown.drop(columns="notes")
    return Table(f"details{_slug(suffix)}", f"Details{suffix}", raw, shown)


def memory_column(data: pd.DataFrame) -> tuple[str, str]:
    """Return the column of `frame` that tables and plots show as memory, and its mode."""
    mode = "training" if data["memory_training"].notna().any() else "inference"
    return f"memory_{mode}", mode


def memory_unit(values: pd.Series) -> tuple[str, float]:
    """Return the unit that suits the largest of `values` (bytes), and its size in bytes."""
    large = values.notna().any() and values.max() >= 10 * _GIGA
    return ("GB", _GIGA) if large else ("MB", _MEGA)


def reason(kind: str) -> str:
    """Return an error's kind as a person would say it."""
    return REASONS.get(kind, kind)


def aligned(values: pd.Series) -> pd.Series:
    """Return `values` as strings with one number of decimals, enough to tell them apart."""
    largest = values.max() if values.notna().any() else 0
    decimals = 0 if largest >= 1000 else 1 if largest >= 100 else 2
    return values.map(_number(decimals))


def _rows(data: pd.DataFrame) -> pd.Series:
    failed = data["status"] == "failed"
    why = " (failed: " + data["error_kind"].map(reason, na_action="ignore") + ")"
    best = data["best"].fillna(False).astype(bool)
    return data["label"].mask(failed, data["label"] + why).mask(best, data["label"] + BEST)


def _number(decimals: int, *, sign: bool = False) -> Callable[[Any], str]:
    form = f"{'+' if sign else ''},.{decimals}f"
    return lambda value: MISSING if pd.isna(value) else format(value, form)


def _plain_number(value: Any) -> str:
    return MISSING if pd.isna(value) else f"{value:g}"


def _numeric(column: pd.Series) -> bool:
    part = r"[+-]?[\d.,]+"
    pattern = rf"{MISSING}|{part}(?: [±/] {part})*"
    return len(column) > 0 and bool(column.str.fullmatch(pattern).all())


def _escaped(shown: pd.DataFrame) -> pd.DataFrame:
    cells = shown.map(html.escape)
    cells.columns = [html.escape(name) for name in shown.columns]
    return cells


def _latex(text: str) -> str:
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(named.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _slug(suffix: str) -> str:
    return suffix.replace(", ", "-")
