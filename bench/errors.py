"""What the command line turns into one clear line and exit code 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user gave: a value, a file or a name.

    The message is one line that names the value, where it came from and what is allowed.
    """

    kind = "input"


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
