"""DCGAN (Radford, Metz and Chintala 2015, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", arXiv:1511.06434).

Layers stand in the order of pytorch/examples' dcgan, so its weights load as they are. The discriminator
returns logits where that example applies a sigmoid.

From the image down, maps halve and widths double to a map of 4 or 7 pixels: with ngf 64, 64 pixels have
widths 512, 256, 128 and 64 and 28 pixels have 128 and 64. `blocks` asks for another number of halvings, which
round up: resolution 28, blocks 4, ngf = ndf = 128 and dropout 0.3 is the variant with 1024, 512, 256, 128 and
3 channels on maps of 2, 4, 7, 14 and 28 pixels.

For networks that were made elsewhere `widths` states the channels of all maps and `kernels` the kernel of
each layer between two of them, and `bias` gives every layer one.

With labels the generator's z is joined by them, and the discriminator is a projection discriminator (Miyato
and Koyama 2018, arXiv:1802.05637): logit = <w + V c, features>, w being its last convolution.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan.layers import project, run_layers, with_labels, with_noise

NORMS = ("batch", "layer", "instance", "none")


def sides(resolution: int, blocks: int = 0) -> list[int]:
    """Sides of the maps from the smallest to the image: 64 -> 4, 8, 16, 32, 64 and 28 -> 7, 14, 28; with
    `blocks` above 0 that many halvings rounded up, 28 by 4 -> 2, 4, 7, 14, 28."""
    if blocks > 0:
        halves = [-(-resolution >> i) for i in range(blocks, -1, -1)]
        if halves[0] < 2:
            raise ValueError(f"blocks {blocks} halves resolution {resolution} below 2 pixels: use fewer")
        return halves
    for start in (4, 7):
        doublings = (resolution // start).bit_length() - 1
        if doublings >= 1 and start << doublings == resolution:
            return [start << i for i in range(doublings + 1)]
    raise ValueError(
        f"resolution must be 4 or 7 times a power of two, from 8 on, or blocks be given: got {resolution}"
    )


def _init(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm's scale (section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _sizes(
    kernel: int,
    maps: list[int],
    kernels: Sequence[int] | None,
    width: int,
    widths: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Kernels of the layers and channels of the maps, from the smallest map on, without the image's."""
    if kernels is None:
        if kernel not in (4, 5):
            raise ValueError(f"kernel must be 4 or 5: got {kernel}")
        kernels = [kernel] * (len(maps) - 1)
    if widths is None:
        widths = [width << i for i in range(len(maps) - 2, -1, -1)]
    if not len(kernels) == len(widths) == len(maps) - 1:
        raise ValueError(
            f"kernels and widths must be {len(maps) - 1} for maps of {maps} pixels: "
            f"got {len(kernels)} and {len(widths)}"
        )
    return list(kernels), list(widths)


def _norm(norm: str, width: int) -> list[nn.Module]:
    """Layer norm with a scale a channel, as in Gulrajani et al. 2017's code."""
    if norm == "batch":
        return [nn.BatchNorm2d(width)]
    if norm == "layer":
        return [nn.GroupNorm(1, width)]
    return [nn.InstanceNorm2d(width, affine=True)] if norm == "instance" else []


class Generator(nn.Module):
    """z [N, z_dim], labels [N, c_dim] -> images [N, channels, R, R] in (-1, 1): transposed convolutions,
    BatchNorm, ReLU, tanh."""

    uniforms = 0

    def __init__(
        self,
        z_dim: int = 100,
        ngf: int = 64,
        channels: int = 3,
        resolution: int = 64,
        kernel: int = 4,
        dtype: torch.dtype | None = None,
        c_dim: int = 0,
        blocks: int = 0,
        widths: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        bias: bool = False,
    ):
        super().__init__()
        maps = sides(resolution, blocks)
        self.z_dim = self.normals = z_dim
        self.c_dim, self.dtype = c_dim, dtype
        kernels, hidden = _sizes(kernel, maps, kernels, ngf, widths)
        layers: list[nn.Module] = [nn.ConvTranspose2d(z_dim + c_dim, hidden[0], maps[0], 1, 0, bias=bias)]
        for fan_in, fan_out, side, k in zip(hidden, [*hidden[1:], channels], maps[1:], kernels, strict=True):
            layers += [nn.BatchNorm2d(fan_in), nn.ReLU()]
            extra = (k - side) % 2
            layers.append(nn.ConvTranspose2d(fan_in, fan_out, k, 2, _padding(k, side), extra, bias=bias))
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(_init)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        *hidden, tanh = self.main
        z = with_labels(z, c, self.c_dim)
        return tanh(run_layers(hidden, z[:, :, None, None], self.dtype).to(z.dtype))

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, z_dim], uniform [N, 0]."""
        return self(normal, c), normal


class Discriminator(nn.Module):
    """Images [N, channels, R, R], labels [N, c_dim] -> logits [N, 1]: strided convolutions, BatchNorm,
    LeakyReLU, dropout.

    `norm` is "batch", or for a critic that must see each image alone (wgan_gp.py) "layer", "instance" or
    "none", which have biases where nothing normalises. Without biases and behind BatchNorm, as the paper has
    it, an image and a multiple of it look the same, and generated pictures stay gray. Gaussian noise of
    deviation `instance_noise` on every training image (Sønderby et al. 2017, arXiv:1610.04490) sets a scale,
    and keeps D from learning a small data set by heart.
    """

    def __init__(
        self,
        ndf: int = 64,
        channels: int = 3,
        resolution: int = 64,
        kernel: int = 4,
        slope: float = 0.2,
        dropout: float = 0.0,
        instance_noise: float = 0.0,
        dtype: torch.dtype | None = None,
        c_dim: int = 0,
        blocks: int = 0,
        norm: str = "batch",
        widths: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}: got {norm!r}")
        maps = sides(resolution, blocks)
        self.c_dim, self.dtype = c_dim, dtype
        self.instance_noise = instance_noise
        bare = bias or norm != "batch"  # whether convolutions with no normalisation behind them have a bias
        kernels, hidden = _sizes(kernel, maps, kernels, ndf, widths)
        hidden = [channels, *hidden[::-1]]
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(hidden)):
            k, side = kernels[-1 - i], maps[-1 - i]
            behind = _norm(norm, fan_out) if i > 0 else []
            layers.append(
                nn.Conv2d(fan_in, fan_out, k, 2, _padding(k, side), bias=bias or (bare and not behind))
            )
            layers += [*behind, nn.LeakyReLU(slope)]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.main = nn.Sequential(*layers, nn.Conv2d(hidden[-1], 1, maps[0], 1, 0, bias=bare))
        self.embed = nn.Embedding(c_dim, hidden[-1] * maps[0] ** 2) if c_dim else None
        self.apply(_init)

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The last hidden map [N, C, 4, 4] (or 7), in `dtype`."""
        img = with_noise(img, self.instance_noise, self.training)
        return run_layers(list(self.main)[:-1], img, self.dtype)

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of what `features` returns."""
        logits = run_layers([self.main[-1]], features, self.dtype).flatten(1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return project(logits, features, c, self.embed)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and one-hot labels c [N, c_dim]."""
        return self.head(self.features(img), c)


def _padding(kernel: int, side: int) -> int:
    """Of a convolution of stride 2 from `side` pixels to half as many, rounded up, and of its transpose."""
    return kernel // 2 if side % 2 else (kernel - 1) // 2
