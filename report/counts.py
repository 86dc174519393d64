"""Tables of counted multiply-adds: audits, published rows, and image sizes of a data set.

They are made of plain values, as `dataclasses.asdict` of the counts gives them, and of records.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.record import Record
from report.columns import (
    METHODS,
    Column,
    Table,
    Unit,
    decimals,
    joined,
    letters_of,
    table,
)
from report.load import calls, family, labels, published, unsummed

# Differences below this share of the whole are not explained: they vanish in the digits shown.
EXPLAINED = 1e-3
# Published numbers are reproduced within this share; where not, the row's note says what is known.
REPRODUCED = 2e-3
# The image and proposals that published numbers are of.
_PUBLISHED_SIZE, _PUBLISHED_PROPOSALS = [800, 1344], 1000
_BAR = 40
_COUNTERS = ("declared", "operators", "fvcore")
# Of a line of an audit: sentences, which are no column.
_SAID = ("failures", "notes")


def audit(lines: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Return one line for each thing audited.

    Args:
        lines: `name`, `options`, `error`, `passed`, `declared`, `operators`, `fvcore`,
            `disagreement`, `fvcore_alone_missed`, `torch_on_cpu_missed` (shares), `uncounted`
            (calls, by counter and operator), `failures` (why, by counter), `notes`
            and `unsummed` (products of elements); multiply-adds.
        title: what was counted on, and how.
    """
    data = pd.DataFrame(
        {
            **{name: value for name, value in line.items() if name not in _SAID},
            "options": _options(line["options"]) or None,
            "uncounted": _uncounted(line["uncounted"]) or None,
        }
        for line in lines
    ).astype(dict.fromkeys(_COUNTERS, "Int64"))
    columns = [
        Column("name"),
        Column(
            "", "counted", lambda rows: rows["name"] + rows["passed"].map({True: "", False: " !"})
        ),
        Column("options", "options", optional=True),
        Column("error"),
        Column("passed"),
        *(Column(counter, f"{counter} {{}}", unit=Unit.MEGA) for counter in _COUNTERS),
        Column("disagreement", "disagree {}", unit=Unit.SHARE),
        Column("fvcore_alone_missed", "fvcore alone misses {}", unit=Unit.SHARE),
        Column("torch_on_cpu_missed", "torch on CPU misses {}", unit=Unit.SHARE),
        Column("uncounted"),
        Column("unsummed"),
        Column("unit"),
    ]
    notes = [
        "M = 10^6 multiply-adds of one image. Declared: closed forms; operators: what the"
        " dispatcher runs; fvcore: the traced graph, with handles for what fvcore lacks.",
        "Alone: fvcore without these handles, and torch's FlopCounterMode on a CPU; a negative"
        " share is what they count although it is not a product of matrices.",
    ]
    for line in lines:
        name = " ".join(filter(None, (line["name"], _options(line["options"]))))
        uncounted = _uncounted(line["uncounted"])
        if line["error"]:
            notes.append(f"{name}: not counted, {line['error']}")
        failures = line["failures"].items()
        notes += [f"{name}: {counter} counts nothing, {why}" for counter, why in failures]
        if uncounted:
            notes.append(f"{name}: uncounted, {uncounted}")
        notes += [f"{name}: {note}" for note in line["notes"]]
        left_out = unsummed({**line, "total": line["operators"]})
        if left_out:
            notes.append(f"{name}: not counted, as in no sum: {left_out} products of elements")
    failed = sum(not line["passed"] for line in lines)
    verdict = f"{failed} of {len(lines)} do not agree or are not complete (!)."
    notes.append(
        verdict if failed else f"All {len(lines)} agree, and no operator that ran lacks a formula."
    )
    return table("audit", title, data, columns, notes)


