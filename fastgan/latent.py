"""The latent space of a trained generator: ways through it, mixed styles, directions.

A point of it is what a picture is made from: ws [num_ws, w_dim] of a StyleGAN, a w for every layer, and z
[z_dim] of any other family.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.config import Config, UsageError
from fastgan.equalized import FullyConnected, StyleGenerator
from fastgan.images import join_pair, quantize
from fastgan.models import Generator, stylegan
from fastgan.sampling import chunk_size, in_chunks, noises

SAMPLES = 10_000  # of w, for its mean and principal components


@torch.no_grad()
def points(G: Generator, z: Tensor, c: Tensor | None, truncation: float, cutoff: int | None = None) -> Tensor:
    """ws [N, num_ws, w_dim] of z [N, z_dim], or z itself where there is no w."""
    if not isinstance(G, StyleGenerator):
        return z
    return G.mapping(z, None if c is None else c.expand(len(z), -1), truncation, cutoff)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a [..., D] (t = 0) to b (t = 1) along the circle through both, if they are of one length:

        (sin((1 - t) theta) a + sin(t theta) b) / sin(theta),  theta the angle between a and b

    and straight where they are parallel (Shoemake 1985, "Animating rotation with quaternion curves").
    Normal z of many dimensions lie near a sphere, which straight lines leave (White 2016, arXiv:1609.04468).
    """
    x, y = a.double(), b.double()
    u, v = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    theta = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    turned = (((1 - t) * theta).sin() * x + (t * theta).sin() * y) / theta.sin()
    return torch.where(theta.sin() < 1e-6, torch.lerp(x, y, t), turned).to(a.dtype)


def ways(
    points: Tensor, frames: int, between: Callable[[Tensor, Tensor, float], Tensor], loop: bool = False
) -> Tensor:
    """points [K, ...] -> [K - 1, frames + 1, ...]: the way from each to the next, both ends with it.

    `loop` adds the way from the last to the first.
    """
    ends = points.roll(-1, 0) if loop else points[1:]
    return torch.stack(
        [
            torch.stack([between(a, b, i / frames) for i in range(frames + 1)])
            for a, b in zip(points, ends, strict=False)
        ]
    )


def once(ways: Tensor, loop: bool = False) -> Tensor:
    """`ways` [S, frames + 1, ...] in a row, where one ends and the next begins once: [M, ...].

    A loop ends a frame before its first one.
    """
    row = ways[:, :-1].flatten(0, 1)
    return row if loop else torch.cat([row, ways[-1:, -1]])


def mix(rows: Tensor, columns: Tensor, layers: Sequence[int]) -> Tensor:
    """Style mixing (Karras et al. 2018, section 3.1): ws [R, L, D] and [C, L, D] -> [R, C, L, D].

    Of a row's ws and a column's, the `layers` are the column's and all others the row's.
    """
    taken = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    taken[list(layers)] = True
    return torch.where(taken[:, None], columns[None], rows[:, None])


class Directions(NamedTuple):
    """Unit vectors [K, D], the most important first, and the deviation of w or z along each [K]."""

    vectors: Tensor
    scales: Tensor


def principal_directions(w: Tensor, count: int) -> Directions:
    """Principal components of w [N, D] (GANSpace; Härkönen et al. 2020, arXiv:2004.02546, section 2.1)."""
    w = w.double()
    w = w - w.mean(dim=0)
    values, vectors = torch.linalg.eigh(w.t() @ w / (len(w) - 1))
    return _largest(values, vectors, count)


def semantic_directions(weight: Tensor, count: int, w: Tensor | None = None) -> Directions:
    """Eigenvectors n of A^T A for the weight A [features, D] that reads the latent:
    A^T A n = lambda n (SeFa; Shen and Zhou 2021, arXiv:2007.06600, equation 6).

    Scales are the deviations of `w` [N, D] along them; 1 without, as those of a normal z are.
    """
    weight = weight.detach().double()
    values, vectors = torch.linalg.eigh(weight.t() @ weight)
    vectors, _ = _largest(values, vectors, count)
    if w is None:
        return Directions(vectors, vectors.new_ones(count))
    return Directions(vectors, (w.double() @ vectors.double().t()).std(dim=0).float())


def _largest(values: Tensor, vectors: Tensor, count: int) -> Directions:
    """The last `count` of eigh's eigenvectors as rows, the largest number of each positive."""
    rows = vectors.t().flip(0)[:count]
    peak = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return Directions((rows * peak.sign()).float(), values.flip(0)[:count].clamp_min(0).sqrt().float())


