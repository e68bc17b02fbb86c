"""A whole training iteration of each architecture: pytest bench/bench_step.py --benchmark-only

A round is one period of the lazy penalties, so that they carry their share. Compilation happens before the
clock starts; rare phases run eagerly, as they do in the first thousands of steps.
"""

import pytest
import torch

from bench.settings import FAMILIES, configs, limit_of_step, rounds, speed
from fastgan.config import Config
from fastgan.engine import Engine
from fastgan.limit import grown, phase_calls, random_images, random_step
from fastgan.profile import timed


@pytest.mark.parametrize("config", list(configs(families=True)))
def test_training_iteration(benchmark, config: Config):
    device = torch.device(config.device)
    engine, batch = grown(Engine(config, device)), random_step(config, device)
    calls = phase_calls(engine, random_images(config, device))
    period = max(round(1 / min(call.share for call in calls)), 1)

    def steps():
        for _ in range(period):
            engine.step(*batch)
        engine.take_losses()  # waits for the device

    engine.step(*batch)  # both penalties
    engine.step(*batch)  # neither: compiles D and G
    budget = 4 if any(f"[{name}-" in benchmark.name for name in FAMILIES) else 20
    a_round = period * timed(lambda: engine.step(*batch), device, 0.0)
    benchmark.pedantic(steps, rounds=rounds(benchmark, min(max(int(budget / a_round), 2), 7)))
    seconds = benchmark.stats.stats.median / period
    benchmark.extra_info.update(speed(config, seconds))
    benchmark.extra_info.update(fraction_of_limit=round(limit_of_step(config, calls) / seconds, 3))
    assert all(torch.isfinite(p).all() for p in engine.G.parameters())
