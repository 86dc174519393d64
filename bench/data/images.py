"""Image files of any kind as RGB of 8 bits, upright."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from bench.errors import InputError

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

_DEEPEST = 65535
_ORIENTATION = 0x0112
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
    """

    pixels: Tensor
    mode: str
    orientation: int
    stored: tuple[int, int]
    animated: bool

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


def read(path: Path, raw: bytes | None = None) -> Picture:
    """Decode an image file.

    Grey becomes three equal channels; palettes and CMYK are converted; transparency is dropped; 16
    bits are scaled to 8.

    Args:
        raw: its bytes, where they were read already.

    Raises:
        InputError: for a file that is missing, truncated, no image, or of pixels whose range is not
            known.
    """
    try:
        with Image.open(path if raw is None else io.BytesIO(raw)) as image:
            orientation = _orientation(image)
            turn = _UPRIGHT.get(orientation)
            upright = image if turn is None else image.transpose(turn)
            return Picture(
                pixels=pil_to_tensor(_to_rgb(upright)),
                mode=image.mode,
                orientation=orientation,
                stored=(image.height, image.width),
                animated=bool(getattr(image, "is_animated", False)),
            )
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read image {path}: no image, or of an unknown format") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {' '.join(str(error).split())}") from error


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Malformed EXIF makes Pillow raise errors of many kinds; the pixels may be sound all the
        # same.
        return 1
    return value if value in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("the range of floating-point pixels is not known; 8 or 16 bit are needed")
    if image.mode in DEEP_MODES:
        # Pillow clips deep pixels at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.int64)
        low, high = values.min(), values.max()
        if low < 0 or high > _DEEPEST:
            raise ValueError(f"pixels of {low} to {high}, which are not of 8 or 16 bit")
        image = Image.fromarray(np.rint(values * (255 / _DEEPEST)).astype(np.uint8))
    # Straight to RGB, Pillow warns of the transparency that it drops.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def to_float(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> float32 in 0 to 1."""
    return image.float() / 255
