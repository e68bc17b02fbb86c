"""Each phase of a training step by itself: pytest bench/bench_phases.py --benchmark-only

`extra_info` has the phase's fraction of the limit (fastgan/limit.py), measured right after the phase, and its
share: how often it runs in a step. Speed is that of a step which were this phase alone.
"""

from collections.abc import Iterator

import pytest
import torch

from bench.settings import configs, rounds, speed
from fastgan.config import Config
from fastgan.engine import Engine
from fastgan.limit import limit, phase_calls, random_images, synchronize

PHASES = ("D", "D with R1", "G", "G with path length")


def cases() -> Iterator:
    for case in configs():
        (config,) = case.values
        for name in PHASES:
            if (name == "D with R1" and config.r1 == 0) or (name == "G with path length" and config.pl == 0):
                continue
            # On a CPU a rare phase is compiled after thousands of runs, and compiling it takes minutes.
            if name in ("D", "G") or not config.compile or config.device != "cpu":
                yield pytest.param(config, name, id=f"{case.id}-{name.replace(' ', '-')}")


@pytest.mark.parametrize(("config", "name"), list(cases()))
def test_phase(benchmark, config: Config, name: str):
    device = torch.device(config.device)
    engine = Engine(config, device)
    (call,) = (c for c in phase_calls(engine, random_images(config, device)) if c.phase.name == name)

    def run():
        call()
        synchronize(device)

    run()  # compiles
    benchmark.pedantic(run, rounds=rounds(benchmark, 5), warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(speed(config, seconds))
    alone = limit(call, config.dtype)
    benchmark.extra_info.update(share=call.share, fraction_of_limit=round(alone / seconds, 3))
    assert alone > 0
