"""Growth of each row, and where it crosses full attention."""

import pandas as pd

from report.scaling import Crossover, Growth, crossover, growth
from report.sweep.points import known

BASELINE = "full"


def growth_of(part: pd.DataFrame, quantity: str) -> Growth | None:
    """Of a quantity of one row; None for fewer than two sizes."""
    found = known(part, quantity)
    return growth(found["pixels"].astype(float).tolist(), found[quantity].astype(float).tolist())


def crossover_of(data: pd.DataFrame, part: pd.DataFrame, quantity: str) -> Crossover | None:
    """Against full attention in the same mode; None without it."""
    full = data[data["row"] == BASELINE]
    if full.empty:
        return None
    both = known(part, quantity).merge(known(full, quantity), on="pixels", suffixes=("", "_full"))
    return crossover(
        both["pixels"].astype(float).tolist(),
        both[quantity].astype(float).tolist(),
        both[f"{quantity}_full"].astype(float).tolist(),
    )
