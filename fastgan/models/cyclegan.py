"""CycleGAN (Zhu, Park, Isola and Efros 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks", arXiv:1703.10593).

A batch of two domains is one tensor of pairs [N, 2C, R, R]: an image of domain A and one of B, unpaired,
joined along the channels. G maps a pair of real images to a pair of fakes (b as an A, a as a B), D judges the
halves by two networks and joins their logits. A mean over joined halves is half of the sum over both domains
that the paper writes: so are `penalties`, hence G's whole loss is half the paper's with the same minimum (and
the same steps of Adam), and D's is the public implementation's, which halves it too.

Both networks' convolutions have biases, as the public implementation's have with instance norm, so that its
weights load and the parameters count as there. In front of an instance norm a bias cancels and its gradient
is zero: it is kept, and not added. For its other networks there are `batch_norm`, whose convolutions have
none, other borders than reflected ones, and `one_way`: a single network, of images instead of pairs.
"""

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.norm_act import instance_norm_act
from fastgan.layers import normalize, weigh
from fastgan.pool import Pool

DOMAINS = 2  # images are pairs
PADDINGS = {"reflect": "reflect", "replicate": "replicate", "zero": "constant"}
SLOPES = {"relu": 0.0, "lrelu": 0.2, "linear": 1.0}


def _init(module: nn.Module) -> None:
    """N(0, 0.02) for weights, 0 for biases (section 7.1)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _pad(x: Tensor, pixels: int, padding: str = "reflect") -> Tensor:
    return F.pad(x, [pixels] * 4, PADDINGS[padding])


def _norms(batch_norm: bool, widths: Iterable[int]) -> nn.ModuleList | list[None]:
    """Modules for batch norms; an instance norm has no parameters and no module."""
    return nn.ModuleList(map(nn.BatchNorm2d, widths)) if batch_norm else [None for _ in widths]


def _normed(x: Tensor, conv: nn.Module, norm: nn.Module | None, act: str) -> Tensor:
    """act(norm(conv(x))), instance norm where there is no other."""
    if norm is not None:
        return normalize(weigh(x, conv), norm, SLOPES[act])
    return instance_norm_act(weigh(x, conv, bias=False), act=act, alpha=0.2)


class Block(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), 3x3 convolutions of the padded x [N, C, H, W]."""

    def __init__(self, channels: int, batch_norm: bool, padding: str):
        super().__init__()
        self.padding = padding
        self.conv0 = nn.Conv2d(channels, channels, 3, bias=not batch_norm)
        self.conv1 = nn.Conv2d(channels, channels, 3, bias=not batch_norm)
        self.norms = _norms(batch_norm, [channels, channels])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        y = _normed(_pad(x, 1, self.padding), self.conv0, self.norms[0], "relu")
        return x + _normed(_pad(y, 1, self.padding), self.conv1, self.norms[1], "linear")


