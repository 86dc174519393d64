"""What the command line turns into one clear line and exit code 2."""

import difflib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType


class InputError(ValueError):
    """A mistake in what the user gave: a value, a file or a name.

    The message is one line that names the value, where it came from and what is allowed.
    """

    kind = "input"


class RowError(InputError):
    """A mistake in what one row is made of, which no other row has to end with."""


class DivergedError(RuntimeError):
    """A loss or a gradient that is not a finite number."""

    kind = "diverged"


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Turn what the system refuses into an InputError: `what` could not be done, and why."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror or error}") from error


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of `allowed`, or nothing."""
    names = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(value.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def choose(value: str, allowed: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `allowed`.

    Raises:
        InputError: naming `what`, the value, the nearest allowed name and all allowed names.
    """
    names = list(allowed)
    if value in names:
        return value
    raise InputError(
        f"unknown {what} {value!r}{nearest(value, names)}; allowed: {', '.join(names)}"
    )


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def import_optional(module: str, what: str, install: str) -> ModuleType:
    """Import a module that need not be installed.

    Raises:
        InputError: naming `what` needs it, and how to install it, where it is not importable.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{what} is not importable ({error}); install it with: {install}"
        ) from error
