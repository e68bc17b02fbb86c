"""Labels that come as numbers, and the dataset.json of stylegan2-ada and stylegan3."""

import json
from typing import Any

import numpy as np
import torch

from fastgan.config import UsageError
from fastgan.data.source import MISSING, UNLABELLED, Unfit, plain, said, shortened

FILE = "dataset.json"
LARGEST_FILE = 128 << 20  # bytes; ImageNet's has 46 million
MOST_CLASSES = 1 << 16


def numbered(labels: np.ndarray, where: str) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """(int64 [N], class names "0", "1", ...) of integers [N]; (None, ()) if all are -1, for 'none'.

    Raises UsageError for negative labels among others, and for one too large to be a class.
    """
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (-1, -1)
    if lowest == highest == -1:
        return None, ()
    if lowest < 0:
        raise UsageError(f"{where} holds the label {lowest}; labels count from 0")
    if highest >= MOST_CLASSES:
        raise UsageError(f"{where} holds the label {highest}; there may be {MOST_CLASSES} classes at most")
    return torch.from_numpy(labels.astype(np.int64)), tuple(map(str, range(highest + 1)))


def parse(text: bytes, where: str) -> dict[str, int] | None:
    """Label by image of a dataset.json: {"labels": [["00000/img0.png", 6], ...]} or null; None without.

    Raises UsageError for anything else, and for an image with two labels.
    """
    if len(text) > LARGEST_FILE:
        raise UsageError(f"{where} is larger than {LARGEST_FILE >> 20} MiB: no list of labels")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON: {said(error)}") from None
    pairs = content.get("labels", 0) if isinstance(content, dict) else 0
    if pairs is None:
        return None
    if not isinstance(pairs, list):
        raise UsageError(f'{where} must hold {{"labels": [["image.png", 0], ...]}} or {{"labels": null}}')
    labels: dict[str, int] = {}
    for pair in pairs:
        if not is_pair(pair):
            wanted = f'{where} must list ["image.png", class number]'
            raise UsageError(f"{wanted}: got {shortened(pair)}; mend it, or remove it to train without it")
        name, label = pair[0].replace("\\", "/"), pair[1]
        if labels.setdefault(name, label) != label:
            raise UsageError(f"{where} gives {shortened(name)} two labels, {labels[name]} and {label}")
    return labels


def is_pair(pair: Any) -> bool:
    """Whether it is an entry of dataset.json: a name and a number."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int


def folder_names(labels: dict[str, int], count: int) -> tuple[str, ...]:
    """Names of `count` >= 2 classes, if each of them has a folder to itself; else none."""
    pairs = sorted({(label, name.split("/")[0] if "/" in name else "") for name, label in labels.items()})
    folders = tuple(folder for _, folder in pairs)
    apart = [label for label, _ in pairs] == list(range(count)) and len(set(folders)) == count > 1
    return folders if apart and "" not in folders else ()


class Matched:
    """Names of images matched with the labels of a dataset.json.

    `names` are those of both, sorted; `check(i)` raises Unfit for an image without a label and for a label
    without an image; `numbers` and `classes` are as in Source, classes being called by their folders where
    each has one to itself, and else by their numbers.
    """

    def __init__(self, found: list[str], labels: dict[str, int], data: str):
        self.found, self.by_name, self.data = set(found), labels, data
        self.names = sorted(self.found | labels.keys())
        known = np.array([labels.get(name, -1) for name in self.names], dtype=object)
        given = np.array([labels[name] for name in self.names if name in labels], dtype=object)
        _, numbers = numbered(given, f"{FILE} of {data}")
        self.classes = folder_names(labels, len(numbers)) or numbers
        self.numbers = torch.from_numpy(known.astype(np.int64)) if self.classes else None

    def check(self, i: int) -> None:
        """Unfit if image i has no label, or is not there."""
        name = self.names[i]
        way_out = f"mend {FILE} or use --skip-bad"
        if name not in self.found:
            raise Unfit(MISSING, f"{FILE} of {self.data} names {plain(name)}, which is not there; {way_out}")
        if name not in self.by_name:
            raise Unfit(UNLABELLED, f"{FILE} of {self.data} has no label for {plain(name)}; {way_out}")
