"""COCO 2017 from its official address: resumed, verified, extracted.

An archive is loaded into `NAME.part` and continued there by the next call. A split's folder and an
annotation file appear when they are complete, so that what is there needs no second look.
"""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.data import DataError
from bench.errors import InputError, choose
from bench.system.progress import Bar

BASE_URL = "http://images.cocodataset.org"
SPLITS = ("train2017", "val2017")

_CHUNK = 1 << 20
_TIMEOUT = 30.0
_TRIES = 6
_PAUSE = 2.0
_GIGA = 1e9
# What the server says about this request will be the same at the next.
_FINAL = range(400, 500)
_RANGE_REFUSED = 416

Say = Callable[[str], None]


class DownloadError(DataError):
    """A transfer that failed. What was loaded is kept, and the same call continues it."""


@dataclass(frozen=True)
class Archive:
    """A zip file of COCO.

    Attributes:
        address: its path below the base URL.
        size: in bytes.
        md5: of the file; it guards against damage, not against malice.
        images: how many there are in it, 0 for annotations.
    """

    address: str
    size: int
    md5: str
    images: int = 0

    @property
    def name(self) -> str:
        """The file's name."""
        return self.address.rpartition("/")[-1]


ARCHIVES = {
    "train2017": Archive(
        "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 118_287
    ),
    "val2017": Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 5_000),
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"
    ),
}


