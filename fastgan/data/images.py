"""A set of images in memory, or mapped into it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, with or without classes. The loaders lay them out as channels_last."""

    images: torch.Tensor  # uint8 [N, C, H, W], on the CPU, possibly memory-mapped
    labels: torch.Tensor | None  # int64 [N]
    classes: tuple[str, ...]  # names of the classes; () without labels
    name: str  # "digits" or the folder's path as given
    skipped: tuple[str, ...] = ()  # files left out by skip_bad
    filter: str = ""  # that the images were resized with; "" if that is not known

    def __len__(self) -> int:
        return self.images.shape[0]
