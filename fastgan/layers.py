"""Blocks that two or more families use."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv2d_resample import conv2d_resample
from fastgan.kernels.conv_transpose_bn_act import conv2d_bn_act, conv_transpose2d_bn_act
from fastgan.kernels.minibatch_stddev import minibatch_stddev
from fastgan.kernels.norm_act import batch_norm_act, conditional_batch_norm_act, instance_norm_act, pixel_norm
from fastgan.kernels.upfirdn2d import setup_filter

Weighted = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d


def with_labels(x: Tensor, c: Tensor | None, c_dim: int) -> Tensor:
    """x [N, D] and the one-hot labels c [N, c_dim] side by side (Mirza and Osindero 2014, arXiv:1411.1784);
    x itself where c_dim is 0."""
    return torch.cat([x, require_labels(c, c_dim).to(x.dtype)], dim=1) if c_dim else x


def require_labels(c: Tensor | None, c_dim: int) -> Tensor:
    if c is None:
        raise ValueError(f"c must be given to a conditional network: one-hot labels [N, {c_dim}]")
    return c


def project(logits: Tensor, features: Tensor, c: Tensor | None, embed: nn.Embedding | None) -> Tensor:
    """logits [N, 1] + <V c, features>, the projection discriminator (Miyato and Koyama 2018,
    arXiv:1802.05637, equation 3); logits themselves where there is no V [c_dim, D].

    features [N, ...] of D numbers a sample, in any dtype; V's dtype decides.
    """
    if embed is None:
        return logits
    v = require_labels(c, embed.num_embeddings).to(embed.weight.dtype) @ embed.weight
    return logits + (v * features.flatten(1).to(v.dtype)).sum(dim=1, keepdim=True)


def with_noise(img: Tensor, deviation: float, training: bool) -> Tensor:
    """Instance noise on every training image (Sønderby et al. 2017, arXiv:1610.04490)."""
    return img + deviation * torch.randn_like(img) if training and deviation > 0 else img


def run_layers(layers: Iterable[nn.Module], x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`layers` in a row on x in `dtype`; every convolution or linear layer with the normalisation and the
    (leaky) ReLU behind it as one operation, statistics in fp32."""
    x = x.to(dtype or x.dtype)
    left = list(layers)
    while left:
        layer = left.pop(0)
        if isinstance(layer, nn.PReLU):
            x = F.prelu(x, layer.weight.to(x.dtype))
            continue
        if not isinstance(layer, Weighted):
            x = layer(x)
            continue
        norm = left.pop(0) if left and isinstance(left[0], Norm) else None
        act = left.pop(0) if left and isinstance(left[0], nn.ReLU | nn.LeakyReLU) else None
        slope = act.negative_slope if isinstance(act, nn.LeakyReLU) else 1.0 if act is None else 0.0
        if isinstance(norm, nn.BatchNorm2d) and not isinstance(layer, nn.Linear):
            x = _conv_bn_act(x, layer, norm, slope)
        elif norm is not None:
            x = normalize(weigh(x, layer), norm, slope)
        elif act is not None:
            x = bias_act(weigh(x, layer, bias=False), layer.bias, act="lrelu", alpha=slope, gain=1.0)
        else:
            x = weigh(x, layer)
    return x


def weigh(x: Tensor, layer: nn.Module, bias: bool = True) -> Tensor:
    """A linear layer or convolution in x's dtype, with its bias or without."""
    assert isinstance(layer, Weighted)
    weight = layer.weight.to(x.dtype)
    b = layer.bias.to(x.dtype) if bias and layer.bias is not None else None
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, b)
    stride, padding = layer.stride[0], int(layer.padding[0])
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight, b, stride, padding, layer.output_padding[0])
    return F.conv2d(x, weight, b, stride, padding)


def normalize(x: Tensor, norm: nn.Module, slope: float = 1.0, upsample: int = 1) -> Tensor:
    """upsample(lrelu(norm(x), slope)) of x [N, C] or [N, C, H, W]; slope 0 is ReLU, 1 no activation."""
    if isinstance(norm, nn.GroupNorm):
        assert upsample == 1
        x = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return bias_act(x, act="lrelu", alpha=slope, gain=1.0)
    if isinstance(norm, nn.InstanceNorm2d):
        return instance_norm_act(x, norm.weight, norm.bias, norm.eps, "lrelu", slope, upsample)
    assert isinstance(norm, _BatchNorm)
    mean, var, momentum = _running(norm)
    y = batch_norm_act(
        x[:, :, None, None] if x.ndim == 2 else x,
        norm.weight,
        norm.bias,
        mean,
        var,
        training=norm.training,
        momentum=momentum,
        eps=norm.eps,
        act="lrelu",
        alpha=slope,
        upsample=upsample,
    )
    return y[:, :, 0, 0] if x.ndim == 2 else y


