"""The source of a mechanism: its file, and what it imports; of a user's, what it reads too."""

import ast
import functools
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import attentions
from attentions.contract import Redrawing
from bench.config.arch import parse
from bench.config.schema import ModelConfig
from bench.files import sha256

_OURS = Path(__file__).resolve().parents[2]
# Names of folders that one path is put together of, and that of its file.
_DEPTH = 3
# Variables that say where a process runs, not what it computes.
_OF_A_PROCESS = re.compile(
    r"(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|(MASTER|SLURM|TORCHELASTIC|CUDA|G?OMP|XDG)_.*"
    r"|HOME|PATH|(OLD)?PWD|SHLVL|TMPDIR|USER|_|CUBLAS_WORKSPACE_CONFIG"
)
# How files of this package are called that a mechanism is made of.
OURS = " of this package"
# What all mechanisms stand on: their versions are in each record, and run nothing again. Of this
# package the files are known.
_GROUND = {"torch", "torchvision", "numpy", "vil-attention-bench"}
# Where the system's own files lie, and folders of what is made again where it is missing.
_SYSTEM = tuple(map(Path, ("/dev", "/etc", "/proc", "/sys", "/usr/lib", "/usr/share")))
_CACHES = {"__pycache__", ".cache", ".triton", "torch_extensions", "site-packages", "dist-packages"}
_INSTALLED = tuple(
    Path(sysconfig.get_path(name)).resolve()
    for name in ("purelib", "platlib", "stdlib", "platstdlib")
)


# What each row was made of when it last ran in this process.
_last: dict[str, list["Source"]] = {}


@dataclass(frozen=True)
class Source:
    """A file of a mechanism, or an environment variable or installed package of a user's.

    Attributes:
        name: its path from the folder of the mechanism's own file; `$NAME` of a variable,
            `package NAME` of what is installed; it ends in OURS where it lies in this package.
        path: where it is, or the file that reads or imports it.
        sha256: of its content, value or version.
    """

    name: str
    path: Path
    sha256: str


class Width(NamedTuple):
    """How wide a mechanism is built."""

    dim: int
    num_heads: int
    num_global: int


_WIDTH, _GRID = Width(64, 4, 1), (8, 8)


def sources_of(model: ModelConfig) -> list[Source]:
    """Return the files that the mechanisms of a model are made of, those of dense blocks too."""
    dense = ",full" if model.dense else ""
    widths = {_WIDTH}
    # A wrong one is an error of the run.
    with suppress(ValueError):
        stages = parse(model.arch, model.attention)
        widths = {Width(s.dim, s.heads, s.num_global) for s in stages}
    return mechanism_sources(model.attention + dense, model.options, widths)


def import_anew(model: ModelConfig) -> None:
    """Let mechanisms be imported anew that are made of something else than at their last run here.

    A process that goes on, such as a notebook's, would build what was in the files before.
    """
    attentions.forget_edited()
    row = repr((model.attention, model.options))
    sources = sources_of(model)
    if _last.get(row, sources) != sources:
        attentions.forget(source.path for source in sources if source.path.suffix == ".py")
        sources = sources_of(model)
    _last[row] = sources


