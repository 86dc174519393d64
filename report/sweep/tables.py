"""Tables of a sweep; `data` is the frame of `report.sweep.points`."""

from typing import Any

import pandas as pd

from report.scaling import Crossover, Growth
from report.sweep.fits import BASELINE, crossover_of, growth_of
from report.sweep.points import LATENCIES, QUANTITIES, parts, size_text
from report.tables import MISSING, Table, memory_unit, reason


def summaries(data: pd.DataFrame) -> list[Table]:
    """Return the growth and the crossover of each row, one table a mode and batch size."""
    return [_summary(part, name, title) for name, title, part in parts(data)]


def _summary(data: pd.DataFrame, name: str, title: str) -> Table:
    quantities = [quantity for quantity in QUANTITIES if data[quantity].notna().any()]
    lines, cells = [], []
    for row, part in data.groupby("row", sort=False):
        line: dict[str, Any] = {"row": row}
        cell = {"row": str(part["label"].iloc[0])}
        for quantity in quantities:
            fitted, crossed = growth_of(part, quantity), crossover_of(data, part, quantity)
            line |= _raw(quantity, fitted, crossed)
            cell[f"{QUANTITIES[quantity]} exponent"] = _exponent(fitted)
        for quantity in quantities:
            crossed = crossover_of(data, part, quantity)
            text = str(crossed) if crossed and row != BASELINE else ""
            cell[f"{QUANTITIES[quantity]} below full"] = text or MISSING
        cell["measured up to"] = line["measured_up_to"] = _reach(part)
        lines.append(line)
        cells.append(cell)
    return Table(
        f"growth-{name}",
        f"Growth and crossover, {title}",
        pd.DataFrame(lines),
        pd.DataFrame(cells),
        _SUMMARY_NOTES if BASELINE in set(data["row"]) else (*_SUMMARY_NOTES[:1], _NO_BASELINE),
    )


_SUMMARY_NOTES = (
    "Exponents are of the number of pixels, fitted by least squares to the upper half of the sizes"
    " (at least three), with their standard error.",
    "Sizes are the sides of squares with as many pixels; between two measured sizes, crossovers are"
    " interpolated on logarithms.",
)
_NO_BASELINE = f"There are no crossovers without the row {BASELINE!r}."


def _raw(quantity: str, fitted: Growth | None, crossed: Crossover | None) -> dict[str, Any]:
    between = crossed.between if crossed and crossed.between else (None, None)
    return {
        f"{quantity}_exponent": fitted.exponent if fitted else None,
        f"{quantity}_exponent_error": fitted.error if fitted else None,
        f"{quantity}_r_squared": fitted.r_squared if fitted else None,
        f"{quantity}_fitted_sizes": fitted.count if fitted else None,
        f"{quantity}crossover_of": crossed.kind if crossed else None,
        f"{quantity}_crossover_pixels": crossed.pixels if crossed else None,
        f"{quantity}_crossover_after_pixels": between[0],
        f"{quantity}_crossover_before_pixels": between[1],
    }


def _exponent(fitted: Growth | None) -> str:
    if fitted is None:
        return MISSING
    error = "" if fitted.error is None else f" ± {fitted.error:.2f}"
    return f"{fitted.exponent:.2f}{error}"


def _reach(part: pd.DataFrame) -> str:
    """The largest size that was measured, and why there is no larger one."""
    done = part[part["error"].isna()]
    largest = size_text(done.iloc[-1]) if len(done) else "nothing"
    ends = part[part["error"].notna() & (part["error"] != "skipped")]
    return "; ".join(
        [largest, *(f"{size_text(end)} {reason(end['error'])}" for _, end in ends.iterrows())]
    )


def points(data: pd.DataFrame) -> Table:
    """Return every point as a line."""
    unit, size = memory_unit(data["memory"])
    raw = data[
        [
            *("row", "mode", "height", "width", "batch", "flops", "memory"),
            *("latency", "latency_q1", "latency_q3", "back_ends", "error", "message"),
        ]
    ].rename(
        columns={
            "flops": "flops_multiply_adds",
            "memory": "memory_bytes",
            "latency": "latency_median_s",
            "latency_q1": "latency_q1_s",
            "latency_q3": "latency_q3_s",
        }
    )
    times = [
        MISSING if pd.isna(middle) else f"{_short(middle * 1e3)} ± {_short(1e3 * (high - low))}"
        for middle, low, high in zip(*(data[name] for name in LATENCIES), strict=True)
    ]
    shown = pd.DataFrame(
        {
            "row": data["label"],
            "mode": data["mode"],
            "size": [size_text(line) for line in data.to_dict("records")],
            "batch": data["batch"].astype(str),
            "FLOPs G": (data["flops"] / 1e9).map(_short),
            f"memory {unit}": (data["memory"] / size).map(_short),
            "latency ms (median ± IQR)": times,
            "SDPA": data["back_ends"].fillna(MISSING),
            "result": data["error"].map(reason, na_action="ignore").fillna("measured"),
        }
    )
    if data["batch"].nunique() == 1:
        shown = shown.drop(columns="batch")
    return Table("points", "All points", raw, shown)


def _short(value: Any) -> str:
    """Three digits, or all of a larger whole part."""
    if pd.isna(value):
        return MISSING
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
