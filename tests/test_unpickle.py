"""What hostile and damaged files come to: a clear error, nothing run, memory within the file's size."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan import convert, unpickle
from fastgan.config import UsageError

MARKER = "touch marker"  # what hostile files ask the shell for; the tests' folder is the current one


class Shell:
    def __reduce__(self) -> tuple:
        return os.system, (MARKER,)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(storage: bytes, *shape: int, stride: tuple[int, ...]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, {})."""
    sizes = b"(" + b"".join(map(number, shape)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(0) + sizes + b"\x89}tR"


def stored(numel: int) -> bytes:
    """The storage "0" of a zip file, said to have `numel` elements."""
    return (
        b"("
        + text("storage")
        + name("torch", "FloatStorage")
        + text("0")
        + text("cpu")
        + number(numel)
        + b"tQ"
    )


def payload(numel: int) -> bytes:
    """A storage of four numbers, pickled by itself, that says to have `numel`."""
    out = b"".join(pickle.dumps(x, 2) for x in (unpickle.MAGIC, 1001, {"little_endian": True}))
    out += b"\x80\x02" + stored(numel) + b"." + pickle.dumps(["0"], 2) + struct.pack("<q", numel) + bytes(16)
    return name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(out)) + out + b"\x85R"


def state(value: bytes) -> bytes:
    """A pickle of {"main.0.weight": value}."""
    return b"\x80\x02}" + text("main.0.weight") + value + b"s."


def zipped(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
    return file.getvalue()


def overlapping() -> bytes:
    """A zip whose directory names one entry a thousand times."""
    data = zipped(bytes(10_000))
    end = data.rindex(b"PK\x05\x06")
    start = data.index(b"PK\x01\x02")
    entry = data[start : data.index(b"PK\x01\x02", start + 4)]
    directory = entry * 1000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1000, 1000, len(directory), start, 0)
    assert len(data[end:]) == len(tail)
    return data[:start] + directory + tail


def doubled(levels: int, once: Callable[[bytes], bytes]) -> bytes:
    """A value that holds the one before twice, and so on: 2^levels parts in a few bytes."""
    data = b"\x80\x02]" + b"q\x00"
    for _ in range(levels):
        data += b"0" + once(b"h\x00") + b"q\x00"
    return data + b"."


def modules(levels: int) -> bytes:
    """Persistent modules that hold the one before twice."""

    def made(inner: bytes) -> bytes:
        held = b"}(" + text("a") + inner + text("b") + inner + b"u"
        fields = text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + held
        meta = text("type") + text("class") + text("version") + number(6) + text("class_name") + text("G")
        meta += text("module_src") + text("import os; os.system('touch marker')") + text("state")
        return (
            name("torch_utils.persistence", "_reconstruct_persistent_obj")
            + b"}("
            + meta
            + b"}("
            + fields
            + b"uu\x85R"
        )

    return doubled(levels, made)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps({"a": Shell()}), r"it asks for posix\.system, which"),
    "os.system, old": (b"(S'touch marker'\nios\nsystem\n.", r"has the instruction INST"),
    "eval": (b"c__builtin__\neval\n(S'1'\ntR.", r"it asks for __builtin__\.eval"),
    "a tensor's method": (
        b"\x80\x04" + text("torch") + text("hub.load") + b"\x93.",
        r"asks for torch\.hub\.load",
    ),
    "an extension": (b"\x80\x02\x82\x01.", r"has the instruction EXT1"),
    "an array of objects": (
        name("numpy.core.multiarray", "scalar") + b"(cnumpy\ndtype\n(" + text("O8") + b"tR" + b"C\x00tR.",
        r"an array of O8, which is no number",
    ),
    "a module's constructor": (
        b"ctorch.nn.modules.linear\nLinear\n(K\x02K\x02tR.",
        r"a torch\.nn\.modules\.linear\.Linear of",
    ),
    "a class as a dict": (b"ccollections\nOrderedDict\n}b.", r"gives attributes to what has none"),
    "billions by a stride of 0": (
        state(tensor(payload(4), 10**9, stride=(0,))),
        r"claims 1000000000 elements of a storage that has 4",
    ),
    "billions in a storage": (
        state(tensor(payload(10**9), 10**9, stride=(1,))),
        r"storage 0 claims 1000000000 elements",
    ),
    "billions in a zip": (
        zipped(state(tensor(stored(10**9), 10**9, stride=(1,)))),
        r"storage 0 claims 1000000000 elements",
    ),
    "negative sizes": (zipped(state(tensor(stored(4), -1, stride=(1,)))), r"a tensor's shape is malformed"),
    "a zip bomb": (zipped(bytes(50_000_000), zipfile.ZIP_DEFLATED), r"unpacks to more than its size"),
    "an overlapping zip": (overlapping(), r"unpacks to more than its size"),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", r"holds no network that is known"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", r"holds no network that is known"),
    "deep keys": (
        b"\x80\x02}" + b")" + b"\x85" * 1000 + b"Ns.",
        r"keys that are neither numbers nor strings",
    ),
    "doubled tuples": (
        doubled(200, lambda inner: inner + inner + b"\x86"),
        r"holds no network that is known",
    ),
    "doubled tuples as a key": (
        doubled(60, lambda inner: inner + inner + b"\x86")[:-1] + b"}h\x00Ns.",
        r"keys that are neither numbers nor strings",
    ),
    "doubled modules": (modules(60), r"modules hold one another without end"),
    "a dict within itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", r"holds no network that is known"),
    "a huge memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", r"holds no network that is known"),
    "a huge string": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a.", r"expected 1099511627776 bytes"),
    "keys of one hash": (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little") + b"N" for i in (1, 2))
        + b"u.",
        r"keys of more than 61 bits",
    ),
    "a long storage": (
        name("torch.storage", "_load_from_bytes")
        + b"B"
        + struct.pack("<I", 203)
        + b"\x80\x02"
        + b"N0" * 100
        + b".\x85R.",
        r"more than 100 instructions",
    ),
    "sets without end": (b"\x80\x04](" + b"\x8f" * 600_000 + b"e.", r"more than 500,000 instructions"),
    "copies": (
        b"\x80\x02](" + b"K\x01" * 50_000 + b"eq\x00" + (b"0c__builtin__\nset\nh\x00\x85R") * 100 + b".",
        r"copies its own parts without end",
    ),
    "storages in storages": (
        name("torch.storage", "_load_from_bytes")
        + b"B"
        + struct.pack("<I", len(payload(4)) + 1)
        + payload(4)
        + b".\x85R.",
        r"storages within storages",
    ),
    "a tar": (bytes(257) + b"ustar" + bytes(762), r"it is a tar archive; unpack it"),
    "a gzip": (b"\x1f\x8b\x08" + bytes(20), r"it is a gzip archive; unpack it"),
    "a class that is none": (
        zipped(b"\x80\x02(" + text("module") + b"K\x01" * 3 + b"tQ."),
        r"the wrong kind of",
    ),
    "TorchScript": (b"", r"a TorchScript archive, which is code"),
    "nothing": (b"", r"cannot mmap an empty file"),
    "text": (b"<html><body>404</body></html>", r"is refused"),
}