def mechanism_sources(
    attention: str,
    options: Mapping[str, Any] | None = None,
    widths: Iterable[Width] = (),
) -> list[Source]:
    """Return the files that the mechanisms in `attention` are made of.

    Of this package they are the files that define them, and what these import from `attentions`.
    Of a user's they are the files that `file.py:Class` or `package.module:Class` names, the modules
    that these import from their own folder or package, or from elsewhere if it is not installed,
    theirs too, the files that are opened while it is imported, built and called on a small grid,
    and those that each names in texts: beside it, in folders that it names, or by an absolute path.
    So are the environment variables that are set and that are read then, or that a file of them
    which reads the environment names, whole or by a prefix that ends in `_`, and the versions of
    the installed packages that they import.

    Args:
        attention: one name, or one for each stage, comma-separated.
        options: of the mechanisms.
        widths: that they are built in, since they may read a file for each.
    """
    widths = sorted(widths) or [_WIDTH]
    mechanisms, ours = defaultdict(list), set()
    for mechanism in dict.fromkeys(attention.split(",")):
        start = _file(mechanism)
        if start is None:
            continue
        if ":" in mechanism:
            mechanisms[start].append(_read_by(mechanism, options or {}, widths))
        else:
            ours.add(start)
    found = []
    for start, reads in mechanisms.items():
        opened = filter(None, (_of_a_user(path) for one in reads for path in one.files))
        reached = sorted({*_reached(start), *opened})
        ours |= {path for one in reached if one.suffix == ".py" for path in _imported_of_ours(one)}
        for path in reached:
            name = Path(os.path.relpath(path, start.parent)).as_posix()
            found.append(Source(name, path, sha256(path)))
        readers = {name: path for path in reached if path.suffix == ".py" for name in _read(path)}
        for one in reads:
            for name in one.variables.keys() & os.environ.keys():
                by = {path.resolve() for path in one.variables[name]}.intersection(reached)
                if by and not _OF_A_PROCESS.fullmatch(name):
                    readers[name] = min(by)
        for name in sorted(readers):
            value = hashlib.sha256(os.fsencode(os.environ[name]))
            found.append(Source(f"${name}", readers[name], value.hexdigest()))
        known = _distributions(tuple(sys.path))
        tops = ((path, known.get(top, ())) for path in reached for top in _tops(path))
        users = {name: path for path, names in tops for name in names}
        for name in sorted(users.keys() - _GROUND):
            version = hashlib.sha256(metadata.version(name).encode())
            found.append(Source(f"package {name}", users[name], version.hexdigest()))
    for path in sorted(_reached(*ours, imported=_imported_of_ours)):
        name = path.relative_to(_OURS).as_posix() + OURS
        found.append(Source(name, path, sha256(path)))
    return found


def _read_by(
    mechanism: str, options: Mapping[str, Any], widths: Sequence[Width]
) -> attentions.Reads:
    """What a mechanism reads when it is imported, and built and called for a small grid."""
    for width in widths:
        # What is wrong with it is an error of the run.
        with suppress(Exception), torch.random.fork_rng([]):
            _call(mechanism, width, options)
    return attentions.read_by(mechanism)


def _call(mechanism: str, width: Width, options: Mapping[str, Any]) -> None:
    """Call a mechanism in evaluation and in a step of training, which may be when it reads."""
    rows, columns = _GRID
    module: Any = attentions.build_for(mechanism, grid=_GRID, **width._asdict(), **options)
    tokens = torch.zeros(1, width.num_global + rows * columns, width.dim)
    quiet = torch.compiler.set_stance("force_eager")
    for training in (False, True):
        # A call that fails on the CPU is no reason to leave the other one out.
        with suppress(Exception), attentions.heard(mechanism), quiet, torch.no_grad():
            module.train(training)
            if training and isinstance(module, Redrawing):
                module.set_training_step(0)
            module(tokens, _GRID)


def _of_a_user(path: Path) -> Path | None:
    """A file that was opened, if it is of a user and has content."""
    if path.suffix == ".pyc":
        with suppress(ValueError, NotImplementedError):
            path = Path(importlib.util.source_from_cache(str(path)))
    with suppress(OSError):
        path = path.resolve()
        if not _is_ours(path) and path.is_file() and path.stat().st_size:
            return path
    return None


def _is_ours(path: Path) -> bool:
    """Whether a file is of this package, or installed, or in a cache."""
    ours = (_OURS / name for name in ("attentions", "bench", "configs", "report", "run_all.py"))
    places = (*ours, *_INSTALLED, *_SYSTEM)
    below = any(path.is_relative_to(place) for place in places)
    return below or not _CACHES.isdisjoint(path.parts) or any(map(_has_packages, path.parents))


@functools.cache
def _has_packages(folder: Path) -> bool:
    """Whether packages were installed there, as by `pip install --target`: their versions count."""
    return next(folder.glob("*.dist-info"), None) is not None


def _file(mechanism: str) -> Path | None:
    """The file that defines a mechanism, if there is one; else that is an error of the run."""
    source = mechanism.rpartition(":")[0]
    if not source:
        with suppress(ValueError):
            return Path(inspect.getfile(attentions.find(mechanism))).resolve()
        return None
    if source.endswith(".py"):
        path = Path(source)
    else:
        spec = importlib.util.find_spec(source)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin)
    return path.resolve() if path.is_file() else None


