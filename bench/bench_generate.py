"""Inference, latents to images on the device: pytest bench/bench_generate.py --benchmark-only

`extra_info` has the fraction of the limit (fastgan/limit.py) of the generator's forward pass.
"""

import pytest
import torch

from bench.settings import configs, rounds, speed
from fastgan.compiled import Phase
from fastgan.config import Config, build_generator
from fastgan.engine import one_hot, place
from fastgan.limit import PhaseCall, limit, random_images, synchronize

# On a CPU Inductor takes longer to compile this than it saves in all rounds; bench.plain measures it.
CASES = [c for c in configs() if torch.cuda.is_available() or not c.values[0].compile]


@pytest.mark.parametrize("config", CASES)
def test_generating(benchmark, config: Config):
    device = torch.device(config.device)
    G = build_generator(config).eval().requires_grad_(False)
    place(G, device)
    if getattr(G, "translates", False):
        args: tuple = None, random_images(config, device, updates=1) / 127.5 - 1
    else:
        labels = torch.arange(config.batch, device=device) % max(config.c_dim, 1)
        c = one_hot(labels, config.c_dim) if config.cond else None
        args = torch.randn(config.batch, config.z_dim, device=device), c
    phase = Phase("generating", lambda G, *args: G(*args), device, config.compile)
    call = PhaseCall(phase, (G, *args), 1.0)

    def run():
        with torch.no_grad():
            y = call()
        synchronize(device)
        return y

    run()  # compiles
    images = benchmark.pedantic(run, rounds=rounds(benchmark, 15), warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(speed(config, seconds))
    benchmark.extra_info.update(fraction_of_limit=round(limit(call, config.dtype) / seconds, 3))
    assert images.shape == (
        config.batch,
        config.domains * config.channels,
        config.resolution,
        config.resolution,
    )
