"""Every family, trained on the embedded digits and judged: what bench.quality --train makes a table of."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import judge
from fastgan import pretrained, train
from fastgan.checkpoint import load_tensors
from fastgan.config import PRESETS, Config, changed_fields, make_config, resolve_device
from fastgan.data import load_images
from fastgan.engine import keep_freed_memory
from fastgan.images import to_uint8
from fastgan.run_folder import METRICS
from fastgan.sampling import latents

Figures = dict[str, float]

ROWS = (*PRESETS, "stylegan-cond")
STRONG = {"accepted": 0.8, "entropy": 2.1, "spread": 0.6}
FAIR = {"accepted": 0.7, "entropy": 2.0, "spread": 0.6}
CONDITIONAL = {"asked": 0.9, "tstr": 0.85}
REQUIRED = {  # of a row that is not here: STRONG
    "gan": FAIR,
    "cgan": FAIR | CONDITIONAL,
    "wgan": FAIR,
    "cyclegan": {"spread": 0.6, "same": 0.9},
    "cogan": FAIR | {"same": 0.8},
    "sagan": STRONG | CONDITIONAL,
    "biggan": STRONG | CONDITIONAL,
}
SECONDS = 360  # the most that a training may take

JUDGED, LEARNED = 1000, 2000  # samples
CLASSES = 10

judging = threading.Lock()  # one at a time: training a classifier draws from torch's global generator


def required(row: str) -> Figures:
    """The least that each figure of a row may be."""
    arch = row.removesuffix("-cond")
    return REQUIRED.get(arch, STRONG) | (CONDITIONAL if row != arch else {})


def options(row: str) -> list[str]:
    """What a row is, as options of fastgan.train."""
    arch = row.removesuffix("-cond")
    command = ["--arch", arch, *["--cond"] * (row != arch)]
    if "tstr" in required(row) or row == "cyclegan":
        command += ["--data", "digits:train"]
    return command + (["--data-b", "digits:train:inverted"] if row == "cyclegan" else [])


def run_folder(out: Path, row: str, seed: int) -> Path:
    return out / f"{row}-seed{seed}"


def run_all(
    rows: list[str], seeds: list[int], out: Path, kimg: float | None, threads: int | None, jobs: int
) -> Iterator[tuple[str, int, Figures | None]]:
    """Train and judge each row with each seed, `jobs` at a time; None for a training that failed."""

    def run(folder: Path, row: str, seed: int) -> Figures:
        train_row(row, seed, folder, kimg, threads)
        with judging:
            return judge_run(folder)

    out.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        futures: dict[tuple[str, int], Future[Figures]] = {
            (row, seed): pool.submit(run, run_folder(out, row, seed), row, seed)
            for row in rows
            for seed in seeds
        }
        for (row, seed), future in futures.items():
            try:
                yield row, seed, future.result()
            except subprocess.CalledProcessError:
                yield row, seed, None
    finally:
        pool.shutdown(cancel_futures=True)


def train_row(row: str, seed: int, folder: Path, kimg: float | None, threads: int | None) -> None:
    """Train, or go on training, in a process of its own, which prints to FOLDER.log.

    Raises CalledProcessError if it fails.
    """
    command = [*options(row), "--compile", "--seed", str(seed), "--run-dir", str(folder)]
    command += ["--kimg", str(kimg)] if kimg else []
    if finished(folder, command):
        return
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with log_of(folder).open("a") as log:
        whole = [sys.executable, "-m", "fastgan.train", *command]
        subprocess.run(whole, stdout=log, stderr=log, env=env, check=True)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def config_of(command: list[str]) -> Config:
    """What fastgan.train makes of its options before it has read the data."""
    fields = {field.name for field in dataclasses.fields(Config)}
    given = {k: v for k, v in vars(train.parser().parse_args(command)).items() if k in fields}
    return resolve_device(make_config(**given))[0]


def finished(folder: Path, command: list[str]) -> bool:
    """Whether `folder` holds the generator that `command` would end with."""
    file = folder / "generator.safetensors"
    if not file.exists():
        return False
    config = config_of(command)
    _, metadata = load_tensors(file)
    changed = set(changed_fields(metadata["config"], config)) - {"classes"}  # known once the data is read
    return metadata["images"] >= config.images and not changed


def pace(folder: Path) -> Figures:
    """kimg, images/s without compiling, seconds and CPU seconds of all a run's training, from its log."""
    images = seconds = cpu = training = clock = cpu_clock = 0.0
    for line in map(json.loads, (folder / METRICS).read_text().splitlines()):
        tick = (line["images"] - images) / line["images_per_second"]
        passed = line["seconds"] - clock
        # A resumed run's clock starts anew: then less has passed than the tick's own training took.
        resumed = passed <= 0.99 * tick
        seconds += line["seconds"] if resumed else passed
        cpu += line["cpu_seconds"] - (0.0 if resumed else cpu_clock)
        cpu_clock = line["cpu_seconds"]
        images, clock, training = line["images"], line["seconds"], training + tick
    return {"kimg": images / 1000, "rate": images / training, "seconds": seconds, "cpu": cpu}


