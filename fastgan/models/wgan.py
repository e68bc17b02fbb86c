"""WGAN (Arjovsky, Chintala and Bottou 2017, "Wasserstein GAN", arXiv:1701.07875).

The networks of DCGAN ("dcgan"), or the perceptrons of four layers and 512 units with ReLU and no
normalisation of figure 7 ("mlp"), as in the authors' code but for the tanh that bounds the images. Their
hidden layers have 8 times `ngf` or `ndf` units, 512 at the default 64.
"""

import torch
from torch import nn

from fastgan.models import dcgan, gan


def Generator(
    z_dim: int = 100,
    c_dim: int = 0,
    resolution: int = 64,
    channels: int = 3,
    ngf: int = 64,
    kernel: int = 4,
    blocks: int = 0,
    body: str = "dcgan",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """z [N, z_dim], labels [N, c_dim] -> images [N, channels, R, R] in (-1, 1)."""
    if body == "mlp":
        widths = [8 * ngf] * 3
        return gan.Generator(
            z_dim, c_dim, resolution, channels, slope=0.0, dtype=dtype, widths=widths, batch_norm=False
        )
    _check(body)
    return dcgan.Generator(z_dim, ngf, channels, resolution, kernel, dtype, c_dim, blocks)


def Discriminator(
    c_dim: int = 0,
    resolution: int = 64,
    channels: int = 3,
    ndf: int = 64,
    kernel: int = 4,
    blocks: int = 0,
    slope: float = 0.2,
    dropout: float = 0.0,
    instance_noise: float = 0.0,
    norm: str = "batch",
    body: str = "dcgan",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The critic: images [N, channels, R, R], labels [N, c_dim] -> scores [N, 1], which nothing bounds.

    `norm` (dcgan.py), `slope`, `kernel` and `blocks` are those of "dcgan" alone.
    """
    if body == "mlp":
        widths = [8 * ndf] * 3
        return gan.Discriminator(c_dim, resolution, channels, 0, 0.0, dropout, instance_noise, dtype, widths)
    _check(body)
    return dcgan.Discriminator(
        ndf, channels, resolution, kernel, slope, dropout, instance_noise, dtype, c_dim, blocks, norm
    )


def _check(body: str) -> None:
    if body != "dcgan":
        raise ValueError(f"body must be dcgan or mlp: got {body!r}")
