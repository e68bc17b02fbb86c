"""Augmentations in front of the discriminator, for real and generated images alike.

Pure functions of images and random numbers, one row of them a sample, differentiable with respect to the
images to any order. Images [N, G * channels, H, W] hold G domains side by side (CycleGAN, CoGAN): the domains
of a sample share its random numbers, so that pairs stay pairs. Inside, they are [N, G, C, H, W].
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

POLICIES = {"color": 3, "translation": 2, "cutout": 2}  # name: uniform numbers that a sample takes
ADAPT_STEPS = 4  # of D, between two adaptations of p


@dataclass(frozen=True)
class DiffAugment:
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738), always applied.

    In this order, whatever that of `policies`, with a U(0, 1) number u of its own in every place:

        color         x + u - 1/2; m + 2u (x - m), m a pixel's mean over its channels;
                      m + (u + 1/2)(x - m), m the mean of the image
        translation   whole pixels, at most an eighth of the side, zeros moving in
        cutout        zeros in a square of half the side, its center anywhere in the image
    """

    policies: tuple[str, ...]
    channels: int
    normals: ClassVar[int] = 0

    @property
    def uniforms(self) -> int:
        """Uniform numbers that an image's draws take."""
        return sum(POLICIES[policy] for policy in self.policies)

    def __call__(
        self, images: Tensor, uniform: Tensor, normal: Tensor | None = None, p: Tensor | None = None
    ) -> Tensor:
        """images [N, G * channels, H, W], uniform [N, uniforms] -> images; normal and p have no part."""
        x = _domains(images, self.channels)
        u = iter(uniform.to(x.dtype)[:, :, None, None, None, None].unbind(1))  # each [N, 1, 1, 1, 1]
        if "color" in self.policies:
            x = x + (next(u) - 0.5)
            x = torch.lerp(x.mean(dim=2, keepdim=True), x, 2 * next(u))
            x = torch.lerp(x.mean(dim=(2, 3, 4), keepdim=True), x, next(u) + 0.5)
        if "translation" in self.policies:
            x = _translate(x, next(u), next(u))
        if "cutout" in self.policies:
            x = _cut_out(x, next(u), next(u))
        return x.flatten(1, 2).to(images.dtype)


@dataclass(frozen=True)
class ADA:
    """The `bgc` pipeline of adaptive discriminator augmentation (Karras et al. 2020, arXiv:2006.06676, B.2).

    Each of these by itself with probability p, u ~ U(0, 1) and z ~ N(0, 1); lengths in sides of the image:

        mirror (by half), quarter turns, translation by whole pixels up to 1/8,
        scale 2^(0.2 z), rotation by any angle, stretch 2^(0.2 z) by 2^(-0.2 z), rotation again (the two
        rotations together with probability p), translation z / 8;
        brightness + 0.2 z, contrast 2^(0.5 z), luma flip (by half), hue rotation, saturation 2^z.

    The geometric ones are one affine warp of the image continued by reflection: bilinear, of an image of
    twice the resolution that the paper's filter makes (sym6, once up and once down, is one interpolation).
    So translated and rotated images are as sharp as the paper's; but no filter comes after the warp: what is
    too fine for a shrunk image aliases. Mirrors, quarter turns and whole pixels move values unchanged, and an
    image that drew no transformation is returned as it came, so p = 0 is the identity.

    Gray images have no hue and no saturation. Raises ValueError for `channels` other than 1 and 3.
    """

    channels: int

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(
                f"ADA changes colors of gray and RGB images: got {self.channels} channels; use DiffAugment"
            )

    @property
    def uniforms(self) -> int:
        """Uniform numbers that an image's draws take."""
        return 21 if self.channels == 3 else 18

    @property
    def normals(self) -> int:
        """Normal numbers that an image's draws take."""
        return 7 if self.channels == 3 else 6

    def __call__(self, images: Tensor, uniform: Tensor, normal: Tensor, p: Tensor) -> Tensor:
        """images [N, G * channels, H, W], uniform [N, uniforms], normal [N, normals], p scalar -> images."""
        x = _domains(images, self.channels)
        u, z, p = uniform.to(x.dtype), normal.to(x.dtype), p.to(x.dtype)
        moved, to_x, to_y = _geometry(u[:, :14], z[:, :4], p, *x.shape[3:])
        x = _where(moved, _sample(x, to_x, to_y), x)
        recolored, offset, gains = _colors(u[:, 14:], z[:, 4:], p)
        y = offset
        for i, gain in enumerate(gains):
            y = torch.addcmul(y, gain, x.roll(-i, dims=2) if i else x)
        return _where(recolored, y, x).flatten(1, 2).to(images.dtype)


