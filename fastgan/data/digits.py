"""The embedded data set: 1,797 handwritten digits, so that every command runs without a download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licensed under CC BY 4.0. digits.safetensors holds
the test part unchanged: images uint8 [1797, 8, 8] with values 0..16, labels uint8 [1797].

`digits` is all of them; `digits:train` (1,400) and `digits:test` (397) are a split that never changes, for
what must be judged on digits that training has not seen. Behind any of these, `:inverted`, `:edges` or
`:colored` is another domain: the same digits in another form, in the same order.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from fastgan.config import UsageError
from fastgan.data.feed import fits
from fastgan.data.images import ImageSet

FILE = Path(__file__).with_name("digits.safetensors")
LEARN = 1400
SUBSETS = {"train": slice(None, LEARN), "test": slice(LEARN, None)}


def inverted(gray: torch.Tensor) -> torch.Tensor:
    """Black on white."""
    return 255 - gray


def edges(gray: torch.Tensor) -> torch.Tensor:
    """The morphological gradient: over 3x3 pixels the brightest less the darkest, scaled to 255 at most."""
    bright = gray.float()
    gradient = F.max_pool2d(bright, 3, 1, 1) + F.max_pool2d(-bright, 3, 1, 1)
    return (gradient * (255 / gradient.amax((1, 2, 3), keepdim=True))).round().to(torch.uint8)


def colored(gray: torch.Tensor) -> torch.Tensor:
    """Each in a full color of its own, hues a golden section of the circle apart: [N, 3, R, R]."""
    hue = torch.arange(len(gray), dtype=torch.float64)[:, None] * ((5**0.5 - 1) / 2) % 1
    rgb = (((6 * hue + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs() - 1).clamp(0, 1)
    return (gray * rgb[:, :, None, None]).round().to(torch.uint8)


FORMS = {"inverted": inverted, "edges": edges, "colored": colored}


def stored_digits(subset: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 8, 8] in 0..16 and labels int64 [N] of all digits, or of "train" or "test"."""
    stored = load_file(FILE)
    chosen = members(subset)
    return stored["images"][chosen], stored["labels"][chosen].long()


def members(subset: str) -> torch.Tensor | slice:
    """Places of a subset's digits among all of them."""
    if not subset:
        return slice(None)
    return torch.randperm(1797, generator=torch.Generator().manual_seed(0))[SUBSETS[subset]]


def parse(data: str) -> tuple[str, str]:
    """(subset, form), "" for none, of digits[:train or :test][:form]. UsageError for another name."""
    _, *words = data.split(":")
    subset = words.pop(0) if words and words[0] in SUBSETS else ""
    form = words.pop(0) if words and words[0] in FORMS else ""
    if words:
        raise UsageError(
            f"--data {data} is unknown; there are digits, digits:{', digits:'.join((*SUBSETS, *FORMS))}, "
            "and digits:train:inverted and the like"
        )
    return subset, form


def load_digits(data: str, resolution: int, channels: int) -> ImageSet:
    """The digits that `data` names, 0..255, enlarged with a bicubic filter to resolution >= 8.

    Raises UsageError for an unknown name, for colors in gray images and for more than the memory holds.
    """
    subset, form = parse(data)
    if form == "colored" and channels == 1:
        raise UsageError(f"--data {data} has colors; use --channels 3")
    stored, labels = stored_digits()
    needed = len(stored) * resolution**2 * (4 + channels)
    if not fits(needed, torch.device("cpu")):
        claim = f"--data {data} at --resolution {resolution} takes {needed >> 20} MiB"
        raise UsageError(f"{claim}, more than half of the free memory; use a lower one")
    bright = stored.numpy().astype(np.float32) * (255 / 16)
    size = (resolution, resolution)
    # Floating point until the end: the filter overshoots at the edges, and 8 bits would wrap there.
    resized = [np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC)) for digit in bright]
    gray = torch.from_numpy(np.stack(resized)).round().clamp(0, 255).to(torch.uint8)[:, None]
    images = (FORMS[form](gray) if form else gray).expand(-1, min(channels, 3), -1, -1)
    if channels == 4:
        images = torch.cat([images, torch.full_like(gray, 255)], dim=1)
    chosen = members(subset)
    rows = images.permute(0, 2, 3, 1)[chosen].contiguous()
    return ImageSet(rows.permute(0, 3, 1, 2), labels[chosen], tuple("0123456789"), data, filter="bicubic")