def write(folder: Path, kind: str) -> Path:
    path = folder / "file.pth"
    path.write_bytes(HOSTILE[kind][0])
    if kind == "TorchScript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data.pkl", b"\x80\x02}.")
            archive.writestr("net/constants.pkl", b"\x80\x02).")
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=HOSTILE[kind][1]) as error:
        convert.read(write(tmp_path, kind))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_pickle_that_calls_the_shell_does_not(
    legacy: bool, suffix: str, tmp_path: Path, monkeypatch, capsys
):
    """In torch.save's formats as well, whatever the file is called; the command writes nothing."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3), "b": Shell()}, f"bad{suffix}", _use_new_zipfile_serialization=not legacy)
    assert convert.main([f"bad{suffix}", "out.safetensors"]) == 2
    assert "nothing of it was run: it asks for posix.system" in capsys.readouterr().err
    assert os.listdir() == [f"bad{suffix}"]


GROWTH = """
import resource, sys
from pathlib import Path
from fastgan import convert
from fastgan.config import UsageError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        convert.read(path)
    except UsageError:
        continue
    raise AssertionError(path)
print(peak() - before)
"""


def test_memory_is_bounded(tmp_path: Path):
    """All hostile files, one after the other: MiB that the process grows by, from where its imports ended."""
    for i, kind in enumerate(HOSTILE):
        (tmp_path / str(i)).mkdir()
        write(tmp_path / str(i), kind).rename(tmp_path / f"{i}.pth")
        (tmp_path / str(i)).rmdir()
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(grown.stdout) < 100


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files(legacy: bool, tmp_path: Path):
    path = tmp_path / "whole.pth"
    torch.save(
        {f"main.{i}.weight": torch.ones(2, 2, 4, 4) for i in range(3)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    data = path.read_bytes()
    for length in range(0, len(data) - 1, max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        with pytest.raises(UsageError):
            convert.read(path)


def test_a_file_that_is_not_there(tmp_path: Path, capsys):
    assert convert.main([str(tmp_path / "no.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert "no.pth cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "a.pth").write_bytes(b"")
    assert convert.main([str(tmp_path / "a.pth"), str(tmp_path / "out.pth")]) == 2
    assert "OUT must end in .safetensors" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "a.pth"), str(tmp_path / "no" / "out.safetensors")]) == 2
    assert "no is not a folder" in capsys.readouterr().err
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    assert convert.main([str(tmp_path / "a.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    assert "is no intact safetensors file" in capsys.readouterr().err


def read(value: Any, tmp_path: Path, protocol: int = 4) -> Any:
    (tmp_path / "value.pkl").write_bytes(pickle.dumps(value, protocol))
    return unpickle.read(tmp_path / "value.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_values(protocol: int, tmp_path: Path):
    """Numbers, strings and containers as pickle has them, of every protocol."""
    value = {"a": [1, -(2**70), 2.5, None, True], "b": ("x", b"\xff\x00", {1, "y"}), 3: {"c": ()}}
    assert read(value, tmp_path, protocol) == value


def test_arrays(tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(6.0, dtype=numpy.float32).reshape(2, 3)
    got = read(
        {"c": array, "f": numpy.asfortranarray(array), "s": numpy.float64(1.5), "i": numpy.int64(7)}, tmp_path
    )
    assert torch.equal(got["c"].read(), torch.from_numpy(array))
    assert torch.equal(got["f"].read(), torch.from_numpy(array))
    assert (got["s"], got["i"]) == (1.5, 7)
