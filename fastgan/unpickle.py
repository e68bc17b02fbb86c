"""What a pickle holds, read without running any of it: PyTorch's checkpoints and NVIDIA's network files.

A pickle is a program: it names functions and says what to call them with. Python's own reader does so. This
one interprets the instructions itself and knows a few names alone, those that make numbers, containers,
tensors and records; any other is refused by its name. An object, be it a module or a namespace, becomes a
`Record` of its attributes: its class is never looked up, and source code that comes with it is dropped.

Tensors are `Claim`s until somebody reads them. Each must lie within a storage, and each storage within the
file, so that what is read never takes more memory than the file has bytes.
"""

import codecs
import contextlib
import functools
import io
import math
import mmap
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.config import UsageError

MAGIC = 0x1950A86A20F9469CFC6C  # in front of what torch.save wrote before it wrote zip files
LEGACY_PROTOCOL = 1001
PERSISTENCE = 6  # NVIDIA's torch_utils.persistence, all versions that have been published
MOST_INSTRUCTIONS = 500_000  # checkpoints with optimizers have some ten thousand; one may take 200 bytes
MOST_OF_A_PAYLOAD = 100  # a storage that is pickled by itself has some ten, and may be named over and over
MOST_DIMENSIONS = 16
_ARCHIVES = ((257, b"ustar", "a tar"), (0, b"\x1f\x8b", "a gzip"), (0, b"7z\xbc\xaf", "a 7z"))

DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


class Record(dict):
    """The attributes of an object by name; `kind` is the name of its class."""

    def __init__(self, kind: str, attributes: Mapping[str, Any] | None = None):
        super().__init__(attributes or {})
        self.kind = kind


