"""A set of images in memory, or mapped into it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, with or without classes. The loaders lay them out as channels_last."""

    images: torch.Tensor  # uint8 [N, C, H, W], on the CPU, possibly memory-mapped
    labels: torch.Tensor | None  # int64 [N]
    classes: tuple[str, ...]  # names of the classes; () without labels
    name: str  # "digits" or the path as given
    skipped: tuple[str, ...] = ()  # pictures left out by skip_bad
    filter: str = ""  # that the images were resized with; "" if that is not known
    others: tuple[str, ...] = ()  # files of other kinds and empty folders beside them

    def __len__(self) -> int:
        return self.images.shape[0]


def empty_classes(labels: torch.Tensor | None, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Classes that no image has."""
    if labels is None:
        return ()
    counts = labels.bincount(minlength=len(classes)).tolist()
    return tuple(name for name, count in zip(classes, counts, strict=True) if not count)
