"""A whole training iteration of each architecture: pytest bench/ --benchmark-only

Ids say arch, resolution, batch, precision and mode. Lazy penalties carry their share: a round is one period
of them (16 steps of StyleGAN2). Compilation happens before the clock starts.
"""

import resource

import pytest
import torch

from fastgan.config import Config, make_config, resolve_device
from fastgan.engine import Engine

CASES = {
    # what the default commands train, and small versions of them for a quick look
    "smoke-stylegan": (
        "stylegan",
        {"resolution": 8, "batch": 8, "z_dim": 16, "w_dim": 16, "channel_base": 128},
    ),
    "smoke-dcgan": ("dcgan", {"resolution": 8, "batch": 8, "ngf": 8, "ndf": 8}),
    "default-stylegan": ("stylegan", {}),
    "default-dcgan": ("dcgan", {}),
}


def named(case: str, config: Config) -> str:
    mode = "compiled" if config.compile else "eager"
    return f"{case}-{config.resolution}px-batch{config.batch}-{config.precision}-{mode}"


def configs():
    for case, (arch, options) in CASES.items():
        for compile in (False, True):
            if compile and case.startswith("smoke"):
                continue
            config, _ = resolve_device(make_config(arch, compile=compile, **options))
            yield pytest.param(config, id=named(case, config))


@pytest.mark.parametrize("config", list(configs()))
def test_training_iteration(benchmark, config: Config):
    _, device = resolve_device(config)
    engine = Engine(config, device)
    shape = (config.batch, config.channels, config.resolution, config.resolution)
    real = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    real = real.contiguous(memory_format=torch.channels_last)
    period = config.r1_every if config.r1 > 0 else 4

    def steps():
        for _ in range(period):
            engine.step(real)
        engine.take_losses()  # waits for the device

    benchmark.pedantic(steps, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median / (period * config.batch)
    benchmark.extra_info.update(
        images_per_second=round(1 / seconds, 1),
        seconds_per_kimg=round(1000 * seconds, 3),
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )
    assert all(torch.isfinite(p).all() for p in engine.G.parameters())
