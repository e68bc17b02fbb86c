"""StyleGAN2 (Karras et al. 2019, "Analyzing and Improving the Image Quality of StyleGAN", arXiv:1912.04958).

Parameter names are those of stylegan2-ada-pytorch. Weights and the mapping network stay in the parameters'
own dtype; convolutions run in `dtype`, images and the discriminator's last 4x4 in fp32 or better.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.modulated_conv2d import modulated_conv2d
from fastgan.kernels.norm_act import pixel_norm
from fastgan.kernels.upfirdn2d import downsample2d, setup_filter, upsample2d

ARCHITECTURES = ("orig", "skip", "resnet")
BLUR = (1, 3, 3, 1)


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    return min(channel_base // resolution, channel_max)


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
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)
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

    num_ws None returns [N, w_dim] and keeps no mean: the discriminator's embedding of the label.
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
    ):
        super().__init__()
        if z_dim == 0 and c_dim == 0:
            raise ValueError("a mapping network needs z_dim or c_dim above 0")
        self.z_dim, self.c_dim, self.num_ws, self.w_avg_beta = z_dim, c_dim, num_ws, w_avg_beta
        if c_dim > 0:
            self.embed = FullyConnected(c_dim, w_dim)
        widths = [z_dim + (w_dim if c_dim > 0 else 0)] + [w_dim] * num_layers
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
    ):
        super().__init__()
        self.resolution, self.up, self.conv_clamp = resolution, up, conv_clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)

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
    ):
        super().__init__()
        self.architecture, self.is_first = architecture, in_channels == 0
        self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, 2, conv_clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, 1, conv_clamp)
        self.num_convs = 1 if self.is_first else 2
        self.torgb = (
            ToRGB(out_channels, img_channels, w_dim, conv_clamp)
            if is_last or architecture == "skip"
            else None
        )
        if not self.is_first and architecture == "resnet":
            self.skip = Conv2d(in_channels, out_channels, 1, up=2, bias=False)

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
    """w [N, num_ws, w_dim] -> images [N, img_channels, R, R]."""

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
    ):
        super().__init__()
        _check_shape(img_resolution, architecture)
        self.dtype = dtype
        self.resolutions = [2**i for i in range(2, img_resolution.bit_length())]
        channels = [0] + [channels_at(r, channel_base, channel_max) for r in self.resolutions]
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
            )
            self.add_module(f"b{res}", block)
        self.num_ws = 2 * len(self.resolutions)
        self.noise_sides = [4] + [r for r in self.resolutions[1:] for _ in range(2)]
        self.noise_size = sum(side**2 for side in self.noise_sides)

    def forward(self, ws: Tensor, noise: Tensor | str = "const") -> Tensor:
        """`noise`: "const" (each layer's own buffer), "none", or unit normal numbers [N, noise_size]."""
        dtype = self.dtype or ws.dtype
        x, img = None, None
        first, drawn = 0, None
        if isinstance(noise, Tensor):
            drawn = noise.split([side**2 for side in self.noise_sides], dim=1)
        for res in self.resolutions:
            block = getattr(self, f"b{res}")
            layers = [block.conv1] if block.is_first else [block.conv0, block.conv1]
            noises: list[Tensor | None] = [None] * len(layers)
            if drawn is not None:
                noises = [drawn[first + i].reshape(-1, 1, res, res) for i in range(len(layers))]
            elif noise == "const":
                noises = [layer.noise_const for layer in layers]
            elif noise != "none":
                raise ValueError(f"noise must be 'const', 'none' or a tensor: got {noise!r}")
            x, img = block(x, img, ws[:, first : first + len(layers) + 1], noises, dtype)
            first += len(layers)
        assert img is not None  # the last block always has an output
        return img


class Generator(nn.Module):
    """Mapping and synthesis.

    A training sample takes `normals` unit normal numbers (z, a second z to mix with, noise) and `uniforms`
    uniform ones (whether and from which layer on to mix); `sample` turns them into images.
    """

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
    ):
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.style_mixing, self.noise = style_mixing, noise
        self.synthesis = Synthesis(
            w_dim, resolution, channels, channel_base, channel_max, architecture, conv_clamp, dtype
        )
        self.mapping = Mapping(z_dim, c_dim, w_dim, self.synthesis.num_ws, mapping_layers)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Tensor | str = "const",
    ) -> Tensor:
        """z [N, z_dim] and labels c [N, c_dim] -> images [N, channels, R, R] around [-1, 1]."""
        return self.synthesis(self.mapping(z, c, truncation, truncation_cutoff), noise)

    @property
    def normals(self) -> int:
        noise_size = self.synthesis.noise_size if self.noise == "random" else 0
        return self.z_dim * (2 if self.style_mixing > 0 else 1) + noise_size

    @property
    def uniforms(self) -> int:
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