def published_lines(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what `conventions` takes, of the records whose model and image are published ones."""
    known = {(row.row, row.arch, row.method): row for row in published().itertuples()}
    lines = []
    for label, record in zip(labels(records), records, strict=True):
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
                "family": family(record),
                "published": row.flops_g * Unit.GIGA.size,
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
    reasons = [_reasons(line) for line in lines]
    subjects: dict[str, dict[str, None]] = {}
    for subject, reason in itertools.chain.from_iterable(reasons):
        subjects.setdefault(reason, {})[subject] = None
    letters = dict(zip(subjects, letters_of(len(subjects)), strict=True))
    data = pd.DataFrame(lines)
    data["letters"] = [", ".join(letters[why] for _, why in own) or None for own in reasons]
    data["why"] = ["; ".join(map(": ".join, own)) for own in reasons]
    several = "library" in data.columns and data["library"].nunique() > 1
    columns = [
        Column("row", "row"),
        Column("library", "library" * several),
        *map(Column, ("method", "family", "note", "counted_arch")),
        Column("published_parameters", "published params {}", unit=Unit.MEGA),
        Column("parameters", "counted params {}", unit=Unit.MEGA),
        Column("published", "published {}", unit=Unit.GIGA, format=decimals(1)),
        Column("recounted", "recounted {}", unit=Unit.GIGA, format=decimals(1)),
        Column("actual", "actual {}", unit=Unit.GIGA, format=decimals(1)),
        Column(
            "ratio",
            "actual / published",
            lambda rows: rows["actual"] / rows["published"],
            Unit.ONE,
            decimals(3),
        ),
        Column("", "why", "letters"),
        Column("why"),
    ]
    notes = [
        "G = 10^9 multiply-adds of one image of 800x1344 with 1000 proposals, the mask head left"
        " out. Recounted: in the convention of the publication. Actual: what runs.",
        *(f"{letter}, {', '.join(subjects[why])}: {why}." for why, letter in letters.items()),
    ]
    title = "FLOPs published, recounted and actual"
    return table("conventions", title, data, columns, notes)


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


def sizes(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return FLOPs of every row over the image sizes of a data set.

    Args:
        lines: `row`, `dataset`, `images`, `mean`, `deviation`, `minimum`, `maximum`, `one_size`
            (multiply-adds; the last at the size of published tables, or None), `padded_pixels`
            (share), `fixed_size`, `uncounted`, calls by operator, and `unsummed`, products of
            elements that are in no sum, at that size.
    """
    lacks = "uncounted"
    columns = [
        Column("row", "row"),
        *map(Column, ("dataset", "images", "family", "proposals", "fixed_size")),
        Column("uncounted"),
        Column(
            "",
            "FLOPs G, mean ± deviation",
            joined(" ± ", ("mean", "deviation"), Unit.GIGA),
            lacks=lacks,
            aside="left_out",
        ),
        Column("mean"),
        Column("deviation"),
        *(
            Column(name, title, unit=Unit.GIGA, format=decimals(1), lacks=lacks)
            for name, title in (
                ("minimum", "minimum {}"),
                ("maximum", "maximum {}"),
                ("one_size", "at 800x1344 {}"),
            )
        ),
        Column("padded_pixels", "padded pixels {}", unit=Unit.SHARE),
    ]
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
    data = pd.DataFrame(lines)
    data["uncounted"] = pd.Series([calls(line["uncounted"]) for line in lines], dtype="string")
    data["left_out"] = [unsummed({**line, "total": line["one_size"]}) for line in lines]
    return table("sizes", title, data, columns, notes)


def histogram(line: Mapping[str, Any]) -> str:
    """Return a row's images by FLOPs as bars of text; `histogram` is (low, high, images) a bin."""
    bins = line["histogram"]
    most = max(images for _, _, images in bins)
    text = [f"{line['row']}: images by FLOPs (G multiply-adds)"]
    for *ends, images in bins:
        low, high = (end / Unit.GIGA.size for end in ends)
        bar = "#" * round(_BAR * images / most)
        text.append(f"{low:8.1f} to {high:7.1f} {images:6,} {bar}".rstrip())
    return "\n".join(text) + "\n"


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _uncounted(uncounted: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(f"{counter}: {calls(names)}" for counter, names in uncounted.items())
