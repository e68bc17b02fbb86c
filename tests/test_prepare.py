"""fastgan prepare: one file, the same bits however often it was killed, and a word on what is missing."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_cases import never, noise, pixels, put
from PIL import Image
from safetensors.torch import load_file

from fastgan import prepare, train
from fastgan.config import UsageError, make_config
from fastgan.data import load_images, stored
from fastgan.data.decode import Fit, decode
from fastgan.data.source import REASONS, Source

OUT = Path("out.safetensors")
PARTIAL = Path("out.safetensors.partial")


def run(*options: str) -> int:
    return prepare.main(["data", str(OUT), *options])


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run(*options) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgan: ") and err.count("\n") == 1
    return err


def test_a_prepared_set_is_the_set_and_is_mapped(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    for i in range(6):
        put(noise(40, 24, seed=i), data / "ab"[i % 2] / f"{i}.png")
    assert run("--resolution", "16", "--crop", "center", "--filter", "box") == 0
    out = capsys.readouterr().out
    assert "6 images of 16x16 pixels, RGB, 2 classes, crop center, filter box" in out
    assert "python -m fastgan.train --arch stylegan --data out.safetensors --resolution 16" in out
    assert not PARTIAL.exists()
    direct = load_images("data", 16, crop="center", filter="box")
    monkeypatch.setattr(stored, "decode", never)
    prepared = load_images(str(OUT), 16)
    assert torch.equal(prepared.images, direct.images) and prepared.classes == direct.classes
    assert prepared.labels is not None and prepared.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert prepared.filter == direct.filter == "box"
    assert prepared.images.is_contiguous(memory_format=torch.channels_last)
    tensors = load_file(OUT)  # for anyone else
    assert torch.equal(tensors["images"].permute(0, 3, 1, 2), direct.images)
    assert torch.equal(tensors["labels"], prepared.labels)


def test_a_prepared_set_is_resized_on_demand(data: Path):
    expected = put(noise(32), data / "a.png")
    assert run() == 0
    assert (pixels(load_images(str(OUT), 32)) == expected).all()
    small = Image.fromarray(expected).resize((16, 16), Image.Resampling.BICUBIC)
    got = load_images(str(OUT), 16, filter="bicubic")
    assert (pixels(got) == np.asarray(small)).all() and got.filter == "lanczos, then bicubic"
    assert (pixels(load_images(str(OUT), 32, 1))[..., 0] == np.asarray(noise(32).convert("L"))).all()


def test_digits_are_prepared(capsys: pytest.CaptureFixture[str], data: Path):
    assert prepare.main(["digits:test", str(OUT), "--resolution", "32", "--channels", "1"]) == 0
    assert "397 images of 32x32 pixels, L, 10 classes, crop none, filter bicubic" in capsys.readouterr().out
    ours, theirs = load_images(str(OUT), 32, 1), load_images("digits:test", 32, 1)
    assert torch.equal(ours.images, theirs.images) and ours.classes == theirs.classes
    assert ours.filter == theirs.filter == "bicubic"


def test_what_is_left_out_is_counted_by_reason(data: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(4):
        put(noise(16, seed=i), data / f"good{i}.png")
    put(noise(16), data / "again.png")
    put(noise(12), data / "small.png")
    for name in ("wide1.png", "wide2.png"):
        put(noise(32, 16), data / name)
    (data / "bad.png").write_text("no")
    (data / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert run("--resolution", "16", "--drop-copies") == 0
    out = capsys.readouterr().out
    for said in (
        "left out of 10: 2 unreadable, the first data/bad.png",
        "left out of 10: 2 not square (--crop center takes them), the first data/wide1.png",
        "1 too small (a lower --resolution or another --crop takes them), the first data/small.png",
        "left out of 10: 1 copies of others, the first data/good0.png",
    ):
        assert said in out
    assert len(load_images(str(OUT), 16)) == 4
    OUT.unlink()
    said = refused(capsys, "--strict")
    assert "data/bad.png cannot be decoded" in said and said.endswith("; remove it or leave out --strict\n")
    assert not PARTIAL.exists()  # once bad.png is mended, nothing could go on from it
    assert run("--resolution", "12", "--crop", "center") == 0
    assert "2 images are copies of others; --drop-copies" in capsys.readouterr().out


def test_classes_that_lose_all_images_are_named(data: Path, capsys: pytest.CaptureFixture[str]):
    put(noise(8), data / "cat" / "1.png")
    put(noise(16), data / "dog" / "1.png")
    assert run("--resolution", "16") == 0
    assert "no images of 1 class (cat)" in capsys.readouterr().out
    images = load_images(str(OUT), 16)
    assert images.classes == ("cat", "dog") and images.labels is not None and images.labels.tolist() == [1]
    assert load_file(OUT)["left_out_labels"].tolist() == [0]


def test_what_is_not_read_is_counted(data: Path, capsys: pytest.CaptureFixture[str]):
    put(noise(16, seed=1), data / "cat" / "1.png")
    put(noise(16, seed=2), data / "dog" / "1.png")
    put(noise(16), data / "dog" / "2.gif")
    (data / "fox" / ".hidden").mkdir(parents=True)
    (data / "dataset.json").write_text('{"labels": null}')
    shutil.make_archive("data", "zip", ".", "data")
    for source in ("data", "data.zip"):
        assert prepare.main([source, str(OUT)]) == 0
        first = f"{'data.zip/' * (source != 'data')}data/dog/2.gif"
        assert f"not read: 2 (other files, empty folders), the first {first}\n" in capsys.readouterr().out
        assert "data/fox/" in load_images(source, 16).others[1]
        OUT.unlink()


@pytest.mark.parametrize(
    ("side", "said"),
    [
        (16, "--arch stylegan --data 'my set.safetensors' --resolution 16"),
        (28, "--arch dcgan --data 'my set.safetensors' --resolution 28"),
        (42, "--arch stylegan --data 'my set.safetensors' --resolution 32"),
    ],
)
def test_the_command_that_is_printed_trains(
    data: Path, capsys: pytest.CaptureFixture[str], side: int, said: str
):
    put(noise(side), data / "a.png")
    assert prepare.main(["data", "my set.safetensors"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"train on it: python -m fastgan.train {said}\n")
    make_config(said.split()[1], resolution=int(said.split()[-1]))


def test_rgba_is_prepared_and_trains(data: Path, tmp_path: Path):
    picture = noise(8).convert("RGBA")
    picture.putalpha(Image.new("L", (8, 8), 0))
    picture.paste((10, 20, 30, 200), (0, 0, 4, 8))
    expected = np.asarray(picture).copy()
    expected[:, 4:] = 0  # what cannot be seen has no color
    put(picture, data / "a.png")
    put(noise(8, seed=1), data / "b.png")
    assert run("--channels", "4") == 0
    images = load_images(str(OUT), 8, 4)
    assert (pixels(images) == expected).all()
    assert (pixels(images, 1)[..., 3] == 255).all()
    options = "--arch dcgan --resolution 8 --channels 4 --z-dim 4 --ngf 4 --ndf 4 --batch 2 --kimg 0.004"
    command = [*options.split(), "--device", "cpu", "--data", str(OUT), "--run-dir", "run"]
    assert train.main(command) == 0
    with Image.open("run/reals.png") as reals:
        assert reals.mode == "RGBA"


# Killed and resumed


def seven(opened: Callable[[int], None] = lambda i: None) -> Source:
    """Seven pictures in two classes, of which the third is bad and the fifth a copy of the first."""

    def picture(i: int) -> Image.Image:
        opened(i)
        return noise(4 if i == 2 else 8, seed=i % 4)

    return Source("seven", 7, picture, str, "key", torch.tensor([0, 1, 0, 1, 1, 0, 1]), ("a", "b"))


def write(source: Source, seen: set[bytes] | None = None) -> None:
    stored.write_resumably(OUT, source, Fit(8), REASONS, set() if seen is None else seen, drop_copies=True)


@pytest.fixture
def undisturbed(data: Path) -> bytes:
    write(seven())
    whole = OUT.read_bytes()
    OUT.unlink()
    return whole


def test_however_it_is_killed_it_goes_on(undisturbed: bytes, monkeypatch: pytest.MonkeyPatch):
    """A copy of the file on the disk at some moment is what a kill at that moment would have left."""
    left: list[bytes] = []
    fsync = os.fsync

    def snapshot(descriptor: int) -> None:
        left.append(PARTIAL.read_bytes())
        fsync(descriptor)
        left.append(PARTIAL.read_bytes()[:-1] if len(left) == 3 else PARTIAL.read_bytes())

    with monkeypatch.context() as patched:
        patched.setattr(stored, "SAVE_EVERY", 0)
        patched.setattr(os, "fsync", snapshot)
        write(seven(lambda i: left.append(PARTIAL.read_bytes())))
    assert OUT.read_bytes() == undisturbed and not PARTIAL.exists()
    assert len(left) > 20
    starts = set()
    for file in [b"", b"\0", left[0][:40], *left]:
        OUT.unlink(missing_ok=True)
        PARTIAL.write_bytes(file)
        opened: list[int] = []
        seen: set[bytes] = set()
        write(seven(opened.append), seen)
        assert OUT.read_bytes() == undisturbed and not PARTIAL.exists()
        assert len(seen) == 4
        starts.add(min(opened, default=7))
    assert starts == set(range(8)), "it went on from every picture, and from the end"


def test_ctrl_c_before_anything_is_done(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "find", stopped)
    assert run() == 130
    assert capsys.readouterr().err == "\nfastgan: stopped\n" and not PARTIAL.exists()


def test_ctrl_c_keeps_what_is_done(undisturbed: bytes):
    def interrupt(i: int) -> None:
        if i == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(seven(interrupt))
    assert PARTIAL.exists() and not OUT.exists()
    opened: list[int] = []
    write(seven(opened.append))
    assert min(opened) == 5 and OUT.read_bytes() == undisturbed


def test_a_partial_file_of_something_else_is_not_continued(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stopping(source: Source, i: int, fit: Fit) -> np.ndarray:
        if i == 3:
            raise KeyboardInterrupt
        return decode(source, i, fit)

    for i in range(4):
        put(noise(16, seed=i), data / f"{i}.png")
    with monkeypatch.context() as patch:
        patch.setattr(stored, "decode", stopping)
        assert run() == 130
    assert f"the same command goes on from {PARTIAL}" in capsys.readouterr().err
    kept = PARTIAL.read_bytes()
    for options in (("--strict",), ("--filter", "box"), ("--channels", "1")):
        said = refused(capsys, *options)
        assert f"{PARTIAL} was begun with other images or options" in said and f"remove {PARTIAL}" in said
    with pytest.raises(Exception, match="eader"):
        load_file(PARTIAL)
    put(noise(16, seed=4), data / "3.png")
    assert "begun with other images" in refused(capsys)
    assert PARTIAL.read_bytes() == kept
    PARTIAL.unlink()
    assert run() == 0


def test_two_at_a_time_are_refused(undisturbed: bytes):
    def second(i: int) -> None:
        with pytest.raises(UsageError, match="is being written by a live process"):
            write(seven())

    write(seven(second))
    assert OUT.read_bytes() == undisturbed
    with pytest.raises(UsageError, match="exists; remove it"):
        write(seven())
    assert not PARTIAL.exists()


def test_a_disk_that_fills_up(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for i in range(40):
        put(noise(32, seed=i), data / f"{i:02}.png")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        said = refused(capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "out.safetensors cannot be written: File too large; the same command goes on from" in said
    assert PARTIAL.exists() and not OUT.exists()
    assert run() == 0
    assert not PARTIAL.exists() and len(load_images(str(OUT), 32)) == 40
    OUT.unlink()
    monkeypatch.setattr(prepare, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    assert "may take 0.00 GiB, but 0.00 GiB are free in .;" in refused(capsys)
    assert not PARTIAL.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resolution", "4"], "--resolution 4 is too small"),
        (["--resolution", "0"], "--resolution 0 is too small"),
        (["--crop", "round"], "--crop round is unknown; use none, center, center:SIDE or wide"),
        (["--crop", "center:0"], "--crop center:0 is unknown"),
        (
            ["--crop", "center:400"],
            "no image of data fits; one reason: data/a.png is 16x16, too small for --crop",
        ),
        (["--resolution", "64"], "no image of data fits: left out of 1: 1 too small"),
        (["--image-key", "x"], "--image-key does not apply to data, only to hf:NAME"),
    ],
)
def test_bad_options(data: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str):
    put(noise(16), data / "a.png")
    assert words in refused(capsys, *options)
    assert not OUT.exists() and not PARTIAL.exists()


def test_bad_outputs(data: Path, capsys: pytest.CaptureFixture[str]):
    put(noise(16), data / "a.png")
    for out, words in (
        ("out.npz", "must end in .safetensors"),
        ("data/a.png/x.safetensors", "cannot be written"),
    ):
        assert prepare.main(["data", out]) == 2
        assert words in capsys.readouterr().err
    OUT.write_text("mine")
    assert "out.safetensors exists; remove it" in refused(capsys)
    assert OUT.read_text() == "mine"


@pytest.mark.exhaustive
def test_a_process_that_is_killed_goes_on(data: Path):
    for i in range(800):
        put(noise(64, seed=i), data / f"{i:04}.png")
    assert run("--resolution", "16") == 0
    whole = OUT.read_bytes()
    OUT.unlink()
    command = [sys.executable, "-m", "fastgan.prepare", "data", str(OUT), "--resolution", "16"]
    root = str(Path(prepare.__file__).parents[1])
    code = "from fastgan import prepare; from fastgan.data import stored; stored.SAVE_EVERY = 0.01; "
    code += "raise SystemExit(prepare.main())"
    kills = 0
    for delay in (0.02, 0.1, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command[3:]], env={**os.environ, "PYTHONPATH": root}
        )
        while process.poll() is None and not PARTIAL.exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills, "every process ended before it was killed"
    assert run("--resolution", "16") == 0
    assert OUT.read_bytes() == whole