class DiscriminatorBlock(nn.Module):
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        img_channels: int,
        architecture: str,
        conv_clamp: float | None,
    ):
        super().__init__()
        self.architecture = architecture
        self.register_buffer("resample_filter", setup_filter(BLUR), persistent=False)
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = Conv2d(img_channels, mid_channels, 1, "lrelu", conv_clamp=conv_clamp)
        else:
            self.fromrgb = None
        self.conv0 = Conv2d(mid_channels, mid_channels, 3, "lrelu", conv_clamp=conv_clamp)
        self.conv1 = Conv2d(mid_channels, out_channels, 3, "lrelu", down=2, conv_clamp=conv_clamp)
        if architecture == "resnet":
            self.skip = Conv2d(mid_channels, out_channels, 1, down=2, bias=False)

    def forward(self, x: Tensor | None, img: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.fromrgb is not None and img is not None:
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        assert x is not None
        if self.architecture == "resnet":
            skip = self.skip(x, gain=math.sqrt(0.5))
            return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), img
        return self.conv1(self.conv0(x)), img


class DiscriminatorEpilogue(nn.Module):
    """The last 4x4: minibatch standard deviation, convolution, two dense layers, projection on the label."""

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        img_channels: int,
        architecture: str,
        mbstd_group_size: int | None,
        mbstd_num_channels: int,
        conv_clamp: float | None,
    ):
        super().__init__()
        self.cmap_dim = cmap_dim
        self.mbstd_group_size, self.mbstd_num_channels = mbstd_group_size, mbstd_num_channels
        self.fromrgb = Conv2d(img_channels, in_channels, 1, "lrelu") if architecture == "skip" else None
        self.conv = Conv2d(in_channels + mbstd_num_channels, in_channels, 3, "lrelu", conv_clamp=conv_clamp)
        self.fc = FullyConnected(in_channels * 16, in_channels, "lrelu")
        self.out = FullyConnected(in_channels, cmap_dim or 1)

    def forward(self, x: Tensor, img: Tensor | None, cmap: Tensor | None) -> Tensor:
        if self.fromrgb is not None and img is not None:
            x = x + self.fromrgb(img)
        if self.mbstd_num_channels > 0:
            x = minibatch_stddev(x, self.mbstd_group_size, self.mbstd_num_channels)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if cmap is not None:
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


class Discriminator(nn.Module):
    """Images [N, channels, R, R] (and labels c [N, c_dim]) -> logits [N, 1]."""

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
    ):
        super().__init__()
        _check_shape(resolution, architecture)
        self.dtype = dtype
        self.resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]
        widths = [channels_at(r, channel_base, channel_max) for r in [*self.resolutions, 4]]
        for i, res in enumerate(self.resolutions):
            block = DiscriminatorBlock(
                0 if i == 0 else widths[i],
                widths[i],
                widths[i + 1],
                channels,
                architecture,
                conv_clamp,
            )
            self.add_module(f"b{res}", block)
        cmap_dim = widths[-1] if c_dim > 0 else 0
        if c_dim > 0:
            self.mapping = Mapping(0, c_dim, cmap_dim, None, mapping_layers, w_avg_beta=None)
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

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        precise = torch.promote_types(img.dtype, torch.float32)
        x, rgb = None, img.to(self.dtype or img.dtype)
        for res in self.resolutions:
            x, rgb = getattr(self, f"b{res}")(x, rgb)
        assert x is not None
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x.to(precise), None if rgb is None else rgb.to(precise), cmap)


def _check_shape(img_resolution: int, architecture: str) -> None:
    if img_resolution < 8 or img_resolution & (img_resolution - 1):
        raise ValueError(f"img_resolution must be a power of two from 8 on: got {img_resolution}")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}: got {architecture!r}")
