"""The points of a sweep, and the walks that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import attentions
from bench import record
from bench.config.schema import MODES, SWEPT, RunConfig
from bench.config.suites import profile_configs
from bench.system.devices import make_fabric

SUITE = "sweep"

Size = tuple[int, int]


@dataclass(frozen=True)
class Point:
    """One mechanism at one size, in one mode, at one batch size.

    Attributes:
        config: the row with image size and batch size, as `bench.run.runner` takes it.
        scope: one of `bench.config.schema.SCOPES`.
        mode: "inference" or "training".
        what: some of SWEPT.
    """

    config: RunConfig
    scope: str
    mode: str
    what: tuple[str, ...]

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        height, width = self.config.profile.image_size
        return height, width

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.size[0] * self.size[1]

    def values(self) -> dict[str, Any]:
        """The whole configuration, for the record."""
        own = {"scope": self.scope, "mode": self.mode, "what": list(self.what)}
        return {**self.config.as_dict(), "sweep": own}

    @property
    def key(self) -> str:
        """Of the record: a hash of what the numbers depend on."""
        values = self.values()
        data, train = values["data"], values["train"]
        named = ("row", "seed", "device", "model", "profile", "sweep")
        return record.key(
            {name: values[name] for name in named}
            | {"path": data["path"], "fixed_size": data["fixed_size"]}
            | {"precision": train["precision"]}
        )

    def __str__(self) -> str:
        return "x".join(map(str, self.size))


Walk = tuple[Point, ...]
"""Points that differ in their size alone, the smallest first."""


def plan(
    names: Sequence[str],
    *,
    sizes: Sequence[Size],
    batch_sizes: Sequence[int] = (1,),
    modes: Sequence[str] = MODES,
    scope: str = "backbone",
    what: Sequence[str] = SWEPT,
    backbone: str = "tiny",
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Walk, ...]:
    """Return the walks of a sweep.

    Every module is made for the size that it is measured at, so that mechanisms that know one size
    only take part as well.

    Args:
        names: as `profile_configs` takes them, but "all" for every mechanism once.
        sizes: (height, width) of images in pixels.
        batch_sizes: images in a batch.
        modes: some of MODES.
        scope: one of `bench.config.schema.SCOPES`.
        what: some of SWEPT.
        backbone: one of `configs/backbones.yaml`.
        values: nested configuration values besides.
        overrides: `key=value`.

    Raises:
        InputError: as `profile_configs`, and for a device that is not there.
    """
    every = [one for name in names for one in (attentions.names() if name == "all" else [name])]
    ordered = sorted(dict.fromkeys(sizes), key=lambda size: (size[0] * size[1], size))
    walks = []
    found: dict[tuple[str, int], list[RunConfig]] = {}
    for batch_size in dict.fromkeys(batch_sizes):
        for size in ordered:
            for config in profile_configs(
                every,
                backbone=backbone,
                image_size=size,
                values=_with(values or {}, size, batch_size),
                overrides=overrides,
            ):
                device = make_fabric(config).device.type
                named = config.device if ":" in config.device else device
                config = replace(config, suite=SUITE, device=named)
                found.setdefault((config.row, batch_size), []).append(config)
    for configs in found.values():
        walks += [
            tuple(Point(config, scope, mode, tuple(what)) for config in configs) for mode in modes
        ]
    return tuple(walks)


def _with(values: Mapping[str, Any], size: Size, batch_size: int) -> dict[str, Any]:
    return {
        **values,
        "data": {**values.get("data", {}), "fixed_size": list(size)},
        "profile": {**values.get("profile", {}), "batch_size": batch_size},
    }
