"""R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern Baseline GAN", arXiv:2501.05441).

A ResNeXt body for both networks: no normalization, no styles, no minibatch statistics. Each has a stage for
every resolution from 4 on, `blocks` residual blocks a stage. At resolution r a stage is
min(width, channel_base / r) channels wide, with groups in the proportion that `cardinality` has to `width`.
The defaults are the public implementation's for CIFAR-10 and FFHQ: 768 up to 32 pixels, then 384, 192 and 96.
`sizes` states channels, groups and blocks of each stage instead, from 4 pixels on. All layers run in `dtype`,
where the public one keeps the smallest stages in fp32.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.grouped_conv2d import grouped_conv2d
from fastgan.kernels.upfirdn2d import downsample2d, setup_filter, upsample2d

SLOPE = 0.2
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # of LeakyReLU in a weight's initial deviation: activations have none
BLUR = (1, 3, 3, 1)


def _normal(gain: float, fan_in: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (gain / math.sqrt(fan_in)))


def stage_sizes(width: int, cardinality: int, resolution: int, channel_base: int) -> list[tuple[int, int]]:
    """(channels, groups) of the stages at 4, 8, ..., resolution."""
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two from 8 on: got {resolution}")
    sizes = []
    for r in (2**i for i in range(2, resolution.bit_length())):
        channels = min(width, channel_base // r)
        groups = cardinality * channels // width
        if groups < 1 or cardinality * channels % width or channels % groups:
            raise ValueError(
                f"cardinality {cardinality} of width {width} makes no groups of the {channels} channels at "
                f"{r} pixels; use a width that cardinality divides, and a channel_base of 2^k * width"
            )
        sizes.append((channels, groups))
    return sizes


class Pointwise(nn.Module):
    """1x1 convolution, x [N, Cin, H, W] -> [N, Cout, H, W]: a product of all pixels with weight [Cout, Cin].

    A product's derivatives are products; those of a convolution's weight take 1.2 times as long on a CPU.
    """

    def __init__(self, fan_in: int, fan_out: int, gain: float = 1.0):
        super().__init__()
        self.weight = _normal(gain, fan_in, fan_out, fan_in)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, Cin, H, W] -> [N, Cout, H, W]."""
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).reshape(-1, c) @ self.weight.to(x.dtype).t()
        return y.reshape(n, h, w, -1).permute(0, 3, 1, 2)


class GroupedConv2d(nn.Module):
    """Square convolution in groups, without a bias."""

    def __init__(self, channels: int, groups: int, kernel: int, gain: float):
        super().__init__()
        fan_in = channels // groups
        self.groups = groups
        self.weight = _normal(gain, fan_in * kernel**2, channels, fan_in, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, Cin, H, W] -> [N, Cout, H, W]."""
        return grouped_conv2d(x, self.weight, self.groups)


class Block(nn.Module):
    """x + W3 act(W2 act(W1 x + b1) + b2): 1x1 to `expansion` times as many channels, grouped k x k, 1x1 back.

    With L blocks in the network W1 and W2 start L^(-1/4) as large as usual and W3 at zero, which makes up for
    the missing normalization (Fixup, Zhang et al. 2019, arXiv:1901.09321).
    """

    def __init__(self, channels: int, groups: int, expansion: int, kernel: int, depth: int):
        super().__init__()
        inner, gain = channels * expansion, GAIN * depth**-0.25
        self.conv1 = Pointwise(channels, inner, gain)
        self.conv2 = GroupedConv2d(inner, groups, kernel, gain)
        self.conv3 = Pointwise(inner, channels, 0.0)
        self.bias1 = nn.Parameter(torch.zeros(inner))
        self.bias2 = nn.Parameter(torch.zeros(inner))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> the same shape; scale multiplies the biases."""
        y = _bias_lrelu(self.conv1(x), self.bias1, scale)
        y = _bias_lrelu(self.conv2(y), self.bias2, scale)
        return x + self.conv3(y)


