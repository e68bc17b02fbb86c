"""Images to disk as they come: single files, one array, a data set. Each is written whole or not at all.

`chunks` are arrays that follow one another, uint8 [n, H, W, C] or, of save_npz, float32 [n, C, H, W] as well;
`count` is how many images they are together, `labels` int64 [count] or None. Files have the same bytes each
time: archives hold no dates.
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastgan.checkpoint import beside, replacing
from fastgan.images import save_image, write_png

Chunks = Iterable[np.ndarray]
LABELS_FILE = "dataset.json"


def save_pngs(paths: list[Path], chunks: Chunks) -> None:
    """An image to each path, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        first = 0
        for chunk in chunks:
            list(
                pool.map(save_image, paths[first : first + len(chunk)], chunk)
            )  # raises what a thread raised
            first += len(chunk)


def save_npz(path: Path, count: int, chunks: Chunks, labels: np.ndarray | None) -> None:
    """`images` [count, ...] and `labels`, not compressed: that would take longer than making the images, for
    a quarter less."""
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            for i, chunk in enumerate(chunks):
                if i == 0:
                    header = {"shape": (count, *chunk.shape[1:]), "fortran_order": False}
                    header["descr"] = np.lib.format.dtype_to_descr(chunk.dtype)
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(chunk.tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)


def save_safetensors(path: Path, count: int, chunks: Chunks, labels: np.ndarray | None) -> None:
    """`labels` int64 [count], if there are any, and `images` uint8 [count, H, W, C]."""
    label_bytes = b"" if labels is None else labels.astype("<i8").tobytes()
    with replacing(path) as file:
        for i, chunk in enumerate(chunks):
            if i == 0:
                shape, start = (count, *chunk.shape[1:]), len(label_bytes)
                end = start + int(np.prod(shape, dtype=np.int64))
                entries = {"images": {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}}
                if labels is not None:
                    entries["labels"] = {"dtype": "I64", "shape": [count], "data_offsets": [0, start]}
                header = json.dumps(entries).encode()
                header = header.ljust(-(-len(header) // 8) * 8)
                file.write(len(header).to_bytes(8, "little") + header + label_bytes)
            file.write(chunk.tobytes())


def save_zip(path: Path, names: list[str], chunks: Chunks, labels: np.ndarray | None) -> None:
    """PNGs of these `names`, and dataset.json, as stylegan2-ada and stylegan3 read them."""
    with (
        replacing(path) as file,
        zipfile.ZipFile(file, "w") as archive,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        left = iter(names)
        for chunk in chunks:
            for png in pool.map(_png, chunk):
                archive.writestr(zipfile.ZipInfo(next(left)), png)
        archive.writestr(zipfile.ZipInfo(LABELS_FILE), label_list(names, labels))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    write_png(file, image)
    return file.getvalue()


def label_list(names: list[str], labels: np.ndarray | None) -> str:
    """The JSON of dataset.json: the label of each name, null without labels."""
    pairs = None if labels is None else [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
    return json.dumps({"labels": pairs})


def save_folder(path: Path, names: list[str], chunks: Chunks, labels: np.ndarray | None) -> None:
    """A folder of PNGs of these `names` and dataset.json, made beside `path`, then put in its place."""
    path = Path(os.path.realpath(path))
    new = beside(path)
    try:
        for folder in {(new / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        save_pngs([new / name for name in names], chunks)
        (new / LABELS_FILE).write_text(label_list(names, labels))
        if path.exists():
            shutil.rmtree(path)
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def stranger(path: Path, names: list[str]) -> str | None:
    """A file in the folder at `path` that `save_folder` would not replace, but remove."""
    known = {LABELS_FILE, *names}
    for folder, _, files in os.walk(path):
        for file in files:
            if (name := os.path.relpath(os.path.join(folder, file), path)) not in known:
                return name
    return None