def _reached(*start: Path, imported: Callable[[Path], Iterator[Path]] | None = None) -> set[Path]:
    """The files and all that they import, by default from their own folder or package."""
    reached, waiting = {*start}, [*start]
    while waiting:
        for path in (imported or _imported)(waiting.pop()):
            if path not in reached:
                reached.add(path)
                waiting.append(path)
    return reached


def _parsed(path: Path) -> ast.AST:
    found = path.stat()
    return _parsed_once(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=256)
def _parsed_once(path: Path, *_: int) -> ast.AST:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # A compiled module, or settings; or one that fails when it is imported, and says so itself.
        return ast.Module([], [])


def _texts(tree: ast.AST) -> set[str]:
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {text for text in constants if isinstance(text, str)}


def _read(path: Path) -> Iterator[str]:
    """Environment variables that a file reads."""
    tree = _parsed(path)
    named = {
        getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
        for node in ast.walk(tree)
    }
    if not named & {"environ", "environb", "getenv"}:
        return
    texts = _texts(tree)
    prefixes = tuple(text for text in texts if text.endswith("_") and text.strip("_"))
    for name in os.environ:
        if (name in texts or name.startswith(prefixes)) and not _OF_A_PROCESS.fullmatch(name):
            yield name


@functools.cache
def _distributions(_: tuple[str, ...]) -> Mapping[str, list[str]]:
    """The installed packages of each module, in the folders of sys.path."""
    return metadata.packages_distributions()


def _tops(path: Path) -> Iterator[str]:
    """Names of the packages that a file imports or, if it is installed, lies in."""
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]
    yield from (path.relative_to(root).parts[0] for root in _INSTALLED if path.is_relative_to(root))


def _imported(path: Path) -> Iterator[Path]:
    tree = _parsed(path)
    # Where absolute names start: the folder beside the file, and the one its package lies in.
    top = path.parent
    while (top / "__init__.py").is_file():
        if not any(map(top.is_relative_to, _INSTALLED)):
            # It runs before the file does.
            yield top / "__init__.py"
        top = top.parent
    yield from _named(path.parent, tree)
    yield from filter(None, map(_of_a_user, attentions.imports_of(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _modules({path.parent, top}, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            for alias in node.names:
                yield from _modules({base}, ".".join(filter(None, (node.module, alias.name))))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from _modules({path.parent, top}, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    level = len(name) - len(name.lstrip("."))
                    roots = {path.parents[level - 1]} if level else {path.parent, top}
                    yield from _modules(roots, name[level:])


def _imported_of_ours(path: Path) -> Iterator[Path]:
    """The mechanisms of this package that a file imports, and what they have in common."""
    for node in ast.walk(_parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = _OURS.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("attentions.") and file.is_file():
                yield file


def _named(folder: Path, tree: ast.AST) -> Iterator[Path]:
    """Settings, weights and kernels that are read by the names that they have in the source."""
    texts = [text for text in _texts(tree) if text.strip("/.")]
    folders = {folder}
    for _ in range(_DEPTH):
        for place in [place / text for place in folders for text in texts]:
            with suppress(OSError, ValueError):
                if place.is_dir():
                    folders.add(place)
                # What the system makes up as it is read, in /proc, has no size.
                found = place.parent.glob(place.name) if place.name[:2] == "*." else [place]
                yield from (one.resolve() for one in found if one.is_file() and one.stat().st_size)


def _modules(roots: set[Path], name: str) -> Iterator[Path]:
    """The files of a dotted name below `roots`; its last parts may be names in a module."""
    for root in roots:
        # All that is installed lies beside one another; ours has its commit in the record.
        ours = root == _OURS and name.split(".")[0] in ("attentions", "bench")
        if ours or root in _INSTALLED:
            continue
        folder = root
        for part in name.split("."):
            for path in (folder / part / "__init__.py", folder / f"{part}.py"):
                if path.is_file():
                    yield path.resolve()
            folder /= part
    # What the file itself put on the path, as the import of its class has done by now.
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        own = getattr(sys.modules.get(".".join(parts[:count])), "__file__", None)
        path = Path(own or "").resolve()
        if path.is_file() and not _is_ours(path):
            yield path
