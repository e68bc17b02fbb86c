"""Images on disk and back: what the tests of folders, of their cache and of the feed share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.config import UsageError
from fastgan.data import ImageSet, load_images


def noise(width: int, height: int | None = None, seed: int = 0) -> Image.Image:
    shape = (height or width, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def put(image: Image.Image, path: Path, **options) -> np.ndarray:
    """Save an image, make its folder if need be, return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return np.asarray(image)


def pixels(images: ImageSet, i: int = 0) -> np.ndarray:
    return images.images[i].permute(1, 2, 0).numpy()


def message(*arguments, **options) -> str:
    """The one line of the UsageError that load_images raises."""
    with pytest.raises(UsageError) as caught:
        load_images(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def never(*_):
    raise AssertionError("decoded again")
