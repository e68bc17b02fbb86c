"""Decoded sets on disk, written once and mapped from then on: see `stored` for the file."""

import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from fastgan.checkpoint import load_tensors, save_tensors
from fastgan.data.decode import Fit
from fastgan.data.source import REASONS, Source, digest
from fastgan.data.stored import KEPT, Stored, decoded, read, resized_with, write

LAYOUT = "2"  # raise it when decoding or the file changes, so that older files are not read


def location(key: str) -> Path:
    """Where the set with this content hash is, or will be."""
    folder = os.environ.get("FASTGAN_CACHE") or "~/.cache/fastgan"
    return Path(folder).expanduser() / f"{key}.safetensors"


def load(source: Source, fit: Fit, leave_out: Collection[str]) -> Stored:
    """The decoded images of a source; from its file in the cache, which is made if need be."""
    path = location(digest([LAYOUT, source.key, fit, *leave_out]))
    if os.path.exists(path):  # unlike path.exists(), False in a folder that may not be searched
        try:
            return checked(read(path), source, fit)
        except (OSError, SafetensorError, ValueError) as error:
            warnings.warn(f"ignored the damaged cache file {path} ({error}); it is made anew", stacklevel=2)
    try:
        write(path, source, fit, leave_out)
        return checked(read(path), source, fit)
    except OSError as error:
        way_out = "set FASTGAN_CACHE to a folder with room"
        warnings.warn(f"no cache at {path.parent} ({error}): images stay in memory; {way_out}", stacklevel=2)
    return in_memory(source, fit, leave_out)


def checked(stored: Stored, source: Source, fit: Fit) -> Stored:
    """`stored`; ValueError if it is of another set."""
    if stored.state.shape != (source.count,) or stored.rows.shape[1:] != fit.shape:
        raise ValueError("unexpected shapes")
    return stored


def in_memory(source: Source, fit: Fit, leave_out: Collection[str]) -> Stored:
    """The same without a file."""
    state, rows = np.zeros(source.count, np.uint8), np.empty((source.count, *fit.shape), np.uint8)
    count = 0
    for i, image in enumerate(decoded(source, fit, leave_out)):
        if isinstance(image, np.ndarray):
            rows[count] = image
            count += 1
        state[i] = KEPT if isinstance(image, np.ndarray) else KEPT + 1 + REASONS.index(image)
    labels = None if source.labels is None else source.labels[torch.from_numpy(state == KEPT)]
    made = resized_with(source, fit)
    return Stored(torch.from_numpy(rows[:count]), state, labels, source.classes, fit.crop, made)


def remember(what: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors that take long to make: from the cache if they are there, else made and put there."""
    path = location(f"{what}-{key}")
    if os.path.exists(path):
        try:
            return load_tensors(path, checked=True)[0]
        except (OSError, ValueError) as error:
            warnings.warn(f"ignored the damaged cache file ({error}); it is made anew", stacklevel=2)
    tensors = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors)
    except OSError as error:
        warnings.warn(
            f"no cache at {path.parent} ({error}); set FASTGAN_CACHE to a folder with room", stacklevel=2
        )
    return tensors
