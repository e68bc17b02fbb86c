"""StyleGAN2 (Karras et al. 2019, "Analyzing and Improving the Image Quality of StyleGAN", arXiv:1912.04958).

Parameter names are those of stylegan2-ada-pytorch. Weights and the mapping network stay in the parameters'
own dtype; convolutions run in `dtype`, images and the discriminator's last 4x4 in fp32 or better.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan.equalized import (
    BLUR,
    Conv2d,
    DiscriminatorEpilogue,
    FullyConnected,
    Mapping,
    StyleGenerator,
    channels_up_to,
    layer_noises,
)
from fastgan.kernels.modulated_conv2d import modulated_conv2d
from fastgan.kernels.upfirdn2d import downsample2d, setup_filter, upsample2d

ARCHITECTURES = ("orig", "skip", "resnet")


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, bias and leaky ReLU, at the output's `resolution`."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: int = 1,
        conv_clamp: float | None = None,
        taps: Sequence[float] = BLUR,
    ):
        super().__init__()
        self.resolution, self.up, self.conv_clamp = resolution, up, conv_clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", setup_filter(taps), persistent=False)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, gain: float = 1.0) -> Tensor:
        """x [N, Cin, H, W], w [N, w_dim], unit normal noise [N, 1, H * up, W * up] or [H * up, W * up]."""
        if noise is not None:
            noise = noise * self.noise_strength
        return modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise,
            up=self.up,
            padding=1,
            resample_filter=self.resample_filter if self.up > 1 else None,
            bias=self.bias,
            act="lrelu",
            gain=math.sqrt(2) * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )


class ToRGB(nn.Module):
    """1x1 modulated convolution without demodulation: features to image."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, conv_clamp: float | None = None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, Cin, H, W], w [N, w_dim] -> [N, Cout, H, W]."""
        styles = self.affine(w) * self.weight_gain
        return modulated_conv2d(
            x, self.weight, styles, demodulate=False, bias=self.bias, clamp=self.conv_clamp
        )


class SynthesisBlock(nn.Module):
    """One resolution: two layers (one at 4x4, behind the learned constant) and, but for `orig`, an output."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        architecture: str,
        conv_clamp: float | None,
        taps: Sequence[float] = BLUR,
    ):
        super().__init__()
        self.architecture, self.is_first = architecture, in_channels == 0
        self.register_buffer("resample_filter", setup_filter(taps), persistent=False)
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, 2, conv_clamp, taps)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, 1, conv_clamp)
        self.num_convs = 1 if self.is_first else 2
        self.torgb = (
            ToRGB(out_channels, img_channels, w_dim, conv_clamp)
            if is_last or architecture == "skip"
            else None
        )
        if not self.is_first and architecture == "resnet":
            self.skip = Conv2d(in_channels, out_channels, 1, up=2, bias=False, taps=taps)

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        noises: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """ws [N, num_convs + 1, w_dim]; the last one drives the output and is the next block's first."""
        y: Tensor
        if x is None:
            x = self.const.to(dtype).expand(ws.shape[0], -1, -1, -1)
            x = x.contiguous(memory_format=torch.channels_last)
            y = self.conv1(x, ws[:, 0], noises[0])
        elif self.architecture == "resnet":
            skip = self.skip(x, gain=math.sqrt(0.5))
            y = self.conv0(x, ws[:, 0], noises[0])
            y = skip + self.conv1(y, ws[:, 1], noises[1], gain=math.sqrt(0.5))
        else:
            y = self.conv1(self.conv0(x, ws[:, 0], noises[0]), ws[:, 1], noises[1])
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.torgb is not None:
            rgb = self.torgb(y, ws[:, self.num_convs]).to(torch.promote_types(dtype, torch.float32))
            img = rgb if img is None else img + rgb
        return y, img


class Synthesis(nn.Module):
    """w [N, num_ws, w_dim] -> images [N, img_channels, R, R].

    `widths` are the channels at 4, 8, ... pixels in place of those that channel_base and channel_max give,
    `taps` the low-pass filter behind upsampling.
    """

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "skip",
        conv_clamp: float | None = None,
        dtype: torch.dtype | None = None,
        widths: Sequence[int] | None = None,
        taps: Sequence[float] = BLUR,
    ):
        super().__init__()
        _check_shape(img_resolution, architecture)
        self.dtype = dtype
        self.resolutions = [2**i for i in range(2, img_resolution.bit_length())]
        channels = [0, *channels_up_to(img_resolution, channel_base, channel_max, widths)]
        for i, res in enumerate(self.resolutions):
            block = SynthesisBlock(
                channels[i],
                channels[i + 1],
                w_dim,
                res,
                img_channels,
                res == img_resolution,
                architecture,
                conv_clamp,
                taps,
            )
            self.add_module(f"b{res}", block)
        self.num_ws = 2 * len(self.resolutions)
        self.layers = [m for m in self.modules() if isinstance(m, SynthesisLayer)]
        self.noise_size = sum(layer.resolution**2 for layer in self.layers)

    def forward(self, ws: Tensor, noise: Tensor | str = "const") -> Tensor:
        """`noise`: "const" (each layer's own buffer), "none", or unit normal numbers [N, noise_size]."""
        x, img, first = None, None, 0
        noises = layer_noises(self.layers, noise)
        for res in self.resolutions:
            block = getattr(self, f"b{res}")
            last = first + block.num_convs
            x, img = block(x, img, ws[:, first : last + 1], noises[first:last], self.dtype or ws.dtype)
            first = last
        assert img is not None  # the last block always has an output
        return img


