"""One picture to pixels: upright, 8 bits, cut to a square, resized."""

import os
import re
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgan.config import UsageError
from fastgan.data.source import NOT_SQUARE, TOO_LARGE, TOO_SMALL, UNREADABLE, Source, Unfit, said

# Named, or Pillow would try every format it knows (EPS, TIFF, ...) on a file called a.png.
FORMATS = ("PNG", "JPEG", "WEBP")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CROP = re.compile(r"none|center|center:[1-9][0-9]{0,5}|wide")


@dataclass(frozen=True)
class Fit:
    """What pictures are made into: uint8 [resolution, resolution, channels].

    channels  1 (gray) and 3 (RGB) put transparent pictures on white; 4 (RGBA) keeps them, opaque ones with
              alpha 255, and blackens what is wholly transparent, whose color means nothing
    crop      "none" demands squares; "center" takes the largest square in the middle, "center:108" one of
              108 pixels (as CelebA is usually cut); "wide" takes the largest 4:3 part in the middle and
              pads it to a square with black (transparent in RGBA), as is usual for LSUN's cars
    filter    that pictures are made smaller with; they are never made larger

    Raises UsageError for other values.
    """

    resolution: int
    channels: int = 3
    crop: str = "none"
    filter: str = "lanczos"

    def __post_init__(self):
        if self.resolution < 8:
            raise UsageError(f"--resolution {self.resolution} is too small; use 8 or more")
        if self.channels not in MODES:
            raise UsageError(f"--channels {self.channels} is not possible; use 1 (gray), 3 (RGB) or 4 (RGBA)")
        if not CROP.fullmatch(self.crop):
            raise UsageError(f"--crop {self.crop} is unknown; use none, center, center:SIDE or wide")
        if self.filter not in FILTERS:
            raise UsageError(f"--filter {self.filter} is unknown; use {' or '.join(FILTERS)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image as it comes out: height, width, channels."""
        return self.resolution, self.resolution, self.channels


def decode(source: Source, i: int, fit: Fit) -> np.ndarray:
    """Pixels uint8 [resolution, resolution, channels] of the i-th picture. Raises Unfit."""
    image = part(source, i, fit)
    side = fit.resolution
    high = round(side * 3 / 4) if fit.crop == "wide" else side
    if image.width < side or image.height < high:
        size = f"{source.where(i)} is {image.width}x{image.height}{' once cut' * (fit.crop != 'none')}"
        way_out = f"use --resolution {image.width} or less, or remove it"
        raise Unfit(TOO_SMALL, f"{size}, too small for --resolution {side}; {way_out}")
    small = image.resize((side, high), FILTERS[fit.filter], reducing_gap=None)
    pixels = np.asarray(small).reshape(high, side, fit.channels)
    if fit.channels == 4:
        pixels = pixels * (pixels[..., 3:] > 0)
    above = (side - high) // 2
    return np.pad(pixels, ((above, side - high - above), (0, 0), (0, 0))) if high < side else pixels


def part(source: Source, i: int, fit: Fit) -> Image.Image:
    """What is kept of the i-th picture, in full size. Raises Unfit."""
    where = source.where(i)
    try:
        image = read(source.open(i), MODES[fit.channels])
    except Unfit:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unfit(TOO_LARGE, bad(where, reason(error))) from error
    except Exception as error:  # on damaged bytes Pillow raises OSError, SyntaxError, struct.error, ...
        raise Unfit(UNREADABLE, bad(where, reason(error))) from error
    width, height = image.size
    wide, high = cut(where, width, height, fit.crop)
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def cut(where: str, width: int, height: int, crop: str) -> tuple[int, int]:
    """Width and height of the part in the middle that `crop` takes."""
    side = min(width, height)
    if crop == "none" and width != height:
        raise Unfit(NOT_SQUARE, f"images must be square: {where} is {width}x{height}; use --crop center")
    if crop == "wide":
        wide = min(width, height * 4 // 3)
        return wide, min(height, round(wide * 3 / 4))
    wanted = int(crop.removeprefix("center:")) if crop.startswith("center:") else side
    if wanted > side:
        raise Unfit(
            TOO_SMALL,
            f"{where} is {width}x{height}, too small for --crop {crop}; use --crop center, or remove it",
        )
    return wanted, wanted


def read(file: str | BinaryIO | Image.Image, mode: str) -> Image.Image:
    """The picture, upright, as 8-bit `mode` ("L", "RGB" or "RGBA")."""
    if isinstance(file, Image.Image):
        return converted(file, mode)
    with Image.open(file, formats=FORMATS) as image:
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if limit and pixels > limit:  # 89 million; up to twice as many, Pillow only warns
            raise Image.DecompressionBombError(f"{pixels} pixels, more than {limit}")
        ImageOps.exif_transpose(image, in_place=True)
        return converted(image, mode)


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The picture in another mode; in one without alpha, transparent parts become white."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips or drops the low byte
        wide, clear = np.asarray(image).astype(np.float32), image.info.get("transparency")
        image = Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8)))
    if mode != "RGBA" and image.has_transparency_data:
        sheet = Image.new("RGBA", image.size, "white")
        sheet.alpha_composite(image.convert("RGBA"))
        return sheet.convert(mode)
    return image.convert(mode)


def bad(where: str, why: str) -> str:
    """An error's text."""
    return f"{where} cannot be decoded ({why}); remove it or use --skip-bad"


def reason(error: Exception) -> str:
    """One line on why a file is bad, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG or WebP image"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return said(error)