class ResNet(nn.Module):
    """Images of one domain to images of the other, [N, C, R, R] in -1..1: 7x7 stem, two strided
    convolutions, residual blocks, two transposed convolutions, 7x7 and tanh (Johnson et al. 2016).

    `padding` is that of the blocks: the ends reflect. `out_channels` is `channels` if not given.
    """

    def __init__(
        self,
        channels: int,
        ngf: int,
        blocks: int,
        dtype: torch.dtype | None,
        out_channels: int | None = None,
        batch_norm: bool = False,
        padding: str = "reflect",
    ):
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}: got {padding!r}")
        self.dtype = dtype
        bias = not batch_norm
        widths = [ngf, 2 * ngf, 4 * ngf]
        steps = list(itertools.pairwise(widths))
        self.stem = nn.Conv2d(channels, ngf, 7, bias=bias)
        self.down = nn.ModuleList([nn.Conv2d(i, o, 3, 2, 1, bias=bias) for i, o in steps])
        self.blocks = nn.ModuleList([Block(widths[-1], batch_norm, padding) for _ in range(blocks)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(o, i, 3, 2, 1, 1, bias=bias) for i, o in reversed(steps)])
        self.out = nn.Conv2d(ngf, out_channels or channels, 7)
        self.norms = _norms(batch_norm, [*widths, *widths[-2::-1]])
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, R, R] of one domain -> of the other."""
        x = _pad(images.to(self.dtype or images.dtype), 3)
        stem, down0, down1, up0, up1 = self.norms
        x = _normed(x, self.stem, stem, "relu")
        for conv, norm in zip(self.down, (down0, down1), strict=True):
            x = _normed(x, conv, norm, "relu")
        for block in self.blocks:
            x = block(x)
        for conv, norm in zip(self.up, (up0, up1), strict=True):
            x = _normed(x, conv, norm, "relu")
        return torch.tanh(weigh(_pad(x, 3), self.out).to(images.dtype))


class Generator(nn.Module):
    """Pairs of real images [N, 2C, R, R] -> pairs of fake ones: `b_to_a` of b, then `a_to_b` of a.

    There is no latent: the real pair comes as `c`. `cycle` and `identity` weight the terms of `penalties`
    (lambda = 10 and 0.5 lambda in section 5.2 and the paper's appendix). `one_way` makes `a_to_b` alone,
    which takes images and returns images of `out_channels`.
    """

    translates = True
    z_dim = c_dim = normals = uniforms = 0

    def __init__(
        self,
        channels: int = 3,
        resolution: int = 256,
        ngf: int = 64,
        blocks: int = 9,
        cycle: float = 10.0,
        identity: float = 0.5,
        dtype: torch.dtype | None = None,
        one_way: bool = False,
        out_channels: int | None = None,
        batch_norm: bool = False,
        padding: str = "reflect",
    ):
        super().__init__()
        if resolution < 8 or resolution % 4:
            raise ValueError(f"resolution must be a multiple of 4, from 8 on: got {resolution}")
        if min(ngf, blocks) < 1:
            raise ValueError(f"ngf and blocks must be at least 1: got {ngf} and {blocks}")
        if min(cycle, identity) < 0:
            raise ValueError(f"cycle and identity must be at least 0: got {cycle} and {identity}")
        self.cycle, self.identity = cycle, identity
        self.a_to_b = ResNet(channels, ngf, blocks, dtype, out_channels, batch_norm, padding)
        self.b_to_a = (
            None
            if one_way
            else ResNet(out_channels or channels, ngf, blocks, dtype, channels, batch_norm, padding)
        )

    def forward(self, z: Tensor | None, c: Tensor | None = None) -> Tensor:
        """z is not used (an empty [N, 0], or None); c the real pair. `one_way` translates images, z or c."""
        if self.b_to_a is None:
            images = z if c is None else c
            assert images is not None
            return self.a_to_b(images)
        if c is None:
            raise ValueError("c must be given to a translator: the pair of images [N, 2C, R, R] to translate")
        a, b = c.chunk(2, dim=1)
        return torch.cat([self.b_to_a(b), self.a_to_b(a)], dim=1)

    def sample(self, normal: Tensor, uniform: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The fake pair and the real one, c, behind it; normal and uniform [N, 0]."""
        fake = self(normal, c)
        assert c is not None
        return fake, c

    def translate(self, images: Tensor, to: str = "b") -> Tensor:
        """Images of one domain [N, C, R, R] as images of the domain `to`, "a" or "b"."""
        if to not in ("a", "b"):
            raise ValueError(f"to must be 'a' or 'b': got {to!r}")
        net = self.a_to_b if to == "b" else self.b_to_a
        if net is None:
            raise ValueError("to must be 'b': this translator knows one way alone")
        return net(images)

    def penalties(self, images: Tensor, c: Tensor) -> dict[str, Tensor]:
        """What G's loss has beside the adversarial term, weighted, for the fakes that `sample` made of c.

        With G = a_to_b, F = b_to_a and <.> a mean over samples, domains and pixels (equation 2, section 5.2):

            cycle = lambda <|F(G(a)) - a|, |G(F(b)) - b|>
            identity = lambda_identity lambda <|F(a) - a|, |G(b) - b|>

        images [N, 2C, R, R] are [F(b), G(a)], c [N, 2C, R, R] is [a, b]. What one network does for both terms
        is one batch: instance norm lets no sample see another.
        """
        if self.b_to_a is None:
            raise ValueError("a translator of one way cannot be trained: there is no cycle")
        fake_a, fake_b = images.chunk(2, dim=1)
        a, b = c.chunk(2, dim=1)
        if self.identity == 0:
            again = torch.cat([self.b_to_a(fake_b), self.a_to_b(fake_a)], dim=1)
            return {"cycle": self.cycle * F.l1_loss(again, c)}
        again_a, same_a = self.b_to_a(torch.cat([fake_b, a])).chunk(2)
        again_b, same_b = self.a_to_b(torch.cat([fake_a, b])).chunk(2)
        again, same = torch.cat([again_a, again_b], dim=1), torch.cat([same_a, same_b], dim=1)
        return {
            "cycle": self.cycle * F.l1_loss(again, c),
            "identity": self.identity * self.cycle * F.l1_loss(same, c),
        }


class PatchGAN(nn.Module):
    """Images [N, C, R, R] -> a logit for each patch [N, 1, h, w] (Isola et al. 2017, arXiv:1611.07004).

    `layers` strided convolutions and two of stride 1, all 4x4, LeakyReLU 0.2, instance norm between. With 3
    layers a logit sees 70x70 pixels, with 2 34x34, with 1 16x16; with 0 every convolution is 1x1 and a logit
    sees one pixel.
    """

    def __init__(
        self, channels: int, ndf: int, layers: int, dtype: torch.dtype | None, batch_norm: bool = False
    ):
        super().__init__()
        self.dtype = dtype
        widths = [ndf * min(2**i, 8) for i in range(max(layers, 1) + 1)]
        strides = [2] * (layers - 1) + [1]
        kernel, stride, padding = (4, 2, 1) if layers else (1, 1, 0)
        bias = not batch_norm
        self.stem = nn.Conv2d(channels, ndf, kernel, stride, padding)
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(i, o, kernel, s, padding, bias=bias)
                for (i, o), s in zip(itertools.pairwise(widths), strides, strict=True)
            ]
        )
        self.out = nn.Conv2d(widths[-1], 1, kernel, 1, padding)
        self.norms = _norms(batch_norm, widths[1:])
        self.apply(_init)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, C, R, R] -> the maps before the last convolution."""
        x = weigh(images.to(self.dtype or images.dtype), self.stem, bias=False)
        x = bias_act(x, self.stem.bias, act="lrelu", alpha=0.2, gain=1.0)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = _normed(x, conv, norm, "lrelu")
        return x

    def head(self, features: Tensor) -> Tensor:
        """Those maps -> a logit for each patch [N, 1, H, W]."""
        return weigh(features, self.out).to(self.out.weight.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, R, R] -> a logit for each patch [N, 1, H, W]."""
        return self.head(self.features(images))


