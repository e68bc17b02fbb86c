"""Runs as a user starts them: files, exact resume, signals, generation, and every error's single line."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch._inductor import config as inductor

from fastgan import __main__, compiled, export, generate, precompile, train
from fastgan.checkpoint import checkpoints, load_tensors
from fastgan.config import PRESETS, Config, UsageError, build_networks, make_config
from fastgan.engine import Engine
from fastgan.images import grid, to_uint8

TINY = {
    "stylegan": "--arch stylegan --z-dim 6 --w-dim 6 --channel-base 64 --channel-max 8 --mbstd-group 2 "
    "--r1-every 3",
    "dcgan": "--arch dcgan --z-dim 6 --ngf 4 --ndf 4 --dropout 0.1 --g-lr 0.002",
}
SMALL = "--resolution 8 --batch 4 --precision fp32 --device cpu --tick-kimg 0.02 --checkpoint-kimg 1"


def run(arch: str, run_dir: Path, images: int, *more: str) -> int:
    options = [*TINY[arch].split(), *SMALL.split(), "--kimg", str(images / 1000), *more]
    return train.main([*options, "--run-dir", str(run_dir)])


def newest(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_tensors(checkpoints(run_dir / "checkpoints")[-1])[0]


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = newest(a), newest(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (a / "generator.safetensors").read_bytes() == (b / "generator.safetensors").read_bytes()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    assert run("stylegan", tmp_path / "run", 40) == 0
    return tmp_path / "run"


def test_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    finished = tmp_path / "a run"
    assert run("stylegan", finished, 40) == 0
    names = {p.name for p in finished.iterdir()}
    assert names == {
        *(".lock", "config.json", "metrics.jsonl", "samples", "reals.png", "losses.png"),
        *("checkpoints", "generator.safetensors", "sessions.jsonl", "report.html"),
    }
    config = json.loads((finished / "config.json").read_text())
    assert Config(**config).resolution == 8
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [20, 40]
    wanted = {
        "images",
        "seconds",
        "cpu_seconds",
        "images_per_second",
        "memory_mib",
        "loss_d",
        "loss_g",
        "r1",
        "path_length",
    }
    assert wanted <= lines[0].keys()
    assert all(isinstance(v, int | float) for line in lines for v in line.values())
    assert sorted(p.name for p in (finished / "samples").iterdir()) == ["000000020.png", "000000040.png"]
    with Image.open(finished / "samples" / "000000040.png") as image:
        assert image.size == (64, 64)
    with Image.open(finished / "reals.png") as image:
        assert np.asarray(image).std() > 20
    with Image.open(finished / "losses.png") as image:
        assert np.asarray(image).std() > 5
    with safe_open(finished / "generator.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["fastgan"])
    assert len(header.pop("checksum")) == 32
    assert header == {"config": config, "images": 40}
    out = capsys.readouterr().out
    more = f"python -m fastgan.generate --run '{finished}' --count"
    for said in ("images/s", "s/kimg", str(finished / "samples"), more, "left"):
        assert said in out


def test_default_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY["dcgan"].split(), *SMALL.split(), "--kimg", "0.004"]
    assert train.main(options) == 0
    assert train.main(options) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["00000-dcgan-digits", "00001-dcgan-digits"]


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_resume_is_exact(arch: str, compile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """2N images at once, or N, stop, N more; a rare phase changes from eager to compiled on the way."""
    monkeypatch.setattr(compiled, "EAGER_RUNS_OF_A_RARE_PHASE", 3)
    monkeypatch.setattr(precompile, "start", lambda config: None)  # has its own test
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(arch, whole, 72, compile) == 0
    assert run(arch, parts, 36, compile) == 0
    assert run(arch, parts, 72, compile) == 0
    assert_same_run(whole, parts)
    logs = [[json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, parts)]
    assert logs[0][-1]["loss_d"] == logs[1][-1]["loss_d"]


def test_a_second_process_compiles_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options: dict[str, Any] = dict(resolution=8, batch=4, z_dim=6, ngf=4, ndf=4, r1=0.0)
    options |= dict(device="cpu", precision="fp32")
    assert precompile.start(make_config("dcgan", **options)) is None
    helper = precompile.start(make_config("dcgan", **options, compile=True))
    assert helper is not None
    assert helper.wait() == 0
    graphs = [p for p in tmp_path.rglob("*") if p.is_file() and "fxgraph" in str(p)]
    assert graphs
    command = [*TINY["dcgan"].split(), *SMALL.split(), "--kimg", "0.004", "--run-dir", str(tmp_path / "run")]
    trained = subprocess.run(
        [sys.executable, "-m", "fastgan.train", *command, "--dropout", "0", "--r1", "0", "--compile"],
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    assert "compiled G" in trained.stdout
    after = {p for p in tmp_path.rglob("*") if p.is_file() and "fxgraph" in str(p)}
    assert len(after) == 2 * len(graphs)  # D's came, G's was there


def test_different_seeds_differ(tmp_path: Path):
    assert run("stylegan", tmp_path / "a", 8, "--seed", "1") == 0
    assert run("stylegan", tmp_path / "b", 8, "--seed", "2") == 0
    a, b = newest(tmp_path / "a"), newest(tmp_path / "b")
    assert not torch.equal(a["G.synthesis.b4.const"], b["G.synthesis.b4.const"])


def test_a_log_cut_off_by_a_crash_is_rewound(finished: Path):
    log = finished / "metrics.jsonl"
    log.write_text(log.read_text() + '{"images": 60, "loss_d": 1}\n{"imag')
    assert run("stylegan", finished, 80) == 0
    images = [json.loads(line)["images"] for line in log.read_text().splitlines()]
    assert images == [20, 40, 60, 80]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_resume(number: int, code: int, tmp_path: Path):
    options = [*TINY["stylegan"].split(), *SMALL.split(), "--kimg", "1000"]
    command = [sys.executable, "-m", "fastgan.train", *options, "--run-dir", str(tmp_path / "a run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    while "kimg" not in (line := process.stdout.readline()):
        assert line, "the run ended before its first tick"
    process.send_signal(number)
    assert f"--run-dir '{tmp_path / 'a run'}' resumes" in process.communicate(timeout=60)[0]
    assert process.returncode == code
    images = int(checkpoints(tmp_path / "a run" / "checkpoints")[-1].stem)
    assert images % 4 == 0
    assert run("stylegan", tmp_path / "a run", images + 8) == 0
    assert run("stylegan", tmp_path / "whole", images + 8) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "a run")


def test_old_checkpoints_go(tmp_path: Path):
    assert run("stylegan", tmp_path / "run", 40, "--checkpoint-kimg", "0.008", "--keep", "3") == 0
    assert [p.stem for p in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "000000024",
        "000000032",
        "000000040",
    ]


def test_the_console_command(finished: Path, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "fastgan",
        "generate",
        "--run",
        str(finished),
        "--out",
        str(tmp_path / "o"),
    ]
    assert subprocess.run([*command, "--count", "2"], capture_output=True).returncode == 0
    unknown = subprocess.run([sys.executable, "-m", "fastgan", "sing"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "sing" in unknown.stderr and "train" in unknown.stderr and len(unknown.stderr.splitlines()) == 1


def test_every_command_is_listed_and_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fastgan(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgan", *argv])
        try:
            code = __main__.main()
        except SystemExit as end:  # argparse's, after --help
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    code, listed, err = fastgan("--help")
    assert code == 0 and not err
    assert fastgan() == (2, "", listed)
    for name in [line.split()[0] for line in listed.splitlines()[2:]]:
        code, out, _ = fastgan(name, "--help")
        assert code == 0 and f"fastgan {name}" in out
        assert "(default: )" not in " ".join(out.split())
    files = Path(train.__file__).parent.glob("*.py")
    assert set(__main__.COMMANDS) == {file.stem for file in files if "cli.Parser(" in file.read_text()}


def folder_of_images(path: Path, *sizes: tuple[int, int]) -> Path:
    path.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 0, 0)).save(path / f"{i}.png")
    return path


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--arch stylgan", ["stylgan", "did you mean stylegan?"]),
        ("--arch stylegan --resolution 48", ["48", "power of two"]),
        ("--arch dcgan --resolution 30", ["30", "4 or 7 times"]),
        ("--arch dcgan --mapping-layers 3", ["--mapping-layers", "dcgan"]),
        ("--arch stylegan --data nowhere", ["nowhere"]),
        ("--arch stylegan --batch 6 --mbstd-group 4", ["--batch 6", "--mbstd-group 2"]),
        ("--arch stylegan --batch none", ["--batch", "none"]),
        ("--arch stylegan --crop round", ["--crop", "round", "center"]),
        ("--arch stylegan --kimg 0", ["--kimg", "0"]),
        ("--arch dcgan --ngf 0", ["--ngf", "0"]),
        ("--arch stylegan --device tpu", ["--device", "tpu"]),
        ("--arch stylegan --frobnicate 1", ["--frobnicate"]),
    ],
)
def test_bad_options(options: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train.main([*options.split(), "--run-dir", str(tmp_path / "run")]) == 2
    assert_one_line(capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_compiler_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained, out = str(finished), tmp_path / "out"
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert run("dcgan", out, 8, "--compile") == 2
        assert_one_line(capsys, "--compile on a CPU needs a C++ compiler", "g++")
        assert generate.main(["--run", trained, "--compile", "--out", str(out)]) == 2
        assert_one_line(capsys, "--compile on a CPU needs a C++ compiler", "g++")
        assert export.main([trained, f"{out}.pt2"]) == 2
        assert_one_line(capsys, "a .pt2 needs a C++ compiler", "g++")


def test_cuda_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("stylegan", tmp_path / "run", 8, "--device", "cuda") == 2
    assert_one_line(capsys, "--device cuda", "--device cpu")


@pytest.mark.parametrize(
    ("variable", "given", "advice"),
    [
        ("PYTORCH_ALLOC_CONF", "", "or set PYTORCH_ALLOC_CONF=expandable_segments:True, which"),
        (
            "PYTORCH_CUDA_ALLOC_CONF",
            "max_split_size_mb:512",
            "or set PYTORCH_ALLOC_CONF=max_split_size_mb:512,expandable_segments:True, which",
        ),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", None),
    ],
)
def test_memory_that_runs_out_is_one_line(
    variable: str,
    given: str,
    advice: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def step(engine: Engine, *batch: torch.Tensor | None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line.")

    whole = Engine.step
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, given)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 29)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 31)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 32, 1 << 32))
    config, cuda = make_config("dcgan", resolution=64, batch=4096), torch.device("cuda")
    line = train.out_of_memory(train.memory_held(cuda), config, cuda)
    said, _, rest = line.partition(", which should fit (estimate; --batch auto tries)")
    start, batch = said.rsplit(" ", 1)
    assert start == "out of memory on cuda: 1.50 GiB allocated of 2.00 GiB reserved; use --batch"
    assert 100 < int(batch) < 4096
    assert rest.startswith(f" {advice}" if advice else "") and ("expandable" in rest) == (advice is not None)
    monkeypatch.setattr(Engine, "step", step)
    assert run("dcgan", tmp_path / "run", 8) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgan: out of memory on cpu at ") and err.count("\n") == 1
    assert "use --batch 3, which" in err
    monkeypatch.setattr(Engine, "step", whole)
    assert run("dcgan", tmp_path / "run", 8) == 0, "the folder is free again"


def test_bad_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def attempt(data: Path, *more: str) -> int:
        return run("stylegan", tmp_path / "run", 4, "--data", str(data), *more)

    (tmp_path / "empty").mkdir()
    assert attempt(tmp_path / "empty") == 2
    assert_one_line(capsys, "empty")
    assert attempt(folder_of_images(tmp_path / "small", (8, 8), (7, 7))) == 2
    assert_one_line(capsys, "1.png", "7x7", "--resolution")
    assert attempt(folder_of_images(tmp_path / "wide", (12, 8))) == 2
    assert_one_line(capsys, "0.png", "12x8", "--crop center")
    assert attempt(tmp_path / "wide", "--crop", "center") == 0
    broken = folder_of_images(tmp_path / "broken", (8, 8), (9, 9))
    (broken / "bad.png").write_text("no image")
    capsys.readouterr()
    assert attempt(broken, "--run-dir", str(tmp_path / "other")) == 2
    assert_one_line(capsys, "bad.png", "--skip-bad")
    assert run("stylegan", tmp_path / "skipped", 4, "--data", str(broken), "--skip-bad") == 0
    assert "1 files left out" in capsys.readouterr().out


def test_a_changed_config_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert run("stylegan", finished, 80, "--g-lr", "0.1", "--seed", "7") == 2
    assert_one_line(capsys, "--g-lr", "--seed", "another folder")
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert run("stylegan", finished, 60, "--tick-kimg", "0.01", "--keep", "1") == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = folder_of_images(tmp_path / "photos", (8, 8))
    assert run("stylegan", folder, 8) == 2
    assert_one_line(capsys, "photos", "0.png", "not a run")


def test_a_run_in_use_is_refused_and_a_dead_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [*TINY["dcgan"].split(), *SMALL.split(), "--kimg", "1000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgan.train", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert run("dcgan", tmp_path / "run", 1_000_000) == 2
        assert_one_line(capsys, str(tmp_path / "run"), "live process")
    finally:
        process.kill()
        process.communicate()
    assert run("dcgan", tmp_path / "run", 8) == 0  # SIGKILL left a lock file, but nobody holds it


def test_presets_are_whole():
    for arch in PRESETS:
        config = make_config(arch)
        assert dataclasses.replace(config, kimg=0.001).images == config.batch * config.d_steps
    paper = make_config(
        "stylegan", resolution=64, channel_base=16384, channel_max=512, mapping_layers=8, batch=8
    )
    example = make_config("dcgan", resolution=64, z_dim=100, ngf=64, ndf=64)
    with torch.device("meta"):
        sizes = [
            [sum(p.numel() for p in net.parameters()) for net in build_networks(c)] for c in (paper, example)
        ]
    assert sizes == [[23_819_544, 23_407_361], [3_576_704, 2_765_568]]
    with pytest.raises(UsageError, match="r1"):
        make_config("dcgan", r1=-1.0)


def test_grids():
    images = to_uint8(torch.linspace(-1.2, 1.2, 5).reshape(5, 1, 1, 1).expand(5, 3, 2, 4))
    assert images[:, 0, 0, 0].tolist() == [0, 51, 128, 204, 255]
    sheet = grid(images)
    assert sheet.shape == (4, 12, 3)
    assert sheet[0, 4, 0] == 51
    assert sheet[2, 11, 0] == 0  # an empty place


def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(tmp_path: Path):
    options = [*TINY["dcgan"].split(), *SMALL.split(), "--kimg", "0.04", "--run-dir", str(tmp_path / "run")]
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgan.train", *options], stdout=follower, stderr=follower, close_fds=True
    )
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the terminal is gone with the process
            break
        shown += piece
    assert process.wait() == 0
    os.close(leader)
    text = shown.decode()
    assert "100%" in text
    assert "img/s" in text
    assert "pictures:" in text
