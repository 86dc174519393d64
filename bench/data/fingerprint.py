"""What a split holds, as hashes: its annotations by content, its images mostly by name and size."""

import hashlib
import os
from pathlib import Path

from bench.data.layout import Place
from bench.files import sha256

_UNCOMPRESSED = (".bmp", ".pgm", ".pnm", ".ppm", ".tif", ".tiff")


def fingerprint(place: Place) -> dict[str, str] | None:
    """Return hashes of a split, or None where its annotations cannot be read.

    Images are told apart by their names and sizes in bytes: reading all of COCO takes minutes at
    each start, and times of change would make a copy another data set. Files whose size says
    nothing of their pixels, such as BMP, are read. Another that is changed and keeps its size in
    bytes goes unnoticed.
    """
    try:
        annotations = sha256(place.annotation_file)
    except OSError:
        return None
    return {"annotations": annotations, "images": fingerprint_images(place.folder)}


def fingerprint_images(folder: Path) -> str:
    """Return the hash of the names and sizes in bytes of the files in a folder; see above."""
    digest = hashlib.sha256()
    for name, size in sorted(_files(folder)):
        content = sha256(folder / name) if name.lower().endswith(_UNCOMPRESSED) else ""
        digest.update(f"{name}\0{size}{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> list[tuple[str, int]]:
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            # Names with a dot in front are what systems leave in folders that they show.
            if not name.startswith(".") and path.is_file():
                found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return found
