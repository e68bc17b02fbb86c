"""A folder of images: found, decoded on all cores, kept in the cache."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from fastgan.config import UsageError
from fastgan.data import cache
from fastgan.data.decode import decode
from fastgan.data.images import ImageSet

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
LAYOUT = "1"  # raise it when decoding or the cache file changes, so that older cache files are not read


def load_folder(data: str, resolution: int, channels: int, crop: str, skip_bad: bool) -> ImageSet:
    """The images below the folder `data`; its sub-folders, if any, are the classes, sorted by name.

    Raises UsageError for a missing, empty or mixed folder and for the first image that does not fit.
    """
    names = find_images(data)
    classes, labels = find_classes(data, names)
    paths = [os.path.join(data, name) for name in names]

    def pixels() -> Iterator[np.ndarray | None]:
        return decode_all(paths, resolution, channels, crop, skip_bad)

    key = content_hash(data, names, (LAYOUT, resolution, channels, crop, skip_bad))
    shape = (resolution, resolution, channels)
    kept, images = cache.load(cache.location(key), len(names), shape, pixels)
    if len(images) == 0:
        raise UsageError(
            f"none of the {len(names)} images in {data} can be decoded; see why without --skip-bad"
        )
    skipped = tuple(path for path, keep in zip(paths, kept.tolist(), strict=True) if not keep)
    labels = labels[kept.bool()] if classes else None
    return ImageSet(images.permute(0, 3, 1, 2), labels, classes, data, skipped, "lanczos")


def find_images(data: str) -> list[str]:
    """Paths of the images below a folder, relative to it, sorted; hidden files and folders are left out."""
    takes = "--data takes digits or a folder of PNG, JPEG or WebP images"
    if not os.path.isdir(data):
        raise UsageError(f"no folder {data}; {takes}")
    start = len(os.path.join(data, ""))
    try:
        found = [path[start:] for path in walk(data) if path.lower().endswith(EXTENSIONS)]
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename} ({error.strerror}); change its permissions"
        ) from error
    if not found:
        raise UsageError(f"no images in {data}; {takes}")
    return sorted(found)


def walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of the files below a folder. Links are followed, unless they lead to a folder `above`."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry.path, above | {here})
            else:
                yield entry.path


def find_classes(data: str, names: list[str]) -> tuple[tuple[str, ...], torch.Tensor]:
    """The first folder in each name: the distinct ones, sorted, and the place of each in them, int64 [N]."""
    parents = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
    classes = sorted(set(parents))
    if classes == [""]:
        return (), torch.empty(0, dtype=torch.int64)
    if "" in classes:
        stray = os.path.join(data, names[parents.index("")])
        raise UsageError(f"{data} has class folders, but {stray} is in none of them; move or remove it")
    place = {name: i for i, name in enumerate(classes)}
    return tuple(classes), torch.tensor([place[parent] for parent in parents])


def content_hash(data: str, names: list[str], options: tuple[object, ...]) -> str:
    """A name for the decoded set: it changes with any file's name, size or time, and with any option."""
    digest = hashlib.sha256(repr(options).encode())
    for name in names:
        try:
            stat = os.stat(os.path.join(data, name))
            state = (stat.st_size, stat.st_mtime_ns)
        except OSError:  # a dangling link: `decode` says so
            state = None
        digest.update(b"\0" + os.fsencode(name) + b"\0" + repr(state).encode())
    return digest.hexdigest()[:32]


def decode_all(
    paths: list[str], resolution: int, channels: int, crop: str, skip_bad: bool
) -> Iterator[np.ndarray | None]:
    """Pixels of every file, in order. Threads do, as Pillow decodes and resizes without the GIL."""
    workers = os.cpu_count() or 1
    waiting: deque[Future[np.ndarray | None]] = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(paths), desc="decoding", unit=" images", disable=None, leave=False) as progress,
    ):
        for path in paths:
            waiting.append(pool.submit(decode, path, resolution, channels, crop, skip_bad))
            if len(waiting) > 4 * workers:  # bounds the memory: pool.map would decode them all ahead
                yield waiting.popleft().result()
                progress.update()
        while waiting:
            yield waiting.popleft().result()
            progress.update()
