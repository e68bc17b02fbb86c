"""The operations that real networks call, with the shapes they call them with, found by running the networks
on the meta device."""

from collections.abc import Hashable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastgan.config import build_networks, make_config
from fastgan.kernels.dispatch import Op

NETWORKS = {
    "smoke": ("stylegan", {"resolution": 8, "batch": 4, "channel_base": 128, "channel_max": 16}),
    "smoke-dcgan": ("dcgan", {"resolution": 8, "batch": 4, "ngf": 8, "ndf": 8}),
    "stylegan64": (
        "stylegan",
        {"resolution": 64, "batch": 8, "channel_base": 16384, "channel_max": 512, "mapping_layers": 8},
    ),
    "stylegan256": (
        "stylegan",
        {"resolution": 256, "batch": 4, "channel_base": 16384, "channel_max": 512, "mapping_layers": 8},
    ),
    "stylegan1024": (
        "stylegan",
        {
            "resolution": 1024,
            "batch": 1,
            "mbstd_group": 1,
            "pl_batch_shrink": 1,
            "channel_base": 32768,
            "mapping_layers": 8,
        },
    ),
    "dcgan64": ("dcgan", {"resolution": 64, "batch": 64, "ngf": 64, "ndf": 64}),
    "stylegan1-64": (
        "stylegan1",
        {"resolution": 64, "batch": 8, "channel_base": 16384, "channel_max": 512, "mapping_layers": 8},
    ),
    "biggan32": ("biggan", {"resolution": 32, "batch": 32, "ngf": 64, "ndf": 64}),
    "cyclegan128": (
        "cyclegan",
        {"resolution": 128, "batch": 1, "ngf": 64, "ndf": 64, "blocks": 9, "layers": 3},
    ),
}


class Call(NamedTuple):
    """One call of `op`; tensors among `args` are on the meta device. `key` is the shape class."""

    op: Op
    args: tuple
    key: Hashable

    @property
    def name(self) -> str:
        """The operation and its shapes."""
        shapes = ["x".join(map(str, a.shape)) for a in self.args[:2] if isinstance(a, Tensor) and a.ndim > 1]
        rates = [f"up{self.args[4]}down{self.args[5]}"] if self.op.name == "modulated_conv2d" else []
        rates += [f"up{self.args[3]}down{self.args[4]}"] if self.op.name == "conv2d_resample" else []
        rates += [f"{a}" for a in self.args if self.op.name == "norm_act" and isinstance(a, str)]
        return "-".join([self.op.name, *shapes, *rates])

    def tensors(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple:
        """The arguments with random values, floating ones of four dimensions in `dtype`; positive vectors."""
        made = [_random(a, device, dtype) if isinstance(a, Tensor) else a for a in self.args]
        if isinstance(made[1], Tensor) and made[1].ndim == 4:  # a weight
            made[1] = (made[1].detach() / made[1][0].numel() ** 0.5).requires_grad_()
        return tuple(made)


def _random(like: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if like.ndim == 1:
        t = torch.rand(like.shape, device=device) + 0.5
    else:
        t = torch.randn(like.shape, device=device)
    if like.ndim == 2 and not like.requires_grad:  # a filter
        t = t.abs() / t.abs().sum()
    if like.ndim == 4:
        t = t.to(dtype or like.dtype)
        last = like.is_contiguous(memory_format=torch.channels_last)
        t = t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return t.detach().requires_grad_(like.requires_grad)


def _run(network: str) -> None:
    arch, options = NETWORKS[network]
    config = make_config(arch, **options)
    G, D = build_networks(config)
    for p in [*G.parameters(), *D.parameters()]:
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    c = torch.empty(config.batch, config.c_dim) if config.cond else None
    if getattr(G, "translates", False):
        c = torch.empty(config.batch, 2 * config.channels, config.resolution, config.resolution)
    images, _ = G.sample(torch.empty(config.batch, G.normals), torch.empty(config.batch, G.uniforms), c)
    D(images, c)


def calls(network: str) -> Iterator[Call]:
    """The different calls of a training step's forward passes through `network`."""
    found: list[Call] = []

    def record(self, x, *rest, key=tuple, impl=None):
        found.append(Call(self, (x, *rest), key()))
        return self.candidates["reference"](x, *rest)

    with torch.device("meta"), mock.patch.object(Op, "__call__", record):
        _run(network)
    seen = set()
    for call in found:
        if call.name not in seen:
            seen.add(call.name)
            yield call
