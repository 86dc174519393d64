"""The parts of a record as types: what is read from a file is checked against them.

Only what tables, plots and searches read is here; a part may have more.
"""

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from reprlib import repr as shortened
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

Text = str | None
# What was not finite is null.
Real = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
Whole = Annotated[int, Field(ge=0)] | None
Percent = Annotated[float, Field(ge=0, le=100)] | None
Reals = dict[str, Real]
_SIZE = list[int] | None
# Of figures in percent.
_ROUNDING = 1e-6


@with_config(ConfigDict(strict=True))
class _Train(TypedDict, total=False):
    precision: str
    init: Text


@with_config(ConfigDict(strict=True))
class _Config(TypedDict, total=False):
    train: _Train
    model: dict[str, Any]
    data: dict[str, Any]
    evaluate: dict[str, Any]
    profile: dict[str, Any]


class _Inputs(TypedDict, total=False):
    mechanism: dict[str, str] | None
    init: Text
    data: dict[str, dict[str, Any] | None] | None


class _Environment(TypedDict, total=False):
    python: Text
    platform: Text
    cpu: Text
    cores: Real
    memory_bytes: Whole
    device: Text
    packages: dict[str, Text]
    threads: Whole
    inputs: _Inputs | None
    commit: Text
    dirty: bool | None
    command: Text


class _Model(TypedDict, total=False):
    backbone: str
    method: str
    library: str
    library_version: Text
    attention: str
    arch: Text
    drop_path: Real
    schedule: Text
    pretrain: Text


class _Parameters(TypedDict, total=False):
    total: Whole
    by_part: Reals


class _Difference(TypedDict, total=False):
    attention: str
    published: Real
    actual: Real
    reason: Text


class _Published(TypedDict, total=False):
    total: Whole
    differences: list[_Difference]


class _Flops(TypedDict, total=False):
    unit: Literal["multiply-adds"]
    convention: str
    image_size: _SIZE
    proposals: Whole
    total: Whole
    by_part: Reals
    by_operator: Reals
    uncounted: dict[str, int]
    unsummed: Whole
    notes: list[str]
    published: _Published | None


class _Measured(TypedDict, total=False):
    device: Text
    batch_size: Whole
    image_size: _SIZE
    precision: Text


class _Predicted(TypedDict, total=False):
    total: Whole


class _Memory(_Measured, total=False):
    unit: Literal["bytes"]
    kind: str
    inference: Whole
    training: Whole
    predicted: dict[str, _Predicted | None]
    by_part: dict[str, Any]


class _Times(TypedDict, total=False):
    samples: list[float]
    median: Real
    q1: Real
    q3: Real


class _Latency(_Measured, total=False):
    unit: Literal["s"]
    threads: Whole
    inference: _Times | None
    training: _Times | None
    layers: _Times | None
    group: dict[str, Text]
    session: Text
    by_part: dict[str, Any]
    notes: list[str]


class _Training(TypedDict, total=False):
    steps: Whole
    seconds: Real
    batch_size: Whole
    images_per_second: Real
    losses: list[Reals]
    weights: dict[str, Any] | None
    classes: list[Any] | None


class _Interval(TypedDict, total=False):
    AP: Annotated[list[Percent], Field(min_length=2, max_length=2)] | None
    level: Real


class _Draws(TypedDict, total=False):
    seed: Whole
    resamples: Whole
    box_AP: list[Percent] | None
    mask_AP: list[Percent] | None


class _Evaluation(TypedDict, total=False):
    split: Required[str]
    images: Whole
    annotations_sha256: Text
    unit: Literal["percent"]
    box: Required[dict[str, Percent] | None]
    mask: dict[str, Percent] | None
    box_interval: _Interval | None
    mask_interval: _Interval | None
    bootstrap: _Draws | None


def _within(found: _Evaluation) -> _Evaluation:
    """Check that a figure lies in its interval, which is moved to have it: one may be edited."""
    for figures, interval in (("box", "box_interval"), ("mask", "mask_interval")):
        value = (found.get(figures) or {}).get("AP")  # type: ignore[attr-defined]
        limits = (found.get(interval) or {}).get("AP")  # type: ignore[attr-defined]
        if value is None or not limits or None in limits:
            continue
        low, high = limits
        if not low - _ROUNDING <= value <= high + _ROUNDING:
            raise ValueError(f"{figures}.AP is {value:g}, outside of its interval {limits}")
    return found


class _Evaluated(_Evaluation, total=False):
    also: list[Annotated[_Evaluation, AfterValidator(_within)]]


class _Error(TypedDict, total=False):
    kind: str
    message: str
    traceback: Text


class _Task(TypedDict):
    asks: str
    about: str
    level: str
    levels: list[Any]
    asked: list[list[int]]
    right: list[list[list[int]]]
    losses: list[list[Real]]
    seconds: list[float]


class _Probes(TypedDict, total=False):
    kind: str
    seeds: list[int]
    chance: float
    tasks: dict[str, _Task]


def _is_date(text: str) -> str:
    datetime.fromisoformat(text)
    return text


@with_config(ConfigDict(strict=True))
class Sections(TypedDict, total=False):
    """The parts of a record that have parts of their own, and when it was made."""

    created: Annotated[str, AfterValidator(_is_date)]
    config: _Config
    environment: _Environment
    model: _Model
    error: _Error | None
    parameters: _Parameters | None
    flops: _Flops | None
    memory: _Memory | None
    latency: _Latency | None
    training: _Training | None
    evaluation: Annotated[_Evaluated, AfterValidator(_within)] | None
    probes: _Probes | None
    notes: list[str]


@cache
def _sections() -> TypeAdapter[Sections]:
    return TypeAdapter(Sections)


def check(values: Mapping[str, Any]) -> None:
    """Compare the parts of a record with their types.

    Raises:
        ValueError: naming the first value of another type and where it stands.
    """
    try:
        _sections().validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, given = ".".join(map(str, first["loc"])), first["input"]
        of_many = first["type"] == "value_error" and isinstance(given, Mapping)
        said = place if of_many else f"{place} is {shortened(given)}"
        raise ValueError(f"{said}: {first['msg'].removeprefix('Value error, ')}") from error
