"""SAGAN (Zhang, Goodfellow, Metaxas and Odena 2018, "Self-Attention Generative Adversarial Networks",
arXiv:1805.08318).

Spectral normalization in both networks, self-attention, conditional BatchNorm and a projection discriminator.
Residual bodies and widths are those of the authors' code (brain-research/self-attention-gan), which is for
128 pixels; other resolutions end (G) and start (D) with the same widths.
"""

import itertools

import torch
from torch import Tensor

from fastgan.layers import require_labels
from fastgan.spectral import (
    DownBlock,
    Embedding,
    ProjectionDiscriminator,
    ResidualGenerator,
    UpBlock,
    doublings,
    with_attention,
)

WIDEST = 16  # times ngf or ndf


class Generator(ResidualGenerator):
    """z [N, z_dim] and one-hot labels c [N, c_dim] -> images [N, channels, R, R] in (-1, 1).

    ngf channels at the full resolution, twice as many at each halving, up to 16 ngf. Labels choose the gain
    and shift of every BatchNorm but the last; c_dim 0 leaves plain BatchNorm.
    """

    def __init__(
        self,
        z_dim: int = 128,
        c_dim: int = 0,
        resolution: int = 128,
        channels: int = 3,
        ngf: int = 64,
        attention: int = 32,
        dtype: torch.dtype | None = None,
    ):
        k = doublings(resolution)
        outs = [ngf * min(1 << i, WIDEST) for i in reversed(range(k))]
        widths = [outs[0], *outs]
        condition = (lambda width: Embedding(c_dim, width)) if c_dim > 0 else None
        stages = [[UpBlock(a, b, condition)] for a, b in itertools.pairwise(widths)]
        blocks = with_attention(stages, outs, [8 << i for i in range(k)], attention)
        super().__init__(z_dim, c_dim, z_dim, (widths[0], widths[-1]), blocks, channels, dtype)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        return self.synthesize(z, itertools.repeat(require_labels(c, self.c_dim) if self.c_dim > 0 else None))


class Discriminator(ProjectionDiscriminator):
    """Images [N, channels, R, R] and one-hot labels c [N, c_dim] -> logits [N, 1].

    ndf channels at half the resolution, twice as many at each further halving, up to 16 ndf; down to 4x4.
    """

    def __init__(
        self,
        c_dim: int = 0,
        resolution: int = 128,
        channels: int = 3,
        ndf: int = 64,
        attention: int = 32,
        dtype: torch.dtype | None = None,
    ):
        k = doublings(resolution)
        outs = [ndf * min(1 << i, WIDEST) for i in range(k)]
        outs.append(outs[-1])
        pairs = itertools.pairwise([channels, *outs])
        stages = [[DownBlock(a, b, 2 if i < k else 1, first=i == 0)] for i, (a, b) in enumerate(pairs)]
        sides = [max(resolution >> i + 1, 4) for i in range(k + 1)]
        super().__init__(with_attention(stages, outs, sides, attention), outs[-1], c_dim, dtype)
