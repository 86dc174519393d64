"""What a split holds, as hashes of its annotations and of the images that they name, by content."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from bench.data.layout import Place
from bench.errors import InputError
from bench.files import sha256, write_whole

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
# Of LVIS, whose images have no name besides.
_ADDRESS = re.compile(rb'"coco_url"\s*:\s*"[^"]*?([^/"]+/[^/"]+)"')
# Files that are read at a time: one waits for a disk or a network most of the time.
_AT_ONCE = 8
# Bytes of images whose reading is worth a line, and seconds after which a change has another time.
_LARGE, _CLOCK = 10**9, 2


def fingerprint(place: Place) -> dict[str, str] | None:
    """Return hashes of a split, or None where its annotations cannot be read.

    Images are hashed under the names that the annotations give them, so that a copy is the same
    data set, whatever lies beside it. See `fingerprint_images` for what that costs.
    """
    try:
        raw = place.annotation_file.read_bytes()
    except OSError:
        return None
    names = set()
    with suppress(ValueError):
        # In UTF-16 and UTF-32, too.
        text = raw.decode(json.detect_encoding(raw)).encode() if b"\0" in raw[:4] else raw
        names = {str(json.loads(found)) for found in _FILE_NAME.findall(text)}
        names = names or {found.decode() for found in _ADDRESS.findall(text)}
    found = {name: place.find(name) for name in names}
    files = {name: place.folder / path for name, path in found.items() if path is not None}
    return {
        "annotations": hashlib.sha256(raw).hexdigest(),
        "pixels": fingerprint_images(place.annotation_file, files),
    }


def fingerprint_images(source: Path, files: Mapping[str, Path]) -> str:
    """Return the hash of the names and contents of files.

    All of COCO is 20 GB, so what a file holds is kept with its size and times, in a file of the
    user's cache (`$XDG_CACHE_HOME` or `~/.cache`): only those that changed are read again. Where
    there is no such folder all are read each time.

    Args:
        source: what names the files; the cache has a file for each.
        files: by name.
    """
    contents = _contents(source, files)
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{contents[name]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files in a folder and below by their names there, without hidden ones.

    Linked folders are looked into, as readers do, but those that hold the link itself.
    """
    found = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to((here / name).resolve())]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return found


def _contents(source: Path, files: Mapping[str, Path]) -> dict[str, str]:
    cache = _cache(source)
    known: dict[str, list[object]] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(cache.read_bytes())) if cache else {}
    stamps = {name: _stamp(path) for name, path in files.items()}
    # A link to nothing has no stamp.
    new = {
        name
        for name, stamp in stamps.items()
        if not stamp or known.get(str(files[name]), [])[1:] != stamp
    }
    size = sum(stamps[name][0] for name in new if stamps[name])
    if size > _LARGE:
        what = f"{len(new)} images of {source} ({size / 1e9:.1f} GB)"
        print(f"reading {what} once, to know when they change", file=sys.stderr, flush=True)
    found = {name: str(known[str(path)][0]) for name, path in files.items() if name not in new}

    def read(name: str) -> None:
        with suppress(OSError):
            found[name] = sha256(files[name])

    settled = (time.time() - _CLOCK) * 1e9
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        list(pool.map(read, new))
    finally:
        pool.shutdown(cancel_futures=True)
        if cache and new:
            kept = {
                str(files[name]): [content, *stamps[name]]
                for name, content in found.items()
                if max(stamps[name], default=settled) < settled
            }
            with suppress(InputError):
                write_whole(cache, json.dumps(kept))
    return found


def _stamp(path: Path) -> list[int]:
    """Size and times of a file; nothing where it cannot be seen."""
    with suppress(OSError):
        state = path.stat()
        return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    return []


def _cache(source: Path) -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    name = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:16]
    return folder / "vil-attention-bench" / f"{name}.json"
