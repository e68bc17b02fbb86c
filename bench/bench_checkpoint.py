"""Checkpoints to disk and back: pytest bench/bench_checkpoint.py --benchmark-only

`fraction_of_run` is writing's part of an eager run that takes a checkpoint every --checkpoint-kimg.
"""

from pathlib import Path

import pytest
import torch

from bench.settings import configs, rounds
from fastgan.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fastgan.config import Config
from fastgan.engine import Engine
from fastgan.limit import random_step
from fastgan.profile import timed

EAGER = [case for case in configs() if not case.values[0].compile]


def stepped(config: Config) -> tuple[Engine, tuple[torch.Tensor, torch.Tensor | None]]:
    """An engine whose optimizers have state."""
    device = torch.device(config.device)
    engine, batch = Engine(config, device), random_step(config, device)
    engine.step(*batch)
    return engine, batch


@pytest.mark.parametrize("config", EAGER)
def test_writing(benchmark, config: Config, tmp_path: Path):
    engine, batch = stepped(config)

    def write():
        save_checkpoint(tmp_path, engine.state(), engine.images, keep=1)

    benchmark.pedantic(write, rounds=rounds(benchmark, 4), warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    (file,) = checkpoints(tmp_path)
    step = timed(lambda: engine.step(*batch), engine.device, 0.0)
    between = config.checkpoint_kimg * 1000 / config.step_images * step
    benchmark.extra_info.update(
        megabytes=round(file.stat().st_size / 1e6, 1),
        megabytes_per_second=round(file.stat().st_size / 1e6 / seconds, 1),
        fraction_of_run=round(seconds / (seconds + between), 5),
    )


@pytest.mark.parametrize("config", EAGER)
def test_reading(benchmark, config: Config, tmp_path: Path):
    engine, _ = stepped(config)
    save_checkpoint(tmp_path, engine.state(), engine.images, keep=1)
    other = Engine(config, engine.device)

    def read():
        checkpoint = load_checkpoint(tmp_path)
        assert checkpoint
        other.load_state(*checkpoint)

    benchmark.pedantic(read, rounds=rounds(benchmark, 4), warmup_rounds=1)
    size = checkpoints(tmp_path)[0].stat().st_size
    benchmark.extra_info.update(
        megabytes_per_second=round(size / 1e6 / benchmark.stats.stats.median, 1),
    )
    mine = engine.state()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in other.state().items())
