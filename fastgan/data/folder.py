"""A folder of images: sub-folders are classes, or a dataset.json labels them."""

import os
from collections.abc import Iterator

import torch

from fastgan.config import UsageError
from fastgan.data import labels
from fastgan.data.source import UNREADABLE, Source, Unfit, digest, file_state, plain

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
TAKES = "a folder or a zip of PNG, JPEG or WebP images"


def folder_source(data: str) -> Source:
    """The images below the folder `data`.

    With a dataset.json in it, as stylegan2-ada and stylegan3 write it, that has the labels; otherwise its
    sub-folders, if any, are the classes, sorted by name. Raises UsageError for an empty or a mixed folder
    and for labels that are none.
    """
    names, others = find_images(data)
    listing = os.path.join(data, labels.FILE)
    if os.path.isfile(listing):
        try:
            with open(listing, "rb") as file:
                text = file.read(labels.LARGEST_FILE + 1)
        except OSError as error:
            raise UsageError(f"cannot read {listing} ({error.strerror}); change its permissions") from error
        by_name = labels.parse(text, listing)
        if by_name is not None:
            matched = labels.Matched([name.replace(os.sep, "/") for name in names], by_name, data)
            return folder_of(data, matched.names, matched.numbers, matched.classes, others, matched)
        return folder_of(data, names, None, (), others)
    numbers, classes = find_classes(data, names)
    return folder_of(data, names, numbers, classes, others)


def folder_of(
    data: str,
    names: list[str],
    numbers: torch.Tensor | None,
    classes: tuple[str, ...],
    others: tuple[str, ...],
    matched: labels.Matched | None = None,
) -> Source:
    """The files of those names below `data`."""
    paths = [os.path.join(data, name) for name in names]

    def path(i: int) -> str:
        if matched:
            matched.check(i)
        if os.path.exists(paths[i]) and not os.path.isfile(paths[i]):  # a pipe would be waited for, for ever
            raise Unfit(UNREADABLE, f"{where(i)} is no file; remove it or use --skip-bad")
        return paths[i]

    def where(i: int) -> str:
        return plain(paths[i])

    states = [part for name, path in zip(names, paths, strict=True) for part in (name, file_state(path))]
    given = b"" if numbers is None else numbers.numpy().tobytes()
    key = digest([*states, given, classes])
    return Source(data, len(paths), path, where, key, numbers, classes, others=others)


def find_images(data: str) -> tuple[list[str], tuple[str, ...]]:
    """Paths of the images below a folder, relative to it, and of all else that is there, whole; both sorted.

    Hidden files and folders are left out.
    """
    start = len(os.path.join(data, ""))
    try:
        paths = sorted(walk(data))
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename} ({error.strerror}); change its permissions"
        ) from error
    found = [path[start:] for path in paths if path.lower().endswith(EXTENSIONS)]
    if not found:
        raise UsageError(f"no images in {data}; --data takes {TAKES}")
    listing = os.path.join(data, labels.FILE)
    return found, tuple(path for path in paths if not path.lower().endswith(EXTENSIONS) and path != listing)


def walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of the files and, with a slash, of the empty folders below a folder.

    Links are followed, unless they lead to a folder `above`.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    if not visible:
        yield os.path.join(folder, "")
    for entry in visible:
        if entry.is_dir():
            yield from walk(entry.path, above | {here})
        else:
            yield entry.path


def find_classes(data: str, names: list[str]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """The first folder in each name: the place of each among the distinct ones, int64 [N], and those, sorted.

    (None, ()) where no image is in a folder. Raises UsageError where some are and some are not.
    """
    parents = [name.split("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(parents))
    if classes == [""]:
        return None, ()
    if "" in classes:
        stray = plain(os.path.join(data, names[parents.index("")]))
        raise UsageError(f"{data} has class folders, but {stray} is in none of them; move or remove it")
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place[parent] for parent in parents]), tuple(classes)
