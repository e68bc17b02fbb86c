"""Normalisation, affine transform, activation and nearest upsampling in two passes: statistics, then the
rest.

    h = (x - mean) * rstd,   u = scale * h + shift,   y = upsample(act(u))

Statistics are over the batch and the pixels (BatchNorm), over the pixels of a sample (instance norm, AdaIN)
or given (evaluation); scale and shift are one a channel or one a sample and channel. With e = act'(u) * dy,
dy summed over the pixels that share an x, and <.> the mean over what the statistics are over:

    dx = rstd * (scale * e - <scale * e> - h * <scale * e * h>),   dscale = sum e * h,   dshift = sum e

For cotangents v of dx, p of dscale and q of dshift, L = <v, dx> + <p, dscale> + <q, dshift> is dy times the
derivative of y along (v, p, q), so

    d dy = act'(u) * (scale * rstd * (v - <v> - h * <v * h>) + p * h + q)

and, the activation being piecewise linear, d scale and d x are combinations of e, v, h and 1 whose
coefficients come from the sums of e, e * h, v, v * h and e * v: the double backward too is one reduction and
one elementwise pass. Smooth activations run as a bias_act of their own behind a linear normalisation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.kernels.bias_act import (
    ACTIVATIONS,
    PIECEWISE_LINEAR,
    _activate,
    _bias_act,
    activation,
    activation_slope,
)
from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl, tuned
from fastgan.kernels.memory import (
    FLAT_CONFIGS,
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


@jit
def _coefficient(p_k, k, i_k, n_k):
    """Row k of the coefficients [k, rows * channels] at i_k."""
    return tl.load(p_k + k * n_k + i_k)


@jit
def _coefficient_index(
    base, i_group, rows, n_channels, inner, GROUP: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """row * channels + channel of flat offsets; there are `rows` rows of coefficients, 1 or one a sample."""
    if CHANNELS_LAST:
        i_c = flat_channels(base, i_group, n_channels, 1, GROUP, True)
        return i_c + (((base + i_group) // (n_channels * inner)) % rows).to(tl.int32)[:, None] * n_channels
    else:
        return flat_channels(base, i_group, rows * n_channels, inner, GROUP, False)


@jit
def _up_offsets(o, width, n_channels, CHANNELS_LAST: tl.constexpr):
    """Offset, after 2x upsampling, of the upper left of the four copies of the element at o."""
    if CHANNELS_LAST:
        pixel = o // n_channels
        row = pixel // width
        return (4 * row * width + 2 * (pixel - row * width)) * n_channels + o % n_channels
    else:
        row = o // width
        return 4 * row * width + 2 * (o - row * width)


@jit
def _load_up(p, o, m, width, n_channels, CHANNELS_LAST: tl.constexpr, UP: tl.constexpr):
    """The element at o, or the sum of its four copies."""
    if UP == 1:
        return load(p + o, m)
    else:
        o = _up_offsets(o, width, n_channels, CHANNELS_LAST)
        if CHANNELS_LAST:
            below = 2 * width * n_channels
            x = load(p + o, m) + load(p + o + n_channels, m)
            return x + load(p + o + below, m) + load(p + o + below + n_channels, m)
        else:
            pair = o[:, :, None] + tl.arange(0, 2)[None, None, :]
            m = m[:, :, None] & (tl.arange(0, 2) >= 0)[None, None, :]
            return tl.sum(load(p + pair, m) + load(p + pair + 2 * width, m), axis=2)


@jit
def _store_up(p, o, y, m, width, n_channels, CHANNELS_LAST: tl.constexpr, UP: tl.constexpr):
    if UP == 1:
        tl.store(p + o, y, mask=m)
    else:
        o = _up_offsets(o, width, n_channels, CHANNELS_LAST)
        if CHANNELS_LAST:
            below = 2 * width * n_channels
            tl.store(p + o, y, mask=m)
            tl.store(p + o + n_channels, y, mask=m)
            tl.store(p + o + below, y, mask=m)
            tl.store(p + o + below + n_channels, y, mask=m)
        else:
            pair = o[:, :, None] + tl.arange(0, 2)[None, None, :]
            m = m[:, :, None] & (tl.arange(0, 2) >= 0)[None, None, :]
            y = tl.join(y, y)
            tl.store(p + pair, y, mask=m)
            tl.store(p + pair + 2 * width, y, mask=m)


@jit
def _moments_kernel(
    p_x,
    p_k,
    p_sums,
    n_positions,
    n_channels,
    inner,
    per_split,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of x - k and (x - k)^2: [2, splits, rows, channels]; k, a sample of x, keeps digits that a mean
    far from zero would cost."""
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_split, i_row = tl.program_id(1), tl.program_id(2)
    m_c = i_c < n_channels
    k = tl.load(p_k + i_row * n_channels + i_c, mask=m_c, other=0.0)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], p_sums.dtype.element_ty)
    s2 = s1
    end = tl.minimum((i_split + 1) * per_split, n_positions)
    for start in range(i_split * per_split, end, BLOCK_P):
        i_p = start + tl.arange(0, BLOCK_P)
        m = (i_p < end)[:, None] & m_c[None, :]
        o = tile_offsets(i_row * n_positions + i_p, i_c, n_channels, inner, CHANNELS_LAST, WIDE)
        x = tl.where(m, load(p_x + o, m) - k[None, :], 0.0)
        s1 += x
        s2 += x * x
    o = (i_split * tl.num_programs(2) + i_row) * n_channels + i_c
    tl.store(p_sums + o, tl.sum(s1, axis=0), mask=m_c)
    o += tl.num_programs(1) * tl.num_programs(2) * n_channels
    tl.store(p_sums + o, tl.sum(s2, axis=0), mask=m_c)


