"""GAN (Goodfellow et al. 2014, "Generative Adversarial Networks", arXiv:1406.2661): multilayer perceptrons.

Generator z -> 128 -> 256 -> 512 -> 1024 -> image with LeakyReLU and, from the second layer on, BatchNorm;
discriminator image -> 512 -> 256 -> 1 with LeakyReLU and dropout: PyTorch-GAN's sizes, at ngf = ndf = 64.
With labels they are those of a conditional GAN (cgan.py), with other `widths` those of WGAN's perceptron.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan.layers import run_layers, with_labels, with_noise


class Generator(nn.Module):
    """z [N, z_dim], labels [N, c_dim] -> images [N, channels, R, R] in (-1, 1).

    Hidden layers have 2, 4, 8 and 16 times `ngf` units unless `widths` are given; slope 0 is ReLU.
    """

    uniforms = 0

    def __init__(
        self,
        z_dim: int = 100,
        c_dim: int = 0,
        resolution: int = 28,
        channels: int = 1,
        ngf: int = 64,
        slope: float = 0.2,
        dtype: torch.dtype | None = None,
        widths: Sequence[int] | None = None,
        batch_norm: bool = True,
    ):
        super().__init__()
        self.z_dim = self.normals = z_dim
        self.c_dim, self.dtype = c_dim, dtype
        self.shape = (channels, resolution, resolution)
        hidden = [2 * ngf, 4 * ngf, 8 * ngf, 16 * ngf] if widths is None else list(widths)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise([z_dim + c_dim, *hidden])):
            layers.append(nn.Linear(fan_in, fan_out))
            if batch_norm and i > 0:
                layers.append(nn.BatchNorm1d(fan_out))
            layers.append(nn.LeakyReLU(slope))
        self.main = nn.Sequential(*layers, nn.Linear(hidden[-1], channels * resolution**2), nn.Tanh())

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, C, R, R] of latents z [N, z_dim] and one-hot labels c [N, c_dim]."""
        *layers, tanh = self.main
        pixels = run_layers(layers, with_labels(z, c, self.c_dim), self.dtype)
        return tanh(pixels.to(z.dtype)).unflatten(1, self.shape)

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images and the latents behind them: normal [N, z_dim], uniform [N, 0]."""
        return self(normal, c), normal


class Discriminator(nn.Module):
    """Images [N, channels, R, R], labels [N, c_dim] -> logits [N, 1].

    Hidden layers have 8 and 4 times `ndf` units unless `widths` are given; slope 0 is ReLU.
    """

    def __init__(
        self,
        c_dim: int = 0,
        resolution: int = 28,
        channels: int = 1,
        ndf: int = 64,
        slope: float = 0.2,
        dropout: float = 0.3,
        instance_noise: float = 0.0,
        dtype: torch.dtype | None = None,
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        self.c_dim, self.dtype = c_dim, dtype
        self.instance_noise = instance_noise
        hidden = [8 * ndf, 4 * ndf] if widths is None else list(widths)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise([channels * resolution**2 + c_dim, *hidden]):
            layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(slope)]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.main = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The last hidden layer [N, widths[-1]], in `dtype`; labels enter with the image."""
        img = with_noise(img, self.instance_noise, self.training)
        return run_layers(list(self.main)[:-1], with_labels(img.flatten(1), c, self.c_dim), self.dtype)

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of what `features` returns."""
        logits = run_layers([self.main[-1]], features, self.dtype)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R] and one-hot labels c [N, c_dim]."""
        return self.head(self.features(img, c))
