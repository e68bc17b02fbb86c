"""Adversarial losses and penalties: one equation each.

Logits are raw discriminator outputs, [N, 1] or a map of patches; every loss is a mean over all of them.
"""

from collections.abc import Callable, Iterable
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

# Of torch 2.11 Dynamo traces no requires_grad_(): what is to be differentiated by must come from an input of
# the graph that requires a gradient, as this zero, on the device of the phases that are compiled.
TRACES_LEAVES = TorchVersion(torch.__version__) >= "2.12"
zero = torch.zeros((), requires_grad=True)


def logistic_d(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(mean softplus(-real), mean softplus(fake)): the minimax game's D (Goodfellow et al. 2014).

    Labels of 1 - smoothing for reals (Salimans et al. 2016, section 3.4) add smoothing * mean real.
    """
    loss_real = F.softplus(-real).mean()
    if smoothing:
        loss_real = loss_real + smoothing * real.mean()
    return loss_real, F.softplus(fake).mean()


def minimax_g(fake: Tensor) -> Tensor:
    """-mean softplus(fake) = mean log(1 - sigmoid(fake)) (Goodfellow et al. 2014, equation 1)."""
    return -F.softplus(fake).mean()


def non_saturating_g(fake: Tensor) -> Tensor:
    """mean softplus(-fake) = -mean log sigmoid(fake) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


def hinge_d(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """(mean relu(1 - real), mean relu(1 + fake)) (Lim and Ye 2017, equation 6)."""
    return F.relu(1 - real).mean(), F.relu(1 + fake).mean()


def least_squares_d(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(mean (real - 1 + smoothing)^2, mean fake^2): twice equation 9 of Mao et al. 2016."""
    return (real - (1 - smoothing)).square().mean(), fake.square().mean()


def least_squares_g(fake: Tensor) -> Tensor:
    """mean (fake - 1)^2: twice equation 9 of Mao et al. 2016."""
    return (fake - 1).square().mean()


def wasserstein_d(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """(-mean real, mean fake) (Arjovsky et al. 2017, equation 3)."""
    return -real.mean(), fake.mean()


def critic_g(fake: Tensor) -> Tensor:
    """-mean fake (Lim and Ye 2017, equation 7; Arjovsky et al. 2017, algorithm 1)."""
    return -fake.mean()


def relativistic(ours: Tensor, theirs: Tensor) -> Tensor:
    """mean softplus(theirs - ours), in pairs; ours are the reals for D, the fakes for G.

    Jolicoeur-Martineau 2018, logistic; Huang et al. 2024, equation 2.
    """
    return F.softplus(theirs - ours).mean()


class AdversarialLoss(NamedTuple):
    """What D and what G minimise; LOSSES has one for each --loss."""

    d: Callable[[Tensor, Tensor, float], Tensor]  # of the logits of reals and fakes, and label smoothing
    g: Callable[[Tensor, Tensor | None], Tensor]  # of the logits of fakes, and of reals if relativistic
    smooths: bool = False
    relativistic: bool = False


LOSSES = {
    "minimax": AdversarialLoss(
        lambda real, fake, smoothing: add(*logistic_d(real, fake, smoothing)),
        lambda fake, _: minimax_g(fake),
        smooths=True,
    ),
    "non-saturating": AdversarialLoss(
        lambda real, fake, smoothing: add(*logistic_d(real, fake, smoothing)),
        lambda fake, _: non_saturating_g(fake),
        smooths=True,
    ),
    "hinge": AdversarialLoss(lambda real, fake, _: add(*hinge_d(real, fake)), lambda fake, _: critic_g(fake)),
    "least-squares": AdversarialLoss(
        lambda real, fake, smoothing: add(*least_squares_d(real, fake, smoothing)),
        lambda fake, _: least_squares_g(fake),
        smooths=True,
    ),
    "wasserstein": AdversarialLoss(
        lambda real, fake, _: add(*wasserstein_d(real, fake)), lambda fake, _: critic_g(fake)
    ),
    "relativistic": AdversarialLoss(
        lambda real, fake, _: relativistic(real, fake),
        lambda fake, real: relativistic(fake, real),
        relativistic=True,
    ),
}


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_mean(x: Tensor) -> Tensor:
    """mean_n x_n of x [N, ...]."""
    return x.mean(dim=0)


def feature_matching(real: Tensor, fake: Tensor, mean: Callable[[Tensor], Tensor] = batch_mean) -> Tensor:
    """||mean_n real_n - mean_n fake_n||^2 of D's features [N, ...] (Salimans et al. 2016, section 3.1)."""
    return (mean(_precise(real)) - mean(_precise(fake))).square().sum()


def drift(real: Tensor) -> Tensor:
    """mean real^2, which keeps a critic's logits near zero (Karras et al. 2017, appendix A.1)."""
    return _precise(real).square().mean()


def orthogonal(weights: Iterable[Tensor]) -> Tensor:
    """sum over W of ||(W W^T) * (1 - I)||^2, W [out, ...] flattened to rows (Brock et al. 2018, equation 3).

    Its gradient is 4 ((W W^T) * (1 - I)) W: BigGAN-PyTorch's strength is twice the weight of this.
    """
    terms = []
    for weight in weights:
        rows = _precise(weight).flatten(1)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        terms.append((rows @ rows.t()).masked_fill(itself, 0.0).square().sum())
    return torch.stack(terms).sum()


def gradient_square(logits: Tensor, x: Tensor) -> Tensor:
    """mean_n ||d sum(logits) / d x_n||^2, differentiable: gamma / 2 times this is R1 on reals, R2 on fakes.

    x [N, ...] must require a gradient and have led to the logits (Mescheder et al. 2018, equation 9).
    """
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return square_norm(grad)


def leaf(x: Tensor) -> Tensor:
    """x without its past, to be differentiated by, also while a phase is traced."""
    if TRACES_LEAVES or not torch.compiler.is_compiling():
        return x.detach().requires_grad_()
    return x.detach() + zero  # nobody asks for the gradient by `zero`, so none is computed


def square_norm(x: Tensor) -> Tensor:
    """mean_n ||x_n||^2 of x [N, ...]."""
    return _precise(x).square().flatten(1).sum(dim=1).mean()


def homogeneous_logits(critic: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [N, 1], d sum(logits) / d x) of a critic(x, scale) homogeneous in both, of degree one.

    Such is one of linear maps, LeakyReLUs, and biases that scale [N, 1] multiplies, if no sample sees
    another. By Euler's theorem critic(x, 1) = <d critic / d x, x> + d critic / d scale, identically in the
    weights. So their gradient can be taken through the inner backward pass alone, which R1 and R2 go through
    anyway: every layer is multiplied out 4 times (forward, inner gradient, and that one's derivatives by the
    gradient and by the weight) where the forward pass's own backward makes it 6. The logits' values are the
    forward pass's. x [N, ...] is taken as a constant.
    """
    x, scale = leaf(x), leaf(x.new_ones(len(x), 1))
    logits = critic(x, scale)
    dx, dscale = torch.autograd.grad(logits.sum(), (x, scale), create_graph=True)
    euler = (dx * x.detach()).flatten(1).sum(dim=1, keepdim=True) + dscale
    return logits.detach() + (euler - euler.detach()), dx


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """mean_n (||grad critic(x_n)|| - 1)^2 at x = alpha real + (1 - alpha) fake (Gulrajani et al. 2017).

    real and fake [N, ...]; alpha uniform in [0, 1], broadcastable to them, one number a sample.
    """
    x = leaf(alpha * real + (1 - alpha) * fake)
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (_precise(grad).flatten(1).norm(dim=1) - 1).square().mean()


def path_length(
    images: Tensor,
    ws: Tensor,
    noise: Tensor,
    mean: Tensor,
    decay: float,
    mean_of: Callable[[Tensor], Tensor] = batch_mean,
) -> tuple[Tensor, Tensor, Tensor]:
    """Path length regularization (Karras et al. 2019, equation 4): (penalty, new running mean, lengths [N]).

    With J = d images / d ws and y ~ N(0, 1) / sqrt(H W): length = sqrt(mean over layers of |J^T y|^2),
    mean' = mean + decay * (mean of lengths - mean), penalty = mean of (length - mean')^2. The gradient also
    flows through mean', as in the public implementations. images [N, C, H, W]; ws [N, layers, w_dim]
    or [N, d]; noise ~ N(0, 1) shaped as images; mean a scalar. `mean_of` takes the mean of lengths.
    """
    y = noise / (images.shape[2] * images.shape[3]) ** 0.5
    (grad,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
    squares = _precise(grad).square().sum(dim=-1)
    lengths = (squares if squares.ndim == 1 else squares.mean(dim=1)).sqrt()
    mean = mean.lerp(mean_of(lengths), decay)
    return (lengths - mean).square().mean(), mean.detach(), lengths.detach()
