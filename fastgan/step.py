"""The phases of a training step: pure functions of networks and tensors to losses and gradients.

D, D with R1, G and G with path length are four phases. Each is traced whole by `torch.compile` (see
compiled.py), the inner gradients of its penalties included, and depends on nothing but its arguments and
torch's random state: the numbers behind a sample come in as tensors, what only perturbs (dropout, instance
noise, augmentation, where a gradient penalty is taken) is drawn inside. Running means go out as tensors, and
the only state a phase moves is the networks' own buffers (running means of w, BatchNorm statistics, singular
vectors, a pool of past images).

What D is shown of real images, and which labels it is told, can be a family's own affair: see
fastgan/models/__init__.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgan.augment import ADA, DiffAugment
from fastgan.losses import (
    LOSSES,
    batch_mean,
    drift,
    feature_matching,
    gradient_penalty,
    gradient_square,
    homogeneous_logits,
    leaf,
    orthogonal,
    path_length,
    square_norm,
)
from fastgan.models import Discriminator, Generator


class PhaseResult(NamedTuple):
    """What a phase returns."""

    losses: dict[str, Tensor]  # scalars, for the log
    grads: list[Tensor]  # of the trained network's parameters, in their order


class Latents(NamedTuple):
    """What N generated images are made from."""

    normal: Tensor  # [N, G.normals] unit normal numbers
    uniform: Tensor  # [N, G.uniforms] in [0, 1)
    c: Tensor | None = None  # [N, c_dim] one-hot labels; the images themselves, where G translates


@dataclass(frozen=True)
class Objective:
    """What the phases minimise: an adversarial loss and the weights of all that is added to it."""

    loss: str = "non-saturating"
    label_smoothing: float = 0.0
    r1: float = 0.0  # of mean |d D(real) / d real|^2
    r2: float = 0.0  # of the same on generated images
    gradient_penalty: float = 0.0
    drift: float = 0.0
    feature_matching: float = 0.0
    orthogonal: float = 0.0
    pl: float = 0.0
    pl_decay: float = 0.01
    augment: DiffAugment | ADA | None = None  # of what D sees
    batch_mean: Callable[[Tensor], Tensor] = batch_mean  # over the samples, of other ranks as well


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0..255 -> -1..1; floating images are in -1..1 already."""
    return images if images.is_floating_point() else images.to(dtype) / 127.5 - 1


def d_phase(
    G: Generator,
    D: Discriminator,
    real: Tensor,
    c: Tensor | None,
    latents: Latents,
    strength: Tensor | None = None,
    objective: Objective = Objective(),
) -> PhaseResult:
    """Gradients for D of its adversarial loss plus the weighted penalties of `objective`.

    real uint8 (or floating in -1..1) [N, C, R, R], c its one-hot labels, strength a scalar for augmentation.
    """
    o = objective
    real = to_unit_range(real)
    with torch.no_grad():
        real = G.match_reals(real) if hasattr(G, "match_reals") else real
        fake, _ = _sample(G, latents)
        fake = D.pool(fake) if getattr(D, "pool", None) is not None else fake
    fake_c = None if _translates(G) else latents.c
    real_logits, r1 = _penalized(D, real, c, o.r1, o.augment, strength)
    fake_logits, r2 = _penalized(D, fake, fake_c, o.r2, o.augment, strength)
    total = LOSSES[o.loss].d(real_logits, fake_logits, o.label_smoothing)
    losses = {"loss_d": total, "real_score": real_logits.mean(), "fake_score": fake_logits.mean()}
    for name, weight, penalty in (("r1", o.r1, r1), ("r2", o.r2, r2)):
        if penalty is not None:
            losses[name], total = penalty, total + weight * penalty
    if o.gradient_penalty > 0:
        alpha = torch.rand(len(real), 1, 1, 1, device=real.device).to(real.dtype)
        losses["gradient_penalty"] = gradient_penalty(lambda x: D(x, c), real, fake, alpha)
        total = total + o.gradient_penalty * losses["gradient_penalty"]
    if o.drift > 0:
        total = total + o.drift * drift(real_logits)
    if strength is not None:
        losses["real_sign"] = real_logits.sign().mean()  # what ADA steers by
    return _result(losses, total, D)


def g_phase(
    G: Generator,
    D: Discriminator,
    real: Tensor,
    c: Tensor | None,
    latents: Latents,
    strength: Tensor | None = None,
    objective: Objective = Objective(),
) -> PhaseResult:
    """Gradients for G of its adversarial loss plus the weighted terms of `objective`.

    real and c, as in `d_phase`, count for relativistic losses and feature matching alone.
    """
    losses, total = _g_loss(G, D, real, c, latents, strength, objective)
    return _result(losses, total, G)


