"""Where the files of a data set are: COCO's own layout, and those of common exports.

- COCO: `annotations/instances_SPLIT.json`, images in `SPLIT/`, `images/SPLIT/` or `images/` (CVAT);
- Roboflow: `SPLIT/_annotations.coco.json` beside its images, or their folder `images`;
- any other, such as Label Studio's `result.json` or FiftyOne's `labels.json` beside `data/`: the
  file is named, and the images' folder where it is neither near it nor has the split's name.
"""

import contextlib
import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.errors import InputError

LAYOUT = "annotations/instances_SPLIT.json and the images in SPLIT/, for example train2017"
_PATTERNS = ("annotations/instances_{}.json", "{}/_annotations.coco.json")
# What exports call the splits that the suites name.
_OTHER_NAMES = {"train2017": ("train",), "val2017": ("val", "valid", "validation")}
_NAMES = tuple((name, *others) for name, others in _OTHER_NAMES.items())
# Folders beside an annotation file that exports put images in, and name them without.
BESIDE = ("images", "data")
_HOW = (
    "data.train_split=NAME 'evaluate.splits=[NAME]' choose others, and data.train_file=FILE"
    " data.val_file=FILE data.images=DIR take any files"
)


def splits(root: Path) -> tuple[str, ...]:
    """The splits that have an annotation file."""
    found = set()
    for pattern in _PATTERNS:
        before, after = pattern.split("{}")
        for path in root.glob(pattern.format("*")):
            found.add(path.relative_to(root).as_posix()[len(before) : -len(after)])
    return tuple(sorted(found))


@dataclass(frozen=True)
class Place:
    """Where a split is.

    Attributes:
        annotation_file: its path.
        folders: where its images may be; the first is where they belong.
        alias: the name that the split has there, where that is another.
    """

    annotation_file: Path
    folders: tuple[Path, ...]
    alias: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return self.folders[0]

    def find(self, name: str) -> str | None:
        """The path of an image, relative to `folder` where it is below it; None where it is not.

        Backslashes are slashes, and of folders in the name those alone count that are there. A name
        from another system may have its letters, composed or not, large or small, where no other
        file there has them too.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        for first in range(len(parts)):
            for folder in self.folders:
                path = folder.joinpath(*parts[first:])
                if _is_file(path):
                    return self._named(path)
        letters = _letters(parts[-1]) if parts else ""
        alike = next((files[letters] for files in self._alike if letters in files), [])
        return self._named(alike[0]) if len(alike) == 1 else None

    def _named(self, path: Path) -> str:
        plain = Path(os.path.normpath(path))
        below = plain.is_relative_to(self.folder)
        return str(plain.relative_to(self.folder) if below else plain.absolute())

    @cached_property
    def _alike(self) -> list[dict[str, list[Path]]]:
        """The files in each folder, by their letters."""
        return [_by_letters(folder) for folder in self.folders]


def find(root: Path, split: str, *, file: Path | None = None, images: Path | None = None) -> Place:
    """Where a split is.

    Args:
        root: the data set's folder.
        split: its name; train2017 and val2017 may have the names that exports give them.
        file, images: the annotation file and the folder of images, where they are named.

    Raises:
        InputError: for a folder or an annotation file that is not there.
    """
    for folder in filter(None, (root, images)):
        if not folder.is_dir():
            hint = "; unpack an archive, and name a file by --train or --val" * folder.is_file()
            raise InputError(f"no data folder {folder}{hint}")
    if file is not None:
        return Place(file, (images,) if images else _near(file, root), alias=str(file))
    for name in (split, *_OTHER_NAMES.get(split, ())):
        for pattern in _PATTERNS:
            path = root / pattern.format(name)
            if path.exists():
                alias = "" if name == split else path.relative_to(root).as_posix()
                return Place(path, _folders(root, name, images), alias)
    there = ", ".join(splits(root)) or "none"
    raise InputError(
        f"no annotation file {root / _PATTERNS[0].format(split)} for split {split!r} ({_HOW});"
        f" splits there: {there}"
    )


def _near(file: Path, root: Path) -> tuple[Path, ...]:
    """Where the images of an annotation file may be: beside it, or beside the folder it is in."""
    name = file.stem.removeprefix("instances_")
    names = dict.fromkeys((name, *next((each for each in _NAMES if name in each), ())))
    above = [*file.parents[1:2]]
    found = [file.parent, *(file.parent / beside for beside in BESIDE)]
    for base in (file.parent, *above):
        # Of images of one name in several splits those of its own come first.
        found += [base / part / own for own in names for part in ("", "images")]
    found += [root, *above, *(folder / "images" for folder in above)]
    return (found[0], *(folder for folder in dict.fromkeys(found[1:]) if folder.is_dir()))


def _by_letters(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            if file.is_file():
                found[_letters(file.name)].append(Path(file.path))
    return dict(found)


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_file(path: Path) -> bool:
    # A name may be too long for a file's, or hold what no name may.
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def _folders(root: Path, name: str, images: Path | None) -> tuple[Path, ...]:
    if images is not None:
        return (images,)
    own, images = root / name, root / "images"
    there = [path for path in (own, own / "images", images / name, images) if path.is_dir()]
    return (*(there or [own]), root)
