"""Convolution or transposed convolution, batch normalisation, LeakyReLU: DCGAN's layer (Radford et al. 2016).

    c = conv(x, w) + bias,   h = (c - mean) * r,   r = (var + eps)^-1/2,   y = lrelu(gamma * h + beta, slope)

The convolution's epilogue reduces its tile to mean and centred squares, so the statistics cost no pass over
c; one more pass normalises and activates. A transposed convolution of stride 2 is four dense ones of a
quarter of the taps, stored interleaved (`conv_gemm`). With fixed statistics it is all one kernel,
y = lrelu(conv(x, gamma * r * w) + shift).

Backward, with u = g * lrelu'(y) and means over a channel's M pixels:

    d beta = sum u,   d gamma = sum u h,   d c = gamma * r * (u - mean(u) - h * mean(u h))

is one reduction and one elementwise pass. It is differentiated once more in closed form: for the cotangents
a, b, d of (d c, d gamma, d beta) and P u = u - mean(u) - h * mean(u h), which is symmetric,

    d u = gamma * r * P a + b * h + d,   d gamma' = r * sum a P u,
    d c = r * P e - h * gamma * r^2 * mean(a P u)
    with e = b * u - gamma * r * (u * mean(a h) + a * mean(u h))
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.kernels.conv_gemm import conv_builds, conv_gemm, conv_gemm_stats
from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl
from fastgan.kernels.memory import (
    dense,
    flat_channels,
    flat_offsets,
    group_of,
    is_channels_last,
    like,
    load,
    splits_of,
    tile_offsets,
)

BLOCK = 2048  # offsets a program of the elementwise kernels


@jit
def _normalize_kernel(
    p_c,
    p_scale,
    p_shift,
    p_y,
    n,
    n_channels,
    inner,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    i_c = flat_channels(base, i_group, n_channels, inner, GROUP, CHANNELS_LAST)
    u = load(p_c + base + o, m) * tl.load(p_scale + i_c) + tl.load(p_shift + i_c)
    tl.store(p_y + base + o, tl.where(u > 0, u, u * SLOPE), mask=m)


@jit
def _reduce_kernel(
    p_g,
    p_c,
    p_scale,
    p_shift,
    p_mean,
    p_r,
    p_sums,
    n_positions,
    n_channels,
    inner,
    per_split,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum u and sum u h of each split of the positions: [splits, 2, channels]."""
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_split = tl.program_id(1)
    m_c = i_c < n_channels
    scale, shift = tl.load(p_scale + i_c, m_c, 0.0), tl.load(p_shift + i_c, m_c, 0.0)
    mean, r = tl.load(p_mean + i_c, m_c, 0.0), tl.load(p_r + i_c, m_c, 0.0)
    sum_u = tl.zeros([BLOCK_P, BLOCK_C], p_sums.dtype.element_ty)
    sum_uh = tl.zeros([BLOCK_P, BLOCK_C], p_sums.dtype.element_ty)
    end = tl.minimum((i_split + 1) * per_split, n_positions)
    for start in range(i_split * per_split, end, BLOCK_P):
        i_p = start + tl.arange(0, BLOCK_P)
        o = tile_offsets(i_p, i_c, n_channels, inner, CHANNELS_LAST, WIDE)
        m = (i_p < end)[:, None] & m_c[None, :]
        u, c = load(p_g + o, m), load(p_c + o, m)
        u = tl.where(c * scale[None, :] + shift[None, :] > 0, u, u * SLOPE)
        sum_u += u
        sum_uh += u * (c - mean[None, :]) * r[None, :]
    p_sums += i_split * 2 * n_channels + i_c
    tl.store(p_sums, tl.sum(sum_u, 0), mask=m_c)
    tl.store(p_sums + n_channels, tl.sum(sum_uh, 0), mask=m_c)


