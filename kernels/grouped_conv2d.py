"""Grouped convolution whose derivatives of every order are grouped convolutions again.

    y[n, o, i, j] = sum_{c, u, v} w[o, c, u, v] * x[n, first channel of o's group + c, i + u - p, j + v - p]

with stride 1 and a k x k kernel, k = 2 p + 1, so y is as large as x. Write conv(x, w) for it and wgrad(x, g)
for the gradient of <g, conv(x, w)> by w. Both are linear in each argument, and with w' = `turned(w)`

    d conv(x, w):   dx = conv(dy, w'),   dw = wgrad(x, dy)
    d wgrad(x, g):  dx = conv(g, u'),    dg = conv(x, u)      for the cotangent u of wgrad

aten's own double backward splits a grouped convolution into its groups, one small convolution after another,
and computes the gradient of the weight whether it is wanted or not: R1 through 96 groups crawls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fastgan.kernels.dispatch import check_tensors


def turned(w: Tensor, groups: int) -> Tensor:
    """The weight [Cin, Cout / groups, k, k] of the adjoint: of w, in and out exchanged within each group and
    the taps turned round."""
    c_out, c_in, kh, kw = w.shape
    w = w.reshape(groups, c_out // groups, c_in, kh, kw).transpose(1, 2)
    return w.reshape(groups * c_in, c_out // groups, kh, kw).flip([2, 3])


def grouped_conv2d_ref(x: Tensor, w: Tensor, groups: int) -> Tensor:
    """The reference of `grouped_conv2d`."""
    return F.conv2d(x, w, padding=w.shape[-1] // 2, groups=groups)


# torch.compile sees through both to the library's convolutions.
@torch.library.triton_op("fastgan::grouped_conv2d", mutates_args=())
def _conv(x: Tensor, w: Tensor, groups: int) -> Tensor:
    p = w.shape[-1] // 2
    return torch.ops.aten.convolution(x, w, None, [1, 1], [p, p], [1, 1], False, [0, 0], groups)


@torch.library.triton_op("fastgan::grouped_conv2d_weight", mutates_args=())
def _weight_gradient(x: Tensor, g: Tensor, k: int, groups: int) -> Tensor:
    w = x.new_empty(g.shape[1], x.shape[1] // groups, k, k)  # its shape alone is looked at
    geometry = ([1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(g, x, w, None, *geometry, [False, True, False])[1]


def _save_conv(ctx, inputs, output):
    x, w, ctx.groups = inputs
    ctx.save_for_backward(x, w)


def _conv_backward(ctx, dy):
    x, w = ctx.saved_tensors
    dx = _conv(dy, turned(w, ctx.groups), ctx.groups) if ctx.needs_input_grad[0] else None
    dw = _weight_gradient(x, dy, w.shape[-1], ctx.groups) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _save_weight_gradient(ctx, inputs, output):
    x, g, _, ctx.groups = inputs
    ctx.save_for_backward(x, g)


def _weight_gradient_backward(ctx, u):
    x, g = ctx.saved_tensors
    dx = _conv(g, turned(u, ctx.groups), ctx.groups) if ctx.needs_input_grad[0] else None
    dg = _conv(x, u, ctx.groups) if ctx.needs_input_grad[1] else None
    return dx, dg, None, None


_conv.register_autograd(_conv_backward, setup_context=_save_conv)
_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save_weight_gradient)


@register_flop_formula(torch.ops.fastgan.grouped_conv2d)
def _conv_flops(x: list[int], w: list[int], groups: int, *, out_shape: list[int]) -> int:
    return conv_flop_count(x, w, out_shape)


@register_flop_formula(torch.ops.fastgan.grouped_conv2d_weight)
def _weight_gradient_flops(x: list[int], g: list[int], k: int, groups: int, *, out_shape: list[int]) -> int:
    return conv_flop_count(x, out_shape, g)


def grouped_conv2d(x: Tensor, w: Tensor, groups: int) -> Tensor:
    """Correlation of x [N, Cin, H, W] with w [Cout, Cin / groups, k, k] in `groups` groups, padded by k // 2.

    Returns [N, Cout, H, W] in x's dtype; w is cast. Raises ValueError for an even kernel, or channels that
    the groups do not divide; TypeError for tensors that are not floating.
    """
    check_tensors(x, w=w)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x: got {groups}")
    if w.ndim != 4 or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
        raise ValueError(
            f"w must be [Cout, {x.shape[1] // groups}, k, k] with groups {groups} dividing Cout: "
            f"got {list(w.shape)}"
        )
    if w.shape[2] != w.shape[3] or w.shape[2] % 2 == 0:
        raise ValueError(f"w's kernel must be square and odd: got {w.shape[2]}x{w.shape[3]}")
    return _conv(x, w.to(x.dtype), groups)