def _conv_bn_act(
    x: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d, slope: float
) -> Tensor:
    mean, var, momentum = _running(norm)
    return (conv_transpose2d_bn_act if isinstance(conv, nn.ConvTranspose2d) else conv2d_bn_act)(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        mean,
        var,
        conv.bias,
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
        output_padding=conv.output_padding[0],
        training=norm.training,
        momentum=momentum,
        eps=norm.eps,
        slope=slope,
    )


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor, float]:
    """(running mean, running variance, momentum) for a pass that is thereby counted."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var, norm.momentum


BLUR = (1, 3, 3, 1)
BOX = (1, 1)  # nearest upsampling, mean of 2x2 pixels


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
        if self.fromrgb is not None and img is not None:
            x = x + self.fromrgb(img)
        if self.mbstd_num_channels > 0:
            x = minibatch_stddev(x, self.mbstd_group_size, self.mbstd_num_channels)
        return self.fc(self.conv(x).flatten(1))

    def head(self, features: Tensor, cmap: Tensor | None = None) -> Tensor:
        x = self.out(features)
        if cmap is not None:
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


Module = TypeVar("Module", bound=nn.Module)


class SpectralNorm(nn.Module):
    """W / sigma, sigma the largest singular value of W (Miyato et al. 2018, arXiv:1802.05957, algorithm 1).

        v = W^T u / |W^T u|,   u' = W v / |W v|,   sigma = u'^T W v

    W [rows, ...] is read as a matrix, its rows along `dim`; u and v are constants to the gradient. Training
    keeps u' for the next pass; evaluation, as in BigGAN-PyTorch, makes the iteration but forgets it.
    """

    u: Tensor

    def __init__(self, weight: Tensor, dim: int = 0, iterations: int = 1):
        super().__init__()
        self.dim, self.iterations = dim, iterations
        u = torch.randn(weight.shape[dim], dtype=weight.dtype, device=weight.device)
        self.register_buffer("u", F.normalize(u, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.transpose(0, self.dim)
        if w.ndim == 4 and not w.is_contiguous():
            w = w.permute(0, 2, 3, 1)  # v's order is no matter, and of channels_last weights this is a view
        w = w.flatten(1)
        u = self.u
        for _ in range(self.iterations):
            with torch.no_grad():
                v = F.normalize(w.t() @ u, dim=0)
            wv = w @ v
            u = F.normalize(wv.detach(), dim=0)
        if self.training:
            self.u.copy_(u)  # what autograd has saved are `u` and `v`, never this buffer
        return weight / torch.dot(u, wv)


def spectral_norm(module: Module, iterations: int = 1) -> Module:
    """`module` with its `weight` under `SpectralNorm`; every reading of `module.weight` is an iteration."""
    dim = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    assert isinstance(module.weight, Tensor)
    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight, dim, iterations))
    return module


def add_spectral_norm(net: nn.Module) -> None:
    """`spectral_norm` for every `weight` of two or more dimensions in `net` that has none."""
    for module in list(net.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim >= 2:
            spectral_norm(module)


def spectral_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias)
    nn.init.orthogonal_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return spectral_norm(linear)


class SpectralConv2d(nn.Conv2d):
    """act(conv(x) + b) of x [N, Cin, H, W] in x's dtype, spectrally normalized; kernel 1 or 3.

    `up` 2 repeats every pixel 2x2 before the convolution, `down` 2 takes the mean of 2x2 pixels after it.
    With a 3x3 kernel either is one strided 4x4 convolution, whose taps are sums of the kernel's: 4/9 of the
    multiplications. A 1x1 kernel runs at the lower resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        act: str = "linear",
        up: int = 1,
        down: int = 1,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.act, self.up, self.down, self.pointwise = act, up, down, kernel_size == 1
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if not self.pointwise and (self.up > 1 or self.down > 1):
            w = F.pad(w, (1, 1, 1, 1))
            w = w[:, :, 1:] + w[:, :, :-1]
            w = w[:, :, :, 1:] + w[:, :, :, :-1]
        bias = None if self.bias is None or self.act != "linear" else self.bias.to(x.dtype)
        if self.pointwise:
            x = F.avg_pool2d(x, 2) if self.down > 1 else x
            x = F.conv2d(x, w.to(x.dtype), bias)
            x = F.interpolate(x, scale_factor=2) if self.up > 1 else x
        elif self.up > 1:
            w = w.flip([2, 3]).transpose(0, 1)
            x = F.conv_transpose2d(x, w.to(x.dtype), bias, 2, 1)
        elif self.down > 1:
            x = F.conv2d(x, (w / 4).to(x.dtype), bias, 2, 1)
        else:
            x = F.conv2d(x, w.to(x.dtype), bias, 1, 1)
        return x if self.act == "linear" else bias_act(x, self.bias, act=self.act, gain=1.0)


