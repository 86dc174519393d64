"""What commands do alike with the configuration of a row."""

import dataclasses
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.config.schema import RunConfig


def with_positions(config: "RunConfig", position: str | None) -> "RunConfig":
    """A row with one kind of positions in all stages; as it is for None.

    Args:
        config: the row.
        position: one of `bench.config.schema.POSITIONS`, or None.
    """
    if position is None:
        return config
    switch = int(position == "absolute")
    arch = re.sub(r",a[01](?=_|$)", f",a{switch}", config.model.arch)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, arch=arch))
