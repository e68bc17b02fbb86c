"""Decoded images on disk: one safetensors file a set, written once and mapped from then on.

`kept` uint8 [M] has a 1 for each listed file that was decoded, `images` uint8 [N, H, W, C] has those.
The file is written by hand, in order, because safetensors' own writer wants all tensors in memory, and
N is not known before the last image: the header has a fixed size and is filled in at the end.
"""

import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastgan.checkpoint import load_tensors, save_tensors

HEADER = 256  # bytes before the first tensor: the length (8, little-endian), then JSON padded with spaces

Pixels = Iterator[np.ndarray | None]  # uint8 [H, W, C] of one listed file after the other; None: left out
Stored = tuple[torch.Tensor, torch.Tensor]  # kept uint8 [M], images uint8 [N, H, W, C]


def location(key: str) -> Path:
    """Where the set with this content hash is, or will be."""
    folder = os.environ.get("FASTGAN_CACHE") or "~/.cache/fastgan"
    return Path(folder).expanduser() / f"{key}.safetensors"


def load(path: Path, total: int, shape: tuple[int, int, int], pixels: Callable[[], Pixels]) -> Stored:
    """The set at `path`: `total` listed files, images of `shape` [H, W, C]; made from `pixels` if need be."""
    if os.path.exists(path):  # unlike path.exists(), False in a folder that may not be searched
        try:
            return mapped(path, total, shape)
        except (OSError, SafetensorError, ValueError) as error:
            warnings.warn(f"ignored the damaged cache file {path} ({error}); it is made anew", stacklevel=2)
    try:
        write(path, total, shape, pixels())
        return mapped(path, total, shape)
    except OSError as error:
        way_out = "set FASTGAN_CACHE to a folder with room"
        warnings.warn(f"no cache at {path.parent} ({error}): images stay in memory; {way_out}", stacklevel=2)
    return in_memory(total, shape, pixels())


def mapped(path: Path, total: int, shape: tuple[int, int, int]) -> Stored:
    """The tensors of a cache file, their pages read when touched. ValueError if they are not as expected."""
    with safe_open(path, framework="pt") as file:
        kept, images = file.get_tensor("kept"), file.get_tensor("images")
    count = int(kept.sum())
    if kept.shape != (total,) or images.shape != (count, *shape) or images.dtype != torch.uint8:
        raise ValueError("unexpected shapes")
    return kept, images


def write(path: Path, total: int, shape: tuple[int, int, int], pixels: Pixels) -> None:
    """Write a cache file that is either whole or absent, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(partial, "xb") as file:
            file.seek(HEADER + total)
            kept = np.zeros(total, np.uint8)
            for i, image in enumerate(pixels):
                if image is not None:
                    file.write(image.tobytes())
                    kept[i] = 1
            file.seek(0)
            file.write(header(total, (int(kept.sum()), *shape)))
            file.write(kept.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def header(total: int, shape: tuple[int, int, int, int]) -> bytes:
    """The first HEADER bytes of a cache file."""
    end = total + int(np.prod(shape, dtype=np.int64))
    entries = {
        "kept": {"dtype": "U8", "shape": [total], "data_offsets": [0, total]},
        "images": {"dtype": "U8", "shape": shape, "data_offsets": [total, end]},
    }
    length = HEADER - 8
    return length.to_bytes(8, "little") + json.dumps(entries).encode().ljust(length)


def in_memory(total: int, shape: tuple[int, int, int], pixels: Pixels) -> Stored:
    """The same tensors without a file."""
    kept, images = np.zeros(total, np.uint8), np.empty((total, *shape), np.uint8)
    count = 0
    for i, image in enumerate(pixels):
        if image is not None:
            images[count] = image
            kept[i] = 1
            count += 1
    return torch.from_numpy(kept), torch.from_numpy(images[:count])


def remember(what: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors that take long to make: from the cache if they are there, else made and put there."""
    path = location(f"{what}-{key}")
    if os.path.exists(path):
        try:
            return load_tensors(path)[0]
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