class Storage:
    """A row of numbers somewhere in the file: `fetch` returns their bytes, once their place is known."""

    def __init__(self, dtype: torch.dtype, numel: int):
        self.dtype, self.numel = dtype, numel
        self.fetch: Callable[[], bytes | memoryview] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it claims."""
        return self.numel * self.dtype.itemsize

    @functools.cached_property
    def numbers(self) -> Tensor:
        """All of it, read now; ValueError if there are not as many as claimed."""
        if self.fetch is None:
            raise ValueError("a storage is missing")
        data = bytearray(self.fetch())
        if len(data) != self.nbytes:
            raise ValueError(f"a storage claims {self.nbytes} bytes and has {len(data)}")
        return torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)


def _size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 1 << 63


def _check_shape(sides: Sequence[Any]) -> None:
    if len(sides) > MOST_DIMENSIONS or not all(map(_size, sides)):
        raise ValueError("a tensor's shape is malformed")


@dataclass(frozen=True, eq=False)
class Claim:
    """A tensor that has not been read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        _check_shape((self.offset, *self.shape))
        _check_shape((self.offset, *self.stride))
        if len(self.shape) != len(self.stride):
            raise ValueError("a tensor's shape is malformed")
        end = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1
        if self.numel > self.storage.numel or (self.numel and end > self.storage.numel):
            raise ValueError(
                f"a tensor claims {self.numel} elements of a storage that has {self.storage.numel}"
            )

    @property
    def numel(self) -> int:
        """Numbers that it claims."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it claims."""
        return self.numel * self.storage.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor itself."""
        return torch.as_strided(self.storage.numbers, self.shape, self.stride, self.offset).clone()


def printable(text: str) -> str:
    """Text from a file, for a line of a terminal: some of it, and no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """UsageError for whatever goes wrong with `path`, in one line, however long and odd its strings are."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        text = str(error) if type(error) is ValueError else f"it is damaged ({type(error).__name__})"
        raise UsageError(f"{path} is refused, nothing of it was run: {printable(text)}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged: {printable(str(error))}") from None


def read(path: Path) -> Any:
    """The root of what torch.save or pickle wrote to `path`: dicts, lists, numbers, strings, Records, Claims.

    Raises UsageError for a file that is damaged, names what it must not, or claims more than it holds.
    """
    with _explained(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pickletools' of damaged strings
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return _read_zip(path)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read_stream(data, data)


def tensors(path: Path, claims: Mapping[str, Claim]) -> dict[str, Tensor]:
    """The tensors of `claims`, which are of the file `path`; UsageError if they are larger than it."""
    with _explained(path):
        storages = {id(claim.storage): claim.storage.nbytes for claim in claims.values()}
        size = max(sum(storages.values()), sum(claim.nbytes for claim in claims.values()))
        if size > path.stat().st_size:
            raise ValueError(f"its tensors claim {size} bytes, more than it has")
        return {name: claim.read() for name, claim in claims.items()}


def _read_stream(file: Any, data: Any, payloads: bool = True) -> Any:
    """A pickle, or torch.save's old format: four pickles, the names of the storages, then the storages, each
    behind its length. `file` reads `data`; `payloads` allows for such files within."""
    for offset, mark, what in _ARCHIVES:
        if data[offset : offset + len(mark)] == mark:
            raise ValueError(f"it is {what} archive; unpack it and name the checkpoint in it")
    most = MOST_INSTRUCTIONS if payloads else MOST_OF_A_PAYLOAD
    root = interpret(file, payloads=payloads, most=most)
    if type(root) is not int or root != MAGIC:
        return root
    protocol, machine = interpret(file, most=most), interpret(file, most=most)
    if protocol != LEGACY_PROTOCOL or _of(dict, machine).get("little_endian") is not True:
        raise ValueError("it is of an unknown version of torch.save")
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        found = storages.setdefault(key, Storage(dtype, numel))
        if (found.dtype, found.numel) != (dtype, numel):
            raise ValueError(f"storage {key} has two sizes")
        return found

    root = interpret(file, storage, payloads, most)
    for key in _of(list, interpret(file, most=most)):
        found = storages[_of(str, key)]
        numel = int.from_bytes(file.read(8), "little")
        start = file.tell()
        if numel != found.numel or start + found.nbytes > len(data):
            raise ValueError(f"storage {key} claims {found.numel} elements, which the file has no room for")
        found.fetch = functools.partial(_part, data, start, found.nbytes)
        file.seek(start + found.nbytes)
    if any(found.fetch is None for found in storages.values()):
        raise ValueError("a storage is missing")
    return root


def _part(data: Any, start: int, length: int) -> memoryview:
    return memoryview(data)[start : start + length]


def _read_zip(path: Path) -> Any:
    """torch.save's zip file: FOLDER/data.pkl, and FOLDER/data/KEY for each storage, none compressed."""
    archive = zipfile.ZipFile(path)
    entries = {entry.filename: entry for entry in archive.infolist()}
    packed = [e.filename for e in entries.values() if e.compress_type != zipfile.ZIP_STORED]
    if packed or sum(e.file_size for e in archive.infolist()) > path.stat().st_size:
        raise ValueError("it unpacks to more than its size, which no file of torch.save does")
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(roots) != 1:
        raise ValueError("it is a zip file, but holds no data.pkl as torch.save writes it")
    (folder,) = roots
    if f"{folder}constants.pkl" in entries:
        raise ValueError("it is a TorchScript archive, which is code; save the module's state_dict() instead")
    if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        name = f"{folder}data/{key}"
        if name not in entries or entries[name].file_size != numel * dtype.itemsize:
            held = entries[name].file_size if name in entries else 0
            raise ValueError(f"storage {key} claims {numel} elements of {dtype}, and has {held} bytes")
        if key not in storages:
            storages[key] = Storage(dtype, numel)
            storages[key].fetch = functools.partial(archive.read, name)
        return storages[key]

    return interpret(io.BytesIO(archive.read(f"{folder}data.pkl")), storage)


