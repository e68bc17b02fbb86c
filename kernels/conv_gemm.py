"""Convolution as an implicit matrix product, closed under differentiation.

    y[n, o, i] = act(s_out[n, o] * v[n, o, i] + noise[n, i] + bias[o]),
    v[n, o, i] = sum_{c, u} w[o, c, u] * s_in[n, c] * z[n, c, i * down + u - pad]

z is x with up - 1 zeros after every sample. Only taps that meet a sample are visited: output pixels of one
phase i mod up share the same few taps, so a transposed convolution is up^2 small dense ones whose results are
stored interleaved (polyphase form). Rows of the product are pixels, columns output channels, and the sum runs
over taps and input channels.

With w' the flipped, transposed weights, the adjoint in x is the same operation: up and down exchanged, pad
k - 1 - pad, s_in and s_out exchanged. The adjoint in w is the second operation, `conv_gemm_weight`,

    dw[o, c, u] = sum_{n, i} s_out[n, o] * g[n, o, i] * s_in[n, c] * z[n, c, i * down + u - pad],

whose own adjoints are the first again. Gradients of a scale are sums over the pixels of a sample. Every
backward is made of these two operations and PyTorch's own, so derivatives of any order are right.
No kernel uses atomics: partial sums go to memory and are added in a fixed order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.kernels.dispatch import Build, bucket, capped, jit, tl, tuned

# What autotuning may pick. Rows are pixels (forward) or output channels (weight gradient).
CONV_CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
]
WEIGHT_CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
]
WEIGHT_PROGRAMS = 512  # enough to fill a GPU; the weight gradient splits its sum over pixels to get there
SLOPE_BELOW_ZERO = {"linear": 1.0, "relu": 0.0, "lrelu": 0.2}  # alpha replaces lrelu's


@jit
def _tap(i_t, phase, pad, K: tl.constexpr, UP: tl.constexpr):
    """Tap number of the i_t-th one that this phase visits."""
    return ((pad - phase) % UP + UP) % UP + i_t * UP


@jit
def _conv_kernel(
    p_x,
    p_w,
    p_s_in,
    p_s_out,
    p_noise,
    p_bias,
    p_y,
    p_count,
    p_stats,
    batch,
    c_in,
    in_h,
    in_w,
    c_out,
    out_h,
    out_w,
    x_n,
    x_c,
    x_h,
    x_w,
    w_o,
    w_c,
    w_h,
    w_w,
    y_n,
    y_c,
    y_h,
    y_w,
    s_in_n,
    s_in_c,
    s_out_n,
    s_out_c,
    noise_n,
    noise_h,
    noise_w,
    pad_y,
    pad_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    FLIP: tl.constexpr,
    ALPHA: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    b_n = tl.cdiv(c_out, BLOCK_N)
    i_phase = (pid // b_n) % (UP * UP)
    i_m = pid // (b_n * UP * UP)
    phase_y, phase_x = i_phase // UP, i_phase % UP
    # Outputs of this phase; at least one, for the divisions: masks know better.
    q_h = tl.maximum(tl.cdiv(out_h - phase_y, UP), 0)
    q_w = tl.maximum(tl.cdiv(out_w - phase_x, UP), 0)
    pixels = q_h * q_w
    if PER_IMAGE:
        tiles = tl.cdiv(tl.cdiv(out_h, UP) * tl.cdiv(out_w, UP), BLOCK_M)
        i_b = (i_m // tiles).to(tl.int64)
        i_q = (i_m % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = i_q < pixels
        image = tl.full([BLOCK_M], 0, tl.int64)
    else:
        row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        i_b = (row // tl.maximum(pixels, 1)).to(tl.int64)
        i_q = row % tl.maximum(pixels, 1)
        m_row = row < batch * pixels
        image = i_b
    i_qy, i_qx = i_q // tl.maximum(q_w, 1), i_q % tl.maximum(q_w, 1)

    o_out = (pid % b_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out = o_out < c_out
    first_y = _tap(0, phase_y, pad_y, KH, UP)
    first_x = _tap(0, phase_x, pad_x, KW, UP)
    taps_y = tl.cdiv(tl.maximum(KH - first_y, 0), UP)
    taps_x = tl.cdiv(tl.maximum(KW - first_x, 0), UP)
    i_y0 = i_qy * DOWN + (phase_y + first_y - pad_y) // UP
    i_x0 = i_qx * DOWN + (phase_x + first_x - pad_x) // UP
    p_x += i_b * x_n if PER_IMAGE else 0
    p_y += i_b * y_n if PER_IMAGE else 0
    o_image = 0 if PER_IMAGE else image * x_n

    b_c = tl.cdiv(c_in, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(taps_y * taps_x * b_c):
        i_t = k // b_c
        o_c = (k % b_c) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_c = o_c < c_in
        t_y, t_x = i_t // taps_x, i_t % taps_x
        i_y, i_x = i_y0 + t_y, i_x0 + t_x
        m_x = m_row & (i_y >= 0) & (i_y < in_h) & (i_x >= 0) & (i_x < in_w)
        o_x = o_image + i_y * x_h + i_x * x_w
        a = tl.load(p_x + o_x[:, None] + o_c[None, :] * x_c, m_x[:, None] & m_c[None, :], 0.0)
        u_y, u_x = first_y + t_y * UP, first_x + t_x * UP
        if FLIP:
            u_y, u_x = KH - 1 - u_y, KW - 1 - u_x
        o_w = u_y * w_h + u_x * w_w + o_c[:, None] * w_c + o_out[None, :] * w_o
        b = tl.load(p_w + o_w, m_c[:, None] & m_out[None, :], 0.0)
        if p_s_in is not None:
            s = tl.load(p_s_in + i_b * s_in_n + o_c * s_in_c, m_c, 0.0)[None, :]
            a = (a.to(ACC) * s.to(ACC)).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    m_y = m_row[:, None] & m_out[None, :]
    if p_s_out is not None:
        if PER_IMAGE:
            s = tl.load(p_s_out + i_b * s_out_n + o_out * s_out_c, m_out, 0.0)[None, :]
        else:
            s = tl.load(p_s_out + image[:, None] * s_out_n + o_out[None, :] * s_out_c, m_y, 0.0)
        acc *= s.to(ACC)
    i_oy, i_ox = i_qy * UP + phase_y, i_qx * UP + phase_x
    if p_noise is not None:
        noise = tl.load(p_noise + i_b * noise_n + i_oy * noise_h + i_ox * noise_w, m_row, 0.0)
        acc += noise.to(ACC)[:, None]
    if p_bias is not None:
        acc += tl.load(p_bias + o_out, m_out, 0.0).to(ACC)[None, :]
    if p_stats is not None:
        # Count, sum and centred sum of squares of this tile, to be merged without cancellation.
        tile = i_m.to(tl.int64) * (UP * UP) + i_phase
        count = tl.sum(m_row.to(tl.int32))
        total = tl.sum(tl.where(m_row[:, None], acc, 0.0), 0)
        delta = tl.where(m_row[:, None], acc - (total / tl.maximum(count, 1))[None, :], 0.0)
        tl.store(p_count + tile, count)
        tl.store(p_stats + tile * 2 * c_out + o_out, total, m_out)
        tl.store(p_stats + (tile * 2 + 1) * c_out + o_out, tl.sum(delta * delta, 0), m_out)
    acc = tl.where(acc > 0, acc, acc * ALPHA) * GAIN
    if CLAMP is not None:
        limit = tl.full([1, 1], CLAMP, ACC)
        acc = tl.minimum(tl.maximum(acc, -limit), limit)
    o_y = (i_oy * y_h + i_ox * y_w)[:, None] + o_out[None, :] * y_c
    if not PER_IMAGE:
        o_y += (image * y_n)[:, None]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), m_y)


@jit
def _stats_kernel(
    p_count, p_stats, p_mean, p_var, tiles, channels, total, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Merge the tiles: mean = sum s_t / total, var = (sum m2_t + sum n_t (s_t / n_t - mean)^2) / total."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    sums = tl.zeros([BLOCK_T, BLOCK_C], p_stats.dtype.element_ty)
    for t in range(0, tiles, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m = (o_t < tiles)[:, None] & m_c[None, :]
        sums += tl.load(p_stats + o_t.to(tl.int64)[:, None] * 2 * channels + o_c[None, :], m, 0.0)
    mean = tl.sum(sums, 0) / total
    squares = tl.zeros([BLOCK_T, BLOCK_C], p_stats.dtype.element_ty)
    for t in range(0, tiles, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m = (o_t < tiles)[:, None] & m_c[None, :]
        p_t = p_stats + o_t.to(tl.int64)[:, None] * 2 * channels + o_c[None, :]
        count = tl.load(p_count + o_t, o_t < tiles, 0)[:, None]
        delta = tl.load(p_t, m, 0.0) / tl.maximum(count, 1) - mean[None, :]
        squares += tl.load(p_t + channels, m, 0.0) + count * delta * delta
    tl.store(p_mean + o_c, mean, m_c)
    tl.store(p_var + o_c, tl.sum(squares, 0) / total, m_c)


@jit
def _weight_kernel(
    p_x,
    p_g,
    p_s_x,
    p_s_g,
    p_dw,
    batch,
    c_x,
    in_h,
    in_w,
    c_g,
    g_height,
    g_width,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_c,
    g_h,
    g_w,
    s_x_n,
    s_x_c,
    s_g_n,
    s_g_c,
    dw_split,
    dw_g,
    dw_x,
    dw_h,
    dw_w,
    pad_y,
    pad_x,
    split_blocks,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DOWN: tl.constexpr,
    FLIP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid, i_t, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b_x = tl.cdiv(c_x, BLOCK_N)
    o_g = (pid // b_x) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_x = (pid % b_x) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_g, m_x = o_g < c_g, o_x < c_x
    u_y, u_x = i_t // KW, i_t % KW
    pixels = g_height * g_width
    blocks = tl.cdiv(pixels, BLOCK_K)  # of one image: a block never spans two, so scales are vectors
    start = i_split * split_blocks
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(start, tl.minimum(start + split_blocks, batch * blocks)):
        i_b = (k // blocks).to(tl.int64)
        i_p = (k % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_p = i_p < pixels
        i_gy, i_gx = i_p // g_width, i_p % g_width
        i_y, i_x = i_gy * DOWN + u_y - pad_y, i_gx * DOWN + u_x - pad_x
        m_in = m_p & (i_y >= 0) & (i_y < in_h) & (i_x >= 0) & (i_x < in_w)
        p_gk = p_g + i_b * g_n + (i_gy * g_h + i_gx * g_w)[None, :] + o_g[:, None] * g_c
        g = tl.load(p_gk, m_p[None, :] & m_g[:, None], 0.0)
        p_xk = p_x + i_b * x_n + (i_y * x_h + i_x * x_w)[:, None] + o_x[None, :] * x_c
        x = tl.load(p_xk, m_in[:, None] & m_x[None, :], 0.0)
        if p_s_g is not None:
            s = tl.load(p_s_g + i_b * s_g_n + o_g * s_g_c, m_g, 0.0)[:, None]
            g = (g.to(ACC) * s.to(ACC)).to(g.dtype)
        if p_s_x is not None:
            s = tl.load(p_s_x + i_b * s_x_n + o_x * s_x_c, m_x, 0.0)[None, :]
            x = (x.to(ACC) * s.to(ACC)).to(x.dtype)
        acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=ACC)
    if FLIP:
        u_y, u_x = KH - 1 - u_y, KW - 1 - u_x
    o_dw = u_y * dw_h + u_x * dw_w + o_g[:, None] * dw_g + o_x[None, :] * dw_x
    p_split = p_dw + i_split.to(tl.int64) * dw_split
    tl.store(p_split + o_dw, acc.to(p_dw.dtype.element_ty), m_g[:, None] & m_x[None, :])


def _accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype != torch.float32 or torch.backends.cudnn.allow_tf32 else "ieee"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _by_padding(configs: list[dict], rows: int, columns: int) -> list[dict]:
    """The configurations that pad the product least first; of equals, the one with the largest tile."""

    def cost(config: dict) -> tuple[int, int]:
        m, n = config["BLOCK_M"], config["BLOCK_N"]
        return _cdiv(rows, m) * m * _cdiv(columns, n) * n, -m * n

    return sorted(configs, key=cost)


def _scale_strides(s: Tensor | None) -> tuple[int, int]:
    return (0, 0) if s is None else (s.stride(0), s.stride(1))


def _noise_strides(noise: Tensor | None) -> tuple[int, int, int]:
    if noise is None:
        return 0, 0, 0
    strides = [0 if noise.shape[i] == 1 else noise.stride(i) for i in range(noise.ndim)]
    n, _, h, w = [0] * (4 - noise.ndim) + strides
    return n, h, w


def _empty(x: Tensor, channels: int, h: int, w: int) -> Tensor:
    """Output in x's layout: channels_last where x's channels are adjacent."""
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.empty((x.shape[0], channels, h, w), dtype=x.dtype, device=x.device, memory_format=layout)


def _empty_weight(x: Tensor, c_out: int, kh: int, kw: int) -> Tensor:
    shape = (c_out, x.shape[1], kh, kw)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def launch_conv(
    x: Tensor,
    w: Tensor,
    s_in: Tensor | None,
    s_out: Tensor | None,
    noise: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
    flip: bool,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    stats: bool = False,
    config: dict | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the forward kernel; with `stats` also the mean and biased variance of the output, [Cout] each."""
    up, down, pad_y, pad_x, out_h, out_w = geometry
    n, c_in, h, width = x.shape
    c_out, _, kh, kw = w.shape
    y = _empty(x, c_out, out_h, out_w)
    wide = torch.promote_types(x.dtype, torch.float32)
    if y.numel() == 0:
        mean, var = (x.new_full((c_out,), float("nan"), dtype=wide) if stats else None for _ in range(2))
        return y, mean, var
    if 1 not in w.stride()[:2]:  # channels adjacent: for this product, or for its adjoint's transposed view
        w = w.contiguous(memory_format=torch.channels_last)
    pixels = _cdiv(out_h, up) * _cdiv(out_w, up)
    tensors = (s_out, noise, bias)

    def launch(config: dict) -> tuple[Tensor | None, Tensor | None, int]:
        b_m, b_n = config["BLOCK_M"], config["BLOCK_N"]
        per_image = pixels >= b_m
        tiles = (n * _cdiv(pixels, b_m) if per_image else _cdiv(n * pixels, b_m)) * up**2
        count = x.new_empty((tiles,), dtype=torch.int32) if stats else None
        partial = x.new_empty((tiles, 2, c_out), dtype=wide) if stats else None
        # A tile of several images would gather its scales; so small an image is scaled beforehand.
        before = None if per_image else s_in
        image = x if before is None else (x.to(wide) * before[:, :, None, None]).to(x.dtype)
        _conv_kernel[(tiles * _cdiv(c_out, b_n),)](
            image,
            w,
            s_in if before is None else None,
            *tensors,
            y,
            count,
            partial,
            n,
            c_in,
            h,
            width,
            c_out,
            out_h,
            out_w,
            *image.stride(),
            *w.stride(),
            *y.stride(),
            *_scale_strides(s_in),
            *_scale_strides(s_out),
            *_noise_strides(noise),
            pad_y,
            pad_x,
            KH=kh,
            KW=kw,
            UP=up,
            DOWN=down,
            FLIP=flip,
            ALPHA=alpha if act == "lrelu" else SLOPE_BELOW_ZERO[act],
            GAIN=gain,
            CLAMP=clamp,
            PER_IMAGE=per_image,
            ACC=_accumulator(x.dtype),
            PRECISION=_precision(x.dtype),
            **config,
            **capped(x.device),
        )
        return count, partial, tiles

    with torch.cuda.device_of(x):
        configs = [config] if config else _by_padding(CONV_CONFIGS, n * pixels, c_out)
        key = (x.dtype, bucket(n * pixels), c_in, c_out, kh, up, down, x.stride(1) == 1, stats)
        key = (*key, *(t is None for t in (s_in, *tensors)))
        count, partial, tiles = launch(tuned("conv_gemm", key, configs, launch, x.device))
        if not stats:
            return y, None, None
        mean, var = x.new_empty((c_out,), dtype=wide), x.new_empty((c_out,), dtype=wide)
        _stats_kernel[(_cdiv(c_out, 16),)](
            count, partial, mean, var, tiles, c_out, n * out_h * out_w, BLOCK_T=64, BLOCK_C=16
        )
    return y, mean, var


