"""Training images from wherever `--data` says, and the feed that draws batches from them."""

import os
from pathlib import Path

from safetensors import SafetensorError

from fastgan.config import Config, UsageError
from fastgan.data import arrays, cache, stored
from fastgan.data.archive import zip_source
from fastgan.data.decode import Fit
from fastgan.data.digits import load_digits
from fastgan.data.feed import Feed, PairFeed
from fastgan.data.folder import folder_source, walk
from fastgan.data.hub import hub_source
from fastgan.data.images import ImageSet
from fastgan.data.source import BAD, Source, digest, file_state

__all__ = ["Feed", "ImageSet", "PairFeed", "images_for", "load_images"]

KEYED = {
    ".npy": arrays.npy_source,
    ".npz": arrays.npz_source,
    ".safetensors": arrays.safetensors_source,
    ".parquet": hub_source,
}
TAKES = (
    "--data takes digits, a folder or a zip of PNG, JPEG or WebP images, "
    f"hf:NAME or a {', '.join(KEYED)} file"
)


def load_images(
    data: str,
    resolution: int,
    channels: int = 3,
    crop: str = "none",
    skip_bad: bool = False,
    filter: str = "lanczos",
    image_key: str = "",
    label_key: str = "",
) -> ImageSet:
    """The images that `--data` names, at resolution x resolution pixels.

    data      "digits" for the embedded set, "digits:train" or "digits:test" for a part of it,
              "digits:inverted", "digits:edges", "digits:colored" or "digits:train:inverted" for another form;
              a folder or a zip of images, its sub-folders or its dataset.json being the classes (write
              ./digits for a folder of that name); a .npy, .npz or .safetensors file of arrays, such as
              `fastgan.prepare` writes; "hf:NAME[:SPLIT]", a .parquet file or a folder of those
    channels, crop, filter  see `Fit`; a file that `fastgan.prepare` wrote at this resolution keeps its own
    skip_bad  leave out pictures that cannot be decoded or lack a label, and name them in `ImageSet.skipped`
    image_key, label_key    the array or column of images, of labels, where its type does not tell

    Raises UsageError for bad arguments, data that is missing, empty or damaged, and images that do not fit.
    """
    fit = Fit(resolution, channels, crop, filter)
    if data.split(":")[0] == "digits":
        no_keys(data, image_key, label_key)
        return load_digits(data, resolution, channels)
    source = open_source(data, image_key, label_key)
    if is_ready(source, fit):
        assert source.rows is not None
        return image_set(source.rows, source.labels, source, source.filter)
    found = cache.load(source, fit, BAD if skip_bad else ())
    if len(found.rows) == 0:
        raise UsageError(
            f"none of the {source.count} images in {data} can be decoded; see why without --skip-bad"
        )
    skipped = tuple(source.where(i) for places in found.left_out().values() for i in places)
    return image_set(found.rows, found.labels, source, found.filter, skipped)


def images_for(config: Config, name: str) -> ImageSet:
    """The images that `name` names, as a run of that configuration takes them.

    The keys are those of the run's own data alone.
    """
    own = name in (config.data, config.data_b)
    return load_images(
        name,
        config.resolution,
        config.channels,
        config.crop,
        config.skip_bad,
        config.filter,
        config.image_key if own else "",
        config.label_key if own else "",
    )


def image_set(rows, labels, source: Source, filter: str, skipped: tuple[str, ...] = ()) -> ImageSet:
    """An ImageSet of rows [N, H, W, C]."""
    images = rows.permute(0, 3, 1, 2)
    return ImageSet(images, labels, source.classes, source.name, skipped, filter, source.others)


def is_ready(source: Source, fit: Fit) -> bool:
    """Whether the source's rows are what training wants already.

    RGBA rows of unknown origin may have colors where they are transparent: see `Fit`.
    """
    rows = source.rows
    known = bool(source.filter) or fit.channels != 4
    return rows is not None and rows.shape[1:] == fit.shape and rows.is_contiguous() and known


def open_source(data: str, image_key: str = "", label_key: str = "") -> Source:
    """The pictures that `--data` names, digits excepted. Raises UsageError as `load_images`."""
    if data.startswith("hf:"):
        return hub_source(data, image_key, label_key)
    ending = os.path.splitext(data)[1].lower()
    if os.path.isdir(data):
        if holds_parquet(data):
            return hub_source(data, image_key, label_key)
        no_keys(data, image_key, label_key)
        return folder_source(data)
    if not os.path.isfile(data) or ending not in (".zip", *KEYED):
        missing = "no folder or file" if not os.path.exists(data) else "cannot read"
        raise UsageError(f"{missing} {data}; {TAKES}")
    if ending == ".zip":
        no_keys(data, image_key, label_key)
        return zip_source(data)
    if ending == ".safetensors" and not image_key and not label_key:
        return prepared_source(data) or arrays.safetensors_source(data, image_key, label_key)
    return KEYED[ending](data, image_key, label_key)


def prepared_source(data: str) -> Source | None:
    """A file that `fastgan.prepare` wrote; None for another."""
    try:
        found = stored.read(Path(data))
    except (OSError, SafetensorError, ValueError):
        return None
    key = digest([os.path.basename(data), file_state(data)])
    return arrays.rows_source(data, found.rows, found.labels, found.classes, key, found.filter)


def holds_parquet(data: str) -> bool:
    """Whether the folder `data` has a table in it, at whatever depth; an imagefolder's metadata is none."""
    try:
        found = (path.lower() for path in walk(data))
        return any(path.endswith(".parquet") and not path.endswith("metadata.parquet") for path in found)
    except OSError:  # `folder_source` says so
        return False


def no_keys(data: str, image_key: str, label_key: str) -> None:
    """UsageError if a key is given for data that have none."""
    if image_key or label_key:
        flag = "--image-key" if image_key else "--label-key"
        raise UsageError(f"{flag} does not apply to {data}, only to hf:NAME and {', '.join(KEYED)} files")
