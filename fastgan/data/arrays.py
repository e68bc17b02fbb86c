"""Images that are arrays already: .npy, .npz and .safetensors."""

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from fastgan.config import UsageError
from fastgan.data.archive import member, members, open_zip
from fastgan.data.decode import MODES
from fastgan.data.feed import fits
from fastgan.data.labels import numbered
from fastgan.data.source import Source, digest, file_state, plain, said, shortened


class Kind(NamedTuple):
    """Of an array."""

    integers: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def images(self) -> bool:
        """Whether it can be images: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]."""
        channels = self.shape[3:] + self.shape[1:2]
        four = len(self.shape) == 4 and any(c in MODES for c in channels)
        return self.dtype == "uint8" and (len(self.shape) == 3 or four) and 0 not in self.shape

    def labels(self, count: int) -> bool:
        """Whether it can be the labels of `count` images."""
        return self.integers and self.shape in ((count,), (count, 1))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def npy_source(data: str, image_key: str, label_key: str) -> Source:
    """The images of a .npy file, mapped; `label_key` may name another .npy file, of their labels."""
    if image_key:
        raise UsageError(f"--image-key does not apply to {data}, which is one array")
    images, labels = load_npy(data), load_npy(label_key) if label_key else None
    found = {data: kind(images)} | ({label_key: kind(labels)} if labels is not None else {})
    choose(found, data, label_key, data)
    key = digest([os.path.basename(data), file_state(data), label_key, file_state(label_key)])
    return array_source(data, torch.from_numpy(images), labels, key)


def npz_source(data: str, image_key: str, label_key: str) -> Source:
    """The images of a .npz file, in memory."""
    archive = open_zip(data)
    files = {name.removesuffix(".npy"): info for name, info in members(archive, data).items()}
    found = {}
    for name, info in files.items():
        try:
            with member(archive, info) as file:
                found[name] = npy_kind(file, info.file_size)
        except Exception as error:  # no array, or a damaged one: of no interest unless it is asked for
            found[name] = Kind(False, f"no array ({said(error)})", ())

    def load(name: str) -> np.ndarray:
        size = files[name].file_size
        if not fits(size, torch.device("cpu")):
            raise UsageError(
                f"{data}: {plain(name)} takes {size >> 20} MiB, more than half of the free memory; "
                f"unzip {data} and use --data {plain(name)}.npy, which is read from the disk"
            )
        try:
            with member(archive, files[name]) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # zlib.error, BadZipFile, ValueError, EOFError, ...
            raise UsageError(f"{data}: {plain(name)} cannot be unpacked: {said(error)}") from error

    images, labels = choose(found, image_key, label_key, data)
    key = digest([os.path.basename(data), file_state(data), images, labels])
    return array_source(data, torch.from_numpy(load(images)), load(labels) if labels else None, key)


def safetensors_source(data: str, image_key: str, label_key: str) -> Source:
    """The images of a .safetensors file, mapped."""
    try:
        with safe_open(data, framework="pt") as file, safe_open(data, framework="np") as arrays:
            found = {}
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = tensor_kind(part.get_dtype(), tuple(part.get_shape()))
            images, labels = choose(found, image_key, label_key, data)
            key = digest([os.path.basename(data), file_state(data), images, labels])
            rows = file.get_tensor(images)
            return array_source(data, rows, arrays.get_tensor(labels) if labels else None, key)
    except OSError as error:
        raise UsageError(f"{data} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UsageError(f"{data} is no intact safetensors file: {said(error)}") from error


def array_source(data: str, images: torch.Tensor, labels: np.ndarray | None, key: str) -> Source:
    """What was found in the file `data`, as a source."""
    numbers, classes = (None, ()) if labels is None else numbered(labels.reshape(-1), data)
    return rows_source(data, as_rows(images), numbers, classes, key)


def rows_source(
    name: str,
    rows: torch.Tensor,
    labels: torch.Tensor | None,
    classes: tuple[str, ...],
    key: str,
    filter: str = "",
) -> Source:
    """Decoded images uint8 [N, H, W, C]."""

    def picture(i: int) -> Image.Image:
        row = rows[i].numpy()
        return Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row)

    def where(i: int) -> str:
        return f"image {i} of {name}"

    return Source(name, len(rows), picture, where, key, labels, classes, rows, filter)


def as_rows(images: torch.Tensor) -> torch.Tensor:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, H, W, C], a view."""
    if images.ndim == 3:
        return images[..., None]
    _, first, height, last = images.shape
    channels_first = last not in MODES or (first in MODES and height == last)
    return images.permute(0, 2, 3, 1) if channels_first else images


def choose(found: Mapping[str, Kind], image_key: str, label_key: str, data: str) -> tuple[str, str | None]:
    """Names of the arrays of images and of labels (None: there are none), by type and shape if not given.

    Raises UsageError for keys that are not there or of the wrong kind, and where several could be meant.
    """
    listed = shortened(", ".join(f"{name}: {kind}" for name, kind in found.items()))
    for flag, name in (("--image-key", image_key), ("--label-key", label_key)):
        if name and name not in found:
            raise UsageError(f"{flag} {name}: {data} has no such array, but {listed}")
    images = [image_key] if image_key else [name for name, kind in found.items() if kind.images]
    if not images or not found[images[0]].images:
        wanted = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]"
        raise UsageError(
            f"{data} must hold images, {wanted}, named by --image-key if need be; it has {listed}"
        )
    if len(images) > 1:
        raise UsageError(
            f"{data} holds several arrays of images; choose with --image-key {plain(' or '.join(images))}"
        )
    count = found[images[0]].shape[0]
    fitting = [name for name, kind in found.items() if kind.labels(count)]
    labels = [label_key] if label_key else fitting
    if label_key and label_key not in fitting:
        wanted = f"integers [{count}]"
        raise UsageError(f"--label-key {label_key} must be {wanted}, one an image: it is {found[label_key]}")
    if len(labels) > 1:
        raise UsageError(
            f"{data} holds several arrays of labels; choose with --label-key {plain(' or '.join(labels))}"
        )
    alone = sum(kind.images for kind in found.values()) == 1  # else they may be other images' labels
    for name in ("label", "labels", "y") if alone and not labels else ():
        if name in found and found[name].labels((found[name].shape or (0,))[0]):
            raise UsageError(
                f"{data} holds {count} images, but {found[name].shape[0]} labels ({name}); mend it"
            )
    return images[0], labels[0] if labels else None


def kind(array: np.ndarray) -> Kind:
    """Of an array of NumPy's."""
    return Kind(array.dtype.kind in "iu", str(array.dtype), array.shape)


def tensor_kind(dtype: str, shape: tuple[int, ...]) -> Kind:
    """Of a tensor in a safetensors file, whose types are called U8, I64 and so on."""
    integers = dtype[0] in "IU"
    name = {"I": "int", "U": "uint"}[dtype[0]] + dtype[1:] if integers else dtype
    return Kind(integers, name, shape)


def npy_kind(file, size: int) -> Kind:
    """Of an array in a .npz file. ValueError if it is not as large as its header says."""
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError("a format of structures")
    shape, _, dtype = header[version](file)
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError("of another size than its header says")
    return Kind(dtype.kind in "iu", str(dtype), shape)


def load_npy(path: str) -> np.ndarray:
    """An array, mapped copy-on-write. UsageError."""
    try:
        return np.lib.format.open_memmap(path, mode="c")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # ValueError, and whatever a damaged header leads to
        raise UsageError(f"{path} is no intact .npy file: {said(error)}") from error
