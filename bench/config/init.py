"""Which checkpoint each row of a suite starts from: `--init`."""

import dataclasses
from pathlib import Path

from bench.config.suites import Suite
from bench.errors import InputError
from bench.record import slug


def started(suite: Suite, init: str, partial: bool) -> Suite:
    """Return the suite with the checkpoint that each row starts from.

    Args:
        init: a file for all rows, a folder of `ROW.pth`, or a pattern with `{row}`.
        partial: let rows of several mechanisms take what fits of one file.

    Raises:
        InputError: for a file that is not there, or one file for rows of several mechanisms.
    """
    pattern = str(Path(init) / "{row}.pth") if Path(init).is_dir() else init
    models = (run.model for run in suite.runs)
    several = len({(model.attention, model.arch, str(model.dense)) for model in models}) > 1
    if "{row}" not in pattern and several and not partial:
        raise InputError(
            f"--init {init} is one file for rows of several mechanisms, each of which would take"
            " what fits of it: name a folder of ROW.pth, or a pattern such as"
            " pretrained/{row}.pth, for one each; --init-partial allows it"
        )
    runs = []
    for run in suite.runs:
        names = dict.fromkeys((run.row, slug(run.row)))
        places = list(dict.fromkeys(pattern.replace("{row}", name) for name in names))
        found = next((place for place in places if Path(place).is_file()), None)
        if found is None:
            raise InputError(f"--init {init}: row {run.row}: no such file {' or '.join(places)}")
        runs.append(dataclasses.replace(run, train=dataclasses.replace(run.train, init=found)))
    return dataclasses.replace(suite, runs=tuple(runs))
