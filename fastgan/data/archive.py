"""A zip of images, read where it lies: laid out like a folder, or as stylegan2-ada and stylegan3 write it."""

import io
import os
import posixpath
import threading
import zipfile
from collections.abc import Iterable
from typing import IO

from fastgan.config import UsageError
from fastgan.data import labels
from fastgan.data.folder import EXTENSIONS, TAKES, find_classes
from fastgan.data.source import TOO_LARGE, Source, Unfit, digest, file_state, plain, said, shortened

LARGEST_IMAGE = 256 << 20  # bytes that an image may declare to unpack to
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack whole blocks, whatever is asked for


def zip_source(data: str) -> Source:
    """The images in the zip `data`, with the labels of its dataset.json or else its folders as classes.

    A folder that holds everything is no class. Nothing is unpacked to disk, and a name that would leave the
    folder that it was unpacked to (`..`, absolute) condemns the archive all the same. Raises UsageError for
    that, for what is no zip, for two entries of one name, and as `folder_source`.
    """
    archive = open_zip(data)
    entries = {name: info for name, info in members(archive, data).items() if visible(name)}
    found = {name: info for name, info in entries.items() if name.lower().endswith(EXTENSIONS)}
    if not found:
        raise UsageError(f"no images in {data}; --data takes {TAKES}")
    root = common_root([*found, *(name for name in entries if os.path.basename(name) == labels.FILE)])
    others = [name for name in entries if name not in found and name != root + labels.FILE]
    others += [name for name in empty_folders(archive, entries) if visible(name)]
    found = {name.removeprefix(root): info for name, info in found.items()}
    names, matched, by_name = sorted(found), None, None
    if listing := entries.get(root + labels.FILE):
        by_name = labels.parse(unpack(archive, listing, data), plain(f"{data}/{listing.filename}"))
        numbers, classes = None, ()
    else:
        numbers, classes = find_classes(data, names)
    if by_name is not None:
        matched = labels.Matched(names, by_name, data)
        names, numbers, classes = matched.names, matched.numbers, matched.classes
    one_at_a_time = threading.Lock()

    def image(i: int) -> io.BytesIO:
        if matched:
            matched.check(i)
        with one_at_a_time:
            return extracted(archive, found[names[i]], where(i))

    def where(i: int) -> str:
        return plain(f"{data}/{root}{names[i]}")

    key = digest([os.path.basename(data), file_state(data)])
    beside = tuple(plain(f"{data}/{name}") for name in sorted(others))
    return Source(data, len(names), image, where, key, numbers, classes, others=beside)


def open_zip(data: str) -> zipfile.ZipFile:
    """Raises UsageError for what is no zip."""
    try:
        return zipfile.ZipFile(data)
    except OSError as error:
        raise UsageError(f"{data} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # on damaged bytes also struct.error, UnicodeDecodeError, OverflowError, ...
        raise UsageError(f"{data} is no intact zip: {said(error)}") from error


def members(archive: zipfile.ZipFile, data: str) -> dict[str, zipfile.ZipInfo]:
    """The files in an archive by their plain names. UsageError for a name that is unsafe, or there twice."""
    files: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
            raise UsageError(f"{data} holds {shortened(name)}, a path out of it: not a zip to trust")
        if name.endswith("/"):
            continue
        name = posixpath.normpath(name)
        if name in files:
            raise UsageError(f"{data} holds {shortened(name)} twice; pack it anew")
        files[name] = info
    return files


def empty_folders(archive: zipfile.ZipFile, files: Iterable[str]) -> list[str]:
    """The folders of an archive that none of its files lies in."""
    filled = {""}
    for name in files:
        while (name := posixpath.dirname(name)) not in filled:
            filled.add(name)
    return [name for name in archive.namelist() if name.endswith("/") and name.rstrip("/") not in filled]


def member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    """The file, open: of `read(n)`, no more than n bytes come to be in memory."""
    if info.compress_type not in BOUNDED:
        raise zipfile.BadZipFile("packed with a method other than deflate")
    return archive.open(info)


def extracted(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> io.BytesIO:
    """A picture. Raises Unfit for one that claims to be very large."""
    if info.file_size > LARGEST_IMAGE:
        size = f"{info.file_size >> 20} MiB, more than {LARGEST_IMAGE >> 20}"
        raise Unfit(TOO_LARGE, f"{where} unpacks to {size}; remove it or use --skip-bad")
    with member(archive, info) as file:
        return io.BytesIO(file.read(info.file_size + 1))


def unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, data: str) -> bytes:
    """A dataset.json."""
    if info.file_size > labels.LARGEST_FILE:
        raise UsageError(
            f"{data}: {plain(info.filename)} unpacks to {info.file_size >> 20} MiB: no list of labels"
        )
    try:
        with member(archive, info) as file:
            return file.read(info.file_size + 1)
    except Exception as error:  # zlib.error, BadZipFile, RuntimeError (encrypted), EOFError, ...
        raise UsageError(f"{data}: {plain(info.filename)} cannot be unpacked: {said(error)}") from error


def visible(name: str) -> bool:
    """Whether no part of the name is hidden, or what macOS adds to its zips."""
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def common_root(names: list[str]) -> str:
    """The folders, with a slash at the end, that all of the names lie in."""
    shared = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return shared and shared + "/"
