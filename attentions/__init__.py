"""Attention mechanisms for high-resolution vision, by name.

Every module of this package that registers a class is found by itself: a new mechanism is one new
file. A mechanism from elsewhere is named `package.module:Class` or `path/to/file.py:Class`.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from attentions.contract import Attention, AttentionModule, Grid, accepted_options
from attentions.reads import (
    Reads,
    deterministic,
    forget_imports,
    imports_of,
    listening,
    settings_kept,
)
from attentions.registry import registered

__all__ = [
    "Attention",
    "AttentionModule",
    "Grid",
    "Reads",
    "build",
    "build_for",
    "find",
    "forget",
    "forget_edited",
    "heard",
    "imports_of",
    "names",
    "options",
    "read_by",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_SIZE = ("dim", "num_heads", "num_global")
_PLACE = ("grid", "seq_len", "position", "block_index")
# Where files of the user lie, from beside which they import.
_folders: list[Path] = []
# What each mechanism of the user has read so far.
_reads: defaultdict[str, Reads] = defaultdict(Reads)
# Of each module that came with a mechanism of the user, its file and when that was last changed.
_modules: dict[str, tuple[Path, int]] = {}
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}


def names() -> tuple[str, ...]:
    """Return the names of all registered mechanisms, sorted."""
    return tuple(sorted(registered()))


def find(name: str) -> type[nn.Module]:
    """Return the class behind a registered name, `package.module:Class` or `file.py:Class`.

    Raises:
        ValueError: for a name that is none of these; the nearest registered one is suggested.
    """
    if ":" in name:
        return _load(name)
    if name not in registered():
        raise ValueError(
            f"unknown attention {name!r}{_nearest(name, names())}; allowed: {', '.join(names())},"
            " or a mechanism of yours as package.module:Class or file.py:Class"
        )
    return registered()[name]


def options(name: str) -> tuple[str, ...]:
    """Return the names of a mechanism's options, without those that its size and place decide.

    Raises:
        ValueError: for an unknown mechanism.
    """
    decided = (*_SIZE, *_PLACE)
    return tuple(sorted(key for key in accepted_options(find(name)) if key not in decided))


def build(name: str, *, dim: int, num_heads: int, num_global: int = 1, **options: Any) -> nn.Module:
    """Build a mechanism: a module that is called as `module(x, grid)`.

    Args:
        name: a registered name, or `package.module:Class`, or `file.py:Class`.
        dim: channels.
        num_heads: attention heads.
        num_global: global tokens at the head of the sequence.
        options: the mechanism's own options.

    Raises:
        ValueError: for an unknown mechanism or option; the message lists the known ones; and for a
            module whose parameters have no shape yet.
    """
    factory = find(name)
    accepted = accepted_options(factory)
    for option in options:
        if option not in accepted:
            own = sorted(set(accepted) - set(_SIZE))
            raise ValueError(
                f"{name} has no option {option!r}{_nearest(option, own)};"
                f" allowed: {', '.join(own) or 'none'}"
            )
    missing = [
        key
        for key, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and key not in (*_SIZE, *options)
    ]
    if missing:
        raise ValueError(f"{name} needs the option {', '.join(map(repr, missing))}")
    of_user = ":" in name
    with (
        heard(name) if of_user else nullcontext(),
        deterministic(True, fills=True) if of_user else nullcontext(),
    ):
        try:
            module = factory(dim=dim, num_heads=num_heads, num_global=num_global, **options)
        except SystemExit as error:
            # One row must not end the others.
            raise ValueError(f"{name}: its constructor calls sys.exit: {error}") from error
    lazy = [key for key, value in module.state_dict(keep_vars=True).items() if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"{name}: {', '.join(lazy)} have no shape before a first call, so they could be neither"
            f" initialised nor counted; build them with sizes, nn.Linear({dim}, …) in the place of"
            " nn.LazyLinear(…)"
        )
    empty = [
        key
        for key, value in module.named_parameters()
        if not value.is_meta and value.is_floating_point() and value.isnan().any()
    ]
    if of_user and empty:
        raise ValueError(
            f"{name}: {', '.join(empty)} hold values that are not a number: its constructor leaves"
            " them as torch.empty made them, or makes them so; fill them there"
        )
    return module


def build_for(
    name: str,
    *,
    grid: Grid,
    position: str = "absolute",
    block_index: int = 0,
    dim: int,
    num_heads: int,
    num_global: int = 1,
    **options: Any,
) -> nn.Module:
    """Build a mechanism for a place: its largest grid, kind of positions and block in its stage.

    `grid`, `seq_len`, `position` and `block_index` reach the mechanism where its constructor takes
    them and `options` does not say otherwise.
    """
    place = {
        "grid": grid,
        "seq_len": num_global + grid[0] * grid[1],
        "position": position,
        "block_index": block_index,
    }
    accepted = accepted_options(find(name))
    fitted = {key: value for key, value in place.items() if key in accepted} | options
    return build(name, dim=dim, num_heads=num_heads, num_global=num_global, **fitted)


def read_by(name: str) -> Reads:
    """Return what a mechanism of the user read when it was imported, and built in this process."""
    return _reads[name]


@contextmanager
def heard(name: str) -> Iterator[None]:
    """Hear what a mechanism of the user reads; it must not change settings of torch.

    What it prints is no output of a command, which may be JSON.
    """
    with settings_kept(), listening(_reads[name]), redirect_stdout(sys.stderr):
        yield


def forget_edited() -> None:
    """Let mechanisms of the user be imported anew where one of their files was edited since.

    A process that goes on, such as a notebook's, would build what was in the files before.
    """
    if any(_changed(path) != changed for path, changed in _modules.values()):
        forget()


def forget(files: Iterable[Path] = ()) -> None:
    """Let mechanisms of the user be imported anew, and what came with them.

    Args:
        files: of modules that they imported later.
    """
    later = {*files}
    _keep_in_mind(name for name in [*sys.modules] if _file_of(name) in later)
    for mechanism in [*_reads]:
        if _key(mechanism.rpartition(":")[0]) in _modules:
            del _reads[mechanism]
    for name, (path, _) in _modules.items():
        forget_imports(path)
        sys.modules.pop(name, None)
    _modules.clear()
    importlib.invalidate_caches()


def _file_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def _changed(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _keep_in_mind(names: Iterable[str]) -> None:
    """Remember those modules that are neither installed nor of this package."""
    for name in names:
        file = _file_of(name)
        # A file of the user may lie beside this package.
        ours = name.partition(".")[0] in ("attentions", "bench", "report", "run_all")
        if file and not ours and not any(map(file.is_relative_to, _INSTALLED)):
            _modules[name] = file, _changed(file)


def _nearest(value: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _load(name: str) -> type[nn.Module]:
    source, _, attribute = name.rpartition(":")
    before = {*sys.modules}
    try:
        with heard(name):
            module = _load_file(Path(source)) if source.endswith(".py") else _import(source)
        _keep_in_mind(sys.modules.keys() - before)
    except (Exception, SystemExit) as error:
        # Whatever goes wrong in the user's code is a mistake in what this name points at.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if source.endswith(".py") and "no known parent package" in reason:
            reason += "; a module of a package is given as package.module:Class"
        raise ValueError(f"attention {name!r}: cannot import {source!r}: {reason}") from error
    factory = getattr(module, attribute, None)
    if not (isinstance(factory, type) and issubclass(factory, nn.Module)):
        raise ValueError(f"attention {name!r}: {source} has no torch module class {attribute!r}")
    return factory


def _import(source: str) -> Any:
    # A user's module beside the command is meant to be found, as with `python -m`.
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(source)


def _key(source: str) -> str:
    """The name in sys.modules of a mechanism's file or module."""
    if not source.endswith(".py"):
        return source
    path = Path(source)
    return f"attentions_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ImportError(f"no such file: {path}")
    key = _key(str(path))
    if key not in sys.modules:
        _let_import_from(path.resolve().parent)
        spec = importlib.util.spec_from_file_location(key, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"not a Python file: {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def _let_import_from(folder: Path) -> None:
    """Let a file import what lies beside it, as one that Python runs; what is installed is first.

    Raises:
        ImportError: where a module of that name was imported from beside another file.
    """
    if folder in _folders:
        # Before those of other mechanisms, whose modules may have the same names.
        sys.path.remove(str(folder))
        sys.path.insert(_first_of_users(), str(folder))
        return
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        if path.name == "__init__.py":
            path = path.parent
        own = folder / path.name
        if "." not in name and name == path.stem and path.parent in _folders and own.exists():
            raise ImportError(
                f"{own} and {path} have one name, by which one of them can be imported in a"
                " process; rename one, or run the rows by commands of their own"
            )
    sys.path.insert(_first_of_users(), str(folder))
    _folders.append(folder)


def _first_of_users() -> int:
    """Where the folders of the user's files begin in the path, which is after all others."""
    own = [sys.path.index(str(folder)) for folder in _folders if str(folder) in sys.path]
    return min(own, default=len(sys.path))
