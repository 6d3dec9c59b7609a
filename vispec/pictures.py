"""How a picture is opened: one place for files, downloads and the rows of data sets."""

import os
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vispec.cli import UserError, one_line

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""What is read: pictures alone. Others that Pillow knows start programs (EPS) or read scientific data."""
MOST_PIXELS = "VISPEC_MAX_PIXELS"
"""Environment variable: a picture with more pixels is not decoded."""
MOST_PIXELS_DEFAULT = 80_000_000

WHITES = {"I": (255, 2**16 - 1), "F": (1, 255, 2**16 - 1)}
"""What white usually is where pixels are 32-bit numbers, by Pillow's mode."""


class UnreadableImage(OSError):
    """A picture cannot be read: missing, none of the formats, broken, or too large; the message says which."""


class OutsideFolder(ValueError):
    """A row of data names a picture that is not in the data's folder."""


def picture_path(folder: Path, name: str, allow_outside: bool = False) -> Path:
    """Where the picture of a row is; links inside the folder may lead elsewhere, as those of the hub's cache do.

    Args:
        allow_outside: take absolute paths and `..` as they are.

    Raises:
        OutsideFolder: the name leads out of the folder.
    """
    if not allow_outside and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise OutsideFolder(f"{name} is outside of the data folder {folder}; --allow-outside reads it all the same")
    return folder / name


def read_picture(file: str | Path | BinaryIO, on_white: bool = True, most: int | None = None) -> Image.Image:
    """The picture in a file, in RGB, turned as its EXIF says.

    Args:
        on_white: what is transparent becomes white; False keeps whatever colour lies below, as `convert("RGB")` does.
        most: pixels; None: as VISPEC_MAX_PIXELS says.

    Raises:
        UnreadableImage: it cannot be read.
        UserError: the limit of its pixels is no number.
    """
    most, limit = (_most_pixels(), f" ({MOST_PIXELS} sets the limit)") if most is None else (most, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings of a size above which we refuse, and of broken notes
            with Image.open(file, formats=_known_formats()) as image:
                _check_size(image, most, limit)
                image.load()
                return in_rgb(_turned(image), on_white)
    except (UnreadableImage, MemoryError):
        raise
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage(f"damaged, no picture, or none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise whatever their code trips over
        raise UnreadableImage(f"{type(error).__name__}: {one_line(error)}") from None


@cache
def _known_formats() -> list[str]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def in_rgb(image: Image.Image, on_white: bool = True) -> Image.Image:
    """A picture of any mode in RGB: what is not stored in 8 bits is scaled; see `read_picture` for `on_white`."""
    if image.mode.startswith("I;16"):  # convert() would cut values off at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode in ("I", "F"):
        image = _from_numbers(image)
    elif image.mode == "La":  # the one mode that converts to its like alone
        image = image.convert("LA")
    if not on_white or not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """Grey of 32-bit numbers, which do not say what white is: the next of the usual ones that none of them exceeds."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    most = values.max()
    white = next((white for white in WHITES[image.mode] if most <= white), most)
    return Image.fromarray((values.clip(min=0) / white * 255).astype(np.uint8))


def _most_pixels() -> int:
    given = os.environ.get(MOST_PIXELS) or MOST_PIXELS_DEFAULT
    try:
        return int(given)
    except ValueError:  # or every picture would count as one that cannot be read
        raise UserError(f"{MOST_PIXELS} must be a whole number, found {given!r}") from None


def _check_size(image: Image.Image, most: int, limit: str) -> None:
    width, height = image.size
    if width * height > most:
        raise UnreadableImage(f"{width} x {height} pixels are more than {most}{limit}")


def _turned(image: Image.Image) -> Image.Image:
    """Photographs may be stored lying down, with a note that says how to turn them; a broken note says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image
