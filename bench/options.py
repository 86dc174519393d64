"""The command line's parser, the options that several commands share, and the types of values.

A type is a function from text to value that raises `argparse.ArgumentTypeError` with one line.
"""

import argparse
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bench.config.schema import METHODS, MODES, POSITIONS, PRECISIONS
from bench.errors import InputError, nearest

ImageSize = tuple[int, int]
_Value = TypeVar("_Value")
_SEEDS = 2**63
_DASH = "expected one argument"


class UsageError(InputError):
    """A command line that cannot be read.

    Args:
        message: what is wrong.
        prog: the command that it was meant for.
    """

    def __init__(self, message: str, *, prog: str) -> None:
        super().__init__(message)
        self.prog = prog


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, and shows each default that the help does not tell of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or action.default in (None, argparse.SUPPRESS)
        if told or isinstance(action.default, bool) or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names what is meant; the usage is for --help.

    Raises:
        UsageError: instead of ending the program.
    """

    def __init__(self, **how: Any) -> None:
        # A part of a name is a mistake as often as it is meant.
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **how})

    def error(self, message: str) -> NoReturn:
        hint = "; one that begins with a dash is given as --name=VALUE" * message.endswith(_DASH)
        raise UsageError(message.removeprefix("argument ") + hint, prog=self.prog)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, _unknown(str(value), action.choices))

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """Parse all arguments; those of a list may stand before, between and after options."""
        found, rest = super().parse_known_args(args, namespace)
        # argparse fills a list from the first run of plain words alone.
        lists = [a.dest for a in self._actions if not a.option_strings and a.nargs in ("*", "+")]
        words = [word for word in rest if lists and not word.startswith("-")]
        if words:
            setattr(found, lists[0], [*getattr(found, lists[0]), *words])
        for unknown in rest:
            if unknown not in words:
                known = nearest(unknown.partition("=")[0], self._option_string_actions)
                self.error(f"unknown argument {unknown!r}{known}; --help lists what there is")
        return found, []


def _unknown(value: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    return f"unknown value {value!r}{nearest(value, names)}; allowed: {', '.join(names)}"


def image_size(text: str) -> ImageSize:
    """`800x1344` -> (800, 1344), height before width; `1024` -> (1024, 1024)."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if found is None:
        raise ArgumentTypeError(
            f"{text!r} is no image size; allowed: HEIGHTxWIDTH, for example 800x1344, or one side"
        )
    height = int(found[1])
    width = height if found[2] is None else int(found[2])
    if min(height, width) < 1:
        raise ArgumentTypeError(f"{text!r} is no image size: both sides must be positive")
    return height, width


def grid(text: str) -> tuple[int, int]:
    """`50x84` -> (50, 84), rows before columns."""
    found = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text.strip())
    if found is None:
        raise ArgumentTypeError(f"{text!r} is no grid; allowed: ROWSxCOLUMNS, for example 50x84")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isascii() or not text.isdigit():
        raise ArgumentTypeError(f"{text!r} is no whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def repeats(text: str) -> int:
    """A whole number above 1, which quartiles need."""
    if positive(text) < 2:
        raise ArgumentTypeError(f"{text!r} is too few: quartiles need 2 samples or more")
    return int(text)


def seed(text: str) -> int:
    """A whole number that random generators take."""
    if count(text) >= _SEEDS:
        raise ArgumentTypeError(f"{text!r} is too large: seeds are below 2^63")
    return count(text)


def seconds(text: str) -> float:
    """A number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return value


def names(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b"), each once and in the order given."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise ArgumentTypeError(f"{text!r} names nothing; allowed: names separated by commas")
    return found


def one_name(text: str) -> str:
    """The name of one row or mechanism."""
    if text == "all":
        raise ArgumentTypeError("'all' is many rows, and a checkpoint is of one; name it")
    return text


def several(kind: Callable[[str], _Value]) -> Callable[[str], tuple[_Value, ...]]:
    """The type of values of `kind` separated by commas."""
    return lambda text: tuple(kind(part) for part in names(text))


def some_of(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of names out of `allowed` separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        for name in names(text):
            if name not in allowed:
                raise ArgumentTypeError(_unknown(name, allowed))
        return names(text)

    return parse


def modes(text: str) -> tuple[str, ...]:
    """`inference,train` -> ("inference", "training")."""
    full = ("training" if name == "train" else name for name in names(text))
    return some_of(MODES)(",".join(full))


_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMG", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMG", start=1)}


def memory_budget(text: str) -> int:
    """`24GB` -> 24,000,000,000 bytes; `24GiB`, `500MB` and plain bytes too."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)?", text.strip(), flags=re.IGNORECASE)
    size = int(float(found[1]) * _UNITS.get((found[2] or "").upper(), 1)) if found else 0
    if size < 1:
        raise ArgumentTypeError(f"{text!r} is no amount of memory; allowed: 24GB, 24GiB, 500MB")
    return size


