"""What a run says of itself while it runs: a JSON line a step, and a log that a person reads.

Both are in `output/logs`, one of each a run: `{row}-{key}.jsonl` and `{row}-{key}.log`.
"""

import codecs
import errno
import io
import json
import logging
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bench.errors import import_optional, saying
from bench.files import write_whole

TENSORBOARD_INSTALL = "pip install '.[tensorboard]'"

# Lines for a person; they go to the run's log alone.
run_log = logging.getLogger("bench.run_log")
run_log.propagate = False
run_log.setLevel(logging.INFO)
run_log.addHandler(logging.NullHandler())


# What signs are where output has no other than those of ASCII.
_PLAIN = {
    "≥": ">=",
    "±": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{EN DASH}": "-",
    "─": "-",
    "…": "...",
    "²": "^2",
}


def tolerate_encoding() -> None:
    """Let what standard output cannot encode become plain signs or `?`, where it is not UTF-8."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in text), error.end


def refused(prog: str, error: OSError) -> int:
    """Say that a file may not be read or output cannot be written, and return the exit code.

    Raises:
        OSError: an error of anything else.
    """
    if isinstance(error, PermissionError) and error.filename is not None:
        print(f"{prog}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
        raise error
    # Python would complain once more when it flushes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        # Whoever reads the output has seen enough.
        return 141
    print(f"{prog}: failed: cannot write the output: {error.strerror}", file=sys.stderr)
    return 1


class StepLog:
    """A JSON object a step, one a line, in the order of steps and each step once.

    Use as a context manager.

    Args:
        path: the file; a resumed run goes on in it.
        tensorboard: folder of TensorBoard's events, or None for none.
        every: the readable log tells of each so many steps.
        total: steps of the whole run.

    Raises:
        InputError: for TensorBoard where it is not installed, or a file that cannot be written.
    """

    def __init__(
        self, path: Path, *, tensorboard: Path | None = None, every: int = 20, total: int = 0
    ) -> None:
        self.path = path
        self.every = every
        self.total = total
        self._file: TextIO | None = None
        self._board = None if tensorboard is None else _board(tensorboard)
        # Steps since the last line of the readable log.
        self._unlogged: list[Mapping[str, Any]] = []

    def begin(self, step: int) -> None:
        """Go on after `step`: later lines, of steps that are done again, and half lines go."""
        kept = [line for line in read_steps(self.path) if line["step"] <= step]
        write_whole(self.path, "".join(map(_line, kept)))
        with saying(f"cannot write {self.path}"):
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add the line of a step.

        Raises:
            InputError: where it cannot be written.
        """
        if self._file is None:
            self.begin(int(entry["step"]) - 1)
        with saying(f"cannot write {self.path}"):
            if self._file is not None:
                self._file.write(_line(entry))
                self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, entry["step"])
        self._unlogged.append(entry)
        if entry["step"] % self.every == 0 or entry["step"] == self.total:
            run_log.info("step %d of %d: %s", entry["step"], self.total, _readable(entry))
            run_log.info("the %d steps up to it: %s", len(self._unlogged), _pace(self._unlogged))
            self._unlogged = []

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        for closing in (self._file, self._board):
            if closing is not None:
                closing.close()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Write what `run_log` says, and every warning of the harness, to the log at `path`.

    Raises:
        InputError: where it cannot be written.
    """
    with saying(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = (run_log, logging.getLogger("bench"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def table(rows: Sequence[tuple[str, int]]) -> str:
    """Names and whole numbers in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {number:>14,}" for name, number in rows)


def check_tensorboard() -> Any:
    """Return the module that writes TensorBoard's events.

    Raises:
        InputError: where it is not importable.
    """
    module, what = "torch.utils.tensorboard", "--tensorboard: TensorBoard"
    return import_optional(module, what, TENSORBOARD_INSTALL)


def _board(folder: Path) -> Any:
    return check_tensorboard().SummaryWriter(str(folder))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a step log; a half line at its end, of a killed run, is passed over."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            # A run that was killed while it wrote.
            return


def _pace(entries: Sequence[Mapping[str, Any]]) -> str:
    """How fast these steps were, how fast data can be read, and how long they waited for it."""
    # Of rates over the same number of images each, the harmonic mean is the rate over all.
    trained, read = (
        statistics.harmonic_mean([entry[name] for entry in entries])
        for name in ("images_per_second", "loader_images_per_second")
    )
    waited, all_ = (
        sum(entry[name] for entry in entries) for name in ("data_seconds", "step_seconds")
    )
    return (
        f"{trained:.4g} images/s, where the loader reads up to {read:.4g} images/s;"
        f" waited for data {waited / all_:.1%} of the time"
    )


def _readable(entry: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in entry.items()
        if name != "step" and value is not None
    )
