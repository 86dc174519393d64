"""The command line: `python -m bench COMMAND …`, its parser and the options of several commands.

The type of an option is a function from text to value that raises `ArgumentTypeError`, one line.
"""

import argparse
import importlib
import itertools
import logging
import math
import os
import pkgutil
import re
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bench import commands, record
from bench.config.schema import METHODS, MODES, POSITIONS, PRECISIONS
from bench.config.values import assigned, merged, nested
from bench.data import DataError
from bench.errors import InputError, nearest
from bench.system.interrupt import EXIT_CODE, ending_at_once, raised_where_it_arrives
from bench.system.logs import refused, tolerate_encoding

PROG = "python -m bench"
_HELP = "Profile, check and compare attention mechanisms for high-resolution vision."
_EPILOG = f"""\
`{PROG} COMMAND --help` explains a command; `python run_all.py` runs whole suites.

"""
_EXIT_CODES = """\
exit code: 0 done; 1 something failed, the output says what; 2 wrong input; 130 interrupted"""
_MOST_PIXELS = 2**30
_DASH = "expected one argument"

ImageSize = tuple[int, int]
_Value = TypeVar("_Value")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names what is meant; the usage is for --help.

    Raises:
        InputError: instead of ending the program.
    """

    def __init__(self, **how: Any) -> None:
        # A part of a name is a mistake as often as it is meant.
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **how
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        hint = "; one that begins with a dash is given as --name=VALUE" * message.endswith(_DASH)
        raise InputError(message.removeprefix("argument ") + hint)

    def parse(self, words: Sequence[str]) -> Namespace:
        """Parse all words; those of a list may stand before, between and after options.

        The result has, besides, the names of the options that are `given`. One of them must not
        contradict a `key=value`, or be of another option that is not there.

        An empty one, as of a variable of the shell that is not set, would be the working folder,
        and of a list that is given twice the last would count alone.
        """
        given: dict[str, str] = {}
        actions: dict[str, argparse.Action] = {}
        for before, word in itertools.pairwise(["argument", *words]):
            name, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
            if not value.strip() and name != word:
                what = name if name.startswith("--") else "an argument"
                self.error(f"{what} is empty; give it a value or leave it out")
            action = self._option_string_actions.get(name)
            if action is not None:
                actions[name] = action
            # Names in braces are what one value may be.
            takes_list = action is not None and re.match("[^{]*,", str(action.metavar))
            if takes_list and name != word and given.setdefault(name, value) != value:
                self.error(
                    f"{name} is given twice, as {given[name]!r} and {value!r}; it takes a list"
                )
        found, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            known = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]!r}{known}; --help lists what there is")
        found.given = [action.dest for action in actions.values()]
        for name, action in actions.items():
            self._check(name, action, found)
        return found

    def _check(self, name: str, action: argparse.Action, found: Namespace) -> None:
        value = getattr(found, action.dest)
        needs, _, wanted = getattr(action, "needs", "").partition("=")
        other = getattr(found, needs.replace("-", "_"), None)
        met = str(other) in wanted.split("|") if wanted else other not in (None, False)
        if needs and not met and value != action.default:
            self.error(f"{name} has no effect without --{needs} {wanted}".rstrip())
        setting = getattr(action, "setting", None)
        if setting is not None:
            said = str(value) if isinstance(value, Path) else name if value is True else value
            said = getattr(action, "said", lambda value: value)(said)
            said = list(said) if isinstance(said, tuple) else said
            merged([nested(setting, said), assigned(getattr(found, "overrides", ()))], agree="")


def find_commands() -> dict[str, Any]:
    """Return the modules of `bench.commands` by the name of their command."""
    return {
        found.name: importlib.import_module(f"{commands.__name__}.{found.name}")
        for found in pkgutil.iter_modules(commands.__path__)
        if not found.name.startswith("_")
    }


def parser_of(prog: str, command: Any) -> Parser:
    """Return the parser of a command, or one that chooses among its COMMANDS."""
    nested: Mapping[str, Any] = getattr(command, "COMMANDS", {})
    listed = "".join(f"\n  {name:<10}{nested[name].HELP}" for name in nested)
    result = Parser(
        prog=prog,
        description=command.HELP + (f"\n\ncommands:{listed}" if nested else ""),
        epilog=getattr(command, "EPILOG", "") + getattr(command, "EXIT_CODES", _EXIT_CODES),
    )
    if nested:
        result.add_argument("command", type=one_of(nested), metavar="COMMAND")
    else:
        command.configure(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # One of a notebook may not be installed here, and whatever imports matplotlib would fail.
    os.environ.pop("MPLBACKEND", None)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    tolerate_encoding()
    words = list(sys.argv[1:] if arguments is None else arguments)
    prog = PROG
    with ending_at_once():
        command: Any = Namespace(HELP=_HELP, EPILOG=_EPILOG, COMMANDS=find_commands())
    try:
        while hasattr(command, "COMMANDS"):
            name = parser_of(prog, command).parse(words[:1]).command
            prog, command, words = f"{prog} {name}", command.COMMANDS[name], words[1:]
        options = parser_of(prog, command).parse(words)
        record.code_at_start()
        with raised_where_it_arrives(signal.SIGINT):
            code: int = command.run(options)
            if sys.stdout is not None:
                # None where it was closed before.
                sys.stdout.flush()
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"{prog}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        return refused(prog, error)
    return code


def image_size(text: str) -> ImageSize:
    """`800x1344` -> (800, 1344), height before width; `1024` -> (1024, 1024)."""
    found = re.fullmatch(r"0*([1-9]\d{0,6})(?:x0*([1-9]\d{0,6}))?", text.strip())
    size = (int(found[1]), int(found[2] or found[1])) if found else None
    # FLOPs of larger ones do not fit 64 bits.
    if size is None or math.prod(size) > _MOST_PIXELS:
        raise ArgumentTypeError(
            f"{text!r} is not an image size; allowed: HEIGHTxWIDTH, for example 800x1344, or one"
            f" side, in pixels, {_MOST_PIXELS:,} in all at most"
        )
    return size


def grid(text: str) -> tuple[int, int]:
    """`50x84` -> (50, 84), rows before columns."""
    found = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text.strip())
    if found is None:
        raise ArgumentTypeError(f"{text!r} is not a grid; allowed: ROWSxCOLUMNS, such as 50x84")
    return int(found[1]), int(found[2])


def _whole(least: int, below: float = math.inf) -> Callable[[str], int]:
    """Return the type of whole numbers of `least` or more, less than `below`."""

    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= value < below:
            limit = "" if below == math.inf else f", less than {below}"
            raise ArgumentTypeError(f"{text!r} is not a whole number of {least} or more{limit}")
        return value

    return parse


count, positive, seed = _whole(0), _whole(1), _whole(0, below=2**63)
# What quartiles need.
repeats = _whole(2)


def seconds(text: str) -> float:
    """Read a number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def names(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b"), each once and in the order given."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise ArgumentTypeError(f"{text!r} names nothing; allowed: names separated by commas")
    return found


def one_name(text: str) -> str:
    """Read the name of one row or mechanism."""
    if text == "all":
        raise ArgumentTypeError("'all' is many rows, and a checkpoint is of one; name it")
    return text


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """Return the type of one name out of `allowed`."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ArgumentTypeError(
                f"unknown value {text!r}{nearest(text, allowed)}; allowed: {', '.join(allowed)}"
            )
        return text

    return parse


def several(kind: Callable[[str], _Value]) -> Callable[[str], tuple[_Value, ...]]:
    """Return the type of values of `kind` separated by commas."""
    return lambda text: tuple(kind(part) for part in names(text))


def some_of(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of names out of `allowed` separated by commas."""
    return several(one_of(allowed))


def modes(text: str) -> tuple[str, ...]:
    """`inference,train` -> ("inference", "training")."""
    full = ("training" if name == "train" else name for name in names(text))
    return some_of(MODES)(",".join(full))


# A number alone is seldom meant in bytes.
_LEAST = 10**6


def _amount(units: Mapping[str, float], said: str) -> Callable[[str], int]:
    """Return the type of numbers with one of `units`, or none, that are a million or more."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), flags=re.IGNORECASE)
        amount = int(float(found[1]) * units.get(found[2].upper(), 0)) if found else 0
        if amount < _LEAST:
            raise ArgumentTypeError(f"{text!r} is not {said}")
        return amount

    return parse


_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMG", start=1)}
_BYTES |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMG", start=1)}
memory_budget = _amount(_BYTES, "an amount of memory of 1 MB or more; allowed: 24GB, 24GiB, 500MB")
multiply_adds = _amount(
    {"": 1, "M": 1e6, "G": 1e9, "T": 1e12},
    "a number of multiply-adds of 1 M or more; allowed: 250G, 0.3T, 900M",
)


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
        "setting": "model.method",
    },
    "position": {
        "choices": POSITIONS,
        "help": "positions of all stages (default: the row's)",
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
    "batch-size": {
        "type": positive,
        "default": 1,
        "metavar": "N",
        "help": "images in a batch",
        "setting": "profile.batch_size",
    },
    "device": {
        "default": "auto",
        "metavar": "DEVICE",
        "help": "auto, cpu, cuda or cuda:N; auto is a GPU where there is one",
        "setting": "device",
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
        "setting": "profile.repeats",
    },
    "seconds": {
        "type": seconds,
        "metavar": "S",
        "help": "fewest seconds that these samples take together",
        "setting": "profile.seconds",
    },
    "seed": {
        "type": seed,
        "default": 0,
        "metavar": "N",
        "help": "seed of weights and images",
        "setting": "seed",
    },
    "devices": {
        "type": positive,
        "metavar": "N",
        "help": "devices of this machine that share each run, a process each; under torchrun or"
        " srun it is their number of processes (default: 1)",
        "setting": "train.devices",
    },
    "launcher": {
        "choices": ("none", "local", "slurm"),
        "default": "none",
        "help": "none runs one row after the other; local runs --jobs of them side by side; slurm"
        " submits each as a job, which requeues and resumes when preempted",
    },
    "jobs": {
        "type": positive,
        "default": 2,
        "metavar": "N",
        "help": "rows side by side",
        "needs": "launcher=local",
    },
    "slurm": {
        "metavar": "KEY=VALUE,…",
        "help": "parameters of submitit's executor, such as slurm_partition=gpu,timeout_min=4320",
        "needs": "launcher=slurm",
    },
    "dry-run": {
        "action": "store_true",
        "help": "print what would run, its schedule, memory and time, and run nothing",
    },
    "measure-steps": {
        "type": positive,
        "metavar": "N",
        "help": "in a dry run, time N training steps of each row on one device here",
        "needs": "dry-run",
    },
    "retry-failed": {"action": "store_true", "help": "run again what has failed"},
    "tensorboard": {
        "action": "store_true",
        "help": "write TensorBoard's events, to tensorboard/",
    },
    "format": {"choices": ("table", "json"), "default": "table", "help": "what is printed"},
    "output": {"type": Path, "metavar": "DIR"},
}
"""What each option is, by its name without the dashes; commands differ in defaults at most."""


# What `add_argument` does not know.
_OURS = ("setting", "said", "needs")


def add(parser: "argparse._ActionsContainer", *options: str, **own: Any) -> None:
    """Add options, which show their defaults.

    Args:
        parser: of the command, or a group of it.
        options: their names; of those in SHARED, what they are is known.
        own: what this command says besides or otherwise, as `add_argument` takes it, and
            `setting`, the one that the option sets, `said`, what makes its value of the option's,
            `needs`, another option that it has an effect
            with, such as "launcher=local".
    """
    for name in options:
        spec = {**SHARED.get(name, {}), **own}
        choices = spec.pop("choices", None)
        more: dict[str, Any] = {key: spec.pop(key) for key in _OURS if key in spec}
        if own.get("choices") and "type" not in own:
            # What others take several of.
            spec.pop("type", None)
        if choices:
            spec = {"type": one_of(choices), "metavar": f"{{{','.join(choices)}}}", **spec}
        if spec.get("default") is not None and "default" not in spec["help"]:
            spec["help"] += " (default: %(default)s)"
        vars(parser.add_argument(f"--{name}", **spec)).update(more)


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


def add_what(
    parser: "argparse._ActionsContainer", quantities: Sequence[str], on_demand: Sequence[str] = ()
) -> None:
    """Add --what, some of `quantities`, by default all, and of those that have to be asked for."""
    more = f"; on demand {','.join(on_demand)}" if on_demand else ""
    add(
        parser,
        "what",
        type=some_of((*quantities, *on_demand)),
        default=",".join(quantities),
        metavar="Q",
        help=f"some of {','.join(quantities)} (default: all){more}",
    )


def add_precision(parser: "argparse._ActionsContainer", default: str | None = "32-true") -> None:
    """Add --precision and --amp, which exclude each other; `precision` reads them."""
    either = parser.add_mutually_exclusive_group()
    add(
        either,
        "precision",
        choices=PRECISIONS,
        default=default,
        setting="train.precision",
        help="precision of the numbers that a model computes with"
        + (" (default: that of --record, or 32-true)" if default is None else ""),
    )
    add(
        either,
        "amp",
        action="store_true",
        setting="train.precision",
        help="mixed precision: 16-mixed on a GPU, else bf16-mixed",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `key=value` arguments."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="any value of bench/config/schema.py that has an effect here, for example"
        " model.detector.detections=50",
    )


_FILES = {"train": "train_file", "val": "val_file", "images": "images"}


def add_files(parser: "argparse._ActionsContainer", *options: str) -> None:
    """Add some of --train, --val and --images; `file_values` reads them."""
    helps = {
        "train": "annotations to train on, of any name, instead of those in --data",
        "val": "annotations to evaluate on, of any name, instead of those in --data",
        "images": "folder of their images (default: looked for near the annotations)",
    }
    for name in options:
        setting = f"data.{_FILES[name]}"
        kind = "DIR" if name == "images" else "FILE"
        add(parser, name, metavar=kind, help=helps[name], setting=setting)


def file_values(options: Namespace) -> dict[str, str]:
    """Return what --train, --val and --images say of the configuration's `data`."""
    values = {key: getattr(options, name, None) for name, key in _FILES.items()}
    return {key: value for key, value in values.items() if value is not None}


def as_arguments(options: Namespace, *names: str) -> list[str]:
    """Return those of some options that were given, as a person would type them."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def precision(options: Namespace) -> str:
    """Return what --precision or --amp asks for."""
    if not options.amp:
        return str(options.precision)
    return "16-mixed" if on_gpu(options.device) else "bf16-mixed"


def on_gpu(device: str) -> bool:
    """Return whether --device means a GPU here."""
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