SHARED: Mapping[str, Mapping[str, Any]] = {
    "attention": {
        "type": names,
        "default": "all",
        "metavar": "A,B",
        "help": "mechanisms, rows such as 'Partial ViL', or mechanisms of yours as"
        " package.module:Class or file.py:Class",
    },
    "backbone": {
        "default": "small",
        "metavar": "NAME",
        "help": "a backbone of configs/backbones.yaml",
    },
    "method": {
        "choices": METHODS,
        "default": "mask_rcnn",
        "help": "method of detection",
    },
    "position": {
        "choices": POSITIONS,
        "help": "in all stages (default: that of the row)",
    },
    "image-size": {
        "type": image_size,
        "metavar": "HxW",
        "help": "height and width in pixels, or one number for both",
    },
    "grid": {
        "type": grid,
        "metavar": "RxC",
        "help": "rows and columns of tokens that a mechanism gets",
    },
    "sizes": {
        "metavar": "val2017",
        "help": "FLOPs of whole detectors over the true image sizes of a data set",
    },
    "batch-size": {
        "type": positive,
        "default": 1,
        "metavar": "N",
        "help": "images in a batch",
    },
    "device": {
        "default": "auto",
        "help": "auto, cpu, cuda or cuda:N; auto is a GPU where there is one",
    },
    "mode": {
        "type": modes,
        "default": ",".join(MODES),
        "metavar": "M",
        "help": "inference, training or both",
    },
    "repeats": {
        "type": repeats,
        "metavar": "N",
        "help": "fewest samples of a latency",
    },
    "seconds": {
        "type": seconds,
        "metavar": "S",
        "help": "that these samples take together at least",
    },
    "seed": {
        "type": seed,
        "default": 0,
        "metavar": "N",
        "help": "of weights and images",
    },
    "format": {
        "choices": ("table", "json"),
        "default": "table",
        "help": "what is printed",
    },
    "output": {"type": Path, "metavar": "DIR"},
}
"""What each option is, by its name without the dashes; commands differ in defaults at most."""


def add(parser: "argparse._ActionsContainer", *options: str, **own: Any) -> None:
    """Add options of SHARED.

    Args:
        parser: of the command, or a group of it.
        options: their names.
        own: what this command says otherwise, as `add_argument` takes it.
    """
    for name in options:
        parser.add_argument(f"--{name}", **{**SHARED[name], **own})


def add_row(parser: "argparse._ActionsContainer") -> None:
    """Add --attention for one row."""
    add(
        parser,
        "attention",
        type=one_name,
        default="ViL",
        metavar="ROW",
        help="a row of configs/rows.yaml or a mechanism, yours too",
    )


def add_what(parser: "argparse._ActionsContainer", quantities: Sequence[str]) -> None:
    """Add --what, some of `quantities`, by default all."""
    parser.add_argument(
        "--what",
        type=some_of(quantities),
        default=",".join(quantities),
        metavar="Q",
        help=f"some of {','.join(quantities)} (default: all)",
    )


def add_precision(parser: "argparse._ActionsContainer") -> None:
    """Add --precision and --amp, which exclude each other; `precision` reads them."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the numbers that a model computes with",
    )
    either.add_argument(
        "--amp", action="store_true", help="mixed precision: 16-mixed on a GPU, else bf16-mixed"
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `key=value` arguments."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any value of bench/config/suites.py, for example model.detector.detections=50",
    )


def precision(options: Namespace) -> str:
    """What --precision or --amp asks for."""
    if not options.amp:
        return str(options.precision)
    return "16-mixed" if on_gpu(options.device) else "bf16-mixed"


def on_gpu(device: str) -> bool:
    """Whether --device means a GPU here."""
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
