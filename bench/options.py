"""Types of command-line arguments that several commands share.

Each is a function from text to value that raises `argparse.ArgumentTypeError` with one clear line,
which argparse prints with the option's name; its exit code is 2.
"""

import re
from argparse import ArgumentTypeError

ImageSize = tuple[int, int]


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


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


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
