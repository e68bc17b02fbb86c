"""ProGAN (Karras et al. 2017, "Progressive Growing of GANs for Improved Quality, Stability, and Variation",
arXiv:1710.10196).

Both networks grow from 4x4 to `resolution`: `grow(s)` makes them work at 4 * 2^s pixels, and between whole
numbers a new resolution fades in (figure 2). The side that they work at, `stage`, is part of the program and
makes new graphs; the share of the new branch is data, read from the buffer `growth`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.equalized import BOX, Conv2d, DiscriminatorEpilogue, FullyConnected, channels_up_to
from fastgan.kernels.pixel_norm import pixel_norm


def schedule(images: int, fade_kimg: float, stable_kimg: float, stages: int) -> float:
    """Growth after `images` images: `stable_kimg` thousand at 4x4, then for each of the `stages` doublings
    `fade_kimg` of fading in and `stable_kimg` of training on (appendix A.1: 800 each)."""
    since = images / 1000 - stable_kimg
    if since < 0:
        return 0.0
    if fade_kimg + stable_kimg <= 0:
        return float(stages)
    stage, kimg = divmod(since, fade_kimg + stable_kimg)
    return min(stage + (min(kimg / fade_kimg, 1.0) if fade_kimg > 0 else 1.0), float(stages))


def match_reals(real: Tensor, stage: int, growth: Tensor | float) -> Tensor:
    """Real images [N, C, R, R] as a generator of that `growth` would show them: [N, C, 4 * 2^stage, ...].

    Means over boxes; while the stage fades in, x = lerp(upsample(downsample(x)), x, growth - stage + 1)
    (the public implementation's `process_reals`).
    """
    real = F.avg_pool2d(real, real.shape[-1] // (4 << stage))
    if stage == 0:
        return real
    return _fade(_double(F.avg_pool2d(real, 2)), real, growth - (stage - 1))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


def _fade(old: Tensor, new: Tensor, alpha: Tensor | float) -> Tensor:
    """In old's dtype, and exactly `new` at alpha 1."""
    return (1 - alpha) * old + alpha * new


class _Growing(nn.Module):
    """`growth` from 0 (4x4 alone) to `stages`, where a network starts; the stage is growth rounded up."""

    growth: Tensor

    def __init__(self, resolution: int):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two from 8 on: got {resolution}")
        self.stages = resolution.bit_length() - 3
        self.stage = self.stages
        self.register_buffer("growth", torch.tensor(float(self.stages), dtype=torch.float32))

    def grow(self, growth: float) -> None:
        """Work at `growth`, filled into the buffer in place, where recordings read it."""
        if not 0 <= growth <= self.stages:
            raise ValueError(f"growth must lie between 0 and {self.stages}: got {growth}")
        self.growth.fill_(growth)
        self.stage = math.ceil(torch.tensor(growth, dtype=torch.float32).item())  # as a checkpoint will say

    def match_reals(self, real: Tensor) -> Tensor:
        """`match_reals` at this network's growth."""
        return match_reals(real, self.stage, self.growth)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.grow(self.growth.item())

    @property
    def alpha(self) -> Tensor:
        """Share of the newest branch, in (0, 1]."""
        return self.growth - (self.stage - 1)


class _NormedConv2d(Conv2d):
    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return pixel_norm(super().forward(x, gain))


class Generator(_Growing):
    """z [N, z_dim] (and labels c [N, c_dim]) -> images [N, channels, 4 * 2^stage, ...] around [-1, 1].

    Nearest upsampling, two 3x3 convolutions with leaky ReLU and pixel norm a resolution, linear 1x1 outputs.
    `widths` are the channels at 4, 8, ... pixels in place of those that channel_base and channel_max give.
    """

    uniforms = 0

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        resolution: int = 1024,
        channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        dtype: torch.dtype | None = None,
        widths: Sequence[int] | None = None,
    ):
        super().__init__(resolution)
        self.z_dim = self.normals = z_dim
        self.c_dim, self.dtype = c_dim, dtype
        widths = channels_up_to(resolution, channel_base, channel_max, widths)
        self.dense = FullyConnected(z_dim + c_dim, 16 * widths[0], "lrelu")
        self.blocks = nn.ModuleList([nn.Sequential(_NormedConv2d(widths[0], widths[0], 3, "lrelu"))])
        for old, new in itertools.pairwise(widths):
            up = _NormedConv2d(old, new, 3, "lrelu", up=2, taps=BOX)
            self.blocks.append(nn.Sequential(up, _NormedConv2d(new, new, 3, "lrelu")))
        self.torgb = nn.ModuleList(Conv2d(width, channels, 1) for width in widths)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        x = pixel_norm(z)
        if self.c_dim > 0:
            if c is None:
                raise ValueError(f"c must be given to a conditional network: labels [N, {self.c_dim}]")
            x = torch.cat([x, pixel_norm(c)], dim=1)
        precise = x.dtype
        x = self.dense(x).to(self.dtype or precise)
        x = old = pixel_norm(x.reshape(x.shape[0], -1, 4, 4))
        for block in self.blocks[: self.stage + 1]:
            old, x = x, block(x)
        images = self.torgb[self.stage](x).to(precise)
        if self.stage == 0:
            return images
        return _fade(_double(self.torgb[self.stage - 1](old).to(precise)), images, self.alpha)

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, z_dim], uniform [N, 0]."""
        return self(normal, c), normal


class Discriminator(_Growing):
    """Images [N, channels, 4 * 2^stage, ...] (and labels c [N, c_dim]) -> logits [N, 1].

    The generator's mirror image; with labels the last layer has a logit for each class. `mbstd_channels` 0
    leaves the minibatch standard deviation out.
    """

    def __init__(
        self,
        c_dim: int = 0,
        resolution: int = 1024,
        channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        mbstd_group: int = 4,
        dtype: torch.dtype | None = None,
        widths: Sequence[int] | None = None,
        mbstd_channels: int = 1,
    ):
        super().__init__(resolution)
        self.c_dim, self.dtype = c_dim, dtype
        widths = channels_up_to(resolution, channel_base, channel_max, widths)
        self.fromrgb = nn.ModuleList(Conv2d(channels, width, 1, "lrelu") for width in widths)
        self.blocks = nn.ModuleList()
        for old, new in itertools.pairwise(widths):
            self.blocks.append(nn.Sequential(Conv2d(new, new, 3, "lrelu"), Conv2d(new, old, 3, "lrelu")))
        self.b4 = DiscriminatorEpilogue(
            widths[0],
            c_dim,
            channels,
            mbstd_group_size=mbstd_group,
            mbstd_num_channels=mbstd_channels,
        )

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The last hidden layer [N, channels at 4x4]."""
        side = 4 << self.stage
        if img.shape[-1] != side:
            raise ValueError(
                f"images must be {side} pixels wide at growth stage {self.stage} (match_reals): "
                f"got {list(img.shape)}"
            )
        precise = img.dtype
        img = img.to(self.dtype or precise)
        x = self.fromrgb[self.stage](img)
        for stage in range(self.stage, 0, -1):
            x = F.avg_pool2d(self.blocks[stage - 1](x), 2)
            if stage == self.stage:
                x = _fade(self.fromrgb[stage - 1](F.avg_pool2d(img, 2)), x, self.alpha)
        return self.b4.features(x.to(precise))

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of what `features` returns."""
        if self.c_dim > 0 and c is None:
            raise ValueError(f"c must be given to a conditional network: labels [N, {self.c_dim}]")
        return self.b4.head(features, c if self.c_dim > 0 else None)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and one-hot labels c [N, c_dim]."""
        return self.head(self.features(img), c)
