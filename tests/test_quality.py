"""The judges of generated digits: real ones pass; noise, grayness, repetition and wrong classes do not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bench import families, judge, quality
from fastgan import train
from fastgan.config import build_generator
from fastgan.data import load_images
from fastgan.run_folder import save_generator


def real(subset: str = "", side: int = 16) -> tuple[np.ndarray, Tensor]:
    """Digits as a GAN sees them, uint8 [N, side, side, 1], and labels."""
    digits = load_images(f"digits:{subset}" if subset else "digits", side, channels=1)
    assert digits.labels is not None
    return judge.as_arrays(digits.images), digits.labels


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Classifiers of generated images that learn for a short while; that of real ones is the full one."""
    judge.classifier()
    judge.reader.cache_clear()
    monkeypatch.setattr(judge, "EPOCHS", 8)
    yield
    judge.reader.cache_clear()


# What is judged by


def test_the_classifier_is_strong_and_there_once():
    assert judge.accuracy(judge.classifier(), *judge.real_digits("test")) >= 0.98
    assert judge.classifier() is judge.classifier()


def test_training_a_classifier_draws_nothing_from_outside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge, "EPOCHS", 1)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    images, labels = judge.real_digits("test")
    a = judge.train_classifier(images, labels)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    b = judge.train_classifier(images, labels)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("side", [8, 16, 28])
def test_images_shrink_by_area(side: int):
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    got = judge.shrink(images)
    assert got.shape == (2, 8, 8)
    fine = (
        images.mean(axis=3).repeat(2, axis=1).repeat(2, axis=2)
    )  # twice each of these sides is a multiple of 8
    want = fine.reshape(2, 8, side // 4, 8, side // 4).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(got, want, atol=1e-6)


# Figures


def test_judge():
    images, labels = real()
    good = judge.judge(images)
    assert good["accepted"] > 0.95
    assert good["entropy"] > 2.29
    assert 0.8 < good["spread"] < 0.9
    assert abs(good["frechet"]) < 1e-5
    assert judge.judge(real("test")[0])["frechet"] < 15
    noise = judge.judge(np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8))
    assert noise["accepted"] < 0.7 or noise["entropy"] < 2
    assert noise["frechet"] > 100
    one_each = np.stack([images[labels == k][0] for k in range(10)]).repeat(30, axis=0)
    assert judge.judge(one_each)["spread"] < 0.05
    assert judge.judge(images[:20, ::4, ::4])["accepted"] < 0.8  # coarser than the digits, and still judged
    zeros = judge.judge(images[labels == 0])
    assert zeros["entropy"] < 0.2 and zeros["frechet"] > 50


def test_asked_class():
    images, labels = real("test")
    assert judge.asked_class(images, labels) > 0.97
    assert judge.asked_class(images, (labels + 1) % 10) < 0.05


@pytest.mark.usefixtures("quick")
def test_tstr():
    images, labels = real("train")
    assert judge.tstr(images, labels) > 0.95
    assert judge.tstr(images, (labels + 1) % 10) < 0.05


@pytest.mark.usefixtures("quick")
def test_pairs(capsys: pytest.CaptureFixture):
    images, _ = real("test")
    read = judge.reader("digits:inverted", 16, 1)
    assert judge.same_digit(images, 255 - images, read) == 1
    assert judge.same_digit(images, 255 - np.roll(images, 1, axis=0), read) < 0.2
    assert judge.same_digit(images, images, read) < 0.5
    read = judge.reader("digits:train", 16, 1)  # as of any set that is not inverted, a classifier is trained
    assert judge.same_digit(images, images, read) > 0.93
    assert judge.same_digit(images, np.roll(images, 1, axis=0), read) < 0.2
    assert judge.reader("digits:train", 16, 1) is read
    assert capsys.readouterr().out.count("classifier of digits:train") == 1


def test_there_and_back():
    images, labels = real("test")
    read = judge.reader("digits:inverted", 16, 1)
    wrong = np.roll(images, 1, axis=0)
    assert judge.kept_class(255 - images, images, labels, read) > 0.97
    assert judge.kept_class(images, images, labels, read) < 0.5
    assert judge.kept_class(255 - wrong, images, labels, read) < 0.2
    assert judge.kept_class(255 - images, wrong, labels, read) < 0.2


