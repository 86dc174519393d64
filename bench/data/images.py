"""Image files of any kind as RGB of 8 bits, upright."""

import io
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from bench.errors import InputError

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

DEEPEST = 65535
# Pillow's limit guards against files from strangers; `read` has the annotation file's word.
_MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 0
_ORIENTATION = 0x0112
# A tag of TIFF, of which Pillow heeds the value below in grey of 8 bits alone.
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_BITS, _PLANES, _APART = 258, 284, 2
_SAMPLES, _SIGNED = 339, 2
# What a page of TIFF is, by bits: a smaller copy of another, or its mask.
_SUBFILE, _COPY_OR_MASK = 254, 1 | 4
# Planes that one header of TIFF stands for: by its depth, or as ImageJ says in the description, in
# which case they lie behind each other, not compressed.
_DEPTH, _DESCRIPTION = 32997, 270
_PLANES_OF_IMAGEJ = re.compile(r"ImageJ=.*^images=(\d+)", flags=re.DOTALL | re.MULTILINE)
# Places in a file from here on cannot be gone to.
_FARTHEST = 2**63
# How an image is put upright, by its EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """An image as it is used, and what its file was.

    Attributes:
        pixels: uint8 (3, height, width), RGB, turned as the EXIF orientation says.
        mode: Pillow's mode of the file, such as "RGB" or "I;16".
        orientation: EXIF orientation; 1 where there is none.
        stored: height and width in the file, before it was turned.
        animated: whether the file has several frames, of which this is the first.
        top: the highest value in the file, of a grey image of 16 bits; 0 of any other.
        cut: whether the file has 16 bits a channel, of which the lower 8 are not read.
        divided: whether its colours were divided by its fourth channel, as TIFF's associated alpha.
    """

    pixels: Tensor
    mode: str
    orientation: int
    stored: tuple[int, int]
    animated: bool
    top: int = 0
    cut: bool = False
    divided: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def hint(self, expected: tuple[int, int]) -> str:
        """Why it may have another (height, width) than expected, to be added to a message."""
        if self.orientation == 1 or self.stored != expected:
            return ""
        return (
            f"; without its EXIF orientation ({self.orientation}) it would fit: take that out of"
            " the file, or annotate the upright image"
        )


def read(
    path: Path,
    raw: bytes | None = None,
    *,
    white: int = DEEPEST,
    expected: tuple[int, int] | None = None,
) -> Picture:
    """Decode an image file.

    Grey becomes three equal channels; palettes and CMYK are converted; transparency is dropped;
    grey of 16 bits is scaled to 8.

    Args:
        raw: its bytes, where they were read already.
        white: the value that becomes 255 in grey images of 16 bits.
        expected: height and width; an image of as many pixels is read however large it is.

    Raises:
        InputError: for a file that is missing, truncated, not an image, or of pixels whose range is
            not known or beyond `white`.
    """
    try:
        # Given its name, Pillow maps TIFF into memory by its upright size, not by the stored one.
        opened: IO[bytes] = path.open("rb") if raw is None else io.BytesIO(raw)
        with opened as file, _limit(expected), Image.open(file) as image:
            # Before the pixels are read, which empties the list of tiles.
            _refuse_misread(image)
            cut = _is_cut(image, file)
            # What Pillow calls colours that are multiplied by their alpha.
            divided = any("RGBa" in str(tile[3]) for tile in getattr(image, "tile", ()))
            orientation = _orientation(image)
            # TIFF is turned as it is loaded, and then says so.
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
            rgb, top = _to_rgb(upright, white, inverted=inverted)
            turned = orientation > 4
            if image.format == "PNG":
                # Of damaged parts it decodes what it can, and passes over their checksums.
                file.seek(0)
                Image.open(file).verify()
            return Picture(
                pixels=pil_to_tensor(rgb),
                mode=image.mode,
                orientation=orientation,
                stored=(rgb.width, rgb.height) if turned else (rgb.height, rgb.width),
                animated=_has_frames(image, file),
                top=top,
                cut=cut and image.mode not in DEEP_MODES,
                divided=divided,
            )
    except UnidentifiedImageError as error:
        raise InputError(
            f"cannot read image {path}: not an image, or of an unknown format"
        ) from error
    # libavif raises RuntimeError.
    except (
        *(OSError, SyntaxError, ValueError, RuntimeError, struct.error),
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"cannot read image {path}: {' '.join(str(error).split())}") from error


def damage(raw: bytes, mode: str) -> str:
    """What libjpeg warns of in a JPEG, of whose damaged parts `read` takes what is decoded.

    Not all damage is seen: of JPEG there is no checksum.

    Args:
        raw: a file of any format; of others than JPEG there is nothing to say.
        mode: Pillow's mode of the image.

    Returns:
        Its words; empty where it has none.
    """
    if not raw.startswith(b"\xff\xd8"):
        return ""
    colours = "CMYK" if mode == "CMYK" else "GRAY"
    try:
        # The smallest size does: the file is read whole.
        simplejpeg.decode_jpeg(raw, colours, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        # Others are of what this decoder cannot do.
        if str(error).startswith(("Corrupt JPEG data", "Premature end")):
            return str(error)
    return ""


@contextmanager
def _limit(expected: tuple[int, int] | None) -> Iterator[None]:
    """Let Pillow read as many pixels as are expected."""
    before = Image.MAX_IMAGE_PIXELS
    if expected is not None:
        Image.MAX_IMAGE_PIXELS = max(_MOST_PIXELS, expected[0] * expected[1])
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def to_float(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> float32 in 0 to 1; what is float already stays as it is."""
    return image if image.is_floating_point() else image.float() / 255


