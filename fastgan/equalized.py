"""Equalized layers and what hangs on them: the blocks of ProGAN, StyleGAN and StyleGAN2."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.pixel_norm import pixel_norm
from fastgan.kernels.upfirdn2d import setup_filter

BLUR = (1, 3, 3, 1)
BOX = (1, 1)  # nearest upsampling, mean of 2x2 pixels


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Channels of the layers at `resolution`."""
    return min(channel_base // resolution, channel_max)


def channels_up_to(
    resolution: int, channel_base: int, channel_max: int, widths: Sequence[int] | None = None
) -> list[int]:
    """Channels at 4, 8, ..., `resolution` pixels: `channels_at` each, or `widths`, where those are given."""
    sides = [2**i for i in range(2, resolution.bit_length())]
    if widths is not None and len(widths) != len(sides):
        raise ValueError(f"widths must be {len(sides)} for resolution {resolution}: got {list(widths)}")
    return list(widths or (channels_at(r, channel_base, channel_max) for r in sides))


class FullyConnected(nn.Module):
    """y = act(x W^T * lr_multiplier / sqrt(in) + b * lr_multiplier), equalized learning rate."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init)))
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_features] -> activation(x w^T + b) [N, out_features]."""
        w = self.weight * self.weight_gain
        b = self.bias * self.bias_gain if self.bias_gain != 1 else self.bias
        if self.activation == "linear":
            return torch.addmm(b, x, w.t())
        return bias_act(x @ w.t(), b, act=self.activation)


class Conv2d(nn.Module):
    """Equalized convolution with FIR up- or downsampling, bias and activation: x [N, Cin, H, W]."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        bias: bool = True,
        conv_clamp: float | None = None,
        taps: Sequence[float] = BLUR,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(taps), persistent=False)
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """`gain` multiplies the activation's own; sqrt(1/2) joins two residual branches at unit variance."""
        f = self.resample_filter if self.up > 1 or self.down > 1 else None
        w = self.weight * self.weight_gain
        return conv2d_resample(
            x,
            w,
            f,
            self.up,
            self.down,
            self.padding,
            flip_weight=self.up == 1,
            bias=self.bias,
            act=self.activation,
            gain=gain * (1.0 if self.activation == "linear" else math.sqrt(2)),
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )


class Mapping(nn.Module):
    """z [N, z_dim] (and labels c [N, c_dim]) -> w [N, num_ws, w_dim], with a running mean of w.

    num_ws None returns [N, w_dim] and keeps no mean: the discriminator's embedding of the label. Labels are
    embedded in `embed_features` dimensions, hidden layers have `layer_features`: w_dim of both by default.
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.995,
        embed_features: int | None = None,
        layer_features: int | None = None,
    ):
        super().__init__()
        if z_dim == 0 and c_dim == 0:
            raise ValueError("a mapping network needs z_dim or c_dim above 0")
        self.z_dim, self.c_dim, self.num_ws, self.w_avg_beta = z_dim, c_dim, num_ws, w_avg_beta
        if c_dim > 0:
            self.embed = FullyConnected(c_dim, embed_features or w_dim)
        widths = [z_dim + (self.embed.bias.numel() if c_dim > 0 else 0)]
        widths += [layer_features or w_dim] * (num_layers - 1) + [w_dim] * (num_layers > 0)
        self.layers: list[str] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            self.add_module(f"fc{i}", FullyConnected(fan_in, fan_out, "lrelu", lr_multiplier))
            self.layers.append(f"fc{i}")
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = False,
    ) -> Tensor:
        """w = w_avg + truncation * (w - w_avg) on the first `truncation_cutoff` layers (all by default)."""
        parts = []
        if self.z_dim > 0:
            if z is None:
                raise ValueError(f"z must be given: [N, {self.z_dim}]")
            parts.append(pixel_norm(z))
        if self.c_dim > 0:
            if c is None:
                raise ValueError(f"c must be given to a conditional network: labels [N, {self.c_dim}]")
            parts.append(pixel_norm(self.embed(c)))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for name in self.layers:
            x = getattr(self, name)(x)
        if self.num_ws is None:
            return x
        if update_w_avg and self.w_avg_beta is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        x = x[:, None].expand(-1, self.num_ws, -1)
        if truncation == 1:
            return x
        near = self.w_avg.lerp(x, truncation)
        if truncation_cutoff is None:
            return near
        return torch.cat([near[:, :truncation_cutoff], x[:, truncation_cutoff:]], dim=1)


class StyleGenerator(nn.Module):
    """A mapping and a synthesis network.

    A training sample takes `normals` unit normal numbers (z, a second z to mix with, noise) and `uniforms`
    uniform ones (whether and from which layer on to mix); `sample` turns them into images.
    """

    z_dim: int
    c_dim: int
    style_mixing: float
    noise: str  # in training: "random", "const" or "none"
    mapping: Mapping
    synthesis: Any  # (ws [N, num_ws, w_dim], noise) -> images; has num_ws and noise_size

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Tensor | str = "const",
    ) -> Tensor:
        """z [N, z_dim] and labels c [N, c_dim] -> images [N, C, R, R] around [-1, 1]."""
        return self.synthesis(self.mapping(z, c, truncation, truncation_cutoff), noise)

    @property
    def normals(self) -> int:
        """Normal numbers of a training sample: z, another z to mix with, noise."""
        noise_size = self.synthesis.noise_size if self.noise == "random" else 0
        return self.z_dim * (2 if self.style_mixing > 0 else 1) + noise_size

    @property
    def uniforms(self) -> int:
        """Uniform numbers of a training sample: whether and where styles are mixed."""
        return 2 if self.style_mixing > 0 else 0

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the ws [N, num_ws, w_dim] behind them; moves the running mean of w.

        normal [N, normals], uniform [N, uniforms]. Style mixing (Karras et al. 2018, section 3.1): with
        probability `style_mixing`, the layers from a uniformly drawn one on take the w of a second z.
        """
        z, rest = normal[:, : self.z_dim], normal[:, self.z_dim :]
        ws = self.mapping(z, c, update_w_avg=True)
        if self.style_mixing > 0:
            ws2 = self.mapping(rest[:, : self.z_dim], c)
            rest = rest[:, self.z_dim :]
            crossover = 1 + (uniform[:, 1] * (ws.shape[1] - 1)).long()
            crossover = torch.where(uniform[:, 0] < self.style_mixing, crossover, ws.shape[1])
            layer = torch.arange(ws.shape[1], device=ws.device)
            ws = torch.where((layer < crossover[:, None])[:, :, None], ws, ws2)
        return self.synthesis(ws, rest if self.noise == "random" else self.noise), ws


def layer_noises(layers: Sequence[Any], noise: Tensor | str) -> list[Tensor | None]:
    """What each of a synthesis network's `layers` adds: its own `noise_const` [R, R] ("const"), nothing
    ("none"), or [N, 1, R, R] of the unit normal numbers given for them all [N, sum of R^2]."""
    if isinstance(noise, Tensor):
        sides = [layer.noise_const.shape[-1] for layer in layers]
        drawn = noise.split([side**2 for side in sides], dim=1)
        return [n.reshape(-1, 1, side, side) for n, side in zip(drawn, sides, strict=True)]
    if noise not in ("const", "none"):
        raise ValueError(f"noise must be 'const', 'none' or a tensor: got {noise!r}")
    return [layer.noise_const if noise == "const" else None for layer in layers]


class DiscriminatorEpilogue(nn.Module):
    """The last 4x4: minibatch standard deviation, convolution, two dense layers, projection on the label.

    x [N, Cin, 4, 4] -> features [N, Cin] -> logits [N, 1].
    """

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        img_channels: int,
        architecture: str = "orig",
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.cmap_dim = cmap_dim
        self.mbstd_group_size, self.mbstd_num_channels = mbstd_group_size, mbstd_num_channels
        self.fromrgb = Conv2d(img_channels, in_channels, 1, "lrelu") if architecture == "skip" else None
        self.conv = Conv2d(in_channels + mbstd_num_channels, in_channels, 3, "lrelu", conv_clamp=conv_clamp)
        self.fc = FullyConnected(in_channels * 16, in_channels, "lrelu")
        self.out = FullyConnected(in_channels, cmap_dim or 1)

    def features(self, x: Tensor, img: Tensor | None = None) -> Tensor:
        """Maps [N, C, 4, 4] (and the image at that size) -> [N, C]."""
        if self.fromrgb is not None and img is not None:
            x = x + self.fromrgb(img)
        if self.mbstd_num_channels > 0:
            x = minibatch_stddev(x, self.mbstd_group_size, self.mbstd_num_channels)
        return self.fc(self.conv(x).flatten(1))

    def head(self, features: Tensor, cmap: Tensor | None = None) -> Tensor:
        """Features [N, C] -> logits [N, 1], projected on the mapped labels [N, cmap_dim]."""
        x = self.out(features)
        if cmap is not None:
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x