def interpret(
    file: Any,
    storage: Callable[..., Storage] | None = None,
    payloads: bool = True,
    most: int = MOST_INSTRUCTIONS,
) -> Any:
    """The value of the pickle that `file` goes on with; it is left behind it.

    `storage(dtype, key, numel)` finds the storages that the pickle names, `payloads` lets it hold storages of
    its own, `most` is how many instructions it may have. ValueError says what is refused.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    copies = (
        MOST_INSTRUCTIONS  # of elements and characters that may yet be made: an instruction can repeat many
    )

    def since_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    for count, (op, arg, _) in enumerate(pickletools.genops(file)):
        if count > most:
            raise ValueError(f"it has more than {most:,} instructions")
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case name if name in _LITERALS:
                copies += len(arg) if isinstance(arg, str) else 0
                stack.append(arg)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append(
                    {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}.get(op.name, set)()
                )
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(op.name[-1])
                values = tuple(stack[len(stack) - size :])
                if len(values) != size:
                    raise ValueError("it is damaged")
                del stack[len(stack) - size :]
                stack.append(values)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "LIST":
                stack.append(since_mark())
            case "DICT":
                values = since_mark()
                stack.append(_dict(zip(values[::2], values[1::2], strict=True)))
            case "FROZENSET":
                stack.append(frozenset(map(_plain, since_mark())))
            case "APPEND":
                value = stack.pop()
                _of(list, stack[-1]).append(value)
            case "APPENDS":
                values = since_mark()
                _of(list, stack[-1]).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of(dict, stack[-1])[_plain(key)] = value
            case "SETITEMS":
                values = since_mark()
                _of(dict, stack[-1]).update(_dict(zip(values[::2], values[1::2], strict=True)))
            case "ADDITEMS":
                values = since_mark()
                _of(set, stack[-1]).update(map(_plain, values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                module, _, name = _of(str, arg).partition(" ")
                stack.append(_admit(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_admit(_of(str, module), _of(str, name)))
            case "REDUCE" | "NEWOBJ":
                values, name = _of(tuple, stack.pop()), _of(_Name, stack.pop())
                if name.call is _payload and not payloads:
                    raise ValueError("it has storages within storages")
                copies -= sum(map(_length, values))
                _check_copies(copies)
                stack.append(name.call(*values))
            case "BUILD":
                state = stack.pop()
                copies -= _length(state)
                _check_copies(copies)
                stack[-1] = _with_state(stack[-1], state)
            case "BINPERSID":
                stack.append(_stored(stack.pop(), storage))
            case other:
                raise ValueError(f"it has the instruction {other}, which no checkpoint needs")
    return stack.pop()


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _length(value: Any) -> int:
    """Elements and characters that are copied with `value`, those of a dict's own dicts included."""
    if isinstance(value, dict):
        return len(value) + sum(len(v) for v in value.values() if isinstance(v, dict))
    return len(value) if isinstance(value, str | list | set | frozenset) else 0


def _check_copies(left: int) -> None:
    if left < 0:
        raise ValueError("it copies its own parts without end")


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError("it is damaged: an instruction finds the wrong kind of value")
    return value


def _plain(key: Any) -> Any:
    """A key or member: numbers and strings alone, for the hash of nested tuples can take forever, and so can
    a dict of integers that have one hash."""
    if not isinstance(key, str | bytes | int | float | None):
        raise ValueError("it has keys that are neither numbers nor strings")
    if isinstance(key, int) and hash(key) != key != -1:
        raise ValueError("it has keys of more than 61 bits")
    return key


def _dict(pairs: Any) -> dict[Any, Any]:
    return {_plain(key): value for key, value in pairs}


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle may name, and what stands for it here."""

    full: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class _Type:
    """A storage's class."""

    dtype: torch.dtype


def _admit(module: str, name: str) -> "_Name | _Type | torch.dtype":
    full = f"{module}.{name}"
    if module in ("torch", "torch.storage") and name.removesuffix("Storage") in DTYPES:
        return _Type(DTYPES[name.removesuffix("Storage")])
    if full in _DTYPE_NAMES:  # R3GAN's stages have one as an attribute
        return _DTYPE_NAMES[full]
    if full in _FUNCTIONS:
        return _Name(full, _FUNCTIONS[full])
    if full in _RECORDS or module.startswith(_MODULES):
        return _Name(full, functools.partial(_record, full))
    if full == "dnnlib.tflib.network.Network":
        raise ValueError("it is a TensorFlow network; stylegan3's legacy.py makes one of PyTorch of it")
    raise ValueError(f"it asks for {full}, which is not on the list of what a checkpoint may name")


_RECORDS = {
    "argparse.Namespace",
    "dnnlib.util.EasyDict",
    "models.utils.config.BaseConfig",  # pytorch_GAN_zoo's
    "utils.config.BaseConfig",
}
_MODULES = ("torch.nn.modules.", "R3GAN.", "training.networks")  # the last is R3GAN's, around the others
_DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}


def _record(full: str, *args: Any) -> Record:
    if args:
        raise ValueError(f"it makes a {full} of arguments, where only attributes are known")
    return Record(full)