class Discriminator(nn.Module):
    """Pairs [N, 2C, R, R] -> logits [N, 2, h, w]: those of A's PatchGAN `a`, then those of B's, `b`.

    The paper's 3 `layers` need 24 pixels. Take 2 for images from 12 pixels on, 1 from 6 on. `pool` shows D
    generated pairs of the past; it holds as many as it is told to, 0 for none. `one_way` makes `a` alone, for
    images.
    """

    c_dim = 0

    def __init__(
        self,
        channels: int = 3,
        resolution: int = 256,
        ndf: int = 64,
        layers: int = 3,
        pool: int = 50,
        dtype: torch.dtype | None = None,
        one_way: bool = False,
        batch_norm: bool = False,
    ):
        super().__init__()
        if ndf < 1 or layers < 0:
            raise ValueError(f"ndf must be at least 1 and layers at least 0: got {ndf} and {layers}")
        if pool < 0:
            raise ValueError(f"pool must be at least 0: got {pool}")
        if resolution >> layers < 3:
            raise ValueError(
                f"resolution must be at least {3 << layers} for {layers} layers: got {resolution}; "
                "take fewer layers"
            )
        self.a = PatchGAN(channels, ndf, layers, dtype, batch_norm)
        self.b = None if one_way else PatchGAN(channels, ndf, layers, dtype, batch_norm)
        self.pool = Pool(pool, (2 * channels, resolution, resolution)) if pool else None

    def features(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """The last hidden maps of both networks [N, 2F, h + 1, w + 1]."""
        if self.b is None:
            return self.a.features(img)
        a, b = img.chunk(2, dim=1)
        return torch.cat([self.a.features(a), self.b.features(b)], dim=1)

    def head(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 2, h, w] in the weights' dtype."""
        if self.b is None:
            return self.a.head(features)
        a, b = features.chunk(2, dim=1)
        return torch.cat([self.a.head(a), self.b.head(b)], dim=1)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """Pairs [N, 2C, R, R] -> the logits of both domains' patches."""
        return self.head(self.features(img))