# Generators that need no training


class Draws(nn.Module):
    """Real digits, drawn by z; with classes, of class c + `shift`."""

    z_dim = 2

    def __init__(self, shift: int = 0):
        super().__init__()
        images, self.labels = real("train")
        self.images = nn.Parameter(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
        self.shift = shift

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        at = (z[:, 0] * 1e4).long()
        if c is None:
            return self.images[at % len(self.images)]
        wanted = (c.argmax(dim=1) + self.shift) % 10
        of_class = [(self.labels == k).nonzero()[:, 0] for k in range(10)]
        return self.images[
            [int(of_class[k][i % 100]) for k, i in zip(wanted.tolist(), at.tolist(), strict=True)]
        ]


class Pairs(Draws):
    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        digits = super().forward(z)
        return torch.cat([digits, -digits.roll(self.shift, dims=0)], dim=1)


class Inverts(Draws):
    def translate(self, images: Tensor, to: str) -> Tensor:
        return images * (-1 if self.shift == 0 or to == "a" else 1)


def config(**fields: Any) -> Any:
    """The fields that a judge reads."""
    plain = {"data": "digits", "data_b": "", "classes": 0, "resolution": 16, "channels": 1}
    return type("Config", (), plain | fields)


def test_an_unconditional_generator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "JUDGED", 300)
    figures = families.judge_generator(Draws(), config())
    assert figures.keys() == {"accepted", "entropy", "spread", "frechet"}
    assert figures["accepted"] > 0.95 and figures["entropy"] > 2.2
    (strip,) = families.strips(Draws(), config(), 20)
    assert strip.shape == (20, 16, 16, 1)


@pytest.mark.usefixtures("quick")
def test_a_conditional_generator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "JUDGED", 300)
    monkeypatch.setattr(families, "LEARNED", 900)
    figures = families.judge_generator(Draws(), config(classes=10, data="digits:train"))
    assert figures["asked"] > 0.95 and figures["tstr"] > 0.9
    figures = families.judge_generator(Draws(shift=1), config(classes=10, data="digits:train"))
    assert figures["asked"] < 0.05 and figures["tstr"] < 0.1
    assert "tstr" not in families.judge_generator(Draws(), config(classes=10))
    (strip,) = families.strips(Draws(), config(classes=10), 20)
    assert (judge.read(strip) == torch.arange(20) // 2).float().mean() >= 0.9


@pytest.mark.usefixtures("quick")
def test_a_generator_of_pairs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "JUDGED", 300)
    both = config(data_b="digits:inverted")
    figures = families.judge_generator(Pairs(), both)
    assert figures["same"] == 1 and figures["accepted"] > 0.95
    assert families.judge_generator(Pairs(shift=1), both)["same"] < 0.3
    first, second = families.strips(Pairs(), both, 20)
    assert (first == 255 - second).all()


