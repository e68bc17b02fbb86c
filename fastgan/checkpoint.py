"""Tensors to disk and back: safetensors only, whole or not at all."""

import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgan.config import UsageError

UNFINISHED = ".tmp"  # ends the name of what is being written
CHECKSUM = b'checksum\\": \\"'  # what stands before it: JSON in a string in JSON
DIGITS = 32


def beside(path: Path) -> Path:
    """A hidden name in the same folder, that can be renamed to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes `path` when the block ends, or nothing if the block fails.

    Until then it lies beside `path`. `durable` syncs it first, which takes some milliseconds.
    """
    partial = beside(path)
    try:
        with partial.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(path: Path, *data: bytes | str | memoryview) -> None:
    """All of `data` at `path`, or nothing."""
    with replacing(path) as file:
        for part in data:
            file.write(part.encode() if isinstance(part, str) else part)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed writer left; nobody may be writing to `folder`."""
    for file in folder.glob(f".*{UNFINISHED}"):
        file.unlink()


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """A safetensors file; `metadata` is one key holding JSON, for the library shuffles several.

    The JSON also holds the checksum of the file as it is with zeros for the checksum's digits (BLAKE2b, 128
    bits), so that any reader of safetensors opens it.
    """
    tensors = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    header = json.dumps(metadata | {"checksum": "0" * DIGITS})
    data = memoryview(save(tensors, {"fastgan": header}))
    at = _checksum_at(data)
    write(path, data[:at], _digest(data), data[at + DIGITS :])


def load_tensors(
    path: Path, prefix: str = "", checked: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata); `prefix` chooses tensors and goes from their names.

    ValueError names a file that is damaged, or `checked` and without checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("fastgan", "{}"))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no JSON object")
            checksum = metadata.pop("checksum", None)
            if checksum is None and checked:
                raise ValueError("it has no checksum")
            if checksum is not None and checksum != _checksum_of(path):
                raise ValueError("its checksum is not that of its content")
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from None


def _checksum_at(data: memoryview | mmap.mmap) -> int:
    """Where in a file's bytes the checksum stands."""
    header = bytes(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return 8 + header.index(CHECKSUM) + len(CHECKSUM)


def _checksum_of(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = _checksum_at(data)
        with memoryview(data) as whole, whole[:at] as before, whole[at + DIGITS :] as after:
            return _digest(before, b"0" * DIGITS, after)


def _digest(*data: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=DIGITS // 2)
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def save_checkpoint(folder: Path, state: dict[str, Tensor], images: int, keep: int) -> None:
    """folder/IMAGES.safetensors; all but the newest `keep` checkpoints go."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / f"{images:09d}.safetensors", state, images=images)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def load_checkpoint(
    folder: Path, warn: Callable[[str], None] = lambda message: None
) -> tuple[dict[str, Tensor], int] | None:
    """(state, images seen) of the newest intact checkpoint, None if there is none at all.

    Newer ones that are damaged are renamed, so that they neither count as kept nor are tried again, and
    `warn` is told. UsageError if every one is damaged: starting anew would overwrite what may be mended.
    """
    found, complaints = checkpoints(folder), []
    for file in reversed(found):
        try:
            state, metadata = load_tensors(file, checked=True)
            images = metadata["images"]
        except (ValueError, KeyError) as error:
            complaints.append((file, error))
            continue
        for damaged, error in complaints:
            damaged.rename(damaged.with_suffix(".damaged"))
            warn(f"warning: {error}; going on from {file.name} instead")
        return state, images
    if found:
        raise UsageError(
            f"{folder}: no checkpoint is intact ({complaints[0][1]}); put back a copy of one, or choose "
            "another --run-dir to start anew"
        )
    return None