def g_path_phase(
    G: Generator,
    D: Discriminator,
    real: Tensor,
    c: Tensor | None,
    latents: Latents,
    pl_latents: Latents,
    pl_noise: Tensor,
    pl_mean: Tensor,
    strength: Tensor | None = None,
    objective: Objective = Objective(),
) -> tuple[PhaseResult, Tensor]:
    """`g_phase` plus pl * path length penalty on M other samples; also returns the new running mean.

    pl_latents of M samples, pl_noise ~ N(0, 1) shaped as their images, pl_mean a scalar.
    """
    losses, total = _g_loss(G, D, real, c, latents, strength, objective)
    # Where a family's ws are its z, they are what the images are differentiated by.
    images, ws = _sample(G, pl_latents._replace(normal=leaf(pl_latents.normal)))
    losses["path_length"], pl_mean, _ = path_length(
        images, ws, pl_noise, pl_mean, objective.pl_decay, objective.batch_mean
    )
    return _result(losses, total + objective.pl * losses["path_length"], G), pl_mean


def _g_loss(
    G: Generator,
    D: Discriminator,
    real: Tensor,
    c: Tensor | None,
    latents: Latents,
    strength: Tensor | None,
    o: Objective,
) -> tuple[dict[str, Tensor], Tensor]:
    loss = LOSSES[o.loss]
    fake, _ = _sample(G, latents)
    fake_c = None if _translates(G) else latents.c
    features, logits = _judged(D, _augmented(fake, o.augment, strength), fake_c)
    real_features = real_logits = None
    if loss.relativistic or o.feature_matching > 0:
        with torch.no_grad():
            real = to_unit_range(real)
            real = G.match_reals(real) if hasattr(G, "match_reals") else real
            real_features, real_logits = _judged(D, _augmented(real, o.augment, strength), c)
    total = loss.g(logits, real_logits)
    losses = {"loss_g": total}
    if o.feature_matching > 0 and real_features is not None:
        losses["feature_matching"] = feature_matching(real_features, features, o.batch_mean)
        total = total + o.feature_matching * losses["feature_matching"]
    if hasattr(G, "penalties"):
        for name, value in G.penalties(fake, _condition(latents.c)).items():
            losses[name], total = value, total + value
    if o.orthogonal > 0:
        # An embedding that all layers share is no map from one layer to the next.
        named = G.named_parameters()
        losses["orthogonal"] = orthogonal(p for n, p in named if p.ndim >= 2 and not n.startswith("shared."))
        total = total + o.orthogonal * losses["orthogonal"]
    return losses, total


def _penalized(
    D: Discriminator,
    images: Tensor,
    c: Tensor | None,
    weight: float,
    augment: DiffAugment | ADA | None,
    strength: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """D's logits and, if `weight` is above 0, the mean squared norm of their gradient by the images."""
    if weight > 0 and augment is None and getattr(D, "homogeneous", False):
        logits, gradient = homogeneous_logits(lambda x, scale: D(x, c, scale), images)
        return logits, square_norm(gradient)
    images = leaf(images) if weight > 0 else images.detach()
    logits = D(_augmented(images, augment, strength), c)
    return logits, gradient_square(logits, images) if weight > 0 else None


def _sample(G: Generator, latents: Latents) -> tuple[Tensor, Tensor]:
    return G.sample(latents.normal, latents.uniform, _condition(latents.c))


def _condition(c: Tensor | None) -> Tensor | None:
    """Labels as they are, images to translate in -1..1."""
    return c if c is None else to_unit_range(c)


def _translates(G: Generator) -> bool:
    """Whether G's images come from images, and not from latents and labels."""
    return getattr(G, "translates", False)


def _judged(D: Discriminator, images: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """D's last hidden features and its logits."""
    features = D.features(images, c)
    return features, D.head(features, c)


def _augmented(images: Tensor, augment: DiffAugment | ADA | None, strength: Tensor | None) -> Tensor:
    if augment is None:
        return images
    n, dtype, device = len(images), images.dtype, images.device
    uniform = torch.rand(n, augment.uniforms, dtype=dtype, device=device)
    normal = torch.randn(n, augment.normals, dtype=dtype, device=device)
    if isinstance(augment, DiffAugment):
        return augment(images, uniform)
    assert strength is not None
    return augment(images, uniform, normal, strength)


def _result(losses: dict[str, Tensor], total: Tensor, net: nn.Module) -> PhaseResult:
    params = list(net.parameters())
    grads = torch.autograd.grad(total, params, allow_unused=True, materialize_grads=True)
    return PhaseResult({k: v.detach() for k, v in losses.items()}, [g.detach() for g in grads])
