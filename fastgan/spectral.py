"""Spectral normalization, self-attention, conditional BatchNorm: the blocks of SAGAN and BigGAN."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.norm_act import batch_norm_act, conditional_batch_norm_act
from fastgan.layers import over_ranks, require_labels, synchronized_batch_norm_act

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
        """weight / sigma, one power iteration on in training."""
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
    """An orthogonally initialised linear layer under spectral norm."""
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
        """[N, Cin, H, W] -> [N, Cout, up H / down, up W / down]."""
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
        """[N, C, H, W] -> the same shape."""
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
        """One-hot labels [N, c_dim] -> [N, dims]."""
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
        """x [N, C, H, W], y [N, dims] -> activated, upsampled."""
        if over_ranks(self):
            scale, shift = (self.weight, self.bias) if self.affine else (1 + self.gain(y), self.shift(y))
            return synchronized_batch_norm_act(x, self, scale, shift, self.act)
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
        """x [N, Cin, H, W], y [N, dims] for the norms -> [N, Cout, 2H, 2W]."""
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
        """[N, Cin, H, W] -> [N, Cout, H, W] or half of it."""
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
        """Logits [N, 1] of what `features` returns."""
        logits = self.linear(features)
        if self.embed is None:
            return logits
        v = self.embed(require_labels(c, self.c_dim))
        return logits + (v * features).sum(dim=1, keepdim=True)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and one-hot labels c [N, c_dim]."""
        return self.head(self.features(img), c)
