"""StyleGAN (Karras et al. 2018, "A Style-Based Generator Architecture for Generative Adversarial Networks",
arXiv:1812.04948), trained at its full resolution.

Upsampling and its low-pass filter are one FIR, as in StyleGAN2: the public implementation crops between the
two, which changes the outermost row of pixels.
"""

import math

import torch
from torch import Tensor, nn

from fastgan.equalized import BLUR, Conv2d, FullyConnected, Mapping, StyleGenerator, channels_at, layer_noises
from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.norm_act import adain
from fastgan.kernels.upfirdn2d import setup_filter
from fastgan.models import stylegan


class AdaIN(nn.Module):
    """y = y_s * (x - mean) / std + y_b with (y_s, y_b) an affine map of w, y_s around one (equation 1)."""

    def __init__(self, w_dim: int, channels: int):
        super().__init__()
        self.affine = FullyConnected(w_dim, 2 * channels)
        nn.init.ones_(self.affine.bias[:channels])

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, C, H, W], w [N, w_dim]."""
        scale, shift = self.affine(w).chunk(2, dim=1)
        return adain(x, scale, shift)


class SynthesisLayer(nn.Module):
    """Convolution (none behind the learned constant), noise, bias, leaky ReLU, AdaIN (figure 1b)."""

    noise_const: Tensor
    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, up: int = 1):
        super().__init__()
        self.up = up
        if in_channels > 0:
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
            self.weight_gain = 1 / math.sqrt(in_channels * 9)
            self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)
        else:
            self.weight = None
        self.noise_strength = nn.Parameter(torch.zeros(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.style = AdaIN(w_dim, out_channels)
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x [N, Cin, H, W], w [N, w_dim], unit normal noise [N, 1, H * up, W * up] or [H * up, W * up]."""
        if self.weight is not None:
            f = self.resample_filter if self.up > 1 else None
            x = conv2d_resample(
                x, self.weight * self.weight_gain, f, self.up, padding=1, flip_weight=self.up == 1
            )
        if noise is not None:
            x = torch.addcmul(x, noise.to(x.dtype), self.noise_strength.to(x.dtype)[:, None, None])
        return self.style(bias_act(x, self.bias, act="lrelu"), w)


class Synthesis(nn.Module):
    """w [N, num_ws, w_dim] -> images [N, channels, R, R]; a layer for each w."""

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        channels: int,
        channel_base: int = 16384,
        channel_max: int = 512,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two from 8 on: got {resolution}")
        self.dtype = dtype
        width = channels_at(4, channel_base, channel_max)
        self.const = nn.Parameter(torch.ones(width, 4, 4))
        layers = [SynthesisLayer(0, width, w_dim, 4), SynthesisLayer(width, width, w_dim, 4)]
        side = 4
        while side < resolution:
            side, old = 2 * side, width
            width = channels_at(side, channel_base, channel_max)
            layers.append(SynthesisLayer(old, width, w_dim, side, up=2))
            layers.append(SynthesisLayer(width, width, w_dim, side))
        self.layers = nn.ModuleList(layers)
        self.torgb = Conv2d(width, channels, 1)
        self.num_ws = len(layers)
        self.noise_size = sum(layer.noise_const.numel() for layer in layers)

    def forward(self, ws: Tensor, noise: Tensor | str = "const") -> Tensor:
        """`noise`: "const" (each layer's own buffer), "none", or unit normal numbers [N, noise_size]."""
        x = self.const.expand(ws.shape[0], -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer, w, n in zip(
            self.layers, ws.unbind(1), layer_noises(list(self.layers), noise), strict=True
        ):
            # The first, of the constant, is in fp32: bf16 rounds faint noise on numbers near one away, and
            # AdaIN makes what is left as large as any map.
            x = layer(x, w, n).to(self.dtype or ws.dtype)
        return self.torgb(x).to(ws.dtype)


class Generator(StyleGenerator):
    """z [N, z_dim] (and labels c [N, c_dim]) -> images [N, channels, R, R] around [-1, 1]."""

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        resolution: int = 1024,
        channels: int = 3,
        mapping_layers: int = 8,
        channel_base: int = 16384,
        channel_max: int = 512,
        style_mixing: float = 0.9,
        dtype: torch.dtype | None = None,
        noise: str = "random",
    ):
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.style_mixing, self.noise = style_mixing, noise
        self.synthesis = Synthesis(w_dim, resolution, channels, channel_base, channel_max, dtype)
        self.mapping = Mapping(z_dim, c_dim, w_dim, self.synthesis.num_ws, mapping_layers)


def Discriminator(
    c_dim: int = 0,
    resolution: int = 1024,
    channels: int = 3,
    channel_base: int = 16384,
    channel_max: int = 512,
    mapping_layers: int = 8,
    mbstd_group: int = 4,
    dtype: torch.dtype | None = None,
) -> stylegan.Discriminator:
    """ProGAN's at its full size, behind low-pass filters: StyleGAN2's without skips or residuals."""
    return stylegan.Discriminator(
        c_dim,
        resolution,
        channels,
        channel_base,
        channel_max,
        "orig",
        mapping_layers,
        mbstd_group,
        dtype=dtype,
    )
