"""Growth of cost with the number of pixels, and where one mechanism becomes cheaper than another.

Costs follow powers of the number of pixels from some size on, so both are found on logarithms: the
exponent by least squares over the larger sizes, the crossover by straight lines between sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sizes that an exponent is fitted to: the upper half, but not fewer than these.
_FEWEST = 3


@dataclass(frozen=True)
class Growth:
    """cost ~ pixels ** exponent.

    Attributes:
        exponent: of the number of pixels; 1 is linear, 2 what full attention tends to.
        error: standard error of the exponent; None for two sizes.
        r_squared: the share of the logarithm's variance that the fit explains; None likewise.
        count: sizes that were fitted.
        first: pixels of the smallest of them.
    """

    exponent: float
    error: float | None
    r_squared: float | None
    count: int
    first: float


@dataclass(frozen=True)
class Crossover:
    """From which size on a cost is smaller than another.

    Attributes:
        kind: "from": it is larger before `pixels` and smaller from there to the largest size;
            "below": it is smaller at all sizes, the smallest of which is `pixels`; "never": it is
            not smaller at the largest size, `pixels`, nor at any other; "until": it is smaller,
            but only before `pixels`; "unknown": there is no size with both.
        pixels: see above; between two sizes it is interpolated.
        between: pixels of the sizes to both sides, where it is interpolated.
        often: whether the order changes more than once, as noise makes it do.
    """

    kind: str
    pixels: float = math.nan
    between: tuple[float, float] | None = None
    often: bool = False

    def __str__(self) -> str:
        side = f"{math.sqrt(self.pixels):.0f}" if self.kind != "unknown" else ""
        return {
            "from": f"from {side}",
            "below": f"below {side}",
            "never": f"not up to {side}",
            "until": f"only before {side}",
            "unknown": "",
        }[self.kind] + " (more than once)" * self.often


def growth(pixels: Sequence[float], costs: Sequence[float]) -> Growth | None:
    """Fit the exponent to the upper half of the sizes; None for fewer than two.

    Args:
        pixels: of each size, rising.
        costs: positive, one a size.
    """
    count = max(_FEWEST, math.ceil(len(pixels) / 2))
    x, y = np.log(np.asarray(pixels, float))[-count:], np.log(np.asarray(costs, float))[-count:]
    if len(x) < 2:
        return None
    centred = x - x.mean()
    spread = float(centred @ centred)
    exponent = float(centred @ y / spread)
    if len(x) == 2:
        return Growth(exponent, None, None, 2, float(pixels[-2]))
    residuals = y - y.mean() - exponent * centred
    left, whole = float(residuals @ residuals), float(((y - y.mean()) ** 2).sum())
    return Growth(
        exponent=exponent,
        error=math.sqrt(left / (len(x) - 2) / spread),
        r_squared=1 - left / whole if whole else 1.0,
        count=len(x),
        first=float(pixels[-len(x)]),
    )


def crossover(
    pixels: Sequence[float], costs: Sequence[float], others: Sequence[float]
) -> Crossover:
    """Where `costs` become smaller than `others`.

    Args:
        pixels: of each size, rising.
        costs: positive, one a size.
        others: likewise, at the same sizes.
    """
    if not len(pixels):
        return Crossover("unknown")
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
        between=(float(pixels[last - 1]), float(pixels[last])),
        often=len(changes) > 1,
    )
