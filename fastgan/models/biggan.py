"""BigGAN and BigGAN-deep (Brock, Donahue and Simonyan 2018, "Large Scale GAN Training for High Fidelity
Natural Image Synthesis", arXiv:1809.11096).

SAGAN's blocks, wider; a class embedding that all BatchNorm layers share, and chunks of z that reach every
block beside it. Widths are those of BigGAN-PyTorch, which start at 32 pixels; 8 and 16 are built like its 32.
The truncation trick draws z anew where it is too large, so it happens outside.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.layers import require_labels
from fastgan.spectral import (
    ConditionalBatchNorm2d,
    DownBlock,
    Embedding,
    ProjectionDiscriminator,
    ResidualGenerator,
    SpectralConv2d,
    UpBlock,
    doublings,
    spectral_linear,
    with_attention,
)

# Channels of the map that each block or, of BigGAN-deep, stage makes, times ngf or ndf.
G_WIDTHS = {
    8: (4,),
    16: (4, 4),
    32: (4, 4, 4),
    64: (16, 8, 4, 2),
    128: (16, 8, 4, 2, 1),
    256: (16, 8, 8, 4, 2, 1),
    512: (16, 8, 8, 4, 2, 1, 1),
}
D_WIDTHS = {
    8: (4, 4),
    16: (4, 4, 4),
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}
RATIO = 4  # of a deep block's width to its bottleneck's


def _check_resolution(resolution: int) -> None:
    if resolution not in G_WIDTHS:
        raise ValueError(f"resolution must be one of {', '.join(map(str, G_WIDTHS))}: got {resolution}")


class DeepUpBlock(nn.Module):
    """x [N, Cin, H, W], y -> [N, Cout, up * H, up * W] through a bottleneck; the shortcut drops channels."""

    def __init__(self, in_channels: int, out_channels: int, condition, up: int):
        super().__init__()
        hidden = max(in_channels // RATIO, 1)
        self.out_channels, self.up = out_channels, up
        self.bn1 = ConditionalBatchNorm2d(in_channels, condition)
        self.conv1 = SpectralConv2d(in_channels, hidden, 1)
        self.bn2 = ConditionalBatchNorm2d(hidden, condition)
        self.conv2 = SpectralConv2d(hidden, hidden, up=up)
        self.bn3 = ConditionalBatchNorm2d(hidden, condition)
        self.conv3 = SpectralConv2d(hidden, hidden)
        self.bn4 = ConditionalBatchNorm2d(hidden, condition)
        self.conv4 = SpectralConv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """x [N, Cin, H, W], y [N, dims] for the norms -> [N, Cout, up H, up W]."""
        h = self.conv1(self.bn1(x, y))
        h = self.conv2(self.bn2(h, y))
        h = self.conv3(self.bn3(h, y))
        h = self.conv4(self.bn4(h, y))
        x = x[:, : self.out_channels]
        return h + (F.interpolate(x, scale_factor=2) if self.up > 1 else x)


class DeepDownBlock(nn.Module):
    """x [N, Cin, H, W] -> [N, Cout, H / down, W / down] through a bottleneck; the shortcut adds channels."""

    def __init__(self, in_channels: int, out_channels: int, down: int):
        super().__init__()
        hidden = max(out_channels // RATIO, 1)
        self.down = down
        self.conv1 = SpectralConv2d(in_channels, hidden, 1, act="relu")
        self.conv2 = SpectralConv2d(hidden, hidden, act="relu")
        self.conv3 = SpectralConv2d(hidden, hidden, act="relu")
        self.conv4 = SpectralConv2d(hidden, out_channels, 1, down=down)
        more = out_channels - in_channels
        self.conv_sc = SpectralConv2d(in_channels, more, 1) if more > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, H / down, W / down]."""
        h = self.conv4(self.conv3(self.conv2(self.conv1(F.relu(x)))))
        x = F.avg_pool2d(x, 2) if self.down > 1 else x
        return h + (x if self.conv_sc is None else torch.cat([x, self.conv_sc(x)], dim=1))


