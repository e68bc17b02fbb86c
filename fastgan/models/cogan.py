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

from fastgan.layers import run_layers, weigh, with_noise

DOMAINS = 2  # images are pairs


def _init(module: nn.Module) -> None:
    """N(0, 0.02) for the generators' convolutions, as in DCGAN."""
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
        layers: list[nn.Module] = [nn.ConvTranspose2d(z_dim, widths[0], sides[0], bias=False)]
        for i, (small, large) in enumerate(itertools.pairwise(sides)):
            layers += [nn.BatchNorm2d(widths[i]), nn.PReLU()]
            extra = large - (2 * small - 1)
            layers.append(nn.ConvTranspose2d(widths[i], widths[i + 1], 3, 2, 1, extra, bias=False))
        self.shared = nn.Sequential(*layers, nn.BatchNorm2d(ngf), nn.PReLU())
        self.a = nn.ConvTranspose2d(ngf, channels, 6, 1, 1)
        self.b = nn.ConvTranspose2d(ngf, channels, 6, 1, 1)
        self.apply(_init)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Pairs [N, 2C, R, R] of latents z [N, z_dim]."""
        x = run_layers(self.shared, z[:, :, None, None], self.dtype)
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
    `instance_noise` is the deviation of noise on every training image.
    """

    c_dim = 0

    def __init__(
        self,
        channels: int = 1,
        resolution: int = 28,
        ndf: int = 20,
        instance_noise: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        side = ((resolution - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"resolution must be at least 16 for two 5x5 convolutions: got {resolution}")
        if ndf < 1:
            raise ValueError(f"ndf must be at least 1: got {ndf}")
        self.dtype, self.instance_noise = dtype, instance_noise
        hidden = 25 * ndf
        self.a = nn.Conv2d(channels, ndf, 5)
        self.b = nn.Conv2d(channels, ndf, 5)
        self.shared = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(ndf, 5 * ndf // 2, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(5 * ndf // 2 * side**2, hidden),
            nn.PReLU(),
        )
        self.out = nn.Linear(hidden, 1)

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The hidden units of both images [N, 2 * 25 ndf]."""
        img = with_noise(img, self.instance_noise, self.training)
        a, b = img.to(self.dtype or img.dtype).chunk(2, dim=1)
        # The shared layers see both domains as one batch.
        x = run_layers(self.shared, torch.cat([weigh(a, self.a), weigh(b, self.b)]), self.dtype)
        return torch.cat(x.chunk(2), dim=1)

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 2] in the weights' dtype."""
        x = features.to(self.out.weight.dtype)
        return torch.cat([self.out(half) for half in x.chunk(2, dim=1)], dim=1)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 2], one for each half of the pairs img [N, 2C, R, R]."""
        return self.head(self.features(img))
