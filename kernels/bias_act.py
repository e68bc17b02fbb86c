"""Bias, activation, gain and clamp in one pass (Karras et al. 2019, the tail of every StyleGAN2 layer).

y = clamp(gain * act(x + b, alpha), -clamp, clamp)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """Default slope and the gain that keeps the variance of a unit normal input."""

    alpha: float
    gain: float


ACTIVATIONS = {
    "linear": Activation(0.0, 1.0),
    "relu": Activation(0.0, 2**0.5),
    "lrelu": Activation(0.2, 2**0.5),
    "tanh": Activation(0.0, 1.0),
    "sigmoid": Activation(0.0, 1.0),
    "elu": Activation(0.0, 1.0),
    "selu": Activation(0.0, 1.0),
    "softplus": Activation(0.0, 1.0),
    "swish": Activation(0.0, 2**0.5),
}


def _activate(x: Tensor, act: str, alpha: float) -> Tensor:
    match act:
        case "linear":
            return x
        case "relu":
            return F.relu(x)
        case "lrelu":
            return F.leaky_relu(x, alpha)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "elu":
            return F.elu(x)
        case "selu":
            return F.selu(x)
        case "softplus":
            return F.softplus(x)
        case _:
            return torch.sigmoid(x) * x


def bias_act_ref(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
):
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = _activate(x, act, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = clamp(gain * act(x + b, alpha)).

    x: any shape and floating dtype; b [x.shape[dim]], cast to x's dtype. `alpha` (slope of lrelu) and `gain`
    default to the activation's own (`ACTIVATIONS`); `clamp` None means off. Returns x's shape and dtype.
    Raises ValueError for an unknown activation, a bias of the wrong shape or a negative clamp.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}: got {act!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must lie in [{-x.ndim}, {x.ndim - 1}] for x {tuple(x.shape)}: got {dim}")
    dim %= x.ndim
    if b is not None and b.shape != (x.shape[dim],):
        raise ValueError(f"b must have shape [{x.shape[dim]}] to match dim {dim} of x: got {list(b.shape)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must be None or at least 0: got {clamp}")
    default = ACTIVATIONS[act]
    alpha = default.alpha if alpha is None else float(alpha)
    gain = default.gain if gain is None else float(gain)
    return bias_act_ref(x, b, dim, act, alpha, gain, clamp)
