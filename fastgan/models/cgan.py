"""Conditional GAN (Mirza and Osindero 2014, "Conditional Generative Adversarial Nets", arXiv:1411.1784).

The networks of gan.py: the one-hot label is joined to z in the generator and to the image's pixels in the
discriminator (figure 1).
"""

import torch

from fastgan.models import gan


def Generator(
    z_dim: int = 100,
    c_dim: int = 10,
    resolution: int = 28,
    channels: int = 1,
    ngf: int = 64,
    slope: float = 0.2,
    dtype: torch.dtype | None = None,
) -> gan.Generator:
    """z [N, z_dim], one-hot labels [N, c_dim] -> images [N, channels, R, R] in (-1, 1)."""
    _check(c_dim)
    return gan.Generator(z_dim, c_dim, resolution, channels, ngf, slope, dtype)


def Discriminator(
    c_dim: int = 10,
    resolution: int = 28,
    channels: int = 1,
    ndf: int = 64,
    slope: float = 0.2,
    dropout: float = 0.3,
    instance_noise: float = 0.0,
    dtype: torch.dtype | None = None,
) -> gan.Discriminator:
    """Images [N, channels, R, R], one-hot labels [N, c_dim] -> logits [N, 1]."""
    _check(c_dim)
    return gan.Discriminator(c_dim, resolution, channels, ndf, slope, dropout, instance_noise, dtype)


def _check(c_dim: int) -> None:
    if c_dim < 1:
        raise ValueError(f"c_dim must be the number of classes, at least 1: got {c_dim}; gan has no labels")