def make_augment(diffaugment: str, ada: bool, channels: int) -> DiffAugment | ADA | None:
    """What --diffaugment ("color,translation,cutout" or a part of it; "" for none) and --ada ask for.

    Raises ValueError for both, an unknown policy, or channels that ADA cannot color.
    """
    policies = {name.strip() for name in diffaugment.split(",")} - {""}
    for unknown in sorted(policies - POLICIES.keys()):
        raise ValueError(f"unknown policy {unknown!r} in {diffaugment!r}: choose from {', '.join(POLICIES)}")
    if policies and ada:
        raise ValueError("DiffAugment and ADA both augment what D sees: use one of them")
    if ada:
        return ADA(channels)
    return DiffAugment(tuple(name for name in POLICIES if name in policies), channels) if policies else None


def adapt(p: Tensor, sign_mean: Tensor, target: float, batch: int, kimg: float = 500) -> Tensor:
    """p + sign(r_t - target) * batch / (1000 kimg), within 0..1 (Karras et al. 2020, section 3.1).

    r_t = `sign_mean` = E[sign(D(real))] over the `batch` real images of the last ADAPT_STEPS steps of D (0.6
    is the paper's target); p takes `kimg` thousand images from 0 to 1.
    """
    return (p + torch.sign(sign_mean - target) * (batch / (1000 * kimg))).clamp(0, 1)


def _domains(images: Tensor, channels: int) -> Tensor:
    """[N, G * channels, H, W] -> [N, G, channels, H, W], single precision at least."""
    if images.shape[1] % channels:
        raise ValueError(f"images have {images.shape[1]} channels: not a multiple of {channels}")
    return images.to(torch.promote_types(images.dtype, torch.float32)).unflatten(1, (-1, channels))


def _translate(x: Tensor, u_down: Tensor, u_right: Tensor) -> Tensor:
    h, w = x.shape[3:]
    from_y, from_x = _shifted(h, u_down).mT, _shifted(w, u_right)
    inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)
    return _take(x, from_y.clamp(0, h - 1) * w + from_x.clamp(0, w - 1)) * inside


def _shifted(side: int, u: Tensor) -> Tensor:
    """Where the places 0 .. side - 1 come from, [N, 1, 1, 1, side]."""
    limit = _part(side, 8)
    return torch.arange(side, device=u.device) + limit - (u * (2 * limit + 1)).long()


def _cut_out(x: Tensor, u_down: Tensor, u_right: Tensor) -> Tensor:
    inside = []
    for side, u in ((x.shape[3], u_down), (x.shape[4], u_right)):
        size = _part(side, 2)
        distance = torch.arange(side, device=x.device) - (u * (side + 1 - size % 2)).long() + size // 2
        inside.append((distance >= 0) & (distance < size))  # [N, 1, 1, 1, side]
    return x * ~(inside[0].mT & inside[1])


def _part(side: int, divisor: int) -> int:
    return int(side / divisor + 0.5)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x [N, G, C, ., .] at flat places [N, 1, 1, ...] -> [N, G, C, ...]."""
    flat = x.flatten(3)
    return flat.gather(3, places.flatten(3).expand(*flat.shape[:3], -1)).unflatten(3, places.shape[3:])


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None, None], a, b)


def _geometry(u: Tensor, z: Tensor, p: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which images move [N], and where each of their pixels comes from: x and y [N, H, W].

    u [N, 14], z [N, 4]. A transformation that is off has 0 for its parameter.
    """
    on = torch.cat([u[:, :6] < p, u[:, 6:8] < 1 - (1 - p).sqrt()], dim=1)
    mirror, quarter, shift, scale, stretch, drift, turn, turn_again = on.to(u.dtype).unbind(1)
    u_mirror, u_quarter, u_right, u_down, u_turn, u_turn_again = u[:, 8:].unbind(1)
    z_scale, z_stretch, z_right, z_down = z.unbind(1)

    scale, stretch = -0.2 * z_scale * scale, -0.2 * z_stretch * stretch
    stretches = torch.stack([(scale + stretch).exp2(), (scale - stretch).exp2()], dim=1)
    smooth = _product(
        _rotation((2 * u_turn - 1) * math.pi * turn) * stretches[:, None],
        _rotation((2 * u_turn_again - 1) * math.pi * turn_again),
    )
    drifts = torch.stack([z_right * (w / 8), z_down * (h / 8)], dim=1) * drift[:, None]
    mirrors = torch.stack([1 - 2 * (2 * u_mirror).floor() * mirror, torch.ones_like(mirror)], dim=1)
    exact = mirrors[:, :, None] * _rotation((4 * u_quarter).floor() * (math.pi / 2) * quarter).round()
    shifts = torch.stack([(2 * u_right - 1) * (w / 8), (2 * u_down - 1) * (h / 8)], dim=1).round()

    # Undone from the last to the first: source = exact (smooth (pixel - drift) - shift), from the center.
    matrix = _product(exact, smooth)[..., None, None]
    back = (smooth * drifts[:, None]).sum(dim=2) + shifts * shift[:, None]
    offset = (exact * back[:, None]).sum(dim=2)[..., None, None]
    x, y = (torch.arange(side, device=u.device, dtype=u.dtype) - (side - 1) / 2 for side in (w, h))
    to_x, to_y = (matrix[:, :, 0] * x + matrix[:, :, 1] * y[:, None] - offset).unbind(1)
    return on.any(dim=1), to_x + (w - 1) / 2, to_y + (h - 1) / 2


