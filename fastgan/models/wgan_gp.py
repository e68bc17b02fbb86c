"""WGAN-GP (Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028).

The gradient penalty is a function of each image, so nothing in the critic may mix images as BatchNorm does
(section 4). Bodies: "resnet", the paper's residual networks for CIFAR-10 (appendix C, and the authors'
gan_cifar_resnet.py), with one width throughout; "dcgan" and "mlp", those of wgan.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.kernels.bias_act import bias_act
from fastgan.layers import normalize, project, run_layers, weigh, with_labels, with_noise
from fastgan.models import wgan
from fastgan.models.dcgan import sides


def Generator(
    z_dim: int = 128,
    c_dim: int = 0,
    resolution: int = 32,
    channels: int = 3,
    ngf: int = 128,
    kernel: int = 4,
    blocks: int = 0,
    body: str = "resnet",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """z [N, z_dim], labels [N, c_dim] -> images [N, channels, R, R] in (-1, 1)."""
    _check(body)
    if body == "resnet":
        return ResidualGenerator(z_dim, c_dim, resolution, channels, ngf, dtype)
    return wgan.Generator(z_dim, c_dim, resolution, channels, ngf, kernel, blocks, body, dtype)


def Discriminator(
    c_dim: int = 0,
    resolution: int = 32,
    channels: int = 3,
    ndf: int = 128,
    kernel: int = 4,
    blocks: int = 0,
    slope: float = 0.2,
    dropout: float = 0.0,
    instance_noise: float = 0.0,
    norm: str = "none",
    body: str = "resnet",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The critic: images [N, channels, R, R], labels [N, c_dim] -> scores [N, 1].

    "dcgan" takes a `norm` of "none", "layer" or "instance" (dcgan.py), the other bodies have none.
    """
    _check(body)
    if norm == "batch":
        raise ValueError(
            "norm batch mixes the images of a batch, which the gradient penalty forbids: use none or layer"
        )
    if norm != "none" and body != "dcgan":
        raise ValueError(f"norm {norm} is for body dcgan: body {body} has none")
    if body == "resnet":
        return ResidualCritic(c_dim, resolution, channels, ndf, instance_noise, dtype)
    return wgan.Discriminator(
        *(c_dim, resolution, channels, ndf, kernel, blocks, slope, dropout, instance_noise, norm, body, dtype)
    )


class ResidualGenerator(nn.Module):
    """z -> linear layer -> a residual block for each doubling -> BatchNorm, ReLU, 3x3 convolution, tanh."""

    uniforms = 0

    def __init__(
        self, z_dim: int, c_dim: int, resolution: int, channels: int, width: int, dtype: torch.dtype | None
    ):
        super().__init__()
        self.z_dim = self.normals = z_dim
        self.c_dim, self.dtype = c_dim, dtype
        self.start, *doubled = sides(resolution)
        self.input = nn.Linear(z_dim + c_dim, width * self.start**2)
        self.blocks = nn.Sequential(*(UpBlock(width) for _ in doubled))
        self.norm = nn.BatchNorm2d(width)
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        _init(self)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        x = run_layers([self.input], with_labels(z, c, self.c_dim), self.dtype)
        x = self.blocks(x.unflatten(1, (-1, self.start, self.start)))
        return weigh(normalize(x, self.norm, slope=0.0), self.output).to(z.dtype).tanh()

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, z_dim], uniform [N, 0]."""
        return self(normal, c), normal


class UpBlock(nn.Module):
    """BatchNorm, ReLU, doubling, convolution, BatchNorm, ReLU, convolution; x [N, C, H, W] -> 2H x 2W."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, 2H, 2W]."""
        y = normalize(x, self.norm1, slope=0.0, upsample=2)
        y = run_layers([self.conv1, self.norm2, nn.ReLU(), self.conv2], y, None)
        # A 1x1 convolution of doubled pixels is the doubled 1x1 convolution, at a quarter of the work.
        return y + F.interpolate(weigh(x, self.shortcut), scale_factor=2)


class ResidualCritic(nn.Module):
    """Blocks that halve the image down to 8x8 (or 14x14), two that do not, ReLU, mean over pixels, logit."""

    def __init__(
        self,
        c_dim: int,
        resolution: int,
        channels: int,
        width: int,
        instance_noise: float,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.c_dim, self.dtype = c_dim, dtype
        self.instance_noise = instance_noise
        halved = max(len(sides(resolution)) - 2, 1)
        blocks = [CriticBlock(channels if i == 0 else width, width, i == 0, True) for i in range(halved)]
        self.blocks = nn.Sequential(*blocks, *(CriticBlock(width, width, False, False) for _ in range(2)))
        self.output = nn.Linear(width, 1)
        self.embed = nn.Embedding(c_dim, width) if c_dim else None
        _init(self)

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Means over the pixels of the last map [N, ndf], in fp32 or better."""
        img = with_noise(img, self.instance_noise, self.training)
        x = self.blocks(img.to(self.dtype or img.dtype))
        return bias_act(x, act="relu", gain=1.0).to(img.dtype).mean(dim=(2, 3))

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of what `features` returns."""
        return project(weigh(features, self.output), features, c, self.embed)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and one-hot labels c [N, c_dim]."""
        return self.head(self.features(img), c)


class CriticBlock(nn.Module):
    """ReLU (not on the image), convolution, ReLU, convolution, then the mean of 2x2 pixels if `halve`."""

    def __init__(self, fan_in: int, fan_out: int, first: bool, halve: bool):
        super().__init__()
        self.first, self.halve = first, halve
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1) if halve else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, H, W] or half of it."""
        y = x if self.first else bias_act(x, act="relu", gain=1.0)
        y = run_layers([self.conv1, nn.ReLU(), self.conv2], y, None)
        if self.halve:
            y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)  # the 1x1 convolution of a mean is its mean
        return y + (x if self.shortcut is None else weigh(x, self.shortcut))


def _init(net: nn.Module) -> None:
    """Uniform by Glorot's rule, with He's gain for the 3x3 convolutions in the blocks; biases zero."""
    for name, m in net.named_modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(m.weight, gain=2**0.5 if ".conv" in name else 1.0)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def _check(body: str) -> None:
    if body not in ("resnet", "dcgan", "mlp"):
        raise ValueError(f"body must be resnet, dcgan or mlp: got {body!r}")