def load(folder: Path) -> tuple[Any, Config]:
    """A run's generator, ready to be used, and its config."""
    loaded = pretrained.load(folder)
    keep_freed_memory(loaded.device)
    return loaded.net, loaded.config


@torch.inference_mode()
def samples(G: Any, count: int, asked: Tensor | None = None) -> np.ndarray:
    """uint8 [count, R, R, C] of seed 0, of the classes `asked` int64 [count] if there are any."""
    device = next(G.parameters()).device
    inputs = [latents(0, count, G.z_dim)]
    if asked is not None:
        inputs.append(F.one_hot(asked, CLASSES).float())
    parts = zip(*(x.to(device).split(100) for x in inputs), strict=True)
    return np.concatenate([to_uint8(G(*part)) for part in parts])


@torch.inference_mode()
def translate(G: Any, images: np.ndarray, to: str) -> np.ndarray:
    """Images uint8 [N, R, R, C] of one domain as images of domain "a" or "b"."""
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).to(next(G.parameters()).device)
    return np.concatenate([to_uint8(G.translate(part, to=to)) for part in x.split(100)])


def judge_run(folder: Path) -> Figures:
    G, config = load(folder)
    return judge_generator(G, config) | pace(folder)


def judge_generator(G: Any, config: Config) -> Figures:
    if hasattr(G, "translate"):
        return judge_translator(G, config.data_b, config.resolution, config.channels)
    if config.data_b:
        return judge_pairs(G, config.data_b, config.resolution, config.channels)
    if config.classes:
        return judge_classes(G, unseen=config.data == "digits:train")
    return judge.judge(samples(G, JUDGED))


def judge_classes(G: Any, unseen: bool) -> Figures:
    """A conditional generator; TSTR if it has not seen the held-out digits."""
    asked = torch.arange(LEARNED) % CLASSES
    images = samples(G, LEARNED, asked)
    figures = judge.judge(images[:JUDGED]) | {"asked": judge.asked_class(images[:JUDGED], asked[:JUDGED])}
    return figures | ({"tstr": judge.tstr(images, asked)} if unseen else {})


def judge_pairs(G: Any, data_b: str, resolution: int, channels: int) -> Figures:
    """A generator of pairs: its first halves as samples, and whether the second show the same."""
    first, second = np.split(samples(G, JUDGED), 2, axis=3)
    read_second = judge.reader(data_b, resolution, channels)
    return judge.judge(first) | {"same": judge.same_digit(first, second, read_second)}


def judge_translator(G: Any, data_b: str, resolution: int, channels: int) -> Figures:
    """A translator: images of the other domain as digits, and held-out digits there and back."""
    others = load_images(data_b, resolution, channels).images[:JUDGED]
    held_out = load_images("digits:test", resolution, channels)
    assert held_out.labels is not None
    there = translate(G, judge.as_arrays(held_out.images), "b")
    back = translate(G, there, "a")
    read_there = judge.reader(data_b, resolution, channels)
    kept = judge.kept_class(there, back, held_out.labels, read_there)
    return judge.judge(translate(G, judge.as_arrays(others), "a")) | {"same": kept}


def strips(G: Any, config: Config, across: int) -> list[np.ndarray]:
    """Rows of `across` images for a picture, uint8 [across, R, R, C] each: two of them for two domains.

    A conditional generator's go through the classes; a translator's are held-out digits and their images in
    the other domain.
    """
    by_class = torch.arange(across) * CLASSES // across
    if hasattr(G, "translate"):
        held_out = load_images("digits:test", config.resolution, config.channels)
        assert held_out.labels is not None
        chosen = [int((held_out.labels == k).nonzero()[i % 2]) for i, k in enumerate(by_class)]
        digits = judge.as_arrays(held_out.images[chosen])
        return [digits, translate(G, digits, "b")]
    if config.data_b:
        return np.split(samples(G, across), 2, axis=3)
    return [samples(G, across, by_class if config.classes else None)]