@jit
def _gradient_kernel(
    p_g,
    p_c,
    p_scale,
    p_shift,
    p_mean,
    p_r,
    p_sums,
    p_dc,
    n,
    n_channels,
    inner,
    positions,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dc = gamma * r * (u - (sum u + h * sum u h) / positions)."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    i_c = flat_channels(base, i_group, n_channels, inner, GROUP, CHANNELS_LAST)
    scale = tl.load(p_scale + i_c)
    u, c = load(p_g + base + o, m), load(p_c + base + o, m)
    u = tl.where(c * scale + tl.load(p_shift + i_c) > 0, u, u * SLOPE)
    h = (c - tl.load(p_mean + i_c)) * tl.load(p_r + i_c)
    projected = u - (tl.load(p_sums + i_c) + h * tl.load(p_sums + n_channels + i_c)) / positions
    tl.store(p_dc + base + o, scale * projected, mask=m)


def _affine(gamma: Tensor, beta: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    scale = gamma.to(r.dtype) * r
    return scale, beta.to(r.dtype) - mean * scale


@torch.library.custom_op("fastgan::bn_lrelu", mutates_args=())
def bn_lrelu(c: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, r: Tensor, slope: float) -> Tensor:
    """y of c [N, C, H, W]; mean and r [C] are c's own statistics and are differentiated as such."""
    c = dense(c)
    y = torch.empty_like(c)
    n, channels, inner = c.numel(), c.shape[1], c.stride(1)
    if n == 0:
        return y
    scale, shift = _affine(gamma, beta, mean, r)
    last, group = inner == 1, group_of(channels if inner == 1 else inner)
    with torch.cuda.device_of(c):
        _normalize_kernel[(-(-n // BLOCK),)](
            c,
            scale,
            shift,
            y,
            n,
            channels,
            inner,
            SLOPE=slope,
            CHANNELS_LAST=last,
            GROUP=group,
            BLOCK=BLOCK,
            **capped(c.device),
        )
    return y


@bn_lrelu.register_fake
def _(c, gamma, beta, mean, r, slope):
    return torch.empty_like(dense(c))


@torch.library.custom_op("fastgan::bn_lrelu_backward", mutates_args=())
def bn_lrelu_backward(
    g: Tensor, c: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, r: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(d c, d gamma, d beta), the last two in the statistics' dtype."""
    c = dense(c)
    g = like(g, c)
    dc = torch.empty_like(c)
    n, channels, inner = c.numel(), c.shape[1], c.stride(1)
    if n == 0:
        return dc, torch.zeros_like(r), torch.zeros_like(r)
    positions, last = n // channels, inner == 1
    block_p, block_c = (32, 64) if last else (2048, 1)
    blocks_c = -(-channels // block_c)
    splits, per_split = splits_of(positions, blocks_c, block_p)
    sums = r.new_empty((splits, 2, channels))
    statistics = (*_affine(gamma, beta, mean, r), mean, r)
    with torch.cuda.device_of(c):
        _reduce_kernel[(blocks_c, splits)](
            g,
            c,
            *statistics,
            sums,
            positions,
            channels,
            inner,
            per_split,
            SLOPE=slope,
            CHANNELS_LAST=last,
            WIDE=n >= 2**31,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **capped(c.device),
        )
        sums = sums.sum(0)
        _gradient_kernel[(-(-n // BLOCK),)](
            g,
            c,
            *statistics,
            sums,
            dc,
            n,
            channels,
            inner,
            positions,
            SLOPE=slope,
            CHANNELS_LAST=last,
            GROUP=group_of(channels if inner == 1 else inner),
            BLOCK=BLOCK,
            **capped(c.device),
        )
    return dc, sums[1].clone(), sums[0].clone()


@bn_lrelu_backward.register_fake
def _(g, c, gamma, beta, mean, r, slope):
    return torch.empty_like(dense(c)), torch.empty_like(r), torch.empty_like(r)


@torch.library.custom_op("fastgan::bn_lrelu_double_backward", mutates_args=())
def bn_lrelu_double_backward(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    g: Tensor,
    c: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    r: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for (g, c, gamma) of <a, d c> + <b, d gamma> + <d, d beta> (top of this file)."""

    def wide(v: Tensor) -> Tensor:
        return v.to(r.dtype)[:, None, None]

    def mean_of(t: Tensor) -> Tensor:
        return t.mean([0, 2, 3], keepdim=True)

    scale, shift = (wide(t) for t in _affine(gamma, beta, mean, r))
    a, u, h = a.to(r.dtype), g.to(r.dtype), (c.to(r.dtype) - wide(mean)) * wide(r)
    slopes = torch.where(c * scale + shift > 0, r.new_ones(()), r.new_full((), slope))
    u = u * slopes

    def project(t: Tensor) -> Tensor:
        return t - mean_of(t) - h * mean_of(t * h)

    a_pu = a * project(u)
    dg = (scale * project(a) + wide(b) * h + wide(d)) * slopes
    e = wide(b) * u - scale * (u * mean_of(a * h) + a * mean_of(u * h))
    dc = wide(r) * project(e) - h * scale * wide(r) * mean_of(a_pu)
    return dg.to(g.dtype), dc.to(c.dtype), (r * a_pu.sum([0, 2, 3])).to(gamma.dtype)


@bn_lrelu_double_backward.register_fake
def _(a, b, d, g, c, gamma, beta, mean, r, slope):
    return torch.empty_like(g), torch.empty_like(c), torch.empty_like(gamma)


def _save(ctx, inputs, output):
    c, gamma, beta, mean, r, ctx.slope = inputs
    ctx.save_for_backward(c, gamma, beta, mean, r)


def _backward(ctx, g):
    c, gamma, beta, mean, r = ctx.saved_tensors
    dc, dgamma, dbeta = bn_lrelu_backward(g, c, gamma, beta, mean, r, ctx.slope)
    return dc, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None, None, None


def _save_backward(ctx, inputs, output):
    *tensors, ctx.slope = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, a, b, d):
    dg, dc, dgamma = bn_lrelu_double_backward(a, b, d, *ctx.saved_tensors, ctx.slope)
    return dg, dc, dgamma, None, None, None, None


bn_lrelu.register_autograd(_backward, setup_context=_save)
bn_lrelu_backward.register_autograd(_double_backward, setup_context=_save_backward)


def _geometry(
    x: Tensor, weight: Tensor, stride: int, padding: int, output_padding: int, transposed: bool
) -> tuple[int, ...]:
    """(up, down, pad_y, pad_x, H', W') of `conv_gemm`."""
    (h, w), (kh, kw) = x.shape[2:], weight.shape[2:]
    if transposed:
        size = ((s - 1) * stride - 2 * padding + k + output_padding for s, k in ((h, kh), (w, kw)))
        return stride, 1, kh - 1 - padding, kw - 1 - padding, *size
    return 1, stride, padding, padding, *((s + 2 * padding - k) // stride + 1 for s, k in ((h, kh), (w, kw)))


def _fold(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, bias: Tensor | None, eps: float):
    """(scale, shift): batch normalisation of conv + bias with fixed statistics is scale * conv + shift."""
    scale = gamma * (var + eps).rsqrt()
    return scale, beta + (-mean if bias is None else bias - mean) * scale


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    output_padding: int,
    transposed: bool,
) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    return F.conv2d(x, weight, bias, stride, padding)


@torch.no_grad()
def _move(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float):
    """running += momentum * (batch - running), the variance unbiased, in place."""
    if count:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype) * (count / (count - 1)), momentum)


def conv_bn_act_ref(
    x,
    weight,
    bias,
    gamma,
    beta,
    running_mean,
    running_var,
    stride,
    padding,
    output_padding,
    training,
    momentum,
    eps,
    slope,
    transposed,
) -> Tensor:
    """The reference of `conv2d_bn_act` and `conv_transpose2d_bn_act`."""
    c = _convolution(x, weight, bias, stride, padding, output_padding, transposed)
    if c.numel():
        c = F.batch_norm(c, running_mean, running_var, gamma, beta, training, momentum, eps)
    # In place its derivative is read off its result, so that the normalised values need not be kept.
    return F.leaky_relu(c, slope, inplace=slope >= 0)


def _library(
    x,
    weight,
    bias,
    gamma,
    beta,
    running_mean,
    running_var,
    stride,
    padding,
    output_padding,
    training,
    momentum,
    eps,
    slope,
    transposed,
) -> Tensor:
    """The library's convolution and statistics, the fused normalisation behind it."""
    if not training:
        scale, shift = _fold(gamma, beta, running_mean, running_var, bias, eps)
        weight = weight * (scale[:, None, None] if transposed else scale[:, None, None, None])
        c = _convolution(x, weight, shift, stride, padding, output_padding, transposed)
        return F.leaky_relu(c, slope)
    c = _convolution(x, weight, bias, stride, padding, output_padding, transposed)
    with torch.no_grad():
        var, mean = torch.var_mean(c.to(torch.promote_types(x.dtype, torch.float32)), [0, 2, 3], correction=0)
    _move(running_mean, running_var, mean, var, c[:, 0].numel(), momentum)
    return bn_lrelu(c, gamma, beta, mean, (var + eps).rsqrt(), slope)


def _triton(
    x,
    weight,
    bias,
    gamma,
    beta,
    running_mean,
    running_var,
    stride,
    padding,
    output_padding,
    training,
    momentum,
    eps,
    slope,
    transposed,
) -> Tensor:
    if x.is_cuda and x.dtype == torch.float64:  # no matrix instructions that tl.dot could use
        return conv_bn_act_ref(
            *(x, weight, bias, gamma, beta, running_mean, running_var),
            *(stride, padding, output_padding, training, momentum, eps, slope, transposed),
        )
    geometry = _geometry(x, weight, stride, padding, output_padding, transposed)
    w = weight.transpose(0, 1) if transposed else weight
    if not training:
        scale, shift = _fold(gamma, beta, running_mean, running_var, bias, eps)
        w = (w * scale[:, None, None, None]).to(x.dtype)
        epilogue = ("lrelu", slope, 1.0, None)
        return conv_gemm(x, w, None, None, None, shift, geometry, transposed, *epilogue)
    c, mean, var = conv_gemm_stats(x, w.to(x.dtype), bias, geometry, transposed)
    mean, var = mean.detach(), var.detach()
    _move(running_mean, running_var, mean, var, c[:, 0].numel(), momentum)
    return bn_lrelu(c, gamma, beta, mean, (var + eps).rsqrt(), slope)


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    (
        size,
        channels_last,
        shape,
        has_bias,
        stride,
        padding,
        output_padding,
        training,
        eps,
        slope,
        transposed,
    ) = key
    shape = tuple(min(s, 20) for s in shape[:2]) + shape[2:] if small else shape
    c_in, c_out = shape[:2] if transposed else shape[1::-1]
    side = 8 if small else max(2 ** min((size - 1) // 3, 7), shape[2])
    n = 3 if small else max(2 ** (size - 1) // side**2, 2)
    x = torch.randn(n, c_in, side, side, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = (torch.randn(shape, device=device) / (c_in * shape[2] * shape[3]) ** 0.5).to(dtype)
    wide = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
    bias = torch.randn(c_out, **wide).requires_grad_() if has_bias else None
    gamma, beta = (
        (1 + torch.randn(c_out, **wide) / 4).requires_grad_(),
        torch.randn(c_out, **wide).requires_grad_(),
    )
    mean, var = torch.randn(c_out, **wide), torch.rand(c_out, **wide) + 0.5
    args = (stride, padding, output_padding, training, 0.1, eps, slope, transposed)
    return x.requires_grad_(), weight.requires_grad_(), bias, gamma, beta, mean, var, *args


CONV_BN_ACT = Op(
    "conv_bn_act", {"triton": _triton, "library": _library, "reference": conv_bn_act_ref}, _sample
)


def _conv_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    output_padding: int,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
    transposed: bool,
    impl: str | None,
) -> Tensor:
    vectors = {
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
        "bias": bias,
    }
    check_tensors(x, weight=weight, **vectors)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    channel, layout = (0, "[Cin, Cout, kh, kw]") if transposed else (1, "[Cout, Cin, kh, kw]")
    if weight.ndim != 4 or weight.shape[channel] != x.shape[1]:
        raise ValueError(
            f"weight must be {layout} with Cin {x.shape[1]} to match x: got {list(weight.shape)}"
        )
    c_out = weight.shape[1 - channel]
    for name, v in vectors.items():
        if v is not None and v.shape != (c_out,):
            raise ValueError(f"{name} must have shape [{c_out}] to match weight: got {list(v.shape)}")
    if stride < 1 or padding < 0 or not 0 <= output_padding < max(stride, 1):
        raise ValueError(
            "stride must be at least 1, padding at least 0 and output_padding less than stride: "
            f"got {stride}, {padding} and {output_padding}"
        )
    if output_padding and not transposed:
        raise ValueError(f"output_padding belongs to a transposed convolution: got {output_padding}")
    if slope < 0:
        raise ValueError(f"slope must be at least 0: got {slope}")
    *_, out_h, out_w = _geometry(x, weight, stride, padding, output_padding, transposed)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"weight {list(weight.shape)} with padding {padding} leaves no output of x {list(x.shape)}"
        )
    count = x.shape[0] * out_h * out_w
    if training and count == 1:
        raise ValueError(f"training needs more than one value a channel: got x {list(x.shape)}")

    def key():
        sizes = bucket(x.shape[0] * x.shape[2] * x.shape[3]), is_channels_last(x), tuple(weight.shape)
        return *sizes, bias is not None, stride, padding, output_padding, training, eps, slope, transposed

    args = (
        weight,
        bias,
        gamma,
        beta,
        running_mean,
        running_var,
        stride,
        padding,
        output_padding,
        training,
        momentum,
        eps,
        slope,
    )
    return CONV_BN_ACT(x, *args, transposed, key=key, impl=impl)


def conv_transpose2d_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bias: Tensor | None = None,
    stride: int = 2,
    padding: int = 1,
    output_padding: int = 0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.2,
    *,
    impl: str | None = None,
) -> Tensor:
    """y = lrelu(batch_norm(conv_transpose2d(x, weight) + bias), slope); slope 0 is ReLU, 1 no activation.

    x [N, Cin, H, W]; weight [Cin, Cout, kh, kw]; the vectors [Cout]. In `training` the batch's statistics
    normalise and the running ones are updated in place, running += momentum * (batch - running), with the
    unbiased variance; otherwise the running ones normalise. Statistics are computed in fp32. Returns
    [N, Cout, (H - 1) * stride - 2 * padding + kh + output_padding, ...] in x's dtype. Raises ValueError for
    shapes that do not match and for a single value a channel in training.
    """
    rest = (stride, padding, output_padding, training, momentum, eps, slope, True, impl)
    return _conv_bn_act(x, weight, gamma, beta, running_mean, running_var, bias, *rest)


def conv2d_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bias: Tensor | None = None,
    stride: int = 2,
    padding: int = 1,
    output_padding: int = 0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.2,
    *,
    impl: str | None = None,
) -> Tensor:
    """As `conv_transpose2d_bn_act` with a convolution: weight [Cout, Cin, kh, kw], output_padding 0."""
    rest = (stride, padding, output_padding, training, momentum, eps, slope, False, impl)
    return _conv_bn_act(x, weight, gamma, beta, running_mean, running_var, bias, *rest)


def _elementwise_builds() -> list[Build]:
    sizes = dict.fromkeys(("n", "n_channels", "inner", "positions", "n_positions", "per_split"), "i32")
    types = sizes | dict.fromkeys(("p_g", "p_c", "p_y", "p_dc"), "*bf16")
    flat = {"SLOPE": 0.2, "CHANNELS_LAST": True, "GROUP": 8, "BLOCK": BLOCK}
    tiles = {"SLOPE": 0.2, "CHANNELS_LAST": True, "WIDE": False, "BLOCK_P": 32, "BLOCK_C": 64}
    kernels = [
        ("batch norm and lrelu", _normalize_kernel, flat, BLOCK, 4),
        ("batch norm's reduction", _reduce_kernel, tiles, 0, 0),
        ("batch norm's gradient", _gradient_kernel, flat, BLOCK, 6),
    ]
    builds = []
    for name, kernel, constants, elements, least in kernels:
        names = [n for n in kernel.arg_names if n not in constants]
        signature = {n: types.get(n, "*fp32") for n in names}
        build = Build(f"{name} bf16", kernel, signature, constants, elements=elements, least=least)
        builds.append(build._replace(unaligned=("n", "positions", "n_positions", "per_split")))
    return builds


_PLAIN = ("p_s_in", "p_s_out", "p_noise")
OFFLINE = [
    *conv_builds("conv_transpose2d with statistics", "bf16", (*_PLAIN, "p_bias"), False, UP=2, KH=4, KW=4),
    *conv_builds("conv_transpose2d folded", "bf16", (*_PLAIN, "p_count", "p_stats"), True, UP=2, KH=4, KW=4),
    *_elementwise_builds(),
]
