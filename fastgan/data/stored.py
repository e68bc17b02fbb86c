"""Decoded images in one safetensors file, mapped when it is read: the cache's and `fastgan.prepare`'s.

labels           int64 [N]           of a set with classes
left_out_labels  int64 [M - N]       so that the space of both is known before the first image is decoded
state            uint8 [M]           of each listed picture: 1, or 2 + the place in REASONS if it is left out
images           uint8 [N, H, W, C]

The header's key "fastgan" holds JSON: the names of the classes, the crop and the filter. The file is written
by hand, in order, because safetensors' own writer wants all tensors in memory, and N is not known before the
last image: the header has a fixed size and is filled in at the end.
"""

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from fastgan.config import UsageError
from fastgan.data.decode import Fit, decode
from fastgan.data.source import COPY, REASONS, Source, Unfit, digest

KEPT = 1
SAVE_EVERY = 2.0  # seconds of work that a killed resumable writer loses at most
Decoded = np.ndarray | str  # uint8 [H, W, C], or the reason why the picture is left out


@dataclass(frozen=True)
class Stored:
    """What is in a file."""

    rows: torch.Tensor  # uint8 [N, H, W, C], mapped
    state: np.ndarray  # uint8 [M]
    labels: torch.Tensor | None
    classes: tuple[str, ...]
    crop: str
    filter: str

    def left_out(self) -> dict[str, list[int]]:
        """Places of the pictures that were left out, by reason."""
        return {
            reason: places.tolist()
            for code, reason in enumerate(REASONS, KEPT + 1)
            if len(places := np.flatnonzero(self.state == code))
        }


def read(path: Path) -> Stored:
    """Its pages are read when touched. OSError, SafetensorError or ValueError for a file of another kind."""
    with safe_open(path, framework="pt") as file, safe_open(path, framework="np") as arrays:
        about = json.loads((file.metadata() or {}).get("fastgan", "{}"))
        names = set(file.keys())
        if not isinstance(about, dict) or not {"images", "state"} <= names:
            raise ValueError("not a set of images that fastgan has stored")
        rows, state = file.get_tensor("images"), arrays.get_tensor("state")
        labels = torch.from_numpy(arrays.get_tensor("labels")) if "labels" in names else None
    classes, crop, filter = about.get("classes"), about.get("crop", 0), about.get("filter", 0)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in (*classes, crop, filter)):
        raise ValueError("no classes, crop and filter in its header")
    count = int((state == KEPT).sum())
    if state.dtype != np.uint8 or state.ndim != 1 or rows.dtype != torch.uint8 or rows.shape[:1] != (count,):
        raise ValueError("unexpected shapes")
    if rows.ndim != 4 or 0 in rows.shape[1:]:
        raise ValueError("unexpected shapes")
    if labels is not None:
        inside = labels.dtype == torch.int64 and labels.shape == (count,)
        if not inside or (count and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes)):
            raise ValueError("unexpected labels")
    elif classes:
        raise ValueError("classes without labels")
    return Stored(rows, state, labels, tuple(classes), crop, filter)


def resized_with(source: Source, fit: Fit) -> str:
    """The filter that stored images have gone through, or both, where they were resized before."""
    if not source.filter or source.rows is None:
        return fit.filter
    same = source.rows.shape[1:3] == fit.shape[:2]
    return source.filter if same else f"{source.filter}, then {fit.filter}"