@dataclass(frozen=True)
class NetworkSize:
    """What sizes images get in a network, before padding.

    The shortest edge becomes one of `min_sizes`, or less where the longest edge would be more than
    `max_size`; the other edge is rounded, to a pixel at least. `fixed` (rows, columns) overrides.
    """

    min_sizes: Sequence[int]
    max_size: int
    fixed: tuple[int, int] | None = None

    def of(self, height: int, width: int, place: int = -1) -> tuple[int, int]:
        """The size of an image as (rows, columns), with the shortest edge `min_sizes[place]`."""
        if self.fixed is not None:
            return self.fixed
        scale = min(self.min_sizes[place] / min(height, width), self.max_size / max(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (3, H, W), antialiased, as the resize of PIL that the published models saw."""
    resized: Tensor = nn.functional.interpolate(
        image[None], size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    return resized


def _refuse_misread(image: Image.Image) -> None:
    """Refuse what Pillow reads as other values.

    Those are 16 bits of a TIFF with a plane for each channel, as 8 of them, signed 8 bits, as
    unsigned ones, and FITS of more than 8 bits, with its bytes in the other order and no offset.
    """
    tags = getattr(image, "tag_v2", {})
    if image.format == "FITS" and image.mode != "L":
        raise ValueError("FITS of more than 8 bits is not read; write it as PNG or TIFF")
    if _SIGNED in tags.get(_SAMPLES, ()) and max(tags.get(_BITS, (1,))) == 8:
        raise ValueError("signed pixels of 8 bits are not read; write them as 0 to 255")
    own = any(tile[0] != "libtiff" for tile in getattr(image, "tile", ()))
    if own and tags.get(_PLANES) == _APART and max(tags.get(_BITS, (8,))) > 8:
        raise ValueError(
            "16 bits a channel in planes of their own are not read; write them pixel by pixel, or"
            " compressed"
        )


def _is_cut(image: Image.Image, file: IO[bytes]) -> bool:
    """Whether the file has 16 bits a channel; its pixels are not read yet."""
    if image.format == "JPEG2000":
        place = file.tell()
        file.seek(0)
        _, found, header = file.read(512).partition(b"ihdr")
        file.seek(place)
        # Behind height, width and the number of channels; the highest bit is that of a sign.
        return bool(found) and header[10] & 127 == 15
    tiles = getattr(image, "tile", ())
    if image.format == "PPM":
        return any(tile[3] == ("RGB", DEEPEST) for tile in tiles)
    return any(";16" in str(tile[3]) for tile in tiles)


def _has_frames(image: Image.Image, file: IO[bytes]) -> bool:
    """Whether the file has several frames, which smaller copies and masks in a TIFF are not."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_DEPTH, 1) != 1:
        return True
    said = _PLANES_OF_IMAGEJ.match(str(tags.get(_DESCRIPTION)))
    plane = image.width * image.height * sum(tags.get(_BITS, (1,))) / 8
    if said and 1 < int(said[1]) <= file.seek(0, io.SEEK_END) / plane:
        return True
    if not getattr(image, "is_animated", False):
        return False
    # As Pillow's `seek` does, which fails at pages that it cannot decode; the first is read.
    page = copy(getattr(image, "tag_v2", None))
    seen = {0}
    while page is not None and page.next not in seen and page.next < _FARTHEST:
        seen.add(page.next)
        file.seek(page.next)
        page.load(file)
        kind = page.get(_SUBFILE)
        if not isinstance(kind, int) or not kind & _COPY_OR_MASK:
            return True
    return page is None


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Malformed EXIF makes Pillow raise errors of many kinds; the pixels may be sound all the
        # same.
        return 1
    return value if value in _UPRIGHT else 1


def _to_rgb(image: Image.Image, white: int, *, inverted: bool) -> tuple[Image.Image, int]:
    """The image in RGB, and its highest value where that is of 16 bits.

    Args:
        inverted: whether 0 is white, of 16 bits.
    """
    if image.mode == "F":
        raise ValueError("the range of floating-point pixels is not known; 8 or 16 bit are needed")
    top = 0
    if image.mode in DEEP_MODES:
        # Pillow clips deep pixels at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.int64)
        low, top = int(values.min()), int(values.max())
        if low < 0 or top > DEEPEST:
            raise ValueError(f"pixels of {low} to {top}, which are not of 8 or 16 bit")
        if top > white:
            raise ValueError(f"pixels up to {top}; data.deep_white={white} must not be less")
        values = white - values if inverted else values
        image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    # Straight to RGB, Pillow warns of the transparency that it drops.
    rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    return rgb, top
