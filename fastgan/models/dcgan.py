"""DCGAN (Radford, Metz and Chintala 2015, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", arXiv:1511.06434).

Layers stand in the order of pytorch/examples' dcgan, so its weights load as they are. The discriminator
returns logits where that example applies a sigmoid.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv_transpose_bn_act import conv2d_bn_act, conv_transpose2d_bn_act


def stages(resolution: int) -> tuple[int, int]:
    """(side of the smallest map, number of doublings): 64 = 4 * 2^4, 28 = 7 * 2^2."""
    for start in (4, 7):
        doublings = (resolution // start).bit_length() - 1
        if doublings >= 1 and start << doublings == resolution:
            return start, doublings
    raise ValueError(f"resolution must be 4 or 7 times a power of two, from 8 on: got {resolution}")


def _init(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm's scale (section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _check_kernel(kernel: int) -> None:
    if kernel not in (4, 5):
        raise ValueError(f"kernel must be 4 or 5: got {kernel}")


class Generator(nn.Module):
    """z [N, nz] -> images [N, channels, R, R] in (-1, 1): transposed convolutions, BatchNorm, ReLU, tanh."""

    uniforms = 0

    def __init__(
        self,
        nz: int = 100,
        ngf: int = 64,
        channels: int = 3,
        resolution: int = 64,
        kernel: int = 4,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_kernel(kernel)
        start, doublings = stages(resolution)
        self.z_dim = self.normals = nz
        self.dtype = dtype
        widths = [ngf << i for i in range(doublings - 1, -1, -1)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(nz, widths[0], start, 1, 0, bias=False)]
        for fan_in, fan_out in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.BatchNorm2d(fan_in), nn.ReLU()]
            padding, extra = (kernel - 1) // 2, kernel % 2
            layers.append(nn.ConvTranspose2d(fan_in, fan_out, kernel, 2, padding, extra, bias=False))
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(_init)

    def forward(self, z: Tensor) -> Tensor:
        return _run(self.main, z[:, :, None, None], self.dtype)

    def sample(self, normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, nz], uniform [N, 0]."""
        return self(normal), normal


class Discriminator(nn.Module):
    """Images [N, channels, R, R] -> logits [N, 1]: strided convolutions, BatchNorm, LeakyReLU, dropout.

    Without biases and behind BatchNorm an image and a multiple of it look the same, and generated pictures
    stay gray. Gaussian noise of deviation `instance_noise` on every training image (Sønderby et al. 2017,
    arXiv:1610.04490) sets a scale, and keeps D from learning a small data set by heart.
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
    ):
        super().__init__()
        _check_kernel(kernel)
        start, doublings = stages(resolution)
        self.dtype = dtype
        self.instance_noise = instance_noise
        widths = [channels] + [ndf << i for i in range(doublings)]
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Conv2d(fan_in, fan_out, kernel, 2, (kernel - 1) // 2, bias=False))
            if i > 0:
                layers.append(nn.BatchNorm2d(fan_out))
            layers.append(nn.LeakyReLU(slope))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, start, 1, 0, bias=False))
        self.apply(_init)

    def forward(self, img: Tensor) -> Tensor:
        if self.training and self.instance_noise > 0:
            img = img + self.instance_noise * torch.randn_like(img)
        return _run(self.main, img, self.dtype).flatten(1)


def _run(layers: nn.Sequential, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`layers` with every convolution, BatchNorm and activation in a row as one operation: convolutions in
    `dtype`, BatchNorm with fp32 statistics, tanh and logits in x's dtype."""
    precise = x.dtype
    x = x.to(dtype or precise)
    left = list(layers)
    while left:
        layer = left.pop(0)
        if isinstance(layer, nn.LeakyReLU):
            x = bias_act(x, act="lrelu", alpha=layer.negative_slope, gain=1.0)
        elif not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            x = layer(x)
        elif left and isinstance(norm := left[0], nn.BatchNorm2d):
            x, left = _conv_bn_act(x, layer, norm, left[1]), left[2:]
        else:
            x = _conv(x, layer)
            if not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in left):
                x = x.to(precise)
    return x


def _conv(x: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    weight, stride, padding = conv.weight.to(x.dtype), conv.stride[0], int(conv.padding[0])
    if isinstance(conv, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight, None, stride, padding, conv.output_padding[0])
    return F.conv2d(x, weight, None, stride, padding)


def _conv_bn_act(
    x: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d, act: nn.Module
) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return (conv_transpose2d_bn_act if isinstance(conv, nn.ConvTranspose2d) else conv2d_bn_act)(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
        output_padding=conv.output_padding[0],
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        slope=act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0,
    )