class Generator(ResidualGenerator):
    """z [N, z_dim] and one-hot labels c [N, c_dim] -> images [N, channels, R, R] in (-1, 1).

    The labels' embedding, of shared_dim numbers, sets the gain and shift of every BatchNorm but the last
    through linear maps; shared_dim 0 gives each BatchNorm an embedding of its own. With `hier` z comes in
    equal chunks: one for the first layer, one for each block, beside the embedding (section 3.1). `deep`
    (appendix B) gives embedding and z whole to the first layer and all blocks; `hier` is then no matter.
    """

    def __init__(
        self,
        z_dim: int = 120,
        c_dim: int = 0,
        resolution: int = 128,
        channels: int = 3,
        ngf: int = 96,
        attention: int = 64,
        shared_dim: int = 128,
        hier: bool = True,
        deep: bool = False,
        dtype: torch.dtype | None = None,
        attention_behind: Sequence[int] | None = None,
    ):
        _check_resolution(resolution)
        k = doublings(resolution)
        embedded = (shared_dim or c_dim) if c_dim > 0 else 0
        if deep:
            first, seen = embedded + z_dim, embedded + z_dim
        elif hier:
            if z_dim % (k + 1):
                raise ValueError(
                    f"z_dim must be a multiple of {k + 1} with hier, for the first layer and {k} blocks at "
                    f"resolution {resolution}: got {z_dim}"
                )
            first, seen = z_dim // (k + 1), embedded + z_dim // (k + 1)
        else:
            first, seen = z_dim, embedded

        def own_embedding(width: int) -> nn.Module:
            return Embedding(c_dim, width)

        def linear_map(width: int) -> nn.Module:
            return spectral_linear(seen, width, bias=False)

        only_labels = not (deep or hier or (c_dim > 0 and shared_dim > 0))
        condition = (own_embedding if only_labels else linear_map) if seen > 0 else None
        outs = [ngf * width for width in G_WIDTHS[resolution]]
        widths = [outs[0], *outs]
        stages: list[list[nn.Module]] = []
        for a, b in itertools.pairwise(widths):
            if deep:
                stages.append([DeepUpBlock(a, a, condition, 1), DeepUpBlock(a, b, condition, 2)])
            else:
                stages.append([UpBlock(a, b, condition)])
        sides = [8 << i for i in range(k)]
        blocks = with_attention(stages, outs, sides, attention, attention_behind)
        super().__init__(z_dim, c_dim, first, (widths[0], widths[-1]), blocks, channels, dtype)
        self.chunks = k + 1 if hier and not deep else 1
        self.deep = deep
        self.shared = None
        if c_dim > 0 and shared_dim > 0:
            self.shared = nn.Embedding(c_dim, shared_dim)
            nn.init.orthogonal_(self.shared.weight)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        y: list[Tensor] = []
        if self.c_dim > 0:
            c = require_labels(c, self.c_dim).to(z.dtype)
            y = [c if self.shared is None else c @ self.shared.weight]
        if self.deep:
            z = torch.cat([*y, z], dim=1)
            return self.synthesize(z, itertools.repeat(z))
        if self.chunks > 1:
            z, *rest = z.chunk(self.chunks, dim=1)
            return self.synthesize(z, [torch.cat([*y, chunk], dim=1) for chunk in rest])
        return self.synthesize(z, itertools.repeat(y[0] if y else None))


class Discriminator(ProjectionDiscriminator):
    """Images [N, channels, R, R] and one-hot labels c [N, c_dim] -> logits [N, 1]."""

    def __init__(
        self,
        c_dim: int = 0,
        resolution: int = 128,
        channels: int = 3,
        ndf: int = 96,
        attention: int = 64,
        deep: bool = False,
        dtype: torch.dtype | None = None,
        attention_behind: Sequence[int] | None = None,
    ):
        _check_resolution(resolution)
        outs = [ndf * width for width in D_WIDTHS[resolution]]
        halvings = min(doublings(resolution), 2) if resolution <= 32 else doublings(resolution)
        if deep:
            stem, widths = [SpectralConv2d(channels, outs[0])], outs
        else:
            stem, widths = [], [channels, *outs]
        stages: list[list[nn.Module]] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            down = 2 if i < halvings else 1
            if deep:
                stages.append([DeepDownBlock(a, b, down), DeepDownBlock(b, b, 1)])
            else:
                stages.append([DownBlock(a, b, down, first=i == 0)])
        sides = [resolution >> min(i + 1, halvings) for i in range(len(stages))]
        blocks = with_attention(stages, widths[1:], sides, attention, attention_behind)
        super().__init__([*stem, *blocks], outs[-1], c_dim, dtype)
