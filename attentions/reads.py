"""What a mechanism of the user reads while it is imported and built: files and variables."""

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reads:
    """What was read.

    Attributes:
        files: all that were opened, modules of Python too.
        variables: environment variables, each with the files whose code read it.
    """

    files: set[Path] = field(default_factory=set)
    variables: dict[str, set[Path]] = field(default_factory=dict)


_listening: list[Reads] = []


@contextmanager
def listening(reads: Reads) -> Iterator[None]:
    """Add to `reads` what is read within."""
    _hear_files()
    kind: Any = type(os.environ)
    usual = kind.__getitem__

    def read(self: Any, key: str) -> str:
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__") in ("os", "_collections_abc"):
            frame = frame.f_back
        reads.variables.setdefault(key, set()).add(Path(frame.f_code.co_filename))
        value: str = usual(self, key)
        return value

    _listening.append(reads)
    kind.__getitem__ = read
    try:
        yield
    finally:
        kind.__getitem__ = usual
        _listening.remove(reads)


@functools.cache
def _hear_files() -> None:
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if _listening and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.fsdecode(arguments[0])).absolute()
            for reads in _listening:
                reads.files.add(path)

    # It cannot be taken away again.
    sys.addaudithook(hear)
