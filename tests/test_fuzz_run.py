"""What a run folder is read from, with anything in it: a UsageError or the right content, nothing else.

FASTGAN_FUZZ_EXAMPLES sets how many examples each reader gets.
"""

import contextlib
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgan.checkpoint import checkpoints, load_checkpoint, load_tensors, save_checkpoint, write
from fastgan.config import Config, UsageError, make_config
from fastgan.fit import own_batch
from fastgan.health import collapse
from fastgan.run_folder import METRICS, RunFolder, load_generator, save_generator

fuzzed = settings(
    max_examples=int(os.environ.get("FASTGAN_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CONFIG = make_config("gan", resolution=8, ngf=4, ndf=4, z_dim=6)
STATE = {"ema.weight": torch.arange(12.0).view(3, 4), "losses.loss_d": torch.ones(2, dtype=torch.float64)}
FIELDS = json.loads(json.dumps(CONFIG.__dict__))

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    leaves,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3),
    max_leaves=5,
)
tempting = [0, 1, -1, 7, 64, 2**20, 2**31, 2**63, 10**30, 1e308, True, "gan", "stylegan", "../gan", "hinge"]
alike = anything | st.sampled_from(tempting)
configs = st.dictionaries(st.sampled_from(list(FIELDS)), alike, max_size=3).map(lambda d: FIELDS | d)
figures = st.dictionaries(st.sampled_from(["images", "loss_d", "spread", "loss_g"]), alike)


def lines(objects: list[Any]) -> bytes:
    return b"\n".join(json.dumps(x).encode() for x in objects)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with bytes changed, cut out, put in or put at the end."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "end", "set"]))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif how == "set":
            data[at : at + 8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
        else:
            del data[at:]
    return bytes(data)


def bytes_of(make: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder)).read_bytes()


def saved_checkpoint(folder: Path) -> Path:
    save_checkpoint(folder, STATE, 20, keep=1)
    return checkpoints(folder)[0]


def saved_generator(folder: Path) -> Path:
    save_generator(folder / "generator.safetensors", STATE, CONFIG, 20)
    return folder / "generator.safetensors"


CHECKPOINT, GENERATOR = bytes_of(saved_checkpoint), bytes_of(saved_generator)
CONFIG_JSON = json.dumps(FIELDS).encode()
LOG = b"".join(json.dumps({"images": i, "loss_d": 1.0, "spread": 0.5}).encode() + b"\n" for i in (20, 40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def header(config: Any, **more: Any) -> bytes:
    """A safetensors file without tensors whose metadata says so."""
    inner = json.dumps({"config": config, "images": 1} | more)
    text = json.dumps({"__metadata__": {"fastgan": inner}}).encode()
    return struct.pack("<Q", len(text)) + text


@fuzzed
@given(st.binary(max_size=200) | damaged(CHECKPOINT))
def test_checkpoints(folder: Path, data: bytes):
    file = folder / "checkpoints" / "000000020.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    try:
        loaded = load_checkpoint(file.parent)
    except UsageError:
        return
    assert loaded
    assert loaded[1] == 20
    assert all(torch.equal(t, loaded[0][name]) for name, t in STATE.items())


@fuzzed
@given(st.binary(max_size=200) | damaged(GENERATOR) | configs.map(header) | anything.map(header))
def test_generators(folder: Path, data: bytes):
    file = folder / "generator.safetensors"
    file.write_bytes(data)
    try:
        tensors, config = load_generator(file)
    except UsageError as error:
        complaint = str(error)
    else:
        assert isinstance(config, Config)
        assert not tensors or torch.equal(tensors["weight"], STATE["ema.weight"])
        return
    assert str(file) in complaint


@fuzzed
@given(
    st.binary(max_size=200)
    | damaged(CONFIG_JSON)
    | configs.map(lambda c: json.dumps(c).encode())
    | anything.map(lambda c: json.dumps(c).encode())
    | st.integers(1, 20000).map(lambda n: b"[" * n)
    | st.integers(1, 9000).map(lambda n: b'{"batch": ' + b"9" * n + b"}")
)
def test_configs(folder: Path, data: bytes):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_bytes(data)
    try:
        RunFolder(run, CONFIG).close()
        assert json.loads((run / "config.json").read_text()) == FIELDS
    except UsageError:
        assert (run / "config.json").read_bytes() == data
    (run / "config.json").write_bytes(data)
    with contextlib.suppress(UsageError):
        assert type(own_batch(run)) is int


@fuzzed
@given(
    st.binary(max_size=200)
    | damaged(LOG)
    | st.lists(anything, max_size=5).map(lines)
    | st.lists(figures, max_size=6).map(lines)
    | st.integers(1, 20000).map(lambda n: b'{"images":' * n)
)
def test_logs(folder: Path, data: bytes):
    run = folder / "logged"
    run.mkdir(exist_ok=True)
    write(run / "config.json", json.dumps(FIELDS))
    opened = RunFolder(run, CONFIG)
    (run / METRICS).write_bytes(data)
    try:
        kept = [line for line in opened.read_log() if line["images"] <= 40]
        opened.rewind_log(40)
        after = opened.read_log()
        assert repr(after) == repr(kept)  # which has NaN equal NaN
        assert (run / METRICS).read_bytes().count(b"\n") == len(after)
        opened.log({"images": 44})
        collapse(opened.read_log(), "hinge")
    finally:
        opened.close()


def test_the_unharmed_load(folder: Path):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "000000020.safetensors").write_bytes(CHECKPOINT)
    assert load_checkpoint(folder / "checkpoints")
    (folder / "generator.safetensors").write_bytes(GENERATOR)
    assert load_generator(folder)[1] == CONFIG
    assert load_tensors(folder / "generator.safetensors", checked=True)[1]["images"] == 20
