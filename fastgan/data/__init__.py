"""Training images: the embedded digits or a folder, and the feed that draws batches from them."""

from fastgan.config import UsageError
from fastgan.data.digits import load_digits
from fastgan.data.feed import Feed, PairFeed
from fastgan.data.folder import load_folder
from fastgan.data.images import ImageSet

__all__ = ["Feed", "ImageSet", "PairFeed", "load_images"]


def load_images(
    data: str, resolution: int, channels: int = 3, crop: str = "none", skip_bad: bool = False
) -> ImageSet:
    """The images that `--data` names, at resolution x resolution pixels.

    data      "digits" for the embedded set, "digits:train" or "digits:test" for a part of it,
              "digits:inverted", "digits:edges", "digits:colored" or "digits:train:inverted" for another form;
              else a folder (write ./digits for a folder of that name)
    channels  1 (gray) or 3 (RGB)
    crop      "none" demands square images, "center" takes the centre square
    skip_bad  leave out files that cannot be decoded, and name them in `ImageSet.skipped`

    Raises UsageError for bad arguments, a missing or empty folder, and images that do not fit.
    """
    if resolution < 8:
        raise UsageError(f"--resolution {resolution} is too small; use 8 or more")
    if channels not in (1, 3):
        raise UsageError(f"--channels {channels} is not possible; use 1 (gray) or 3 (RGB)")
    if crop not in ("none", "center"):
        raise UsageError(f"--crop {crop} is unknown; use none or center")
    if data.split(":")[0] == "digits":
        return load_digits(data, resolution, channels)
    return load_folder(data, resolution, channels, crop, skip_bad)