class SelfAttention(nn.Module):
    """x + gamma * o(softmax(theta^T phi) g) for x [N, C, H, W] (Zhang et al. 2018, arXiv:1805.08318,
    equations 2 and 3).

    theta, phi [C / 8] and g [C / 2] are 1x1 convolutions, phi and g max-pooled 2x2, as in the authors' code
    and BigGAN; gamma starts at 0. R1 and gradient penalties differentiate it twice, which no fused attention
    of PyTorch can be.
    """

    def __init__(self, channels: int):
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.theta = SpectralConv2d(channels, narrow, 1, bias=False)
        self.phi = SpectralConv2d(channels, narrow, 1, bias=False)
        self.g = SpectralConv2d(channels, half, 1, bias=False)
        self.o = SpectralConv2d(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor) -> Tensor:
        query = self.theta(x).flatten(2).transpose(1, 2)  # [N, HW, C / 8]
        key = F.max_pool2d(self.phi(x), 2).flatten(2)  # [N, C / 8, HW / 4]
        value = F.max_pool2d(self.g(x), 2).flatten(2).transpose(1, 2)  # [N, HW / 4, C / 2]
        precise = torch.promote_types(x.dtype, torch.float32)
        share = torch.softmax(query @ key, dim=-1, dtype=precise).to(x.dtype)
        y = (share @ value).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.gamma * self.o(y)


class Embedding(nn.Embedding):
    """One-hot c [N, c_dim] -> rows of the weight [c_dim, D], which starts at zero."""

    def __init__(self, c_dim: int, features: int):
        super().__init__(c_dim, features)
        nn.init.zeros_(self.weight)

    def forward(self, c: Tensor) -> Tensor:
        w = self.weight
        return c.to(w.dtype) @ w


class ConditionalBatchNorm2d(nn.BatchNorm2d):
    """act((1 + gain(y)) * (x - mean) / sqrt(var + eps) + shift(y)) for x [N, C, H, W] (Dumoulin et al. 2017,
    arXiv:1610.07629).

    `condition(C)` makes the maps gain and shift from y [N, D] to [N, C]; None means BatchNorm's own gain and
    shift, which see no y.
    """

    def __init__(
        self,
        channels: int,
        condition: Callable[[int], nn.Module] | None = None,
        eps: float = 1e-5,
        act: str = "relu",
    ):
        super().__init__(channels, eps, affine=condition is None)
        self.act = act
        if condition is not None:
            self.gain, self.shift = condition(channels), condition(channels)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert self.num_batches_tracked is not None and self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var, self.training, self.momentum, self.eps, self.act)
        if self.affine:
            return batch_norm_act(x, self.weight, self.bias, *running)
        return conditional_batch_norm_act(x, 1 + self.gain(y), self.shift(y), *running)


class UpBlock(nn.Module):
    """x [N, Cin, H, W], y -> [N, Cout, 2H, 2W]: the generator's residual block of SAGAN and BigGAN."""

    def __init__(self, in_channels: int, out_channels: int, condition: Callable[[int], nn.Module] | None):
        super().__init__()
        self.bn1 = ConditionalBatchNorm2d(in_channels, condition)
        self.conv1 = SpectralConv2d(in_channels, out_channels, up=2)
        self.bn2 = ConditionalBatchNorm2d(out_channels, condition)
        self.conv2 = SpectralConv2d(out_channels, out_channels)
        self.conv_sc = SpectralConv2d(in_channels, out_channels, 1, up=2)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        h = self.conv1(self.bn1(x, y))
        return self.conv2(self.bn2(h, y)) + self.conv_sc(x)


