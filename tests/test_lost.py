"""Nothing lost: damaged files, full disks, numbers that are not finite, collapse, memory, locks and kills."""

import errno
import fcntl
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import SMALL, TINY, assert_one_line, assert_same_run, newest, run

from fastgan import engine, fit, train
from fastgan.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from fastgan.config import UsageError, make_config
from fastgan.engine import Engine
from fastgan.health import NEVER, SPAN, Watch, all_finite, collapse
from fastgan.limit import random_step
from fastgan.run_folder import RunFolder
from fastgan.step import PhaseResult

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, undisturbed."""
    path = tmp_path_factory.mktemp("whole")
    assert run("dcgan", path, 40) == 0
    return path


@pytest.fixture(scope="module")
def first_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first")
    assert run("dcgan", path, 16) == run("dcgan", path, 20) == 0
    return path


@pytest.fixture
def half(first_half: Path, tmp_path: Path) -> Path:
    """The first 20 of them, with checkpoints of 16 and 20."""
    return shutil.copytree(first_half, tmp_path / "half")


def test_checksums(tmp_path: Path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int64)}
    file = tmp_path / "x.safetensors"
    save_tensors(file, tensors, images=3, note='checksum": "0')
    read, metadata = load_tensors(file, checked=True)
    assert metadata == {"images": 3, "note": 'checksum": "0'}
    assert all(torch.equal(read[name], t) for name, t in tensors.items())
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"x\.safetensors is no intact"):
            load_tensors(file, checked=True)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, half: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    before, last = checkpoints(half / "checkpoints")
    if damage == "flipped":
        flip(last)
    elif damage == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-9] if damage == "truncated" else b"")
    capsys.readouterr()
    assert run("dcgan", half, 40) == 0
    out = capsys.readouterr().out
    if damage != "missing":
        assert f"warning: {last} is no intact safetensors file" in out
        assert f"going on from {before.name}" in out
        assert last.with_suffix(".damaged").exists()
    assert_same_run(half, whole)


def test_no_checkpoint_is_intact(half: Path, capsys: pytest.CaptureFixture[str]):
    for file in checkpoints(half / "checkpoints"):
        flip(file)
    before = sorted(half.rglob("*"))
    capsys.readouterr()
    assert run("dcgan", half, 40) == 2
    assert_one_line(capsys, "no checkpoint is intact", "000000020.safetensors", "--run-dir")
    assert sorted(half.rglob("*")) == before


def test_what_a_killed_writer_left_is_cleared_and_the_generator_follows_the_checkpoint(half: Path):
    generator = (half / "generator.safetensors").read_bytes()
    checkpoint = checkpoints(half / "checkpoints")[-1]
    assert run("dcgan", half, 24) == 0  # no checkpoint but the last
    left = [half / ".config.json.x1.tmp", half / "checkpoints" / ".000000028.safetensors.x2.tmp"]
    for file in left:
        file.write_text("half a file")
    checkpoints(half / "checkpoints")[-1].unlink()  # as if the kill had come before its renaming ...
    assert checkpoints(half / "checkpoints") == [checkpoint]
    assert run("dcgan", half, 20) == 0
    assert not any(file.exists() for file in left)
    ours, theirs = load_tensors(half / "generator.safetensors"), newest(half)
    assert ours[1]["images"] == 20
    assert all(torch.equal(t, theirs[f"ema.{name}"]) for name, t in ours[0].items())
    assert len(generator) == (half / "generator.safetensors").stat().st_size


def test_a_folder_whose_first_run_was_killed_before_its_config(tmp_path: Path):
    """The config is the first file to be written, so this is all that can be there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.abc.tmp").touch()
    assert run("dcgan", tmp_path / "run", 4) == 0