class Generator(StyleGenerator):
    """z [N, z_dim] (and labels c [N, c_dim]) -> images [N, C, R, R] around [-1, 1]."""

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        resolution: int,
        channels: int,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "skip",
        conv_clamp: float | None = None,
        dtype: torch.dtype | None = None,
        style_mixing: float = 0.9,
        noise: str = "random",
        widths: Sequence[int] | None = None,
        taps: Sequence[float] = BLUR,
        embed_features: int | None = None,
        layer_features: int | None = None,
    ):
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.style_mixing, self.noise = style_mixing, noise
        self.synthesis = Synthesis(
            w_dim,
            resolution,
            channels,
            channel_base,
            channel_max,
            architecture,
            conv_clamp,
            dtype,
            widths,
            taps,
        )
        self.mapping = Mapping(
            z_dim,
            c_dim,
            w_dim,
            self.synthesis.num_ws,
            mapping_layers,
            embed_features=embed_features,
            layer_features=layer_features,
        )


class DiscriminatorBlock(nn.Module):
    """One resolution: two layers, the second halving it, and what the architecture adds."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        img_channels: int,
        architecture: str,
        conv_clamp: float | None,
        taps: Sequence[float] = BLUR,
    ):
        super().__init__()
        self.architecture = architecture
        self.register_buffer("resample_filter", setup_filter(taps), persistent=False)
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = Conv2d(img_channels, mid_channels, 1, "lrelu", conv_clamp=conv_clamp)
        else:
            self.fromrgb = None
        self.conv0 = Conv2d(mid_channels, mid_channels, 3, "lrelu", conv_clamp=conv_clamp)
        self.conv1 = Conv2d(mid_channels, out_channels, 3, "lrelu", down=2, conv_clamp=conv_clamp, taps=taps)
        if architecture == "resnet":
            self.skip = Conv2d(mid_channels, out_channels, 1, down=2, bias=False, taps=taps)

    def forward(self, x: Tensor | None, img: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [N, Cin, H, W] and, where it is used, img [N, C, H, W] -> both at half the size."""
        if self.fromrgb is not None and img is not None:
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        assert x is not None
        if self.architecture == "resnet":
            skip = self.skip(x, gain=math.sqrt(0.5))
            return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), img
        return self.conv1(self.conv0(x)), img


class Discriminator(nn.Module):
    """Images [N, channels, R, R] (and labels c [N, c_dim]) -> logits [N, 1].

    Labels are mapped to `cmap_dim` numbers, by default as many as there are channels at 4 pixels. `widths`
    and `taps` as in `Synthesis`.
    """

    def __init__(
        self,
        c_dim: int,
        resolution: int,
        channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "resnet",
        mapping_layers: int = 8,
        mbstd_group: int | None = 4,
        mbstd_num_channels: int = 1,
        conv_clamp: float | None = None,
        dtype: torch.dtype | None = None,
        widths: Sequence[int] | None = None,
        taps: Sequence[float] = BLUR,
        cmap_dim: int | None = None,
        embed_features: int | None = None,
        layer_features: int | None = None,
    ):
        super().__init__()
        _check_shape(resolution, architecture)
        self.dtype = dtype
        self.resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]
        widths = channels_up_to(resolution, channel_base, channel_max, widths)[::-1]
        for i, res in enumerate(self.resolutions):
            block = DiscriminatorBlock(
                0 if i == 0 else widths[i],
                widths[i],
                widths[i + 1],
                channels,
                architecture,
                conv_clamp,
                taps,
            )
            self.add_module(f"b{res}", block)
        cmap_dim = (cmap_dim or widths[-1]) if c_dim > 0 else 0
        if c_dim > 0:
            self.mapping = Mapping(
                0,
                c_dim,
                cmap_dim,
                None,
                mapping_layers,
                w_avg_beta=None,
                embed_features=embed_features,
                layer_features=layer_features,
            )
        self.b4 = DiscriminatorEpilogue(
            widths[-1],
            cmap_dim,
            channels,
            architecture,
            mbstd_group,
            mbstd_num_channels,
            conv_clamp,
        )
        self.c_dim = c_dim

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The last hidden layer [N, channels at 4x4]."""
        precise = torch.promote_types(img.dtype, torch.float32)
        x, rgb = None, img.to(self.dtype or img.dtype)
        for res in self.resolutions:
            x, rgb = getattr(self, f"b{res}")(x, rgb)
        assert x is not None
        return self.b4.features(x.to(precise), None if rgb is None else rgb.to(precise))

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of what `features` returns."""
        return self.b4.head(features, self.mapping(None, c) if self.c_dim > 0 else None)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and one-hot labels c [N, c_dim]."""
        return self.head(self.features(img), c)


def _check_shape(img_resolution: int, architecture: str) -> None:
    if img_resolution < 8 or img_resolution & (img_resolution - 1):
        raise ValueError(f"img_resolution must be a power of two from 8 on: got {img_resolution}")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}: got {architecture!r}")
