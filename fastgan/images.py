"""Image tensors to uint8 arrays, files and grids."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgan.checkpoint import replacing


def split_pair(images: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 2C, H, W] -> the images of domain A and those of B, [N, C, H, W] each."""
    a, b = images.chunk(2, dim=1)
    return a, b


def join_pair(images: Tensor) -> Tensor:
    """Pairs [N, 2C, H, W] -> [N, C, H, 2W], A on the left."""
    return torch.cat(split_pair(images), dim=3)


def side_by_side(images: Tensor) -> np.ndarray:
    """Pairs -1..1 [N, 2C, H, W] -> uint8 [N, H, 2W, C], A on the left."""
    return to_uint8(join_pair(images))


def quantize(images: Tensor) -> Tensor:
    """-1..1 [N, C, H, W] -> uint8 [N, H, W, C] on the same device, rounded and clipped."""
    scaled = (images.detach().float() * 127.5 + 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).byte()


def to_uint8(images: Tensor) -> np.ndarray:
    """-1..1 [N, C, H, W] -> uint8 [N, H, W, C], rounded and clipped."""
    return quantize(images).cpu().numpy()


def write_png(file: IO[bytes], image: np.ndarray) -> None:
    """uint8 [H, W, 1, 3 or 4]."""
    png = io.BytesIO()  # Pillow's own writing to a file forgets why it failed
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(png, "PNG")
    file.write(png.getvalue())


def save_image(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, 1, 3 or 4] to a PNG, whole or not at all."""
    with replacing(path, durable=False) as file:
        write_png(file, image)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 [N, H, W, C] -> one image of `columns` (about as many as rows), missing ones black."""
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:count] = images
    tiles = padded.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * height, columns * width, channels)


def sheet(
    tiles: np.ndarray, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> np.ndarray:
    """uint8 [rows, columns, H, W, C] -> one image on white, with the names of rows on the left and of columns
    above them."""
    count_y, count_x, height, width, channels = tiles.shape
    font, gap = ImageFont.load_default(), 2
    wide = max((math.ceil(font.getlength(name)) for name in rows or ()), default=0)
    left, top = wide + 3 * gap if wide else gap, 16 if columns else gap
    size = (left + count_x * (width + gap), top + count_y * (height + gap))
    image = Image.new({1: "L", 3: "RGB", 4: "RGBA"}[channels], size, "white")
    draw = ImageDraw.Draw(image)
    for y, name in enumerate(rows or ()):
        middle = top + y * (height + gap) + height // 2
        draw.text((left - 2 * gap, middle), name, fill="black", font=font, anchor="rm")
    for x, name in enumerate(columns or ()):
        middle = left + x * (width + gap) + width // 2
        draw.text((middle, top // 2), name, fill="black", font=font, anchor="mm")
    canvas = np.array(image).reshape(size[1], size[0], channels)
    for y in range(count_y):
        for x in range(count_x):
            i, j = top + y * (height + gap), left + x * (width + gap)
            canvas[i : i + height, j : j + width] = tiles[y, x]
    return canvas
