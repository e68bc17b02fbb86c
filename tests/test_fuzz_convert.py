"""Random pickles, files and state dicts: the converter makes networks of them or says why not, nothing else.

FASTGAN_FUZZ_EXAMPLES is the number of examples of each test.
"""

import io
import os
import pickle
import pickletools
import zipfile
from pathlib import Path

import torch
from golden_cases import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgan import convert, unpickle
from fastgan.config import UsageError

EXAMPLES = int(os.environ.get("FASTGAN_FUZZ_EXAMPLES", "30"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FASTGAN_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = sorted((GOLDEN / "checkpoints").iterdir())
STATES = [torch.load(file, weights_only=True) for file in FILES if file.suffix == ".pth"]
NAMES = [
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "numpy dtype"),
    *(
        "torch_utils.persistence _reconstruct_persistent_obj",
        "dnnlib.util EasyDict",
        "copyreg _reconstructor",
    ),
    *("numpy.core.multiarray scalar", "numpy.core.multiarray _reconstruct", "numpy ndarray", "os system"),
    *("torch.storage _load_from_bytes", "_codecs encode", "torch.nn.modules.conv Conv2d", "builtins object"),
]
literals = st.one_of(
    st.integers(-(2**70), 2**70).map(lambda n: b"L%dL\n" % n),
    st.sampled_from([b"N", b"\x88", b"\x89", b"]", b"}", b")", b"\x8f", b"K\x00", b"K\x04"]),
    st.binary(max_size=8).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.sampled_from(
        ["storage", "0", "cpu", "f4", "latin1", "class", "state", "_modules", "main.0.weight"]
    ).map(lambda text: b"\x8c" + bytes([len(text)]) + text.encode()),
    st.sampled_from(NAMES).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n"),
)
steps = st.sampled_from(
    [b"(", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"b", b"s", b"u", b"a"]
)
steps |= st.sampled_from(
    [b"e", b"0", b"1", b"2", b"\x94", b"h\x00", b"h\x01", b"Q", b"\x90", b"\x91", b"\x93"]
)
programs = st.lists(literals | steps, max_size=60).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


def read(path: Path, data: bytes) -> None:
    """The file is converted or refused in one line; the process and its folder are as before."""
    path.write_bytes(data)
    refusal = ""
    try:
        networks = convert.read(path)
    except UsageError as error:
        refusal = str(error)
    else:
        assert networks.generator or networks.discriminator
    assert "\n" not in refusal and len(refusal) < 1500
    assert os.listdir(path.parent) == [path.name]


@given(programs)
@fuzz
def test_random_programs(tmp_path: Path, program: bytes):
    read(tmp_path / "a.pkl", program)


@given(
    st.integers(0, len(FILES) - 1),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), max_size=4),
)
@fuzz
def test_damaged_files(tmp_path: Path, which: int, within: bool, changes: list[tuple[float, bytes]]):
    """Checkpoints with a few bytes changed: anywhere in the file or, in an intact zip file, in the pickle."""
    whole = FILES[which].read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    (root,) = [entry for entry in entries if entry.endswith("/data.pkl")]
    data = bytearray(entries[root] if within else whole)
    for place, new in changes:
        start = int(place * (len(data) - 1))
        data[start : start + len(new)] = new
    if within:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for entry, old in entries.items():
                archive.writestr(entry, bytes(data) if entry == root else old)
        data = bytearray(file.getvalue())
    read(tmp_path / "a.pth", bytes(data))


@given(st.data())
@fuzz
def test_state_dicts_of_other_shapes(tmp_path: Path, data: st.DataObject):
    """Names of public networks with tensors missing, renamed, or of other shapes, empty ones among them."""
    state = dict(STATES[data.draw(st.integers(0, len(STATES) - 1))])
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(state)))
        match data.draw(st.sampled_from(["drop", "rename", "reshape", "copy", "retype"])):
            case "drop":
                del state[name]
            case "rename":
                state[name.replace("0", str(data.draw(st.integers(0, 99))))] = state.pop(name)
            case "copy":
                state[f"{name.rpartition('.')[0]}.{data.draw(st.sampled_from(['bias', 'weight', 'u0']))}"] = (
                    state[name]
                )
            case "retype":
                state[name] = state[name].to(
                    data.draw(st.sampled_from([torch.int64, torch.float16, torch.bool]))
                )
            case _:
                shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 1000]), max_size=5))
                if torch.Size(shape).numel() < 1000**2:
                    state[name] = torch.zeros(shape)
        if not state:
            break
    file = io.BytesIO()
    torch.save({"netG": state} if data.draw(st.booleans()) else state, file)
    read(tmp_path / "a.pth", file.getvalue())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
        ),
        max_leaves=20,
    ),
    st.integers(0, 5),
)
@fuzz
def test_plain_values_are_read_as_pickle_reads_them(tmp_path: Path, value: object, protocol: int):
    data = pickle.dumps(value, protocol)
    (tmp_path / "a.pkl").write_bytes(pickletools.optimize(data) if protocol % 2 else data)
    assert unpickle.read(tmp_path / "a.pkl") == value
