"""What is measured: the smoke cases of CI, and by device sizes that end in minutes or fill a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastgan.config import PRESETS, Config, make_config, resolve_device
from fastgan.limit import PhaseCall, limit
from fastgan.train import peak_memory_mib

Case = tuple[str, dict[str, Any], tuple[bool, ...]]  # arch, options, eager and compiled or one of them
EAGER, BOTH = (False,), (False, True)
FULL = {"channel_base": 32768, "channel_max": 512, "mapping_layers": 8}

SMOKE: dict[str, Case] = {
    "smoke-stylegan": (
        "stylegan",
        {"resolution": 8, "batch": 8, "z_dim": 16, "w_dim": 16, "channel_base": 128},
        EAGER,
    ),
    "smoke-dcgan": ("dcgan", {"resolution": 8, "batch": 8, "ngf": 8, "ndf": 8}, EAGER),
}
CPU: dict[str, Case] = {
    "default-stylegan": ("stylegan", {}, BOTH),
    "default-dcgan": ("dcgan", {}, BOTH),
    # Narrower than bench.plain's, of which a step takes seconds and compiling it minutes.
    "stylegan": (
        "stylegan",
        {"resolution": 64, "batch": 8, "channel_base": 4096, "channel_max": 256},
        EAGER,
    ),
    "dcgan": ("dcgan", {"resolution": 64, "batch": 64, "ngf": 64, "ndf": 64}, BOTH),
}
FAMILIES: dict[str, Case] = {
    f"default-{arch}": (arch, {}, EAGER) for arch in PRESETS if f"default-{arch}" not in CPU
}
GPU: dict[str, Case] = {
    # The networks behind StyleGAN3's published 6.79, 12.53, 41.06 and 90.39 s/kimg on an A100; our batches.
    "stylegan-128": ("stylegan", {**FULL, "resolution": 128, "batch": 32}, BOTH),
    "stylegan-256": ("stylegan", {**FULL, "resolution": 256, "batch": 32}, BOTH),
    "stylegan-512": ("stylegan", {**FULL, "resolution": 512, "batch": 16}, BOTH),
    "stylegan-1024": ("stylegan", {**FULL, "resolution": 1024, "batch": 8}, BOTH),
    "dcgan": ("dcgan", {"resolution": 64, "batch": 128, "ngf": 64, "ndf": 64}, BOTH),
}


def configs(families: bool = False) -> Iterator:
    """A pytest parameter for each case and mode, with an id that says arch, resolution, batch, precision and
    mode; with `families`, also for the presets of all others."""
    cases = SMOKE | (GPU if torch.cuda.is_available() else CPU) | (FAMILIES if families else {})
    for name, (arch, options, modes) in cases.items():
        for compile in modes:
            config, _ = resolve_device(make_config(arch, compile=compile, **options))
            yield pytest.param(config, id=f"{name}-{described(config)}")


def described(config: Config) -> str:
    mode = "compiled" if config.compile else "eager"
    if config.cuda_graphs and config.device.startswith("cuda"):
        mode += "-graph"
    return f"{config.resolution}px-batch{config.batch}-{config.precision}-{mode}"


def rounds(benchmark: Any, full: int) -> int:
    """Three for a smoke case."""
    return 3 if "smoke" in benchmark.name else full


def speed(config: Config, seconds: float) -> dict[str, float]:
    """Of a step that takes so many seconds."""
    return {
        "images_per_second": round(config.step_images / seconds, 2),
        "seconds_per_kimg": round(1000 * seconds / config.step_images, 4),
        "peak_memory_mib": peak_memory_mib(torch.device(config.device)),
    }


def limit_of_step(config: Config, calls: list[PhaseCall]) -> float:
    """Seconds that the products of a step need, every phase at its share."""
    return sum(call.share * limit(call, config.dtype) for call in calls)