@pytest.mark.parametrize("limit", ["checkpoint", "log"])
def test_a_full_disk(limit: str, half: Path, whole: Path, capsys: pytest.CaptureFixture[str]):
    size = checkpoints(half / "checkpoints")[-1].stat().st_size - 1
    if limit == "log":  # which grows with each tick
        size = max((half / "config.json").stat().st_size, (half / "metrics.jsonl").stat().st_size + 100)
    before = newest(half)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code = run("dcgan", half, 40, "--checkpoint-kimg", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert_one_line(capsys, "File too large", "the checkpoint of 20 images is intact", "Make room", str(half))
    after = newest(half)
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert run("dcgan", half, 40) == 0
    assert_same_run(half, whole)


def test_the_watch_remembers_the_first(monkeypatch: pytest.MonkeyPatch):
    watch = Watch(CPU)
    values = torch.tensor([-0.0, 1e-40, 3e38, -2.5])
    for number in range(10, 10 + 3 * SPAN):
        bad = number in (10 + SPAN + 7, 10 + SPAN + 9, 10 + 2 * SPAN + 1)
        watch.see(number, [values, torch.tensor(torch.inf if bad else 1.0)])
    assert values.tolist() == torch.tensor([-0.0, 1e-40, 3e38, -2.5]).tolist()
    assert watch.first() == 10 + SPAN + 7
    watch.forget()
    assert watch.first() is None
    assert int(watch.earliest) == NEVER
    assert all_finite([torch.ones(2), torch.ones(2, dtype=torch.float64)])
    assert not all_finite([torch.ones(2), torch.tensor([1.0, torch.nan], dtype=torch.float64)])


def plant(monkeypatch: pytest.MonkeyPatch, phase: str, images: int, retries: int = 0) -> None:
    """One NaN in a gradient of `phase` at the step after `images`, until there were more than `retries`."""
    step, original = Engine.step, getattr(engine, phase)
    now: list[Engine] = []

    def stepping(self: Engine, *batch: torch.Tensor) -> None:
        now[:] = [self]
        step(self, *batch)

    def planted(*args, **options) -> PhaseResult:
        result = original(*args, **options)
        if now[0].images == images and now[0].retries <= retries:
            result.grads[0][0] = torch.nan
        return result

    monkeypatch.setattr(Engine, "step", stepping)
    monkeypatch.setattr(engine, phase, planted)


@pytest.mark.parametrize(("phase", "network"), [("d_phase", "D"), ("g_phase", "G")])
def test_a_nan_goes_back_to_the_last_checkpoint(
    phase: str,
    network: str,
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    once = tmp_path / "once"
    shutil.copytree(half, once)
    plant(monkeypatch, phase, 32, retries=1)
    capsys.readouterr()
    assert run("dcgan", half, 60, "--checkpoint-kimg", "0.02") == 0
    out = capsys.readouterr().out
    assert out.count(f"warning: {network}'s gradients or losses are not finite") == 2
    assert "step 8, 32 images): went back from 40 to 20 images, to go on with other noise (2 of 3)" in out
    lines = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 20, 40, 60]
    assert lines[2]["warning"].count("not finite") == 2
    assert "warning" not in lines[3]
    state = newest(half)
    assert all(torch.isfinite(t).all() for t in state.values())
    assert state["retries"] == 0  # there is a new checkpoint
    monkeypatch.undo()

    # A run that is killed after going back, and resumed, is this run.
    loaded = load_checkpoint(once / "checkpoints")
    assert loaded
    loaded[0]["retries"].fill_(2)
    save_checkpoint(once / "checkpoints", *loaded, keep=2)
    assert run("dcgan", once, 36, "--checkpoint-kimg", "0.02") == 0  # stopped before the next checkpoint
    assert run("dcgan", once, 60, "--checkpoint-kimg", "0.02") == 0
    assert_same_run(half, once)


def test_a_run_that_never_recovers_stops_with_a_diagnosis(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plant(monkeypatch, "d_phase", 28, retries=9)
    assert run("dcgan", half, 40) == 2
    err = capsys.readouterr().err
    for word in (
        "phase D",
        "step 7, 28 images",
        "3 other draws of noise",
        "000000020.safetensors",
        "--d-lr 0.0",
    ):
        assert word in err
    assert err.count("\n") == 1
    state = newest(half)
    assert all(torch.isfinite(t).all() for t in state.values())
    assert state["retries"] == 3
    # Who looks at the report alone is told as well.
    lines = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 28 and "3 other draws" in lines[-1]["warning"]
    assert "0.028 kimg: stopped: D&#x27;s gradients" in (half / "report.html").read_text()
    assert run("dcgan", half, 40) == 2  # and again, at once
    assert "other draws" in capsys.readouterr().err
    assert (half / "metrics.jsonl").read_text().count("stopped") == 1
    monkeypatch.undo()
    assert run("dcgan", half, 40) == 0  # once it is mended
    assert "stopped" not in (half / "metrics.jsonl").read_text()


def test_on_nan_stop(half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    plant(monkeypatch, "g_phase", 28)
    before = [p.read_bytes() for p in checkpoints(half / "checkpoints")]
    assert run("dcgan", half, 40, "--on-nan", "stop") == 2
    assert_one_line(capsys, "G's gradients", "phase G", "step 7", "--g-lr")
    assert [p.read_bytes() for p in checkpoints(half / "checkpoints")] == before


@pytest.mark.parametrize("arch", ["dcgan", "stylegan"])
def test_a_learning_rate_out_of_this_world(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(arch, tmp_path / "run", 40, "--g-lr", "1e30") == 2
    captured = capsys.readouterr()
    assert "went back from 20 to 0 images" in captured.out
    assert "also with 3 other draws of noise from the start, with --g-lr 1e+30" in captured.err
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_restarting_is_starting():
    config = make_config(
        "dcgan", resolution=8, batch=4, ngf=4, ndf=4, device="cpu", precision="fp32", ada=0.6
    )
    one, other = Engine(config, CPU), Engine(config, CPU)
    batch = random_step(config, CPU)
    for _ in range(6):
        one.step(*batch)
    one.restart()
    for machine in (one, other):
        machine.step(*batch)
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    one.restart()
    one.retries = 1  # which is other noise
    one.step(*batch)
    assert not torch.equal(one.state()["losses.loss_d"], theirs["losses.loss_d"])


def test_collapse():
    fine = {"spread": 0.5, "loss_d": 0.9, "real_score": 1.0, "fake_score": -1.0}
    alike, certain = fine | {"spread": 0.001}, fine | {"loss_d": 0.001, "real_score": 9.0}
    assert collapse([fine] * 9, "hinge") is None
    assert collapse([alike] * 4, "hinge") is None
    assert collapse([alike, alike, fine, alike, alike], "hinge") is None
    assert "G has collapsed" in (collapse([fine] + [alike] * 5, "hinge") or "")
    assert "D is saturated" in (collapse([certain] * 5, "hinge") or "")
    assert collapse([certain] * 5, "wasserstein") is None


def test_collapse_is_warned_of(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(train, "sample_images", lambda *_: np.full((64, 8, 8, 3), 7, np.uint8))
    assert run("dcgan", tmp_path / "run", 120) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["warning" in line for line in lines] == [False] * 4 + [True] * 2
    assert lines[4]["spread"] == 0
    assert capsys.readouterr().out.count("warning: G has collapsed") == 2


def test_memory_of_a_cpu_that_runs_out(tmp_path: Path):
    options = "--arch dcgan --resolution 16 --batch 1048576 --precision fp32 --device cpu --kimg 4"
    command = [sys.executable, "-m", "fastgan.train", *options.split(), "--run-dir", str(tmp_path / "run")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fastgan: out of memory on cpu at ")
    assert done.stderr.count("\n") == 1
    batch = int(done.stderr.split("use --batch ")[1].split(",")[0])
    assert 0 < batch < 1048576


def test_bisection():
    for true in (*range(0, 40), 57, 100, 1000):
        for guess in (1, 8, 50, 5000):
            asked: list[int] = []

            def fits(batch: int, true: int = true, asked: list[int] = asked) -> bool:
                asked.append(batch)
                return batch <= true

            found = fit.bisect(fits, 4, guess, 600)
            assert found % 4 == 0
            assert found <= true
            best = min(true, 600) // 4 * 4
            assert found >= best - max(4, best // 8 + 4)
            assert len(asked) == len(set(asked)) <= 20


def test_batch_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    real, probes = fit._fits, []

    def fits(config, bytes: int) -> bool:  # two real steps, of which one has no room
        probes.append(config.batch)
        if len(probes) == 1:
            assert not real(config, 1 << 28)
        if len(probes) == 2:
            assert real(config, bytes)
        return config.batch <= 12

    monkeypatch.setattr(fit, "_fits", fits)
    options = [*TINY["stylegan"].split(), *SMALL.split(), "--kimg", "0.01", "--batch", "auto"]
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0
    assert "--batch auto: 12" in capsys.readouterr().out
    count = len(probes)
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0  # takes the number found
    assert len(probes) == count
    monkeypatch.setattr(fit, "_fits", lambda config, bytes: False)
    assert train.main([*options, "--run-dir", str(tmp_path / "other")]) == 2
    assert_one_line(capsys, "--batch auto", "not even a batch of 2")
    assert train.main([*options, "--batch", "many"]) == 2
    assert_one_line(capsys, "--batch", "many")


def test_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_config("gan")
    (tmp_path / ".lock").write_text(
        "process 1 on another-host\n"
    )  # of a machine that is gone: nobody holds it
    folder = RunFolder(tmp_path, config)
    assert "another-host" not in (tmp_path / ".lock").read_text()
    with pytest.raises(UsageError, match=r"in use by a live process \(process \d+ on "):
        RunFolder(tmp_path, config)
    folder.close()

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match="in use by a live process"):
        RunFolder(tmp_path, config)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    RunFolder(tmp_path, config).close()

    def unable(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    with pytest.raises(UsageError, match="cannot lock"):
        RunFolder(tmp_path, config)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(99)
"""


@pytest.mark.exhaustive
def test_kills():
    done = subprocess.run(
        [sys.executable, "-m", "bench.kills", "--kills", "20"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills and resumes" in done.stdout
