"""What a mechanism of the user does besides while it is imported and built.

It reads files and environment variables, which it is then made of, and it must not change settings
of torch, which would change other rows of the same process.
"""

import builtins
import functools
import importlib
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch


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
# Of each file, the files of modules that were imported while code of it ran.
_imports: defaultdict[str, set[str]] = defaultdict(set)
_real = functools.lru_cache(maxsize=None)(os.path.realpath)


def imports_of(file: Path) -> set[Path]:
    """Return the files that were imported while code of a file ran and was listened to.

    They are those too that were loaded before, and whose names the code made up.
    """
    return set(map(Path, _imports.get(_real(str(file)), ())))


def forget_imports(file: Path) -> None:
    """Forget what was imported while code of a file ran, as it will run anew."""
    _imports.pop(_real(str(file)), None)


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
    with ExitStack() as replaced:
        replaced.callback(_listening.remove, reads)
        replaced.enter_context(_replaced(kind, "__getitem__", lambda _: read))
        replaced.enter_context(_replaced(builtins, "__import__", _noting_imports))
        replaced.enter_context(_replaced(importlib, "import_module", _noting_imports))
        # Its reader is no code of Python, which would be heard.
        for name in ("safetensors", "safetensors.torch"):
            with suppress(ImportError):
                module = importlib.import_module(name)
                replaced.enter_context(_replaced(module, "safe_open", _noting_files))
        yield


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[[Any], Any]) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, by(usual))
    try:
        yield
    finally:
        setattr(owner, name, usual)


def _noting_imports(usual: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(usual)
    def imported(name: str, *args: Any, **kwargs: Any) -> Any:
        module = usual(name, *args, **kwargs)
        file = getattr(sys.modules.get(name, module), "__file__", None)
        frame = sys._getframe(1) if isinstance(file, str) else None
        while frame is not None:
            _imports[_real(frame.f_code.co_filename)].add(str(file))
            frame = frame.f_back
        return module

    return imported


def _noting_files(usual: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(usual)
    def opened(filename: Any, *args: Any, **kwargs: Any) -> Any:
        _hear(filename)
        return usual(filename, *args, **kwargs)

    return opened


def _hear(file: Any) -> None:
    if isinstance(file, str | bytes | os.PathLike):
        path = Path(os.fsdecode(file)).absolute()
        for reads in _listening:
            reads.files.add(path)


@functools.cache
def _hear_files() -> None:
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if _listening and event in ("open", "ctypes.dlopen"):
            _hear(arguments[0])

    # It cannot be taken away again.
    sys.addaudithook(hear)


@contextmanager
def deterministic(on: bool, *, fills: bool = False) -> Iterator[None]:
    """Let torch use deterministic algorithms, or not, whatever it did before.

    Args:
        fills: whether memory that nothing has written yet is NaN then, not whatever was there.
    """
    filling: Any = torch.utils.deterministic
    before = _determinism(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on, warn_only=on)
    filling.fill_uninitialized_memory = fills
    own = _determinism()
    try:
        with warnings.catch_warnings():
            # It is no wish of the caller.
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        filling.fill_uninitialized_memory = before[1]
        # What the code within itself set is seen by others.
        if _determinism() == own:
            torch.use_deterministic_algorithms(before[0][0], warn_only=before[0][1])


def _determinism() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@contextmanager
def settings_kept() -> Iterator[None]:
    """Refuse what changes settings of torch that hold for all rows, and take the change back.

    Raises:
        ValueError: naming the settings.
    """
    before = {name: get() for name, (get, _) in _SETTINGS.items()}
    try:
        yield
    finally:
        changed = {name: get() for name, (get, _) in _SETTINGS.items() if get() != before[name]}
        for name in changed:
            _SETTINGS[name][1](before[name])
    if changed:
        said = ", ".join(f"{name} to {value}" for name, value in changed.items())
        raise ValueError(
            f"it sets {said}, which would change other rows too; do that within forward, with a"
            " context manager that takes it back"
        )


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)


_CUDA, _CUDNN = torch.backends.cuda, torch.backends.cudnn
# How a setting is read and written, by its name.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "whether there are gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "detection of anomalies": (
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
    ),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the precision of float32 products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "flash attention": (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    "memory-efficient attention": (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    "cuDNN's attention": (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
    "plain attention": (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
    "cudnn.enabled": _attribute(_CUDNN, "enabled"),
    "cudnn.benchmark": _attribute(_CUDNN, "benchmark"),
    "cudnn.deterministic": _attribute(_CUDNN, "deterministic"),
    "cudnn.allow_tf32": _attribute(_CUDNN, "allow_tf32"),
}
