"""Whatever bytes the readers of data are given, they return images or raise UsageError, in bounded memory.

FASTGAN_FUZZ_EXAMPLES is how many examples each test tries (default: 20); `hypothesis` keeps what failed.
"""

import io
import json
import os
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_cases import noise
from safetensors.numpy import save

from fastgan.config import UsageError
from fastgan.data import ImageSet, load_images

EXAMPLES = int(os.environ.get("FASTGAN_FUZZ_EXAMPLES", "20"))
ROOM = 4 << 30  # bytes of address space that a reader may take on top of what the process has
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and a MemoryError for a reader that believes what a file claims of its size."""
    monkeypatch.chdir(tmp_path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read(path: str, content: bytes, image_key: str = "") -> None:
    """Read the file in both ways; what comes out must be sound."""
    Path(path).write_bytes(content)
    for skip_bad in (False, True):
        try:
            images = load_images(path, 8, skip_bad=skip_bad, image_key=image_key)
        except UsageError as error:
            said = str(error)
        else:
            said = ""
            check(images)
        assert "\n" not in said and len(said) < 2000


def check(images: ImageSet) -> None:
    assert len(images) > 0 and images.images.shape[1:] == (3, 8, 8) and images.images.dtype == torch.uint8
    if images.labels is None:
        assert images.classes == ()
    else:
        assert images.labels.shape == (len(images),) and images.labels.dtype == torch.int64
        assert 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(images.classes)
    images.images.sum()


def png() -> bytes:
    file = io.BytesIO()
    noise(8).save(file, "PNG")
    return file.getvalue()


def packed(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.full((3, 8, 8, 3), 7, np.uint8), y=np.array([0, 2, 1]))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.full((3, 8, 8, 3), 7, np.uint8))
    return file.getvalue()


def prepared() -> bytes:
    about = {"fastgan": json.dumps({"classes": ["a", "b"], "crop": "none", "filter": "box"})}
    tensors = {
        "labels": np.array([0, 1, 1]),
        "left_out_labels": np.array([0]),
        "state": np.array([1, 1, 3, 1], np.uint8),
        "images": np.full((3, 8, 8, 3), 7, np.uint8),
    }
    return save(tensors, about)


LISTING = json.dumps({"labels": [["a.png", 0], ["b.png", 1]]}).encode()
WHOLE = {
    "a.zip": packed({"a.png": png(), "b.png": png(), "dataset.json": LISTING}, zipfile.ZIP_STORED),
    "b.zip": packed({"a/a.png": png(), "b/b.png": png()}),
    "a.npz": npz(),
    "a.npy": npy(),
    "a.safetensors": prepared(),
}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A good file with some bytes set to others, some cut out, some put in, and often cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        gone = draw(st.integers(0, 8))
        content[at : at + gone] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


@pytest.mark.parametrize("name", WHOLE)
def test_the_files_that_are_damaged_are_good(name: str):
    Path(name).write_bytes(WHOLE[name])
    images = load_images(name, 8)
    check(images)
    assert images.labels is not None or name == "a.npy"


@pytest.mark.parametrize("name", WHOLE)
@fuzz
@given(data=st.data())
def test_damaged_files(name: str, data: st.DataObject):
    read(name, data.draw(damaged(WHOLE[name])))


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.npy", "a.safetensors"])
@fuzz
@given(content=st.binary(max_size=400))
def test_any_bytes(name: str, content: bytes):
    read(name, content)


NUMBERS = st.integers(-2, 9) | st.integers() | st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**64])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.png", "b.png"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PAIRS = st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "c.png", "..\\a.png"]), NUMBERS), max_size=4)


@fuzz
@given(content=JSON | st.fixed_dictionaries({"labels": JSON | PAIRS}))
def test_any_dataset_json(content: Any):
    entry = json.dumps(content).encode()
    read("a.zip", packed({"a.png": png(), "b.png": png(), "dataset.json": entry}))


@fuzz
@given(
    names=st.lists(
        st.text(max_size=12).map("{}.png".format) | st.sampled_from(["a.png", "a/b.png", "../c.png"]),
        max_size=5,
    )
)
def test_any_names_in_a_zip(names: list[str]):
    try:
        content = packed({name: png() for name in names})
    except (IndexError, ValueError):  # what zipfile itself cannot write
        return
    read("a.zip", content)


SHAPES = st.lists(NUMBERS, max_size=5)


@fuzz
@given(
    shape=SHAPES,
    descr=st.sampled_from(["|u1", "<i8", ">u4", "|O", "<f4", "|V8", "|S0", "x", ""]),
    data=st.binary(),
)
def test_any_array_header(shape: list[int], descr: str, data: bytes):
    text = str({"descr": descr, "fortran_order": False, "shape": tuple(shape)}).encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
    read("a.npy", content)
    read("a.npz", packed({"x.npy": content}))


@fuzz
@given(
    shapes=st.dictionaries(st.sampled_from(["images", "labels", "state", "x"]), SHAPES, max_size=4),
    dtypes=st.lists(
        st.sampled_from(["U8", "I64", "BF16", "F8_E4M3", "BOOL", "F4", "U16", ""]), min_size=4, max_size=4
    ),
    about=JSON | st.fixed_dictionaries({"classes": JSON, "crop": JSON, "filter": JSON}),
    size=st.integers(0, 600),
)
def test_any_tensor_header(shapes: dict[str, list[int]], dtypes: list[str], about: Any, size: int):
    at = 0
    header: dict[str, dict] = {"__metadata__": {"fastgan": json.dumps(about)}}
    for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False):
        end = at + abs(int(np.prod(np.array(shape, dtype=object)))) * (8 if dtype == "I64" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(min(at, size))
    read("a.safetensors", content)
    read("a.safetensors", content, image_key="images")
