"""COCO 2017 from its official address, by pooch: verified and extracted.

A split's folder and an annotation file appear when they are complete, so that what is there needs
no second look.
"""

import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.data import DataError
from bench.errors import InputError, choose, saying

BASE_URL = "http://images.cocodataset.org"
SPLITS = ("train2017", "val2017")
RETRIES = 5


class DownloadError(DataError):
    """A transfer that failed, or an archive that is not what it should be."""


class Archive(NamedTuple):
    """A zip file of COCO: path below the base URL, bytes, MD5 against damage, images in it."""

    address: str
    size: int
    md5: str
    images: int = 0


ARCHIVES = {
    "train2017": Archive(
        "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 118_287
    ),
    "val2017": Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 5_000),
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"
    ),
}


def download(
    root: Path,
    splits: Sequence[str] = SPLITS,
    *,
    base_url: str = BASE_URL,
    keep_archives: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Load splits of COCO and their annotations into a folder; what is there is left as it is.

    Args:
        base_url: where the archives are; a mirror has the same files.
        keep_archives: keep the zip files beside what was extracted.
        log: receives what was done, a line each.

    Raises:
        InputError: for an unknown split, a folder that cannot be written, or too little space.
        DownloadError: where an archive cannot be had, or is not what it should be.
    """
    if not base_url.startswith(("http://", "https://")):
        raise InputError(f"{base_url!r} must begin with http:// or https://")
    for split in splits:
        choose(split, SPLITS, "split")
    files = [f"annotations/instances_{split}.json" for split in splits]
    jobs = {"annotations": [name for name in files if not (root / name).is_file()]}
    jobs |= {split: [] if _has_images(root, split) else [split] for split in splits}
    jobs = {name: targets for name, targets in jobs.items() if targets}
    with saying(f"cannot write to {root}"):
        root.mkdir(parents=True, exist_ok=True)
        _check_space(root, [ARCHIVES[name] for name in jobs])
        for name, targets in jobs.items():
            path = _fetch(root, ARCHIVES[name], base_url.rstrip("/"))
            _extract(root, path, targets)
            log(f"{', '.join(targets)}: loaded, verified and extracted")
            if not keep_archives:
                path.unlink()


def _has_images(root: Path, split: str) -> bool:
    folder, expected = root / split, ARCHIVES[split].images
    if not folder.is_dir():
        return False
    found = sum(1 for path in folder.iterdir() if path.suffix == ".jpg")
    if found != expected:
        raise InputError(
            f"{folder} is there, but has {found} of {expected} images; move it away or remove it"
            " to load it anew"
        )
    return True


def _check_space(root: Path, archives: Sequence[Archive]) -> None:
    # JPEG files are as large in the archive as out of it.
    needed, free = sum(2 * archive.size for archive in archives), shutil.disk_usage(root).free
    if needed > free:
        raise InputError(
            f"{root} has {free / 1e9:.1f} GB free; about {needed / 1e9:.1f} GB are needed to load"
            " and extract"
        )


def _fetch(root: Path, archive: Archive, base_url: str) -> Path:
    """The archive's file, verified; one that is there and right is not loaded again."""
    # Imported here: they take a second, which no other action needs.
    import pooch
    from requests import RequestException

    url, name = f"{base_url}/{archive.address}", archive.address.rpartition("/")[-1]
    files = pooch.create(
        root,
        base_url="",
        registry={name: f"md5:{archive.md5}"},
        urls={name: url},
        retry_if_failed=RETRIES,
    )
    loader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
    try:
        return Path(files.fetch(name, downloader=loader))
    except (RequestException, ValueError) as error:
        raise DownloadError(f"{url}: {' '.join(str(error).split())}") from error


def _extract(root: Path, path: Path, targets: Sequence[str]) -> None:
    """Extract aside, and move into place what is complete."""
    aside = root / f".{path.name}.extracted"
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = tuple(f"{target}/" for target in targets)
            members = [n for n in archive.namelist() if f"{n}/".startswith(wanted)]
            # Reading a member to its end compares its checksum.
            archive.extractall(aside, members)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{path} cannot be extracted: {error}; remove it") from error
    for target in targets:
        if not (aside / target).exists():
            raise DownloadError(f"{path} holds no {target}")
        (root / target).parent.mkdir(exist_ok=True)
        (aside / target).replace(root / target)
    shutil.rmtree(aside)
