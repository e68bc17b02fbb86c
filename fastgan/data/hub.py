"""Data sets of the Hugging Face hub by name, and parquet files, through the `datasets` package."""

import glob
import io
import os
from typing import Any, BinaryIO

import numpy as np
import torch

from fastgan.config import UsageError
from fastgan.data.labels import numbered
from fastgan.data.source import UNREADABLE, Source, Unfit, digest, said


def hub_source(data: str, image_key: str, label_key: str) -> Source:
    """The images of hf:NAME[:SPLIT] (default: train), of a parquet file or of a folder of those.

    NAME is a data set on the hub, or a path that `datasets` can load (parquet, an imagefolder). The column of
    images is the one of type Image, that of labels the one of type ClassLabel; `image_key` and `label_key`
    name others: bytes of image files; integers, strings or truth values. Raises UsageError.
    """
    datasets = package()
    local = not data.startswith("hf:")
    name, _, split = data.removeprefix("hf:").partition(":")
    try:
        if local:
            files = sorted(glob.glob(os.path.join(glob.escape(name), "**", "*.parquet"), recursive=True))
            table = datasets.load_dataset("parquet", data_files=files or name, split="train")
        else:
            table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the package, of pyarrow, of the network, ...
        raise UsageError(f"--data {data} cannot be loaded by datasets: {said(error)}") from error
    image_key = image_key or only(table, datasets.Image, "--image-key", data)
    label_key = label_key or only(table, datasets.ClassLabel, "--label-key", data)
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key and key not in table.features:
            raise UsageError(f"{flag} {key}: {data} has no such column, but {', '.join(table.features)}")
    if not image_key:
        raise UsageError(
            f"{data} has no column of images; name one of {', '.join(table.features)} by --image-key"
        )
    if len(table) == 0:
        raise UsageError(f"{data} holds no images")
    try:
        pictures = table.select_columns(image_key).cast_column(image_key, datasets.Image(decode=False))
    except Exception as error:  # of pyarrow
        raise UsageError(f"--image-key {image_key}: not images but {table.features[image_key]}") from error
    labels, classes = read_labels(table, label_key, datasets, data) if label_key else (None, ())

    def image(i: int) -> str | BinaryIO:
        cell: dict[str, Any] = pictures[i][image_key] or {}
        if cell.get("bytes"):
            return io.BytesIO(cell["bytes"])
        # An imagefolder's pictures are files; a table from elsewhere has no business naming files here.
        if cell.get("path") and os.path.isdir(name):
            return cell["path"]
        raise Unfit(UNREADABLE, f"{where(i)} holds no image; use --skip-bad")

    def where(i: int) -> str:
        return f"image {i} of {data}"

    key = digest([table._fingerprint, image_key, label_key])
    return Source(data, len(table), image, where, key, labels, classes)


def package() -> Any:
    """The datasets package; UsageError where it is missing."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "--data hf:... and parquet files need a package more: pip install 'fastgan[hf]'"
        ) from None
    return datasets


def only(table: Any, kind: type, flag: str, data: str) -> str:
    """The column of that type, "" if there is none."""
    found = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise UsageError(
            f"{data} has several columns of type {kind.__name__}; choose with {flag} {' or '.join(found)}"
        )
    return found[0] if found else ""


def read_labels(
    table: Any, key: str, datasets: Any, data: str
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Labels and names of their classes, of a column of ClassLabel, integers, strings or truth values."""
    values = table.select_columns(key).with_format("arrow")[:][key].to_pylist()
    if None in values:
        raise UsageError(f"--label-key {key}: image {values.index(None)} of {data} has none")
    if isinstance(feature := table.features[key], datasets.ClassLabel):
        labels, _ = numbered(np.array(values), data)
        return labels, () if labels is None else tuple(feature.names)
    if all(type(value) is int for value in values):
        return numbered(np.array(values, dtype=object), data)
    if all(isinstance(value, str | bool) for value in values):
        names = sorted({str(value) for value in values})
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[str(value)] for value in values]), tuple(names)
    raise UsageError(f"--label-key {key}: labels must be integers or strings, not {feature}")