def _bias_lrelu(x: Tensor, b: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        x = x + (scale * b)[:, :, None, None].to(x.dtype)
    return bias_act(x, b if scale is None else None, act="lrelu", alpha=SLOPE, gain=1.0)


class Stage(nn.ModuleList):
    """The residual blocks of one resolution."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Block after block; scale multiplies their biases."""
        for block in self:
            x = block(x, scale)
        return x


def _sizes(
    width: int,
    cardinality: int,
    resolution: int,
    channel_base: int,
    blocks: int,
    given: Sequence[Sequence[int]] | None,
) -> list[tuple[int, int, int]]:
    """(channels, groups, blocks) of the stages at 4, 8, ..., resolution."""
    if given is None:
        stages = stage_sizes(width, cardinality, resolution, channel_base)
        return [(channels, groups, blocks) for channels, groups in stages]
    if resolution != 2 << len(given):
        raise ValueError(f"sizes must be of the stages at 4, 8, ..., {resolution} pixels: got {len(given)}")
    return [(channels, groups, blocks) for channels, groups, blocks in given]


def _stages(sizes: list[tuple[int, int, int]], expansion: int, kernel: int) -> nn.ModuleList:
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd: got {kernel}")
    depth = sum(blocks for _, _, blocks in sizes)
    return nn.ModuleList(
        Stage(Block(channels, groups, expansion, kernel, depth) for _ in range(blocks))
        for channels, groups, blocks in sizes
    )


def _transition(fan_in: int, fan_out: int) -> nn.Module:
    return nn.Identity() if fan_in == fan_out else Pointwise(fan_in, fan_out)


def _check_labels(c: Tensor | None, c_dim: int) -> None:
    if c_dim > 0 and c is None:
        raise ValueError(f"this network is conditional: it needs labels c [N, {c_dim}]")


class Generator(nn.Module):
    """z [N, z_dim] (and one-hot labels c [N, c_dim], embedded in `embed_dim` or z_dim dimensions) -> images
    [N, C, R, R].

    A learned 4x4 basis, weighted channel by channel by a product of z; then in every stage, but for the first
    behind a 2x upsampling, residual blocks. Images have no final nonlinearity.
    """

    resample_filter: Tensor
    uniforms = 0

    def __init__(
        self,
        z_dim: int = 64,
        c_dim: int = 0,
        resolution: int = 32,
        channels: int = 3,
        width: int = 768,
        cardinality: int = 96,
        blocks: int = 2,
        expansion: int = 2,
        kernel: int = 3,
        channel_base: int = 24576,
        dtype: torch.dtype | None = None,
        sizes: Sequence[Sequence[int]] | None = None,
        embed_dim: int | None = None,
    ):
        super().__init__()
        self.z_dim = self.normals = z_dim
        self.c_dim, self.dtype = c_dim, dtype
        stages = _sizes(width, cardinality, resolution, channel_base, blocks, sizes)
        widths = [w for w, _, _ in stages]
        inputs = z_dim
        if c_dim > 0:
            self.embedding = _normal(1.0, c_dim, embed_dim or z_dim, c_dim)
            inputs += len(self.embedding)
        self.project = _normal(1.0, inputs, widths[0], inputs)
        self.basis = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.stages = _stages(stages, expansion, kernel)
        self.transitions = nn.ModuleList(map(_transition, widths[:-1], widths[1:]))
        self.to_rgb = Pointwise(widths[-1], channels)
        self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        _check_labels(c, self.c_dim)
        if c is not None and self.c_dim > 0:
            z = torch.cat([z, F.linear(c, self.embedding)], dim=1)
        x = F.linear(z, self.project)[:, None, None] * self.basis.permute(1, 2, 0)  # channels_last
        x = self.stages[0](x.permute(0, 3, 1, 2).to(self.dtype or z.dtype))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(upsample2d(transition(x), self.resample_filter))
        return self.to_rgb(x).to(z.dtype)

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, z_dim], uniform [N, 0]."""
        return self(normal, c), normal


class Discriminator(nn.Module):
    """Images [N, C, R, R] (and labels c [N, c_dim]) -> logits [N, 1]: the generator's body in reverse.

    A stage's 2x downsampling comes behind its blocks; a basis of 4x4, one for each channel, ends the last.
    With labels the logit is <W features, E c>, the product with the label's embedding, in `embed_dim`
    dimensions or as many as the last stage has channels.

    `scale` [N, 1] multiplies all biases of a sample. Logits are piecewise linear in the image and homogeneous
    in (image, scale), which `losses.homogeneous_logits` makes use of.
    """

    homogeneous = True
    resample_filter: Tensor

    def __init__(
        self,
        c_dim: int = 0,
        resolution: int = 32,
        channels: int = 3,
        width: int = 768,
        cardinality: int = 96,
        blocks: int = 2,
        expansion: int = 2,
        kernel: int = 3,
        channel_base: int = 24576,
        dtype: torch.dtype | None = None,
        sizes: Sequence[Sequence[int]] | None = None,
        embed_dim: int | None = None,
    ):
        super().__init__()
        self.c_dim, self.dtype = c_dim, dtype
        stages = _sizes(width, cardinality, resolution, channel_base, blocks, sizes)[::-1]
        widths = [w for w, _, _ in stages]
        self.from_rgb = Pointwise(channels, widths[0])
        self.stages = _stages(stages, expansion, kernel)
        self.transitions = nn.ModuleList(map(_transition, widths[:-1], widths[1:]))
        last = widths[-1]
        self.basis = _normal(1.0, 16, last, 4, 4)
        outputs = (embed_dim or last) if c_dim > 0 else 1
        self.project = _normal(1.0, last, outputs, last)
        if c_dim > 0:
            self.embedding = _normal(outputs**-0.5, c_dim, outputs, c_dim)
        self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)

    def features(self, img: Tensor, c: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """The last hidden representation [N, width]."""
        x = self.from_rgb(img.to(self.dtype or img.dtype))
        for stage, transition in zip(self.stages[:-1], self.transitions, strict=True):
            x = transition(downsample2d(stage(x, scale), self.resample_filter))
        return (self.stages[-1](x, scale).to(img.dtype) * self.basis).sum(dim=(2, 3))

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1]."""
        _check_labels(c, self.c_dim)
        y = F.linear(features, self.project)
        return y if c is None or self.c_dim == 0 else (y * F.linear(c, self.embedding)).sum(1, keepdim=True)

    def forward(self, img: Tensor, c: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and labels c [N, c_dim]; `scale` multiplies all biases."""
        return self.head(self.features(img, c, scale), c)