def launch_weight(
    x: Tensor,
    g: Tensor,
    s_in: Tensor | None,
    s_out: Tensor | None,
    geometry: Sequence[int],
    flip: bool,
    kh: int,
    kw: int,
    config: dict | None = None,
) -> Tensor:
    """Run the weight gradient kernel: dw [Cout, Cin, kh, kw], channels_last, in x's dtype."""
    up, down, pad_y, pad_x = geometry[:4]
    dw = _empty_weight(x, g.shape[1], kh, kw)
    if x.numel() == 0 or g.numel() == 0:
        return dw.zero_()
    dw_g, dw_x = dw.stride(0), dw.stride(1)
    if (
        up > 1
    ):  # the same sum over pairs of pixels, seen from x: the image is g and the strides those of `down`
        x, g, s_in, s_out, dw_g, dw_x = g, x, s_out, s_in, dw_x, dw_g
        down, pad_y, pad_x, flip = up, kh - 1 - pad_y, kw - 1 - pad_x, not flip
    wide = torch.promote_types(x.dtype, torch.float32)

    def launch(config: dict) -> Tensor:
        tiles = _cdiv(g.shape[1], config["BLOCK_M"]) * _cdiv(x.shape[1], config["BLOCK_N"])
        blocks = x.shape[0] * _cdiv(g.shape[2] * g.shape[3], config["BLOCK_K"])
        split_blocks = _cdiv(blocks, min(max(WEIGHT_PROGRAMS // (tiles * kh * kw), 1), blocks))
        splits = _cdiv(blocks, split_blocks)
        partial = dw if splits == 1 else dw.new_empty((splits, dw.numel()), dtype=wide)
        _weight_kernel[(tiles, kh * kw, splits)](
            x,
            g,
            s_in,
            s_out,
            partial,
            x.shape[0],
            x.shape[1],
            x.shape[2],
            x.shape[3],
            g.shape[1],
            g.shape[2],
            g.shape[3],
            *x.stride(),
            *g.stride(),
            *_scale_strides(s_in),
            *_scale_strides(s_out),
            dw.numel(),
            dw_g,
            dw_x,
            dw.stride(2),
            dw.stride(3),
            pad_y,
            pad_x,
            split_blocks,
            KH=kh,
            KW=kw,
            DOWN=down,
            FLIP=flip,
            ACC=_accumulator(x.dtype),
            PRECISION=_precision(x.dtype),
            **config,
            **capped(x.device),
        )
        return dw if splits == 1 else partial.sum(0).to(dw.dtype).as_strided(dw.shape, dw.stride())

    with torch.cuda.device_of(x):
        configs = [config] if config else _by_padding(WEIGHT_CONFIGS, g.shape[1], x.shape[1])
        key = (x.dtype, bucket(g.shape[0] * g.shape[2] * g.shape[3]), g.shape[1], x.shape[1], kh, down)
        key = (*key, x.stride(1) == 1, g.stride(1) == 1, s_in is None, s_out is None)
        return launch(tuned("conv_gemm_weight", key, configs, launch, x.device))


@torch.library.custom_op("fastgan::conv_gemm", mutates_args=())
def conv_gemm(
    x: Tensor,
    w: Tensor,
    s_in: Tensor | None,
    s_out: Tensor | None,
    noise: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
    flip: bool,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """The operation at the top of this file, one kernel.

    x [N, Cin, H, W], w [Cout, Cin, kh, kw] of x's dtype; s_in [N, Cin] and s_out [N, Cout] of any floating
    dtype, s_out nowhere zero when it is differentiated; noise [N or 1, 1, H', W'] or [H', W']; bias [Cout];
    geometry (up, down, pad_y, pad_x, H', W') with up or down 1; `flip` reads the taps backwards (a true
    convolution). act linear, relu or lrelu, with gain > 0 and alpha >= 0. Returns [N, Cout, H', W'].
    """
    return launch_conv(x, w, s_in, s_out, noise, bias, geometry, flip, act, alpha, gain, clamp)[0]


@conv_gemm.register_fake
def _(x, w, s_in, s_out, noise, bias, geometry, flip, act, alpha, gain, clamp):
    return _empty(x, w.shape[0], geometry[4], geometry[5])


@torch.library.custom_op("fastgan::conv_gemm_stats", mutates_args=())
def conv_gemm_stats(
    x: Tensor, w: Tensor, bias: Tensor | None, geometry: Sequence[int], flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain convolution and, from its epilogue, each channel's mean and biased variance, without gradient."""
    y, mean, var = launch_conv(
        x, w, None, None, None, bias, geometry, flip, "linear", 0.0, 1.0, None, stats=True
    )
    assert mean is not None and var is not None
    return y, mean, var


@conv_gemm_stats.register_fake
def _(x, w, bias, geometry, flip):
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = (x.new_empty((w.shape[0],), dtype=wide) for _ in range(2))
    return _empty(x, w.shape[0], geometry[4], geometry[5]), mean, var


@torch.library.custom_op("fastgan::conv_gemm_weight", mutates_args=())
def conv_gemm_weight(
    x: Tensor,
    g: Tensor,
    s_in: Tensor | None,
    s_out: Tensor | None,
    geometry: Sequence[int],
    flip: bool,
    kh: int,
    kw: int,
) -> Tensor:
    """dw [Cout, Cin, kh, kw] of x [N, Cin, H, W] and the cotangent g [N, Cout, H', W'] (top of this file)."""
    return launch_weight(x, g, s_in, s_out, geometry, flip, kh, kw)


@conv_gemm_weight.register_fake
def _(x, g, s_in, s_out, geometry, flip, kh, kw):
    return _empty_weight(x, g.shape[1], kh, kw)


def convolve(x: Tensor, w: Tensor, s_in, s_out, geometry: Sequence[int], flip: bool) -> Tensor:
    """`conv_gemm` without an epilogue."""
    return conv_gemm(x, w, s_in, s_out, None, None, geometry, flip, "linear", 0.0, 1.0, None)


def _adjoint(g: Tensor, w: Tensor, s_in, s_out, geometry: Sequence[int], flip: bool, size) -> Tensor:
    """The transpose of x -> conv_gemm(x, w), from outputs back to an image of `size`."""
    up, down, pad_y, pad_x = geometry[:4]
    kh, kw = w.shape[2:]
    back = (down, up, kh - 1 - pad_y, kw - 1 - pad_x, *size)
    return convolve(g, w.transpose(0, 1), s_in, s_out, back, not flip)


def _pixel_sum(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """sum_i a[n, c, i] * b[n, c, i], in the precision and dtype of `scale` [N, C] or better."""
    return (a * b).sum([2, 3], dtype=torch.promote_types(a.dtype, scale.dtype))


def _gradients(x, w, s_in, s_out, g, geometry, flip, needs_x, needs_w, needs_s_in):
    gx = gw = gs_in = None
    if s_in is not None and needs_s_in:
        t = _adjoint(g, w, s_out, None, geometry, flip, x.shape[2:])
        gs_in = _pixel_sum(t, x, s_in).to(s_in.dtype)
        gx = (t * s_in[:, :, None, None].to(t.dtype)) if needs_x else None
    elif needs_x:
        gx = _adjoint(g, w, s_out, s_in, geometry, flip, x.shape[2:])
    if needs_w:
        gw = conv_gemm_weight(x, g, s_in, s_out, geometry, flip, w.shape[2], w.shape[3])
    return gx, gw, gs_in


def _by_sign(y: Tensor, positive: float, other: float) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return torch.where(y > 0, y.new_full((), positive, dtype=wide), y.new_full((), other, dtype=wide))


def slope_at(y: Tensor, positive: float, other: float, clamp: float | None) -> Tensor:
    """d y / d u of a clamped, piecewise linear activation from its output y."""
    slope = _by_sign(y, positive, other)
    return slope if clamp is None else slope * (y.abs() < y.new_full((), clamp))


@torch.library.custom_op("fastgan::conv_gemm_undo", mutates_args=())
def conv_gemm_undo(
    y: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    w: Tensor,
    s_in: Tensor | None,
    s_out: Tensor,
    geometry: Sequence[int],
    flip: bool,
    slope: float,
    gain: float,
) -> Tensor:
    """z = s_out * conv(s_in * x, w), which no one kept, from `conv_gemm`'s output y.

    Undefined where y is clamped or the slope is 0: the cotangent of z's partner is 0 there. Its derivatives
    are those of the convolution.
    """
    z = (y * _by_sign(y, 1 / gain, 1 / (gain * (slope or 1.0)))).to(y.dtype)
    if noise is not None:
        z -= noise
    if bias is not None:
        z -= bias[:, None, None]
    return z


@conv_gemm_undo.register_fake
def _(y, noise, bias, x, w, s_in, s_out, geometry, flip, slope, gain):
    return torch.empty_like(y)


def _save_undo(ctx, inputs, output):
    _, _, _, x, w, s_in, s_out, ctx.geometry, ctx.flip, _, _ = inputs
    ctx.save_for_backward(x, w, s_in, s_out, output)


def _backward_undo(ctx, g):
    x, w, s_in, s_out, z = ctx.saved_tensors
    needs = ctx.needs_input_grad[3:7]
    gx, gw, gs_in = _gradients(x, w, s_in, s_out, g, ctx.geometry, ctx.flip, *needs[:3])
    gs_out = (_pixel_sum(g, z, s_out) / s_out).to(s_out.dtype) if needs[3] else None
    return None, None, None, gx, gw, gs_in, gs_out, None, None, None, None


conv_gemm_undo.register_autograd(_backward_undo, setup_context=_save_undo)


def _save(ctx, inputs, output):
    x, w, s_in, s_out, noise, bias, ctx.geometry, ctx.flip, act, alpha, ctx.gain, ctx.clamp = inputs
    ctx.slope = SLOPE_BELOW_ZERO[act] if act != "lrelu" else alpha
    plain = act == "linear" and ctx.gain == 1 and ctx.clamp is None
    needs_y = not plain or (s_out is not None and ctx.needs_input_grad[3])
    ctx.plain = plain
    ctx.save_for_backward(x, w, s_in, s_out, noise, bias, output if needs_y else None)


def _backward(ctx, g):
    x, w, s_in, s_out, noise, bias, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if not ctx.plain:
        g = (g * slope_at(y, ctx.gain, ctx.gain * ctx.slope, ctx.clamp)).to(g.dtype)
    gx, gw, gs_in = _gradients(x, w, s_in, s_out, g, ctx.geometry, ctx.flip, needs[0], needs[1], needs[2])
    gs_out = gnoise = gbias = None
    if s_out is not None and needs[3]:
        z = conv_gemm_undo(y, noise, bias, x, w, s_in, s_out, ctx.geometry, ctx.flip, ctx.slope, ctx.gain)
        gs_out = (_pixel_sum(g, z, s_out) / s_out).to(s_out.dtype)
    if noise is not None and needs[4]:
        gnoise = g.sum(1, keepdim=True).sum_to_size(noise.shape).to(noise.dtype)
    if bias is not None and needs[5]:
        gbias = g.sum([0, 2, 3]).to(bias.dtype)
    return gx, gw, gs_in, gs_out, gnoise, gbias, None, None, None, None, None, None


conv_gemm.register_autograd(_backward, setup_context=_save)


def _save_stats(ctx, inputs, output):
    x, w, bias, ctx.geometry, ctx.flip = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, w)


def _backward_stats(ctx, g, _mean, _var):
    x, w = ctx.saved_tensors
    needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
    gx, gw, _ = _gradients(x, w, None, None, g, ctx.geometry, ctx.flip, needs_x, needs_w, False)
    gbias = g.sum([0, 2, 3]).to(ctx.bias_dtype) if ctx.bias_dtype and needs_bias else None
    return gx, gw, gbias, None, None


conv_gemm_stats.register_autograd(_backward_stats, setup_context=_save_stats)


def _save_weight(ctx, inputs, output):
    x, g, s_in, s_out, ctx.geometry, ctx.flip, _, _ = inputs
    ctx.save_for_backward(x, g, s_in, s_out)


def _backward_weight(ctx, v):
    x, g, s_in, s_out = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gx, _, gs_in = _gradients(x, v, s_in, s_out, g, ctx.geometry, ctx.flip, needs[0], False, needs[2])
    gg = gs_out = None
    if s_out is not None and needs[3]:
        t = convolve(x, v, s_in, None, ctx.geometry, ctx.flip)
        gs_out = _pixel_sum(t, g, s_out).to(s_out.dtype)
        gg = t * s_out[:, :, None, None].to(t.dtype) if needs[1] else None
    elif needs[1]:
        gg = convolve(x, v, s_in, s_out, ctx.geometry, ctx.flip)
    return gx, gg, gs_in, gs_out, None, None, None, None


conv_gemm_weight.register_autograd(_backward_weight, setup_context=_save_weight)


def _builds(
    label: str, kernel, configs: list[dict], dtype: str, absent: Sequence[str], **flags
) -> list[Build]:
    """Builds for channels_last images whose channel counts are multiples of 16."""
    ones = {"x_c", "y_c", "g_c", "w_c", "s_in_c", "s_out_c", "s_x_c", "s_g_c", "noise_w"}
    odd = ("batch", "in_h", "in_w", "out_h", "out_w", "g_height", "g_width", "pad_y", "pad_x", "split_blocks")
    types = {"p_count": "*i32"} | dict.fromkeys(("p_x", "p_w", "p_y", "p_g"), f"*{dtype}")
    constants = {n: 1 for n in kernel.arg_names if n in ones} | dict.fromkeys(absent) | flags
    constants |= {"ACC": tl.float32, "PRECISION": "tf32"}
    builds = []
    for config in configs:
        blocks = {k: v for k, v in config.items() if k.startswith("BLOCK")}
        fixed = constants | blocks
        pointer = ("*fp32" if n.startswith("p_") else "i32" for n in kernel.arg_names)
        signature = {
            n: types.get(n, t) for n, t in zip(kernel.arg_names, pointer, strict=True) if n not in fixed
        }
        name = f"{label} {dtype} {'x'.join(str(v) for v in blocks.values())}"
        unaligned = tuple(n for n in signature if n in odd)
        warps, stages = config["num_warps"], config["num_stages"]
        builds.append(Build(name, kernel, signature, fixed, warps, stages, unaligned=unaligned))
    return builds


def conv_builds(label: str, dtype: str, absent: Sequence[str], activate: bool, **flags) -> list[Build]:
    """The forward kernel in all its configurations, without the operands `absent`, for `offline`."""
    flags = {"KH": 3, "KW": 3, "UP": 1, "DOWN": 1, "FLIP": False, "PER_IMAGE": True} | flags
    flags |= (
        {"ALPHA": 0.2, "GAIN": 1.5, "CLAMP": 256.0}
        if activate
        else {"ALPHA": 1.0, "GAIN": 1.0, "CLAMP": None}
    )
    return _builds(label, _conv_kernel, CONV_CONFIGS, dtype, absent, **flags)


def weight_builds(label: str, dtype: str, absent: Sequence[str] = ()) -> list[Build]:
    """What `OFFLINE` lists of the weight gradient's kernel."""
    flags = {"KH": 3, "KW": 3, "DOWN": 1, "FLIP": False}
    return _builds(label, _weight_kernel, WEIGHT_CONFIGS, dtype, absent, **flags)
