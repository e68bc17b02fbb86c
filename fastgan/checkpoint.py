"""Tensors to disk and back: safetensors only, whole or not at all."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def beside(path: Path) -> Path:
    """A hidden name in the same folder, that can be renamed to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


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


def write(path: Path, data: bytes | str) -> None:
    """`data` at `path`, or nothing."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """A safetensors file; `metadata` is one key holding JSON, for the library shuffles several."""
    tensors = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    write(path, save(tensors, {"fastgan": json.dumps(metadata)}))


def load_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata); `prefix` chooses tensors and goes from their names.

    ValueError names a file that is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("fastgan", "{}"))
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from None


def save_checkpoint(folder: Path, state: dict[str, Tensor], images: int, keep: int) -> None:
    """folder/IMAGES.safetensors; all but the newest `keep` checkpoints go."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / f"{images:09d}.safetensors", state, images=images)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], int] | None:
    """(state, images seen) of the newest checkpoint, None if there is none."""
    found = checkpoints(folder)
    if not found:
        return None
    state, metadata = load_tensors(found[-1])
    return state, metadata["images"]
