"""Tables and plots of counted multiply-adds: audits, published rows, and image sizes of a data set.

They are made of plain values, as `dataclasses.asdict` of the counts gives them, and of records.
"""

import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bench.record import Record
from report.load import PARTIAL, frame, published
from report.plots import Look, Plot, looks, render
from report.tables import METHODS, MISSING, Table, aligned

_MEGA, _GIGA = 1e6, 1e9
# Differences below this share of the whole are not explained: they vanish in the digits shown.
EXPLAINED = 1e-3
# Published numbers are reproduced within this share; where not, the row's note says what is known.
REPRODUCED = 2e-3
# The image and proposals that published numbers are of.
_PUBLISHED_SIZE, _PUBLISHED_PROPOSALS = [800, 1344], 1000
_BAR = 40


def audit(lines: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Return one line for each thing audited.

    Args:
        lines: `name`, `options`, `error`, `passed`, `declared`, `operators`, `fvcore`,
            `disagreement`, `fvcore_alone_missed`, `torch_on_cpu_missed` (shares), `uncounted`
            (calls, by counter and operator) and `failures` (why, by counter); multiply-adds.
        title: what was counted on, and how.
    """
    raw = pd.DataFrame(lines).drop(columns="failures")
    raw = raw.assign(
        options=[_options(line["options"]) for line in lines],
        uncounted=[_uncounted(line["uncounted"]) for line in lines],
    )
    shares = [name for name in raw.columns if name not in (*_WORDS, *_COUNTERS)]
    raw = raw.astype(dict.fromkeys(shares, "Float64") | dict.fromkeys(_COUNTERS, "Int64"))
    marks = ["" if line["passed"] else " !" for line in lines]
    shown = pd.DataFrame({"counted": [line["name"] for line in lines] + pd.Series(marks)})
    if raw["options"].ne("").any():
        shown["options"] = raw["options"].replace("", MISSING)
    for counter in _COUNTERS:
        shown[f"{counter} M"] = _millions(raw[counter])
    shown["disagree %"] = (100 * raw["disagreement"]).map(_percent)
    shown["fvcore alone misses %"] = (100 * raw["fvcore_alone_missed"]).map(_percent)
    shown["torch on CPU misses %"] = (100 * raw["torch_on_cpu_missed"]).map(_percent)
    notes = [
        "M = 10^6 multiply-adds of one image. Declared: closed forms; operators: what the"
        " dispatcher runs; fvcore: the traced graph, with handles for what fvcore lacks.",
        "Alone: fvcore without these handles, and torch's FlopCounterMode on a CPU; a negative"
        " share is what they count although it is no product of matrices.",
    ]
    for line, uncounted in zip(lines, raw["uncounted"], strict=True):
        name = " ".join(filter(None, (line["name"], _options(line["options"]))))
        if line["error"]:
            notes.append(f"{name}: not counted, {line['error']}")
        failures = line["failures"].items()
        notes += [f"{name}: {counter} counts nothing, {why}" for counter, why in failures]
        if uncounted:
            notes.append(f"{name}: uncounted, {uncounted}")
    failed = sum(not line["passed"] for line in lines)
    verdict = f"{failed} of {len(lines)} do not agree or are not complete (!)."
    notes.append(verdict if failed else f"All {len(lines)} agree, and nothing went uncounted.")
    return Table("audit", title, raw, shown, tuple(notes))


_COUNTERS = ("declared", "operators", "fvcore")
_WORDS = ("name", "options", "error", "passed", "uncounted", "unit")


def published_lines(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what `conventions` takes, of the records whose model and image are published ones."""
    known = {(row.row, row.arch, row.method): row for row in published().itertuples()}
    lines = []
    for label, record in zip(frame(records)["label"], records, strict=True):
        flops, model = record.flops or {}, record.model
        method = METHODS.get(str(model["method"]), model["method"])
        row: Any = known.get((record.row, model["arch"], method))
        if (
            row is None
            or flops.get("convention") != "actual"
            or list(flops.get("image_size", ())) != _PUBLISHED_SIZE
            or flops.get("proposals") != _PUBLISHED_PROPOSALS
        ):
            continue
        recounted = flops.get("published") or {}
        lines.append(
            {
                "row": label,
                "library": model["library"],
                "family": str(model["attention"]).split("/")[0].strip(),
                "published": row.flops_g * _GIGA,
                "recounted": recounted.get("total"),
                "actual": flops["total"],
                "differences": recounted.get("differences", []),
                "note": "" if pd.isna(row.note) else row.note,
            }
        )
    return lines


def conventions(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return FLOPs as published, counted again, and as they are, with the reasons.

    Args:
        lines: `row`, `published`, `recounted` (in the published convention, or None), `actual`
            (multiply-adds), `differences` (`attention`, `published`, `actual`, `reason`), `note`
            (of the published row), `counted_arch` (if the publication counted another ARCH string)
            and, if known, `library`, `published_parameters`, `parameters`.
    """
    raw = pd.DataFrame(lines)
    numbers = ["published", "recounted", "actual", "published_parameters", "parameters"]
    raw = raw.astype({name: "Float64" for name in numbers if name in raw.columns})
    raw["ratio"] = raw["actual"] / raw["published"]
    reasons = [_reasons(line) for line in lines]
    subjects: dict[str, dict[str, None]] = {}
    for subject, reason in itertools.chain.from_iterable(reasons):
        subjects.setdefault(reason, {})[subject] = None
    letters = dict(zip(subjects, _letters(), strict=False))
    shown = pd.DataFrame({"row": raw["row"]})
    if "library" in raw.columns and raw["library"].nunique() > 1:
        shown["library"] = raw["library"]
    if "parameters" in raw.columns:
        shown["published params M"] = (raw["published_parameters"] / _MEGA).map("{:.1f}".format)
        shown["counted params M"] = (raw["parameters"] / _MEGA).map("{:.2f}".format)
    shown["published G"] = (raw["published"] / _GIGA).map("{:.1f}".format)
    shown["recounted G"] = (raw["recounted"] / _GIGA).map(_tenth)
    shown["actual G"] = (raw["actual"] / _GIGA).map("{:.1f}".format)
    shown["actual / published"] = raw["ratio"].map("{:.3f}".format)
    shown["why"] = [", ".join(letters[reason] for _, reason in own) or MISSING for own in reasons]
    raw["why"] = ["; ".join(": ".join(pair) for pair in own) for own in reasons]
    raw = raw.drop(columns=["differences", "unit"], errors="ignore")
    notes = [
        "G = 10^9 multiply-adds of one image of 800x1344 with 1000 proposals, the mask head left"
        " out. Recounted: in the convention of the publication. Actual: what runs.",
        *(
            f"{letter}, {', '.join(subjects[reason])}: {reason}."
            for reason, letter in letters.items()
        ),
    ]
    return Table("conventions", "FLOPs published, recounted and actual", raw, shown, tuple(notes))


def _reasons(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Why the numbers of a line differ: what the reason is of, a mechanism or a row, and it."""
    reasons = [
        (difference["attention"], difference["reason"])
        for difference in line["differences"]
        if abs(difference["actual"] - difference["published"]) > EXPLAINED * line["actual"]
        and difference["reason"]
    ]
    recounted = line["recounted"]
    other = recounted and abs(recounted / line["published"] - 1) > REPRODUCED
    if line["note"] and (other or line.get("counted_arch")):
        reasons.append((line["row"], line["note"]))
    return reasons


def _letters() -> Iterable[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def conventions_plots(records: Sequence[Record]) -> list[Plot]:
    """Draw published and actual FLOPs of the records that are published rows, for each library."""
    lines = published_lines(records)
    libraries = list(dict.fromkeys(line["library"] for line in lines))
    several = len(libraries) > 1
    return [
        conventions_plot(
            [line for line in lines if line["library"] == library],
            suffix=f", {library}" if several else "",
        )
        for library in libraries
    ]


def conventions_plot(lines: Sequence[Mapping[str, Any]], *, suffix: str = "") -> Plot:
    """Draw published and actual FLOPs of every row as two marks and a line between them."""
    style = looks([line["family"] for line in lines])
    name = f"conventions{suffix.replace(', ', '-')}"
    title = f"FLOPs as published and as they are{suffix}"
    return render(name, title, lambda: _dumbbells(lines, style))


def _dumbbells(lines: Sequence[Mapping[str, Any]], style: Mapping[str, Look]) -> Figure:
    figure = Figure(figsize=(7.5, 1.1 + 0.3 * len(lines)), layout="constrained")
    ax = figure.subplots()
    for place, line in enumerate(lines):
        told, found = line["published"] / _GIGA, line["actual"] / _GIGA
        look = style[line["family"]]
        hollow = line["row"].startswith(PARTIAL)
        ax.plot([told, found], [place, place], color=look.colour, linewidth=2, zorder=2)
        ax.plot(told, place, "|", color="#222222", markersize=11, markeredgewidth=2, zorder=3)
        ax.plot(
            found,
            place,
            look.marker,
            color=look.colour,
            markerfacecolor="white" if hollow else look.colour,
            markeredgewidth=1.6,
            markersize=8,
            zorder=4,
        )
        ax.annotate(
            f"{_signed(100 * (found / told - 1))} %",
            (max(told, found), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.set_yticks(range(len(lines)), [line["row"] for line in lines])
    ax.invert_yaxis()
    ax.margins(x=0.16, y=0.5 / max(len(lines), 1))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("FLOPs (G multiply-adds): bar as published, mark as they are")
    return figure


def sizes(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return FLOPs of every row over the image sizes of a data set.

    Args:
        lines: `row`, `dataset`, `images`, `mean`, `deviation`, `minimum`, `maximum`, `one_size`
            (multiply-adds; the last at the size of published tables, or None), `padded_pixels`
            (share) and `fixed_size`.
    """
    raw = pd.DataFrame(lines)
    raw = raw.drop(columns=["by_size", "windows", "histogram", "unit"], errors="ignore")
    numbers = {name: raw[name].astype("Float64") / _GIGA for name in _SIZE_NUMBERS}
    shown = pd.DataFrame({"row": raw["row"]})
    shown["FLOPs G, mean ± deviation"] = [
        f"{mean:.1f} ± {deviation:.1f}"
        for mean, deviation in zip(numbers["mean"], numbers["deviation"], strict=True)
    ]
    for name in ("minimum", "maximum"):
        shown[f"{name} G"] = numbers[name].map("{:.1f}".format)
    shown["at 800x1344 G"] = numbers["one_size"].map(_tenth)
    shown["padded pixels %"] = (100 * raw["padded_pixels"]).map("{:.1f}".format)
    notes = [
        "G = 10^9 multiply-adds of one image, the mask head left out. Images are resized to a"
        " shortest edge of 800 and a longest of 1333, then padded to whole strides.",
    ]
    notes += [
        f"{line['row']}: works for one image size, so every image costs the same, that of"
        f" {line['fixed_size'][0]}x{line['fixed_size'][1]}."
        for line in lines
        if line["fixed_size"]
    ]
    images, dataset = lines[0]["images"], lines[0]["dataset"]
    title = f"FLOPs over the {images:,} image sizes of {dataset}"
    return Table("sizes", title, raw, shown, tuple(notes))


_SIZE_NUMBERS = ("mean", "deviation", "minimum", "maximum", "one_size")


def windows(lines: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return what padding costs the windows of each row, stage by stage, or None without windows.

    Args:
        lines: `row` and `windows` (`stage`, `attention`, `window`, `padded_queries` and
            `padded_products`, shares).
    """
    flat = [{"row": line["row"], **window} for line in lines for window in line["windows"]]
    if not flat:
        return None
    raw = pd.DataFrame(flat)
    shown = raw[["row", "stage", "attention"]].copy()
    shown["window"] = raw["window"].map(str)
    shown["padded queries %"] = (100 * raw["padded_queries"]).map("{:.1f}".format)
    shown["padded products %"] = (100 * raw["padded_products"]).map("{:.1f}".format)
    notes = (
        "Padded queries: the share that fills the grid up to whole windows. Padded products: the"
        " share of products of queries and keys of which one is no token: padding, or a window"
        " beyond the edge.",
    )
    return Table("windows", "Work of windows on padding", raw, shown, notes)


def histogram(line: Mapping[str, Any]) -> str:
    """Return a row's images by FLOPs as bars of text; `histogram` is (low, high, images) a bin."""
    bins = line["histogram"]
    most = max(images for _, _, images in bins)
    text = [f"{line['row']}: images by FLOPs (G multiply-adds)"]
    for low, high, images in bins:
        bar = "#" * round(_BAR * images / most)
        text.append(f"{low / _GIGA:8.1f} to {high / _GIGA:7.1f} {images:6,} {bar}".rstrip())
    return "\n".join(text) + "\n"


def sizes_plot(lines: Sequence[Mapping[str, Any]], name: str = "sizes") -> Plot:
    """Draw a row's images by FLOPs, one panel a row, each with an axis of its own."""
    title = f"Images of {lines[0]['dataset']} by FLOPs"
    return render(name, title, lambda: _histograms(lines))


def _histograms(lines: Sequence[Mapping[str, Any]]) -> Figure:
    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 5), 0.6 + 1.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in panels.flat[len(lines) :]:
        ax.set_visible(False)
    axes = panels.flat[: len(lines)]
    style = looks([line["family"] for line in lines])
    for ax, line in zip(axes, lines, strict=True):
        colour = style[line["family"]].colour
        totals = [size["total"] / _GIGA for size in line["by_size"]]
        weights = [size["images"] for size in line["by_size"]]
        ax.hist(totals, bins=30, weights=weights, color=colour)
        ax.axvline(line["mean"] / _GIGA, color="#222222", linewidth=1.2)
        ax.set_title(f"{line['row']}, mean {line['mean'] / _GIGA:.1f}", fontsize=9, loc="left")
    figure.supxlabel("FLOPs (G multiply-adds, one image); line: mean", fontsize=9)
    figure.supylabel("Images", fontsize=9)
    return figure


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _uncounted(uncounted: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{counter}: " + ", ".join(f"{name} ({calls})" for name, calls in names.items())
        for counter, names in uncounted.items()
    )


def _millions(values: pd.Series) -> pd.Series:
    return aligned(values / _MEGA)


def _percent(value: Any) -> str:
    # What rounds to nothing is nothing: no minus before it.
    return MISSING if pd.isna(value) else f"{round(float(value), 1) + 0.0:.1f}"


def _signed(value: float) -> str:
    rounded = round(value, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def _tenth(value: Any) -> str:
    return MISSING if pd.isna(value) else f"{value:.1f}"