class Layout:
    """Where things are in the file of a source's images."""

    def __init__(self, source: Source, fit: Fit):
        self.total, self.shape, self.labels = source.count, fit.shape, source.labels
        about = {"classes": source.classes, "crop": fit.crop, "filter": resized_with(source, fit)}
        self.metadata = {"fastgan": json.dumps(about)}
        most = len(json.dumps(self.entries(self.total))) + 24  # digits that [M - N] may have more
        self.header_size = 8 + -(-most // 8) * 8
        self.state_at = self.header_size + (0 if self.labels is None else 8 * self.total)
        self.images_at = self.state_at + self.total

    @property
    def image_size(self) -> int:
        """Bytes of an image."""
        return int(np.prod(self.shape))

    def end(self, count: int) -> int:
        """Size of a file with so many images."""
        return self.images_at + count * self.image_size

    def entries(self, count: int) -> dict[str, dict]:
        """The header of safetensors for so many images."""
        parts = (
            {}
            if self.labels is None
            else {"labels": ("I64", [count]), "left_out_labels": ("I64", [self.total - count])}
        )
        parts |= {"state": ("U8", [self.total]), "images": ("U8", [count, *self.shape])}
        entries: dict[str, dict] = {"__metadata__": self.metadata}
        at = 0
        for name, (dtype, shape) in parts.items():
            end = at + int(np.prod(shape, dtype=np.int64)) * (8 if dtype == "I64" else 1)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
        return entries

    def header(self, count: int) -> bytes:
        """The same as bytes, as long as the longest one."""
        length = self.header_size - 8
        return length.to_bytes(8, "little") + json.dumps(self.entries(count)).encode().ljust(length)


def write(path: Path, source: Source, fit: Fit, leave_out: Collection[str] = ()) -> None:
    """Write a file that is either whole or absent, whatever happens meanwhile.

    `leave_out` are the reasons for which a picture may be left out; another raises UsageError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(partial, "x+b") as file:
            with suppress(OSError):  # where files cannot be locked, none is swept
                fcntl.flock(file, fcntl.LOCK_EX)
            layout = Layout(source, fit)
            fill(file, layout, begin(file, layout), source, fit, leave_out)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(path: Path) -> None:
    """Remove what writers of the file have left that were killed; a living one holds its lock."""
    for left in path.parent.glob(f".{path.name}.*"):
        with suppress(OSError), open(left, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def partial_of(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + ".partial")


def write_resumably(
    path: Path, source: Source, fit: Fit, leave_out: Collection[str], seen: set[bytes], drop_copies: bool
) -> None:
    """Write a file in one or more attempts; until it is whole it is called PATH.partial.

    An attempt goes on where the last one was stopped, however that happened, and the end is the same, bit for
    bit. `seen` receives a mark of every image, alike for like images. Raises UsageError where another process
    is at it, where the partial file was begun otherwise or is damaged, and as `write`.
    """
    partial = partial_of(path)
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{partial} is being written by a live process; wait for it") from None
        if path.exists():  # made by another process since the caller looked
            partial.unlink(missing_ok=True)
            raise UsageError(f"{path} exists; remove it or choose another name")
        layout = Layout(source, fit)
        state = resume(file, layout, digest([source.key, fit, *leave_out, drop_copies]), partial)
        for image in written(file, layout, int((state == KEPT).sum())):
            seen.add(mark(image))
        try:
            fill(file, layout, state, source, fit, leave_out, seen, drop_copies)
        except UsageError:  # of a picture; once that is mended, these are other images
            partial.unlink()
            raise
        os.replace(partial, path)


def begin(file: BinaryIO, layout: Layout, marker: bytes = b"") -> np.ndarray:
    """Take the space before the images; the state [M], all 0, for 'not decoded yet'."""
    file.write(marker.ljust(layout.images_at, b"\0"))
    return np.zeros(layout.total, np.uint8)


def resume(file: BinaryIO, layout: Layout, key: str, partial: Path) -> np.ndarray:
    """The state in a partial file, and the file ready for the next image; both new if the file is."""
    marker = (
        b"\0" * 8 + b"unfinished: the same fastgan prepare goes on. " + key.encode()
    )  # no safetensors file
    head = file.read(layout.images_at)
    if len(head) < layout.images_at and marker.startswith(head[: len(marker)]):  # not even begun
        file.seek(0)
        file.truncate()
        return begin(file, layout, marker)
    state = np.frombuffer(head[layout.state_at :].ljust(layout.total, b"\0"), np.uint8).copy()
    count = int((state == KEPT).sum())
    # A writer that was stopped between its last two acts has left the final header.
    if not head.startswith((marker, layout.header(count))):
        way_out = f"repeat that very command or remove {partial}"
        raise UsageError(f"{partial} was begun with other images or options; {way_out}")
    if file.seek(0, os.SEEK_END) < layout.end(count):
        raise UsageError(f"{partial} is damaged; remove it")
    file.truncate(layout.end(count))
    file.seek(layout.end(count))
    return state


def written(file: BinaryIO, layout: Layout, count: int) -> Iterator[bytes]:
    """The images in a file so far."""
    file.seek(layout.images_at)
    for _ in range(count):
        yield file.read(layout.image_size)


def mark(image: bytes) -> bytes:
    """What equal images have in common: 16 bytes."""
    return hashlib.blake2b(image, digest_size=16).digest()


def fill(
    file: BinaryIO,
    layout: Layout,
    state: np.ndarray,
    source: Source,
    fit: Fit,
    leave_out: Collection[str],
    seen: set[bytes] | None = None,
    drop_copies: bool = False,
) -> None:
    """Write the images that `state` lacks, then all that stands before them.

    Every now and then, and when it is stopped, the state is written after the images that it counts have
    reached the disk.
    """
    done = saved = int((state > 0).sum())
    last = time.monotonic()

    def save() -> None:
        nonlocal saved
        file.flush()
        os.fsync(file.fileno())
        file.seek(layout.state_at + saved)
        file.write(state[saved:done].tobytes())
        file.flush()
        file.seek(0, os.SEEK_END)
        saved = done

    try:
        for image in decoded(source, fit, leave_out, done):
            if isinstance(image, np.ndarray):
                image = image.tobytes()
                if seen is not None:
                    others = len(seen)
                    seen.add(mark(image))
                    if drop_copies and len(seen) == others:
                        image = COPY
            if isinstance(image, bytes):
                file.write(image)
                state[done] = KEPT
            else:
                state[done] = KEPT + 1 + REASONS.index(image)
            done += 1
            if time.monotonic() - last > SAVE_EVERY:
                save()
                last = time.monotonic()
    finally:
        save()
    kept = state == KEPT
    if layout.labels is not None:
        labels = layout.labels.numpy()
        file.seek(layout.header_size)
        file.write(labels[kept].tobytes() + labels[~kept].tobytes())
    file.seek(0)
    file.write(layout.header(int(kept.sum())))
    file.flush()
    os.fsync(file.fileno())


def decoded(source: Source, fit: Fit, leave_out: Collection[str], start: int = 0) -> Iterator[Decoded]:
    """The pictures from `start` on, in order, decoded on all cores.

    Threads do it, as Pillow decodes and resizes without the GIL: it is held for some 0.1 ms a picture, so
    that threads end at 10,000 pictures a second, CelebA in 20 s, whatever the number of cores.
    """
    workers = os.cpu_count() or 1
    waiting: deque[Future[Decoded]] = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=source.count,
            initial=start,
            desc="decoding",
            unit=" images",
            disable=None,
            leave=False,
        ) as progress,
    ):
        try:
            for i in range(start, source.count):
                waiting.append(pool.submit(attempt, source, i, fit, leave_out))
                if len(waiting) > 4 * workers:  # bounds the memory: pool.map would decode them all ahead
                    yield waiting.popleft().result()
                    progress.update()
            while waiting:
                yield waiting.popleft().result()
                progress.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def attempt(source: Source, i: int, fit: Fit, leave_out: Collection[str]) -> Decoded:
    """Image i decoded, or why it is left out; UsageError if that reason is not among `leave_out`."""
    try:
        return decode(source, i, fit)
    except Unfit as unfit:
        if unfit.reason not in leave_out:
            raise UsageError(str(unfit)) from unfit
        return unfit.reason
