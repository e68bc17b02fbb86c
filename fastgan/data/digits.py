"""The embedded data set: 1,797 handwritten digits, so that every command runs without a download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licensed under CC BY 4.0. digits.safetensors holds
the test part unchanged: images uint8 [1797, 8, 8] with values 0..16, labels uint8 [1797].

`digits` is all of them; `digits:train` (1,400) and `digits:test` (397) are a split that never changes, for
what must be judged on digits that training has not seen.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgan.data.images import ImageSet

FILE = Path(__file__).with_name("digits.safetensors")
LEARN = 1400
SUBSETS = {"train": slice(None, LEARN), "test": slice(LEARN, None)}


def stored_digits(subset: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 8, 8] in 0..16 and labels int64 [N] of all digits, or of "train" or "test"."""
    stored = load_file(FILE)
    images, labels = stored["images"], stored["labels"].long()
    if subset:
        shuffle = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(labels), generator=shuffle)[SUBSETS[subset]]
        images, labels = images[chosen], labels[chosen]
    return images, labels


def load_digits(resolution: int, channels: int, subset: str = "") -> ImageSet:
    """The digits as white on black, 0..255, enlarged with a bicubic filter to resolution >= 8."""
    digits, labels = stored_digits(subset)
    bright = digits.numpy().astype(np.float32) * (255 / 16)
    size = (resolution, resolution)
    # Floating point until the end: the filter overshoots at the edges, and 8 bits would wrap there.
    resized = [np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC)) for digit in bright]
    gray = torch.from_numpy(np.stack(resized)).round().clamp(0, 255).to(torch.uint8)
    images = gray.unsqueeze(-1).repeat(1, 1, 1, channels).permute(0, 3, 1, 2)
    classes = tuple("0123456789")
    return ImageSet(images, labels, classes, f"digits:{subset}" if subset else "digits")
