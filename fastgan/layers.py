"""Blocks that several families use: labels, noise, and layers in a row as fused operations."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.kernels.bias_act import bias_act
from fastgan.kernels.conv_transpose_bn_act import conv2d_bn_act, conv_transpose2d_bn_act
from fastgan.kernels.norm_act import batch_norm_act, instance_norm_act

Weighted = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d


def with_labels(x: Tensor, c: Tensor | None, c_dim: int) -> Tensor:
    """x [N, D] and the one-hot labels c [N, c_dim] side by side (Mirza and Osindero 2014, arXiv:1411.1784);
    x itself where c_dim is 0."""
    return torch.cat([x, require_labels(c, c_dim).to(x.dtype)], dim=1) if c_dim else x


def require_labels(c: Tensor | None, c_dim: int) -> Tensor:
    """c; ValueError if there are none."""
    if c is None:
        raise ValueError(f"c must be given to a conditional network: one-hot labels [N, {c_dim}]")
    return c


def project(logits: Tensor, features: Tensor, c: Tensor | None, embed: nn.Embedding | None) -> Tensor:
    """logits [N, 1] + <V c, features>, the projection discriminator (Miyato and Koyama 2018,
    arXiv:1802.05637, equation 3); logits themselves where there is no V [c_dim, D].

    features [N, ...] of D numbers a sample, in any dtype; V's dtype decides.
    """
    if embed is None:
        return logits
    v = require_labels(c, embed.num_embeddings).to(embed.weight.dtype) @ embed.weight
    return logits + (v * features.flatten(1).to(v.dtype)).sum(dim=1, keepdim=True)


def with_noise(img: Tensor, deviation: float, training: bool) -> Tensor:
    """Instance noise on every training image (Sønderby et al. 2017, arXiv:1610.04490)."""
    return img + deviation * torch.randn_like(img) if training and deviation > 0 else img


def run_layers(layers: Iterable[nn.Module], x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`layers` in a row on x in `dtype`; every convolution or linear layer with the normalisation and the
    (leaky) ReLU behind it as one operation, statistics in fp32."""
    x = x.to(dtype or x.dtype)
    left = list(layers)
    while left:
        layer = left.pop(0)
        if isinstance(layer, nn.PReLU):
            x = F.prelu(x, layer.weight.to(x.dtype))
            continue
        if not isinstance(layer, Weighted):
            x = layer(x)
            continue
        norm = left.pop(0) if left and isinstance(left[0], Norm) else None
        act = left.pop(0) if left and isinstance(left[0], nn.ReLU | nn.LeakyReLU) else None
        slope = act.negative_slope if isinstance(act, nn.LeakyReLU) else 1.0 if act is None else 0.0
        if isinstance(norm, nn.BatchNorm2d) and not isinstance(layer, nn.Linear) and not over_ranks(norm):
            x = _conv_bn_act(x, layer, norm, slope)
        elif norm is not None:
            x = normalize(weigh(x, layer), norm, slope)
        elif act is not None:
            x = bias_act(weigh(x, layer, bias=False), layer.bias, act="lrelu", alpha=slope, gain=1.0)
        else:
            x = weigh(x, layer)
    return x


def weigh(x: Tensor, layer: nn.Module, bias: bool = True) -> Tensor:
    """A linear layer or convolution in x's dtype, with its bias or without."""
    assert isinstance(layer, Weighted)
    weight = layer.weight.to(x.dtype)
    b = layer.bias.to(x.dtype) if bias and layer.bias is not None else None
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, b)
    stride, padding = layer.stride[0], int(layer.padding[0])
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight, b, stride, padding, layer.output_padding[0])
    return F.conv2d(x, weight, b, stride, padding)


def normalize(x: Tensor, norm: nn.Module, slope: float = 1.0, upsample: int = 1) -> Tensor:
    """upsample(lrelu(norm(x), slope)) of x [N, C] or [N, C, H, W]; slope 0 is ReLU, 1 no activation."""
    if isinstance(norm, nn.GroupNorm):
        assert upsample == 1
        x = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return bias_act(x, act="lrelu", alpha=slope, gain=1.0)
    if isinstance(norm, nn.InstanceNorm2d):
        return instance_norm_act(x, norm.weight, norm.bias, norm.eps, "lrelu", slope, upsample)
    assert isinstance(norm, _BatchNorm)
    if over_ranks(norm):
        return synchronized_batch_norm_act(x, norm, norm.weight, norm.bias, "lrelu", slope, upsample)
    mean, var, momentum = _running(norm)
    y = batch_norm_act(
        x[:, :, None, None] if x.ndim == 2 else x,
        norm.weight,
        norm.bias,
        mean,
        var,
        training=norm.training,
        momentum=momentum,
        eps=norm.eps,
        act="lrelu",
        alpha=slope,
        upsample=upsample,
    )
    return y[:, :, 0, 0] if x.ndim == 2 else y


def _conv_bn_act(
    x: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d, slope: float
) -> Tensor:
    mean, var, momentum = _running(norm)
    return (conv_transpose2d_bn_act if isinstance(conv, nn.ConvTranspose2d) else conv2d_bn_act)(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        mean,
        var,
        conv.bias,
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
        output_padding=conv.output_padding[0],
        training=norm.training,
        momentum=momentum,
        eps=norm.eps,
        slope=slope,
    )


def synchronize_batch_norms(nets: Iterable[nn.Module], mean: Callable[[Tensor], Tensor], size: int) -> None:
    """Let every BatchNorm in `nets` take statistics over all `size` ranks; `mean` is that of their values."""
    for net in nets:
        for norm in net.modules():
            if isinstance(norm, _BatchNorm):
                object.__setattr__(norm, "over_ranks", (mean, size))  # no part of its state


def over_ranks(norm: nn.Module) -> tuple[Callable[[Tensor], Tensor], int] | None:
    """What `synchronize_batch_norms` has told a BatchNorm in training."""
    return getattr(norm, "over_ranks", None) if norm.training else None


def synchronized_batch_norm_act(
    x: Tensor,
    norm: _BatchNorm,
    scale: Tensor,
    shift: Tensor,
    act: str,
    alpha: float | None = None,
    upsample: int = 1,
) -> Tensor:
    """`batch_norm_act` in training on x [N, C] or [N, C, H, W], statistics over all ranks' samples.

    scale, shift [C] or [N, C]. As many times differentiable as `mean`, so penalties go through it; two small
    collectives forward, and as many for each derivative.
    """
    told = over_ranks(norm)
    assert told is not None
    mean_over_ranks, size = told
    running_mean, running_var, momentum = _running(norm)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.ndim)]
    form = (-1, x.shape[1], *(1 for _ in dims[1:]))
    mean = mean_over_ranks(wide.mean(dim=dims))
    centered = wide - mean.view(form)
    var = mean_over_ranks(centered.square().mean(dim=dims))
    with torch.no_grad():
        count = size * x.numel() // x.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    y = centered * ((var + norm.eps).rsqrt().view(form) * scale.view(form)) + shift.view(form)
    y = bias_act(y.to(x.dtype), act=act, alpha=alpha, gain=1.0)
    return y if upsample == 1 else F.interpolate(y, scale_factor=upsample)


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor, float]:
    """(running mean, running variance, momentum) for a pass that is thereby counted."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var, norm.momentum