def _rotation(angle: Tensor) -> Tensor:
    """[N] -> [N, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [N, 2, 2], never in TF32."""
    return (a[..., None] * b[:, None]).sum(dim=2)


def _sample(x: Tensor, to_x: Tensor, to_y: Tensor) -> Tensor:
    """x [N, G, C, H, W] at to_x, to_y [N, H, W], in pixels from the center of the first.

    By gathers, which are exact at whole pixels and have all derivatives; not every grid_sample has a second.
    """
    h, w = x.shape[3:]
    fine = _doubling(h, x) @ x @ _doubling(w, x).t()  # [N, G, C, 2H - 1, 2W - 1]
    to_x, to_y = _reflect(2 * to_x, w)[:, None, None], _reflect(2 * to_y, h)[:, None, None]
    left, top = to_x.floor().clamp(max=2 * w - 3), to_y.floor().clamp(max=2 * h - 3)
    row = 2 * w - 1
    first = (top.long() * row + left.long())[..., None, :, :]
    corners = torch.cat([first, first + 1, first + row, first + row + 1], dim=-3)
    top_left, top_right, low_left, low_right = _take(fine, corners).unbind(-3)
    to_x, to_y = to_x - left, to_y - top
    return torch.lerp(torch.lerp(top_left, top_right, to_x), torch.lerp(low_left, low_right, to_x), to_y)


# What interpolates in the middle between samples, by distance in halves of a pixel: Lagrange's polynomial
# through the nearest 12, which is the autocorrelation of the wavelet filter sym6.
_ODD = range(-11, 12, 2)
_MIDDLE = {d: math.prod(other / (other - d) for other in _ODD if other != d) for d in _ODD}


def _doubling(size: int, like: Tensor) -> Tensor:
    """[2 size - 1, size]: keeps the samples and puts one in the middle between any two of them."""
    to = torch.arange(2 * size - 1, device=like.device)[:, None]
    source = 2 * torch.arange(size, device=like.device)
    matrix = (to == source).to(like.dtype)
    for distance, weight in _MIDDLE.items():
        matrix = matrix + weight * (_reflect(to + distance, size) == source)
    return matrix


def _reflect(places: Tensor, size: int) -> Tensor:
    """Places in halves of a pixel, continued by reflection at the centers of the first and last pixel."""
    last = 2 * (size - 1)
    return last - (places.remainder(2 * last) - last).abs()


def _colors(u: Tensor, z: Tensor, p: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Which images change [N], and how: y[c] = offset + sum_i gains[i] * x[c + i], each [N, 1, 1, 1, 1].

    u [N, 7] and z [N, 3]; for gray images u [N, 4] and z [N, 2]. All of the transformations turn or scale
    colors about the gray axis, so their matrices, and their product, are circulant.
    """
    rgb = z.shape[1] == 3
    chances, values = u.tensor_split([5 if rgb else 3], dim=1)
    on = chances < p
    chosen, normal, gate = (t[..., None, None, None, None].unbind(1) for t in (values, z, on.to(u.dtype)))
    contrast = (0.5 * normal[1] * gate[1]).exp2()
    luma = contrast * (1 - 2 * (2 * chosen[0]).floor() * gate[2])
    offset = 0.2 * normal[0] * gate[0] * luma
    if not rgb:
        return on.any(dim=1), offset, (luma,)
    angle = (2 * chosen[1] - 1) * math.pi * gate[3]
    chroma = contrast * (normal[2] * gate[4]).exp2() / 3
    cos, sin = chroma * angle.cos(), math.sqrt(3) * chroma * angle.sin()
    luma = luma / 3
    return on.any(dim=1), offset, (luma + 2 * cos, luma - cos - sin, luma - cos + sin)
