"""What is to be known of the costs of a suite's rows at full size: `--costs`, `--reference`."""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.config.schema import CLASSIFIER, RunConfig
from bench.config.suites import Reference, Suite, reference_config

COSTS = ("none", "counted", "measured")


@dataclass(frozen=True)
class Costs:
    """What is to be known of the costs of rows at full size.

    Attributes:
        configs: of the rows, at that size.
        measured: whether attention layers are measured besides.
    """

    configs: tuple[RunConfig, ...] = ()
    measured: bool = False


def of_suite(suite: Suite, bases: Mapping[str, str], reference: Reference, costs: str) -> Costs:
    """Return what is to be known; the values of a search share theirs where they can.

    Args:
        bases: the name of each row without the value of a search.
        reference: the size.
        costs: one of `COSTS`.
    """
    if costs == "none" or suite.runs[0].model.method == CLASSIFIER:
        return Costs()
    found: list[RunConfig] = []
    for base in dict.fromkeys(bases.values()):
        runs = [run for run in suite.runs if bases[run.row] == base]
        same = [reference_config(run, base, reference) for run in runs]
        own = {run.row: reference_config(run, run.row, reference) for run in runs}
        found += same[:1] if all(one == same[0] for one in same) else own.values()
    return Costs(tuple(found), costs == "measured")
