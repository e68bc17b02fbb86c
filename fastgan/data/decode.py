"""One image file to pixels."""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgan.config import UsageError

# Named, or Pillow would try every format it knows (EPS, TIFF, ...) on a file called a.png.
FORMATS = ("PNG", "JPEG", "WEBP")


def decode(path: str, resolution: int, channels: int, crop: str, skip_bad: bool) -> np.ndarray | None:
    """Pixels uint8 [resolution, resolution, channels] of a file; None for a bad file with skip_bad.

    Raises UsageError if the file cannot be decoded, is not square (with crop "none"), or is smaller
    than the resolution.
    """
    try:
        image = read(path, "L" if channels == 1 else "RGB")
    except Exception as error:  # on damaged bytes Pillow raises OSError, SyntaxError, struct.error, ...
        if skip_bad:
            return None
        raise UsageError(
            f"{path} cannot be decoded ({reason(error)}); remove it or use --skip-bad"
        ) from error
    width, height = image.size
    side = min(width, height)
    if crop == "none" and width != height:
        raise UsageError(f"images must be square: {path} is {width}x{height}; use --crop center")
    if side < resolution:
        way_out = f"use --resolution {side} or less, or remove it"
        raise UsageError(f"{path} is {width}x{height}, too small for --resolution {resolution}; {way_out}")
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    small = square.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(small).reshape(resolution, resolution, channels)


def read(path: str, mode: str) -> Image.Image:
    """The file's image, upright, as 8-bit `mode` ("L" or "RGB"); transparent parts become white."""
    with Image.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips or drops the low byte
            wide = np.asarray(image).astype(np.float32)
            return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert(mode)
        if image.has_transparency_data:
            sheet = Image.new("RGBA", image.size, "white")
            sheet.alpha_composite(image.convert("RGBA"))
            return sheet.convert(mode)
        return image.convert(mode)


def reason(error: Exception) -> str:
    """One line on why a file is bad, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG or WebP image"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__
