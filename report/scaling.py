"""Growth of cost with the number of pixels, and where one mechanism becomes cheaper than another.

Costs follow powers of the number of pixels from some size on, so both are found on logarithms: the
exponent by least squares over the larger sizes, the crossover by straight lines between sizes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import linregress

from report.load import MODES

BASELINE = "full"
QUANTITIES = {"flops": "FLOPs", "memory": "memory", "latency": "latency"}

# Sizes that an exponent is fitted to: the upper half, but not fewer than these.
_FEWEST = 3


@dataclass(frozen=True)
class Growth:
    """cost ~ pixels ** exponent.

    Attributes:
        exponent: of the number of pixels; 1 is linear, 2 what full attention tends to.
        exponent_error: its standard error; None for two sizes.
        r_squared: the share of the logarithm's variance that the fit explains; None likewise.
        fitted_sizes: how many there are.
    """

    exponent: float
    exponent_error: float | None
    r_squared: float | None
    fitted_sizes: int

    def __str__(self) -> str:
        error = "" if self.exponent_error is None else f" ± {self.exponent_error:.2f}"
        return f"{self.exponent:.2f}{error}"


@dataclass(frozen=True)
class Crossover:
    """From which size on a cost is smaller than another.

    Attributes:
        kind: "from": it is larger before `pixels` and smaller from there to the largest size;
            "below": it is smaller at all sizes, the smallest of which is `pixels`; "never": it is
            not smaller at the largest size, `pixels`, nor at any other; "until": it is smaller,
            but only before `pixels`; "unknown": there is no size with both.
        pixels: see above; between two sizes it is interpolated.
        after_pixels: of the size before it, where it is interpolated.
        before_pixels: of the size after it, likewise.
        often: whether the order changes more than once, as noise makes it do.
    """

    kind: str
    pixels: float = math.nan
    after_pixels: float | None = None
    before_pixels: float | None = None
    often: bool = False

    def __str__(self) -> str:
        side = f"{math.sqrt(self.pixels):.0f} px" if self.kind != "unknown" else ""
        return {
            "from": f"from {side}",
            "below": f"below {side}",
            "never": f"not up to {side}",
            "until": f"only before {side}",
            "unknown": "",
        }[self.kind] + " (more than once)" * self.often


def growth(pixels: Sequence[float], costs: Sequence[float]) -> Growth | None:
    """Fit the exponent to the upper half of the sizes; None for fewer than two, or without cost.

    Args:
        pixels: of each size, rising.
        costs: one a size.
    """
    if not all(costs):
        return None
    count = max(_FEWEST, math.ceil(len(pixels) / 2))
    x, y = np.log(np.asarray(pixels, float))[-count:], np.log(np.asarray(costs, float))[-count:]
    if len(x) < 2:
        return None
    line = linregress(x, y)
    if len(x) == 2:
        # They are on a line whatever they cost.
        return Growth(line.slope, None, None, 2)
    if np.ptp(y) == 0:
        return Growth(0.0, 0.0, 1.0, len(x))
    return Growth(line.slope, line.stderr, line.rvalue**2, len(x))


def crossover(
    pixels: Sequence[float], costs: Sequence[float], others: Sequence[float]
) -> Crossover:
    """Return where `costs` become smaller than `others`.

    Args:
        pixels: of each size, rising.
        costs: one a size; 0 for what has none, such as the products of the identity.
        others: likewise, at the same sizes.
    """
    if not len(pixels):
        return Crossover("unknown")
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.log(np.asarray(costs, float)) - np.log(np.asarray(others, float))
    smaller = (excess < 0).tolist()
    changes = [i for i in range(1, len(smaller)) if smaller[i] != smaller[i - 1]]
    if not changes:
        kind, place = ("below", 0) if smaller[0] else ("never", -1)
        return Crossover(kind, float(pixels[place]))
    last = changes[-1]
    low, high = math.log(pixels[last - 1]), math.log(pixels[last])
    share = float(excess[last - 1] / (excess[last - 1] - excess[last]))
    return Crossover(
        kind="from" if smaller[-1] else "until",
        pixels=math.exp(low + share * (high - low)),
        after_pixels=float(pixels[last - 1]),
        before_pixels=float(pixels[last]),
        often=len(changes) > 1,
    )


def parts(data: pd.DataFrame) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """Return name, title and lines of each mode and batch size of `report.sweep.frame`."""
    several = data["batch"].nunique() > 1
    for mode in MODES:
        for batch in data["batch"].unique():
            part = data[(data["mode"] == mode) & (data["batch"] == batch)]
            if not part.empty:
                name = f"{mode}-batch-{batch}" if several else mode
                yield name, f"{mode}, batch of {batch}" if several else mode, part


def known(part: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return the lines of a row that have a quantity, one a size."""
    return part.dropna(subset=[quantity]).drop_duplicates("pixels")


def growth_of(part: pd.DataFrame, quantity: str) -> Growth | None:
    """Return the growth of a quantity of one row; None for fewer than two sizes."""
    found = known(part, quantity)
    return growth(found["pixels"].astype(float).tolist(), found[quantity].astype(float).tolist())


def crossover_of(data: pd.DataFrame, part: pd.DataFrame, quantity: str) -> Crossover | None:
    """Return where a row crosses full attention in the same mode; None without full attention."""
    full = data[data["row"] == BASELINE]
    if full.empty:
        return None
    both = known(part, quantity).merge(known(full, quantity), on="pixels", suffixes=("", "_full"))
    columns = ("pixels", quantity, f"{quantity}_full")
    return crossover(*(both[name].astype(float).tolist() for name in columns))