@jit
def _apply_kernel(
    p_x,
    p_k,
    p_y,
    n,
    rows,
    n_channels,
    inner,
    width,
    ALPHA: tl.constexpr,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = act((x - k0) * k1 + k2)."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    i_k = _coefficient_index(base, i_group, rows, n_channels, inner, GROUP, CHANNELS_LAST)
    n_k = rows * n_channels
    x = load(p_x + base + o, m)
    u = (x - _coefficient(p_k, 0, i_k, n_k)) * _coefficient(p_k, 1, i_k, n_k) + _coefficient(p_k, 2, i_k, n_k)
    y = activation(u, ALPHA, ACT)
    _store_up(p_y, base + o, y, m, width, n_channels, CHANNELS_LAST, UP)


@jit
def _backward_sums_kernel(
    p_dy,
    p_x,
    p_v,
    p_k,
    p_sums,
    n_positions,
    n_channels,
    inner,
    width,
    per_split,
    ALPHA: tl.constexpr,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of e and e * h and, with p_v, of v, v * h and e * v: [2 or 5, splits, rows, channels].

    k: mean, rstd, scale, shift.
    """
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_split, i_row = tl.program_id(1), tl.program_id(2)
    m_c = i_c < n_channels
    n_k = tl.num_programs(2) * n_channels
    p_k += i_row * n_channels + i_c
    mean = tl.load(p_k, mask=m_c, other=0.0)[None, :]
    rstd = tl.load(p_k + n_k, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_k + 2 * n_k, mask=m_c, other=0.0)[None, :]
    shift = tl.load(p_k + 3 * n_k, mask=m_c, other=0.0)[None, :]
    s_e = tl.zeros([BLOCK_P, BLOCK_C], p_sums.dtype.element_ty)
    s_eh, s_v, s_vh, s_ev = s_e, s_e, s_e, s_e
    end = tl.minimum((i_split + 1) * per_split, n_positions)
    for start in range(i_split * per_split, end, BLOCK_P):
        i_p = start + tl.arange(0, BLOCK_P)
        m = (i_p < end)[:, None] & m_c[None, :]
        o = tile_offsets(i_row * n_positions + i_p, i_c, n_channels, inner, CHANNELS_LAST, WIDE)
        h = (load(p_x + o, m) - mean) * rstd
        e = _load_up(p_dy, o, m, width, n_channels, CHANNELS_LAST, UP)
        e *= activation_slope(h * scale + shift, ALPHA, ACT)
        s_e += e
        s_eh += e * h
        if p_v is not None:
            v = load(p_v + o, m)
            s_v += v
            s_vh += v * h
            s_ev += e * v
    step = tl.num_programs(1) * n_k
    o = i_split * n_k + i_row * n_channels + i_c
    tl.store(p_sums + o, tl.sum(s_e, axis=0), mask=m_c)
    tl.store(p_sums + step + o, tl.sum(s_eh, axis=0), mask=m_c)
    if p_v is not None:
        tl.store(p_sums + 2 * step + o, tl.sum(s_v, axis=0), mask=m_c)
        tl.store(p_sums + 3 * step + o, tl.sum(s_vh, axis=0), mask=m_c)
        tl.store(p_sums + 4 * step + o, tl.sum(s_ev, axis=0), mask=m_c)


@jit
def _backward_apply_kernel(
    p_dy,
    p_x,
    p_v,
    p_k,
    p_ddy,
    p_dx,
    n,
    rows,
    n_channels,
    inner,
    width,
    ALPHA: tl.constexpr,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = k4 * e + k5 * h + k6 and, with p_v, + k7 * v, and ddy = act'(u) * (k8 * v + k9 * h + k10).

    k0 to k3: mean, rstd, scale, shift.
    """
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m = o < n - base
    i_k = _coefficient_index(base, i_group, rows, n_channels, inner, GROUP, CHANNELS_LAST)
    n_k = rows * n_channels
    h = (load(p_x + base + o, m) - _coefficient(p_k, 0, i_k, n_k)) * _coefficient(p_k, 1, i_k, n_k)
    u = h * _coefficient(p_k, 2, i_k, n_k) + _coefficient(p_k, 3, i_k, n_k)
    slope = activation_slope(u, ALPHA, ACT)
    e = _load_up(p_dy, base + o, m, width, n_channels, CHANNELS_LAST, UP) * slope
    dx = _coefficient(p_k, 4, i_k, n_k) * e + _coefficient(p_k, 5, i_k, n_k) * h
    dx += _coefficient(p_k, 6, i_k, n_k)
    if p_v is not None:
        v = load(p_v + base + o, m)
        dx += _coefficient(p_k, 7, i_k, n_k) * v
        ddy = _coefficient(p_k, 8, i_k, n_k) * v + _coefficient(p_k, 9, i_k, n_k) * h
        ddy = slope * (ddy + _coefficient(p_k, 10, i_k, n_k))
        _store_up(p_ddy, base + o, ddy, m, width, n_channels, CHANNELS_LAST, UP)
    tl.store(p_dx + base + o, dx, mask=m)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _coefficients(x: Tensor, rows: int, *values: Tensor) -> Tensor:
    """[k, rows, C] of values [1 or rows, C]."""
    return torch.stack([v.to(_wide(x)).expand(rows, x.shape[1]) for v in values])


def _channels_innermost(x: Tensor, meta: dict[str, Any]) -> bool:
    return is_channels_last(x) or (x.shape[2] * x.shape[3] == 1 and meta.get("UP", 1) == 1)


def _reduce(kernel: Any, tensors: tuple, x: Tensor, k: Tensor, count: int, **meta: Any) -> Tensor:
    """The `count` sums [count, rows, C] that a reduction kernel makes for every row and channel."""
    rows, (n, channels, h, w) = k.shape[-2], x.shape
    last = _channels_innermost(x, meta)
    block_p, block_c = (32, 64) if last else (2048, 1)
    blocks_c, positions = -(-channels // block_c), n // rows * h * w
    splits, per_split = splits_of(positions, blocks_c * rows, block_p)
    sums = x.new_empty((count, splits, rows, channels), dtype=_wide(x))
    sizes = (positions, channels, h * w, *((w,) if meta else ()), per_split)
    with torch.cuda.device_of(x):
        kernel[(blocks_c, splits, rows)](
            *tensors,
            k,
            sums,
            *sizes,
            **meta,
            CHANNELS_LAST=last,
            WIDE=x.numel() >= 2**31,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **capped(x.device),
        )
    return sums.sum(1)


def _map(name: str, kernel: Any, tensors: tuple, x: Tensor, k: Tensor, **meta: Any) -> None:
    """One flat pass over x; k [coefficients, rows, C] comes last but for the outputs in `tensors`."""
    n, channels, inner = x.numel(), x.shape[1], x.shape[2] * x.shape[3]
    last = _channels_innermost(x, meta)

    def launch(config: tuple[int, int]) -> None:
        block, warps = config
        kernel[(-(-n // block),)](
            *tensors,
            n,
            k.shape[1],
            channels,
            inner,
            x.shape[3],
            **meta,
            CHANNELS_LAST=last,
            GROUP=group_of(channels if last else inner),
            BLOCK=block,
            num_warps=warps,
            **capped(x.device),
        )

    with torch.cuda.device_of(x):
        launch(tuned(name, (x.dtype, *meta.values(), bucket(n), last), FLAT_CONFIGS, launch, x.device))


def _upsampled(x: Tensor, upsample: int) -> Tensor:
    """An empty result for the dense x."""
    n, c, h, w = x.shape
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    size = (n, c, h * upsample, w * upsample)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


@torch.library.custom_op("fastgan::norm_act", mutates_args=())
def _norm_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    mode: str,
    eps: float,
    act: str,
    alpha: float,
    upsample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and biased variance [rows, C]. mode: "batch", "instance", or "eval" with mean and var [1,
    C]."""
    x = dense(x)
    y = _upsampled(x, upsample)
    n, c = x.shape[:2]
    if mode == "eval":
        assert mean is not None and var is not None
        mean, var = mean.to(_wide(x), copy=True), var.to(_wide(x), copy=True)
    elif x.numel() == 0:
        mean, var = (x.new_zeros(1 if mode == "batch" else n, c, dtype=_wide(x)) for _ in range(2))
    else:
        k = (x[:1, :, 0, 0] if mode == "batch" else x[:, :, 0, 0]).to(_wide(x)).contiguous()
        s1, s2 = _reduce(_moments_kernel, (x,), x, k, 2) / (x.numel() // k.numel())
        mean, var = k + s1, (s2 - s1.square()).clamp_min(0)
    if x.numel():
        rows = max(mean.shape[0], scale.shape[0], shift.shape[0])
        k = _coefficients(x, rows, mean, (var + eps).rsqrt() * scale, shift)
        _map("norm_act", _apply_kernel, (x, k, y), x, k, ALPHA=alpha, ACT=act, UP=upsample)
    return y, mean, var


def _rows(x: Tensor, mode: str) -> int:
    return x.shape[0] if mode == "instance" else 1


@_norm_act.register_fake
def _(x, scale, shift, mean, var, mode, eps, act, alpha, upsample):
    stats = [x.new_empty((_rows(x, mode), x.shape[1]), dtype=_wide(x)) for _ in range(2)]
    return _upsampled(dense(x), upsample), *stats


@torch.library.custom_op("fastgan::norm_act_backward", mutates_args=())
def _norm_act_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    mode: str,
    eps: float,
    act: str,
    alpha: float,
    upsample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift, these two in fp32 (fp64) and of the shape of scale."""
    x = dense(x)
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, *(torch.zeros_like(scale, dtype=_wide(x)) for _ in range(2))
    dy = like(dy, x)
    meta = {"ALPHA": alpha, "ACT": act, "UP": upsample}
    rows = max(mean.shape[0], scale.shape[0])
    rstd = (var + eps).rsqrt()
    k = _coefficients(x, rows, mean, rstd, scale, shift)
    s_e, s_eh = _reduce(_backward_sums_kernel, (dy, x, None), x, k, 2, **meta)
    mean_of = _group_mean(x, mode, rows)
    k5, k6 = -rstd * mean_of(scale * s_eh), -rstd * mean_of(scale * s_e)
    k = torch.cat([k, _coefficients(x, rows, rstd * scale, k5, k6)])
    _map("norm_act_backward", _backward_apply_kernel, (dy, x, None, k, None, dx), x, k, **meta)
    return dx, _as_rows(s_eh, scale), _as_rows(s_e, scale)


def _as_rows(sums: Tensor, scale: Tensor) -> Tensor:
    """Sums [rows, C] in the shape of scale, in memory of their own, as the results of an op must be."""
    return sums.sum(0, keepdim=True) if scale.shape[0] == 1 else sums.clone()


def _group_mean(x: Tensor, mode: str, rows: int):
    """From sums [rows, C] the mean over what the statistics are over: [1 or rows, C]; zero where they are
    given."""
    pixels = x.shape[2] * x.shape[3]
    if mode == "eval":
        return lambda s: torch.zeros_like(s[:1])
    if mode == "instance":
        return lambda s: s / pixels
    return lambda s: s.sum(0, keepdim=True) / (pixels * x.shape[0])


@_norm_act_backward.register_fake
def _(dy, x, scale, shift, mean, var, mode, eps, act, alpha, upsample):
    wide = _wide(x)
    return (
        torch.empty_like(dense(x)),
        torch.empty_like(scale, dtype=wide),
        torch.empty_like(scale, dtype=wide),
    )


@torch.library.custom_op("fastgan::norm_act_double_backward", mutates_args=())
def _norm_act_double_backward(
    v: Tensor,
    p: Tensor,
    q: Tensor,
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    mode: str,
    eps: float,
    act: str,
    alpha: float,
    upsample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """d dy, d x and d scale of <v, dx> + <p, dscale> + <q, dshift>."""
    x = dense(x)
    ddy, dx = _upsampled(x, upsample), torch.empty_like(x)
    if x.numel() == 0:
        return ddy, dx, torch.zeros_like(scale, dtype=_wide(x))
    dy, v = like(dy, x), like(v, x)
    meta = {"ALPHA": alpha, "ACT": act, "UP": upsample}
    rows = max(mean.shape[0], scale.shape[0])
    rstd = (var + eps).rsqrt()
    scale_wide = scale.to(rstd.dtype)
    k = _coefficients(x, rows, mean, rstd, scale, shift)
    s_e, s_eh, s_v, s_vh, s_ev = _reduce(_backward_sums_kernel, (dy, x, v), x, k, 5, **meta)
    mean_of = _group_mean(x, mode, rows)
    v1, vh = mean_of(s_v), mean_of(s_vh)
    w1, wh = mean_of(scale_wide * s_e), mean_of(scale_wide * s_eh)
    covariance = mean_of(scale_wide * s_ev) - w1 * v1 - wh * vh
    k4 = rstd * p - rstd**2 * vh * scale_wide
    k5 = rstd**2 * (2 * vh * wh - covariance) - rstd * mean_of(p * s_eh)
    k6 = rstd**2 * (vh * w1 + wh * v1) - rstd * mean_of(p * s_e)
    k7 = -(rstd**2) * wh
    k8 = scale_wide * rstd
    k = torch.cat([k, _coefficients(x, rows, k4, k5, k6, k7, k8, p - k8 * vh, q - k8 * v1)])
    _map("norm_act_double_backward", _backward_apply_kernel, (dy, x, v, k, ddy, dx), x, k, **meta)
    return ddy, dx, _as_rows(rstd * (s_ev - v1 * s_e - vh * s_eh), scale)


@_norm_act_double_backward.register_fake
def _(v, p, q, dy, x, scale, shift, mean, var, mode, eps, act, alpha, upsample):
    x = dense(x)
    return _upsampled(x, upsample), torch.empty_like(x), torch.empty_like(scale, dtype=_wide(x))


def _setup(ctx, inputs, output):
    x, scale, shift, _, _, *ctx.args = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, scale, shift, mean, var)


def _backward(ctx, dy, _dmean, _dvar):
    x, scale, shift, mean, var = ctx.saved_tensors
    dx, dscale, dshift = _norm_act_backward(dy, x, scale, shift, mean, var, *ctx.args)
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype), *(None,) * 7


def _setup_backward(ctx, inputs, output):
    dy, x, scale, shift, mean, var, *ctx.args = inputs
    ctx.save_for_backward(dy, x, scale, shift, mean, var)


def _double_backward(ctx, v, p, q):
    dy, x, scale, shift, mean, var = ctx.saved_tensors
    ddy, dx, dscale = _norm_act_double_backward(v, p, q, dy, x, scale, shift, mean, var, *ctx.args)
    return ddy, dx, dscale.to(scale.dtype), *(None,) * 8


_norm_act.register_autograd(_backward, setup_context=_setup)
_norm_act_backward.register_autograd(_double_backward, setup_context=_setup_backward)


def norm_act_triton(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mode: str,
    momentum: float,
    eps: float,
    act: str,
    alpha: float,
    upsample: int,
) -> Tensor:
    """The registered op, then the running statistics. Arguments as `norm_act_ref`."""
    c = x.shape[1]
    scale = x.new_ones(1, c, dtype=_wide(x)) if scale is None else scale.reshape(-1, c)
    shift = x.new_zeros(1, c, dtype=_wide(x)) if shift is None else shift.reshape(-1, c)
    scale, shift = torch.broadcast_tensors(scale, shift)
    given = (running_mean, running_var) if mode == "eval" else (None, None)
    given = [None if t is None else t.reshape(1, c) for t in given]
    fused = act if act in PIECEWISE_LINEAR else "linear"
    y, mean, var = _norm_act(x, scale, shift, *given, mode, eps, fused, alpha, upsample)
    if mode == "batch" and running_mean is not None and running_var is not None and x.numel():
        m = x.numel() // c
        with torch.no_grad():
            running_mean.lerp_(mean[0].to(running_mean.dtype), momentum)
            running_var.lerp_((var[0] * (m / (m - 1))).to(running_var.dtype), momentum)
    return y if fused == act else _bias_act(y, None, 1, act, alpha, 1.0, None)


def _instance_norm(x: Tensor, eps: float) -> Tensor:
    """F.instance_norm in the layout of x.

    ATen's copies channels_last to contiguous memory and leaves the result there, for the next convolution to
    copy back. Batch norm of one sample is the same thing, and takes either layout: for N samples as well,
    unless they are so small that N calls cost more than the copies.
    """
    if not is_channels_last(x):
        return F.instance_norm(x, eps=eps)
    if x.shape[0] == 1:
        return F.batch_norm(x, None, None, None, None, True, 0.0, eps)
    if x.device.type == "cpu" and x[0].numel() >= 4096 and not torch.compiler.is_compiling():
        samples = [F.batch_norm(s, None, None, None, None, True, 0.0, eps) for s in x.split(1)]
        return torch.cat(samples)
    return F.instance_norm(x, eps=eps).contiguous(memory_format=torch.channels_last)


def norm_act_ref(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mode: str,
    momentum: float,
    eps: float,
    act: str,
    alpha: float,
    upsample: int,
) -> Tensor:
    """scale and shift [C], [N, C] or None; mode "batch", "instance" or "eval"."""
    if x.numel() == 0:
        y = x
    elif mode == "instance":
        y = _instance_norm(x, eps)
    else:
        y = F.batch_norm(x, running_mean, running_var, None, None, mode == "batch", momentum, eps)
    if scale is not None:
        y = y * scale.to(x.dtype).reshape(-1, x.shape[1], 1, 1)
    if shift is not None:
        y = y + shift.to(x.dtype).reshape(-1, x.shape[1], 1, 1)
    y = _activate(y, act, alpha)
    if upsample > 1:
        y = y.repeat_interleave(upsample, dim=2).repeat_interleave(upsample, dim=3)
    return y


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    """Arguments of the class (size bucket, channels_last, rows of scale, mode, act, upsample)."""
    size, channels_last, rows, mode, act, upsample = key
    n = 3 if small else min(2 ** (size // 3), 64)
    c = 24 if small else min(2 ** (size // 3), 256)
    side = 7 if small else max(int((2 ** (size - 1) / (n * c)) ** 0.5), 2)
    x = torch.randn(n, c, side, side, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    shape = (c,) if rows == 1 else (n, c)
    affine = [
        torch.randn(shape, device=device).to(dtype).requires_grad_() if rows else None for _ in range(2)
    ]
    running = (
        (torch.randn(c, device=device), torch.rand(c, device=device) + 0.5)
        if mode == "eval"
        else (None, None)
    )
    return x.requires_grad_(), *affine, *running, mode, 0.1, 1e-5, act, ACTIVATIONS[act].alpha, upsample


NORM_ACT = Op("norm_act", {"triton": norm_act_triton, "reference": norm_act_ref}, _sample)


def _run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mode: str,
    momentum: float,
    eps: float,
    act: str,
    alpha: float | None,
    upsample: int,
    impl: str | None,
) -> Tensor:
    check_tensors(x, scale=scale, shift=shift, running_mean=running_mean, running_var=running_var)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}: got {act!r}")
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2: got {upsample}")
    n, c, h, w = x.shape
    over = h * w if mode == "instance" else n * h * w
    if mode != "eval" and x.numel() and over < 2:
        raise ValueError(f"statistics need more than one value a channel: got x {list(x.shape)}")
    if mode == "eval" and (running_mean is None or running_var is None):
        raise ValueError("evaluation needs running_mean and running_var: got None")
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and t.shape != (c,):
            raise ValueError(f"{name} must be [{c}] to match x: got {list(t.shape)}")

    def key():
        rows = 0 if scale is None else scale.numel() // c
        return bucket(x.numel()), is_channels_last(x), min(rows, 2), mode, act, upsample

    slope = ACTIVATIONS[act].alpha if alpha is None else float(alpha)
    return NORM_ACT(
        x,
        scale,
        shift,
        running_mean,
        running_var,
        mode,
        momentum,
        eps,
        act,
        slope,
        upsample,
        key=key,
        impl=impl,
    )


def _check_affine(x: Tensor, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and x.ndim == 4 and t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to match x {list(x.shape)}: got {list(t.shape)}")


def batch_norm_act(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    upsample: int = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """y = upsample(act(gamma * (x - mean) / sqrt(var + eps) + beta)) for x [N, C, H, W] (Ioffe & Szegedy
    2015).

    gamma, beta, running_mean, running_var: [C] or None. Training takes the statistics of the batch and moves
    the running ones by `momentum` (the variance unbiased), in place; evaluation takes the running ones.
    `upsample` 2 repeats every pixel 2x2. Raises ValueError for shapes that do not match, a single value a
    channel.
    """
    _check_affine(x, x.shape[1:2], gamma=gamma, beta=beta)
    mode = "batch" if training else "eval"
    return _run(x, gamma, beta, running_mean, running_var, mode, momentum, eps, act, alpha, upsample, impl)


def conditional_batch_norm_act(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    alpha: float | None = None,
    upsample: int = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """`batch_norm_act` whose gain and bias [N, C] belong to the sample (Dumoulin et al. 2017; Brock et al.
    2019).

    BigGAN's layers predict the gain around one: pass 1 + gain(y).
    """
    _check_affine(x, x.shape[:2], gain=gain, bias=bias)
    mode = "batch" if training else "eval"
    return _run(x, gain, bias, running_mean, running_var, mode, momentum, eps, act, alpha, upsample, impl)


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    upsample: int = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """y = act(weight * (x - mean) / sqrt(var + eps) + bias), statistics of every sample and channel over its
    pixels.

    x [N, C, H, W]; weight, bias [C] or None (Ulyanov et al. 2016, as CycleGAN has it: no affine).
    """
    _check_affine(x, x.shape[1:2], weight=weight, bias=bias)
    return _run(x, weight, bias, None, None, "instance", 0.0, eps, act, alpha, upsample, impl)


def adain(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-8,
    act: str = "linear",
    alpha: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """y = scale[n, c] * (x - mean[n, c]) / sqrt(var[n, c] + eps) + shift[n, c] (Karras et al. 2019, equation
    1).

    x [N, C, H, W]; scale, shift [N, C]: nothing is added to the scale here.
    """
    _check_affine(x, x.shape[:2], scale=scale, shift=shift)
    return _run(x, scale, shift, None, None, "instance", 0.0, eps, act, alpha, 1, impl)


def _offline() -> list[Build]:
    builds = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        t, k = f"*{dtype}", "*fp32"
        for last in (False, True):
            tail = f"{dtype} {'nhwc' if last else 'nchw'}"
            flat_sizes = dict.fromkeys(("n", "rows", "n_channels", "inner", "width"), "i32")
            flat_skip = ("rows", "n_channels") if not last else ("rows", "inner", "width")
            tile_sizes = dict.fromkeys(("n_positions", "n_channels", "inner", "per_split"), "i32")
            block_p, block_c = (32, 64) if last else (2048, 1)
            tile = {"CHANNELS_LAST": last, "WIDE": False, "BLOCK_P": block_p, "BLOCK_C": block_c}
            builds.append(
                Build(
                    f"norm_act_moments {tail}",
                    _moments_kernel,
                    {"p_x": t, "p_k": k, "p_sums": k, **tile_sizes},
                    tile,
                    elements=2048,
                    least=size,
                )
            )
            for up in (1, 2):
                meta = {"ALPHA": 0.2, "ACT": "lrelu", "UP": up}
                name = f"{tail} up{up}"
                for block, warps in FLAT_CONFIGS if dtype == "bf16" else FLAT_CONFIGS[:1]:
                    flat = {**meta, "CHANNELS_LAST": last, "GROUP": 8, "BLOCK": block}
                    common = (warps, 2, block)
                    builds += [
                        Build(
                            f"norm_act {name} {block}",
                            _apply_kernel,
                            {"p_x": t, "p_k": k, "p_y": t, **flat_sizes},
                            flat,
                            *common,
                            size * (1 + up * up),
                            flat_skip,
                        ),
                        Build(
                            f"norm_act_backward {name} {block}",
                            _backward_apply_kernel,
                            {"p_dy": t, "p_x": t, "p_k": k, "p_dx": t, **flat_sizes},
                            {**flat, "p_v": None, "p_ddy": None},
                            *common,
                            size * (2 + up * up),
                            flat_skip,
                        ),
                        Build(
                            f"norm_act_double_backward {name} {block}",
                            _backward_apply_kernel,
                            {
                                **dict.fromkeys(("p_dy", "p_x", "p_v"), t),
                                "p_k": k,
                                **dict.fromkeys(("p_ddy", "p_dx"), t),
                                **flat_sizes,
                            },
                            flat,
                            *common,
                            size * (3 + 2 * up * up),
                            flat_skip,
                        ),
                    ]
                sums = {"p_dy": t, "p_x": t, "p_v": t, "p_k": k, "p_sums": k, **tile_sizes, "width": "i32"}
                builds.append(
                    Build(
                        f"norm_act_double_backward_sums {name}",
                        _backward_sums_kernel,
                        sums,
                        tile | meta,
                        elements=2048,
                        least=size * (2 + up * up),
                    )
                )
                sums = {n: v for n, v in sums.items() if n != "p_v"}
                builds.append(
                    Build(
                        f"norm_act_backward_sums {name}",
                        _backward_sums_kernel,
                        sums,
                        {**tile, **meta, "p_v": None},
                        elements=2048,
                        least=size * (1 + up * up),
                    )
                )
    return builds


OFFLINE = _offline()
