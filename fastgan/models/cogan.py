"""CoGAN (Liu and Tuzel 2016, "Coupled Generative Adversarial Networks", arXiv:1606.07536).

Two GANs, of domain A and of domain B, whose generators share the first layers and whose discriminators share
the last: without a single corresponding pair in the data, the two images that they make of one z correspond.
A batch of two domains is one tensor of pairs [N, 2C, R, R], joined along the channels, and D's logits are
[N, 2]: a mean over them is half of the sum over both games that the paper writes (equation 5).

The networks are those of the paper's digits (its appendix; 28 pixels, 100 latents, ngf 128, ndf 20). Tanh
stands for its sigmoid, as images lie in -1..1, and D returns logits.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.kernels.conv_transpose_bn_act import conv_transpose2d_bn_act
from fastgan.layers import weigh

DOMAINS = 2


def _init(module: nn.Module) -> None:
    """N(0, 0.02) for the generators' convolutions, as in DCGAN."""
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return F.prelu(x, slope.to(x.dtype))


class Layer(nn.Module):
    """PReLU(BatchNorm(transposed convolution)), one slope a layer."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int, padding: int, extra: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(fan_in, fan_out, kernel, stride, padding, extra, bias=False)
        self.norm = nn.BatchNorm2d(fan_out)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        assert norm.num_batches_tracked is not None
        if norm.training:
            norm.num_batches_tracked.add_(1)
        y = conv_transpose2d_bn_act(
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
            slope=1.0,
        )
        return _prelu(y, self.act.weight)


class Generator(nn.Module):
    """z [N, z_dim] -> pairs [N, 2C, R, R] in (-1, 1): all layers shared but the last, `a` and `b`.

    The paper's sides are 4, 7, 13, 25 and 28: the last layer adds 3 pixels, the others double, less one pixel
    where the next side is odd. So every resolution from 8 on has its sides (16 has 4, 7, 13).
    """

    c_dim = uniforms = 0

    def __init__(
        self,
        z_dim: int = 100,
        channels: int = 1,
        resolution: int = 28,
        ngf: int = 128,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if resolution < 8:
            raise ValueError(f"resolution must be at least 8: got {resolution}")
        if min(z_dim, ngf) < 1:
            raise ValueError(f"z_dim and ngf must be at least 1: got {z_dim} and {ngf}")
        self.z_dim = self.normals = z_dim
        self.dtype = dtype
        sides = [resolution - 3]
        while sides[0] > 4:
            sides.insert(0, (sides[0] + 1) // 2)
        widths = [ngf << i for i in reversed(range(len(sides)))]
        layers = [Layer(z_dim, widths[0], sides[0], 1, 0, 0)]
        for (small, large), (fan_in, fan_out) in zip(
            itertools.pairwise(sides), itertools.pairwise(widths), strict=True
        ):
            layers.append(Layer(fan_in, fan_out, 3, 2, 1, large - (2 * small - 1)))
        self.shared = nn.Sequential(*layers)
        self.a = nn.ConvTranspose2d(ngf, channels, 6, 1, 1)
        self.b = nn.ConvTranspose2d(ngf, channels, 6, 1, 1)
        self.apply(_init)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        x = self.shared(z.to(self.dtype or z.dtype)[:, :, None, None])
        # Two layers of the same input are one of twice the channels.
        weight = torch.cat([self.a.weight, self.b.weight], dim=1).to(x.dtype)
        assert self.a.bias is not None and self.b.bias is not None
        bias = torch.cat([self.a.bias, self.b.bias]).to(x.dtype)
        return torch.tanh(F.conv_transpose2d(x, weight, bias, padding=1).to(z.dtype))

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training pairs and the latents behind them: normal [N, z_dim], uniform [N, 0]."""
        return self(normal), normal


class Discriminator(nn.Module):
    """Pairs [N, 2C, R, R] -> logits [N, 2]: the first convolutions `a` and `b` apart, the rest shared.

    LeNet: 5x5 convolutions to ndf and 2.5 ndf channels, each with max pooling; 25 ndf hidden units, PReLU.
    """

    c_dim = 0

    def __init__(
        self,
        channels: int = 1,
        resolution: int = 28,
        ndf: int = 20,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        side = ((resolution - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"resolution must be at least 16 for two 5x5 convolutions: got {resolution}")
        if ndf < 1:
            raise ValueError(f"ndf must be at least 1: got {ndf}")
        self.dtype = dtype
        self.a = nn.Conv2d(channels, ndf, 5)
        self.b = nn.Conv2d(channels, ndf, 5)
        self.conv = nn.Conv2d(ndf, 5 * ndf // 2, 5)
        self.hidden = nn.Linear(5 * ndf // 2 * side**2, 25 * ndf)
        self.act = nn.PReLU()
        self.out = nn.Linear(25 * ndf, 1)

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The hidden units of both images [N, 2 * 25 ndf]."""
        a, b = img.to(self.dtype or img.dtype).chunk(2, dim=1)
        # The shared layers see both domains as one batch.
        x = F.max_pool2d(torch.cat([weigh(a, self.a), weigh(b, self.b)]), 2)
        x = F.max_pool2d(weigh(x, self.conv), 2).flatten(1)
        x = _prelu(weigh(x, self.hidden), self.act.weight)
        return torch.cat(x.chunk(2), dim=1)

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        n = features.shape[0]
        return weigh(torch.cat(features.chunk(2, dim=1)), self.out).reshape(2, n).t()

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        return self.head(self.features(img)).to(img.dtype)
