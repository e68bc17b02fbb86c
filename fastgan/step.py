"""The phases of a training step: pure functions of networks and tensors to losses and gradients.

D, D with R1, G and G with path length are four phases. Each is traced whole by `torch.compile` (see
compiled.py), the inner gradients of its penalty included, and depends on nothing but its arguments: random
numbers come in as tensors (but for dropout and instance noise, which draw their own), running means go out as
tensors, and the only state a phase moves is the networks' own buffers (running means of w, BatchNorm
statistics).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgan.losses import LOSSES, gradient_square, path_length
from fastgan.models import Discriminator, Generator


class PhaseResult(NamedTuple):
    losses: dict[str, Tensor]  # scalars, for the log
    grads: list[Tensor]  # of the trained network's parameters, in their order


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0..255 -> -1..1."""
    return images.to(dtype) / 127.5 - 1


def d_phase(
    G: Generator,
    D: Discriminator,
    real: Tensor,
    normal: Tensor,
    uniform: Tensor,
    loss: str = "non-saturating",
    r1_weight: float = 0.0,
) -> PhaseResult:
    """Gradients for D of its adversarial loss, plus r1_weight * mean ||d D(real) / d real||^2 if above 0.

    real uint8 (or floating in -1..1) [N, C, R, R]; normal [N, G.normals], uniform [N, G.uniforms].
    """
    real = real if real.is_floating_point() else to_unit_range(real)
    with torch.no_grad():
        fake, _ = G.sample(normal, uniform)
    if r1_weight > 0:
        real = real.detach().requires_grad_()
    real_logits, fake_logits = D(real), D(fake)
    losses = {
        "loss_d": LOSSES[loss].d(real_logits, fake_logits, 0.0),
        "real_score": real_logits.mean(),
        "fake_score": fake_logits.mean(),
    }
    total = losses["loss_d"]
    if r1_weight > 0:
        losses["r1"] = gradient_square(real_logits, real)
        total = total + r1_weight * losses["r1"]
    return _result(losses, total, D)


def g_phase(
    G: Generator, D: Discriminator, normal: Tensor, uniform: Tensor, loss: str = "non-saturating"
) -> PhaseResult:
    """Gradients for G of its adversarial loss: normal [N, G.normals], uniform [N, G.uniforms]."""
    fake, _ = G.sample(normal, uniform)
    losses = {"loss_g": LOSSES[loss].g(D(fake), None)}
    return _result(losses, losses["loss_g"], G)


def g_path_phase(
    G: Generator,
    D: Discriminator,
    normal: Tensor,
    uniform: Tensor,
    pl_normal: Tensor,
    pl_uniform: Tensor,
    pl_noise: Tensor,
    pl_mean: Tensor,
    pl_weight: float,
    pl_decay: float = 0.01,
    loss: str = "non-saturating",
) -> tuple[PhaseResult, Tensor]:
    """`g_phase` plus pl_weight * path length penalty on M other samples; also returns the new running mean.

    pl_normal [M, G.normals], pl_uniform [M, G.uniforms], pl_noise ~ N(0, 1) [M, C, R, R], pl_mean a scalar.
    """
    fake, _ = G.sample(normal, uniform)
    losses = {"loss_g": LOSSES[loss].g(D(fake), None)}
    pl_normal = pl_normal.detach().requires_grad_()  # where a family's ws are its z
    images, ws = G.sample(pl_normal, pl_uniform)
    penalty, pl_mean, _ = path_length(images, ws, pl_noise, pl_mean, pl_decay)
    losses["path_length"] = penalty
    return _result(losses, losses["loss_g"] + pl_weight * penalty, G), pl_mean


def _result(losses: dict[str, Tensor], total: Tensor, net: nn.Module) -> PhaseResult:
    params = list(net.parameters())
    grads = torch.autograd.grad(total, params, allow_unused=True, materialize_grads=True)
    return PhaseResult({k: v.detach() for k, v in losses.items()}, [g.detach() for g in grads])