def first_layer(G: Generator) -> Tensor:
    """[features, D]: the matrix by which a family without w reads z, or the first D numbers of it.

    BigGAN's other numbers, where z is hierarchical, enter later.
    """
    if isinstance(getattr(G, "project", None), nn.Parameter):  # R3GAN
        return G.project[:, : G.z_dim]
    layer = next(m for m in G.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d | FullyConnected))
    weight = layer.weight.flatten(1)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.t()
    if getattr(G, "deep", False):  # BigGAN-deep's labels come before z, others' behind it
        return weight[:, -G.z_dim :]
    return weight[:, : G.z_dim // getattr(G, "chunks", 1)]


def style_layers(G: StyleGenerator, layers: Sequence[int]) -> Tensor:
    """[features, w_dim]: the affine maps of w of those `layers`, one below the other."""
    owners: list[tuple[int, FullyConnected]] = []
    if isinstance(G.synthesis, stylegan.Synthesis):
        first = 0  # an output and the next resolution's first layer share a w
        for block in (getattr(G.synthesis, f"b{side}") for side in G.synthesis.resolutions):
            readers = [m for m in (*([] if block.is_first else [block.conv0]), block.conv1, block.torgb) if m]
            owners += [(first + i, reader.affine) for i, reader in enumerate(readers)]
            first += block.num_convs
    else:
        owners += [(i, layer.style.affine) for i, layer in enumerate(G.synthesis.layers)]
    return torch.cat([affine.weight * affine.weight_gain for i, affine in owners if i in layers])


@torch.no_grad()
def sample_w(G: StyleGenerator, c: Tensor | None, count: int = SAMPLES) -> Tensor:
    """w [count, w_dim] of always the same z, of the class c [1, c_dim]."""
    device = next(G.parameters()).device
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((count, G.z_dim), np.float32)).to(device)
    return G.mapping(z, None if c is None else c.expand(count, -1))[:, 0]


def find_directions(
    G: Generator, count: int, method: str, c: Tensor | None = None, layers: Sequence[int] = ()
) -> Directions:
    """By "pca" of w, or by "sefa": of a StyleGAN's style `layers`, or of the layer by which others read z.

    UsageError for more than there are, and for pca of z, which is normal in all directions alike.
    """
    if isinstance(G, StyleGenerator):
        w = sample_w(G, c)
        most = w.shape[1]
        if 1 <= count <= most:
            return (
                principal_directions(w, count)
                if method == "pca"
                else semantic_directions(style_layers(G, layers), count, w)
            )
    elif method == "pca":
        raise UsageError("--directions-method pca needs w, which only StyleGANs have; use sefa")
    else:
        weight = first_layer(G)
        most = weight.shape[1]
        if 1 <= count <= most:
            vectors, scales = semantic_directions(weight, count)
            return Directions(F.pad(vectors, (0, G.z_dim - most)), scales)
    raise UsageError(f"this generator has {most} directions, 0 to {most - 1}; {count} are asked for")


def bend(G: Generator, shift: Tensor, layers: Sequence[int]) -> None:
    """From now on, whatever G makes is made from w + shift in `layers`, or z + shift in other families."""

    def bend_w(mapping: nn.Module, args: tuple, ws: Tensor) -> Tensor:
        return shifted(ws, shift, layers)

    def bend_z(G: nn.Module, args: tuple) -> tuple:
        return args[0] + shift, *args[1:]

    if isinstance(G, StyleGenerator):
        G.mapping.register_forward_hook(bend_w)
    else:
        G.register_forward_pre_hook(bend_z)


def shifted(points: Tensor, shift: Tensor, layers: Sequence[int]) -> Tensor:
    """z [N, D] + shift, or ws [N, num_ws, D] + shift in `layers` alone; shift [D] or [N, D]."""
    if points.ndim == 2:
        return points + shift
    inside = torch.zeros(points.shape[1], 1, device=points.device)
    inside[list(layers)] = 1
    return points + inside * shift.unsqueeze(-2)


def pictures(
    G: Generator,
    config: Config,
    points: Tensor,
    c: Tensor | None,
    noise: str = "const",
    seed: int = 0,
    **running: Any,
) -> np.ndarray:
    """uint8 [N, R, R, C] from ws [N, num_ws, w_dim] or z [N, z_dim], all of the class c [1, c_dim].

    `noise` of a StyleGAN as of a `sampling.Plan`; `running` as for `in_chunks`. A family of two domains gives
    pairs side by side, [N, R, 2R, C].
    """

    def inputs(first: int, count: int) -> tuple[Tensor | None, ...]:
        drawn = None
        if isinstance(G, StyleGenerator) and noise == "random":
            drawn = noises(seed, count, G.synthesis.noise_size, first)
        return points[first : first + count], None if c is None else c.expand(count, -1), drawn

    def finish(images: Tensor) -> Tensor:
        return quantize(join_pair(images) if config.domains == 2 else images)

    run, size = partial(_picture, noise=noise), chunk_size(config.resolution, points.device)
    return np.concatenate(list(in_chunks(G, run, len(points), size, inputs, finish, **running)))


def _picture(G: Generator, points: Tensor, c: Tensor | None, drawn: Tensor | None, noise: str) -> Tensor:
    if not isinstance(G, StyleGenerator):
        return G(points, c)
    return G.synthesis(points, noise if drawn is None else drawn)