def test_a_translator():
    both = config(data_b="digits:inverted")
    figures = families.judge_generator(Inverts(), both)
    assert figures["same"] > 0.97 and figures["accepted"] > 0.95
    assert families.judge_generator(Inverts(shift=1), both)["same"] < 0.5
    first, second = families.strips(Inverts(), both, 20)
    assert (first == 255 - second).all()
    assert (judge.read(first) == torch.arange(20) // 2).float().mean() >= 0.9


# The table


def test_what_rows_require_and_learn():
    assert families.required("r3gan") == {"accepted": 0.8, "entropy": 2.1, "spread": 0.6}
    assert families.required("stylegan-cond") == families.required("r3gan") | {"asked": 0.9, "tstr": 0.85}
    assert families.options("wgan-gp") == ["--arch", "wgan-gp"]
    both = ["--data", "digits:train", "--data-b", "digits:train:inverted"]
    assert families.options("cyclegan") == ["--arch", "cyclegan", *both]
    assert families.options("sagan") == ["--arch", "sagan", "--data", "digits:train"]
    assert families.options("stylegan-cond") == ["--arch", "stylegan", "--cond", "--data", "digits:train"]
    assert set(families.REQUIRED) < set(families.ROWS)
    for row in families.ROWS:
        made = families.config_of(families.options(row))
        held_out = made.cond or row == "cyclegan"
        assert made.data == ("digits:train" if held_out else "digits"), row
        assert made.cond == ("tstr" in families.required(row)), row


def test_time_adds_up_over_resumed_runs(tmp_path: Path):
    ticks = [(1000, 20.0, 100), (2000, 31, 100), (3000, 41.5, 100), (4000, 12, 200), (5000, 14, 500)]
    lines = [
        json.dumps(
            {"images": images, "seconds": seconds, "cpu_seconds": 2 * seconds, "images_per_second": rate}
        )
        for images, seconds, rate in ticks
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    got = families.pace(tmp_path)
    assert got == {"kimg": 5, "rate": 5000 / (10 + 10 + 10 + 5 + 2), "seconds": 41.5 + 14, "cpu": 2 * 55.5}
    slow_start = [
        *lines[:1],
        json.dumps({"images": 2000, "seconds": 25, "cpu_seconds": 1, "images_per_second": 100}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(slow_start) + "\n")
    assert families.pace(tmp_path)["seconds"] == 45  # 5 s are too short for a tick of 10 s: another process


def test_a_line_of_the_table():
    good = {"accepted": 0.9, "entropy": 2.2, "spread": 0.7, "frechet": 12.34}
    good |= {"kimg": 100.0, "rate": 400.4, "seconds": 301.0, "cpu": 500.0}
    line, met = quality.table_line("dcgan", [good, good | {"accepted": 0.1}, good | {"accepted": 0.95}])
    assert met
    assert line == "| `dcgan` | 0.900 | 2.200 | 0.700 | 12.3 |  |  |  | 100 | 400 | 5m01s | yes |"
    assert line.count("|") == len(quality.HEADS) + 1
    line, met = quality.table_line("dcgan", [good | {"accepted": 0.79}])
    assert not met and "| 0.790 < 0.8 |" in line and line.endswith("| no |")
    assert not quality.table_line("dcgan", [good | {"accepted": float("nan")}])[1]
    assert not quality.table_line("dcgan", [good | {"seconds": 361.0}])[1]
    assert quality.table_line("dcgan", [good | {"seconds": 900.0, "cpu": 300.0}])[1]  # beside other work
    assert not quality.table_line("cgan", [good])[1]
    assert quality.table_line("cgan", [good | {"asked": 0.9, "tstr": 0.85}])[1]
    line, met = quality.table_line("dcgan", [good, None, good])
    assert not met and line.endswith("| no: 1 failed |")
    line, met = quality.table_line("dcgan", [None])
    assert not met and line.count("|") == len(quality.HEADS) + 1


class Trainer:
    """Stands in for subprocess.run: a training that ends at once, with the generator that it began with."""

    def __init__(self):
        self.calls: list[list[str]] = []
        self.threads: list[str | None] = []
        self.broken = ""

    def __call__(self, command: list[str], *, env: dict[str, str], check: bool, **files: Any):
        assert command[:3] == [sys.executable, "-m", "fastgan.train"] and check
        self.calls.append(command[3:])
        self.threads.append(env.get("OMP_NUM_THREADS"))
        folder = train.parser().parse_args(command[3:]).run_dir
        if self.broken and self.broken in folder.name:
            raise subprocess.CalledProcessError(1, command)
        config = families.config_of(command[3:])
        state = {f"ema.{name}": tensor for name, tensor in build_generator(config).state_dict().items()}
        folder.mkdir(exist_ok=True)
        save_generator(folder / "generator.safetensors", state, config, config.images)
        line = {"images": config.images, "seconds": 2.0, "cpu_seconds": 1.0}
        line["images_per_second"] = config.images / 1.5
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_training_all_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    trainer = Trainer()
    monkeypatch.setattr(families.subprocess, "run", trainer)
    monkeypatch.setattr(families, "JUDGED", 20)
    monkeypatch.setattr(quality, "PICTURE", tmp_path / "families.png")
    out = tmp_path / "out"
    command = ["--train", "stylegan", "dcgan", "--out", str(out), "--kimg", "0.064", "--threads", "1"]

    code = quality.main([*command, "--seeds", "0", "1", "--jobs", "2", "--picture"])
    assert code == 1  # they learned nothing
    shown = capsys.readouterr().out
    assert "stylegan seed 0: accepted " in shown and "dcgan seed 1: accepted " in shown
    table = shown[shown.index("\n| `--arch`") :].strip().splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| `stylegan`", "| `dcgan`"]
    assert all("| 0.064 |" in line and line.endswith("| no |") for line in table[2:4])
    assert all(line.count("|") == len(quality.HEADS) + 1 for line in table[:4])
    assert sorted(call[-3] for call in trainer.calls) == sorted(
        str(out / f"{arch}-seed{seed}") for arch in ("stylegan", "dcgan") for seed in (0, 1)
    )
    assert all("--compile" in call for call in trainer.calls) and trainer.threads == ["1"] * 4
    with Image.open(tmp_path / "families.png") as drawn:
        assert drawn.size == (quality.LABEL + 20 * quality.TILE, 2 * quality.TILE)

    trainer.calls.clear()
    quality.main([*command, "--seeds", "0", "1"])
    assert trainer.calls == []
    quality.main([*command, "--seeds", "0", "2"])  # another seed
    assert sorted(call[-3] for call in trainer.calls) == [
        str(out / f"{arch}-seed2") for arch in ("dcgan", "stylegan")
    ]
    trainer.calls.clear()
    quality.main(["--train", "dcgan", "--out", str(out), "--kimg", "0.128", "--seeds", "0"])  # goes on
    assert len(trainer.calls) == 1

    capsys.readouterr()
    trainer.broken = "dcgan-seed7"
    assert quality.main(["--train", "dcgan", "--out", str(out), "--kimg", "0.128", "--seeds", "0", "7"]) == 1
    shown = capsys.readouterr().out
    assert f"dcgan seed 7: failed, see {out / 'dcgan-seed7.log'}" in shown and "| no: 1 failed |" in shown


def test_a_run_of_other_options_is_not_taken_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families.subprocess, "run", Trainer())
    folder = tmp_path / "dcgan-seed0"
    families.train_row("dcgan", 0, folder, 0.064, None)
    command = ["--arch", "dcgan", "--compile", "--kimg", "0.064"]
    assert families.finished(folder, command)
    assert not families.finished(folder, [*command, "--batch", "16"])
    assert not families.finished(folder, [*command, "--seed", "1"])
    assert not families.finished(tmp_path / "elsewhere", command)


def test_picture(tmp_path: Path):
    images, _ = real()
    strip = images[:20]
    gray = quality.TILE * 2 * np.ones((20, 32, 32, 3), np.uint8)
    quality.picture({"dcgan": [strip], "cyclegan": [gray, strip]}, tmp_path / "a.png")
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    tile, left = quality.TILE, quality.LABEL
    assert drawn.shape == (3 * tile, left + 20 * tile, 3)
    for y, of in ((0, strip), (tile, gray), (2 * tile, strip)):
        got = drawn[y : y + tile, left + 19 * tile :]
        assert (got == of[19].repeat(tile // of.shape[1], axis=0).repeat(tile // of.shape[1], axis=1)).all()
    assert (drawn[:tile, :left] < 128).any() and (drawn[tile:, :left] < 128).any()  # the names


def test_judging_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    images, labels = real("test")
    np.savez(tmp_path / "a.npz", images=images, labels=labels.numpy())
    np.savez(tmp_path / "pairs.npz", images=np.concatenate([images, images], axis=2))
    (tmp_path / "b.npz").write_text("not one")
    assert quality.main([str(tmp_path / "a.npz")]) == 0
    shown = capsys.readouterr().out
    assert "of 397 held-out real digits" in shown and "accepted 0.9" in shown and "asked 0.9" in shown
    for name in ("pairs.npz", "b.npz", "missing.npz"):
        assert quality.main([str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_bad_usage(capsys: pytest.CaptureFixture):
    for argv, culprit in (
        ([], "one of the two"),
        (["a.npz", "--train"], "one of the two"),
        (["--train", "digan"], "--train digan is unknown"),
        (["--train", "dcgan", "--jobs", "0"], "--jobs"),
    ):
        assert quality.main(argv) == 2
        assert culprit in capsys.readouterr().err
