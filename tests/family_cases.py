"""Every family at a size for tests: 8 pixels where its networks go that low, a few channels."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastgan.config import PRESETS, Config, make_config
from fastgan.engine import Engine
from fastgan.limit import PhaseCall, phase_calls

CPU = torch.device("cpu")
STYLES = {"mapping_layers": 1, "channel_base": 64, "channel_max": 8, "mbstd_group": 2}
TINY: dict[str, dict[str, Any]] = {
    "gan": {"ngf": 2, "ndf": 2},
    "cgan": {"ngf": 2, "ndf": 2},
    "dcgan": {"ngf": 4, "ndf": 4},
    "wgan": {"ngf": 4, "ndf": 4, "d_steps": 2},
    "wgan-gp": {"ngf": 4, "ndf": 4, "d_steps": 2},
    "cyclegan": {"ngf": 2, "ndf": 4, "blocks": 1, "layers": 1, "pool": 3, "resolution": 8},
    "cogan": {"ngf": 4, "ndf": 4, "resolution": 16},
    "progan": {
        "channel_base": 64,
        "channel_max": 8,
        "mbstd_group": 2,
        "stable_kimg": 0.02,
        "fade_kimg": 0.02,
    },
    "sagan": {"ngf": 2, "ndf": 2, "attention": 8, "resolution": 16},
    "biggan": {"ngf": 2, "ndf": 2, "attention": 8, "resolution": 16, "z_dim": 9, "shared_dim": 4},
    "stylegan1": STYLES | {"r1_every": 2},
    "stylegan": STYLES | {"r1_every": 2, "pl_every": 2},
    "r3gan": {"width": 8, "cardinality": 2},
}
assert TINY.keys() == PRESETS.keys()


def tiny_config(arch: str, **options: Any) -> Config:
    """Unconditional families stay so; conditional ones know three classes."""
    given = {"z_dim": 8} if arch != "cyclegan" else {}
    given |= {"resolution": 8, "batch": 4, "device": "cpu", "precision": "fp32"} | TINY[arch] | options
    return make_config(arch, **({"classes": 3} if PRESETS[arch].get("cond") else {}), **given)


def exact_calls(arch: str, **options: Any) -> list[PhaseCall]:
    """A tiny family's phases with networks and arguments in float64, weights large enough for their second
    derivatives to be seen."""
    config = tiny_config(arch, **options)
    engine = Engine(config, CPU)
    for net in (engine.G, engine.D):
        net.double()
        for module in net.modules():
            if isinstance(getattr(module, "dtype", None), torch.dtype):
                module.dtype = torch.float64
    generator = torch.Generator().manual_seed(0)
    side, channels = config.resolution, config.domains * config.channels
    real = torch.rand(config.part, channels, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    real = real.contiguous(memory_format=torch.channels_last)
    return [call._replace(args=_doubled(call.args)) for call in phase_calls(engine, real)]


def _doubled(args: tuple) -> tuple:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
