"""Tensors to disk and back: safetensors only, whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write(path: Path, data: bytes | str) -> None:
    """`data` at `path`, or nothing: written beside it, synced, then renamed."""
    data = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """A safetensors file; `metadata` is one key holding JSON, for the library shuffles several."""
    tensors = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    write(path, save(tensors, {"fastgan": json.dumps(metadata)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata). ValueError names a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("fastgan", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
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