class DownBlock(nn.Module):
    """x [N, Cin, H, W] -> [N, Cout, H / down, W / down]: the discriminator's residual block of SAGAN and
    BigGAN. The `first` one, on images, has no ReLU in front."""

    def __init__(self, in_channels: int, out_channels: int, down: int = 2, first: bool = False):
        super().__init__()
        self.first = first
        self.conv1 = SpectralConv2d(in_channels, out_channels, act="relu")
        self.conv2 = SpectralConv2d(out_channels, out_channels, down=down)
        plain = in_channels == out_channels and down == 1
        self.conv_sc = None if plain else SpectralConv2d(in_channels, out_channels, 1, down=down)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.conv1(x if self.first else F.relu(x)))
        return h + (x if self.conv_sc is None else self.conv_sc(x))


def doublings(resolution: int) -> int:
    """k of resolution = 4 * 2^k."""
    k = (resolution // 4).bit_length() - 1
    if k < 1 or 4 << k != resolution:
        raise ValueError(f"resolution must be 4 times a power of two, from 8 on: got {resolution}")
    return k


def with_attention(
    stages: Sequence[Sequence[nn.Module]],
    widths: Sequence[int],
    sides: Sequence[int],
    attention: int,
    behind: Iterable[int] | None = None,
) -> list[nn.Module]:
    """All blocks of `stages`, with self-attention behind the first stage whose maps, of `widths` channels,
    have `attention` for a side (0: none); `behind` names stages by their number instead."""
    if behind is None:
        if attention and attention not in sides:
            choices = ", ".join(str(s) for s in sorted(set(sides)))
            raise ValueError(f"attention must be 0 or the side of a map, one of {choices}: got {attention}")
        behind = [sides.index(attention)] if attention else []
    behind = set(behind)
    tails = [[SelfAttention(width)] if i in behind else [] for i, width in enumerate(widths)]
    return [block for stage, tail in zip(stages, tails, strict=True) for block in (*stage, *tail)]


class ResidualGenerator(nn.Module):
    """z -> 4x4 -> residual blocks -> BatchNorm, ReLU, 3x3 convolution, tanh: all but how labels enter."""

    uniforms = 0

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        features: int,
        widths: tuple[int, int],
        blocks: Iterable[nn.Module],
        channels: int,
        dtype: torch.dtype | None,
    ):
        """`features` go into the linear layer; `widths` of the first and the last map."""
        super().__init__()
        self.z_dim = self.normals = z_dim
        self.c_dim, self.dtype = c_dim, dtype
        self.linear = spectral_linear(features, 16 * widths[0])
        self.blocks = nn.ModuleList(blocks)
        self.bn = ConditionalBatchNorm2d(widths[1])
        self.conv = SpectralConv2d(widths[1], channels)

    def synthesize(self, z: Tensor, ys: Iterable[Tensor | None]) -> Tensor:
        """Images in (-1, 1), z's dtype, from what enters the linear layer and, one after the other, the
        blocks."""
        x = self.linear(z).unflatten(1, (-1, 4, 4)).to(self.dtype or z.dtype)
        ys = iter(ys)
        for block in self.blocks:
            x = block(x) if isinstance(block, SelfAttention) else block(x, next(ys))
        return self.conv(self.bn(x)).to(z.dtype).tanh()

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, z_dim], uniform [N, 0], one-hot c [N,
        c_dim]."""
        return self(normal, c), normal


class ProjectionDiscriminator(nn.Module):
    """logits [N, 1] = w^T h + b + (V c)^T h, h = sum over the pixels of relu(blocks(images)) (Miyato and
    Koyama 2018, arXiv:1802.05637, equation 3), w and V spectrally normalized; V where c_dim > 0."""

    def __init__(self, blocks: Iterable[nn.Module], width: int, c_dim: int, dtype: torch.dtype | None):
        super().__init__()
        self.c_dim, self.dtype = c_dim, dtype
        self.blocks = nn.ModuleList(blocks)
        self.linear = spectral_linear(width, 1)
        self.embed = None
        if c_dim > 0:
            self.embed = Embedding(c_dim, width)
            nn.init.orthogonal_(self.embed.weight)
            spectral_norm(self.embed)

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """images [N, C, R, R] -> h [N, width], in the images' dtype; labels have no part yet."""
        x = img.to(self.dtype or img.dtype)
        for block in self.blocks:
            x = block(x)
        return F.relu(x).sum(dim=(2, 3), dtype=img.dtype)

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        logits = self.linear(features)
        if self.embed is None:
            return logits
        v = self.embed(require_labels(c, self.c_dim))
        return logits + (v * features).sum(dim=1, keepdim=True)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        return self.head(self.features(img), c)
