"""Data sets of the Hugging Face hub by name, and parquet files, through the `datasets` package."""

import glob
import io
import os
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import torch

from fastgan.config import UsageError
from fastgan.data.archive import extracted, open_zip
from fastgan.data.labels import MOST_CLASSES, numbered
from fastgan.data.source import UNREADABLE, Source, Unfit, digest, said


def hub_source(data: str, image_key: str, label_key: str) -> Source:
    """The images of hf:NAME[:SPLIT], of a parquet file or of a folder of those.

    NAME is a data set on the hub, or a path that `datasets` can load (parquet, an imagefolder, what its
    save_to_disk wrote); without SPLIT, train or the only one. Of images is the column of type Image or else
    of bytes, of labels that of type ClassLabel or else the one `guessed`; `image_key` and `label_key` name
    others: bytes of image files; integers, strings or truth values. Raises UsageError.
    """
    datasets = package()
    table = load(datasets, data)
    image_key = image_key or only(image_columns(table, datasets), "images", "--image-key", data)
    label_key = label_key or only(of_type(table, datasets.ClassLabel), "labels", "--label-key", data)
    label_key = label_key or guessed(table, datasets)
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
    # An imagefolder's pictures are files; a table from elsewhere has no business naming files here.
    names_files = table.info.builder_name == "imagefolder"
    opened = lru_cache(maxsize=8)(open_zip)

    def image(i: int) -> str | BinaryIO:
        cell: dict[str, Any] = pictures[i][image_key] or {}
        if cell.get("bytes"):
            return io.BytesIO(cell["bytes"])
        if names_files and (path := cell.get("path")):
            if not path.startswith("zip://"):
                return path
            name, _, outer = path.removeprefix("zip://").partition("::")
            archive = opened(outer)
            return extracted(archive, archive.getinfo(name), where(i))
        raise Unfit(UNREADABLE, f"{where(i)} holds no image; use --skip-bad")

    def where(i: int) -> str:
        return f"image {i} of {data}"

    key = digest([table._fingerprint, image_key, label_key])
    return Source(data, len(table), image, where, key, labels, classes)


def load(datasets: Any, data: str) -> Any:
    """The table that `data` names. UsageError."""
    name, _, split = data.removeprefix("hf:").partition(":") if data.startswith("hf:") else (data, "", "")
    if not name:
        raise UsageError(f"--data {data} lacks a name; use hf:NAME or hf:NAME:SPLIT")
    if os.path.exists(name):
        name = os.path.abspath(name)  # a folder called parquet is a folder still
    try:
        if os.path.isfile(name):
            loaded = datasets.load_dataset("parquet", data_files=glob.escape(name), split=split or None)
        elif os.path.isfile(os.path.join(name, "state.json")) and not split:
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # of the package, of pyarrow, of the network, ...
        cause = f": {said(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
        raise UsageError(f"--data {data} cannot be loaded by datasets: {said(error)}{cause}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if "train" not in loaded and len(loaded) > 1:
        way_out = f"choose one, as hf:{data.removeprefix('hf:')}:{next(iter(loaded))}"
        raise UsageError(f"--data {data} has the splits {', '.join(loaded)}, none called train; {way_out}")
    return loaded["train" if "train" in loaded else next(iter(loaded))]


def package() -> Any:
    """The datasets package; UsageError where it is missing."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "--data hf:... and parquet files need a package more: pip install 'fastgan[hf]'"
        ) from None
    return datasets


def of_type(table: Any, kind: type) -> list[str]:
    """The columns of that type."""
    return [name for name, feature in table.features.items() if isinstance(feature, kind)]


def image_columns(table: Any, datasets: Any) -> list[str]:
    """The columns of type Image; where there is none, as in files that others wrote, those of bytes."""

    def binary(feature: Any) -> bool:
        inner = feature.get("bytes") if isinstance(feature, dict) else feature
        return getattr(inner, "dtype", "") in ("binary", "large_binary")

    named = of_type(table, datasets.Image)
    return named or [name for name, feature in table.features.items() if binary(feature)]


def only(found: list[str], what: str, flag: str, data: str) -> str:
    """The column among those found, "" if there is none."""
    if len(found) > 1:
        raise UsageError(f"{data} has several columns of {what}; choose with {flag} {' or '.join(found)}")
    return found[0] if found else ""


def guessed(table: Any, datasets: Any) -> str:
    """The column of labels where none has the type: `label`, or else the only one of integers; "" without.

    Those are labels only if they can be classes, and some alike: else they count or measure the images.
    """
    kinds = {name: table.features[name].dtype for name in of_type(table, datasets.Value)}
    if kinds.get("label", "").startswith(("int", "uint", "string", "large_string", "bool")):
        return "label"
    integers = [name for name, kind in kinds.items() if kind.startswith(("int", "uint"))]
    if len(integers) != 1:
        return ""
    values = set(column(table, integers[0]))
    can_be = None not in values and all(0 <= value < MOST_CLASSES for value in values)
    return integers[0] if can_be and len(values) < len(table) else ""


def column(table: Any, key: str) -> list[Any]:
    """The values of a column."""
    return table.select_columns(key).with_format("arrow")[:][key].to_pylist()


def read_labels(
    table: Any, key: str, datasets: Any, data: str
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Labels and names of their classes, of a column of ClassLabel, integers, strings or truth values."""
    values = column(table, key)
    if None in values:
        raise UsageError(f"--label-key {key}: image {values.index(None)} of {data} has none")
    if isinstance(feature := table.features[key], datasets.ClassLabel):
        labels, numbers = numbered(np.array(values), data)
        if len(numbers) > len(feature.names):
            found = f"{data} holds the label {numbers[-1]}, but names {len(feature.names)} classes"
            raise UsageError(f"--label-key {key}: {found}; name another column")
        return labels, () if labels is None else tuple(feature.names)
    if all(type(value) is int for value in values):
        return numbered(np.array(values, dtype=object), data)
    if all(isinstance(value, str | bool) for value in values):
        names = sorted({str(value) for value in values})
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[str(value)] for value in values]), tuple(names)
    raise UsageError(f"--label-key {key}: labels must be integers or strings, not {feature}")
