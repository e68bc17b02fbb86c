"""Pictures as they are found, before any is decoded: what every reader of `--data` returns."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

import torch
from PIL import Image

# Why a picture is left out. Stored sets hold 2 + the place in here, so new reasons go to the end.
UNREADABLE, TOO_LARGE, NOT_SQUARE, TOO_SMALL = "unreadable", "too large", "not square", "too small"
UNLABELLED, MISSING, COPY = "without a label", "named in the labels, but missing", "copies of others"
REASONS = (UNREADABLE, TOO_LARGE, UNLABELLED, MISSING, NOT_SQUARE, TOO_SMALL, COPY)
BAD = REASONS[:4]  # those that --skip-bad leaves out; others ask for other options


class Unfit(Exception):
    """A picture that cannot be used, for one of REASONS; the message names it and the way out."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Source:
    """`count` pictures, with or without classes.

    `open(i)` gives the i-th as a path, an open file or a picture, and raises Unfit where there is none. It is
    called from several threads. `where(i)` is how messages name it.
    """

    name: str  # of the whole, as given
    count: int
    open: Callable[[int], str | BinaryIO | Image.Image]
    where: Callable[[int], str]
    key: str  # changes when any picture, label or class does
    labels: torch.Tensor | None = None  # int64 [count], -1 for a picture without one
    classes: tuple[str, ...] = ()
    rows: torch.Tensor | None = None  # uint8 [count, H, W, C] of pictures that are decoded already
    filter: str = ""  # that `rows` were resized with, if it is known
    others: tuple[str, ...] = ()  # what lies beside the pictures and is not read: other files, empty folders


def plain(name: str) -> str:
    """The name in a message: quoted where it would break the line, cut where it is very long."""
    return name if name.isprintable() and len(name) <= 300 else shortened(name)


def shortened(value: object) -> str:
    """A value from a file, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def said(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def digest(parts: Iterable[object]) -> str:
    """A name for something that changes with any of its parts."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part if isinstance(part, bytes) else repr(part).encode(errors="surrogateescape"))
        made.update(b"\0")
    return made.hexdigest()[:32]


def file_state(path: str) -> tuple[int, int] | None:
    """Size and time of change; None for a dangling link, of which `decode` says so."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