def _reconstructed(name: Any, base: Any, state: Any) -> Any:
    """copyreg's way to an object of a class of Python's old protocols."""
    if state is not None:
        raise ValueError(f"it makes a {_of(_Name, name).full} in a way that is not known")
    return _of(_Name, name).call()


def _persistent(meta: Any) -> Record:
    """NVIDIA's persistent object: a class's name, its source code, which is not looked at, and attributes."""
    meta = _of(dict, meta)
    if meta.get("type") != "class" or meta.get("version") != PERSISTENCE:
        raise ValueError(f"it has a persistent object of another version than {PERSISTENCE}")
    return Record(_of(str, meta.get("class_name")), _of(dict, meta.get("state")))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Claim:
    return Claim(_of(Storage, storage), offset, _of(tuple, shape), _of(tuple, stride))


def _parameter(tensor: Any, *rest: Any) -> Claim:
    return _of(Claim, tensor)


def _payload(data: Any) -> Storage:
    """A storage that was pickled by itself: torch.save's old format within the pickle."""
    data = _of(bytes, data)
    return _of(Storage, _read_stream(io.BytesIO(data), data, payloads=False))


def _encoded(text: Any, encoding: Any) -> bytes:
    """How protocols below 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("it encodes bytes in a way that is not known")
    return codecs.latin_1_encode(_of(str, text))[0]


def _stored(name: Any, storage: Callable[..., Storage] | None) -> "Storage | _Name":
    name = _of(tuple, name)
    if len(name) == 4 and name[0] == "module":  # a class, which torch.save's old format wrote with its source
        return _of(_Name, name[1])
    if storage is None or len(name) not in (5, 6) or name[0] != "storage" or name[5:] not in ((), (None,)):
        raise ValueError("it refers to something outside of itself that is no storage")
    kind, key, numel = name[1], name[2], name[4]
    if not _size(numel):
        raise ValueError("it is damaged: a storage has no size")
    return storage(_of(_Type, kind).dtype, _of(str, key), numel)


def _dtype(code: Any, *rest: Any) -> np.dtype:
    if not re.fullmatch(r"[<>=|]?[biuf?]\d?", _of(str, code)):
        raise ValueError(f"it has an array of {code}, which is no number")
    return np.dtype(code)


def _scalar(dtype: Any, data: Any) -> int | float | bool:
    return np.frombuffer(_of(bytes, data), _of(np.dtype, dtype), 1)[0].item()


def _array(*args: Any) -> Record:
    """numpy's empty array, to be filled by its state."""
    return Record("numpy.ndarray")


def _with_state(value: Any, state: Any) -> Any:
    """What pickle's BUILD makes of `value`: a record takes attributes, numpy's arrays their contents.

    Other containers keep none: a state dict's _metadata, for one, has no use here.
    """
    if isinstance(value, np.dtype):
        order = _of(tuple, state)[1]
        return value.newbyteorder(order) if order in ("<", ">") else value
    if isinstance(value, Record) and value.kind == "numpy.ndarray":
        _, shape, dtype, fortran, data = _of(tuple, state)
        shape, dtype, data = _of(tuple, shape), _of(np.dtype, dtype), _of(bytes, data)
        _check_shape(shape)
        if not dtype.isnative:
            raise ValueError("it has arrays of a big-endian machine")
        stride = [math.prod(shape[:i] if fortran else shape[i + 1 :]) for i in range(len(shape))]
        storage = Storage(torch.from_numpy(np.empty(0, dtype)).dtype, len(data) // dtype.itemsize)
        storage.fetch = lambda: data
        return Claim(storage, 0, shape, tuple(stride))
    if isinstance(value, Record):
        value.update(_dict(_of(dict, state).items()))
    elif not isinstance(value, dict):
        raise ValueError("it gives attributes to what has none")
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): _dict(pairs),
    "builtins.bytes": lambda: b"",  # how protocols below 3 write none
    "builtins.set": lambda members=(): set(map(_plain, members)),
    "builtins.object": lambda: Record("builtins.object"),
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "_codecs.encode": _encoded,
    "torch.Size": lambda sides: tuple(_of(tuple, sides)),
    "torch.device": lambda name, *rest: _of(str, name),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.storage._load_from_bytes": _payload,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
}
_FUNCTIONS |= {name.replace("builtins", "__builtin__"): f for name, f in _FUNCTIONS.items()}
