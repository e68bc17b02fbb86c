"""From an image to the latents that make it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastgan.checkpoint import load_checkpoint
from fastgan.config import Config, UsageError, build_networks
from fastgan.engine import place, set_rate
from fastgan.equalized import StyleGenerator, layer_noises
from fastgan.latent import sample_w
from fastgan.models import Discriminator, Generator, stylegan
from fastgan.sampling import latents

LEARNING_RATE, NOISE_WEIGHT = 0.1, 1e5  # Karras et al. 2019, appendix D
NORM_WEIGHT = 0.1  # of z's distance from the sphere where normal numbers lie
STARTS = 64  # z that a projection may start from


def noise_regularizer(maps: Sequence[Tensor]) -> Tensor:
    """How much noise maps [N, 1, R, R] look like pictures (Karras et al. 2019, appendix D):

        sum of (mean of n(x, y) n(x - 1, y))^2 + (mean of n(x, y) n(x, y - 1))^2

    over all maps and, down to 8 pixels, over their halves: means of 2x2 pixels, doubled to keep the variance.
    """
    terms = []
    for n in maps:
        while True:
            terms += [(n * n.roll(1, dim)).mean(dim=(1, 2, 3)).square().sum() for dim in (2, 3)]
            if n.shape[-1] <= 8:
                break
            n = 2 * F.avg_pool2d(n, 2)
    return torch.stack(terms).sum()


def pixel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of images [N, C, R, R], averaged over sizes: whole, half, ... to 4 pixels."""
    terms = [F.mse_loss(a, b)]
    while a.shape[-1] % 2 == 0 and a.shape[-1] >= 8:
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        terms.append(F.mse_loss(a, b))
    return torch.stack(terms).mean()


def hidden_features(D: Discriminator, images: Tensor, c: Tensor | None) -> list[Tensor]:
    """What D makes of images: its last hidden representation and, of StyleGANs, every block's map before."""
    found: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, out: tuple[Tensor, Tensor | None]) -> None:
        found.append(out[0].float())

    hooks = [m.register_forward_hook(keep) for m in D.modules() if isinstance(m, stylegan.DiscriminatorBlock)]
    try:
        last = D.features(images, c).float()
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, last]


def feature_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over layers of |f - g|^2 / |g|^2 (as Pan et al. 2020, arXiv:2003.13659, with D's features)."""
    terms = [
        (f - g).square().sum() / g.square().sum().clamp_min(1e-8) for f, g in zip(found, wanted, strict=True)
    ]
    return torch.stack(terms).mean()


class Projection(NamedTuple):
    """What `project` found: w [w_dim] (z [z_dim] of other families), noise [noise_size] for a StyleGAN's
    synthesis network, and images [1, C, R, R] where it started and ended."""

    latent: Tensor
    noise: Tensor | None
    start: Tensor
    result: Tensor


def project(
    G: Generator,
    target: Tensor,
    c: Tensor | None = None,
    D: Discriminator | None = None,
    steps: int = 1000,
    seed: int = 0,
) -> Projection:
    """The w and noise maps, or the z, whose picture is nearest to `target` [1, C, R, R] in -1..1.

    Karras et al. 2019, appendix D: Adam from the mean of w on, exploring with noise on w that fades out over
    the first three quarters; the noise maps stay normalized and are kept from carrying the picture.
    For LPIPS, whose network is not at hand, stand pixels at several sizes and D's features, if there is a D.
    In z it starts from the nearest of `STARTS` samples and stays near the sphere of normal numbers.
    G has to be frozen, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    noise, layers = None, []
    if isinstance(G, StyleGenerator):
        samples = sample_w(G, c)
        start = samples.mean(dim=0, keepdim=True)
        deviation = (samples - start).square().sum(dim=1).mean().sqrt().item()
        layers = list(G.synthesis.layers)
        noise = torch.cat([layer.noise_const.flatten() for layer in layers])[None].clone().requires_grad_()
    else:
        start, deviation = _nearest(G, target, c, seed), math.sqrt(G.z_dim)
    latent = start.clone().requires_grad_()

    def render(latent: Tensor) -> Tensor:
        if noise is None:
            return G(latent, c)
        return G.synthesis(latent[:, None].expand(-1, G.synthesis.num_ws, -1), noise)

    with torch.no_grad():
        before = render(start)
        wanted = None if D is None else hidden_features(D, target, c)
    optimizer = torch.optim.Adam([latent] if noise is None else [latent, noise])
    with tqdm(range(steps), desc="projecting", unit=" steps", disable=None, leave=False) as progress:
        for step in progress:
            t = step / steps
            set_rate(
                optimizer,
                LEARNING_RATE * min(t / 0.05, 1) * (1 - math.cos(math.pi * min(4 * (1 - t), 1))) / 2,
            )
            wander = torch.randn(start.shape, generator=generator).to(start)
            images = render(latent + wander * (0.05 * deviation * max(1 - t / 0.75, 0) ** 2))
            near = pixel_distance(images, target)
            loss = near
            if D is not None and wanted is not None:
                loss = loss + feature_distance(hidden_features(D, images, c), wanted)
            if noise is None:
                loss = loss + NORM_WEIGHT * (latent.square().mean() - 1).square()
            else:
                loss = loss + NOISE_WEIGHT * noise_regularizer(_maps(layers, noise))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if noise is not None:
                _normalize(_maps(layers, noise.detach()))
            if step % 20 == 0:
                progress.set_postfix(distance=f"{near.item():.4f}")
    with torch.no_grad():
        after = render(latent)
    return Projection(latent.detach()[0], None if noise is None else noise.detach()[0], before, after)


def _maps(layers: Sequence[nn.Module], noise: Tensor) -> list[Tensor]:
    """noise [1, noise_size] as the layers' maps [1, 1, R, R], which share its memory."""
    return [n for n in layer_noises(layers, noise) if n is not None]


def _normalize(maps: Sequence[Tensor]) -> None:
    """To a mean of 0 and a variance of 1, in place."""
    for n in maps:
        n.sub_(n.mean()).mul_(n.square().mean().clamp_min(1e-8).rsqrt())


@torch.no_grad()
def _nearest(G: Generator, target: Tensor, c: Tensor | None, seed: int) -> Tensor:
    """Of `STARTS` z that one [1, z_dim] whose picture has the smallest distance to the target."""
    z = latents(seed, STARTS, G.z_dim).to(target.device)
    distances = [pixel_distance(G(one, c), target) for one in z.split(1)]
    return z[torch.stack(distances).argmin()][None]


def load_discriminator(run: Path, config: Config, device: torch.device) -> Discriminator | None:
    """D of the newest checkpoint in the folder of a run, frozen, in eval mode; None if there is none."""
    try:
        found = load_checkpoint(run / "checkpoints") if run.is_dir() else None
    except ValueError as error:
        raise UsageError(f"{error}; use --features pixels") from None
    if found is None:
        return None
    D = build_networks(config)[1]
    D.load_state_dict({k.removeprefix("D."): t for k, t in found[0].items() if k.startswith("D.")})
    place(D.eval().requires_grad_(False), device)
    return D