class Downloader:
    """Puts COCO into a folder.

    Args:
        root: the folder.
        base_url: where the archives are; a mirror has the same files.
        keep_archives: keep the zip files beside what was extracted.
        pause: seconds before a broken transfer is tried again; doubled each time.
        say: told what was done, a line each.
    """

    def __init__(
        self,
        root: Path,
        *,
        base_url: str = BASE_URL,
        keep_archives: bool = False,
        pause: float = _PAUSE,
        say: Say = print,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"{base_url!r} is no base URL; it must begin with http:// or https://")
        self._root = root
        self._base_url = base_url.rstrip("/")
        self._keep_archives = keep_archives
        self._pause = pause
        self._say = say

    def download(self, splits: Sequence[str] = SPLITS) -> None:
        """Load the splits and their annotations; what is there is left as it is.

        Raises:
            InputError: for an unknown split, a folder that cannot be written, or too little space.
            DownloadError: where an archive cannot be had, or is not what it should be.
        """
        for split in splits:
            choose(split, SPLITS, "split")
        annotations = [f"annotations/instances_{split}.json" for split in splits]
        jobs = {
            "annotations": [name for name in annotations if not self._has_file(name)],
            **{split: [] if self._has_split(split) else [split] for split in splits},
        }
        jobs = {name: targets for name, targets in jobs.items() if targets}
        with _clear_disk_errors(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            self._check_space([ARCHIVES[name] for name in jobs])
            for name, targets in jobs.items():
                path = self._fetch(ARCHIVES[name])
                self._extract(path, targets)
                if not self._keep_archives:
                    path.unlink()

    def _has_file(self, name: str) -> bool:
        there = (self._root / name).is_file()
        if there:
            self._say(f"{name}: there already")
        return there

    def _has_split(self, split: str) -> bool:
        folder = self._root / split
        if not folder.is_dir():
            return False
        found = sum(1 for path in folder.iterdir() if path.suffix == ".jpg")
        if found != ARCHIVES[split].images:
            raise InputError(
                f"{folder} is there, but has {found} of {ARCHIVES[split].images} images; move it"
                " away or remove it to load it anew"
            )
        self._say(f"{split}: there already, {found} images")
        return True

    def _check_space(self, archives: Sequence[Archive]) -> None:
        """Fail before the first byte where the last one would find no room."""
        # JPEG files are as large in the archive as out of it.
        needed = sum(2 * archive.size - self._loaded(archive) for archive in archives)
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise InputError(
                f"{self._root} has {free / _GIGA:.1f} GB free; about {needed / _GIGA:.1f} GB are"
                " needed to load and extract"
            )

    def _loaded(self, archive: Archive) -> int:
        path = self._root / archive.name
        return sum(p.stat().st_size for p in (path, _part(path)) if p.is_file())

    def _fetch(self, archive: Archive) -> Path:
        """The archive's file, verified."""
        path = self._root / archive.name
        part = _part(path)
        if path.is_file():
            part = path
        else:
            self._load(archive, part)
        size, md5 = part.stat().st_size, self._md5(part)
        if (size, md5) != (archive.size, archive.md5):
            if part != path:
                part.unlink()
            raise DownloadError(
                f"{part} is damaged: it has {size} bytes and the MD5 {md5}, but {archive.size} and"
                f" {archive.md5} are right; "
                + (
                    "remove it"
                    if part == path
                    else "it was removed, the same command loads it anew"
                )
            )
        part.replace(path)
        self._say(f"{archive.name}: {size / _GIGA:.2f} GB, MD5 {md5} is right")
        return path

    def _load(self, archive: Archive, part: Path) -> None:
        """Transfer what is missing, and try again where the connection breaks."""
        url = f"{self._base_url}/{archive.address}"
        failures = 0
        with Bar(archive.name, archive.size, done=_size(part), in_bytes=True) as bar:
            while (start := _size(part)) != archive.size:
                reason = _transfer(url, part, archive.size, bar)
                if _size(part) == archive.size:
                    break
                failures = 1 if _size(part) > start else failures + 1
                if failures == _TRIES:
                    raise DownloadError(
                        f"{url}: {reason}; {_size(part)} of {archive.size} bytes are in {part}, and"
                        " the same command continues"
                    )
                time.sleep(self._pause * 2 ** (failures - 1))

    def _md5(self, path: Path) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        bar = Bar(f"verifying {path.name}", _size(path), in_bytes=True)
        with path.open("rb") as file, bar:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                bar.advance(len(chunk))
        return digest.hexdigest()

    def _extract(self, path: Path, targets: Sequence[str]) -> None:
        """Extract aside, and move into place what is complete."""
        aside = self._root / f".{path.name}.extracted"
        try:
            with zipfile.ZipFile(path) as archive:
                members = [
                    member
                    for member in archive.infolist()
                    if any(f"{member.filename}/".startswith(f"{target}/") for target in targets)
                ]
                total = sum(member.file_size for member in members)
                with Bar(f"extracting {path.name}", total, in_bytes=True) as bar:
                    for member in members:
                        # Reading a member to its end compares its checksum.
                        archive.extract(member, aside)
                        bar.advance(member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DownloadError(f"{path} cannot be extracted: {error}; remove it") from error
        for target in targets:
            if not (aside / target).exists():
                raise DownloadError(f"{path} holds no {target}")
            (self._root / target).parent.mkdir(exist_ok=True)
            (aside / target).replace(self._root / target)
            self._say(f"{target}: extracted")
        shutil.rmtree(aside)


def _transfer(url: str, part: Path, size: int, bar: Bar) -> str:
    """Append to `part` what the server sends of the rest; return why it ended.

    Raises:
        DownloadError: where trying again is of no use.
    """
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == _RANGE_REFUSED:
            part.unlink()
            bar.advance(-start)
        elif error.code in _FINAL:
            raise DownloadError(f"{url}: {error.code} {error.reason}") from error
        return f"{error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    with response:
        # A server that knows no ranges sends the whole file.
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if not resumed:
            bar.advance(-start)
        announced = response.headers.get("Content-Length")
        whole = int(announced) + (start if resumed else 0) if announced else size
        if whole != size:
            raise DownloadError(f"{url} has {whole} bytes; the published archive has {size}")
        with part.open("ab" if resumed else "wb") as file:
            return _copy(response, file, bar)


def _copy(response: IO[bytes], file: IO[bytes], bar: Bar) -> str:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        if not chunk:
            return "the connection was closed"
        file.write(chunk)
        bar.advance(len(chunk))


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _clear_disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {root}: {error.strerror or error}; what was loaded is kept, and the"
            " same command continues"
        ) from error
